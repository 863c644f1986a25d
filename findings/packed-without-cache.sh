#!/usr/bin/env bash
# transformers 5.24.0: texts packed into one row attend to each other, unless use_cache=False.
#
# Good guess: where position_ids begin again at 0, as DataCollatorWithFlattening writes them, a text is kept apart from those before it, or
# it never is; use_cache only says whether keys and values are handed back, and does not change logits.
# What it does: with "eager" and "sdpa" the places where positions begin again are looked for only if there is no KV cache. use_cache is True
# by default, also while a model trains, so that a cache is made, and each text attends to all before it. Trainer sets use_cache to
# False; a loop of one's own, or an evaluation, on the same batch has another loss. An attention_mask of ones joins the texts as well.
#   a text packed after another, its logits beside those of the text alone
#   position_ids                                         another's (differences above 1)
#   position_ids, use_cache=False                        its own
#   position_ids, use_cache=False, a mask of ones        another's
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

texts = [list(range(8)), list(range(20, 28))]
batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": each} for each in texts])
ids, positions = batch["input_ids"], batch["position_ids"]
if positions.tolist() != [[*range(8), *range(8)]] or "attention_mask" in batch:
    sys.exit(1)
found = []
for attention in "eager", "sdpa":
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, initializer_range=0.3, attn_implementation=attention))
    for training in False, True:
        model.train(training)
        with torch.no_grad():
            alone = model(torch.tensor(texts[1:])).logits
            for given in {}, {"use_cache": False}, {"use_cache": False, "attention_mask": torch.ones_like(ids)}:
                packed = model(ids, position_ids=positions, **given).logits[:, len(texts[0]):]
                found.append((packed - alone).abs().max().item())
                print(attention, "train" if training else "eval", *given, "- largest difference %.5f" % found[-1])
sys.exit([each > 1 for each in found] != [True, False, True] * 4 or max(found[1::3]) > 1e-3)
PY
