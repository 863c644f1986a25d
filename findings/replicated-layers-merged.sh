#!/usr/bin/env bash
# peft 0.21.2: merge_and_unload of a model with layer_replication is another model: each copy of a layer gets the adapters of all of them.
#
# Good guess: merged, a model computes what it computed with its adapter, but for rounding. layer_replication makes a deeper model of one
# set of weights, with an adapter for each place, and what the places have in common is no longer in common once adapters are added.
# What it does: the copies of a layer share their weights, and merging adds to a weight in place, so that the one weight gets the first
# copy's adapter and then the second's, and both copies have the sum. Nothing is said, and safe_merge=True, which
# computes a new tensor, puts it into the same shared weight. transformers' save_pretrained refuses the model afterwards, since tensors are
# shared; a copy of each weight, which helps against that, then saves the wrong model. Copies made before merging are right.
# Layers 0 1 1 2, made of a model of three layers; difference of the logits (largest) before and after merging:
#   merge_and_unload()                    more than 0.5
#   merge_and_unload(safe_merge=True)     more than 0.5
#   merged after a copy of each weight    0.00
#   without layer_replication             0.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits

def merged(layers, safe=False, copied=False):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                                        num_key_value_heads=2, initializer_range=0.3)).eval()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
                                            layer_replication=layers)).eval()
    if copied:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.detach().clone())
    before = logits(model)
    model = model.merge_and_unload(safe_merge=safe)
    copies = model.model.layers[1:3]
    same = torch.equal(*(each.self_attn.q_proj.weight for each in copies))
    return (logits(model) - before).abs().max().item(), same

found = []
twice = [(0, 2), (1, 3)]
for given in (twice,), (twice, True), (twice, False, True), (None,):
    difference, same = merged(*given)
    print("layers, safe_merge, weights copied before:", *given,
          "- difference %.6f, layers 1 and 2 have the same weights: %s" % (difference, same))
    found.append((difference > 0.5, difference < 1e-3, same))
sys.exit(found != [(True, False, True), (True, False, True), (False, True, False), (False, True, False)])
PY
