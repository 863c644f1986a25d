#!/usr/bin/env bash
# transformers 5.24.0: a LLaMA config.json without eos_token_id has the end id 2; only a null has none.
#
# Good guess: no end id is no end id, whether the key is missing or null; a base model then goes on to the length.
# What it does: a missing key gets LLaMA 2's value, 2 (and bos_token_id 1), at which generate ends a text if there is no
# generation_config.json. In LLaMA 3's vocabulary id 2 is "#". "model_type": "llama" alone decides, not vocab_size or tokenizer.
#   eos_token_id in config.json    generate's end ids
#   missing                        2
#   null                           none
#   [128001, 128009]               [128001, 128009]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
from transformers import AutoConfig, GenerationConfig

def read(**ids):
    with open(os.path.join(sys.argv[1], "config.json"), "w") as file:
        json.dump({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, **ids}, file)
    config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(sys.argv[1]))
    print(ids, "-> end", config.eos_token_id, "begin", config.bos_token_id)
    return config.eos_token_id

found = [read(), read(eos_token_id=None), read(eos_token_id=[128001, 128009])]
sys.exit(found != [2, None, [128001, 128009]])
PY
