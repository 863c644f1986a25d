#!/usr/bin/env bash
# transformers 5.24.0: a key of config.json says which file the weights are in, and model.safetensors beside it is not read.
#
# Good guess: the weights are in model.safetensors, else in the shards of its index; config.json tells the shapes of a model, and another
# file is read only if an argument (variant, gguf_file) asks for it.
# What it does: "transformers_weights" in config.json, which is in no list of a LLaMA configuration's fields, names a safetensors file or
# an index, and is looked at first. It is read from the file and dropped when the model is saved again, to model.safetensors. Other
# readers of the directory, which know nothing of the key, take model.safetensors: another model, if the two differ.
# Embedding 0 of a directory where model.safetensors has 1 and tuned.safetensors has 2:
#   config.json as it was written                              1
#   with "transformers_weights": "tuned.safetensors"           2
#   saved again from that: model.safetensors, no such key      2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

directory, again = (os.path.join(sys.argv[1], name) for name in ("model", "again"))
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                                     num_key_value_heads=2))
weights = model.model.embed_tokens.weight.data
weights[:] = 2
model.save_pretrained(directory)
os.rename(os.path.join(directory, "model.safetensors"), os.path.join(directory, "tuned.safetensors"))
weights[:] = 1
model.save_pretrained(directory)

def first(path):
    return AutoModelForCausalLM.from_pretrained(path).model.embed_tokens.weight[0, 0].item()

found = [first(directory)]
path = os.path.join(directory, "config.json")
with open(path) as file:
    config = json.load(file)
with open(path, "w") as file:
    json.dump({**config, "transformers_weights": "tuned.safetensors"}, file)
found.append(first(directory))
AutoModelForCausalLM.from_pretrained(directory).save_pretrained(again)
with open(os.path.join(again, "config.json")) as file:
    kept = "transformers_weights" in json.load(file)
found += [first(again), os.path.exists(os.path.join(again, "model.safetensors")), kept]
print("embedding 0: %g, with the key %g, saved again %g; model.safetensors written: %s, key written: %s" % tuple(found))
sys.exit(found != [1, 2, 2, True, False])
PY
