#!/usr/bin/env bash
# transformers 5.24.0: continue_final_message of a LLaMA 3.1 template loses the blank that the answer is to go on after, and of an empty
# answer the header's line breaks.
#
# Good guess: a prompt that ends within an answer ends with the text that was given for it; and with an empty one it is that of
# add_generation_prompt, an answer's beginning.
# What it does: the template runs as always, and what it writes behind the answer is cut off. What it does to the answer itself, as
# content | trim in LLaMA 3.1's, stays done: "Paris is " is continued from "Paris is". Of an empty answer, or one of blanks, nothing is
# left to find, and the blank space before it goes, too: after <|end_header_id|> the two line breaks are missing that every answer in
# training had before it. A template without trim gives both as one would have it.
#   answer         end of the prompt with "content | trim"    with "content"
#   "Paris is "    "...<|end_header_id|>\n\nParis is"         "...<|end_header_id|>\n\nParis is "
#   ""             "...<|end_header_id|>"                     "...<|end_header_id|>\n\n"
#   generation     "...<|end_header_id|>\n\n"                 "...<|end_header_id|>\n\n"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])))

def template(content):
    header = "<|start_header_id|>%s<|end_header_id|>{{ '\\n\\n' }}"
    return ("{% for m in messages %}" + header % "{{ m.role }}" + "{{ " + content + " }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}" + header % "assistant" + "{% endif %}")

question = [{"role": "user", "content": "Where?"}]
begun = "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
found = []
for content in "m.content | trim", "m.content":
    options = {"chat_template": template(content), "tokenize": False}
    prompts = [tokenizer.apply_chat_template(question + [{"role": "assistant", "content": answer}], continue_final_message=True, **options)
               for answer in ("Paris is ", "", "  ")]
    prompts.append(tokenizer.apply_chat_template(question, add_generation_prompt=True, **options))
    assert all(prompt.startswith(begun) for prompt in prompts)
    found.append([prompt[len(begun):] for prompt in prompts])
    print("%-18s" % content, *map(repr, found[-1]))
sys.exit(found != [["\n\nParis is", "", "", "\n\n"], ["\n\nParis is ", "\n\n", "\n\n  ", "\n\n"]])
PY
