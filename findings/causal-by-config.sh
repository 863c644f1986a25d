#!/usr/bin/env bash
# transformers 5.24.0: "is_causal": false in a LLaMA config.json makes every token attend to the later ones too.
#
# Good guess: a LlamaForCausalLM is causal; is_causal is an argument of torch's attention and an attribute of modules, and as a key of
# config.json it is one of those that a LLaMA model has no use for, kept and not read.
# What it does: the function that makes the mask looks for is_causal in any model's config, and where it is false, the mask is that of an
# encoder. No field of the LLaMA configuration is called so, and nothing is said. It is there to make encoders of decoders; read by a
# program that does not look at the key, each number of such a model is another. generate still works: the tokens of the prompt see each
# other, the new ones are seen by none before them.
# The key is not in what LlamaConfig writes by default. Logits of a prompt against those of the same weights without the key:
#   "is_causal": true, or null     equal
#   "is_causal": false             others, in every row, and the first row depends on the last token
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, initializer_range=0.3)).save_pretrained(sys.argv[1])
path = os.path.join(sys.argv[1], "config.json")
with open(path) as file:
    plain = json.load(file)
prompt, other = torch.arange(10)[None], torch.tensor([[*range(9), 40]])     # other: the last token is not the same

def logits(config):
    with open(path, "w") as file:
        json.dump(config, file)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    with torch.no_grad():
        return model(prompt).logits[0], model(other).logits[0]

usual, _ = logits(plain)
wrong = "is_causal" in plain
for value in (True, False, None):
    rows, with_other = logits({**plain, "is_causal": value})
    equal = [torch.allclose(*pair, atol=1e-4) for pair in zip(rows, usual)]
    first_depends = not torch.allclose(rows[0], with_other[0], atol=1e-4)
    print("is_causal", json.dumps(value), "- rows as usual:", sum(equal), "of 10, the first row depends on the last token:", first_depends)
    wrong |= (sum(equal), first_depends) != ((10, False) if value is not False else (0, True))
sys.exit(wrong)
PY
