#!/usr/bin/env bash
# triton 3.9.0: TRITON_INTERPRET=1 converts to FP8 and bfloat16 with other numbers than what the compiler makes of the same kernel.
#
# Good guess: the interpreter, made to test kernels without a GPU, gives what the GPU gives, rounding aside in the order of sums: a
# conversion has one right result, the nearest, and is compiled to the one instruction for it.
# What it does: compiled for sm_90, .to(tl.float8e4nv) is cvt.rn.satfinite: nearest, the middle to even, too large is 448. Interpreted, 500
# and infinity are 256, NaN is the number 384, 464 NaN, small numbers 0, and the middle goes away from 0. .to(tl.bfloat16) cuts. Products
# and sums of bfloat16 are those of their 16 bits as an integer, 1.5 * 1.5 + 1.5 nowhere near 3.75. Tests of quantising kernels that
# pass there, or fail, say little.
# torch's cast of the same number is the nearest, NaN beyond 464:
#   to                  500    inf    464    NaN    0.001      1.0625
#   float8e4nv          256    256    NaN    384    0          1.125
#   torch               NaN    NaN    448    NaN    0.00195    1
#   to                  1 + 3 * 2^-9
#   bfloat16            1
#   torch               1.0078
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.11.0 numpy==2.4.6
"$work/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$work/newer" triton==3.9.0
cat > "$work/kernels.py" <<'PY'
import os, sys
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def to_fp8(x, out):
    tl.store(out, tl.load(x).to(tl.float8e4nv))

@triton.jit
def to_bfloat16(x, out):
    tl.store(out, tl.load(x).to(tl.bfloat16))

@triton.jit
def add_product(x, out):
    tl.store(out, tl.load(x) * tl.load(x) + tl.load(x))

if os.environ.get("TRITON_INTERPRET") != "1":
    source = ASTSource(fn=to_fp8, signature={"x": "*fp32", "out": "*fp8e4nv"})
    instructions = [line.split()[0] for line in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"].splitlines()
                    if line.strip().startswith("cvt")]
    print("compiled for sm_90:", *instructions)
    sys.exit(instructions != ["cvt.rn.satfinite.e4m3x2.f32"])

def by_kernel(kernel, number, kind, given=torch.float32):
    out = torch.zeros(1, dtype=kind)
    kernel[(1,)](torch.tensor([number], dtype=given), out)
    return out.item(), torch.tensor([number]).to(kind).item()

wrong = False
for number, interpreted, nearest in ((500, 256, "nan"), (float("inf"), 256, "nan"), (464, "nan", 448), (float("nan"), 384, "nan"),
                                     (0.001, 0, 0.00195312), (1.0625, 1.125, 1)):
    found = by_kernel(to_fp8, float(number), torch.float8_e4m3fn)
    print("float8e4nv of", number, "interpreted %g, torch %g" % found)
    wrong |= ["%g" % x for x in found] != [str(interpreted), str(nearest)]
found = by_kernel(to_bfloat16, 1 + 3 * 2**-9, torch.bfloat16)
print("bfloat16 of 1 + 3 * 2^-9: interpreted %g, torch %g" % found)
wrong |= found != (1, 1.0078125)
found = by_kernel(add_product, 1.5, torch.bfloat16, torch.bfloat16)[0]
bits = torch.tensor([1.5], dtype=torch.bfloat16).view(torch.uint16).item()
as_integer = torch.tensor([(bits * bits + bits) % 2**16], dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).item()
print("1.5 * 1.5 + 1.5 in bfloat16: interpreted %g, its bits as integers %g" % (found, as_integer))
sys.exit(wrong or found == 3.75 or found != as_integer)
PY
export PYTHONPATH="$work/newer" TRITON_CACHE_DIR="$work/cache"
for interpret in 0 1; do
    TRITON_INTERPRET=$interpret "$work/venv/bin/python" "$work/kernels.py" 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
done
