#!/usr/bin/env bash
# transformers 5.24.0 with peft 0.21.2: an adapter beside the weights of a whole model is applied to them, to a merged model a second time.
#
# Good guess: from_pretrained of a directory with config.json and model.safetensors gives that model; an adapter is loaded by peft, or
# where a directory has nothing else. To merge, and to save the result over the directory of the adapter, is then safe, as its weights are
# complete, and so is an adapter saved into the directory of its base model.
# What it does: an adapter_config.json is looked for first, whatever else is there, if peft is installed. With a config.json beside it the
# weights are the directory's own, and the adapter is put onto them, whichever model it was made for; nothing is said. merge_and_unload
# and save_pretrained leave the adapter's two files where they are. So a merged model saved beside its adapter is loaded with the adapter
# twice, and the same directory is one model where peft is installed and another where it is not; programs that read safetensors take
# the one without.
# Difference of the logits (largest) to those of the base model with the adapter:
#   adapter saved into the base model's directory                       0
#   merged model in a directory of its own                              0
#   merged model saved over the adapter's directory                     more than 1
#   the same, the adapter's files deleted                               0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 peft==0.21.2 torch==2.11.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import os, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

base, merged, both = (os.path.join(sys.argv[1], name) for name in ("base", "merged", "both"))
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, initializer_range=0.3)).save_pretrained(base)

def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits

def read(directory):
    return logits(AutoModelForCausalLM.from_pretrained(directory).eval())

plain = read(base)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                       LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
adapted = logits(model)
model.save_pretrained(base)
model.save_pretrained(both)
model = model.merge_and_unload()
model.save_pretrained(merged)
model.save_pretrained(both)
found = [("base model", plain), ("adapter beside the base model", read(base)), ("merged", read(merged)),
         ("merged beside the adapter", read(both))]
for name in "adapter_config.json", "adapter_model.safetensors":
    os.remove(os.path.join(both, name))
found.append(("the same without the adapter's files", read(both)))
found = [(name, (each - adapted).abs().max().item()) for name, each in found]
for name, difference in found:
    print("%-38s%.4f" % (name, difference))
sys.exit([difference > 1 for _, difference in found] != [True, False, False, True, False]
         or any(1e-3 < difference < 1 for _, difference in found))
PY
