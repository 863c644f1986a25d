#!/usr/bin/env bash
# jax 0.10.2: what random.categorical draws from bfloat16 logits is nearly the argmax, and of equal tokens the lower ids.
#
# Good guess: a token is drawn as often as the logits say, rounded as they are: the random numbers are float32, or at least enough for
# a vocabulary.
# What it does: it adds Gumbel noise of the logits' own type and takes the largest sum. In bfloat16 the noise has 128 values, from -4.47
# to 4.84, in float16 1024, from -2.27 to 6.93: a token whose logit is 9.4 below another's is never drawn, however many such tokens there
# are, and of sums that are equal, as most of the largest are in a vocabulary, the first counts. So a temperature leaves little but the
# most likely tokens. With mode="high" float16 is right and bfloat16 is not (0.71 of 32768); what helps is logits.astype(jnp.float32).
# Drawn 2000 times:
#                                                        float32    float16    bfloat16
#   equal logits: share of the lower half of 256 ids     0.50       0.55       0.76
#                                         of 4096        0.49       0.89       1
#                                         of 32768       0.51       1          1
#   one token of probability 0.5, the other half spread
#   over 32767: how often the one is drawn               0.51       1          1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import jax
import jax.numpy as jnp
import numpy

def drawn(logits, **options):
    return numpy.asarray(jax.random.categorical(jax.random.key(0), logits, shape=(2000,), **options))

one = numpy.full(32768, numpy.log(0.5 / 32767))
one[32767] = numpy.log(0.5)
found = {}
for dtype in jnp.float32, jnp.float16, jnp.bfloat16:
    lower = [float((drawn(jnp.zeros(size, dtype)) < size // 2).mean()) for size in (256, 4096, 32768)]
    often = float((drawn(jnp.array(one, dtype)) == 32767).mean())
    noise = numpy.asarray(jax.random.gumbel(jax.random.key(0), (10**6,), dtype)).astype(numpy.float32)
    high = float((drawn(jnp.zeros(32768, dtype), mode="high") < 16384).mean())
    found[dtype.__name__] = lower + [often, high]
    print(dtype.__name__, "lower half of 256, 4096, 32768:", *lower, " token of 0.5:", often, ' mode="high":', high,
          " noise: %d values, %g ... %g" % (len(numpy.unique(noise)), noise.min(), noise.max()))
    ends = len(numpy.unique(noise)), float(noise.min()), float(noise.max())
right = lambda share: abs(share - 0.5) < 0.05
half, brain = found["float16"], found["bfloat16"]
sys.exit(not all(map(right, found["float32"])) or half[2:4] != [1, 1] or not 0.8 < half[1] < 0.95 or not right(half[4])
         or not 0.7 < brain[0] < 0.8 or brain[1:4] != [1, 1, 1] or not 0.6 < brain[4] < 0.8 or ends != (128, -4.46875, 4.84375))
PY
