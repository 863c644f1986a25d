#!/usr/bin/env bash
# transformers 5.24.0: bad_words_ids does not ban the end token: it is taken off the list, without a word.
#
# Good guess: what is in bad_words_ids is never written, whichever token it is; with the end token in it an answer goes on to the length
# asked for, as a benchmark of fixed length needs it.
# What it does: an entry that is one end token is dropped before the others are looked at. suppress_tokens and sequence_bias ban it. An
# entry of several ids that ends with it is not dropped, and bans the end token after the others.
# New tokens of 8 asked for, from a model that would write its end token at once, after the prompt 1 2 3:
#   nothing banned                      1
#   bad_words_ids=[[end]]               1
#   bad_words_ids=[[3, end]]            more than 1
#   suppress_tokens=[end]               8
#   sequence_bias of -infinity          8
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
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, bos_token_id=None, eos_token_id=None)).eval()
prompt = torch.tensor([[1, 2, 3]])
with torch.no_grad():
    end = int(model(prompt).logits[0, -1].argmax())
found = []
for banned in ({}, {"bad_words_ids": [[end]]}, {"bad_words_ids": [[3, end]]}, {"suppress_tokens": [end]},
               {"sequence_bias": {(end,): float("-inf")}}):
    written = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=end, **banned)[0, 3:].tolist()
    found.append(len(written))
    print("end token", end, banned, "->", *written)
sys.exit(found[:2] != [1, 1] or found[2] == 1 or found[3:] != [8, 8])
PY
