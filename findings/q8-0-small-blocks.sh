#!/usr/bin/env bash
# gguf 0.19.0: of blocks of small weights Q8_0 keeps less than Q4_0, in the end nothing.
#
# Good guess: Q8_0 has 32 codes of 8 bits and a scale to a block, so that its error is at most half a step, 1/254 of the
# block's largest weight (the float16 scale's 2^-11 aside), however small the weights are: that is what a scale is for.
# What it does: the scale is the largest weight divided by 127, kept as float16. Where the largest is less than 0.0078
# that is a subnormal number, of ever fewer bits; below 3.8e-6 it is 0 and so are the weights. The codes are computed
# with the scale before that rounding and do not make up for it. Q4_0 divides by 8 and gets there 16 times later.
# Largest error as a part of its block's largest weight, 1000 blocks of normal weights with the given deviation:
#   deviation   Q8_0     Q4_0
#   1e-2        0.0042   0.1248
#   1e-4        0.0258   0.1255
#   1e-5        0.1998   0.1307
#   1e-6        1.0000   0.2421
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import gguf
import numpy

normal = numpy.random.Generator(numpy.random.PCG64(0)).standard_normal((1000, 32)).astype(numpy.float32)

def error(deviation, kind):
    """The largest error, as a part of its block's largest weight."""
    weights = normal * numpy.float32(deviation)
    back = gguf.dequantize(gguf.quantize(weights, kind), kind)
    return float((abs(back - weights).max(axis=1) / abs(weights).max(axis=1)).max())

kinds = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
found = {each: [error(each, kind) for kind in kinds] for each in (1e-2, 1e-4, 1e-5, 1e-6)}
for each, errors in found.items():
    print(each, "Q8_0 %.4f Q4_0 %.4f" % tuple(errors))
good = found[1e-2][0] < 1.1 / 254 and found[1e-4][0] > 6 / 254 and all(found[each][0] > found[each][1] for each in (1e-5, 1e-6))
sys.exit(not (good and found[1e-6][0] == 1))
PY
