#!/usr/bin/env bash
# compressed-tensors 0.20.1: with transformers 5.24.0 a kv_cache_scheme is dropped without a word.
#
# Good guess: a QuantizationConfig with a kv_cache_scheme gives each attention module a k_scale and a v_scale,
# and config.json says so.
# What it does: modules with a cache are recognised by a parameter of their forward, past_key_value or past_key_values.
# transformers 5.24 calls it `cache`, so there are none: the weights are quantised, keys and values are not,
# and the scheme that is saved is null.
#   transformers   scales in layer 0's attention            kv_cache_scheme that is saved
#   5.17.0         k_scale, v_scale and the weights'        FP8
#   5.24.0         the weights' alone                       null
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
found=
for release in 5.17.0 5.24.0; do
    "$work/venv/bin/pip" install -q --disable-pip-version-check compressed-tensors==0.20.1 torch==2.11.0 "transformers==$release"
    found+=$("$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
apply_quantization_config(model, QuantizationConfig(
    config_groups={"group_0": {"targets": ["Linear"], "weights": fp8}}, kv_cache_scheme=fp8, ignore=["lm_head"]))
saved = ModelCompressor.from_pretrained_model(model).quantization_config.kv_cache_scheme
print(transformers.__version__, *sorted({name.split(".")[-1] for name in model.state_dict() if "scale" in name}),
      saved and "%s of %d" % (saved.type, saved.num_bits))
PY
)$'\n'
done
echo -n "$found"
[ "$found" = "5.17.0 k_scale v_scale weight_scale float of 8
5.24.0 weight_scale None
" ]
