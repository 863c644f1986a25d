#!/usr/bin/env bash
# onnxruntime-extensions 0.15.2: in a chat template "in" does not look into texts, lengths are bytes, and blocks leave their line breaks.
#
# Good guess: apply_chat_template, made for the templates of tokenizer_config.json, gives the prompt that transformers gives, or an error.
# What it does: '</think>' in content is false whatever the content, so that a template which takes earlier thoughts out of a
# conversation, as those of reasoning models do, leaves them in. Lengths, slices and indices count bytes of UTF-8. The line break after
# a block stays, while transformers' trim_blocks removes it. -7 // 2 is -3. Filters that it does not know are errors.
#   template                                     transformers 5.24.0    onnxruntime-extensions
#   {{ 'a' in 'abc' }}                           True                   False
#   {{ 'a' in ['a'] }}                           True                   True
#   {% if '</think>' in text %}
#     ... {{ text.split('</think>')[-1] }}       Paris                  <think>France</think>Paris
#   {{ 'é' | length }}                           1                      2
#   {{ 'aété'[3:] }}                             é                      té
#   {% if true %}\na\n{% endif %}\nb             a\nb                   \na\n\nb
#   {{ -7 // 2 }} {{ -7 % 3 }}                   -4 2                   -3 -1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check onnxruntime-extensions==0.15.2 transformers==5.24.0 tokenizers==0.23.3 \
    jinja2==3.1.6 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, sys
from onnxruntime_extensions import pp_api
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.save("tokenizer.json")
json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, open("tokenizer_config.json", "w"))
reference, extension = AutoTokenizer.from_pretrained("."), pp_api.Tokenizer(".")
thoughts = ("{% for m in messages %}{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}")
messages = [{"role": "assistant", "content": "<think>France</think>Paris"}]
wrong = False
for template, expected in (("{{ 'a' in 'abc' }}", ("True", "False")), ("{{ 'a' in ['a'] }}", ("True", "True")),
                           (thoughts, ("Paris", "<think>France</think>Paris")), ("{{ 'é' | length }}", ("1", "2")),
                           ("{{ 'aété'[3:] }}", ("é", "té")),
                           ("{% if true %}\na\n{% endif %}\nb", ("a\nb", "\na\n\nb")), ("{{ -7 // 2 }} {{ -7 % 3 }}", ("-4 2", "-3 -1"))):
    found = (reference.apply_chat_template(messages, chat_template=template, tokenize=False),
             extension.apply_chat_template(json.dumps(messages), template=template, add_generation_prompt=False))
    print(repr(template), *map(repr, found))
    wrong |= found != expected
sys.exit(wrong)
PY
