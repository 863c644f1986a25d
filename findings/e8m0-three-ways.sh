#!/usr/bin/env bash
# onnx 1.23.2, torch 2.11.0 and ml_dtypes 0.6.0: an E8M0 scale (MX formats) of the same number is three things.
#
# Good guess: E8M0 has powers of two, no sign and no 0; a conversion takes the nearest power of two, and what is
# negative or 0 becomes NaN, or is refused.
# What they do: onnx takes the power above, torch and ml_dtypes the nearest, of two equally near ones the larger. torch
# and onnx leave out the sign, so that -3 becomes a scale of 4; ml_dtypes makes it NaN. 0 becomes the smallest scale,
# 2^-127, in torch and onnx, and NaN in ml_dtypes: of a block of zeros, whose scale is 0,
# those read zeros back and this NaN.
#   number    onnx      torch     ml_dtypes
#   1.25      2         1         1
#   1.5       2         2         2
#   3         4         4         4
#   0         2^-127    2^-127    NaN
#   -3        4         4         NaN
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check onnx==1.23.2 torch==2.11.0 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import ml_dtypes
import numpy
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

numbers = [1.25, 1.5, 3, 6, 0, -3]
cast = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E8M0)], "cast",
                         [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(numbers)])],
                         [helper.make_tensor_value_info("y", TensorProto.FLOAT8E8M0, [len(numbers)])])
cast = ReferenceEvaluator(helper.make_model(cast, opset_imports=[helper.make_opsetid("", 24)]))
codes = {"onnx": numpy_helper.to_array(helper.make_tensor("x", TensorProto.FLOAT8E8M0, [len(numbers)], numbers)).view(numpy.uint8),
         "onnx's Cast": cast.run(None, {"x": numpy.array(numbers, numpy.float32)})[0].view(numpy.uint8),
         "torch": torch.tensor(numbers).to(torch.float8_e8m0fnu).view(torch.uint8).numpy(),
         "ml_dtypes": numpy.array(numbers, numpy.float32).astype(ml_dtypes.float8_e8m0fnu).view(numpy.uint8)}
for name, each in codes.items():
    codes[name] = each.tolist()
    print(name, *("NaN" if code == 255 else "2^%d" % (code - 127) for code in codes[name]))
upwards = [128, 128, 129, 130, 0, 129]
sys.exit(list(codes.values()) != [upwards, upwards, [127] + upwards[1:], [127] + upwards[1:4] + [255, 255]])
PY
