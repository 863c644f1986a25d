#!/usr/bin/env bash
# transformers 5.24.0: a model cast to bfloat16 and back is another model, though every weight is what it was.
#
# Good guess: where all weights are bfloat16 numbers, model.to(torch.bfloat16).float() changes nothing, and is what
# loading in bfloat16 and casting to float32 gives.
# What it does: the cast also rounds what is no weight, RoPE's inverse frequencies, and nothing computes them again;
# loading in bfloat16 leaves them in float32. Of a model saved in bfloat16, beside the one loaded in float32:
#   loaded in bfloat16, then .float()                    weights equal, frequencies equal, logits equal
#   loaded in float32, .to(bfloat16), then .float()      weights equal, frequencies not, logits not
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

directory = os.path.join(sys.argv[1], "model")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
plain = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
ids = torch.arange(512)[None] % 64

def equal(model):
    """Weights, inverse frequencies and logits beside the plain model's."""
    assert all(each.dtype == torch.float32 for each in model.parameters())
    with torch.no_grad():
        return (all(map(torch.equal, model.state_dict().values(), plain.state_dict().values())),
                torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq),
                torch.equal(model(ids).logits, plain(ids).logits))

found = [equal(LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).float()),
         equal(LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(torch.bfloat16).float())]
print("weights, inverse frequencies, logits equal:", found)
sys.exit(found != [(True, True, True), (True, False, False)])
PY
