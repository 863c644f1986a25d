#!/usr/bin/env python3
"""Convert a LLaMA checkpoint in HuggingFace layout to model.bin.

    convert.py Llama-3.1-8B-Instruct/ model.bin
    convert.py --vocab-only Llama-3.1-8B-Instruct/ vocab.bin     (or a bare tiktoken ranks file)

Standard library only. Weights are copied byte for byte; only norms change type (to float32). Whatever this program
cannot carry over exactly is refused: a model that loads and gives other tokens is worse than none.

Reading order: errors, JSON, config, safetensors, tokenizer, output, main.
"""
import argparse
import base64
import binascii
import itertools
import json
import math
import os
import re
import signal
import stat
import struct
import sys
import time

SPLIT_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
              "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
WEIGHT_DTYPES = ("BF16", "F16", "F32")
FOREIGN_FILES = ((b"GGUF", "a GGUF file"), (b"PK\x03\x04", "a PyTorch pickle file"), (b"\x80", "a pickle file"),
                 (b"version https://git-lfs", "a Git LFS pointer (the file itself was not downloaded)"))
MAX_HEADER = 100_000_000                # of a safetensors file, by its specification
MAX_JSON = 200_000_000
MAX_VOCAB = 1 << 24
DATA_ALIGN = 4096                       # tensor data starts on a page
TENSOR_ALIGN = 16                       # so that vector loads may be used on every weight
SENDFILE_BYTES = 32 << 20
READ_BYTES = 256 << 10                  # small enough to stay in cache between a read and a write


# -------------------------------------------------------------------------------------------------------------- errors

class Refused(Exception):
    """The one way to fail on bad input."""


def refuse(where, what, expected=None, found=None):
    """Stop with `where: what, expected X, found Y`."""
    text = "%s: %s" % (where, what)
    text += "" if expected is None else ", expected %s" % expected
    raise Refused(text + ("" if found is None else ", found %s" % found))


def require(holds, where, what, expected, value):
    """Refuse unless it holds; `value` is what the file has, printed as JSON."""
    if not holds:
        refuse(where, what, expected, show(value))


def show(value):
    """A value from a file, on one short line."""
    try:
        text = ascii(value) if isinstance(value, bytes) else json.dumps(value)
    except (ValueError, RecursionError):        # thousands of digits, or of brackets
        text = "a huge value"
    return text if len(text) <= 90 else text[:87] + "..."


def note(text):
    print("convert.py: " + text, file=sys.stderr)


def foreign_file(start):
    """What a file that starts so is, or None. A safetensors file has zeros at 4..8, in its header's length."""
    return next((what for magic, what in FOREIGN_FILES if start.startswith(magic) and start[4:8] != bytes(4)), None)


# ---------------------------------------------------------------------------------------------------------------- JSON

def parse_json(where, data):
    """Strict JSON: an object, UTF-8, no duplicate keys, no NaN or Infinity."""
    def without_duplicates(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = sorted(key for key, _ in pairs)
            refuse(where, "duplicate key %s" % show(next(a for a, b in zip(keys, keys[1:]) if a == b)))
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates,
                           parse_constant=lambda name: refuse(where, "not valid JSON: %s" % name))
    except RecursionError:
        refuse(where, "JSON nested too deeply")
    except ValueError as error:                 # not UTF-8, not JSON, or an integer of thousands of digits
        refuse(where, "not valid JSON: %s" % error)
    require(isinstance(value, dict), where, "JSON", "an object", value)
    return value


def read_file(path, limit=MAX_JSON):
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        require(size <= limit, path, "size", "at most %d bytes" % limit, size)
        return file.read(limit + 1)


def is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


class Section:
    """A JSON object whose fields are read with their types checked; null is as good as absent."""

    def __init__(self, where, values):
        require(isinstance(values, dict), where, "JSON", "an object", values)
        self.where, self.values = where, values

    @classmethod
    def load(cls, directory, name, needed=True):
        path = os.path.join(directory, name)
        return cls(path, parse_json(path, read_file(path)) if needed or os.path.exists(path) else {})

    def get(self, key, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key, default=None, most=2**31 - 1):
        value = self.get(key, default)
        require(is_int(value) and 0 < value <= most, self.where, key, "an integer from 1 to %d" % most, value)
        return value

    def real(self, key):
        value = self.get(key)
        require((is_int(value) or isinstance(value, float)) and 1e-30 < value < 1e30, self.where, key,
                "a positive number", value)
        return float(value)

    def typed(self, key, kind, default):
        value = self.get(key, default)
        require(isinstance(value, kind), self.where, key, "a JSON %s" % kind.__name__, value)
        return value

    def one_of(self, key, *allowed):
        """The field, which must be one of these values; None among them allows it to be absent."""
        value = self.get(key)
        require(any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed),
                self.where, key, " or ".join("none" if each is None else show(each) for each in allowed), value)
        return value


