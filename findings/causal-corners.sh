#!/usr/bin/env bash
# onnx 1.23.2, onnxruntime 1.32.0 and mlx 0.32.4: causal attention of one query on a cache of five keys sees one key or five.
#
# Good guess: causal means that the newest query sees all keys, so one query on a whole cache needs no care; or at least the same
# keys and the same flag mean the same mask.
# What they do: mlx's mask="causal" ends at the last key: the query sees five. ONNX's Attention begins at the first key: a query
# beside a cache that is given as K sees one, unless the cache's part is given as past_key; both of its implementations agree.
# Decoding with a cache in K goes wrong at once, while a prompt alone, where there are as many queries as keys, is right in both.
# Mean of the values seen, which are 0 1 2 3 4:
#   queries    past keys    keys    onnx, onnxruntime    mlx
#   1          0            5       0                    2
#   2          0            5       0 0.5                1.5 2
#   1          4            1       2                    2 (has no past)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import mlx.core as mx
import numpy
import onnxruntime
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

keys = numpy.zeros((1, 1, 5, 4), numpy.float32)
values = keys + numpy.arange(5, dtype=numpy.float32)[:, None]

def by_onnx(queries, past):
    """What the reference implementation and onnxruntime make of it."""
    feed = {"q": keys[:, :, :queries], "k": keys[:, :, past:], "v": values[:, :, past:]}
    inputs, outputs = ["q", "k", "v"], ["y"]
    if past:
        feed |= {"pk": keys[:, :, :past], "pv": values[:, :, :past]}
        inputs, outputs = inputs + ["", "pk", "pv"], outputs + ["k_all", "v_all"]
    node = helper.make_node("Attention", inputs, outputs, is_causal=1)
    of = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [name + str(i) for i in range(4)])
    graph = helper.make_graph([node], "attention", [of(name) for name in feed], [of(name) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [each.run(["y"], feed)[0][0, 0, :, 0].tolist() for each in (ReferenceEvaluator(model), session)]

def by_mlx(queries):
    q, k, v = (mx.array(each) for each in (keys[:, :, :queries], keys, values))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal")[0, 0, :, 0].tolist()

found = []
for queries, past in (1, 0), (2, 0), (1, 4):
    found.append([*by_onnx(queries, past), by_mlx(queries)])
    print("queries %d, past keys %d: onnx %s, onnxruntime %s, mlx %s" % (queries, past, *found[-1]))
sys.exit(found != [[[0], [0], [2]], [[0, 0.5], [0, 0.5], [1.5, 2]], [[2], [2], [2]]])
PY
