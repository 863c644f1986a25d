#!/bin/sh
# check_install.sh PREFIX: what make install put there: a program that reports its version, a page and completions with
# every flag of it, and a converter whose files it reads.
prefix=$1
page=$prefix/share/man/man1/llama.1
bash=$prefix/share/bash-completion/completions/llama
zsh=$prefix/share/zsh/site-functions/_llama
fish=$prefix/share/fish/vendor_completions.d/llama.fish
fail() {
    echo "$1"
    exit 1
}
number=$(cat "$(dirname "$0")/../VERSION")
version=$("$prefix/bin/llama" --version) || exit 1
echo "$version"
case $version in "llama $number (commit "*) ;; *) fail "the program says \"$version\", VERSION says $number" ;; esac

# ---- every flag, by each of its names -------------------------------------------------------------------------------

flags=$("$prefix/bin/llama" --help | sed -n 's/^  \(-[a-z, -]*\).*/\1/p' | tr ', ' '\n\n' | grep '^-')
[ "$(echo "$flags" | wc -l)" -gt 40 ] || fail "--help lists: $flags"
grep -q '^.TH LLAMA 1' "$page" || fail "$page: no manual page"
for flag in $flags; do
    name=$(printf '%s\n' "$flag" | sed 's/^-*//')
    grep -qF "\\fB$(printf '%s\n' "$flag" | sed 's/-/\\-/g')\\fR" "$page" || fail "$page: $flag is not there"
    grep -qE "[\" ]$flag[\" ]" "$bash" || fail "$bash: $flag is not there"
    grep -qE "'$flag=?\\[" "$zsh" || fail "$zsh: $flag is not there"
    grep -qE " -[ls] $name( |\$)" "$fish" || fail "$fish: $flag is not there"
done
for section in NAME SYNOPSIS OPTIONS EXAMPLES CHAT JSON 'EXIT STATUS' ENVIRONMENT; do
    grep -qx ".SH $section" "$page" || fail "$page: no section $section"
done

# ---- the page and the completions, where there is what reads them ---------------------------------------------------

out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
if command -v mandoc > /dev/null; then
    # (the date of a page is that of its source, which a build does not know)
    mandoc -Tlint "$page" | grep -v 'missing date' > "$out/lint" && fail "$page: $(cat "$out/lint")"
fi
if command -v groff > /dev/null; then
    groff -ww -man -Tutf8 "$page" 2>&1 > "$out/page" | grep . && fail "$page: groff warns"
fi
if command -v bash > /dev/null; then
    cat > "$out/complete" <<'END'
source "$1"
complete -p llama > /dev/null || exit 1
try() { # EXPECTED WORDS...: what completes the last word
    COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2)) COMPREPLY=()
    _llama
    [ "${COMPREPLY[*]}" = "$1" ] || { echo "bash completes \"${*:2}\" by \"${COMPREPLY[*]}\", expected \"$1\"" && exit 1; }
}
cd "$2" && touch model.bin prompt.txt
try model.bin llama m
try "--temp --temperature" llama model.bin --te
try "bf16 f32 fp8" llama model.bin --precision ""
try "f32 fp8" llama model.bin --precision = f
try "bf16 f32 fp8" llama model.bin --precision =
try prompt.txt llama model.bin -f pro
try prompt.txt llama model.bin --file = pro
try "" llama model.bin -n ""
try model.bin llama -p x -- m
try "" llama -p x -- -
END
    bash --norc "$out/complete" "$bash" "$out" || exit 1
fi
for shell in zsh fish; do
    command -v $shell > /dev/null || continue
    script=$zsh
    [ $shell = zsh ] || script=$fish
    $shell -n "$script" || fail "$script: $shell does not read it"
done

# ---- the converter --------------------------------------------------------------------------------------------------

python3 -c 'import base64; [print(base64.b64encode(bytes([i])).decode(), i) for i in range(256)]' > "$out/ranks" &&
    python3 -B "$prefix/share/llama/convert.py" --vocab-only "$out/ranks" "$out/vocab.bin" || exit 1
ids=$("$prefix/bin/llama" "$out/vocab.bin" --tokenize -p hi)
[ "$ids" = "104 105" ] || fail "the installed converter's vocabulary gives \"$ids\" for hi, expected 104 105"
