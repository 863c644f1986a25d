#!/usr/bin/env bash
# transformers 5.24.0: the last of hidden_states is not what the last layer gives: the final norm has been applied, and that is nowhere.
#
# Good guess: output_hidden_states=True gives the embeddings and then the output of each layer, L + 1 tensors, so that the last is the sum
# that goes into the final norm, and a layer's part in it is the difference between two neighbours.
# What it does: the last tensor has been through the norm; lm_head alone makes logits of it, and the norm applied again other ones. All
# before it are the residual stream. A comparison with another program, layer by layer, is right up to the last layer and wrong there; who
# norms it again, to see early what a layer would say, has a wrong last one as well.
# A model of 3 layers, its final norm's weights 2:
#   hidden_states                                   4
#   lm_head of the last                             the logits
#   lm_head of the norm of the last                 others
#   the last                                        the norm of layer 2's output, taken by a hook
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                     num_key_value_heads=2)).eval()
norm = model.model.norm
norm.weight.data[:] = 2
outputs = []
for layer in model.model.layers:
    layer.register_forward_hook(lambda module, given, output: outputs.append(output if torch.is_tensor(output) else output[0]))
with torch.no_grad():
    answer = model(torch.arange(8)[None], output_hidden_states=True)
    states = answer.hidden_states
    found = [len(states), *(torch.allclose(model.lm_head(each), answer.logits, atol=1e-5) for each in (states[-1], norm(states[-1]))),
             *(torch.equal(*pair) for pair in ((states[-1], norm(outputs[-1])), (states[-1], outputs[-1]), (states[-2], outputs[-2])))]
print("tensors, lm_head of the last, of its norm, the last is the norm of layer 2's, is layer 2's, the one before is layer 1's:", *found)
sys.exit(found != [4, True, False, True, False, True])
PY
