#!/usr/bin/env bash
# transformers 5.24.0 and mlx-lm 0.32.2: in a chat repetition_penalty is a penalty on ending the answer.
#
# Good guess: a repetition penalty is about the text: it keeps special tokens out, or looks at what was generated.
# What they do: every id of the prompt counts, special ones too. A chat prompt has the token that ends an answer, <|eot_id|> in LLaMA 3,
# after each message, so that from the first token on it is penalised like a word said before, while the words that would go on are not:
# answers become longer than the model would have them, the more so the higher the penalty, and of a raw prompt, which has no such token,
# they do not. mlx-lm looks at the newest 20 tokens, in which a LLaMA 3 prompt, four tokens of header after the last <|eot_id|>, has it.
# A model that gives the end token 2.2, another token 2.1, whatever comes before; greedy, at most 4 tokens, end token in the prompt:
#                        no, penalty 1.1    yes, no penalty    yes, penalty 1.1
#   transformers         end                end                other, end
#   mlx-lm               end                end                other, end
# (After one of the others it is penalised as well, and the end token is first again.)
# The program's --repetition-penalty is transformers', and does so too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import mlx.core
import torch
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_logits_processors
from transformers import LlamaConfig, LlamaForCausalLM

END, OTHER = 9, 5
sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
rows = torch.zeros(20, 16)
rows[END], rows[OTHER] = 2.2 / 16, 2.1 / 16
model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).eval()
for name, weight in model.named_parameters():
    weight.data = rows if name == "lm_head.weight" else torch.full_like(weight, "embed" in name or "norm" in name)
other = llama.Model(llama.ModelArgs(model_type="llama", tie_word_embeddings=False, rope_theta=10000.0, **sizes))
other.load_weights([(name, mlx.core.array(weight.detach().numpy())) for name, weight in model.named_parameters()])

def by_transformers(prompt, penalty):
    return model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=END, pad_token_id=END,
                          repetition_penalty=penalty)[0, len(prompt):].tolist()

def by_mlx(prompt, penalty):
    ids = []
    for token, _ in generate_step(mlx.core.array(prompt), other, max_tokens=4,
                                  logits_processors=make_logits_processors(repetition_penalty=penalty)):
        ids.append(int(token))
        if ids[-1] == END:
            break
    return ids

wrong = False
for prompt, penalty, expected in ([1, 2, 3], 1.1, [END]), ([1, END, 2, 3], 1.0, [END]), ([1, END, 2, 3], 1.1, [OTHER, END]):
    found = by_transformers(prompt, penalty), by_mlx(prompt, penalty)
    print("prompt", prompt, "penalty", penalty, "transformers", found[0], "mlx-lm", found[1])
    wrong |= found != (expected, expected)
sys.exit(wrong)
PY
