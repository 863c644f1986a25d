#!/usr/bin/env bash
# compressed-tensors 0.20.1: NVFP4's weight_global_scale divides, its weight_scale multiplies.
#
# Good guess: a weight is code * weight_scale (FP8, one to 16) * weight_global_scale (float32, one to all), the latter
# the largest weight divided by 6 * 448, the largest numbers of the two formats; that is how NVFP4 has its two scales.
# What it does: the file has the inverse, 6 * 448 divided by the largest; a weight is
# code * weight_scale / weight_global_scale.
# The first weight of two is in a byte's low bits, and they come back in bfloat16 whatever they were.
# Of 16 weights 3, -3, 1.5 and zeros:
#   weight_global_scale   896 = 6 * 448 / 3, not 0.00112
#   weight_scale          448
#   bytes                 f7 05: codes 6, -6, 3
#   read                  3 -3 1.5 in bfloat16
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check compressed-tensors==0.20.1 transformers==5.24.0 torch==2.11.0
CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

weights = torch.zeros(1, 16)
weights[0, :3] = torch.tensor([3, -3, 1.5])
scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
overall = generate_gparam(weights.min(), weights.max())
scale, _ = calculate_qparams(weights.amin(1, keepdim=True), weights.amax(1, keepdim=True), scheme.weights, global_scale=overall)
stored = NVFP4PackedCompressor.compress({"weight": weights, "weight_scale": scale, "weight_global_scale": overall}, scheme)
read = NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
found = [round(stored["weight_global_scale"].item(), 2), stored["weight_scale"].tolist(),
         bytes(stored["weight_packed"][0, :2].tolist()).hex(), read[0, :3].tolist(), str(read.dtype)]
for each in found:
    print(each)
sys.exit(found != [896.0, [[448.0]], "f705", [3, -3, 1.5], "torch.bfloat16"])
PY
