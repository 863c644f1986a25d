#!/usr/bin/env bash
# lm-eval 0.4.13: of a bfloat16 model the log-likelihood of a text is summed up to a bfloat16: of -1664.4 are left -1664, in steps of 8.
#
# Good guess: log_softmax and the sum over an answer's or a text's tokens are computed in float32, so that rounding comes from the model's
# products alone, and "greedy" means that each token is the argmax of the logits.
# What it does: log_softmax is taken in the type of the logits, and so is the sum, of a whole window. Between 1024 and 2048 that is
# a step of 8, and two answers whose log-likelihoods are 16 to 32 and differ by less than an eighth may be equal, upon which the first
# counts. The argmax is taken of the rounded log-probabilities: where logits are smaller than those, several become one number, and a
# text of nothing but argmax tokens is not greedy. softmax_dtype="float32" mends all of this; neither the weights' rounding nor the
# logits' is the cause.
# A random bfloat16 model and a text of 300 bytes; of 256 texts of one byte, those whose next token, the argmax, is called greedy:
#                               log-likelihood    greedy
#   as it is                    a multiple of 8   less than 250
#   softmax_dtype="float32"     no such           256
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check lm-eval==0.4.13 datasets==4.4.1 transformers==5.24.0 accelerate==1.15.0 \
    torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate([*alphabet, "<end>"])}, merges=[]))
tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokens.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", bos_token="<end>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, max_position_embeddings=512)).to(torch.bfloat16).eval()
text = "The quick brown fox jumps over the lazy dog and says hello. " * 5
pairs = []
for token in range(256):
    with torch.no_grad():
        pairs.append((("", ""), [token], [int(model(torch.tensor([[token]])).logits[0, -1].argmax())]))
found = []
for settings in {}, {"softmax_dtype": "float32"}:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, **settings)
    [total] = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    greedy = sum(is_greedy for _, is_greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True))
    print(settings or "as it is", "- log-likelihood", total, "greedy", greedy, "of", len(pairs))
    found.append((total, greedy))
(rounded, few), (precise, many) = found
sys.exit(rounded % 8 != 0 or precise % 8 == 0 or abs(rounded - precise) > 8 or few >= 250 or many != 256)
PY