# -------------------------------------------------------------------------------------------------------------- config

def check_architecture(config):
    """Only the plain LLaMA text model; each of these fields would change the function that is computed."""
    config.one_of("model_type", "llama")
    config.one_of("architectures", ["LlamaForCausalLM"])
    config.one_of("hidden_act", "silu", None)
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        config.one_of(key, False, None)
    for key in ("quantization_config", "sliding_window", "text_config", "vision_config"):
        config.one_of(key, None)
    config.one_of("partial_rotary_factor", 1, None)
    layers = config.typed("layer_types", list, [])
    require(all(kind == "full_attention" for kind in layers), config.where, "layer_types", '"full_attention"', layers)


def rope_metadata(config):
    """RoPE from any layout: rope_parameters, or rope_theta and rope_scaling; rope_type, or the older type."""
    nested, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    key = "rope_scaling" if nested is None else "rope_parameters"
    require(nested is None or scaling in (None, nested), config.where, "rope_scaling", "what rope_parameters says",
            scaling)
    rope = Section(config.where + ": " + key, config.get(key, {}))
    require(not any(isinstance(each, dict) for each in rope.values.values()), rope.where, "parameters",
            "one set for all layers", rope.values)
    thetas = [section.real("rope_theta") for section in (rope, config) if section.get("rope_theta") is not None]
    require(len(set(thetas)) < 2, config.where, "rope_theta", "one value", thetas)
    rope.one_of("partial_rotary_factor", 1, None)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "llama3"), rope.where, "rope_type", "default or llama3", kind)
    rope.one_of("type", kind, None)
    result = {"rope_theta": repr(thetas[0] if thetas else 10000.0), "rope_type": kind}
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
    """End-of-text ids: generation_config.json's if it names any, as in HuggingFace, else config.json's."""
    for source in (Section.load(directory, "generation_config.json", needed=False), config):
        value = source.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            require(all(is_int(each) and 0 <= each < vocab_size for each in ids), source.where, "eos_token_id",
                    "ids from 0 to %d" % (vocab_size - 1), value)
            return list(dict.fromkeys(ids))
    note("no end-of-text id in generation_config.json or config.json: only the length will end a text")
    return []


# --------------------------------------------------------------------------------------------------------- safetensors

class Tensor:
    """A tensor in an open safetensors file: where its bytes are."""

    def __init__(self, name, dtype, shape, file, start, n_bytes):
        self.name, self.dtype, self.shape = name, dtype, shape
        self.file, self.start, self.n_bytes = file, start, n_bytes

    def pieces(self, done=0):
        """The bytes from `done` on, through one buffer; a file that has shrunk is an error, not a short copy."""
        buffer = memoryview(bytearray(min(READ_BYTES, self.n_bytes)))
        self.file.seek(self.start + done)
        while done < self.n_bytes:
            try:
                n = self.file.readinto(buffer[:self.n_bytes - done])
            except OSError as error:            # it would name no file, and be taken for one in writing
                refuse(self.file.name, "%s: %s" % (self.name, error.strerror))
            require(n, self.file.name, self.name + ": data", "%d bytes" % self.n_bytes, done)
            done += n
            yield buffer[:n]

    def copy_to(self, fd, progress):
        """Copy inside the kernel, which is as fast as cp; where that fails, read and write."""
        done = 0
        try:
            while done < self.n_bytes:
                n = os.sendfile(fd, self.file.fileno(), self.start + done, min(SENDFILE_BYTES, self.n_bytes - done))
                if n == 0:
                    break
                done += n
                progress.add(n)
        except (AttributeError, OSError):       # not on this system; or a real error, which then comes again
            pass
        for piece in self.pieces(done):
            write_all(fd, piece, progress)


