#!/usr/bin/env bash
# mlx 0.32.4 on the CPU: the probabilities of a softmax in bfloat16 or float16 add up to more than 1,
# over a vocabulary to 501.
#
# Good guess: sums are made in float32 and rounded once, as mean's are; or, as the documentation of "precise" has it,
# long rows lose some precision without it: the last bits.
# What it does: without precise=True it adds exponentials one by one in the row's own type, and the sum stays where it
# is once the next one is at most half a step: of ones at 256 or 2048. What it divides by is too small,
# so all probabilities are too large.
# Their order stays, so that greedy answers look right. logsumexp does not have this, nor has
# fast.scaled_dot_product_attention; an attention or a sampler written with softmax has, and cumsum has it too.
# Sum, in float32, of the softmax of N zeros:
#   N         float32    float16    bfloat16    bfloat16, precise=True
#   256       1          1          1           1
#   4096      1          2          16          1
#   128256    1          62.62      501         1
# Of 128256 normal logits of standard deviation 2 it is 4.3 in bfloat16, 2.0 in float16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4'
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import mlx.core as mx

def total(n, kind, precise=False):
    return round(mx.softmax(mx.zeros((n,), dtype=kind), precise=precise).astype(mx.float32).sum().item(), 2)

found = []
for n in 256, 4096, 128256:
    found.append([*(total(n, kind) for kind in (mx.float32, mx.float16, mx.bfloat16)), total(n, mx.bfloat16, True)])
    print(n, "float32 %g float16 %g bfloat16 %g precise %g" % tuple(found[-1]))
logits = 2 * mx.random.normal((128256,), key=mx.random.key(0))
normal = [mx.softmax(logits.astype(kind)).astype(mx.float32).sum().item() for kind in (mx.bfloat16, mx.float16)]
print("normal logits: bfloat16 %.2f float16 %.2f" % tuple(normal))
ones = mx.ones((4096, 64), dtype=mx.bfloat16)[None, None]
attended = mx.fast.scaled_dot_product_attention(ones[:, :, :1], 0 * ones, ones, scale=1)[0, 0, 0, 0].item()
print("attention over 4096 equal values:", attended)
sys.exit(found != [[1, 1, 1, 1], [1, 2, 16, 1], [1, 62.62, 501, 1]] or attended != 1
         or not (normal[0] > 4 and normal[1] > 2))
PY
