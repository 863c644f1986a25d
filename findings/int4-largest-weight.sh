#!/usr/bin/env bash
# compressed-tensors 0.20.1: of symmetric int4 weights the largest is never right, and a code is not used.
#
# Good guess: the scale is the largest weight by 7, so that the largest comes back as it was; or by 8, so that a negative
# one does, and a positive one is cut to 7 / 8.
# What it does: by 7.5, half of the range -8 ... 7, in which the largest is 7.5 steps and gets a code of 7, whatever its sign; in
# float32 7.5 is 7.4999996, and -8 is used neither. It comes back as 7 / 7.5, 7% less; of int8 it is 127 / 127.5.
# Packed eight to an int32, the first in the lowest bits, codes have 8 added; they are not in two's complement.
#   int4 of  1 -1 0.5 0.25 0   ->  codes 7 -7 4 2 0      ->  0.9333 -0.9333 0.5333 0.2667 0
#   int8 of  1 -1 0.5 0.25 0   ->  codes 127 -127 64 32 0  ->  0.9961 -0.9961 0.5020 0.2510 0
#   codes -8 -1 0 1 7          ->  f9870 in hexadecimal
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check compressed-tensors==0.20.1 transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

weights = torch.tensor([[1, -1, 0.5, 0.25, 0]])
found = []
for bits in 4, 8:
    kind = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(weights.amin(1, keepdim=True), weights.amax(1, keepdim=True), kind)
    codes = quantize(weights, scale, zero, kind, dtype=torch.int8)
    back = dequantize(codes, scale, zero, args=kind)
    found += [codes[0].tolist(), [round(each, 4) for each in back[0].tolist()]]
found.append(hex(pack_to_int32(torch.tensor([[-8, -1, 0, 1, 7]], dtype=torch.int8), 4).item()))
for each in found:
    print(each)
sys.exit(found != [[7, -7, 4, 2, 0], [0.9333, -0.9333, 0.5333, 0.2667, 0], [127, -127, 64, 32, 0],
                   [0.9961, -0.9961, 0.502, 0.251, 0], "0xf9870"])
PY
