#!/usr/bin/env bash
# transformers 5.24.0: of an FP8 checkpoint whose scales are called weight_scale, codes are taken for weights.
#
# Good guess: quant_method "fp8" with a scale for each matrix loads, whatever the scale is called: weight_scale, as
# AutoFP8 writes it and as compressed-tensors and FBGEMM call theirs, or weight_scale_inv. Or it is refused, since FP8
# codes without a scale are no weights.
# What it does: only weight_scale_inv is known (it multiplies, in spite of its name). Where there is no GPU the codes
# become bfloat16 weights up to 448, none is missing, and the scales are listed as unexpected, which "can be ignored".
#   scale called       largest weight of q_proj (as it was: 0.07)   missing   unexpected
#   weight_scale_inv   0.07                                         0         0
#   weight_scale       448                                          0         7
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 accelerate==1.15.0
CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

directory = os.path.join(sys.argv[1], "model")
file, config = (os.path.join(directory, name) for name in ("model.safetensors", "config.json"))
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
                             num_key_value_heads=1)).bfloat16().save_pretrained(directory)
weights = load_file(file)
with open(config) as settings:
    settings = json.load(settings)
settings["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
with open(config, "w") as output:
    json.dump(settings, output)

def load(called):
    tensors = dict(weights)
    for name in [each for each in weights if "_proj." in each]:
        scale = weights[name].abs().max().float() / 448
        tensors[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[name.replace("weight", called)] = scale
    save_file(tensors, file, metadata={"format": "pt"})
    model, report = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    largest = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].abs().max().item()
    return round(largest, 2), len(report["missing_keys"]), len(report["unexpected_keys"])

found = [load("weight_scale_inv"), load("weight_scale")]
for each in found:
    print(*each)
sys.exit(found != [(0.07, 0, 0), (448, 0, 7)])
PY
