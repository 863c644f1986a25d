#!/usr/bin/env bash
# mlx-lm 0.32.2: top_p and min_p are taken before the temperature, and top_p before top_k.
#
# Good guess: the temperature comes first, then top_k, then top_p of what these leave, as in transformers: top_p = 0.7
# leaves the tokens that make up 0.7 of what is drawn from. So the same three settings mean the same tokens in both.
# What it does: make_sampler's order is top_p, min_p, top_k, temperature. At high temperatures fewer tokens are left
# than the drawn distribution says, at low ones more; and top_p does not know what top_k is about to remove.
# Tokens drawn of four with the probabilities 0.5 0.25 0.15 0.1:
#   temperature    top_k    top_p    temperature first    mlx-lm
#   2              -        0.7      0 1 2                0 1
#   0.5            -        0.7      0                    0 1
#   1              2        0.6      0                    0 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

probabilities = [0.5, 0.25, 0.15, 0.1]

def temperature_first(temperature, top_k, top_p):
    """The tokens left, the most probable first."""
    powers = [each ** (1 / temperature) for each in probabilities][:top_k or None]
    before = [sum(powers[:i]) / sum(powers) for i in range(len(powers))]
    return [i for i, above in enumerate(before) if above < top_p]

found = []
for temperature, top_k, top_p in (2, 0, 0.7), (0.5, 0, 0.7), (1, 2, 0.6):
    mx.random.seed(0)
    sample = make_sampler(temp=temperature, top_p=top_p, top_k=top_k)
    drawn = sample(mx.log(mx.array([probabilities] * 4000))).tolist()
    found.append((temperature_first(temperature, top_k, top_p), sorted(set(drawn))))
    print(temperature, top_k, top_p, "temperature first:", *found[-1][0], " mlx-lm:", *found[-1][1])
sys.exit(found != [([0, 1, 2], [0, 1]), ([0], [0, 1]), ([0], [0, 1])])
PY
