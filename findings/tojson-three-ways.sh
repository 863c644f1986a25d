#!/usr/bin/env bash
# jinja2 3.1.6, minijinja 3.1.0 and transformers 5.24.0: in a chat template "tojson" writes three things.
#
# Good guess: a chat template is Jinja, so that jinja2 itself, told to trim blocks as transformers does, gives the same prompt, and so
# does minijinja; a tool's description, put in with tojson, is its JSON in the order in which it was given.
# What they do: transformers replaces the filter by json.dumps, which keeps order and characters. jinja2's own is for HTML: it sorts
# the keys and escapes < > & ' and all that is not ASCII. minijinja keeps the order and é, escapes < > & ' as well, and writes 1e-7.
# By LLaMA 3.1's {{ t | tojson(indent=4) }} the tools of a prompt are other tokens with each of them.
# Of {"q": "it's <b> é", "n": 1e-7} in {{ tool | tojson }}:
#   transformers    {"q": "it's <b> é", "n": 1e-07}
#   jinja2          {"n": 1e-07, "q": "it\u0027s \u003cb\u003e \u00e9"}
#   minijinja       {"q": "it\u0027s \u003cb\u003e é", "n": 1e-7}
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check jinja2==3.1.6 minijinja==3.1.0 transformers==5.24.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jinja2
import minijinja
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tool = {"q": "it's <b> é", "n": 1e-7}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])))
blocks = {"trim_blocks": True, "lstrip_blocks": True}
writers = {"transformers": lambda template: tokenizer.apply_chat_template([{}], chat_template=template, tokenize=False, tool=tool),
           "jinja2": lambda template: jinja2.Environment(**blocks).from_string(template).render(tool=tool),
           "minijinja": lambda template: minijinja.Environment(**blocks).render_str(template, tool=tool)}
expected = {"transformers": '{"q": "it\'s <b> é", "n": 1e-07}', "jinja2": r'{"n": 1e-07, "q": "it\u0027s \u003cb\u003e \u00e9"}',
            "minijinja": r'{"q": "it\u0027s \u003cb\u003e é", "n": 1e-7}'}
wrong = False
for name, write in writers.items():
    found = write("{{ tool | tojson }}")
    print("%-12s" % name, found)
    wrong |= found != expected[name]
sys.exit(wrong)
PY
