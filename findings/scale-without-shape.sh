#!/usr/bin/env bash
# torch 2.11.0: a scale of shape [] and one of shape [1] give weights of two types, and of two values.
#
# Good guess: bfloat16 times float32 is float32, whatever the shapes, as in numpy with ml_dtypes 0.6.0 and in jax 0.10.2; a scale for a
# whole tensor, which checkpoints have as [] or as [1], is the same number.
# What it does: a tensor without dimensions has no say in the type if it is of the same kind of number: codes or weights of 16 bits stay
# at 16 bits, and what is multiplied is rounded to them. With int8 codes and an int32 zero point of 300 the result is int8 and wraps
# around. So dequantisation written once is exact for one checkpoint and rounded for another, and its layers have different types.
# What is right is to widen the codes first.
# bfloat16 3 times float32 0.3337; int8 3 times int32 300:
#                  torch []            torch [1]          numpy and jax, both
#   bfloat16       1 (bfloat16)        1.0011 (float32)   1.0011 (float32)
#   int8           -124 (int8)         900 (int32)        900 (int32)
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

makers = {"torch": lambda values, kind: torch.tensor(values, dtype=getattr(torch, kind)),
          "numpy": lambda values, kind: numpy.array(values, getattr(ml_dtypes, kind, kind)),
          "jax": lambda values, kind: jax.numpy.array(values, kind)}
wrong = False
for name, make in makers.items():
    for kind, scale, wide in ("bfloat16", 0.3337, "float32"), ("int8", 300, "int32"):
        found = []
        for shaped in scale, [scale]:
            product = make([3], kind) * make(shaped, wide)
            found.append("%.5g (%s)" % (float(product[0]), str(product.dtype).removeprefix("torch.")))
        print(name, kind, "with [] and [1]:", *found)
        right = "1.0011 (float32)" if kind == "bfloat16" else "900 (int32)"
        kept = {"bfloat16": "1 (bfloat16)", "int8": "-124 (int8)"}[kind] if name == "torch" else right
        wrong |= found != [kept, right]
sys.exit(wrong)
PY
