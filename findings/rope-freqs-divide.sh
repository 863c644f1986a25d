#!/usr/bin/env bash
# mlx 0.32.4: what fast.rope calls freqs are divisors: a position is divided by them.
#
# Good guess: freqs are frequencies, as its documentation says: the angle of position p is p * freqs[i], and what goes
# in is base ** (-2 i / d), the inv_freq of other programs, for LLaMA 3.1 with its scaling.
# freqs from that formula mean the same as base.
# What it does: the angle is p / freqs[i], so that base ** (2 i / d) goes in,
# and for LLaMA 3.1 the slow ones times 8, not by 8.
# The first pair, whose frequency is 1, comes out right with either, and so does position 0.
# Position 2, head size 4, base 10000: the angles of the two pairs
#   base=10000             2    0.02
#   freqs=[1, 0.01]        2    200
#   freqs=[1, 100]         2    0.02
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4'
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import math, sys
import mlx.core as mx

def turned(base=None, freqs=None):
    """The cosines and sines of position 2, rounded: of the first pair, of the second."""
    x = mx.array([1.0, 1, 0, 0])[None, None, None]
    y = mx.fast.rope(x, 4, traditional=False, base=base, scale=1.0, offset=2, freqs=freqs)[0, 0, 0].tolist()
    return [round(each, 4) for each in (y[0], y[2], y[1], y[3])]

def angles(first, second):
    return [round(each(angle), 4) for angle in (first, second) for each in (math.cos, math.sin)]

found = [turned(base=10000.0), turned(freqs=mx.array([1, 0.01])), turned(freqs=mx.array([1.0, 100]))]
for name, each in zip(("base 10000", "freqs 1, 0.01", "freqs 1, 100"), found):
    print(name, "cosines and sines", *each)
sys.exit(found != [angles(2, 0.02), angles(2, 200), angles(2, 0.02)])
PY
