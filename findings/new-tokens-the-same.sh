#!/usr/bin/env bash
# transformers 5.24.0: all tokens added by resize_token_embeddings have the same embedding, though it says that they are drawn at random.
#
# Good guess, and what is logged: new rows are "initialized from a multivariate normal distribution that has old embeddings' mean and
# covariance", so that they differ from each other as old ones do.
# What it does: the covariance is multiplied by 1e-9. New rows differ from the mean of the old ones, and from each other, by some 0.00003 of
# what two old rows do; in bfloat16 most of their numbers are equal. Unless embeddings are trained, as with LoRA on the other matrices, a
# model can hardly tell <think> from </think>, and both have nearly the same logit, whatever it is asked. With mean_resizing=False the rows
# differ, but by initializer_range, and not by the old ones' size.
# Embeddings (size 256) of two new tokens, and of two old ones:
#                           distance / length of an old row    equal numbers in bfloat16
#   two old tokens          1.4                                below 0.05
#   two new tokens          below 0.0001                       above 0.5
#   mean_resizing=False     above 0.01                         below 0.05
# Logits after a text and one of the two: with the new tokens the largest difference is below 0.05, with the old ones above 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def resized(dtype, mean_resizing):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, initializer_range=0.1)).to(dtype).eval()
    model.config.initializer_range = 0.02
    model.resize_token_embeddings(1002, mean_resizing=mean_resizing)
    return model

def two(first, mean_resizing=True):
    """Distance of two tokens' rows beside an old row's length, of embeddings and of lm_head; equal numbers in bfloat16; logits."""
    model = resized(torch.float32, mean_resizing)
    tables = [each.weight.detach() for each in (model.get_input_embeddings(), model.get_output_embeddings())]
    distances = [((each[first] - each[first + 1]).norm() / each[:1000].norm(dim=1).mean()).item() for each in tables]
    rows = resized(torch.bfloat16, mean_resizing).get_input_embeddings().weight
    with torch.no_grad():
        logits = model(torch.tensor([[*range(20), first], [*range(20), first + 1]])).logits[:, -1]
    return *distances, (rows[first] == rows[first + 1]).float().mean().item(), (logits[0] - logits[1]).abs().max().item()

old, new, plain = two(500), two(1000), two(1000, False)
for name, each in ("two old tokens", old), ("two new tokens", new), ("mean_resizing=False", plain):
    print("%-20s distances %.5f and %.5f, equal in bfloat16 %.2f, logits %.5f" % (name, *each))
sys.exit(not (min(old[:2]) > 1 > 1e-4 > max(new[:2]) and min(plain[:2]) > 0.01 and max(old[2], plain[2]) < 0.05 and new[2] > 0.5
              and new[3] < 0.05 < 1 < old[3]))
PY
