#!/usr/bin/env bash
# transformers 5.24.0 with hqq 0.2.8.post1: a quantised KV cache is quantised again and again,
# and with hqq old keys fade.
#
# Good guess: a key is quantised once, when it leaves the window of recent tokens, and then stays as it is: a quantised
# cache costs one rounding, at any length.
# What it does: whenever the window (residual_length, 128 by default) is full, the whole cache is dequantised, joined
# with the window and quantised anew. quanto's codes come back as they were. hqq searches for a zero point each time,
# and the codes move with it: the older a key, the farther it is from what it was,
# after 16 windows more than three times as far.
# Root mean square error of the first 16 keys (normal ones, 4 bits, axis and group as by default, windows of 4 tokens):
#   windows filled    1        2        6        16
#   quanto            0.094    0.094    0.094    0.094
#   hqq               0.093    0.123    0.203    0.326
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 hqq==0.2.8.post1 \
    optimum-quanto==0.2.7
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers import LlamaConfig
from transformers.cache_utils import QuantizedCache

torch.manual_seed(0)
keys = torch.randn(1, 2, 80, 64)
config = LlamaConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)

def errors(backend):
    """The error of the first 16 keys after each token."""
    cache = QuantizedCache(backend, config, nbits=4, residual_length=4)
    cache.update(keys[:, :, :16], keys[:, :, :16], 0)
    found = {}
    for i in range(16, 80):
        back, _ = cache.update(keys[:, :, i:i + 1], keys[:, :, i:i + 1], 0)
        found[i] = (back[:, :, :16] - keys[:, :, :16]).square().mean().sqrt().item()
    return [round(found[i], 3) for i in (16, 20, 36, 76)]

quanto, hqq = errors("quanto"), errors("hqq")
print("quanto", quanto)
print("hqq", hqq)
steady = max(quanto) < 1.02 * quanto[0] and quanto[0] < 0.1
sys.exit(not (steady and hqq[0] < 0.1 and 1.2 * hqq[0] < hqq[1] and 3 * hqq[0] < hqq[3]))
PY
