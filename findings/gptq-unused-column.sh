#!/usr/bin/env bash
# llm-compressor 0.14.0.1: one input that the calibration never used takes from GPTQ what it gains,
# if activations are small.
#
# Good guess: GPTQ does not depend on the unit of the activations, as its damping is 1% of the mean of the Hessian's
# diagonal. An input that was always 0 has no part in it: its weights are rounded to nearest, or become 0.
# What it does: its weights become 0, and on the diagonal it gets a 1, which counts in that mean. Where the others'
# squares are far below 1, the damping follows from that 1: of 64 inputs of about 0.003 it is ten times the others'
# diagonal, and most of what is gained over rounding to nearest is lost. Nothing is reported. Padded models, and what a
# ReLU never lets through, have such inputs.
#   squared error of the outputs, relative; int4; 64 inputs
#   activations    all used    one never used
#   as they are    0.0005      0.0006
#   / 1000         0.0005      0.0059            (rounded to nearest 0.009)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check llmcompressor==0.14.0.1 compressed-tensors==0.19.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

torch.manual_seed(0)
kind = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")
inputs = torch.randn(2000, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(2000, 64)
weights = torch.randn(1, 16, 64)
scale = weights.abs().amax(2, keepdim=True) / 7.5
nearest = (weights / scale).round().clamp(-8, 7) * scale

def error(made, x):
    return (((made - weights)[0] @ x.T).square().sum() / (weights[0] @ x.T).square().sum()).item()

found = {}
for factor in 1, 0.001:
    for unused in False, True:
        x = inputs * factor
        if unused:
            x[:, 5] = 0
        hessian = 2 * x.T @ x / len(x)
        made = quantize_weight(weights.clone(), hessian[None], scale.clone(), torch.zeros_like(scale), None, kind)[0]
        found[factor, unused] = error(made, x), error(nearest, x), made[0, :, 5].abs().max().item()
        print("activations * %g," % factor, "one input never used:" if unused else "all inputs used:",
              "GPTQ %.4f, to nearest %.4f, largest weight of input 5 %.3f" % found[factor, unused])
gained = {key: to_nearest / by_gptq for key, (by_gptq, to_nearest, _) in found.items()}
sys.exit(not (min(gained[1, False], gained[0.001, False], gained[1, True]) > 10 and gained[0.001, True] < 2
              and found[1, True][2] == 0 and found[1, False][2] > 0))
PY
