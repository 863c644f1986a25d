#!/usr/bin/env bash
# transformers 5.24.0: a GenerationConfig of one's own does not replace the model's: what it leaves open is taken from there.
#
# Good guess: generate(generation_config=GenerationConfig(do_sample=False, ...)) is greedy decoding as that object says, and what
# generation_config.json says is out of the game, so that this is the way to compare greedy tokens with another program's.
# What it does: each field that the object leaves at None is filled from the model's own configuration, among them repetition_penalty,
# suppress_tokens and no_repeat_ngram_size, which change greedy tokens; only an explicit value, such as repetition_penalty=1.0, is kept.
# Where generation_config.json has a repetition penalty, the tokens are those of no argmax.
# Greedy tokens of a model whose own configuration has repetition_penalty 5 and suppresses one token, as they are for:
#   nothing of one's own                                                   the model's
#   GenerationConfig(do_sample=False, max_new_tokens=8)                    the model's
#   the same, with repetition_penalty=1.0 and suppress_tokens=[]           the plain argmax
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None)).eval()
prompt = torch.arange(10)[None]
greedy = {"do_sample": False, "max_new_tokens": 8}

def written(**settings):
    return model.generate(prompt, **settings)[0, 10:].tolist()

argmax = written(**greedy)
model.generation_config.repetition_penalty = 5.0
model.generation_config.suppress_tokens = [argmax[0]]
found = [written(**greedy), written(generation_config=GenerationConfig(**greedy)),
         written(generation_config=GenerationConfig(**greedy, repetition_penalty=1.0)),
         written(generation_config=GenerationConfig(**greedy, repetition_penalty=1.0, suppress_tokens=[]))]
for name, ids in zip(("argmax", "nothing", "own", "own, penalty 1", "own, penalty 1, nothing suppressed"), [argmax, *found]):
    print("%-36s" % name, *ids)
sys.exit(found[0] == argmax or argmax[0] in found[0] or found[1] != found[0] or argmax[0] in found[2] or found[3] != argmax)
PY
