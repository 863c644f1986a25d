#!/usr/bin/env bash
# onnx 1.23.2 and onnxruntime 1.32.0: a Cast of a float to int4 is rounded in the one and cut in the other; to int8 both cut.
#
# Good guess: Cast is one operator, and onnx's reference and onnxruntime agree on it; a cast to an integer cuts the fraction, whatever
# the width, or it is clipped at the ends.
# What they do: onnxruntime rounds to the nearest for INT4 and UINT4, the middle away from 0, and cuts for INT8. onnx cuts for all.
# Both wrap around at the ends. Codes of 4 bits that are computed by Cast, instead of QuantizeLinear, so differ by one for half of all
# weights; there both round the middle to even and clip.
#   float                          2.5    3.5    3.7    -3.7    8
#   Cast to INT8     both          2      3      3      -3      8
#   Cast to INT4     onnx          2      3      3      -3      -8
#                    onnxruntime   3      4      4      -4      -8
#   QuantizeLinear   both          2      4      4      -4      7
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import numpy
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

numbers = numpy.array([2.5, 3.5, 3.7, -3.7, 8], numpy.float32)

def by_both(nodes, constants=()):
    """x -> codes -> y, both ways."""
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(numbers)])
    nodes = nodes + [helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT)]
    graph = helper.make_graph(nodes, "codes", [value("x")], [value("y")], list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [run(None, {"x": numbers})[0].tolist() for run in (ReferenceEvaluator(model).run, session.run)]

found = {name: by_both([helper.make_node("Cast", ["x"], ["codes"], to=getattr(TensorProto, name))]) for name in ("INT8", "INT4")}
found["QuantizeLinear"] = by_both([helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"])],
                                  [helper.make_tensor("scale", TensorProto.FLOAT, [], [1]),
                                   helper.make_tensor("zero", TensorProto.INT4, [], [0])])
for name, (onnx, ort) in found.items():
    print("%-14s onnx" % name, *onnx, " onnxruntime", *ort)
sys.exit(found != {"INT8": [[2, 3, 3, -3, 8]] * 2, "INT4": [[2, 3, 3, -3, -8], [3, 4, 4, -4, -8]],
                   "QuantizeLinear": [[2, 4, 4, -4, 7]] * 2})
PY
