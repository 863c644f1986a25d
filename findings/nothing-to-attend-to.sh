#!/usr/bin/env bash
# jax 0.10.2, mlx 0.32.4, onnx 1.23.2, onnxruntime 1.32.0 and openvino 2026.4.1: attention of a token all of whose keys are masked is
# three things, one of them the average of what is masked.
#
# Good guess: the rows of padding in a batch, which may attend to nothing, give NaN (0 divided by 0) or 0, and a mask of truth values is
# the same as one of 0 and -infinity.
# What they do: ONNX's Attention gives 0 for both masks, openvino NaN for both. jax.nn.dot_product_attention and mlx's
# scaled_dot_product_attention give NaN for -infinity; but for truth values they put a large negative number in its place, which in such
# a row is the same for all keys, so that the row attends to everything that it was not to see, and its numbers look right. A NaN is
# noticed, and spreads by 0 * NaN; this does neither, and whoever averages over all rows, or keeps them as keys, takes it in.
# Average of the values 0 1 2 over the keys attended to; of two tokens one may see the first two keys, the other none:
#                       truth values    0 and -infinity
#   jax, mlx            0.5  1          0.5  NaN
#   onnx, onnxruntime   0.5  0          0.5  0
#   openvino            0.5  NaN        0.5  NaN
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' jax==0.10.2 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import mlx.core as mx
import numpy
import onnxruntime
import openvino
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from openvino import opset13

query, key = numpy.zeros((1, 1, 2, 4), numpy.float32), numpy.zeros((1, 1, 3, 4), numpy.float32)
value = numpy.tile(numpy.arange(3, dtype=numpy.float32)[:, None], 4)[None, None]
seen = numpy.array([[True, True, False], [False, False, False]])
added = numpy.where(seen, 0, -numpy.inf).astype(numpy.float32)

def by_jax(mask):
    mask = {"mask" if mask.dtype == bool else "bias": mask[None, None]}
    return jax.nn.dot_product_attention(*(each.swapaxes(1, 2) for each in (query, key, value)), **mask)[0, :, 0, 0].tolist()

def by_mlx(mask):
    return mx.fast.scaled_dot_product_attention(*map(mx.array, (query, key, value)), scale=0.5, mask=mx.array(mask))[0, 0, :, 0].tolist()

def by_onnx(mask, run):
    feeds = {"Q": query, "K": key, "V": value, "mask": mask}
    graph = helper.make_graph([helper.make_node("Attention", list(feeds), ["Y"])], "attention",
                              [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(each.dtype), each.shape)
                               for name, each in feeds.items()],
                              [helper.make_tensor_value_info("Y", TensorProto.FLOAT, query.shape)])
    return run(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))(None, feeds)[0][0, 0, :, 0].tolist()

def in_session(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run

def by_openvino(mask):
    inputs = [opset13.parameter(each.shape, numpy.float32) for each in (query, key, value)]
    node = opset13.scaled_dot_product_attention(*inputs, opset13.constant(mask))
    return openvino.Core().compile_model(openvino.Model([node], inputs), "CPU")([query, key, value])[0][0, 0, :, 0].tolist()

nan = float("nan")
wrong = False
for name, attention, expected in (("jax", by_jax, (1, nan)), ("mlx", by_mlx, (1, nan)),
                                  ("onnx", lambda mask: by_onnx(mask, lambda model: ReferenceEvaluator(model).run), (0, 0)),
                                  ("onnxruntime", lambda mask: by_onnx(mask, in_session), (0, 0)), ("openvino", by_openvino, (nan, nan))):
    found = [attention(mask) for mask in (seen, added)]
    print("%-12s" % name, *found)
    wrong |= not numpy.allclose(found, [[0.5, each] for each in expected], equal_nan=True)
sys.exit(wrong)
PY
