#!/usr/bin/env bash
# transformers 5.24.0: with pad_token_id=0 and a LLaMA 3 vocabulary, generate() does not see the prompt's exclamation marks.
#
# Good guess: pad_token_id is for batches: what fills a finished row. In a prompt padding stands at an end, and what is between other tokens
# is text; or without an attention_mask all ids count.
# What it does: if no attention_mask is given and the prompt has the pad id anywhere, every such token is masked out, in the middle too, and
# does not count as a position, unless the pad id is an end id as well. LLaMA 3 has no padding of its own, and id 0, which is at hand to be
# named instead, is "!": "Stop! Wait!" is then answered as "Stop Wait". Nothing is said. The attention_mask that a tokenizer gives, if it
# is passed on, is all ones, and right.
# Logits after a prompt of seven ids, the third and the sixth 0:
#   pad_token_id    attention_mask    logits
#   -               -                 A
#   0               -                 those of the five other ids alone
#   0               ones              A
#   0, an end id    -                 A
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
prompt = torch.tensor([[1, 2, 0, 3, 4, 0, 5]])

def logits_after(prompt, **settings):
    return model.generate(prompt, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings).logits[0]

without = logits_after(prompt[prompt != 0][None])
found = []
for settings in {}, {"pad_token_id": 0}, {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}, {"pad_token_id": 0, "eos_token_id": 0}:
    found.append(logits_after(prompt, **settings))
    print({name: value if isinstance(value, int) else value.tolist() for name, value in settings.items()},
          "differs from the prompt without its zeros by up to %.1g" % (found[-1] - without).abs().max())
plain, padded, ones, ended = found
sys.exit(torch.allclose(plain, without, atol=1e-3) or not all(torch.allclose(*pair, atol=1e-5) for pair in
                                                              ((padded, without), (plain, ones), (plain, ended))))
PY
