"""A checkpoint in HuggingFace layout: what a directory is, its config.json, and the weights in its safetensors files.

Reading order: what a source is, config, shards, weights.
"""
import os
import re

from checked_json import Section, is_int
from hf_quantised import QUANTISED, check_alike, check_rest, has_codes, quantised_matrix, refuse_quantised
from model_file import MAX_VOCAB, Output
from refusal import DOWNLOAD, Refused, foreign_file, note, refuse, require, show
from safetensors_reader import Tensor, open_safetensors
from weight_values import Converted, equal_values, from_float32, piece_to_float32, widen

WEIGHT_DTYPES = ("BF16", "F16", "F32")
TENSOR_ALIGN = 16                       # so that vector loads may be used on every weight


# ---------------------------------------------------------------------------------------------------- what a source is

def check_source(source, vocab_only):
    """Say what it is that cannot be converted, and what helps."""
    if not os.path.exists(source):
        model = re.fullmatch(r"(?:https?://huggingface\.co/)?([A-Za-z0-9][\w.-]*)/([\w.-]+)/?", source)
        if model and not os.path.isdir(os.path.dirname(source)):
            refuse(source, "no such directory; if it is a model's id on the hub, download it first: hf download %s/%s "
                   "--local-dir %s, then convert %s" % (*model.groups(), model.group(2), model.group(2)))
        refuse(source, "no such file or directory")
    if not os.path.isdir(source):
        if vocab_only and not source.endswith((".gguf", ".safetensors")):
            return
        with open(source, "rb") as file:
            start = file.read(64)
        found = foreign_file(start) or "a file"
        hint = {"a file": "; name the directory that it is in" if source.endswith((".safetensors", ".json")) else "",
                "a GGUF file": ": convert the checkpoint that it was made from",
                "a PyTorch pickle file": ": name a directory with safetensors files"}.get(found, "")
        refuse(source, "input", "a directory in HuggingFace layout", found + hint)
    names = sorted(os.listdir(source))
    weights = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
    if "adapter_config.json" in names and not weights or "config.json" not in names:
        what = describe_directory(source, names)
        if what:
            refuse(source, what)
    if "adapter_config.json" in names and not vocab_only:
        refuse(source, "a model with an adapter beside it (adapter_config.json), which transformers applies to these "
               "weights: if it is merged into them already, delete the adapter's files, else merge it first")


def describe_directory(source, names):
    """What a directory without config.json is, with what helps; or None."""
    def ending(*ends):
        return [name for name in names if name.endswith(ends)]

    def inside(top):
        return [os.path.join(top, name) for name in sorted(os.listdir(os.path.join(source, top)))
                if os.path.exists(os.path.join(source, top, name, "config.json"))]

    if "adapter_config.json" in names or ending("adapter_model.safetensors", "adapter_model.bin"):
        try:
            base = Section.load(source, "adapter_config.json", needed=False).get("base_model_name_or_path")
        except (Refused, OSError):
            base = None
        return ("a LoRA adapter, not a model: merge it into its base model%s with peft (merge_and_unload, then "
                "save_pretrained), and convert what that writes" % (" " + show(base) if base else ""))
    if not names:
        return "an empty directory: %s" % DOWNLOAD
    if ending(".gguf"):
        return "a directory with a GGUF file (%s): convert the checkpoint that it was made from" % ending(".gguf")[0]
    folders = [name for name in names if os.path.isdir(os.path.join(source, name))]
    if "snapshots" in folders and inside("snapshots"):
        return "the hub's cache: name the snapshot in it, %s" % os.path.join(source, inside("snapshots")[-1])
    nested = [name for name in folders if os.path.exists(os.path.join(source, name, "config.json"))]
    if nested:
        return "no config.json here, but in %s: name that directory" % os.path.join(source, nested[-1])
    meta = ending(".pth") or ("params.json" in names and ["params.json"])
    if meta:
        return ("Meta's own layout (%s), not HuggingFace's: download the whole repository, %s, or convert it with "
                "transformers' convert_llama_weights_to_hf.py" % (meta[0], DOWNLOAD))
    partial = ending(".incomplete", ".part", ".crdownload", ".aria2")
    if partial:
        return "an incomplete download (%s): run it again, %s" % (partial[0], DOWNLOAD)
    return "no config.json, so not a checkpoint in HuggingFace layout, or an incomplete download: %s" % DOWNLOAD


