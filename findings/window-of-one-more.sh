#!/usr/bin/env bash
# jax 0.10.2: a sliding window of N attends to N + 1 keys, in transformers, mlx-lm and onnxruntime to N.
#
# Good guess: sliding_window of a config.json is what goes into each library's argument: N keys, the token's own among them.
# What jax.nn.dot_product_attention does: local_window_size is how many keys to the left, the token's own not counted, so that N is one too
# many; (N - 1, 0) is right. onnxruntime's GroupQueryAttention (local_window_size), mlx-lm's and transformers' masks count the token.
# The difference is nothing for texts shorter than the window, and one key of 4096 beyond: logits that look like rounding.
# How many keys each of 6 tokens attends to, window 3:
#   jax                                            1 2 3 4 4 4
#   transformers 5.24.0, mlx-lm 0.32.2,
#   onnxruntime 1.32.0, jax with (2, 0)            1 2 3 3 3 3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 \
    torch==2.11.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import numpy
import onnxruntime
import torch
from mlx_lm.models.base import create_causal_mask
from onnx import TensorProto, helper
from transformers.masking_utils import sliding_window_causal_mask_function

TOKENS, WINDOW, SIZE = 6, 3, 8
# all keys are equal, and value i is the i-th unit vector: what comes out is 1 / n at the n keys attended to
zeros = numpy.zeros((1, TOKENS, SIZE), numpy.float32)
values = numpy.eye(TOKENS, SIZE, dtype=numpy.float32)[None]

def by_jax(window):
    q, k, v = (each[:, :, None] for each in (zeros, zeros, values))
    return (numpy.asarray(jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window))[0, :, 0] > 0).sum(-1).tolist()

def by_onnxruntime():
    floats, ints = TensorProto.FLOAT, TensorProto.INT32
    shapes = {"q": [1, "t", SIZE], "k": [1, "t", SIZE], "v": [1, "t", SIZE], "old_k": [1, 1, "p", SIZE], "old_v": [1, 1, "p", SIZE]}
    inputs = [helper.make_tensor_value_info(name, floats, shape) for name, shape in shapes.items()]
    inputs += [helper.make_tensor_value_info(name, ints, [1]) for name in ("last", "total")]
    outputs = [helper.make_tensor_value_info(name, floats, None) for name in ("out", "new_k", "new_v")]
    node = helper.make_node("GroupQueryAttention", [each.name for each in inputs], ["out", "new_k", "new_v"], domain="com.microsoft",
                            num_heads=1, kv_num_heads=1, local_window_size=WINDOW)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=8)
    empty = numpy.zeros((1, 1, 0, SIZE), numpy.float32)
    given = {"q": zeros, "k": zeros, "v": values, "old_k": empty, "old_v": empty, "last": numpy.array([TOKENS - 1], numpy.int32),
             "total": numpy.array([TOKENS], numpy.int32)}
    return (onnxruntime.InferenceSession(model.SerializeToString()).run(["out"], given)[0][0] > 0).sum(-1).tolist()

allowed = sliding_window_causal_mask_function(WINDOW)
found = {"jax": by_jax(WINDOW), "jax, (2, 0)": by_jax((WINDOW - 1, 0)), "onnxruntime": by_onnxruntime(),
         "mlx-lm": numpy.array(create_causal_mask(TOKENS, window_size=WINDOW)).sum(-1).tolist(),
         "transformers": [sum(bool(allowed(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(TOKENS)) for q in range(TOKENS)]}
for name, counts in found.items():
    print("%-14s" % name, *counts)
sys.exit(any(counts != ([1, 2, 3, 4, 4, 4] if name == "jax" else [1, 2, 3, 3, 3, 3]) for name, counts in found.items()))
PY
