#!/usr/bin/env bash
# onnxruntime 1.32.0 and torch 2.11.0: with quantize_dynamic the result for a token depends on tokens after it and on the rest of the batch.
#
# Good guess: int8 activations "per token", as in descriptions of LLM.int8 and of other libraries: a coarser result, but of a causal model still one
# in which a token sees nothing later than itself, and the same in a batch as alone.
# What they do: the activations of one product have one scale, made of the smallest and the largest number of the whole array: of
# all tokens and all texts of the batch. A later token with one large value, as some tokens have in LLaMA, makes those before it
# coarse; log-probabilities of a prompt then are other ones than its tokens had when they were generated, and a text's depend
# on its neighbours. Weights are int8 in both cases, so that the error below is that of the activations.
# A linear layer, 7 tokens, and an 8th that is 50 times as large; error of the first 7 beside their size:
#                                            7 tokens      with the 8th
#   onnxruntime.quantization.quantize_dynamic   below 0.1     above 0.5
#   torch.ao.quantization.quantize_dynamic      below 0.2     above 0.5
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import os, sys
import numpy
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

random = numpy.random.default_rng(0)
weights = random.standard_normal((64, 64), numpy.float32)
tokens = random.standard_normal((1, 8, 64), numpy.float32)
tokens[:, 7] *= 50
exact = tokens @ weights

before, after = (os.path.join(sys.argv[1], name) for name in ("before.onnx", "after.onnx"))
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "linear",
                          [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, 64])],
                          [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None, 64])], [numpy_helper.from_array(weights, "w")])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), before)
quantize_dynamic(before, after, weight_type=QuantType.QInt8)
session = onnxruntime.InferenceSession(after, providers=["CPUExecutionProvider"])
linear = torch.nn.Linear(64, 64, bias=False)
linear.weight.data = torch.from_numpy(weights.T.copy())
linear = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8)

def by_torch(x):
    with torch.no_grad():
        return linear(torch.from_numpy(x)).numpy()

found = []
for name, product in ("onnxruntime", lambda x: session.run(None, {"x": x})[0]), ("torch", by_torch):
    errors = [numpy.abs(product(tokens[:, :n])[:, :7] - exact[:, :7]).max() / exact[:, :7].std() for n in (7, 8)]
    print("%-12s error of 7 tokens: %.3f, before an eighth: %.3f" % (name, *errors))
    found.append(errors)
sys.exit(any(alone > 0.2 or joined < 0.5 for alone, joined in found))
PY