# -------------------------------------------------------------------------------------------------------------- config

def check_architecture(config):
    """Only the plain LLaMA text model; each of these fields would change the function that is computed."""
    config.one_of("model_type", "llama")
    config.one_of("architectures", ["LlamaForCausalLM"], ["LlamaModel"])
    config.one_of("hidden_act", "silu", None)
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        config.one_of(key, False, None)
    for key in ("sliding_window", "attention_chunk_size", "text_config", "vision_config"):
        config.one_of(key, None)
    config.one_of("is_causal", True, None)          # transformers reads it, though no LlamaConfig has it
    config.one_of("transformers_weights", None, "model.safetensors")    # another file of weights, which transformers takes
    config.one_of("partial_rotary_factor", 1, None)
    layers = config.typed("layer_types", list, [])
    require(all(kind == "full_attention" for kind in layers), config.where, "layer_types", '"full_attention"', layers)


def rope_metadata(config):
    """RoPE from any layout: rope_parameters, or rope_theta and rope_scaling; rope_type, or the older type."""
    nested, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    key = "rope_scaling" if nested is None else "rope_parameters"
    if nested is not None and scaling:          # transformers takes the older one, and no rope_theta from the newer
        newer, older = ({"rope_theta": config.get("rope_theta", 10000.0),
                         **Section("%s: %s" % (config.where, each), config.get(each)).values}
                        for each in ("rope_parameters", "rope_scaling"))
        differing = {each: older.get(each) for each in {**newer, **older} if newer.get(each) != older.get(each)}
        if differing:
            refuse(config.where, "rope_scaling", "what rope_parameters says",
                   "%s, which is what transformers reads, as rope_scaling replaces rope_parameters and its rope_theta: "
                   "delete rope_scaling if rope_parameters is right, else rope_parameters" % show(differing))
    rope = Section(config.where + ": " + key, config.get(key, {}))
    require(not any(isinstance(each, dict) for each in rope.values.values()), rope.where, "parameters",
            "one set for all layers", rope.values)
    thetas = [section.real("rope_theta") for section in (rope, config) if section.get("rope_theta") is not None]
    require(len(set(thetas)) < 2, config.where, "rope_theta", "one value", thetas)
    rope.one_of("partial_rotary_factor", 1, None)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "linear", "llama3"), rope.where, "rope_type", "default, linear or llama3", kind)
    rope.one_of("type", kind, None)
    if kind == "linear" and rope.real("factor") == 1:
        kind = "default"
    result = {"rope_theta": repr(thetas[0] if thetas else 10000.0), "rope_type": kind}
    if kind == "linear":                        # every inverse frequency divided by the factor
        result["rope_factor"] = repr(rope.real("factor"))
    if kind == "llama3":
        low, high = rope.real("low_freq_factor"), rope.real("high_freq_factor")
        require(low < high, rope.where, "low_freq_factor", "less than high_freq_factor %r" % high, low)
        result.update(rope_factor=repr(rope.real("factor")), rope_low_freq_factor=repr(low),
                      rope_high_freq_factor=repr(high),
                      rope_original_max_seq_len=str(rope.integer("original_max_position_embeddings")))
    return result


