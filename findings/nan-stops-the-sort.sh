#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.4.6: one NaN among bfloat16 or FP8 values, and numpy.sort leaves them out of order.
#
# Good guess: as with NumPy's own floats, NaN counts as larger than all numbers: sort and argsort put it at the end,
# behind numbers in ascending order, and the last of argsort without NaN are the largest.
# What it does: the NaN counts as equal to each of its neighbours, so that it hides the numbers on its one side from
# those on the other. What comes out depends on where it stood, and a top-k of logits by argsort can miss the largest.
# max is NaN, as of all floats, and nanmax is right.
#   values        as float16      as bfloat16, float8_e4m3fn, float8_e5m2
#   3 NaN 2 1     1 2 3 NaN       3 NaN 1 2
#   NaN 3 2 1     1 2 3 NaN       NaN 1 2 3
#   3 2 1 NaN     1 2 3 NaN       1 2 3 NaN
# Of 100 random numbers with one NaN among them the rest is out of order, too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import ml_dtypes
import numpy

nan = numpy.nan
orders = [3, nan, 2, 1], [nan, 3, 2, 1], [3, 2, 1, nan]
many = numpy.random.default_rng(0).standard_normal(100).astype(numpy.float32)
many[30] = nan
found = {}
for kind in numpy.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2:
    rows = [" ".join("%g" % each for each in numpy.sort(numpy.array(order, kind)).tolist()) for order in orders]
    numbers = numpy.sort(many.astype(kind)).astype(numpy.float32)
    numbers = numbers[~numpy.isnan(numbers)]
    found[kind.__name__] = rows + [bool((numpy.diff(numbers) >= 0).all())]
    print(kind.__name__, found[kind.__name__])
own = found.pop("float16")
sys.exit(own != ["1 2 3 nan"] * 3 + [True] or
         any(each != ["3 nan 1 2", "nan 1 2 3", "1 2 3 nan", False] for each in found.values()))
PY
