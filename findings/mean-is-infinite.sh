#!/usr/bin/env bash
# mlx 0.32.4, numpy 2.4.6 and onnx 1.23.2: the mean, or the variance, of 4096 float16 numbers none of which is above 25 is infinite.
#
# Good guess: sums of float16 are made in float32, and a mean, which cannot be larger than its largest number, is rounded to float16 once,
# at the end; so a norm that is written out, x / sqrt(mean(x * x)), needs no conversion for its mean.
# What they do: mlx makes the sum in float32, but rounds it to float16, infinity from 65520 on, before it divides. So do numpy's var and
# std, while its mean is computed in float32 throughout, and onnx's reference of ReduceMean. A hidden state of 4096 numbers of 5 is
# enough: its norm, written out, is 0 everywhere, and mx.fast.rms_norm of the same is 1. jax and onnxruntime are right.
# Of 4096 float16 numbers, 5 and -5 in turn:
#                    mean of the squares    variance
#   mlx              inf                    inf
#   numpy            25                     inf
#   onnx             inf
#   onnxruntime      25
#   jax              25                     25
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' jax==0.10.2 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax.numpy
import mlx.core as mx
import numpy
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

x = numpy.tile(numpy.array([5, -5], numpy.float16), 2048)
squares, ours = x * x, mx.array(x)
given, mean = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [None]) for name in "xy")
model = helper.make_model(helper.make_graph([helper.make_node("ReduceMean", ["x"], ["y"])], "g", [given], [mean]),
                          opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString())
infinite = numpy.inf
rows = [("mlx", mx.mean(ours * ours), mx.var(ours), infinite, infinite),
        ("numpy", squares.mean(), x.var(), 25, infinite),
        ("onnx", ReferenceEvaluator(model).run(None, {"x": squares})[0].item(), None, infinite, None),
        ("onnxruntime", session.run(None, {"x": squares})[0].item(), None, 25, None),
        ("jax", jax.numpy.mean(jax.numpy.asarray(squares)), jax.numpy.var(jax.numpy.asarray(x)), 25, 25)]
wrong = False
for name, *found, of_squares, variance in rows:
    found = [None if each is None else float(each) for each in found]
    print("%-12s" % name, *("" if each is None else "%g" % each for each in found))
    wrong |= found != [of_squares, variance]
written_out = ours * mx.rsqrt(mx.mean(ours * ours) + 1e-5)
norms = [each.astype(mx.float32)[0].item() for each in (written_out, mx.fast.rms_norm(ours, mx.ones(4096, mx.float16), 1e-5))]
print("norm of the first: written out %g, fast.rms_norm %g" % tuple(norms))
sys.exit(wrong or norms != [0, 1])
PY
