#!/usr/bin/env bash
# transformers 5.24.0: config.json's eos_token_id is not looked at once there is a generation_config.json.
#
# Good guess: generation_config.json overrides config.json key by key, so that one without eos_token_id leaves
# config.json's in force, and generate() stops there.
# What it does: with config.json naming the third token that the model writes,
#   no generation_config.json                                3 tokens: it stops
#   a generation_config.json without eos_token_id            8 of 8 tokens: it runs on
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

directory = os.path.join(sys.argv[1], "model")
config, generation = (os.path.join(directory, name) for name in ("config.json", "generation_config.json"))

def n_tokens(eos=None):
    model = AutoModelForCausalLM.from_pretrained(directory)
    new = model.generate(torch.tensor([[1]]), attention_mask=torch.ones(1, 1), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    return new, len(new)

for seed in range(100):     # until the third token is another than the first two
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, bos_token_id=1, eos_token_id=None)).save_pretrained(directory)
    os.remove(generation)
    new, _ = n_tokens()
    if new[2] not in new[:2]:
        break
with open(config) as file:
    settings = json.load(file)
with open(config, "w") as file:
    json.dump({**settings, "eos_token_id": new[2]}, file)
found = [n_tokens()[1]]
with open(generation, "w") as file:
    json.dump({"bos_token_id": 1}, file)
found.append(n_tokens()[1])
print("tokens without and with a generation_config.json:", found)
sys.exit(found != [3, 8])
PY
