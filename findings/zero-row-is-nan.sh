#!/usr/bin/env bash
# optimum-quanto 0.2.7: with FP8 weights a row of zeros becomes NaN, and greedy decoding chooses it.
#
# Good guess: zeros are kept as zeros by every kind of weights; where a row's largest weight is 0, its scale does not matter.
# What it does: each row is divided by its scale, the largest weight divided by 448: 0 / 0 is NaN, which int8 cannot hold and FP8 can. It
# comes out again for every input. lm_head is quantised like every other nn.Linear; where it is padded with rows of zeros beyond the
# vocabulary, or a token was never trained, argmax takes that one's NaN for the largest logit, at once and always.
#   nn.Linear of 6 outputs, weights of the fifth 0    its output    argmax
#   as it was                                         0             another
#   weights=qint8                                     0             another
#   weights=qfloat8                                   NaN           the fifth
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check optimum-quanto==0.2.7 torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import copy, sys
import torch
from optimum.quanto import freeze, qfloat8, qint8, quantize

torch.manual_seed(0)
layer = torch.nn.Sequential(torch.nn.Linear(128, 6, bias=False))
layer[0].weight.data[4] = 0
x = torch.randn(1, 128)
found = []
with torch.no_grad():
    for weights in None, qint8, qfloat8:
        quantised = copy.deepcopy(layer)
        if weights is not None:
            quantize(quantised, weights=weights)
            freeze(quantised)
        outputs = quantised(x)[0]
        found.append((float(outputs[4]), int(outputs.argmax())))
        print("as it was" if weights is None else weights.name, "output %g, argmax %d" % found[-1])
before, integers, floats = found
sys.exit(before[0] != 0 or before[1] == 4 or integers != before or floats[0] == floats[0] or floats[1] != 4)
PY
