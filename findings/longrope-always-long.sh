#!/usr/bin/env bash
# mlx-lm 0.32.2: of "longrope" the short factors are never used, and of "yarn" attention_factor and truncate are not read.
#
# Good guess: rope_scaling means what it means in transformers. Up to the trained length a longrope model has the frequencies of
# short_factor, beyond it those of long_factor; YaRN's attention_factor, where it is given, is what queries and keys are multiplied by.
# What it does: the frequencies are those of long_factor at any length, so that every short prompt gets other logits. short_factor has
# to be there, and has no effect. YaRN's factor is always 0.1 ln(factor) + 1, and "truncate": false changes nothing.
# Trained length 4096, head size 4, base 10000, short_factor 1 1, long_factor 1 4: the angles of the two pairs at position 100, where
# a prompt of 101 tokens ends, and what YaRN of factor 4 multiplies by:
#                                      by definition    mlx-lm
#   longrope                           100  1           100  0.25
#   yarn                               1.1386           1.1386
#   yarn with attention_factor 1       1                1.1386
# scripts/convert.py refuses both rope_types.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import mlx.core as mx
import numpy
from mlx_lm.models.rope_utils import initialize_rope

def rotated(position, scaling):
    """Both pairs, each (1, 0) before, as complex numbers."""
    rope = initialize_rope(4, 10000.0, False, scaling, 16384)
    x = numpy.array(rope(mx.array([[[[1.0, 1.0, 0.0, 0.0]]]]), offset=position))[0, 0, 0]
    return x[:2] + 1j * x[2:]

longrope = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 4096, "long_factor": [1.0, 4.0]}
found = {}
for short in 1.0, 2.0:
    pairs = rotated(100, {**longrope, "short_factor": [short, short]})
    found[short] = pairs / abs(pairs)
    print("longrope, short factors %g: angles mod 2 pi" % short, *numpy.angle(pairs).astype(float).round(4))
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
sizes = [abs(rotated(0, {**yarn, **more})).astype(float).round(4).tolist() for more in ({}, {"attention_factor": 1.0})]
print("yarn, with attention_factor 1:", *sizes)
angles = lambda factors: numpy.exp(1j * 100 * numpy.array([1, 0.01]) / factors)
right = all(numpy.allclose(each, angles([1, 4]), atol=1e-4) for each in found.values())
truncated = [rotated(1000, {**yarn, "truncate": each}).tolist() for each in (True, False)]
sys.exit(not right or truncated[0] != truncated[1] or sizes != [[1.1386, 1.1386]] * 2)
PY