def model_metadata(config):
    """The checked fields of config.json under model.bin's names: the sizes, whether tied, and all as metadata."""
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_kv_heads = config.integer("num_key_value_heads", n_heads)
    require(n_heads % n_kv_heads == 0, config.where, "num_attention_heads",
            "a multiple of num_key_value_heads %d" % n_kv_heads, n_heads)
    require(dim % n_heads == 0 or config.get("head_dim"), config.where, "hidden_size",
            "a multiple of num_attention_heads %d" % n_heads, dim)
    head_dim = config.integer("head_dim", dim // n_heads)
    require(head_dim % 2 == 0, config.where, "head_dim", "an even number (RoPE rotates pairs)", head_dim)
    tied = config.typed("tie_word_embeddings", bool, False)
    sizes = {"dim": dim, "hidden_dim": config.integer("intermediate_size"),
             "n_layers": config.integer("num_hidden_layers"), "n_heads": n_heads, "n_kv_heads": n_kv_heads,
             "head_dim": head_dim, "vocab_size": config.integer("vocab_size", most=MAX_VOCAB),
             "max_seq_len": config.integer("max_position_embeddings")}
    metadata = {key: str(value) for key, value in sizes.items()}
    metadata.update(norm_eps=repr(config.real("rms_norm_eps")), **rope_metadata(config))
    metadata["tie_embeddings"] = "true" if tied else "false"
    return sizes, tied, metadata


def end_ids(directory, config, vocab_size):
    """End-of-text ids: generation_config.json's if it names any, else config.json's.

    The second is this program's choice: transformers does not look at config.json's once there is a
    generation_config.json, and would only stop at the length."""
    for source in (Section.load(directory, "generation_config.json", needed=False), config):
        value = source.get("eos_token_id")
        if value is not None and value != []:
            ids = value if isinstance(value, list) else [value]
            require(all(is_int(each) and 0 <= each < vocab_size for each in ids), source.where, "eos_token_id",
                    "ids from 0 to %d" % (vocab_size - 1), value)
            return list(dict.fromkeys(ids))
    no_file = not os.path.exists(os.path.join(directory, "generation_config.json"))
    note("no end-of-text id in generation_config.json or config.json: only the length will end a text%s" % (
        "; transformers 4 would end it at id 2, its default for config.json without eos_token_id (a null means none)"
        if no_file and "eos_token_id" not in config.values else ""))
    return []


# --------------------------------------------------------------------------------------------------------------- shards

SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors\Z")


def open_checkpoint(directory):
    """The tensors of model.safetensors, else of all shards: those that the index names, and those of one set with them.

    What the index lists or omits is not believed, nor where it says that a tensor is: if two shards hold it, their
    values must be the same, since transformers reads the last shard's, not those of the one named."""
    single, names = os.path.join(directory, "model.safetensors"), sorted(os.listdir(directory))
    if "model.safetensors" in names:
        return single, open_safetensors(single)
    weight_map, where = {}, directory
    if "model.safetensors.index.json" in names:
        index = Section.load(directory, "model.safetensors.index.json")
        weight_map, where = index.typed("weight_map", dict, None), index.where
    for name, shard in weight_map.items():
        require(isinstance(shard, str) and re.match(r"(?!\.)[A-Za-z0-9_.\-]+\Z", shard), where,
                "shard of %s" % show(name), "a plain file name in the directory", shard)
    shards = set(weight_map.values())
    sets = {match.group(2) for match in map(SHARD.match, shards or names) if match}
    shards.update(name for name in names if SHARD.match(name) and SHARD.match(name).group(2) in sets)
    if not shards:
        refuse_weights(directory, names)
    if len(sets) > 1 and not weight_map:
        refuse(directory, "shards", "files of one set", "of %s" % " and of ".join(sorted(sets)))
    if not weight_map:
        for total in sets:                      # all of them are needed, since nothing says what is where
            shards.update("model-%0*d-of-%s.safetensors" % (len(total), i + 1, total)
                          for i in range(min(int(total), 10_000)))
        note("%s: no model.safetensors.index.json; the tensors are taken from %d shards" % (directory, len(shards)))
    missing = sorted(shards - set(names))
    if missing:
        refuse(os.path.join(directory, missing[0]), "not there, %d of %d shards are missing: an incomplete download: %s"
               % (len(missing), len(shards), DOWNLOAD))
    tensors = {}
    for shard in sorted(shards):
        path = os.path.join(directory, shard)
        for name, tensor in open_safetensors(path).items():
            first = tensors.setdefault(name, tensor)
            if first is not tensor and not same_tensor(first, tensor):
                refuse(path, show(name), "the same tensor as in %s" % first.file.name, "another of that name "
                       "(transformers reads the last of the index's shards, not the one that it names)")
    return where, tensors


def same_tensor(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and equal_values(a, b)


def refuse_weights(directory, names):
    """No safetensors file with a name that is known."""
    others = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors"))]
    if not others:
        refuse(directory, "weights", "model.safetensors, or shards of it",
               "neither, an incomplete download: %s" % DOWNLOAD)
    hint = "load it with transformers and save it as safetensors: save_pretrained"
    if others[0].endswith(".gguf"):
        hint = "a GGUF file: convert the checkpoint that it was made from"
    elif others[0].endswith(".pth"):
        hint = "Meta's own layout: download the safetensors files as well: %s" % DOWNLOAD
    elif others[0].endswith(".safetensors"):
        hint = "rename it model.safetensors if it holds the whole model"
    refuse(directory, "weights", "model.safetensors, or shards of it", "%s (%s)" % (show(others[0]), hint))


# -------------------------------------------------------------------------------------------------------------- weights

def expected_weights(sizes, tied):
    """(our name, HuggingFace's name, shape) in file order."""
    dim, hidden, vocab = sizes["dim"], sizes["hidden_dim"], sizes["vocab_size"]
    q_dim, kv_dim = sizes["n_heads"] * sizes["head_dim"], sizes["n_kv_heads"] * sizes["head_dim"]
    layer_weights = (("attention_norm", "input_layernorm", [dim]),
                     ("wq", "self_attn.q_proj", [q_dim, dim]),
                     ("wk", "self_attn.k_proj", [kv_dim, dim]),
                     ("wv", "self_attn.v_proj", [kv_dim, dim]),
                     ("wo", "self_attn.o_proj", [dim, q_dim]),
                     ("ffn_norm", "post_attention_layernorm", [dim]),
                     ("w1", "mlp.gate_proj", [hidden, dim]),
                     ("w2", "mlp.down_proj", [dim, hidden]),
                     ("w3", "mlp.up_proj", [hidden, dim]))
    yield "tok_embeddings", "model.embed_tokens.weight", [vocab, dim]
    for layer in range(sizes["n_layers"]):
        for ours, theirs, shape in layer_weights:
            yield "layers.%d.%s" % (layer, ours), "model.layers.%d.%s.weight" % (layer, theirs), shape
    yield "norm", "model.norm.weight", [dim]
    if not tied:
        yield "output", "lm_head.weight", [vocab, dim]


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LORA = re.compile(r"lora_[AB]|lora_embedding|lora_magnitude|\.base_layer\.|\.modules_to_save\.|\Abase_model\.model\.")


def with_prefix(tensors):
    """The names of LlamaForCausalLM; a base model saved by itself has none of its `model.`, which transformers adds."""
    if any(name.startswith("model.") for name in tensors):
        return tensors
    return {name if name.startswith("lm_head.") else "model." + name: tensor for name, tensor in tensors.items()}


def select_weights(where, tensors, sizes, tied, scheme):
    """Every expected tensor and no other, checked, as output tensors in file order; scheme: of a quantised checkpoint."""
    lora = [name for name in sorted(tensors) if LORA.search(name)]
    if lora:
        refuse(tensors[lora[0]].file.name, "%d leftover LoRA tensors (%s): merge the adapter before saving "
               "(peft: model.merge_and_unload(), then save_pretrained)" % (len(lora), show(lora[0])))
    quantised = [name for name in sorted(tensors) if QUANTISED.search(name)]
    if quantised and not scheme:
        refuse_quantised("%s: %s" % (tensors[quantised[0]].file.name, show(quantised[0])))
    tensors = with_prefix(tensors)
    if tied and has_codes(tensors, HEAD):
        refuse(where, "%s is quantised, though tie_word_embeddings is true: set \"tie_word_embeddings\": false in config.json, and "
               "it is used beside %s" % (HEAD, EMBEDDINGS))
    if tied and EMBEDDINGS not in tensors and HEAD in tensors:
        tensors[EMBEDDINGS] = tensors.pop(HEAD)             # one table, saved under its other name
    selected, used, first = [], set(), None
    for ours, theirs, shape in expected_weights(sizes, tied):
        if scheme and len(shape) == 2 and theirs != EMBEDDINGS and has_codes(tensors, theirs):
            selected += quantised_matrix(scheme, tensors, ours, theirs, shape, used)
            continue
        tensor = tensors.get(theirs)
        if tensor is None:
            tie = "; a tied model without it says so: \"tie_word_embeddings\": true in config.json"
            refuse(where, theirs, "a tensor", "none" + (tie if theirs == HEAD else ""))
        used.add(theirs)
        path, is_norm, is_table = tensor.file.name, len(shape) == 1, theirs in (EMBEDDINGS, HEAD)
        if tensor.dtype in ("U8", "I8", "I32", "U32") or tensor.dtype.startswith("F8"):
            refuse_quantised("%s: %s of dtype %s" % (path, theirs, tensor.dtype))
        require(tensor.shape == shape, path, theirs + ": shape", shape, tensor.shape)
        require(tensor.dtype in WEIGHT_DTYPES, path, theirs + ": dtype", " or ".join(WEIGHT_DTYPES), tensor.dtype)
        first = first or (None if is_norm or is_table else tensor)
        require(is_norm or is_table or tensor.dtype == first.dtype, path, theirs + ": dtype",
                "%s as %s has" % (first and first.dtype, first and first.name), tensor.dtype)
        selected.append(Output(ours, "F32", shape, widen(tensor)) if is_norm else
                        Output(ours, tensor.dtype, shape, tensor))
    if scheme:
        check_rest(tensors, used)
        check_alike(selected)
    for name in sorted(set(tensors) - used):
        if name == HEAD:                        # tied: some checkpoints save the embeddings twice
            a, b = tensors[name], tensors[EMBEDDINGS]
            if a.shape != b.shape or not equal_values(a, b):
                refuse(a.file.name, "%s is another table than %s, though tie_word_embeddings is true: set "
                       "\"tie_word_embeddings\": false in config.json, and both are used (transformers uses both)"
                       % (name, b.name))
        elif not re.search(r"(\A|\.)rotary_emb\.inv_freq\Z", name):     # a buffer, which follows from the config
            refuse(tensors[name].file.name, show(name), "no such tensor", "a surplus one")
    for output in selected:
        if first and output.name in ("tok_embeddings", "output") and output.dtype in WEIGHT_DTYPES \
                and output.dtype != first.dtype:
            in_dtype_of_layers(output, first.dtype)
    return in_aligned_order(where, selected)


def in_dtype_of_layers(output, dtype):
    """Embeddings or output of another dtype than the layers: in theirs if every value is exact there, else as it is."""
    tensor = output.data
    same = all(from_float32(dtype, piece_to_float32(tensor.dtype, piece)) is not None
               for piece in tensor.whole_pieces())
    if same:
        output.dtype, output.data = dtype, Converted(tensor, dtype)
        output.n_bytes = output.data.n_bytes
    note("%s is %s among %s weights: stored as %s%s" % (
        tensor.name, tensor.dtype, dtype, output.dtype, ", in which every value is exact" if same else ""))


def in_aligned_order(where, outputs):
    """The order in which every tensor starts aligned: an odd-sized one must be the last."""
    odd = [output for output in outputs if output.n_bytes % TENSOR_ALIGN]
    if len(odd) > 1:
        refuse(where, "bytes of " + " and ".join("%s %s" % (output.name, output.shape) for output in odd[:2]),
               "multiples of %d, so that every weight is aligned" % TENSOR_ALIGN,
               "%d and %d" % (odd[0].n_bytes, odd[1].n_bytes))
    return [output for output in outputs if output not in odd] + odd


if __name__ == "__main__":
    print(__doc__)
