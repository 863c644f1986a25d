#!/usr/bin/env bash
# llguidance 1.9.1 and xgrammar 0.2.9: what a grammar made of a JSON Schema allows is not what is valid,
# and not the same in both.
#
# Good guess: masking tokens by a schema lets a model write whatever is valid by the schema; an unsupported keyword is
# refused at least. So a document that one library has allowed, the other allows too.
# What they do: both want an object's keys in the order of "properties" and refuse 1.0 as an integer. xgrammar also
# takes "pattern" for the whole text, allows no key that is not listed, ignores "required" where no type stands beside
# it, and has no escapes, so no line break and no quotation mark, in a string of limited length.
#   schema                            document                 valid    llguidance    xgrammar
#   object of integers a, b           {"a": 1, "b": 2}         yes      yes           yes
#   the same                          {"b": 2, "a": 1}         yes      no            no
#   integer                           1.0                      yes      no            no
#   object of integers a, b           {"a": 1, "c": 3}         yes      yes           no
#   string, pattern "b"               "abc"                    yes      yes           no
#   string                            "a\nb"                   yes      yes           yes
#   string, maxLength 100             "a\nb"                   yes      yes           no
#   required a                        {"b": 1}                 no       no            yes
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check llguidance==1.9.1 xgrammar==0.2.9 torch==2.11.0 jsonschema==4.26.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, sys
import jsonschema
import llguidance
import xgrammar

def by_llguidance(schema, document):
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
    ids = list(document.encode())
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

def by_xgrammar(schema, document):
    tokens = [bytes([i]) for i in range(256)] + [b"</s>"]
    tokenizer = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(tokenizer).compile_json_schema(json.dumps(schema)))
    return matcher.accept_string(document) and matcher.accept_token(256)

integers = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}
string = {"type": "string"}
found = []
for schema, document in [(integers, '{"a": 1, "b": 2}'), (integers, '{"b": 2, "a": 1}'), ({"type": "integer"}, "1.0"),
                         (integers, '{"a": 1, "c": 3}'), (string | {"pattern": "b"}, '"abc"'), (string, r'"a\nb"'),
                         (string | {"maxLength": 100}, r'"a\nb"'), ({"required": ["a"]}, '{"b": 1}')]:
    valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(document))
    found.append("".join("ny"[each] for each in (valid, by_llguidance(schema, document), by_xgrammar(schema, document))))
    print(found[-1], document, json.dumps(schema))
sys.exit(found != ["yyy", "ynn", "ynn", "yyn", "yyn", "yyy", "yyn", "nny"])
PY
