#!/usr/bin/env bash
# transformers 5.24.0: where config.json has no dtype, one tensor, the first by name, decides in which all weights are loaded.
#
# Good guess: without dtype in config.json (and in the call) each weight keeps the type that it has in the file; or all get the widest,
# or that of most; or float32, as older releases did.
# What it does: dtype "auto", now the default, takes the first floating-point tensor in the order of the names, which in an untied LLaMA of
# one file is lm_head.weight, and casts the rest to its type: a float32 lm_head kept by a converter widens a whole float16 model to twice its
# memory, and an lm_head of float16 rounds all others. Norms in float32 beside matrices in float16, a usual mixture, become float16.
#   in the file                            loaded
#   all float16                            float16
#   lm_head float32, the rest float16      float32
#   lm_head float16, the rest float32      float16
#   norms float32, the rest float16        float16
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 safetensors==0.8.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                             num_key_value_heads=2)).save_pretrained(sys.argv[1])
config, weights = (os.path.join(sys.argv[1], name) for name in ("config.json", "model.safetensors"))
with open(config) as file:
    written = json.load(file)
del written["dtype"]
with open(config, "w") as file:
    json.dump(written, file)
tensors = load_file(weights)
found = []
for narrow in (lambda name: True), (lambda name: name != "lm_head.weight"), (lambda name: name == "lm_head.weight"), \
        (lambda name: "norm" not in name):
    save_file({name: each.half() if narrow(name) else each for name, each in tensors.items()}, weights, metadata={"format": "pt"})
    found.append(sorted({str(each.dtype) for each in LlamaForCausalLM.from_pretrained(sys.argv[1]).parameters()}))
    print("float16 in the file:", sum(map(narrow, tensors)), "of", len(tensors), "loaded as", *found[-1])
sys.exit(found != [["torch.float16"], ["torch.float32"], ["torch.float16"], ["torch.float16"]])
PY
