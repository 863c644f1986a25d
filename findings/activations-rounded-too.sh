#!/usr/bin/env bash
# ggml 0.13.1 on the CPU (as pywhispercpp 1.5.1 ships it): a product rounds the activations to the kind of the weights.
#
# Good guess: weights of 16, 8 or 4 bits are widened and multiplied with activations of float32, so that an answer
# differs from that of the full weights by the rounded weights alone,
# and weights that are kept as they are give the exact product.
# What it does: the activations are first made float16, bfloat16 or, in blocks of 32 with one scale, 8 bits,
# and then multiplied.
# Beyond float16 they are infinite; a large one, as LLaMA's first token has, wipes out its neighbours in 8 bits, though
# its own weight be 0. A program that keeps activations in float32 cannot have the same logits, and is not wrong for it.
# Product of a row whose weights all formats keep, 127/128 and zeros, divided by 127/128, with the activations
#              1.001, 0 ...    70000, 0 ...    3.5, 1000, 0 ...
#   F32        1.001           70000           3.5
#   F16        1.00098         inf             3.5
#   BF16       1               70144           3.5
#   Q8_0       1.00091         69977           0
#   Q4_0       1.00091         69977           0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check pywhispercpp==1.5.1 gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import ctypes, glob, math, os, sys, sysconfig
import gguf
import numpy

def library(name):
    path, = glob.glob(os.path.join(sysconfig.get_paths()["platlib"], "pywhispercpp.libs", "libggml-%s-*.so*" % name))
    return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

class InitParams(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

pointer, base = ctypes.c_void_p, library("base")
cpu = library("cpu")
for name, arguments in {"init": [InitParams], "new_tensor_2d": [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64],
                        "mul_mat": [pointer] * 3, "get_data": [pointer], "new_graph": [pointer],
                        "build_forward_expand": [pointer] * 2}.items():
    function = getattr(base, "ggml_" + name)
    function.argtypes, function.restype = arguments, None if name == "build_forward_expand" else pointer
cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
cpu.ggml_cpu_init()

def product(weights, kind, activations):
    """ggml's product of one row of weights, stored as kind, with activations of float32."""
    context = base.ggml_init(InitParams(1 << 24, None, False))
    tensors = [base.ggml_new_tensor_2d(context, int(each), len(weights), 1) for each in (kind, kinds[0])]
    stored = gguf.quantize(weights[None], kind)
    assert (gguf.dequantize(stored, kind) == weights).all()
    for tensor, values in zip(tensors, (stored, activations)):
        ctypes.memmove(base.ggml_get_data(tensor), values.ctypes.data, values.nbytes)
    result = base.ggml_mul_mat(context, *tensors)
    graph = base.ggml_new_graph(context)
    base.ggml_build_forward_expand(graph, result)
    cpu.ggml_graph_compute_with_ctx(context, graph, 1)
    return ctypes.cast(base.ggml_get_data(result), ctypes.POINTER(ctypes.c_float))[0]

kinds = [getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0")]
weights = numpy.zeros(256, numpy.float32)
weights[0] = 127 / 128
found = {}
for kind in kinds:
    row = found[kind.name] = []
    for first, second in (1.001, 0), (70000, 0), (3.5, 1000):
        activations = numpy.zeros(256, numpy.float32)
        activations[:2] = first, second
        row.append(product(weights, kind, activations) / weights[0].item())
    print(kind.name, *("%.6g" % each for each in row))
near = lambda each, wanted: math.isclose(each, wanted, rel_tol=1e-5)
sys.exit(not (near(found["F32"][0], 1.001) and found["F32"][1:] == [70000, 3.5]
              and near(found["F16"][0], 1 + 2 ** -10) and found["F16"][1:] == [math.inf, 3.5]
              and found["BF16"] == [1, 70144, 3.5]
              and all(found[name][2] == 0 and found[name][1] not in (70000, math.inf) and not near(found[name][0], 1.001)
                      for name in ("Q8_0", "Q4_0"))))
PY
