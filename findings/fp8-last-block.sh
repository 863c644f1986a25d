#!/usr/bin/env bash
# transformers 5.24.0: FP8 weights whose size is no multiple of the block are dequantised with other blocks than they
# have.
#
# Good guess: with weight_block_size [128, 128], a matrix of 192 columns has blocks of 128 and 64 columns (its scales
# are ceil(192 / 128) = 2 wide, as transformers itself lays them out), and where there is no GPU loading multiplies each
# by its scale.
# What it does: a block is taken to be the size divided by the number of scales, 192 / 2 = 96, so that columns 96 to 127
# get the second block's scale; weight_block_size is not looked at.
# Sizes that the number of scales does not divide are refused.
# Of a checkpoint with such blocks, columns that are as quantised (the second block's scale is 10 times the first's):
#   256 columns   all
#   192 columns   all but 96 to 127; no key is missing or unexpected, nothing is said
#   322 columns   RuntimeError: the conversion of the weights had issues
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 accelerate==1.15.0
CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, math, os, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

def columns(size):
    """The columns of q_proj, (256, size), that load as they were quantised."""
    directory = os.path.join(sys.argv[1], str(size))
    file, config = (os.path.join(directory, name) for name in ("model.safetensors", "config.json"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=size, intermediate_size=256, num_hidden_layers=1, head_dim=128,
                                 num_attention_heads=2, num_key_value_heads=1)).bfloat16().save_pretrained(directory)
    tensors = load_file(file)
    expected = {}
    for name in [each for each in tensors if "_proj." in each]:
        rows, width = tensors[name].shape
        scales = 0.001 * 10.0 ** torch.arange(math.ceil(width / 128)).repeat(math.ceil(rows / 128), 1)
        scale = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :width]
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv")] = scales
        expected[name] = (tensors[name].float() * scale).bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    with open(config) as settings:
        settings = json.load(settings)
    settings["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    with open(config, "w") as output:
        json.dump(settings, output)
    try:
        model, report = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    except RuntimeError as error:
        return "RuntimeError" if "conversion of the weights" in str(error) else str(error)
    assert not any(report.values()), report
    name = "model.layers.0.self_attn.q_proj.weight"
    return (model.state_dict()[name] == expected[name]).all(0).nonzero().flatten().tolist()

found = [columns(size) for size in (256, 192, 322)]
for size, each in zip((256, 192, 322), found):
    print(size, each if isinstance(each, str) else "not as quantised: %s" % sorted(set(range(size)) - set(each)))
sys.exit(found != [list(range(256)), list(range(96)) + list(range(128, 192)), "RuntimeError"])
PY
