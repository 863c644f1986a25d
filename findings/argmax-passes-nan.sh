#!/usr/bin/env bash
# onnxruntime 1.32.0: the argmax of logits with a NaN among them is the NaN only if it comes first.
#
# Good guess: NaN is the largest, as in numpy, jax and mlx, so that a broken logit is chosen and seen, again and again; or it is
# never chosen.
# What it does: as a comparison of each with the largest so far does, it keeps a NaN that comes first and passes over a later one; so
# whether a model with one broken row of lm_head writes that token or an ordinary text depends on whether that row is row 0. onnx's own
# reference follows numpy. The length does not matter: of 128256 logits it is the same.
#   logits         numpy, jax, mlx, onnx    onnxruntime
#   1 3 NaN 2      id 2                     id 1
#   NaN 1 3 2      id 0                     id 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 \
    'mlx[cpu]==0.32.4' jax==0.10.2
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import mlx.core
import numpy
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

def by_onnx(run, logits):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [None])
    graph = helper.make_graph([helper.make_node("ArgMax", ["x"], ["y"], axis=0)], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return run(model).run(None, {"x": logits})[0][0]

many = numpy.arange(128256)[::-1] - numpy.where(numpy.arange(128256) == 70000, numpy.nan, 0)
wrong = False
for logits, usual, passed in ([1, 3, numpy.nan, 2], 2, 1), ([numpy.nan, 1, 3, 2], 0, 0), (many, 70000, 0):
    logits = numpy.array(logits, numpy.float32)
    found = [numpy.argmax(logits), jax.numpy.argmax(logits), mlx.core.argmax(mlx.core.array(logits)).item(),
             by_onnx(ReferenceEvaluator, logits),
             by_onnx(lambda model: onnxruntime.InferenceSession(model.SerializeToString()), logits)]
    found = [int(each) for each in found]
    print(*logits[:4], "... of", len(logits), "-> numpy, jax, mlx, onnx", *found[:4], "onnxruntime", found[4])
    wrong |= found != [usual] * 4 + [passed]
sys.exit(wrong)
PY
