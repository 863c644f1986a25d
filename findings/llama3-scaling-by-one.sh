#!/usr/bin/env bash
# ctranslate2 4.8.5: a converted LLaMA 3.1 model has type, low and high factor of its RoPE scaling, but not the factor: nothing is scaled.
#
# Good guess: a converter that knows the type "llama3", and refuses those it does not know, converts LLaMA 3.1, 3.2 and 3.3 to models with
# the logits of transformers.
# What it does: rope_type and the two frequency factors are written into the model, the factor (8 or 32) only for the type "linear". The
# model is then that of RoPE without scaling, to the last digits, whatever the length of the text, and nothing is said. The difference
# grows with the place: the first tokens are nearly right, and a short answer looks like one.
# A model of head size 64; logits (float32, on the CPU) of 400 tokens, the largest difference to transformers':
#   rope_type "default"                                              0.000
#   "linear", factor 4                                               0.000
#   "llama3", as in LLaMA 3.1: to transformers with the scaling      more than 1
#             to transformers without it                             0.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check ctranslate2==4.8.5 transformers==5.24.0 torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import os, sys
import ctranslate2
import numpy
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocabulary = [*(chr(0x100 + i) for i in range(256)), "<begin>", "<end>", "<unknown>"]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(vocabulary)}, merges=[])),
                                    bos_token="<begin>", eos_token="<end>", unk_token="<unknown>")
plain = {"rope_type": "default", "rope_theta": 500000.0}
linear = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
ids = torch.arange(400) * 7 % 256

def model_of(rope):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072, rope_parameters=rope, initializer_range=0.15)).eval()

def by_transformers(rope):
    with torch.no_grad():
        return model_of(rope)(ids[None]).logits[0].numpy()

def by_ctranslate2(rope):
    source, target = (os.path.join(sys.argv[1], rope["rope_type"] + end) for end in ("", ".converted"))
    model_of(rope).save_pretrained(source)
    tokenizer.save_pretrained(source)
    ctranslate2.converters.TransformersConverter(source).convert(target)
    generator = ctranslate2.Generator(target, device="cpu", compute_type="float32")
    return numpy.array(generator.forward_batch([[vocabulary[each] for each in ids]]))[0]

converted = by_ctranslate2(llama3)
found = {"default": (by_ctranslate2(plain), by_transformers(plain)), "linear": (by_ctranslate2(linear), by_transformers(linear)),
         "llama3, with the scaling": (converted, by_transformers(llama3)), "llama3, without": (converted, by_transformers(plain))}
found = {name: numpy.abs(ours - theirs).max(-1) for name, (ours, theirs) in found.items()}
for name, differences in found.items():
    print("%-26s" % name, "token 0: %.4f, 10: %.4f, 399: %.4f, the largest: %.4f" % (*differences[[0, 10, 399]], differences.max()))
sys.exit([differences.max() > 1 for differences in found.values()] != [False, False, True, False]
         or any(1e-2 < differences.max() < 1 for differences in found.values()))
PY
