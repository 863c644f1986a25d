#!/usr/bin/env bash
# ml_dtypes 0.6.0 with numpy 2.4.6: of int4 arrays x @ x and numpy.dot(x, x) are two numbers,
# x * x and x ** 2 two arrays.
#
# Good guess: int4 is to numpy as int8 is: products keep the type and wrap around, sums are made in 64 bits;
# or all keeps int4.
# What it does: where ml_dtypes has a function of its own the result is an int4 and wraps around: +, *, numpy.dot and
# also sum and mean. Elsewhere numpy looks for a wider type that has one, and takes int8: @, **, negation,
# abs, and + or * with a Python int.
# So neither is the dot product of more than a few codes; the sum of a row of codes, by which a zero point is taken out,
# wraps around at 8, and the mean of twenty ones is 0.
#   x = [3 -2 7 -8]     int4        int8
#   x @ x               126 (int8)  126 (int8)
#   dot(x, x)           -2 (int4)   126 (int8)
#   x * x               -7 4 1 0    9 4 49 64
#   x ** 2              9 4 49 64   9 4 49 64
#   -x                  -3 2 -7 8   -3 2 -7 8
#   sum of 20 ones      4           20
#   mean of 20 ones     0           1
# What is right: x.astype(numpy.int32) first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import ml_dtypes
import numpy

found = {}
for kind in ml_dtypes.int4, numpy.int8:
    x, ones = numpy.array([3, -2, 7, -8], kind), numpy.ones(20, kind)
    results = {"x @ x": x @ x, "dot(x, x)": numpy.dot(x, x), "x * x": x * x, "x ** 2": x ** 2, "-x": -x,
               "sum of 20 ones": ones.sum(), "mean of 20 ones": ones.mean()}
    found[kind.__name__] = {name: (each.dtype.name, each.astype(int).tolist()) for name, each in results.items()}
for name in found["int4"]:
    print("%-16s" % name, *found["int4"][name], "|", *found["int8"][name])
squares, minus = [9, 4, 49, 64], [-3, 2, -7, 8]
sys.exit([list(each.values()) for each in found.values()] != [
    [("int8", 126), ("int4", -2), ("int4", [-7, 4, 1, 0]), ("int8", squares), ("int8", minus), ("int4", 4), ("int4", 0)],
    [("int8", 126), ("int8", 126), ("int8", squares), ("int8", squares), ("int8", minus), ("int64", 20), ("float64", 1)]])
PY
