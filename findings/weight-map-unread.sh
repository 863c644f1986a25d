#!/usr/bin/env bash
# transformers 5.24.0: weight_map does not say from which shard a weight is read,
# and model.safetensors comes before all shards.
#
# Good guess: model.safetensors.index.json names the shard of each weight, and there it is read; a weight of the same
# name in another shard does not matter. Where there is an index the shards are the model.
# What it does: of weight_map only the files' names count. All of their tensors are read, in the order of the files'
# names, and of two with one name the last stays, even if the index names the first. Where there is a model.safetensors,
# the index and its shards are not opened. Nothing is said.
# The final norm's weight is 1 in the first shard, 2 in the second and 3 in model.safetensors:
#   index names the first              2
#   index names the second             2
#   the same, and model.safetensors    3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

directory = os.path.join(sys.argv[1], "model")
norm = "model.norm.weight"
shards = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2))
model.config.save_pretrained(directory)
weights = model.state_dict()

def write(name, value, weights):
    save_file(dict(weights, **{norm: torch.full((16,), value)}), os.path.join(directory, name), {"format": "pt"})

def read(place):
    """The final norm's weight as loaded, where the index puts it into that shard."""
    weight_map = {name: shards[1] for name in weights} | {"model.embed_tokens.weight": shards[0], norm: shards[place]}
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {}, "weight_map": weight_map}, file)
    return LlamaForCausalLM.from_pretrained(directory).model.norm.weight[0].item()

embedding = "model.embed_tokens.weight"
write(shards[0], 1.0, {embedding: weights[embedding]})
write(shards[1], 2.0, {name: weight for name, weight in weights.items() if name != embedding})
found = [read(0), read(1)]
write("model.safetensors", 3.0, weights)
found.append(read(1))
print("index names the first shard, the second, beside model.safetensors:", found)
sys.exit(found != [2, 2, 3])
PY
