#!/usr/bin/env bash
# transformers 5.24.0: by its configuration a LLaMA model without eos_token_id ends at id 2;
# loaded from the same file it does not.
#
# Good guess: what AutoConfig says of a config.json is so for the model that is loaded with it. In 4.57.1 it is: a
# missing key has LLaMA 2's value, 2 (in LLaMA 3's vocabulary "#"),
# and generate ends a text there if there is no generation_config.json.
# What it does: AutoConfig still says 2, and a model made from that object stops at it. from_pretrained looks for the
# end ids in config.json itself, where there is none, and generate runs on to the length.
# New tokens of 8 asked for, from a model that writes nothing but id 2:
#   eos_token_id in config.json    AutoConfig    model of AutoConfig    from_pretrained
#   missing                        2             1                      8
#   null                           none          8                      8
#   2                              2             1                      1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

directory = os.path.join(sys.argv[1], "model")
path = os.path.join(directory, "config.json")
LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2)).save_pretrained(directory)
os.remove(os.path.join(directory, "generation_config.json"))
with open(path) as file:
    settings = json.load(file)
settings.pop("eos_token_id", None)

def n_tokens(model):
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.fill_(0).index_fill_(-1, torch.tensor([2]), 1))
    ids = torch.tensor([[5]])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False).shape[1] - 1

def read(**ids):
    with open(path, "w") as file:
        json.dump({**settings, **ids}, file)
    config = AutoConfig.from_pretrained(directory)
    found = (config.eos_token_id, n_tokens(AutoModelForCausalLM.from_config(config)),
             n_tokens(AutoModelForCausalLM.from_pretrained(directory)))
    print(ids, "->", found)
    return found

sys.exit([read(), read(eos_token_id=None), read(eos_token_id=2)] != [(2, 1, 8), (None, 8, 8), (2, 1, 1)])
PY
