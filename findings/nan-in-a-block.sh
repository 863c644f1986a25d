#!/usr/bin/env bash
# mlx 0.32.4, gguf 0.19.0 and torchao 0.18.0: one NaN among the weights of a block, and the block is zeros, NaNs or what it was.
#
# Good guess: a block whose scale is computed from a NaN is NaN, all of it, as in gguf's Q4_0 and Q8_0, so that a broken tensor is noticed
# when the quantised model first runs.
# What they do: gguf's MXFP4, and mlx's MXFP4 and NVFP4, make zeros of the whole block, its good weights included, and the model runs on
# without them. mlx's affine quantisation leaves the NaN out of the scale, and gives it the code of the group's largest weight: no number
# is missing, one is made up. torchao's MXFP4, the same format, is NaN. None of them says anything.
# A block of 3 -3 1.5, then zeros, whose sixth is NaN, quantised and read again:
#                                first three           the sixth
#   gguf Q4_0, Q8_0              NaN NaN NaN           NaN
#   torchao MXFP4                NaN NaN NaN           NaN
#   gguf MXFP4                   0 0 0                 0
#   mlx MXFP4, NVFP4             0 0 0                 0
#   mlx affine                   3 -2.625 1.5          3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' gguf==0.19.0 torch==2.11.0 torchao==0.18.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import gguf
import mlx.core
import numpy
import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor

weights = numpy.zeros((1, 32), numpy.float32)
weights[0, :3] = 3, -3, 1.5
weights[0, 5] = numpy.nan

def by_gguf(name):
    kind = getattr(gguf.GGMLQuantizationType, name)
    return gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)

def by_mlx(mode, group):
    settings = {"group_size": group, "bits": 4, "mode": mode}
    return numpy.array(mlx.core.dequantize(*mlx.core.quantize(mlx.core.array(weights), **settings), **settings).astype(mlx.core.float32))

with numpy.errstate(all="ignore"):
    found = {"gguf Q4_0": by_gguf("Q4_0"), "gguf Q8_0": by_gguf("Q8_0"), "gguf MXFP4": by_gguf("MXFP4"), "mlx MXFP4": by_mlx("mxfp4", 32),
             "mlx NVFP4": by_mlx("nvfp4", 16), "mlx affine": by_mlx("affine", 32),
             "torchao MXFP4": MXTensor.to_mx(torch.tensor(weights), torch.float4_e2m1fn_x2, 32).dequantize(torch.float32).numpy()}
nan = numpy.nan
expected = dict.fromkeys(("gguf Q4_0", "gguf Q8_0", "torchao MXFP4"), [nan] * 4)
expected |= dict.fromkeys(("gguf MXFP4", "mlx MXFP4", "mlx NVFP4"), [0] * 4) | {"mlx affine": [3, -2.625, 1.5, 3]}
wrong = False
for name, read in found.items():
    print("%-14s" % name, *("%g" % x for x in read[0, [0, 1, 2, 5]]))
    wrong |= not numpy.array_equal(read[0, [0, 1, 2, 5]], expected[name], equal_nan=True)
sys.exit(wrong)
PY
