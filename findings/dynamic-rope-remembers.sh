#!/usr/bin/env bash
# transformers 5.24.0: a model of dynamic RoPE answers by what it was asked before,
# and with a KV cache otherwise than without.
#
# Good guess: forward() of the same ids gives the same logits, whatever ran before: the frequencies follow from the
# length at hand. Greedy generation gives the same tokens with use_cache=True and False, rounding aside.
# What it does: past the trained length the frequencies are those of the longest sequence that the model has seen, until
# one comes that is shorter than the trained length. A key in the cache stays rotated as at its time;
# without a cache all are rotated anew.
# Trained for 64 tokens, factor 4, float32, one after the other:
#   100 tokens                       logits A
#   200 tokens, then the same 100    other logits, by up to 11
#   10 tokens, then the same 100     logits A again, to the bit
#   greedy from 50 tokens to 100     the same ids with and without a cache up to the 67th, then others
# scripts/convert.py refuses this rope_type.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
ids = torch.arange(200)[None] * 7 % 64

@torch.no_grad()
def logits(n):
    return model(ids[:, :n]).logits

def greedy(cache):
    prompt = ids[:, :50]
    logits(10)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False, use_cache=cache)[0]

first = logits(100)
again = logits(100)
logits(200)
after_long = logits(100)
logits(10)
after_short = logits(100)
off = (after_long - first).abs().max().item()
same = (greedy(True) == greedy(False)).long().cumprod(0).sum().item()
print("again", torch.equal(first, again), "after 200 tokens off by %.2f" % off, "after 10", torch.equal(first, after_short))
print("with and without a cache: the first %d of 100 ids are the same" % same)
sys.exit(not (torch.equal(first, again) and off > 1 and torch.equal(first, after_short) and 64 <= same < 100))
PY
