#!/usr/bin/env bash
# nvcc and ptxas 13.5.37: a * b + c of __nv_bfloat16 is rounded once on sm_90 and sm_100, twice on sm_80, and always once of __half.
#
# Good guess: the operators of __nv_bfloat16 are functions: a product is rounded to bfloat16 before something is added to it, as on the CPU
# with the same header; who wants one rounding writes __hfma. Or, as for float, the two are contracted to one instruction on every GPU.
# What it does: in PTX there are mul.bf16 and add.bf16, which say no rounding, so that ptxas may join them, and from sm_90 on it does. On
# sm_80, where both are fused instructions of their own, it does not. So one source has other bits on an A100 than on an H100, in plain
# code without any flag of speed, and a CPU test of the same function has the A100's. -fmad=false separates all; __hmul_rn for the product
# separates that one.
# Multiply-adds in SASS for one a * b + c, those that only multiply or add counted as such:
#                              sm_80        sm_90        sm_100
#   bfloat16                   mul, add     fma          fma
#   bfloat16, -fmad=false      mul, add     mul, add     mul, add
#   bfloat16, __hmul_rn        mul, add     mul, add     mul, add
#   half                       fma          fma          fma
#   half, -fmad=false          mul, add     mul, add     mul, add
# 1.0078125 * 1.0078125 - 1.015625 is 0 on the CPU, 6.1e-5 exactly.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check nvidia-cuda-nvcc==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-nvvm==13.5.37 \
    nvidia-cuda-runtime==13.5.37 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
cuda=$(echo "$work"/venv/lib/python*/site-packages/nvidia/cu13)
export PATH="$cuda/bin:$PATH"
cat > "$work/sum.cu" <<'CU'
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdio>
extern "C" __global__ void bfloat16(__nv_bfloat16 *x) { x[3] = x[0] * x[1] + x[2]; }
extern "C" __global__ void rounded(__nv_bfloat16 *x) { x[3] = __hmul_rn(x[0], x[1]) + x[2]; }
extern "C" __global__ void half_(__half *x) { x[3] = x[0] * x[1] + x[2]; }
int main() {
    __nv_bfloat16 a = __float2bfloat16(1.0078125f), c = __float2bfloat16(-1.015625f);
    printf("on the CPU: %g\n", __bfloat162float(a * a + c));
}
CU
# instructions of one kernel: fma where all three factors and terms are registers, else mul or add
kind() {
    cuobjdump -sass -fun "$1" "$work/sum.cubin" | grep -oE 'H(FMA|MUL|ADD)2[^;]*' | awk '
        /^HMUL2/ || /-RZ/ { print "mul"; next }
        /^HADD2/ || /, 1, 1,/ { print "add"; next }
        { print "fma" }' | paste -sd ' '
}
failed=0
for machine in sm_80 sm_90 sm_100; do
    for option in -fmad=true -fmad=false; do
        nvcc -arch=$machine $option -cubin -o "$work/sum.cubin" "$work/sum.cu"
        found="$(kind bfloat16), $(kind rounded), $(kind half_)"
        echo "$machine $option: bfloat16, with __hmul_rn, half: $found"
        case "$machine $option" in
        *false) [ "$found" = "mul add, mul add, mul add" ] ;;
        sm_80*) [ "$found" = "mul add, mul add, fma" ] ;;
        *) [ "$found" = "fma, mul add, fma" ] ;;
        esac || failed=1
    done
done
g++ -x c++ -std=c++17 -D__global__= -I "$cuda/include" "$work/sum.cu" -o "$work/sum" 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
"$work/sum" | tee "$work/out"
[ "$(cat "$work/out")" = "on the CPU: 0" ] || failed=1
exit $failed
