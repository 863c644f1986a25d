#!/usr/bin/env bash
# transformers 5.24.0: sliding_window in a LLaMA config.json shortens the KV cache, but not what attention sees.
#
# Good guess: LLaMA has no sliding window, so that a key left over in its config.json, as Mistral's has it, is ignored; or it is used, and
# each token attends to that many keys, with a cache as without.
# What it does: the mask is LLaMA's, causal over all tokens, and a prompt has the logits that it has without the key. But the cache is
# made from the configuration, and keeps the newest sliding_window - 1 keys alone, so that the first new token is the model's and the
# rest come from a model that has forgotten the beginning. attention_chunk_size does the same, and so do layer_types of sliding attention;
# use_cache=False is right with all of them. A perplexity shows nothing, since it has no cache; nothing is warned of.
# After a prompt of 20 tokens; logits of the token after it, from the cache and from all ids anew:
#   key of config.json            prompt's logits    keys in the cache    from the cache    all ids anew
#   -                             plain              20                   plain             plain
#   sliding_window: 8             plain              7                    others            plain
#   attention_chunk_size: 8       plain              7                    others            plain
# scripts/convert.py refuses them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2)).save_pretrained(sys.argv[1])
path = os.path.join(sys.argv[1], "config.json")
with open(path) as file:
    written = json.load(file)
ids = torch.arange(21)[None]
plain = None
found = []
for extra in {}, {"sliding_window": 8}, {"attention_chunk_size": 8}:
    with open(path, "w") as file:
        json.dump({**written, **extra}, file)
    model = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
    with torch.no_grad():
        prompt = model(ids[:, :20], use_cache=True)
        cache = prompt.past_key_values
        keys = cache.layers[0].keys.shape[2]
        each = prompt.logits, model(ids[:, 20:], past_key_values=cache).logits[:, -1], model(ids).logits[:, -1]
    plain = plain or each
    found.append((torch.equal(each[0], plain[0]), keys, *(torch.allclose(a, b, atol=1e-5) for a, b in zip(each[1:], plain[1:]))))
    print(extra, *found[-1])
sys.exit(found != [(True, 20, True, True), (True, 7, False, True), (True, 7, False, True)])
PY
