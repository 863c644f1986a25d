#!/usr/bin/env bash
# ml_dtypes 0.6.0 with NumPy 2.4.6: the mean of 1000 ones in bfloat16 is 0.256.
#
# Good guess: a sum in 16 bits is a sum in float32 that is rounded once, or at least NumPy's pairwise one, as for
# float16, and mean computes in float32, as for float16; so a reference of RMSNorm or softmax in NumPy may stay in
# bfloat16.
# What it does: NumPy does that for its own float16 alone. ml_dtypes' numbers are added one by one and rounded each
# time: at 256 the next one is half a step, the tie goes to the even 256, and there it stays.
# Products accumulate in float32 and are right.
#                        float16    bfloat16
#   sum of 1000 ones     1000       256
#   mean                 1          0.256
#   ones @ ones          1000       1000
#   sum with dtype=float32          1000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import ml_dtypes
import numpy

found = []
for kind in numpy.float16, ml_dtypes.bfloat16:
    ones = numpy.ones(1000, kind)
    found.append([round(float(each), 3) for each in (ones.sum(), ones.mean(), ones @ ones, ones.sum(dtype=numpy.float32))])
    print(numpy.dtype(kind), "sum, mean, product, sum in float32:", *found[-1])
sys.exit(found != [[1000, 1, 1000, 1000], [256, 0.256, 1000, 1000]])
PY
