#!/usr/bin/env bash
# transformers 5.24.0, with llguidance 1.9.1, xgrammar 0.2.9 and jsonschema 4.26.0: an Optional argument of a tool cannot be null.
#
# Good guess: the JSON Schema that a chat template is given for a Python function says what the function takes: of Optional[int] an integer
# or null, an argument without a default is required, one with a default says which.
# What it does: get_json_schema writes "nullable": true, a word of OpenAPI that JSON Schema does not have, and every reader of JSON Schema
# goes by the "type" beside it: null is invalid, and a model whose calls are masked by the schema that was shown to it can never write it,
# though Optional without a default is "required": it has to make up a number. Defaults are not in the schema.
#   argument b                    schema                               required    null valid    llguidance    xgrammar
#   Optional[int]                 type integer, nullable true          yes         no            no            no
#   Optional[int] = None          type integer, nullable true          no          no            no            no
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 llguidance==1.9.1 xgrammar==0.2.9 jsonschema==4.26.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys

# get_json_schema reads its annotations and its docstring; it needs a file to read from
sys.path.insert(0, sys.argv[1])
with open(os.path.join(sys.argv[1], "tools.py"), "w") as file:
    for name, default in ("needed", ""), ("given", " = None"):
        file.write('from typing import Optional\n\ndef %s(a: int, b: Optional[int]%s):\n    """\n    Adds.\n\n    Args:\n        a: one\n'
                   '        b: other\n    """\n\n' % (name, default))
import jsonschema
import llguidance
import tools
import xgrammar
from transformers.utils import get_json_schema

def by_llguidance(schema, document):
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_json_schema(schema))
    ids = list(document.encode())
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

def by_xgrammar(schema, document):
    tokens = [bytes([i]) for i in range(256)] + [b"</s>"]
    tokenizer = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(tokenizer).compile_json_schema(json.dumps(schema)))
    return matcher.accept_string(document) and matcher.accept_token(256)

wrong = False
for function, required in (tools.needed, ["a", "b"]), (tools.given, ["a"]):
    schema = get_json_schema(function)["function"]["parameters"]
    print(json.dumps(schema))
    b = {key: value for key, value in schema["properties"]["b"].items() if key != "description"}
    wrong |= b != {"type": "integer", "nullable": True} or schema["required"] != required
    for document, expected in ('{"a": 1, "b": 2}', True), ('{"a": 1, "b": null}', False):
        found = [jsonschema.Draft202012Validator(schema).is_valid(json.loads(document)), by_llguidance(schema, document),
                 by_xgrammar(schema, document)]
        print(document, *found)
        wrong |= found != [expected] * 3
sys.exit(wrong)
PY
