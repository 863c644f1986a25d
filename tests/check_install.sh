#!/bin/sh
# check_install.sh PREFIX: what make install put there: a program that tells what it is, a page with every flag of it, and a
# converter whose files it reads.
prefix=$1
page=$prefix/share/man/man1/llama.1
"$prefix/bin/llama" --version || exit 1
grep -q '^.TH LLAMA 1' "$page" || { echo "$page: no manual page"; exit 1; }
flags=$("$prefix/bin/llama" --help | sed -n 's/^  \(-[a-z-]*\) .*/\1/p')
[ -n "$flags" ] || { echo "--help lists no flags"; exit 1; }
for flag in $flags; do
    grep -qF ".B $(echo "$flag" | sed 's/-/\\-/g')" "$page" || { echo "$page: $flag is not there"; exit 1; }
done
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
python3 -c 'import base64; [print(base64.b64encode(bytes([i])).decode(), i) for i in range(256)]' > "$out/ranks" &&
    python3 -B "$prefix/share/llama/convert.py" --vocab-only "$out/ranks" "$out/vocab.bin" || exit 1
ids=$("$prefix/bin/llama" "$out/vocab.bin" --tokenize -p hi)
[ "$ids" = "104 105" ] || { echo "the installed converter's vocabulary gives \"$ids\" for hi, expected 104 105"; exit 1; }
