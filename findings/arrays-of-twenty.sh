#!/usr/bin/env bash
# lm-format-enforcer 0.11.3: an array ends after 20 items, `additionalProperties: true` allows none, and a property without a type ends the text.
#
# Good guess: what a schema does not limit is not limited; what the enforcer cannot read is refused when the schema is given to it.
# What it does: an array without maxItems may have 20 items and no more, so that a model that lists what it found stops there, as if that
# were all; maxItems=100 lets it go on. Beside `properties`, `additionalProperties: true` allows no other name. Bounds of numbers are not
# looked at. A property that allows any value ({}) is found in the middle of the answer: a line is logged, and from then on only the end
# token is allowed, so that the answer is `{"a"`.
#   schema                                                        text                   allowed
#   array of integers                                             20 items               yes
#   array of integers                                             21 items               no
#   array of integers, maxItems 100                               21 items               yes
#   object with `a`, additionalProperties true                    {"z":1}                no
#   integer from 5 to 10                                          700                    yes
#   object with `a` of any value                                  {"a":1}                no, but `{"a"` as the whole answer
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check lm-format-enforcer==0.11.3
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, sys
from lmformatenforcer import JsonSchemaParser, TokenEnforcer, TokenEnforcerTokenizerData

tokens = [chr(each) for each in range(32, 127)]
end = len(tokens)
tokenizer = TokenEnforcerTokenizerData([(i, token, False) for i, token in enumerate(tokens)], lambda ids: "".join(tokens[i] for i in ids),
                                       end, False, len(tokens) + 1)

def asked(schema, text):
    """Whether the text is allowed as an answer, and how much of it; then what else was allowed at that place."""
    enforcer, ids = TokenEnforcer(tokenizer, JsonSchemaParser(schema)), []
    for token in text:
        allowed = enforcer.get_allowed_tokens(ids).allowed_tokens
        if tokens.index(token) not in allowed:
            return False, len(ids), allowed == [end]
        ids.append(tokens.index(token))
    return end in enforcer.get_allowed_tokens(ids).allowed_tokens, len(ids), False

numbers = {"type": "array", "items": {"type": "integer"}}
with_a = {"type": "object", "properties": {"a": {"type": "integer"}}}
items = lambda n: json.dumps([7] * n)
found = []
for schema, text in ((numbers, items(20)), (numbers, items(21)), (dict(numbers, maxItems=100), items(21)),
                     (with_a, '{"a":1}'), (dict(with_a, additionalProperties=True), '{"z":1}'),
                     ({"type": "integer", "minimum": 5, "maximum": 10}, "700"),
                     ({"type": "object", "properties": {"a": {}}}, '{"a":1}')):
    found.append(asked(schema, text))
    allowed, length, ended = found[-1]
    print(json.dumps(schema), text, "allowed" if allowed else "not allowed after %r" % text[:length], "- only the end is allowed" if ended else "")
sys.exit(found != [(True, 60, False), (False, 59, False), (True, 63, False), (True, 7, False), (False, 2, False), (True, 3, False),
                   (False, 4, True)])
PY
