#!/usr/bin/env bash
# jax 0.10.2, onnx 1.23.2, onnxruntime 1.32.0 and mlx 0.32.4: "causal" attention of new tokens over a cache is two things.
#
# Good guess: where there are more keys than queries the queries are the last ones, so that with a KV cache of 4 tokens a new one attends
# to all 5 keys: causal attention means nothing else in decoding.
# What they do: mlx (mask="causal") does so. jax.nn.dot_product_attention (is_causal=True) and ONNX's Attention (is_causal=1), in onnx and
# onnxruntime alike, count queries from the first key on: the new token attends to the oldest alone, and the newest keys are not looked at.
# Shapes are right, and a prompt without a cache is the same in all. ONNX's Attention counts as mlx does if the cache comes in as
# past_key and past_value, not joined with the new keys.
# Average of the values 0 1 2 3 4 over the keys attended to, all equally:
#                                  one new token    two new tokens
#   mlx                            2                1.5  2
#   jax, onnx, onnxruntime         0                0    0.5
#   onnx, onnxruntime, past_key    2                1.5  2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' jax==0.10.2 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 \
    ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import mlx.core as mx
import numpy
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

def attention(feeds, queries):
    """ONNX's Attention of these inputs, in the order of its own, by onnx and by onnxruntime."""
    names = [name if name in feeds else "" for name in ("Q", "K", "V", "mask", "past_key", "past_value")]
    outputs = ["Y", "key", "value"] if "past_key" in feeds else ["Y"]
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    node = helper.make_node("Attention", names if "past_key" in feeds else names[:3], outputs, is_causal=1)
    graph = helper.make_graph([node], "attention",
                              [value(name, each.shape) for name, each in feeds.items()],
                              [value("Y", [1, 1, queries, 4])] + [value(name, [1, 1, 5, 4]) for name in outputs[1:]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [run(None, feeds)[0][0, 0, :, 0].tolist() for run in (ReferenceEvaluator(model).run, session.run)]

keys = numpy.zeros((1, 1, 5, 4), numpy.float32)
values = numpy.tile(numpy.arange(5, dtype=numpy.float32)[:, None], 4)[None, None]
wrong = False
for queries in 1, 2:
    query = numpy.zeros((1, 1, queries, 4), numpy.float32)
    cached = 5 - queries
    by_mlx = mx.fast.scaled_dot_product_attention(*map(mx.array, (query, keys, values)), scale=1.0, mask="causal")
    by_jax = jax.nn.dot_product_attention(*(each.swapaxes(1, 2) for each in (query, keys, values)), is_causal=True)
    found = {"mlx": by_mlx[0, 0, :, 0].tolist(), "jax": by_jax[0, :, 0, 0].tolist()}
    found["onnx"], found["onnxruntime"] = attention({"Q": query, "K": keys, "V": values}, queries)
    found["onnx, past_key"], found["onnxruntime, past_key"] = attention(
        {"Q": query, "K": keys[:, :, cached:], "V": values[:, :, cached:], "past_key": keys[:, :, :cached],
         "past_value": values[:, :, :cached]}, queries)
    from_the_end, from_the_top = [1.5, 2.0][-queries:], [0.0, 0.5][:queries]
    for name, each in found.items():
        print(queries, "new:", name, *each)
        wrong |= not numpy.allclose(each, from_the_end if name == "mlx" or "past" in name else from_the_top)
sys.exit(wrong)
PY
