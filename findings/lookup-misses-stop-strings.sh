#!/usr/bin/env bash
# transformers 5.24.0: with prompt_lookup_num_tokens, stop_strings are looked for only where a step ends; with
# assistant_model they are refused.
#
# Good guess: a speculating generate() takes what a plain one takes, and in greedy decoding stops at the same token, for
# stop_strings as for eos_token_id.
# What it does: a step that accepts several tokens is cut at an end token and at max_length, but stop strings are asked
# about once for all of them, and a string counts only where the last token is part of it: one that ends earlier in the
# step is passed over.
# Of a model that counts 0 1 2 ... 9 0 1 ..., its prompt twice that, stop string "3", at most 40 tokens:
#   plain                            4 tokens, 0123
#   end token "3", lookup of 10      4 tokens, 0123
#   stop string "3", lookup of 10    40 tokens; the string is in the text 4 times
#   stop string "3", assistant       ValueError: no tokenizer, though it was given: the assistant is not handed it
# The program asks after each token that it accepts.
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
prompt = torch.arange(20)[None] % 10

def text(**options):
    try:
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, **options)
    except ValueError as error:
        return "ValueError" if "could not locate a tokenizer" in str(error) else str(error)
    return tokenizer.decode(ids[0, 20:])

stop = {"stop_strings": ["3"], "tokenizer": tokenizer}
found = [text(**stop), text(eos_token_id=3, prompt_lookup_num_tokens=10), text(prompt_lookup_num_tokens=10, **stop),
         text(assistant_model=model, **stop)]
for each in found:
    print(len(each), each)
sys.exit(found != ["0123", "0123", "0123456789" * 4, "ValueError"])
PY