def open_safetensors(path):
    """All tensors of one file by name, its header checked: the data must be covered exactly once."""
    file = open(path, "rb", buffering=0)
    size, start = os.fstat(file.fileno()).st_size, file.read(64)
    if foreign_file(start):
        refuse(path, "format", "safetensors", foreign_file(start))
    require(size >= 8, path, "size", "at least 8 bytes", size)
    data_start = 8 + int.from_bytes(start[:8], "little")
    data_bytes = size - data_start
    require(data_bytes >= 0 and data_start - 8 <= MAX_HEADER, path, "header length",
            "at most %d" % min(MAX_HEADER, size - 8), data_start - 8)
    file.seek(8)
    header = parse_json(path, file.read(data_start - 8))
    metadata = header.pop("__metadata__", {})
    require(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()), path,
            "__metadata__", "strings by name", metadata)
    tensors, spans = {}, []
    for name, values in header.items():
        entry = Section("%s: %s" % (path, show(name)), values)
        dtype = entry.one_of("dtype", *ITEM_BYTES)
        shape, offsets = entry.typed("shape", list, None), entry.typed("data_offsets", list, None)
        require(all(is_int(n) and n >= 0 for n in shape), entry.where, "shape", "a list of sizes", shape)
        require(len(offsets) == 2 and all(map(is_int, offsets)) and 0 <= offsets[0] <= offsets[1] <= data_bytes,
                entry.where, "data_offsets", "two offsets within %d bytes of data" % data_bytes, offsets)
        n_bytes = ITEM_BYTES[dtype]
        for n in shape:
            n_bytes *= n
        require(n_bytes == offsets[1] - offsets[0], entry.where, "bytes", show(n_bytes), offsets[1] - offsets[0])
        tensors[name] = Tensor(name, dtype, shape, file, data_start + offsets[0], n_bytes)
        spans.append((*offsets, entry.where))
    at = 0
    for begin, end, where in sorted(spans):
        require(begin == at, where, "data", "to start at %d (no gap, no overlap)" % at, begin)
        at = end
    require(at == data_bytes, path, "data", "%d bytes, to the end of the last tensor" % at, data_bytes)
    return tensors


def open_checkpoint(directory):
    """The tensors of model.safetensors, else of all shards that the index names (HuggingFace's order)."""
    single, names = os.path.join(directory, "model.safetensors"), sorted(os.listdir(directory))
    if "model.safetensors" in names:
        return single, open_safetensors(single)
    if "model.safetensors.index.json" not in names:
        others = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors"))]
        refuse(directory, "weights", "model.safetensors or model.safetensors.index.json", "neither" if not others else
               "%s (load it with transformers and save it as safetensors: save_pretrained)" % show(others[0]))
    index = Section.load(directory, "model.safetensors.index.json")
    shards, tensors = {}, {}
    for name, shard in index.typed("weight_map", dict, None).items():
        require(isinstance(shard, str) and re.match(r"(?!\.)[A-Za-z0-9_.\-]+\Z", shard), index.where,
                "shard of %s" % show(name), "a plain file name in the directory", shard)
        shards.setdefault(shard, set()).add(name)
    for shard, mapped in sorted(shards.items()):
        path = os.path.join(directory, shard)
        found = open_safetensors(path)
        for name in sorted(mapped ^ set(found)):
            refuse(path, show(name), *(("no such tensor, by the index", "one") if name in found else
                                       ("a tensor, by the index", "none")))
        tensors.update(found)
    return index.where, tensors


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


def select_weights(where, tensors, sizes, tied):
    """Every expected tensor and no other, checked, as output tensors in file order."""
    selected, used, first = [], set(), None
    for ours, theirs, shape in expected_weights(sizes, tied):
        tensor = tensors.get(theirs)
        if tensor is None:
            refuse(where, theirs, "a tensor", "none")
        used.add(theirs)
        path, is_norm = tensor.file.name, len(shape) == 1
        require(tensor.shape == shape, path, theirs + ": shape", shape, tensor.shape)
        require(tensor.dtype in WEIGHT_DTYPES, path, theirs + ": dtype", " or ".join(WEIGHT_DTYPES), tensor.dtype)
        first = first or tensor
        require(is_norm or tensor.dtype == first.dtype, path, theirs + ": dtype",
                "%s as %s has" % (first.dtype, first.name), tensor.dtype)
        selected.append(Output(ours, "F32", shape, widen(tensor)) if is_norm else
                        Output(ours, tensor.dtype, shape, tensor))
    for name in sorted(set(tensors) - used):
        if name == "lm_head.weight":            # tied: some checkpoints save the embeddings twice
            a, b = tensors[name], tensors["model.embed_tokens.weight"]
            if (a.dtype, a.shape) != (b.dtype, b.shape) or any(x != y for x, y in zip(a.pieces(), b.pieces())):
                refuse(a.file.name, name, "none or %s again, since tie_word_embeddings is true" % b.name, "another")
        elif not re.search(r"(\A|\.)rotary_emb\.inv_freq\Z", name):     # a buffer, which follows from the config
            refuse(tensors[name].file.name, show(name), "no such tensor", "a surplus one")
    return in_aligned_order(where, selected)


