#!/usr/bin/env bash
# tiktoken 0.14.0: of two special tokens of which one begins the other, the order in a hash table decides which is found.
#
# Good guess: at a place where several special tokens fit the longest is taken, as tokenizers does; or the one that was given first.
# What it does: their names become alternatives of a regular expression, in the order of a hash table, and the first that fits counts.
# For some names that is always the longer, for some the shorter, for some it depends on the order in which they are given. Where the
# shorter is the first, allowed_special with the longer alone finds neither: the text is ordinary, and nothing is said.
#   special tokens, in this order    text          found            longer alone allowed
#   <|end|>, <|end|>\n               <|end|>\n     <|end|>\n        <|end|>\n
#   <|end|>\n, <|end|>               <|end|>\n     <|end|>\n        <|end|>\n
#   <a>, <a>b                        <a>b          <a> b            < a > b
#   <a>b, <a>                        <a>b          <a> b            < a > b
#   <tool>, <tool>s                  <tool>s       <tool>s          <tool>s
#   <tool>s, <tool>                  <tool>s       <tool> s         < t o o l > s
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tiktoken==0.14.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import tiktoken
import tokenizers

ranks = {bytes([i]): i for i in range(256)}
wrong = False
for shorter, longer, expected in (("<|end|>", "<|end|>\n", (1, 1)), ("<a>", "<a>b", (2, 2)), ("<tool>", "<tool>s", (1, 2))):
    for names, count in zip(((shorter, longer), (longer, shorter)), expected):
        encoding = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=dict(zip(names, (256, 257))))
        found = [encoding.encode(longer, allowed_special="all"),
                 encoding.encode(longer, allowed_special={longer}, disallowed_special=())]
        print(*map(repr, names), *([encoding.decode([i]) for i in ids] for ids in found))
        wrong |= len(found[0]) != count or len(found[1]) != (1 if count == 1 else len(longer))
    other = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    other.add_special_tokens([shorter, longer])
    wrong |= other.encode(longer).tokens != [longer]
sys.exit(wrong)
PY
