#!/usr/bin/env bash
# ctranslate2 4.8.5: a converted Gemma 2 model has no soft-capping, no sliding window and another scale of attention.
#
# Good guess: a converter that has a loader for Gemma 2, and maps its four norms of a layer, gives a model with the logits of transformers.
# What it does: attn_logit_softcapping, final_logit_softcapping, sliding_window and query_pre_attn_scalar of config.json are not read.
# Each layer attends to the whole text, scores are divided by the root of head_dim, and logits beyond 30, which the model cannot
# have, are given; nothing is said. Gemma 2 2B and 9B have 256 for both scales, 27B has 144 and 128: there all scores are wrong from the
# first layer on. Likewise hidden_act of a LLaMA config.json: whatever it is, the converted model has SiLU.
# A model of 2 layers, head size 64; logits (float32, on the CPU) of 60 tokens, the largest difference to transformers':
#   Gemma 2 with both caps None, a window longer than the text and query_pre_attn_scalar 64    0.000
#   with final_logit_softcapping 30                                                            more than 1
#   with attn_logit_softcapping 50                                                             more than 1
#   with sliding_window 16                                                                     more than 1
#   with query_pre_attn_scalar 256                                                             more than 1
#   LLaMA with hidden_act silu                                                                 0.000
#   with hidden_act gelu                                                                       more than 1
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
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocabulary = [*(chr(0x100 + i) for i in range(256)), "<begin>", "<end>", "<unknown>"]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(vocabulary)}, merges=[])),
                                    bos_token="<begin>", eos_token="<end>", unk_token="<unknown>")
ids = torch.arange(60) * 7 % 256

def difference(number, of_model, of_config, **settings):
    source = os.path.join(sys.argv[1], str(number))
    torch.manual_seed(0)
    model = of_model(of_config(vocab_size=len(vocabulary), hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=2, initializer_range=0.15, **settings)).eval()
    for each in model.parameters():
        if each.ndim == 1:
            torch.nn.init.normal_(each, 0.5, 0.3)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    ctranslate2.converters.TransformersConverter(source).convert(source + ".converted")
    generator = ctranslate2.Generator(source + ".converted", device="cpu", compute_type="float32")
    with torch.no_grad():
        theirs = model(ids[None]).logits[0].numpy()
    return float(numpy.abs(numpy.array(generator.forward_batch([[vocabulary[each] for each in ids]]))[0] - theirs).max())

bare = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 1000, "attn_logit_softcapping": None, "final_logit_softcapping": None}
found = []
for setting in {}, {"final_logit_softcapping": 30.0}, {"attn_logit_softcapping": 50.0}, {"sliding_window": 16}, {"query_pre_attn_scalar": 256}:
    found.append(difference(len(found), Gemma2ForCausalLM, Gemma2Config, **{**bare, **setting}))
    print("Gemma 2", *setting.items(), "- largest difference %.4f" % found[-1])
for act in "silu", "gelu":
    found.append(difference(len(found), LlamaForCausalLM, LlamaConfig, hidden_act=act))
    print("LLaMA", act, "- largest difference %.4f" % found[-1])
sys.exit([each > 1 for each in found] != [False, True, True, True, True, False, True] or found[0] > 1e-2 or found[5] > 1e-2)
PY
