#!/usr/bin/env bash
# transformers 5.24.0 with gguf 0.19.0: a LLaMA 3.1 model read from GGUF has lost its RoPE scaling.
#
# Good guess: from_pretrained(gguf_file=...) of an unquantised file gives the model that was written. LLaMA 3.1's
# scaling is in the tensor rope_freqs.weight (what each inverse frequency is divided by), linear scaling in the keys
# rope.scaling.type and rope.scaling.factor; at least something is said of what is not read.
# What it does: weights and rope_theta are read, the tensor and the keys of a LLaMA model are not, and nothing is said.
# Every weight is equal, in float32; the slowest inverse frequency, written and read:
#   llama3, factor 8    5.68e-07   4.54e-06   rope type "default", other logits
#   linear, factor 4    1.14e-06   4.54e-06   rope type "default", other logits
#   no scaling          4.54e-06   4.54e-06   equal logits
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0 accelerate==1.15.0 gguf==0.19.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import os, sys
import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

plain = {"rope_type": "default", "rope_theta": 500000.0}
llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
linear = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}

def model_of(rope):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, rope_parameters=rope, initializer_range=0.3)).eval()

def write(model, rope, path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(65 + i) for i in range(32)])
    if rope is linear:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:    # GGUF's rows: the two of a rotated pair side by side
            weight = weight.view(-1, 2, 16, 64).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    if rope is llama3:
        divisors = model_of(plain).model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
        writer.add_tensor(gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

ids = torch.arange(256)[None] % 32
found = []
for rope in llama3, linear, plain:
    name = rope["rope_type"] + ".gguf"
    model = model_of(rope)
    write(model, rope, os.path.join(sys.argv[1], name))
    read = LlamaForCausalLM.from_pretrained(sys.argv[1], gguf_file=name, dtype=torch.float32).eval()
    assert all(map(torch.equal, model.state_dict().values(), read.state_dict().values()))
    with torch.no_grad():
        difference = (model(ids).logits - read(ids).logits).abs().max().item()
    slowest = [each.model.rotary_emb.inv_freq[-1].item() for each in (model, read)]
    print("%s: written %.2e, read %.2e as %s, logits differ by at most %g"
          % (rope["rope_type"], *slowest, read.config.rope_parameters["rope_type"], difference))
    found.append((round(slowest[1] / slowest[0], 2), read.config.rope_parameters["rope_type"], difference > 0.01))
sys.exit(found != [(8.0, "default", True), (4.0, "default", True), (1.0, "default", False)])
PY
