#!/usr/bin/env bash
# jax 0.10.2 and ml_dtypes 0.6.0: a float beyond the range of int4 is clipped by the one and wraps around in the other.
#
# Good guess: jax's int4 is that of ml_dtypes, so that astype gives the same codes in both, of floats as of integers:
# what is too large is clipped, or wraps around.
# What they do: jax clips floats to -8 ... 7, while integers wrap around. In ml_dtypes, and so in numpy, both wrap
# around: an 8.0 made by rint of the largest weight of a group becomes -8. A quantiser that does not clip by itself is
# right in jax, and in numpy turns the signs of the largest weights. Fractions are cut in both, not rounded.
#   to int4                jax          ml_dtypes
#   8.0 9.0 -9.0 100.0     7 7 -8 7     -8 -7 7 4
#   8 9 -9 100             -8 -7 7 4    -8 -7 7 4
#   3.7 -3.7               3 -3         3 -3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import ml_dtypes
import numpy

found = []
for values in numpy.array([8, 9, -9, 100, 3.7, -3.7], numpy.float32), numpy.array([8, 9, -9, 100], numpy.int32):
    both = jax.numpy.asarray(values).astype(jax.numpy.int4), values.astype(ml_dtypes.int4)
    found.append([numpy.asarray(each).astype(int).tolist() for each in both])
    print(values.dtype, "jax", *found[-1][0], "ml_dtypes", *found[-1][1])
wrapped = [-8, -7, 7, 4]
sys.exit(found != [[[7, 7, -8, 7, 3, -3], wrapped + [3, -3]], [wrapped, wrapped]])
PY
