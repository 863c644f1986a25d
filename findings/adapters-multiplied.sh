#!/usr/bin/env bash
# peft 0.21.2: with combination_type="linear", half of an adapter and half of the same adapter are twice the adapter.
#
# Good guess: add_weighted_adapter(["a", "b"], [0.5, 0.5], ..., combination_type="linear") gives an adapter whose change of the weights is
# half of a's and half of b's; "linear" is what the word says, exact, and the other types ("svd", "ties") are the approximate ones.
# What it does: a change is a product B A. "linear" adds the factors, each with the root of its weight, and not the products: the new change
# is (wB1 + vB2)(wA1 + vA2), with two products of an A of one adapter and a B of the other, that neither has learned. With the same adapter
# twice these are the change once more. With a weight below 0 they are there as well. One adapter with a weight is right. "cat", whose rank is
# the sum of the ranks, is exact.
# The change of the weights beside that asked for, two random adapters a and b:
#                           "linear"                     "cat"
#   [a, a], [0.5, 0.5]      twice as large               the same
#   [a, b], [0.5, 0.5]      off by about its own size    the same
#   [a, b], [1, -1]         off by about its own size    the same
#   [a], [2]                the same                     the same
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.24.0 torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), lora, adapter_name="a")
model.add_adapter("b", lora)
layer = model.base_model.model[0]
change = {name: layer.get_delta_weight(name) for name in "ab"}
found = []
for names, weights in ("aa", [0.5, 0.5]), ("ab", [0.5, 0.5]), ("ab", [1.0, -1.0]), ("a", [2.0]):
    asked = sum(weight * change[name] for name, weight in zip(names, weights))
    for kind in "linear", "cat":
        new = "%s%d" % (kind, len(found))
        model.add_weighted_adapter(list(names), weights, new, combination_type=kind)
        got = layer.get_delta_weight(new)
        size, off = (got.norm() / asked.norm()).item(), ((got - asked).norm() / asked.norm()).item()
        print(*names, *weights, kind, "- size %.3f of that asked for, difference %.3f of it" % (size, off))
        found.append(off)
        if kind == "linear" and names == "aa" and abs(size - 2) > 1e-3:
            sys.exit(1)
linear, cat = found[::2], found[1::2]
sys.exit(max(cat) > 1e-5 or linear[3] > 1e-5 or abs(linear[0] - 1) > 1e-3 or min(linear[1:3]) < 0.9)
PY
