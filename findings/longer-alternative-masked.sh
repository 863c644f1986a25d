#!/usr/bin/env bash
# outlines-core 0.2.14: where one allowed text begins another, its masks let a model write the shorter alone.
#
# Good guess: a token is allowed exactly if what the regular expression matches can still be reached with it, as
# llguidance has it; the order of alternatives and the way a text is cut into tokens change nothing.
# What it does: in a|b the second counts only where the first does not match, so that of no|none "none" is never
# allowed. With the longer one first, too, nothing goes on after a complete text but a token that completes another:
# "ne" after "no", not "n". So a choice of answers of which one begins another, or a number with an optional fraction at
# the end, loses its longer ones, and the model is made to write the shorter. JSON's texts have their quotation mark or
# brace behind them and are not hurt.
#   pattern             tokens    outlines-core    llguidance
#   no|none             no ne     refused          allowed
#   none|no             no ne     allowed          allowed
#   none|no             no n e    refused          allowed
#   [0-9](\.[0-9]+)?    1 .5      allowed          allowed
#   [0-9](\.[0-9]+)?    1 . 5     refused          allowed
#   "no"|"none"         "no ne"   allowed          allowed
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check outlines-core==0.2.14 llguidance==1.9.1
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
from llguidance import LLMatcher, LLTokenizer
from outlines_core import Guide, Index, Vocabulary

tokens = ["n", "e", "o", "no", "ne", "1", "5", ".", ".5", '"', '"no', 'ne"']
end = len(tokens)
vocabulary = Vocabulary(end, {token: [i] for i, token in enumerate(tokens)})

def by_outlines(pattern, pieces):
    guide = Guide(Index(pattern, vocabulary))
    for id in map(tokens.index, pieces):
        if id not in guide.get_tokens():
            return False
        guide.advance(id)
    return end in guide.get_tokens()

def by_llguidance(pattern, pieces):
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_regex(pattern))
    ids = list("".join(pieces).encode())
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

number = r"[0-9](\.[0-9]+)?"
found = []
for pattern, pieces in [("no|none", "no ne"), ("none|no", "no ne"), ("none|no", "no n e"), (number, "1 .5"), (number, "1 . 5"),
                        ('"no"|"none"', '"no ne"')]:
    pieces = pieces.split()
    found.append((by_outlines(pattern, pieces), by_llguidance(pattern, pieces)))
    print(pattern, pieces, "outlines-core %s, llguidance %s" % tuple("allowed" if each else "refused" for each in found[-1]))
sys.exit(found != [(each, True) for each in (False, True, False, True, False, True)])
PY
