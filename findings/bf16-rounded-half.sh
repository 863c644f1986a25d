#!/usr/bin/env bash
# openvino 2026.4.1: a bfloat16 constant made of float32 is not the nearest bfloat16 in a quarter of all numbers.
#
# Good guess: bfloat16 is made by rounding to the nearest, as FP8 and float16 are there and as ml_dtypes does; or the low bits are cut
# from all numbers.
# What it does: constant(..., dtype=bf16), and a Convert of a constant, round up only what would end in a 1 if it were cut; what would
# end in a 0 is cut, however near the next number is. 1.0078 comes out as 1. The largest error is twice that of rounding, and
# numbers become 0.14% smaller on the average, so that sums over rows of weights do, too.
#   number             nearest      openvino
#   1 + 2^-8           1            1             the middle, to even
#   1 + 3 * 2^-9       1.0078125    1
#   1 + 255 * 2^-15    1.0078125    1
#   1 + 3 * 2^-8       1.015625     1.015625      the middle, to even
#   1 + 7 * 2^-9       1.015625     1.015625
# Of 100000 normal numbers 25% are not the nearest; the average of result / number is 0.9986, of the nearest 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check openvino==2026.4.1 ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import ml_dtypes
import numpy
import openvino
from openvino import opset13

def as_bfloat16(numbers):
    """By a constant of that type, and by a Convert that is computed beforehand: both have the same bits."""
    made = opset13.constant(numbers, dtype=openvino.Type.bf16).data.view(ml_dtypes.bfloat16)
    folded = openvino.Model([opset13.convert(opset13.convert(opset13.constant(numbers), "bf16"), "f32")], [])
    folded = openvino.Core().compile_model(folded, "CPU")([])[0]
    assert (made.astype(numpy.float32) == folded).all()
    return folded

numbers = numpy.array([1 + 2**-8, 1 + 3 * 2**-9, 1 + 255 * 2**-15, 1 + 3 * 2**-8, 1 + 7 * 2**-9], numpy.float32)
found = as_bfloat16(numbers).tolist()
nearest = numbers.astype(ml_dtypes.bfloat16).astype(numpy.float32).tolist()
for row in zip(numbers.tolist(), nearest, found):
    print(*row)
weights = numpy.random.default_rng(0).standard_normal(100000).astype(numpy.float32)
by_openvino, best = as_bfloat16(weights), weights.astype(ml_dtypes.bfloat16).astype(numpy.float32)
others = float((by_openvino != best).mean())
averages = [float((each / weights).mean(dtype=numpy.float64)) for each in (by_openvino, best)]
largest = [float(abs(each / weights - 1).max()) for each in (by_openvino, best)]
print("not the nearest: %.3f" % others, " average of result / number: %.5f, of the nearest %.5f" % tuple(averages),
      " largest error: %.4f, %.4f" % tuple(largest))
sys.exit(found != [1, 1, 1, 1.015625, 1.015625] or nearest != [1, 1.0078125, 1.0078125, 1.015625, 1.015625]
         or not 0.24 < others < 0.26 or not 0.998 < averages[0] < 0.999 or abs(averages[1] - 1) > 1e-4 or largest[0] < 1.9 * largest[1])
PY
