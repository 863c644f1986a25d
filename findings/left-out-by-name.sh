#!/usr/bin/env bash
# transformers 5.24.0 and compressed-tensors 0.20.1: what an entry of modules_to_not_convert or ignore leaves out of quantisation.
#
# Good guess: the two lists are one idea under two names: an entry names a module, and leaves out that module and all within it,
# whichever list it is in; an entry that names nothing is an error.
# What they do: to transformers' modules_to_not_convert an entry is the end of a name ("head" is lm_head), or the beginning of one as a
# regular expression: with the full stop that people put behind, "model.layers.1." is also layers 10 and 11. A name from the middle, as
# "self_attn" or "layers.1", leaves out nothing. In compressed-tensors' ignore an entry is one whole name, or a class, or "re:" and a
# regular expression; a layer's name is no module that has weights, and leaves out nothing. Neither says so. A checkpoint's reader that
# takes the one for the other takes codes for weights, or looks for scales that are not there.
# Of a LLaMA model of 12 layers, 85 matrices, left out:
#   entry                      transformers               compressed-tensors
#   lm_head                    lm_head                    lm_head
#   head                       lm_head                    -
#   q_proj                     q_proj of all layers       -
#   self_attn                  -                          -
#   layers.1                   -                          -
#   model.layers.1             all of layer 1             -
#   model.layers.1.            all of layers 1, 10, 11    -
#   re:.*layers[.]1[.].*       -                          all of layer 1
#   Linear                     -                          all
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check compressed-tensors==0.20.1 transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from compressed_tensors.utils import match_named_modules
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=12))
matrices = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]

def within(*layers):
    return [name for name in matrices if name.startswith(tuple("model.layers.%d." % each for each in layers))]

def ending(word):
    return [name for name in matrices if name.endswith(word)]

expected = {"lm_head": (["lm_head"], ["lm_head"]), "head": (["lm_head"], []), "q_proj": (ending("q_proj"), []), "self_attn": ([], []),
            "layers.1": ([], []), "model.layers.1": (within(1), []), "model.layers.1.": (within(1, 10, 11), []),
            "re:.*layers[.]1[.].*": ([], within(1)), "Linear": ([], matrices)}
wrong = len(matrices) != 85
for entry, left_out in expected.items():
    quantised = [name for name, _ in match_named_modules(model, ["Linear"], [entry])]
    found = [name for name in matrices if not should_convert_module(name, [entry])], [name for name in matrices if name not in quantised]
    print("%-22s" % entry, "transformers %d," % len(found[0]), "compressed-tensors %d" % len(found[1]))
    wrong |= found != left_out
sys.exit(wrong)
PY