def widen(tensor):
    """A norm as float32 bytes."""
    data, n = b"".join(map(bytes, tensor.pieces())), tensor.shape[0]
    if tensor.dtype == "BF16":
        wide = bytearray(4 * n)
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        data = bytes(wide)
    elif tensor.dtype == "F16":
        data = struct.pack("<%df" % n, *struct.unpack("<%de" % n, data))
    for i, value in enumerate(struct.unpack("<%df" % n, data)):
        require(math.isfinite(value), tensor.file.name, "%s[%d]" % (tensor.name, i), "a finite number", value)
    return data


def in_aligned_order(where, outputs):
    """The order in which every tensor starts aligned: an odd-sized one must be the last."""
    odd = [output for output in outputs if output.n_bytes % TENSOR_ALIGN]
    if len(odd) > 1:
        refuse(where, "bytes of " + " and ".join("%s %s" % (output.name, output.shape) for output in odd[:2]),
               "multiples of %d, so that every weight is aligned" % TENSOR_ALIGN,
               "%d and %d" % (odd[0].n_bytes, odd[1].n_bytes))
    return [output for output in outputs if output not in odd] + odd


# ----------------------------------------------------------------------------------------------------------- tokenizer

class Vocabulary:
    """ranks: token -> id, in order, 0..n-1. specials: id -> bytes. bos: the id put before a text, or None."""

    def __init__(self, ranks, specials, bos):
        self.ranks, self.specials, self.bos = ranks, specials, bos
        self.n_ids = max(specials, default=len(ranks) - 1) + 1


def rank_order(where, by_rank):
    """token -> rank in rank order, where merging by rank works: 0..n-1, no token twice, every single byte."""
    ranks = {}
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            refuse(where, "token ids", "0 to %d without a gap" % (len(by_rank) - 1), "none with id %d" % rank)
        if ranks.setdefault(by_rank[rank], rank) != rank:
            refuse(where, "token %d" % rank, "each token once",
                   "%s, which is token %d" % (show(by_rank[rank]), ranks[by_rank[rank]]))
    for byte in range(256):
        if bytes((byte,)) not in ranks:
            refuse(where, "token of the single byte 0x%02x" % byte, "one", "none")
    return ranks


def read_ranks(path):
    """A tiktoken file: on each line the base64 of a token and its rank."""
    by_rank, data = {}, read_file(path)
    found = foreign_file(data[:64])
    if data.lstrip().startswith(b"{"):
        found = "JSON (name the directory that it is in)"
    elif not data.isascii() or b"\0" in data:
        found = found or "a binary file (SentencePiece is not supported)"
    if found:
        refuse(path, "format", "tiktoken ranks", found)
    for number, line in enumerate(data.split(b"\n"), 1):
        parts = line.split()
        try:
            token = base64.b64decode(parts[0], validate=True) if len(parts) == 2 else b""
        except binascii.Error:
            token = b""
        if token and parts[1].isdigit() and len(parts[1]) < 10 and int(parts[1]) not in by_rank:
            by_rank[int(parts[1])] = token
        elif parts:
            refuse(path, "line %d" % number, "base64 of a token and a rank of its own", show(line.decode("ascii")))
    return rank_order(path, by_rank)


def vocabulary_from_ranks(ranks, vocab_size):
    """Ranks alone leave the special tokens open: LLaMA 3.1's, by HuggingFace's names, as far as there is room."""
    n = len(ranks)
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
             "eot_id", "python_tag"] + ["reserved_special_token_%d" % i for i in range(3, 248)]
    specials = {n + i: b"<|%s|>" % name.encode() for i, name in enumerate(names[:max(0, vocab_size - n)])}
    return Vocabulary(ranks, specials, n if specials else None)


