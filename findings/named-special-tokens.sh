#!/usr/bin/env bash
# transformers 5.24.0: a token named in additional_special_tokens is not special to the tokenizer,
# one named eos_token is.
#
# Good guess: tokenizer.json's `special` is what counts, or naming a token in either key of tokenizer_config.json makes
# it special; both keys do the same.
# What it does, for "<|im_end|>" with `special: false` in tokenizer.json ("a<|im_end|>b" decoded with
# skip_special_tokens, then encoded with split_special_tokens):
#   named nowhere                      a<|im_end|>b   one token
#   additional_special_tokens          a<|im_end|>b   one token, though all_special_tokens lists it
#   eos_token                          ab             split into characters
#   added_tokens_decoder, special      ab             split: it overrides tokenizer.json
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.2
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer

text = "a<|im_end|>b"
characters = {c: i for i, c in enumerate(sorted(set(text)))}

def load(name, settings):
    directory = os.path.join(sys.argv[1], name)
    os.mkdir(directory)
    tokenizer = Tokenizer(models.BPE(characters, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken("<|im_end|>")])
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", **settings}, file)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text).input_ids
    return ("<|im_end|>" in tokenizer.all_special_tokens, tokenizer.decode(ids, skip_special_tokens=True),
            len(tokenizer(text, split_special_tokens=True).input_ids))

entry = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": True}
found = [load("nowhere", {}), load("additional", {"additional_special_tokens": ["<|im_end|>"]}),
         load("eos", {"eos_token": "<|im_end|>"}), load("decoder", {"added_tokens_decoder": {str(len(characters)): entry}})]
print(found)
sys.exit(found != [(False, text, 3), (True, text, 3), (True, "ab", 12), (False, "ab", 12)])
PY
