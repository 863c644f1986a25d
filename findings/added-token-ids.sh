#!/usr/bin/env bash
# tokenizers 0.23.2: the `id` of an added token in tokenizer.json is not used.
#
# Good guess: Tokenizer.from_file gives each of added_tokens the id that is written beside it, or refuses the file.
# What it does: a token that the model's vocabulary has keeps that id; each other gets the next free one, in the order
# of the list, without a word. With the vocabulary a 0, b 1, c 2:
#   <x> 3, <y> 7       <x> 3, <y> 4: the gap is closed, and 7 decodes to nothing
#   <y> 4, <x> 3       <y> 3, <x> 4: the two change places
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.2
"$work/venv/bin/python" - <<'PY'
import json, sys
from tokenizers import Tokenizer, models

def load(**added):
    contents = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, [])).to_str())
    contents["added_tokens"] = [{"id": rank, "content": "<%s>" % name, "single_word": False, "lstrip": False,
                                 "rstrip": False, "normalized": False, "special": True} for name, rank in added.items()]
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    ids = {name: tokenizer.encode("<%s>" % name).ids for name in added}
    return ids, [tokenizer.decode([rank], skip_special_tokens=False) for rank in added.values()]

found = [load(x=3, y=7), load(y=4, x=3)]
for each in found:
    print(*each)
sys.exit(found != [({"x": [3], "y": [4]}, ["<x>", ""]), ({"y": [3], "x": [4]}, ["<x>", "<y>"])])
PY