def byte_alphabet():
    """GPT-2's character for each byte, as character -> byte: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    table.update((chr(0x100 + i), byte) for i, byte in enumerate(sorted(set(range(256)) - set(plain))))
    return table


def read_tokenizer_json(directory):
    root = Section.load(directory, "tokenizer.json")
    check_text_rules(root)
    model = Section(root.where + ": model", root.get("model"))
    model.one_of("type", "BPE")
    model.one_of("byte_fallback", False, None)
    model.one_of("unk_token", None)
    model.one_of("dropout", 0, None)
    model.one_of("continuing_subword_prefix", "", None)
    model.one_of("end_of_word_suffix", "", None)
    vocab, alphabet, by_rank = model.typed("vocab", dict, None), byte_alphabet(), {}

    def to_bytes(text):
        try:
            return bytes([alphabet[char] for char in text])
        except KeyError:
            refuse(model.where, "token %s" % show(text), "characters of the byte alphabet", "others")

    added = read_added_tokens(root, vocab)
    for text, rank in vocab.items():
        if not is_int(rank) or not 0 <= rank < MAX_VOCAB or rank in by_rank or not text:
            refuse(model.where, "token %s" % show(text), "a text and an id of its own", show(rank))
        if added.get(text) != rank:             # else a special token that the model's vocabulary lists as well
            by_rank[rank] = to_bytes(text)
    ranks = rank_order(model.where, by_rank)
    check_merges(model, ranks, to_bytes)
    specials = {}
    for text, rank in added.items():
        token = text.encode("utf-8", "replace")
        require(rank >= len(ranks) and token not in ranks and token.decode() == text, root.where,
                "added token %d" % rank, "an id after the merged tokens, and another text", text)
        specials[rank] = token
    return Vocabulary(ranks, specials, template_bos(root, specials))


def check_text_rules(root):
    """What happens to a text before merging, and to bytes after: LLaMA 3's rules, which the program has built in."""
    root.one_of("normalizer", None, {"type": "Sequence", "normalizers": []})
    splitter = Section(root.where + ": pre_tokenizer", root.get("pre_tokenizer", {}))
    splitter.one_of("type", "Sequence")
    steps = splitter.typed("pretokenizers", list, None)
    require(len(steps) == 2, splitter.where, "pretokenizers", "Split and ByteLevel", steps)
    split, byte_level = (Section("%s %d" % (splitter.where, i), step) for i, step in enumerate(steps))
    split.one_of("type", "Split")
    split.one_of("pattern", {"Regex": SPLIT_PATTERN})
    split.one_of("behavior", "Isolated")
    split.one_of("invert", False)
    byte_level.one_of("type", "ByteLevel")
    byte_level.one_of("add_prefix_space", False)
    byte_level.one_of("use_regex", False)
    Section(root.where + ": decoder", root.get("decoder", {})).one_of("type", "ByteLevel")


def check_flags(token):
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        token.one_of(flag, False, None)


def read_added_tokens(root, vocab):
    """text -> id of the special tokens. Anything that HuggingFace would match by another rule is refused."""
    added, following = {}, len(vocab)
    for values in root.typed("added_tokens", list, []):
        token = Section(root.where + ": added token", values)
        text, rank = token.typed("content", str, None), token.get("id")
        token.where += " " + show(text)
        token.one_of("special", True)           # others are found in ordinary text
        check_flags(token)
        # HuggingFace takes no id from here: it looks in the vocabulary, else counts on from the highest
        expected = vocab.get(text, following)
        following += expected == following
        require(is_int(rank) and rank == expected and text and text not in added, token.where, "id",
                "a new text and %s, which HuggingFace would give it" % show(expected), rank)
        added[text] = rank
    return added


