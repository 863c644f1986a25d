#!/usr/bin/env bash
# tiktoken 0.14.0: load_tiktoken_bpe takes a vocabulary from its cache by the spelling of the path,
# whatever file is there now.
#
# Good guess: only what comes from the network is cached; a file of this machine,
# as a checkpoint's tokenizer.model is, is read.
# What it does: it copies local files too into the temporary directory's data-gym-cache, under the hash of the path as
# it was given, and from then on reads the copy, also in other processes. A second model's file of the same relative
# path, or a file that was replaced, gives the first one's vocabulary without a word.
# transformers' TikTokenConverter reads through it.
# Only a hash given as expected_hash is compared; the path written another way is another path.
#   in the directory first     "tokenizer.model"      ->  the first's tokens
#   in the directory second    "tokenizer.model"      ->  the first's tokens
#                              "./tokenizer.model"    ->  the second's
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tiktoken==0.14.0
mkdir "$work/first" "$work/second" "$work/cache"
export TIKTOKEN_CACHE_DIR="$work/cache"
found=
for model in first second; do
    printf '%s 0\n' "$(printf '%s' "$model" | base64)" > "$work/$model/tokenizer.model"
    for path in tokenizer.model ./tokenizer.model; do
        tokens=$(cd "$work/$model" && "$work/venv/bin/python" -c "import sys, tiktoken.load
print(*(token.decode() for token in tiktoken.load.load_tiktoken_bpe(sys.argv[1])))" "$path")
        echo "$model, $path: $tokens"
        found="$found $tokens"
        [ "$model" = second ] || break
    done
done
[ "$found" = " first first second" ]
