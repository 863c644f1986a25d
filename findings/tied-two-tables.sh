#!/usr/bin/env bash
# transformers 5.24.0: tie_word_embeddings is true, the checkpoint has two tables that differ: both are used.
#
# Good guess: config.json decides: with tie_word_embeddings the embeddings are the output matrix, and a stored
# lm_head.weight is ignored or refused.
# What it does: equal tables are tied; of two that differ each is used for what its name says, with a warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 safetensors==0.8.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import os, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, tie_word_embeddings=True)

def load(name, factor):
    directory = os.path.join(sys.argv[1], name)
    LlamaForCausalLM(config).save_pretrained(directory)
    path = os.path.join(directory, "model.safetensors")
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, path, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory)
    embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
    return (embeddings.data_ptr() == head.data_ptr(), torch.equal(embeddings, tensors["model.embed_tokens.weight"]),
            torch.equal(head, tensors["lm_head.weight"]), model.config.tie_word_embeddings)

found = [load("equal", 1), load("different", 2)]
print("one storage, embeddings as stored, head as stored, config:", found)
sys.exit(found != [(True, True, True, True), (False, True, True, True)])
PY
