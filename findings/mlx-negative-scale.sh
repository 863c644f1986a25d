#!/usr/bin/env bash
# mlx 0.32.4: affine scales can be negative, and the "minimum" is whichever end of the group is farther from 0.
#
# Good guess, and what the documentation of mlx.core.quantize says: the scale is (largest - smallest) / 15, the bias the
# smallest, a code round((w - bias) / scale): scales are positive, code 0 is the smallest weight,
# both ends come back as they were.
# What it does: the bias is the weight farthest from 0. If that is the largest,
# the scale is negative and codes count downwards.
# The scale is then changed so that 0 falls on a code: zeros come back as zeros, and the other end no longer as it was.
# Equal weights have the scale -1e-7. Who stores scales unsigned, or takes the bias for a minimum, reads other weights.
#   group of 32                scale       bias    ends' codes    they come back as
#   -3, 1, the rest 0.5         0.27273    -3      0   15         -3        1.0909
#   -1, 3, the rest 0.5        -0.27273     3      15  0          -1.0909   3
#   as documented               0.26667    -1      0   15         -1        3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4'
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import mlx.core as mx

found = []
for ends in (-3, 1), (-1, 3), (1, 1):
    weights = mx.array([[ends[0]] + [0.5 if ends[0] < 0 else 1] * 30 + [ends[1]]], dtype=mx.float32)
    codes, scale, bias = mx.quantize(weights, group_size=32, bits=4)
    back = mx.dequantize(codes, scale, bias, group_size=32, bits=4)[0].tolist()
    words = codes[0].tolist()
    found.append((round(scale.item(), 5), bias.item(), words[0] & 15, words[3] >> 28, round(back[0], 4), round(back[31], 4)))
    print(ends, "scale %.5g" % scale.item(), "bias %g codes %d %d back %g %g" % found[-1][1:])
sys.exit(found != [(0.27273, -3, 0, 15, -3, 1.0909), (-0.27273, 3, 15, 0, -1.0909, 3), (0, 1, 0, 0, 1, 1)]
         or scale.item() >= 0)
PY