def check_merges(model, ranks, to_bytes):
    """Merging by rank, which is what the program does, must give the ids that the merge list gives.

    The list is in rank order, so both ways agree until merging by rank takes a pair that the list lacks. If that
    happens in any text, it also happens in the bytes of the joined token alone: so each token is tried.
    """
    listed, last, none = set(), 0, len(ranks)
    for i, merge in enumerate(model.typed("merges", list, None)):
        pair = merge.split(" ") if isinstance(merge, str) else merge        # newer files have pairs
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            refuse(model.where, "merge %d" % i, "a pair of tokens", show(merge))
        left, right = map(to_bytes, pair)
        rank = ranks.get(left + right, none)
        if rank == none or left not in ranks or right not in ranks:
            refuse(model.where, "merge %d" % i, "tokens of the vocabulary, and joined one as well", show(merge))
        if rank < last:
            refuse(model.where, "merge %d" % i, "merges in the order of the ids that they make",
                   "%s for id %d after one for id %d" % (show(merge), rank, last))
        last = rank
        listed.add((left, right))
    whole_pieces = model.typed("ignore_merges", bool, False)
    for token in ranks:
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        if whole_pieces and all(pair in listed or pair[0] not in ranks or pair[1] not in ranks for pair in splits):
            continue                            # no pair that makes this token is missing from the list
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 1:
            rank, i = min((ranks.get(parts[i] + parts[i + 1], none), i) for i in range(len(parts) - 1))
            if rank == none:
                break
            if (parts[i], parts[i + 1]) not in listed:
                refuse(model.where, "token %d, %s" % (ranks[token], show(token)), "merges as by rank",
                       "none of %s + %s" % (show(parts[i]), show(parts[i + 1])))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1 and not whole_pieces:
            refuse(model.where, "ignore_merges", "true, since merges do not make token %d, %s"
                   % (ranks[token], show(token)), "false")


def template_bos(root, specials):
    """The id that HuggingFace puts before a text, or None. Anything put elsewhere is refused."""
    processor, bos = Section(root.where + ": post_processor", root.get("post_processor", {})), None
    steps = [processor.values]
    if processor.get("type") == "Sequence":
        steps = processor.typed("processors", list, None)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    for step in (Section(processor.where, step) for step in steps):
        kind = step.one_of("type", "TemplateProcessing", "ByteLevel", None)
        single = step.get("single")
        if kind != "TemplateProcessing" or single == [text]:    # ByteLevel moves offsets, never ids
            continue
        try:
            name = single[0]["SpecialToken"]["id"]
            (rank,) = step.get("special_tokens")[name]["ids"]
        except (TypeError, ValueError, LookupError):
            name, rank = None, None
        require(single == [{"SpecialToken": {"id": name, "type_id": 0}}, text] and is_int(rank) and rank in specials
                and bos is None, step.where, "single", "at most one special token, then the text", single)
        bos = rank
    return bos


def check_tokenizer_config(settings, vocabulary):
    """tokenizer_config.json can change what tokenizer.json says: then the ids depend on who reads it."""
    for key in ("add_eos_token", "add_prefix_space", "split_special_tokens"):
        settings.one_of(key, False, None)
    has_bos = vocabulary.bos is not None
    if not has_bos and str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
        settings.one_of("add_bos_token", False)         # by default this class puts one, whatever the template says
    settings.one_of("add_bos_token", has_bos, None)
    check_named_tokens(settings, vocabulary)


