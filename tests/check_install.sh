#!/bin/sh
# check_install.sh PREFIX: what make install put there: a program that tells what it is, and a page with every flag of it.
prefix=$1
page=$prefix/share/man/man1/llama.1
"$prefix/bin/llama" --version || exit 1
grep -q '^.TH LLAMA 1' "$page" || { echo "$page: no manual page"; exit 1; }
flags=$("$prefix/bin/llama" --help | sed -n 's/^  \(-[a-z-]*\) .*/\1/p')
[ -n "$flags" ] || { echo "--help lists no flags"; exit 1; }
for flag in $flags; do
    grep -qF ".B $(echo "$flag" | sed 's/-/\\-/g')" "$page" || { echo "$page: $flag is not there"; exit 1; }
done
