#!/usr/bin/env bash
# bitsandbytes 0.50.2: its 8-bit numbers have 1 but no -1, and on the CPU zeros do not come back as zeros.
#
# Good guess: quantize_blockwise divides a block by its largest weight, so that this one comes back as it was, whatever its sign, and
# zeros come back as zeros: its table of 256 numbers has a 0. What is negated comes back negated.
# What it does: the table ends at -0.993 and at 1. Where a block's largest weight is negative, it comes back 0.7% too small. On the CPU
# the seven codes in the middle, 0 and three on either side, are never given: a 0 gets the next one, 2.1e-5 of the block's largest.
# Only in a block of nothing but zeros do they stay. Its 4-bit formats have -1, 1 and 0.
#   block of 256               8 bits              nf4
#   2, zeros                   2, 4.25e-05         2, 0
#   -2, zeros                  -1.9859, 4.25e-05   -2, 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check bitsandbytes==0.50.2 torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from bitsandbytes import functional

table = functional.create_dynamic_map()
print("table: %d numbers, %g ... %g, zero in it: %s" % (len(table), table.min(), table.max(), 0 in table))
found = []
for largest in 2.0, -2.0:
    block = torch.tensor([largest] + [0.0] * 255)
    eight = functional.dequantize_blockwise(*functional.quantize_blockwise(block, blocksize=256))
    four = functional.dequantize_4bit(*functional.quantize_4bit(block, blocksize=256, quant_type="nf4")).flatten()
    found.append([float("%.5g" % each) for each in (eight[0], eight[1], four[0], four[1])])
    print("%g, zeros: " % largest, "8 bits %g %g  nf4 %g %g" % tuple(found[-1]))
torch.manual_seed(0)
codes, _ = functional.quantize_blockwise(torch.randn(256000), blocksize=256)
unused = [code for code in range(256) if not (codes == code).any()]
print("codes that 256000 normal weights do not get:", *unused)
right = 0 in table and table.max() == 1 and -0.994 < table.min() < -0.992
sys.exit(not right or found != [[2, 4.25e-05, 2, 0], [-1.9859, 4.25e-05, -2, 0]] or unused != list(range(124, 131)))
PY
