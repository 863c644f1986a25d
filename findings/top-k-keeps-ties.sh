#!/usr/bin/env bash
# transformers 5.24.0: top_k=K can leave more than K tokens, and top_p drops the lowest ids of equals.
#
# Good guess: after TopKLogitsWarper(K) exactly K tokens are left, the lowest ids where logits are equal, as torch.topk
# and argmax would have it; TopPLogitsWarper likewise keeps the lowest ids of equals.
# What it does: top-k drops what is less than the K-th largest logit, so that all that equal it stay (in 16 bits equal
# logits are common); top-p sorts from the least likely on and drops from there, which of equals takes the lowest ids.
#   top_k=2 of logits 0 1 1 1 0      three are left: ids 1, 2 and 3
#   top_k=3 of eight equal logits    all eight are left
#   top_p=0.5 of eight equal logits  ids 4 to 7 are left
# The program's --top-k keeps equals as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

def left(warper, logits):
    return torch.isfinite(warper(None, torch.tensor([logits]))[0]).nonzero().flatten().tolist()

found = [left(TopKLogitsWarper(2), [0.0, 1.0, 1.0, 1.0, 0.0]), left(TopKLogitsWarper(3), [0.0] * 8),
         left(TopPLogitsWarper(0.5), [0.0] * 8)]
print("ids left:", found)
sys.exit(found != [[1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]])
PY
