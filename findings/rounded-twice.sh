#!/usr/bin/env bash
# torch 2.11.0, ml_dtypes 0.6.0 and jax 0.10.2: a float64 becomes a bfloat16 by way of float32, rounded twice.
#
# Good guess: a conversion gives the nearest value of the new type, as NumPy's from float64 to float16 does.
# What they do: the float64 is first rounded to a float32. A number just above the middle between two bfloat16 values
# can fall on the middle there, and the middle is rounded to even: here down. So a model in float64, or scales computed
# in float64, have other last bits than if they were rounded once. torch does so to float16 and FP8, too; jax to
# float16, but to FP8 it rounds once.
#   from float64                  nearest        numpy, ml_dtypes    torch    jax
#   bfloat16 of 1+2^-8+2^-40      1.0078125      1                   1        1
#   float16 of 1+2^-11+2^-40      1.0009765625   1.0009765625        1        1
#   float8_e4m3 of 1+2^-4+2^-30   1.125          1                   1        1.125
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.11.0 numpy==2.4.6 ml_dtypes==0.6.0 jax==0.10.2
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import ml_dtypes
import numpy
import torch

jax.config.update("jax_enable_x64", True)
found = []
for value, own, of_torch in ((1 + 2**-8 + 2**-40, ml_dtypes.bfloat16, torch.bfloat16),
                             (1 + 2**-11 + 2**-40, numpy.float16, torch.float16),
                             (1 + 2**-4 + 2**-30, ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn)):
    row = [numpy.array([value]).astype(own)[0], torch.tensor([value], dtype=torch.float64).to(of_torch).item(),
           jax.numpy.array([value], numpy.float64).astype(own)[0]]
    found.append([float(each) for each in row])
    print(own.__name__, "numpy or ml_dtypes %s, torch %s, jax %s" % tuple(found[-1]))
sys.exit(found != [[1, 1, 1], [1 + 2**-10, 1, 1], [1, 1, 1.125]])
PY
