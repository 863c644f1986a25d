#!/usr/bin/env bash
# mlx 0.32.4: of a GGUF file it loads the tensors before the first MXFP4 one and no more, and BF16 ones as float16.
#
# Good guess: load gives every tensor of the file or an error, as it does for Q5_0; bfloat16, which mlx has,
# stays bfloat16.
# What it does: at a kind that it does not know (MXFP4, NVFP4, TQ1_0, TQ2_0) the list of tensors ends, for it, without a
# word; F32 ones behind are missing too, and of a file that begins with one nothing is there. BF16 goes through float16:
# beyond 65504 is infinite, below 3e-8 zero, between there and 6e-5 bits are lost. float32 stays float32.
#   tensors of the file          what load gives
#   F32 a, MXFP4 b, F32 c        a
#   F32 a, Q5_0 b, F32 c         an error
#   BF16 99840  1e-6  1e-8       float16  inf  1.01e-6  0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" - "$work/model.gguf" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import gguf
import mlx.core as mx
import numpy

def loaded(**tensors):
    """What mlx loads from a GGUF file of these tensors: (values, kind)."""
    writer = gguf.GGUFWriter(sys.argv[1], "llama")
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert [tensor.name for tensor in gguf.GGUFReader(sys.argv[1]).tensors] == list(tensors)
    try:
        return mx.load(sys.argv[1])
    except RuntimeError:
        return None

kinds, ones = gguf.GGMLQuantizationType, numpy.ones((2, 32), numpy.float32)
mixed = [loaded(a=(ones, kinds.F32), b=(ones, kind), c=(ones, kinds.F32)) for kind in (kinds.MXFP4, kinds.Q5_0)]
print("with MXFP4:", *mixed[0], " with Q5_0:", "an error" if mixed[1] is None else mixed[1])
weights = numpy.array([[99840, 1e-6, 1e-8]], numpy.float32)
small = loaded(a=(weights, kinds.BF16))["a"]
print("BF16: %s %g %.3g %g" % (small.dtype, *small.astype(mx.float32)[0].tolist()))
sys.exit(not (set(mixed[0]) == {"a"} and mixed[1] is None and small.dtype == mx.float16
              and small[0, 0].item() == float("inf") and 1.01e-6 < small[0, 1].item() < 1.02e-6 and small[0, 2].item() == 0))
PY
