#!/usr/bin/env bash
# torch 2.11.0: the first of topk is not the argmax where logits are equal, and which one it is depends on K.
#
# Good guess: equal logits come in the order of their ids, lowest first, as argmax takes them and as jax, onnxruntime and mlx sort them, or
# in any order, but in one: topk(1) is the first of topk(5), and both are the argmax.
# What it does: on the CPU topk sorts in part or in whole, by the sizes of K and of the vocabulary, and neither way keeps the order of
# equals; of three equal ones the highest id may come first. So a list of the five most likely tokens, beam search, and a greedy choice
# that is made as topk(K)[0] name other tokens than argmax does. bfloat16 logits are easily equal: from 16 on there are eight numbers
# from one integer to the next. sort with stable=True keeps the order.
# 128256 logits, those of ids 1000, 70000 and 128255 the largest, and equal:
#   torch: argmax, topk(1)                             1000
#   torch: topk(3), topk(5)                            not 1000 first
#   torch: sort(stable=True); jax: top_k; onnxruntime: TopK; mlx: argsort       1000 70000 128255
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.11.0 jax==0.10.2 onnx==1.23.2 onnxruntime==1.32.0 \
    'mlx[cpu]==0.32.4' numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import mlx.core as mx
import numpy
import onnxruntime
import torch
from onnx import TensorProto, helper

equal = [1000, 70000, 128255]
logits = numpy.zeros(128256, numpy.float32)
logits[equal] = 17.125
x, k, v, i = (helper.make_tensor_value_info(name, kind, [None]) for name, kind in zip(
    "xkvi", (TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT, TensorProto.INT64)))
model = helper.make_model(helper.make_graph([helper.make_node("TopK", ["x", "k"], ["v", "i"])], "g", [x, k], [v, i]),
                          opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
in_order = {"jax top_k": jax.lax.top_k(logits, 3)[1],
            "onnxruntime TopK": onnxruntime.InferenceSession(model.SerializeToString()).run(["i"], {"x": logits, "k": numpy.array([3])})[0],
            "mlx argsort": numpy.array(mx.argsort(-mx.array(logits)))[:3]}
wrong = False
for dtype in torch.float32, torch.bfloat16:
    tensor = torch.tensor(logits, dtype=dtype)
    tops = {count: tensor.topk(count).indices.tolist() for count in (1, 3, 5)}
    argmax = int(tensor.argmax())
    print(dtype, "argmax", argmax, *("topk(%d) %s" % each for each in tops.items()))
    wrong |= argmax != equal[0] or tops[1] != equal[:1] or equal[0] in (tops[3][0], tops[5][0]) or sorted(tops[3]) != equal
    in_order["torch sort, stable, %s" % dtype] = tensor.sort(descending=True, stable=True).indices[:3]
for name, ids in in_order.items():
    print(name, *map(int, ids))
    wrong |= list(map(int, ids)) != equal
sys.exit(wrong)
PY
