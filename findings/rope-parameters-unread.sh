#!/usr/bin/env bash
# mlx-lm 0.32.2: of a config.json as transformers 5 writes it, a LLaMA 3.1 model gets RoPE's base 10000 and no scaling.
#
# Good guess: mlx-lm, which needs transformers 5, finds the base and the scaling where transformers 5 puts them, in
# "rope_parameters"; or refuses a configuration without "rope_theta".
# What it does: for "llama" it knows only the older keys "rope_theta" and "rope_scaling". Without them the base is
# 10000, RoPE is plain, and nothing is said. A LLaMA 3.1 model that transformers 5 has saved is another model for
# mlx-lm.
#   keys of config.json            RoPE of the layers    logits
#   rope_theta, rope_scaling       LLaMA 3's             right
#   rope_parameters                plain, base 10000     others
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, pathlib, sys
import mlx.core as mx
import mlx.nn
from mlx_lm.models.rope_utils import Llama3RoPE
from mlx_lm.utils import load_model
from transformers import LlamaConfig

scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     max_position_embeddings=131072, rope_parameters=scaling | {"rope_theta": 500000.0})
models = []
for keys in "older", "newer":
    directory = pathlib.Path(sys.argv[1], keys)
    config.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    assert "rope_theta" not in written and written["rope_parameters"]["rope_theta"] == 500000
    if keys == "older":
        del written["rope_parameters"]
        written |= {"rope_theta": 500000.0, "rope_scaling": scaling}
        (directory / "config.json").write_text(json.dumps(written))
    weights = {}
    for name, shape in [("embed_tokens", (64, 32)), ("norm", (32,)), ("layers.0.input_layernorm", (32,)),
                        ("layers.0.post_attention_layernorm", (32,)),
                        *(("layers.0.self_attn.%s_proj" % x, (32, 32)) for x in "qkvo"),
                        *(("layers.0.mlp.%s_proj" % x, (64, 32)) for x in ("gate", "up")), ("layers.0.mlp.down_proj", (32, 64))]:
        weights["model.%s.weight" % name] = mx.random.normal(shape, key=mx.random.key(len(weights)))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "pt"})
    model, _ = load_model(directory)
    rope = model.layers[0].self_attn.rope
    print(keys, "keys:", type(rope).__name__, getattr(rope, "base", ""))
    models.append((rope, model(mx.arange(64)[None])))
(older, right), (newer, wrong) = models
difference = mx.abs(right - wrong).max().item()
print("logits differ by up to %.2f" % difference)
sys.exit(not (type(older) is Llama3RoPE and type(newer) is mlx.nn.RoPE and newer.base == 10000 and difference > 1))
PY
