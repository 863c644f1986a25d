#!/usr/bin/env bash
# tinygrad 0.14.0 and openvino 2026.4.1: a conversion to float16 and back to float32 is left out, so that nothing is rounded.
#
# Good guess: x.half().float() is the float16 nearest to x, infinity from 65520 on and 0 below 3e-8, as in torch, jax and mlx, also when a
# graph is compiled; it is what one writes to see what float16 costs a model.
# What they do: openvino's CPU plug-in removes the pair of conversions, for bfloat16 as well. tinygrad does where both are in one
# kernel; if the half tensor is realized before, or there is arithmetic of half in between, it is rounded. So an experiment with
# "float16 weights" measures nothing, and its result is that float16 loses nothing. jax keeps the pair under jit.
# 1.0061035 65520 1e-08, to float16 and back:
#   jax, jax under jit, mlx           1.0058594 inf 0
#   tinygrad, realized between        1.0058594 inf 0
#   tinygrad, openvino                1.0061035 65520 1e-08
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tinygrad==0.14.0 openvino==2026.4.1 jax==0.10.2 'mlx[cpu]==0.32.4' \
    numpy==2.4.6
export DEV=PYTHON       # tinygrad without a compiler; with one (DEV=CPU) it is the same
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import mlx.core as mx
import numpy
import openvino
from openvino import opset13
from tinygrad import Tensor

x = numpy.array([1.0061035, 65520, 1e-8], numpy.float32)

def by_openvino(kind):
    given = opset13.parameter(x.shape, numpy.float32)
    model = openvino.Model([opset13.convert(opset13.convert(given, kind), "f32")], [given])
    return openvino.Core().compile_model(model, "CPU")([x])[0]

def by_jax(values):
    return values.astype("float16").astype("float32")

kept = {"tinygrad": Tensor(x).half().float().numpy(), "openvino": by_openvino("f16"), "openvino, bfloat16": by_openvino("bf16")}
rounded = {"tinygrad, realized between": Tensor(x).half().realize().float().numpy(), "jax": by_jax(jax.numpy.asarray(x)),
           "jax under jit": jax.jit(by_jax)(x), "mlx": numpy.array(mx.array(x).astype(mx.float16).astype(mx.float32))}
for name, values in {**kept, **rounded}.items():
    print("%-28s" % name, *("%.8g" % each for each in values))
expected = numpy.array([1.005859375, numpy.inf, 0], numpy.float32)
sys.exit(not all(numpy.array_equal(each, x) for each in kept.values())
         or not all(numpy.array_equal(each, expected) for each in rounded.values()))
PY
