#!/usr/bin/env bash
# mlx-lm 0.32.2: for a LLaMA model max_kv_size has no effect: the KV cache grows with the text.
#
# Good guess: generate(..., max_kv_size=N), --max-kv-size on the command line, bounds the memory of a long text: each layer keeps N keys
# and values, those of the first four tokens and the newest, as its documentation has it.
# What it does: models that make their caches themselves are not told. LLaMA's is one of them, since it knows sliding windows, even where
# no layer has one. The answer is that of a full cache, and so is the memory; nothing is said. Qwen2, which does not, keeps N.
# Keys per layer after 50 tokens of a prompt and 4 new ones, max_kv_size=16, and whether the logits are those without it:
#   llama    54    the same
#   qwen2    16    others
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import mlx.core as mx
import numpy
from mlx_lm.generate import generate_step
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import make_prompt_cache

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "rms_norm_eps": 1e-5, "vocab_size": 100, "rope_theta": 10000.0}
prompt = mx.array(numpy.random.default_rng(0).integers(0, 100, 50))
found = []
for architecture in llama, qwen2:
    name = architecture.__name__.split(".")[-1]
    mx.random.seed(0)
    model = architecture.Model(architecture.ModelArgs(model_type=name, **sizes))
    logits = {size: numpy.array([each.tolist() for _, each in generate_step(prompt, model, max_tokens=4, max_kv_size=size)])
              for size in (None, 16)}
    cache = make_prompt_cache(model, max_kv_size=16)
    for _ in generate_step(prompt, model, max_tokens=4, prompt_cache=cache):
        pass
    same = bool(numpy.allclose(logits[None], logits[16], atol=1e-5))
    found.append((name, [min(each.offset, each.keys.shape[2]) for each in cache], same))
    print(*found[-1])
sys.exit([each[2] for each in found] != [True, False] or found[1][1] != [16, 16] or found[0][1] != [54, 54])
PY
