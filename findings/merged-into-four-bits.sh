#!/usr/bin/env bash
# peft 0.21.2 and bitsandbytes 0.50.2: an adapter merged into a 4-bit model is nearly gone.
#
# Good guess: a merge into 4-bit weights is as exact as these are, and the adapter's effect is kept, with noise of the usual size; a warning
# of "rounding errors" says as much.
# What it does: weights are read, the adapter's change is added, and the sum is made 4-bit again. As the weights lie on the 4-bit grid already,
# a change of less than half a step is rounded off wherever it is, and does not add up to anything: what is left comes from the largest
# changes and the smallest steps. Of an adapter trained on the 4-bit model (QLoRA) merge_and_unload so gives back nearly the model from before.
# Merged into float weights, it is kept.
# A LLaMA of 2 layers, an adapter on all its matrices, that changes weights by 3% (root mean square) of theirs; how much of the adapter's
# effect on the logits is left after merging (1 is all), and the logits' distance to those with the adapter beside the weights, in effects:
#   weights            left             distance
#   float32            1                0
#   int8               above 0.8        below 0.5
#   NF4                below 0.25       above 0.8
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 transformers==5.24.0 \
    torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, initializer_range=0.05)).save_pretrained(sys.argv[1])

def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits

found = []
for name, config in (("float32", None), ("int8", BitsAndBytesConfig(load_in_8bit=True)),
                     ("NF4", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32))):
    base = LlamaForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float32).eval()
    before = logits(base)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()
    for each, weight in model.named_parameters():
        if "lora_B" in each:
            torch.nn.init.normal_(weight, 0, 0.01)
    change = model.base_model.model.model.layers[0].mlp.down_proj.get_delta_weight("default").std().item() / 0.05
    with_adapter = logits(model)
    merged = logits(model.merge_and_unload())
    effect = with_adapter - before
    left, distance = ((merged - before) * effect).sum() / effect.norm() ** 2, (merged - with_adapter).norm() / effect.norm()
    found.append((left.item(), distance.item()))
    print("%-8s change of weights %.3f, effect on the logits %.3f, left of it %.3f, distance %.3f" % (
        name, change, effect.norm() / before.norm(), *found[-1]))
exact, integers, four = found
sys.exit(not (abs(exact[0] - 1) < 1e-3 > exact[1] and integers[0] > 0.8 and integers[1] < 0.5 and four[0] < 0.25 and four[1] > 0.8))
PY