def check_named_tokens(settings, vocabulary):
    """Tokens that tokenizer_config.json or special_tokens_map.json names are added to the vocabulary if they are not there."""
    named = [(key, value) for key, value in settings.values.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        values = settings.get(key, [])
        named += values.items() if isinstance(values, dict) else [(key, each) for each in settings.typed(key, list, [])]
    ids = {token.decode(): str(rank) for rank, token in vocabulary.specials.items()}
    for key, value in named:
        token = Section("%s: %s" % (settings.where, key), value if isinstance(value, dict) else {"content": value})
        text = token.get("content")
        if text is not None and not isinstance(text, bool):
            rank = ids.get(text) if isinstance(text, str) else None
            require(rank and key in (rank, key.lstrip("0123456789")), token.where, "content",
                    "a special token of tokenizer.json", text)
            check_flags(token)


def check_added_tokens(added, vocabulary):
    """added_tokens.json, {text: id}, adds to the vocabulary, too."""
    for text, rank in added.values.items():
        token = vocabulary.specials.get(rank) if is_int(rank) else None
        require(token is not None and token.decode() == text, added.where, show(text),
                "the id of that special token in tokenizer.json", rank)


def read_tokenizer(directory, config, vocab_size):
    """The vocabulary from tokenizer.json, from original/tokenizer.model, or from both, which then must agree."""
    vocabulary = None
    if os.path.exists(os.path.join(directory, "tokenizer.json")):
        vocabulary = read_tokenizer_json(directory)
        check_tokenizer_config(Section.load(directory, "tokenizer_config.json", needed=False), vocabulary)
        check_named_tokens(Section.load(directory, "special_tokens_map.json", needed=False), vocabulary)
        check_added_tokens(Section.load(directory, "added_tokens.json", needed=False), vocabulary)
    for path in (os.path.join(directory, "original", "tokenizer.model"), os.path.join(directory, "tokenizer.model")):
        if not os.path.exists(path):
            continue
        ranks = read_ranks(path)
        if vocabulary is None:
            vocabulary = vocabulary_from_ranks(ranks, vocab_size)
            config.one_of("bos_token_id", vocabulary.bos, None)
            note("%s: the special tokens are taken to be LLaMA 3.1's" % path)
        for rank, (ours, theirs) in enumerate(itertools.zip_longest(vocabulary.ranks, ranks)):
            if ours != theirs:
                refuse(path, "token %d" % rank, "%s as elsewhere" % show(ours), show(theirs))
    if vocabulary is None:
        refuse(directory, "tokenizer", "tokenizer.json or original/tokenizer.model", "neither")
    require(vocabulary.n_ids <= vocab_size, config.where, "vocab_size",
            "at least the tokenizer's %d ids" % vocabulary.n_ids, vocab_size)
    return vocabulary


def chat_format(directory, vocabulary):
    """Which chat frame the checkpoint's template writes; the template itself is not kept."""
    template = Section.load(directory, "tokenizer_config.json", needed=False).get("chat_template")
    if isinstance(template, list):              # several, by name
        template = next((each.get("template") for each in template
                         if isinstance(each, dict) and each.get("name") == "default"), None)
    template = Section.load(directory, "chat_template.json", needed=False).get("chat_template", template)
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        template = read_file(path).decode("utf-8", "replace")
    if not isinstance(template, str):
        return "none"
    # What the program writes, and every template of LLaMA 3 and 3.1 holds. One without it is not used; of one with it what
    # else it may write, a system message of its own say, is not known, since templates are programs.
    for part in ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "trim"):
        if part not in template.replace("\\n", "\n"):
            note("the chat template is not LLaMA 3's (it has no %r) and is not used" % part)
            return "none"
    for token in (b"<|start_header_id|>", b"<|end_header_id|>", b"<|eot_id|>"):
        if token not in vocabulary.specials.values():
            note("the chat template is not used: the vocabulary has no %s" % token.decode())
            return "none"
    return "llama3.1" if "Cutting Knowledge Date" in template else "llama3"


def tokenizer_outputs(vocabulary, vocab_size):
    others = [vocabulary.specials.get(rank, b"") for rank in range(len(vocabulary.ranks), vocab_size)]
    kinds = bytes(len(vocabulary.ranks)) + bytes(1 if token else 2 for token in others)
    tokens = [*vocabulary.ranks, *others]
    offsets = list(itertools.accumulate(map(len, tokens), initial=0))
    return [Output("tokenizer.offsets", "U32", [vocab_size + 1], struct.pack("<%dI" % len(offsets), *offsets)),
            Output("tokenizer.kind", "U8", [vocab_size], kinds),
            Output("tokenizer.bytes", "U8", [offsets[-1]], b"".join(tokens))]


# -------------------------------------------------------------------------------------------------------------- output

class Output:
    """A tensor of model.bin: its data is bytes, or a Tensor to copy from."""

    def __init__(self, name, dtype, shape, data):
        self.name, self.dtype, self.shape, self.data = name, dtype, shape, data
        self.n_bytes = data.n_bytes if isinstance(data, Tensor) else len(data)


def build_header(metadata, outputs):
    entries, at = {"__metadata__": metadata}, 0
    for output in outputs:
        entries[output.name] = {"dtype": output.dtype, "shape": output.shape,
                                "data_offsets": [at, at + output.n_bytes]}
        at += output.n_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGN)
    return struct.pack("<Q", len(text)) + text


class Progress:
    """GB/s on standard error: one line rewritten on a terminal, else a line now and then."""

    def __init__(self, total):
        self.total, self.done, self.start, self.tty = total, 0, time.monotonic(), sys.stderr.isatty()
        self.next = self.start

    def add(self, n):
        self.done += n
        now = time.monotonic()
        if now >= self.next + (0.2 if self.tty else 10):
            self.next = now
            self.print("%.2f of %.2f GB" % (self.done / 1e9, self.total / 1e9), "" if self.tty else "\n")

    def end_line(self):
        if self.tty:
            print(file=sys.stderr)

    def print(self, text, end="\n"):
        seconds = max(time.monotonic() - self.start, 1e-9)
        print("%s%s in %.1f s, %.2f GB/s" % ("\r\x1b[K" if self.tty else "", text, seconds, self.done / 1e9 / seconds),
              end=end, file=sys.stderr, flush=True)


