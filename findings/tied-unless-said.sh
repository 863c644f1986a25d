#!/usr/bin/env bash
# mlx-lm 0.32.2: without "tie_word_embeddings" in config.json a LLaMA model's lm_head.weight is thrown away.
#
# Good guess: the key that is missing means false, as in transformers' LlamaConfig; at least a file that has an output table has
# it for a reason, and a tensor that is not used is an error, as mlx-lm says of every other.
# What it does: the key that is missing means true. lm_head.weight is taken out of the weights before they are checked, and the
# logits are made with the embeddings. Nothing is said.
#   tie_word_embeddings    LlamaConfig    logits of mlx-lm made with
#   false                  false          lm_head.weight
#   true                   true           the embeddings
#   not there              false          the embeddings
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, pathlib, sys
import mlx.core as mx
from mlx_lm.utils import load_model
from transformers import LlamaConfig

directory = pathlib.Path(sys.argv[1])
config = {"model_type": "llama", "vocab_size": 4, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
ones = mx.ones((4, 32))
weights = {"model.embed_tokens": ones, "model.norm": ones[0], "lm_head": 2 * ones}
for name in "input_layernorm", "post_attention_layernorm":
    weights["model.layers.0." + name] = ones[0]
for name in *("self_attn.%s_proj" % each for each in "qkvo"), *("mlp.%s_proj" % each for each in ("gate", "up", "down")):
    weights["model.layers.0." + name] = mx.zeros((32, 32))  # so that the layer adds nothing
mx.save_safetensors(str(directory / "model.safetensors"), {name + ".weight": tensor for name, tensor in weights.items()})
found = []
for keys in {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {}:
    (directory / "config.json").write_text(json.dumps(config | keys))
    model, _ = load_model(directory)
    logit = model(mx.array([[0]]))[0, 0, 0].item()
    found.append((LlamaConfig.from_pretrained(directory).tie_word_embeddings, {32: "embeddings", 64: "lm_head"}[round(logit)]))
    print(keys, "LlamaConfig: %s, mlx-lm's logits: by %s" % found[-1])
sys.exit(found != [(False, "lm_head"), (True, "embeddings"), (False, "embeddings")])
PY
