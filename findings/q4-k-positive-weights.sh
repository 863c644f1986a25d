#!/usr/bin/env bash
# ggml (as pywhispercpp 1.5.1 ships it): Q4_K and Q5_K keep a block of positive weights many times worse than the same
# negated, and than Q4_1 and Q5_1 do.
#
# Good guess: Q4_K has a scale and a minimum for each 32 weights, so that weights between 1 and 1.1 are kept within half
# of 0.1 / 15 and a little more for the rounded minimum; and what is negated is kept as well as before.
# What it does: the minimum is stored as something that is only subtracted, of 6 bits without a sign. Of positive
# weights it is 0, and the codes spread over 0 ... 1.1. Negative weights have theirs. Q4_1,
# whose minimum is a float16, keeps both alike.
# Largest error of 256 weights:
#                  Q4_1      Q4_K      Q5_1      Q5_K
#   1 ... 1.1      0.0037    0.0358    0.0019    0.0190
#   the negated    0.0033    0.0044    0.0019    0.0063
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check pywhispercpp==1.5.1 gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import ctypes, glob, os, sys, sysconfig
import gguf
import numpy

base, = glob.glob(os.path.join(sysconfig.get_paths()["platlib"], "pywhispercpp.libs", "libggml-base-*.so*"))
quantize = ctypes.CDLL(base).ggml_quantize_chunk
quantize.restype = ctypes.c_size_t
quantize.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]

def error(weights, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    codes = numpy.zeros((1, len(weights) // block * size), numpy.uint8)
    written = quantize(kind, weights.ctypes.data, codes.ctypes.data, 0, 1, len(weights), None)
    assert written == codes.nbytes
    return float(abs(gguf.dequantize(codes, kind)[0] - weights).max())

kinds = [getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_1", "Q4_K", "Q5_1", "Q5_K")]
weights = (1 + 0.1 * numpy.random.Generator(numpy.random.PCG64(0)).random(256)).astype(numpy.float32)
positive, negative = ([error(each, kind) for kind in kinds] for each in (weights, -weights))
print("positive Q4_1 %.4f Q4_K %.4f Q5_1 %.4f Q5_K %.4f" % tuple(positive))
print("negative Q4_1 %.4f Q4_K %.4f Q5_1 %.4f Q5_K %.4f" % tuple(negative))
as_said = positive[1] > 8 * positive[0] and positive[3] > 8 * positive[2]
sys.exit(not (as_said and positive[1] > 3 * negative[1] and positive[3] > 2 * negative[3] and negative[0] < 0.004))
PY