def write_all(fd, data, progress):
    data = memoryview(data)
    while data:
        n = os.write(fd, data)
        progress.add(n)
        data = data[n:]


def write_model(path, metadata, outputs):
    """Write under a temporary name, then rename: model.bin is whole or it is not there."""
    header = build_header(metadata, outputs)
    progress = Progress(len(header) + sum(output.n_bytes for output in outputs))
    temporary = "%s.tmp.%d" % (path, os.getpid())
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            write_all(fd, header, progress)
            for output in outputs:
                if isinstance(output.data, Tensor):
                    output.data.copy_to(fd, progress)
                else:
                    write_all(fd, output.data, progress)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        progress.end_line()
        raise
    progress.print("wrote %s: %.3f GB" % (path, progress.done / 1e9))


# ---------------------------------------------------------------------------------------------------------------- main

def check_paths(source, path):
    """Replacing a device or one's own input would be a bad surprise."""
    if not os.path.exists(source):
        refuse(source, "no such file or directory")
    if not os.path.exists(path):
        return
    if not stat.S_ISREG(os.stat(path).st_mode):
        refuse(path, "output", "a regular file or none", "something else")
    inputs = [source] if not os.path.isdir(source) else [
        os.path.join(top, name) for top in (source, os.path.join(source, "original")) if os.path.isdir(top)
        for name in os.listdir(top) if name.endswith((".safetensors", ".json", ".jinja", ".model"))]
    for each in inputs:
        if os.path.exists(each) and os.path.samefile(each, path):
            refuse(path, "output", "another file than the input", each)


def convert(source, path, vocab_only):
    check_paths(source, path)
    name = os.path.basename(os.path.abspath(source)).encode("utf-8", "replace").decode()
    metadata, outputs = {"format": "llama-model/1"}, []
    if os.path.isdir(source):
        config = Section.load(source, "config.json")
        check_architecture(config)
        vocab_size = config.integer("vocab_size", most=MAX_VOCAB)
        if not vocab_only:
            sizes, tied, model = model_metadata(config)
            metadata.update(model)
            outputs = select_weights(*open_checkpoint(source), sizes, tied)
        vocabulary = read_tokenizer(source, config, vocab_size)
        eos, chat = end_ids(source, config, vocab_size), chat_format(source, vocabulary)
    elif vocab_only:
        ranks = read_ranks(source)
        n, vocab_size = len(ranks), len(ranks) + 256
        vocabulary = vocabulary_from_ranks(ranks, vocab_size)
        eos, chat = [n + 1, n + 8, n + 9], "llama3.1"
    else:
        with open(source, "rb") as file:
            refuse(source, "input", "a directory in HuggingFace layout", foreign_file(file.read(64)) or "a file")
    if vocab_only:
        metadata.update(n_layers="0", vocab_size=str(vocab_size))
    metadata.update(bos_id="" if vocabulary.bos is None else str(vocabulary.bos), eos_ids=",".join(map(str, eos)),
                    chat_format=chat)
    if not vocab_only:
        metadata["source"] = name
    note("%s: %s, %s ids, bos %s, eos %s, chat format %s" % (
        name, "vocabulary only" if vocab_only else "%(n_layers)s layers, dim %(dim)s, rope %(rope_type)s" % metadata,
        vocab_size, metadata["bos_id"] or "none", metadata["eos_ids"] or "none", chat))
    write_model(path, metadata, outputs + tokenizer_outputs(vocabulary, vocab_size))


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(prog="convert.py", description="Convert a HuggingFace LLaMA checkpoint.")
    parser.add_argument("--vocab-only", action="store_true",
                        help="write the tokenizer and no weights; IN may then be a tiktoken ranks file")
    parser.add_argument("source", metavar="IN", help="checkpoint directory")
    parser.add_argument("path", metavar="OUT", help="model.bin to write")
    args = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):     # the temporary file must go, whichever it is
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:       # which is how nohup asks
            signal.signal(each, interrupt)
    try:
        convert(args.source, args.path, args.vocab_only)
        return 0
    except Refused as error:
        message = str(error)
    except OSError as error:
        message = "%s: %s" % (error.filename or args.path, error.strerror or error)
    except RecursionError:
        message = "%s: JSON nested too deeply" % args.source
    except MemoryError:
        message = "%s: out of memory" % args.source
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    note(" ".join(message.splitlines()))
    return 1


if __name__ == "__main__":
    sys.exit(main())
