#!/usr/bin/env bash
# transformers 5.24.0: a stop string may begin in the prompt, so that an answer ends with its first token.
#
# Good guess: stop_strings are looked for in what is generated: the prompt's own text does not matter, and an answer
# that was stopped ends with a stop string.
# What it does: the text searched is that of all ids. A string that begins in the prompt counts as soon as the new
# tokens end it (one that lies in the prompt alone does not), and the answer, which has no stop string in it, is over.
# A model that counts 0 1 2 ... 9 0 1 ..., prompt 123, at most 12 new tokens:
#   stop string "34"      4, and the end
#   stop string "2345"    45, and the end
#   stop string "23"      4567890123, where the model writes it itself
# The program looks in the answer alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = "0123456789abcdef"       # transformers takes a token's text from behind "abcdef"
plain = Tokenizer(models.BPE({each: i for i, each in enumerate(letters)}, []))
plain.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)

# A token's residual is its unit vector, attention and MLP add nothing, the output matrix wants the token after it.
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=15))
with torch.no_grad():
    for each in model.parameters():
        if each.dim() == 2:
            each.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(16))
    for i in range(10):
        model.lm_head.weight[(i + 1) % 10, i] = 1
prompt = torch.tensor([[1, 2, 3]])

def text(stop):
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, stop_strings=[stop],
                         tokenizer=tokenizer)
    return tokenizer.decode(ids[0, 3:])

found = [text("34"), text("2345"), text("23")]
print("34, 2345, 23:", found)
sys.exit(found != ["4", "45", "4567890123"])
PY
