#!/usr/bin/env bash
# torch 2.11.0, ml_dtypes 0.6.0, jax 0.10.2, onnx 1.23.2, onnxruntime 1.32.0, mlx 0.32.4 and CUDA's headers 13.5: what becomes of a number
# too large for FP8.
#
# Good guess: a cast to E4M3, which has no infinity, gives the largest number, 448, or gives NaN, in all libraries; E5M2 has infinity, so
# that it comes out there; and onnx's saturate=0 means the one of these that saturate=1 does not.
# What they do: torch, ml_dtypes and jax give NaN and infinity; CUDA's types (__nv_fp8_e4m3(x)), mlx.to_fp8 and ONNX's Cast as it is without
# an attribute give the largest number, in E5M2 too, of infinity as well. mlx makes 448 of a NaN, which is then lost. With saturate=0
# onnx's reference does as torch, onnxruntime does not: from 480 up to 496 E4M3 is 448, between NaN on either side, and E5M2 is NaN
# instead of infinity. What overflowed is so found in one program, where a NaN spreads, and hidden in another.
#                               470    480    500    infinity    NaN        E5M2 of 64000
#   torch, ml_dtypes, jax       NaN    NaN    NaN    NaN         NaN        infinity
#   onnx, onnxruntime, CUDA     448    448    448    448         NaN        57344
#   mlx                         448    448    448    448         448        -
#   onnx, saturate=0            NaN    NaN    NaN    NaN         NaN        infinity
#   onnxruntime, saturate=0     NaN    448    NaN    NaN         NaN        NaN
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.11.0 numpy==2.4.6 ml_dtypes==0.6.0 jax==0.10.2 onnx==1.23.2 \
    onnxruntime==1.32.0 'mlx[cpu]==0.32.4'
"$work/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$work/cuda" nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37
cat > "$work/cast.cpp" <<'CPP'
#include <cuda_runtime.h>
#include <cuda_fp8.h>
#include <cmath>
#include <cstdio>
int main() {
    for (float x : {470.f, 480.f, 500.f, INFINITY, NAN}) printf("%g ", (float)__nv_fp8_e4m3(x));
    printf("%g\n", (float)__nv_fp8_e5m2(64000.f));
}
CPP
g++ -std=c++17 -I "$work/cuda/nvidia/cu13/include" "$work/cast.cpp" -o "$work/cast"
"$work/venv/bin/python" - "$("$work/cast")" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import ml_dtypes
import mlx.core
import numpy
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

E4M3 = numpy.array([470, 480, 500, numpy.inf, numpy.nan], numpy.float32)
E5M2 = numpy.array([64000], numpy.float32)

def by_onnx(runtime, saturate):
    def cast(values, kind):
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy")
        nodes = [helper.make_node("Cast", ["x"], ["codes"], to=kind, **saturate),
                 helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT)]
        model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return runtime(model).run(None, {"x": values})[0]
    return [*cast(E4M3, TensorProto.FLOAT8E4M3FN), *cast(E5M2, TensorProto.FLOAT8E5M2)]

def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString())

def each(cast, e4m3, e5m2):
    return [*map(float, cast(E4M3, e4m3)), *map(float, cast(E5M2, e5m2))]

with numpy.errstate(all="ignore"):
    found = {
        "torch": each(lambda x, kind: torch.tensor(x).to(kind).float(), torch.float8_e4m3fn, torch.float8_e5m2),
        "ml_dtypes": each(lambda x, kind: x.astype(kind), ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
        "jax": each(lambda x, kind: jax.numpy.asarray(x).astype(kind).astype(numpy.float32), "float8_e4m3fn", "float8_e5m2"),
        "onnx": by_onnx(ReferenceEvaluator, {}), "onnxruntime": by_onnx(session, {}), "CUDA": [float(x) for x in sys.argv[1].split()],
        "mlx": mlx.core.from_fp8(mlx.core.to_fp8(mlx.core.array(E4M3)), mlx.core.float32).tolist(),
        "onnx, saturate=0": by_onnx(ReferenceEvaluator, {"saturate": 0}),
        "onnxruntime, saturate=0": by_onnx(session, {"saturate": 0})}
nan, inf = float("nan"), float("inf")
by_name = dict.fromkeys(("torch", "ml_dtypes", "jax", "onnx, saturate=0"), [nan] * 5 + [inf])
by_name |= dict.fromkeys(("onnx", "onnxruntime", "CUDA"), [448] * 4 + [nan, 57344])
by_name |= {"mlx": [448] * 5, "onnxruntime, saturate=0": [nan, 448, nan, nan, nan, nan]}
for name, values in found.items():
    print("%-24s" % name, *("%g" % x for x in values))
sys.exit(not all(numpy.array_equal(values, by_name[name], equal_nan=True) for name, values in found.items()))
PY
