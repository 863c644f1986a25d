#!/usr/bin/env bash
# mlx-lm 0.32.2: of a bfloat16 model the log-probabilities are rounded at their largest, and greedy decoding chooses by what is left.
#
# Good guess: temperature 0 is the argmax of the logits, and the log-probability given with a token is right to the 8 bits of bfloat16 or
# better, as each logit is.
# What it does: log-probabilities are the logits minus their logsumexp, all of it in the type of the logits, and the sampler, also the
# greedy one, sees only those. The logsumexp is rounded where it is large, so that what is small by nature is as coarse as that: from 16
# on, steps of an eighth. A token of probability 0.94 is given as certain, and what the probabilities add up to may be 1.06. Where a
# logit is smaller than its log-probability, logits that differ become one number, and the lower id wins. In float32 all is well, and
# transformers, which makes a float32 of the logits first, agrees with that.
# A vocabulary of 128256; the logits of ids 7 and 9, the others; what is chosen, with its probability (exp of the log-probability):
#                               bfloat16        float32
#   0.5, 0.504; all others 0    7               9
#   10, 20; all others 5.4      9, 1.000        9, 0.942
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import math, sys
import mlx.core as mx
from mlx_lm.generate import generate_step

class Model:
    layers = []

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, tokens, cache=None):
        return mx.broadcast_to(self.logits, (*tokens.shape, self.logits.size))

wrong = False
for seven, nine, others, expected in (0.5, 0.50390625, 0.0, (7, 9)), (10.0, 20.0, 5.40625, (9, 9)):
    logits = mx.full((128256,), others)
    logits[7], logits[9] = seven, nine
    found = []
    for dtype in mx.bfloat16, mx.float32:
        kept = logits.astype(dtype)
        assert mx.array_equal(kept.astype(mx.float32), logits)          # the logits themselves are exact in both
        token, logprobs = next(generate_step(mx.array([1, 2]), Model(kept), max_tokens=1, prompt_cache=[]))
        found.append((int(token), math.exp(logprobs[int(token)].item())))
        print("logits %g %g, others %g, %s: chosen %d, probability %.6f" % (seven, nine, others, dtype, *found[-1]))
    wrong |= tuple(token for token, _ in found) != expected
wrong |= found[0][1] != 1 or abs(found[1][1] - 0.942) > 0.001
sys.exit(wrong)
PY
