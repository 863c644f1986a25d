#!/usr/bin/env bash
# triton 3.9.0: a / b is not the quotient, sqrt and rsqrt take subnormal numbers for 0, and in bfloat16 x * y + z is rounded once.
#
# Good guess: a kernel's operators are what nvcc makes of the same line of CUDA without flags: division and square root rounded to the
# nearest, subnormal numbers kept; an approximation is a function of another name, as in CUDA (__fdividef, rsqrtf).
# What it does: the names are the other way round: / is div.full, which PTX promises to two units in the last place, sqrt and rsqrt are the
# approximations with .ftz; tl.div_rn and tl.sqrt_rn are the exact ones. exp(x) is 2 to the power of a product that was rounded,
# x * 1.442695, so that its error grows with x. A scale of quantisation, amax / 448, and the codes that follow from it, can be others than in
# torch. nvcc 13.5.37 divides by div.rn and keeps subnormals.
# Instructions in PTX for sm_90:
#                  triton                    nvcc
#   a / b          div.full.f32              div.rn.f32
#   sqrt           sqrt.approx.ftz.f32       sqrt.rn.f32
#   exp            mul.f32 ex2.approx.f32    -
#   div_rn         div.rn.f32                -
#   bfloat16
#   x * y + z      fma.rn.bf16               mul.bf16 add.bf16
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check triton==3.9.0 nvidia-cuda-nvcc==13.5.37 nvidia-cuda-crt==13.5.37 \
    nvidia-nvvm==13.5.37 nvidia-cuda-runtime==13.5.37
cat > "$work/kernels.cu" <<'CU'
#include <cuda_bf16.h>
extern "C" __global__ void quotient(float *x) { x[0] = x[1] / x[2]; }
extern "C" __global__ void root(float *x) { x[0] = sqrtf(x[1]); }
extern "C" __global__ void sum(__nv_bfloat16 *x) { x[0] = x[1] * x[2] + x[3]; }
CU
cuda=$(echo "$work"/venv/lib/python*/site-packages/nvidia/cu13)
"$cuda/bin/nvcc" -arch=sm_90 -ptx -o "$work/kernels.ptx" "$work/kernels.cu"
of_nvcc=$(grep -oE '(div|sqrt|fma|mul|add)\.[a-z0-9.]*(f32|bf16)\b' "$work/kernels.ptx" | sort | paste -sd ' ')
echo "nvcc: $of_nvcc"
[ "$of_nvcc" = "add.bf16 div.rn.f32 mul.bf16 sqrt.rn.f32" ]
cat > "$work/kernels.py" <<'PY'
import re, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def quotient(x, y, z, out):
    tl.store(out, tl.load(x) / tl.load(y))

@triton.jit
def nearest(x, y, z, out):
    tl.store(out, tl.div_rn(tl.load(x), tl.load(y)))

@triton.jit
def root(x, y, z, out):
    tl.store(out, tl.sqrt(tl.load(x)))

@triton.jit
def inverse_root(x, y, z, out):
    tl.store(out, tl.rsqrt(tl.load(x)))

@triton.jit
def power(x, y, z, out):
    tl.store(out, tl.exp(tl.load(x)))

@triton.jit
def add_product(x, y, z, out):
    tl.store(out, tl.load(x) * tl.load(y) + tl.load(z))

expected = [(quotient, "fp32", ["div.full.f32"]), (nearest, "fp32", ["div.rn.f32"]), (root, "fp32", ["sqrt.approx.ftz.f32"]),
            (inverse_root, "fp32", ["rsqrt.approx.ftz.f32"]), (power, "fp32", ["mul.f32", "ex2.approx.f32"]),
            (add_product, "bf16", ["fma.rn.bf16"])]
wrong = False
for kernel, kind, instructions in expected:
    source = ASTSource(fn=kernel, signature=dict.fromkeys(("x", "y", "z", "out"), "*" + kind))
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    found = re.findall(r"^\s*((?:div|r?sqrt|ex2|mul|fma|add)\.\S*(?:f32|bf16))\b", ptx, re.MULTILINE)
    print("triton:", kernel.__name__, *found)
    wrong |= found != instructions
sys.exit(wrong)
PY
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/kernels.py" 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
