#!/usr/bin/env bash
# ml_dtypes 0.6.0, onnx 1.23.2, openvino 2026.4.1, torchao 0.18.0 and CUDA's headers 13.5: a NaN cast to FP4 is -0, 1.5 or 6.
#
# Good guess: E2M1 has no NaN, so that a cast refuses it, or makes a 0 of it, the least harmful number; or all make the same of it, since
# they agree on every other number, ties and infinity included.
# What they do: each has a number of its own for it, and none a word. A broken weight or activation is so, once quantised, the largest
# number of its block or an ordinary one; in openvino's NF4 it is -1, the largest negative. It has to be looked for before.
#   cast to E2M1               NaN    infinity    7    2.5    -0.1
#   ml_dtypes, jax, onnx       -0     6           6    2      -0
#   torchao                    1.5    6           6    2      -0
#   CUDA's header, openvino    6      6           6    2      -0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.11.0 torchao==0.18.0 numpy==2.4.6 ml_dtypes==0.6.0 jax==0.10.2 \
    onnx==1.23.2 openvino==2026.4.1
"$work/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$work/cuda" nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37
cat > "$work/cast.cpp" <<'CPP'
#include <cuda_runtime.h>
#include <cuda_fp4.h>
#include <cmath>
#include <cstdio>
int main() {
    for (float x : {NAN, INFINITY, 7.f, 2.5f, -0.1f}) printf("%g ", (float)__nv_fp4_e2m1(x));
}
CPP
g++ -std=c++17 -I "$work/cuda/nvidia/cu13/include" "$work/cast.cpp" -o "$work/cast"
"$work/venv/bin/python" - "$("$work/cast")" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import ml_dtypes
import numpy
import openvino
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from openvino import opset13
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, f4_unpacked_to_f32

values = numpy.array([numpy.nan, numpy.inf, 7, 2.5, -0.1], numpy.float32)

def by_onnx():
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy")
    nodes = [helper.make_node("Cast", ["x"], ["codes"], to=TensorProto.FLOAT4E2M1),
             helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return ReferenceEvaluator(model).run(None, {"x": values})[0]

def by_openvino(kind):
    x = opset13.parameter([-1], numpy.float32)
    model = openvino.Model([opset13.convert(opset13.convert(x, kind), numpy.float32)], [x])
    return next(iter(openvino.Core().compile_model(model, "CPU")([values]).values()))

found = {"ml_dtypes": values.astype(ml_dtypes.float4_e2m1fn), "jax": jax.numpy.asarray(values).astype("float4_e2m1fn").astype(numpy.float32),
         "onnx": by_onnx(), "torchao": f4_unpacked_to_f32(f32_to_f4_unpacked(torch.tensor(values))),
         "CUDA": sys.argv[1].split(), "openvino": by_openvino(openvino.Type.f4e2m1)}
of_nan = {"torchao": "1.5", "CUDA": "6", "openvino": "6"}
wrong = False
for name, numbers in found.items():
    written = ["%g" % float(x) for x in numbers]
    print("%-10s" % name, *written)
    wrong |= written != [of_nan.get(name, "-0"), "6", "6", "2", "-0"]
nf4 = float(by_openvino(openvino.Type.nf4)[0])
print("NF4 of a NaN, openvino", nf4)
sys.exit(wrong or nf4 != -1)
PY
