#!/usr/bin/env bash
# torch 2.11.0, jax 0.10.2 and onnx 1.23.2: log_softmax of flat float16 logits is -infinity, once the vocabulary is LLaMA 3's.
#
# Good guess: the largest logit is subtracted, and the sum of what remains is taken in float32, so that log_softmax cannot overflow;
# where softmax gives a number, log_softmax gives its logarithm.
# What they do: the logarithm's argument, the sum, or the logsumexp that is made of it, passes through float16, whose largest number is
# 65504. Each token adds at most 1, so that a vocabulary of 32000 cannot get there; one of 128256 does where the logits are nearly
# flat, as those of a model with small random weights are, which tests are made with. Every log-probability is then -infinity, and the
# loss infinity; torch's own softmax is right beside it, jax's and onnx's are 0. onnxruntime, openvino and mlx give the numbers.
# Equal float16 logits, what each is given as, log_softmax and softmax:
#                           of 32000              of 128256
#   torch                   -10.38  3.1e-05       -inf    7.8e-06
#   jax                     -10.38  3.1e-05       -inf    0
#   onnx                    -10.38  3.1e-05       -inf    0
#   onnxruntime, openvino   -10.38  3.1e-05       -11.77  7.8e-06
#   mlx (its logsumexp)     -10.38                -11.77
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.11.0 jax==0.10.2 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 'mlx[cpu]==0.32.4' numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import math, sys
import jax
import mlx.core as mx
import numpy
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from openvino import opset13

def by_onnx(logits, run):
    found = []
    for kind in "LogSoftmax", "Softmax":
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, logits.shape) for name in "xy")
        graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"], axis=-1)], "g", [x], [y])
        found.append(run(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))(None, {"x": logits})[0])
    return found

def by_openvino(logits):
    given = opset13.parameter(logits.shape, numpy.float16)
    model = openvino.Model([opset13.log_softmax(given, 1), opset13.softmax(given, 1)], [given])
    return list(openvino.Core().compile_model(model, "CPU")([logits]).values())

ways = {"torch": lambda x: [torch.from_numpy(x).log_softmax(-1), torch.from_numpy(x).softmax(-1)],
        "jax": lambda x: [jax.nn.log_softmax(x), jax.nn.softmax(jax.numpy.asarray(x))],
        "onnx": lambda x: by_onnx(x, lambda model: ReferenceEvaluator(model).run),
        "onnxruntime": lambda x: by_onnx(x, lambda model: onnxruntime.InferenceSession(model.SerializeToString()).run),
        "openvino": by_openvino, "mlx": lambda x: [mx.array(x) - mx.logsumexp(mx.array(x), axis=-1, keepdims=True)]}
infinite, zero = {"torch", "jax", "onnx"}, {"jax", "onnx"}
wrong = False
for size in 32000, 128256:
    for name, way in ways.items():
        log, *plain = [float(each[0, 0]) for each in way(numpy.zeros((1, size), numpy.float16))]
        print("%-12s of %6d: log_softmax %.2f" % (name, size, log), *("softmax %.1e" % each for each in plain))
        large = size > 65504
        wrong |= log != -math.inf if large and name in infinite else abs(log + math.log(size)) > 0.02
        for each in plain:
            wrong |= each != 0 if large and name in zero else abs(each * size - 1) > 0.01
sys.exit(wrong)
PY
