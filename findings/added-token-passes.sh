#!/usr/bin/env bash
# tokenizers 0.23.2: an added token's `normalized` orders the search, even where there is no normalizer.
#
# Good guess: `normalized` says whether a token is matched in the text before or after the normalizer; a tokenizer
# without one (LLaMA 3's) treats both alike, and added tokens are found in one pass,
# leftmost first and the longest of those.
# What it does: the whole text is searched for tokens with `normalized: false` first, then what is left for those with
# `normalized: true`. In "abc" with the tokens "ab" and "bc":
#   both false                   ab c
#   "ab" true (as add_tokens writes it), "bc" false   a bc
#   "abc" true, "b" false        a b c
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.2
"$work/venv/bin/python" - <<'PY'
import sys
from tokenizers import AddedToken, Tokenizer, models

def pieces(text, *added):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    assert tokenizer.normalizer is None
    tokenizer.add_tokens([AddedToken(content, normalized=normalized) for content, normalized in added])
    return " ".join(tokenizer.encode(text).tokens)

found = [pieces("abc", ("ab", False), ("bc", False)), pieces("abc", ("ab", True), ("bc", False)),
         pieces("abc", ("abc", True), ("b", False))]
print(found)
sys.exit(found != ["ab c", "a bc", "a b c"])
PY
