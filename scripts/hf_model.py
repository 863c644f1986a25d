"""A model.bin in HuggingFace transformers: the peer of scripts/check_answers.py and tests/test_perplexity.py.

Needs torch and transformers (scripts/requirements.txt), which are imported where they are used.
"""
import json
import struct

LAYER_NAMES = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
               "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj",
               "w2": "mlp.down_proj", "w3": "mlp.up_proj"}


def rope_parameters(meta):
    rope = {"rope_type": meta["rope_type"], "rope_theta": float(meta["rope_theta"])}
    if meta["rope_type"] != "default":
        rope["factor"] = float(meta["rope_factor"])
    if meta["rope_type"] == "llama3":
        rope.update(low_freq_factor=float(meta["rope_low_freq_factor"]),
                    high_freq_factor=float(meta["rope_high_freq_factor"]),
                    original_max_position_embeddings=int(meta["rope_original_max_seq_len"]))
    return rope


def load(path):
    """A LlamaForCausalLM in float32, where the file's weights are exact, and the id of BOS; None: there is none."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    with open(path, "rb") as file:
        blob = file.read()
    length, = struct.unpack("<Q", blob[:8])
    entries = json.loads(blob[8:8 + length])
    meta = entries.pop("__metadata__")
    tied = meta["tie_embeddings"] == "true"
    bos = int(meta["bos_id"]) if meta["bos_id"] else None
    config = LlamaConfig(
        vocab_size=int(meta["vocab_size"]), hidden_size=int(meta["dim"]), intermediate_size=int(meta["hidden_dim"]),
        num_hidden_layers=int(meta["n_layers"]), num_attention_heads=int(meta["n_heads"]),
        num_key_value_heads=int(meta["n_kv_heads"]), head_dim=int(meta["head_dim"]),
        max_position_embeddings=int(meta["max_seq_len"]), rms_norm_eps=float(meta["norm_eps"]),
        rope_parameters=rope_parameters(meta), tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
        pad_token_id=None)

    def tensor(name):
        entry = entries[name]
        begin, end = entry["data_offsets"]
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[entry["dtype"]]
        raw = bytearray(blob[8 + length + begin:8 + length + end])
        return torch.frombuffer(raw, dtype=dtype).reshape(entry["shape"]).float()

    state = {"model.embed_tokens.weight": tensor("tok_embeddings"), "model.norm.weight": tensor("norm"),
             "lm_head.weight": tensor("tok_embeddings" if tied else "output")}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in LAYER_NAMES.items():
            state["model.layers.%d.%s.weight" % (layer, theirs)] = tensor("layers.%d.%s" % (layer, ours))
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(state)
    return model.eval(), bos


if __name__ == "__main__":
    print(__doc__)
