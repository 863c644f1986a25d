#!/usr/bin/env bash
# bitsandbytes 0.50.2: quant_type "fp4" is not E2M1, and a byte's first weight is in its high bits.
#
# Good guess: its 16 values are E2M1's as in OCP's MXFP4 and torch.float4_e2m1fn_x2, 0 0.5 1 1.5 2 3 4 6 divided by 6,
# in the order of their codes, sign in the top bit; the first of a byte's two weights is in the low bits, as in those;
# and blocks start anew with each row.
# What it does: the sign is in the top bit, but the smallest value is 0.0052 of the largest instead of 0.0833, there is
# no 0.0833, and codes are not in order of values. The first weight has the high bits.
# Blocks run on over the ends of rows.
#   codes 0 ... 7          0 0.0052 0.6667 1 0.3333 0.5 0.1667 0.25
#   E2M1 divided by 6      0 0.0833 0.1667 0.25 0.3333 0.5 0.6667 1
#   1, -1 as fp4, nf4      bytes 3b, f0
#   3 rows of 65 weights   4 scales in blocks of 64, not 6
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check bitsandbytes==0.50.2 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

weights = torch.zeros(64)
weights[:2] = torch.tensor([1.0, -1.0])
found = []
for kind in "fp4", "nf4":
    packed, state = quantize_4bit(weights, blocksize=64, quant_type=kind)
    assert dequantize_4bit(packed, state).flatten()[:2].tolist() == [1, -1]
    found.append("%02x" % packed[0].item())
    if kind == "fp4":
        found.append([round(each, 4) for each in state.code.tolist()])
_, state = quantize_4bit(torch.ones(3, 65), blocksize=64, quant_type="fp4")
found.append(state.absmax.numel())
for each in found:
    print(each)
half = [0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25]
sys.exit(found != ["3b", half + [-each for each in half], "f0", 4])
PY
