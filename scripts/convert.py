#!/usr/bin/env python3
"""Convert a LLaMA checkpoint in HuggingFace layout to model.bin.

    convert.py Llama-3.1-8B-Instruct/ model.bin
    convert.py --vocab-only Llama-3.1-8B-Instruct/ vocab.bin     (or a bare tiktoken ranks file)

Standard library only. Weights are copied byte for byte; norms change type (to float32), and embeddings and output
where that loses nothing. Whatever this program cannot carry over exactly is refused: a model that loads and gives
other tokens is worse than none. Memory does not grow with the checkpoint. chat_template.py and template_reader.py,
beside this file, are parts of it.

Reading order: errors, JSON, what a source is, config, safetensors, tokenizer, chat, output, main.
"""
import argparse
import base64
import binascii
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import struct
import sys
import time

import chat_template

# What is written, beside the tensors: `__metadata__`, all values text. The lowest format that can hold it:
#
# llama-model/1   what the first release reads. `converter` is new in it and ignored by older programs: it is there if
#                 chat_format was compared with the checkpoint's template, or asked for.
# llama-model/2   if there is any of these:
#   rope_type `linear`, with rope_factor: float32 inverse frequencies divided by it
#   chat_format `chatml` or `deepseek`: chat_template.render says what each format writes
#   chat_system      the template's own system message, which stands where a conversation has none: written as it is,
#                    without trimming, and tokens in it count, special ones too (it is the template's text)
#   chat_date        the date that llama3.1 writes: a text, or `today` (as "%d %b %Y" in English); absent: 26 Jul 2024
#   chat_bos_id      what the template writes first: an id, or nothing (empty); absent: bos_id
#   tokenizer.kind 3 added and not special
#   normalized_ids   comma-separated, ascending: tokens of kind 1 and 3 that are looked for in a second pass, over what
#                    the first leaves; absent: none. A pass takes the leftmost match, of those the longest, and goes on
#                    after it. A special token that does not count in a text takes its place all the same: it stays
#                    characters, and nothing is found in it in that pass.
#   tok_embeddings or output in a dtype of its own: BF16, F16 or F32
CONVERTER = "2"
SPLIT_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
              "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
WEIGHT_DTYPES = ("BF16", "F16", "F32")
LFS_POINTER = "a Git LFS pointer (the file itself was not downloaded: git lfs pull)"
FOREIGN_FILES = ((b"GGUF", "a GGUF file"), (b"PK\x03\x04", "a PyTorch pickle file"), (b"\x80", "a pickle file"),
                 (b"version https://git-lfs", LFS_POINTER),
                 (b"<!DOCTYPE", "an HTML page"), (b"<!doctype", "an HTML page"), (b"<html", "an HTML page"))
DOWNLOAD = "hf download ORGANISATION/MODEL --local-dir DIR"
MAX_HEADER = 100_000_000                # of a safetensors file, by its specification
MAX_JSON = 200_000_000
MAX_VOCAB = 1 << 24
DATA_ALIGN = 4096                       # tensor data starts on a page
TENSOR_ALIGN = 16                       # so that vector loads may be used on every weight
SENDFILE_BYTES = 32 << 20
READ_BYTES = 256 << 10                  # small enough to stay in cache between a read and a write; a multiple of 4


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
    """Strict JSON: an object, UTF-8, no duplicate keys, no NaN or Infinity. Another kind of file is called by its name."""
    answer = "the site's answer and not the file: hf auth login, then %s" % DOWNLOAD
    if data.lstrip()[:1] == b"<":
        refuse(where, "format", "JSON", "an HTML page, " + answer)
    if foreign_file(data[:64]):
        refuse(where, "format", "JSON", foreign_file(data[:64]))
    if not data.strip(b" \t\r\n\0"):
        refuse(where, "format", "JSON", "an empty file of %d bytes, an incomplete download: %s" % (len(data), DOWNLOAD))
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
        if data.lstrip()[:1].isalpha() and len(data) < 1000 and data.isascii() and b"\0" not in data:
            refuse(where, "format", "JSON", "the text %s, %s" % (show(data.decode().strip()), answer))
        if data.lstrip()[:1] == b"{" and data.rstrip()[-1:] != b"}":
            refuse(where, "JSON that breaks off after %d bytes, as after an incomplete download (%s): %s"
                   % (len(data), error, DOWNLOAD))
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
    for key in ("quantization_config", "quantization"):
        if config.get(key) is not None:
            refuse_quantised(config.where, config.get(key))
    config.one_of("model_type", "llama")
    config.one_of("architectures", ["LlamaForCausalLM"], ["LlamaModel"])
    config.one_of("hidden_act", "silu", None)
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        config.one_of(key, False, None)
    for key in ("sliding_window", "text_config", "vision_config"):
        config.one_of(key, None)
    config.one_of("partial_rotary_factor", 1, None)
    layers = config.typed("layer_types", list, [])
    require(all(kind == "full_attention" for kind in layers), config.where, "layer_types", '"full_attention"', layers)


def refuse_quantised(where, settings=None):
    """A checkpoint whose matrices are codes."""
    settings = settings if isinstance(settings, dict) else {}
    method = settings.get("quant_method") or ("mlx" if "group_size" in settings else None)
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") is True else
                                    8 if settings.get("load_in_8bit") is True else None)
    details = ", ".join([str(method)] * bool(method) + ["%s bits" % bits] * bool(bits))
    refuse(where, "a quantised checkpoint%s: convert the one that it was made from, with weights in BF16, F16 or F32"
           % (" (%s)" % details if details else ""))


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
        """The bytes from `done` on, READ_BYTES at a time; a file that has shrunk is an error, not a short copy."""
        while done < self.n_bytes:
            piece = read_at(self.file, self.start + done, min(READ_BYTES, self.n_bytes - done), self.name)
            require(piece, self.file.name, self.name + ": data", "%d bytes" % self.n_bytes, done)
            done += len(piece)
            yield piece

    def whole_pieces(self, n_bytes=READ_BYTES):
        """The same with no piece but the last shorter than n_bytes: whole elements, and in step with another tensor."""
        held = b""
        for piece in self.pieces():
            held += piece
            while len(held) >= n_bytes:
                yield held[:n_bytes]
                held = held[n_bytes:]
        if held:
            yield held

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


def read_at(file, at, n, what):
    """Up to n bytes at a place of their own: readers of one file do not move each other."""
    try:
        return os.pread(file.fileno(), n, at)
    except OSError as error:                    # it would name no file, and be taken for one in writing
        refuse(file.name, "%s: %s" % (what, error.strerror))


def read_header(file, data_start, size):
    """All bytes of the header, however few come at a time."""
    header, at = [], 8
    while at < data_start:
        piece = read_at(file, at, data_start - at, "header")
        require(piece, file.name, "header", "%d bytes" % (data_start - 8), at - 8)
        header.append(piece)
        at += len(piece)
    return b"".join(header)


def open_safetensors(path):
    """All tensors of one file by name, its header checked: the data must be covered exactly once."""
    file = open(path, "rb", buffering=0)
    size, start = os.fstat(file.fileno()).st_size, b""
    while len(start) < min(64, size):
        piece = read_at(file, len(start), 64 - len(start), "header")
        require(piece, path, "size", "%d bytes" % size, len(start))
        start += piece
    if foreign_file(start):
        refuse(path, "format", "safetensors", foreign_file(start))
    incomplete = "an incomplete download: %s" % DOWNLOAD
    if size < 8:
        refuse(path, "size", "at least 8 bytes", "%d, %s" % (size, incomplete))
    data_start = 8 + int.from_bytes(start[:8], "little")
    data_bytes = size - data_start
    if data_start - 8 > MAX_HEADER or start[8:9] not in (b"{", b""):
        refuse(path, "format", "safetensors", "a header of %d bytes that begins with %s"
               % (data_start - 8, show(start[8:16])))
    if data_bytes < 0:
        refuse(path, "size", "at least %d bytes, a header and the tensors" % data_start, "%d, %s" % (size, incomplete))
    header = parse_json(path, read_header(file, data_start, size))
    metadata = header.pop("__metadata__", None)             # null as mlx writes it
    require(isinstance(metadata or {}, dict) and all(isinstance(value, str) for value in (metadata or {}).values()), path,
            "__metadata__", "strings by name", metadata)
    tensors, spans, end = {}, [], 0
    for name, values in header.items():
        entry = Section("%s: %s" % (path, show(name)), values)
        dtype = entry.typed("dtype", str, None)
        if dtype not in ITEM_BYTES:
            refuse(entry.where, "dtype", "one of %s" % ", ".join(ITEM_BYTES), show(dtype))
        shape, offsets = entry.typed("shape", list, None), entry.typed("data_offsets", list, None)
        require(all(is_int(n) and n >= 0 for n in shape), entry.where, "shape", "a list of sizes", shape)
        require(len(offsets) == 2 and all(map(is_int, offsets)) and 0 <= offsets[0] <= offsets[1] < 2**63,
                entry.where, "data_offsets", "two offsets", offsets)
        n_bytes = ITEM_BYTES[dtype]
        for n in shape:
            n_bytes *= n
        require(n_bytes == offsets[1] - offsets[0], entry.where, "bytes", show(n_bytes), offsets[1] - offsets[0])
        tensors[name] = Tensor(name, dtype, shape, file, data_start + offsets[0], n_bytes)
        spans.append((*offsets, entry.where))
        end = max(end, offsets[1])
    if end > data_bytes:
        refuse(path, "size", "%d bytes, by its header" % (data_start + end), "%d, %s" % (size, incomplete))
    at = 0
    for begin, end, where in sorted(spans):
        require(begin == at, where, "data", "to start at %d (no gap, no overlap)" % at, begin)
        at = end
    require(at == data_bytes, path, "data", "%d bytes, to the end of the last tensor" % at, data_bytes)
    return tensors


SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors\Z")


def open_checkpoint(directory):
    """The tensors of model.safetensors, else of all shards: those that the index names, and those of one set with them.

    The index says where a tensor is only if two shards hold it: what it lists or omits is not believed."""
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
            if name in tensors and weight_map.get(name) not in (shard, os.path.basename(tensors[name].file.name)):
                refuse(path, show(name), "a tensor of no other shard", "one in %s as well" % tensors[name].file.name)
            if name not in tensors or weight_map[name] == shard:
                tensors[name] = tensor
    return where, tensors


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
QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|scales|biases|weight_scale\w*|weight_packed|absmax|quant_map|SCB"
                       r"|weight\.(absmax|quant_map|nested_\w+|quant_state\S*|SCB))\Z")


def with_prefix(tensors):
    """The names of LlamaForCausalLM; a base model saved by itself has none of its `model.`, which transformers adds."""
    if any(name.startswith("model.") for name in tensors):
        return tensors
    return {name if name == HEAD else "model." + name: tensor for name, tensor in tensors.items()}


def select_weights(where, tensors, sizes, tied):
    """Every expected tensor and no other, checked, as output tensors in file order."""
    lora = [name for name in sorted(tensors) if LORA.search(name)]
    if lora:
        refuse(tensors[lora[0]].file.name, "%d leftover LoRA tensors (%s): merge the adapter before saving "
               "(peft: model.merge_and_unload(), then save_pretrained)" % (len(lora), show(lora[0])))
    quantised = [name for name in sorted(tensors) if QUANTISED.search(name)]
    if quantised:
        refuse_quantised("%s: %s" % (tensors[quantised[0]].file.name, show(quantised[0])))
    tensors = with_prefix(tensors)
    if tied and EMBEDDINGS not in tensors and HEAD in tensors:
        tensors[EMBEDDINGS] = tensors.pop(HEAD)             # one table, saved under its other name
    selected, used, first = [], set(), None
    for ours, theirs, shape in expected_weights(sizes, tied):
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
        if isinstance(output.data, Tensor) and output.dtype != first.dtype:
            in_dtype_of_layers(output, first.dtype)
    return in_aligned_order(where, selected)


def equal_values(a, b):
    if a.dtype == b.dtype:
        return all(x == y for x, y in zip(a.whole_pieces(), b.whole_pieces()))
    wide, narrow = sorted((a, b), key=lambda each: -each.n_bytes)
    half = READ_BYTES * narrow.n_bytes // wide.n_bytes
    return all(piece_to_float32(wide.dtype, x) == piece_to_float32(narrow.dtype, y)
               for x, y in zip(wide.whole_pieces(), narrow.whole_pieces(half)))


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


class Converted:
    """A tensor in another dtype that holds each of its values exactly."""

    def __init__(self, tensor, dtype):
        self.tensor, self.dtype = tensor, dtype
        self.n_bytes = tensor.n_bytes // ITEM_BYTES[tensor.dtype] * ITEM_BYTES[dtype]

    def copy_to(self, fd, progress):
        for piece in self.tensor.whole_pieces():
            data = from_float32(self.dtype, piece_to_float32(self.tensor.dtype, piece))
            require(data is not None, self.tensor.file.name, self.tensor.name, "the values that it had", "others")
            write_all(fd, data, progress)


def piece_to_float32(dtype, data):
    """BF16, F16 or F32 as float32 bytes; every value of the three is exact there."""
    if dtype == "BF16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return bytes(wide)
    if dtype == "F16":
        n = len(data) // 2
        return struct.pack("<%df" % n, *struct.unpack("<%de" % n, data))
    return data


def from_float32(dtype, data):
    """float32 bytes as BF16, F16 or F32; None if that would change a value."""
    if dtype == "BF16":
        if data[0::4].strip(b"\0") or data[1::4].strip(b"\0"):
            return None
        narrow = bytearray(len(data) // 2)
        narrow[0::2], narrow[1::2] = data[2::4], data[3::4]
        return bytes(narrow)
    if dtype == "F16":
        n = len(data) // 4
        try:
            narrow = struct.pack("<%de" % n, *struct.unpack("<%df" % n, data))
        except OverflowError:
            return None
        return narrow if piece_to_float32("F16", narrow) == data else None
    return data


def widen(tensor):
    """A norm as float32 bytes."""
    data = piece_to_float32(tensor.dtype, b"".join(tensor.pieces()))
    for i, value in enumerate(struct.unpack("<%df" % tensor.shape[0], data)):
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
    """ranks: token -> id, in order, 0..n-1. specials, added: id -> bytes, the tokens of kind 1 and 3. normalized: the
    ids among these that are looked for in the second pass. bos: the id put before a text, or None."""

    def __init__(self, ranks, specials, bos, added=None, normalized=()):
        self.ranks, self.specials, self.bos = ranks, specials, bos
        self.added, self.normalized = added or {}, set(normalized)

    def named(self):
        """text -> id of every token of kind 1 and 3."""
        return {token.decode(): rank for tokens in (self.specials, self.added) for rank, token in tokens.items()}


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
        found = found or "a binary file: SentencePiece, LLaMA 2's kind of tokenizer; LLaMA 3's alone is supported"
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


def refuse_tokenizer(where, why):
    refuse(where, "the tokenizer is not LLaMA 3's: %s; models with another tokenizer are not supported" % why)


def read_tokenizer_json(directory, settings):
    root = Section.load(directory, "tokenizer.json")
    model = Section(root.where + ": model", root.get("model"))
    check_tokenizer_kind(root, model)
    vocab, alphabet, by_rank = model.typed("vocab", dict, None), byte_alphabet(), {}

    def to_bytes(text):
        try:
            return bytes([alphabet[char] for char in text])
        except KeyError:
            refuse_tokenizer(root.where, "token %s is not written in characters that stand for bytes" % show(text))

    added = read_added_tokens(root, vocab, settings)
    ids = {token.text: token.id for token in added}
    for text, rank in vocab.items():
        if not is_int(rank) or not 0 <= rank < MAX_VOCAB or rank in by_rank or not text:
            refuse(model.where, "token %s" % show(text), "a text and an id of its own", show(rank))
        if ids.get(text) != rank:               # else an added token that the model's vocabulary lists as well
            by_rank[rank] = to_bytes(text)
    for token in added:                         # the text of an ordinary token, to be matched before the text is split
        if token.id < len(by_rank):
            refuse(root.where, "added token %s" % show(token.text), "an id after those of ordinary tokens", token.id)
    ranks = rank_order(model.where, by_rank)
    check_merges(model, ranks, to_bytes)
    specials, others = {}, {}
    for token in added:
        data = token.text.encode("utf-8", "replace")
        require(token.id >= len(ranks) and data not in ranks and data.decode() == token.text, root.where,
                "added token %d" % token.id, "an id after the merged tokens, and another text", token.text)
        (specials if token.special else others)[token.id] = data
    return Vocabulary(ranks, specials, template_bos(root, ids), others,
                      (token.id for token in added if token.normalized))


def check_tokenizer_kind(root, model):
    """What happens to a text before merging, and to bytes after: LLaMA 3's rules, which the program has built in."""
    kind = model.get("type", "BPE")
    if kind != "BPE":
        refuse_tokenizer(root.where, "its model is %s and not byte-level BPE" % show(kind))
    if model.get("byte_fallback"):
        refuse_tokenizer(root.where, "it is SentencePiece's BPE with byte fallback, as LLaMA 2's and Mistral's")
    for key, plain in (("unk_token", None), ("dropout", 0), ("continuing_subword_prefix", ""),
                       ("end_of_word_suffix", "")):
        if model.get(key) not in (None, plain) or isinstance(model.get(key), bool):
            refuse_tokenizer(root.where, "%s is %s" % (key, show(model.get(key))))
    normalizer = root.get("normalizer")
    if normalizer not in (None, {"type": "Sequence", "normalizers": []}):
        refuse_tokenizer(root.where, "it changes texts before it splits them (normalizer %s)" % show(normalizer))
    splitter = root.get("pre_tokenizer")
    steps = splitter.get("pretokenizers") if isinstance(splitter, dict) and splitter.get("type") == "Sequence" else None
    kinds = [isinstance(step, dict) and step.get("type") for step in (steps if isinstance(steps, list) else [])]
    if kinds != ["Split", "ByteLevel"]:
        refuse_tokenizer(root.where, "it splits texts by another rule (pre_tokenizer %s)" % show(splitter))
    split, byte_level = steps
    if split.get("pattern") != {"Regex": SPLIT_PATTERN}:
        refuse_tokenizer(root.where, "it splits texts by another pattern, %s" % show(split.get("pattern")))
    for step, key, value in ((split, "behavior", "Isolated"), (split, "invert", False),
                             (byte_level, "add_prefix_space", False), (byte_level, "use_regex", False)):
        if step.get(key) != value or isinstance(step.get(key), bool) != isinstance(value, bool):
            refuse_tokenizer(root.where, "it splits texts by another rule (%s %s)" % (key, show(step.get(key))))
    decoder = root.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        refuse_tokenizer(root.where, "it does not join tokens as bytes (decoder %s)" % show(decoder))


def check_flags(token):
    """Rules for what lies around an added token, which the program has not."""
    for flag in ("lstrip", "rstrip", "single_word"):
        token.one_of(flag, False, None)


class AddedToken:
    """One of tokenizer.json's added_tokens, as transformers has it after it has read its other files."""

    def __init__(self, text, rank, special, normalized):
        self.text, self.id, self.special, self.normalized = text, rank, special, normalized


def read_added_tokens(root, vocab, settings):
    """The added tokens. Anything that HuggingFace would match by another rule is refused.

    Of tokenizer.json's flags those are valid that added_tokens_decoder in tokenizer_config.json does not set again."""
    added, texts, following = [], set(), len(vocab)
    decoder = settings.get("added_tokens_decoder", {})
    require(isinstance(decoder, dict), settings.where, "added_tokens_decoder", "a JSON dict", decoder)
    for values in root.typed("added_tokens", list, []):
        token = Section(root.where + ": added token", values)
        text, rank = token.typed("content", str, None), token.get("id")
        token.where += " " + show(text)
        check_flags(token)
        # HuggingFace takes no id from here: it looks in the vocabulary, else counts on from the highest
        expected = vocab.get(text, following)
        following += expected == following
        require(is_int(rank) and rank == expected and text and text not in texts, token.where, "id",
                "a new text and %s, which HuggingFace would give it" % show(expected), rank)
        texts.add(text)
        if str(rank) in decoder:
            token = Section("%s: added_tokens_decoder: %d" % (settings.where, rank), decoder[str(rank)])
        special = token.typed("special", bool, False)
        added.append(AddedToken(text, rank, special, token.typed("normalized", bool, not special)))
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


def template_bos(root, ids):
    """The id that HuggingFace puts before a text, or None; anything put elsewhere is refused. ids: the added tokens'."""
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
        require(single == [{"SpecialToken": {"id": name, "type_id": 0}}, text] and is_int(rank) and rank in ids.values()
                and bos is None, step.where, "single", "at most one special token, then the text", single)
        bos = rank
    return bos


def check_tokenizer_config(settings, vocabulary):
    """tokenizer_config.json can change what tokenizer.json says: then the ids depend on who reads it.

    add_bos_token and add_eos_token do not: transformers 5 reads neither beside a tokenizer.json, and earlier releases
    did for the class LlamaTokenizer alone."""
    for key in ("add_prefix_space", "split_special_tokens"):
        settings.one_of(key, False, None)
    has_bos = vocabulary.bos is not None
    llama_class = settings.get("tokenizer_class", "LlamaTokenizer") in ("LlamaTokenizer", "LlamaTokenizerFast")
    add_bos = settings.typed("add_bos_token", bool, llama_class or has_bos)
    add_eos = settings.typed("add_eos_token", bool, False)
    if llama_class and (add_bos != has_bos or add_eos):
        note("%s: add_bos_token and add_eos_token are left aside, as in transformers 5; transformers 4 would put %s token "
             "before a text and %s after it"
             % (settings.where, "a BOS" if add_bos else "no", "an EOS" if add_eos else "none"))
    if settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        note("%s: tokenizer_class %s beside a byte-level tokenizer.json: transformers 5.17 drops every blank there; 5.24 "
             "and 4.57 do not" % (settings.where, settings.get("tokenizer_class")))
    check_named_tokens(settings, vocabulary)


def check_named_tokens(settings, vocabulary):
    """Tokens that tokenizer_config.json or special_tokens_map.json names are added to a vocabulary that lacks them.

    What is named as bos_token, eos_token, pad_token and so on is special, whatever tokenizer.json says."""
    named = [(key, value) for key, value in settings.values.items() if key.endswith("_token")]
    single = len(named)
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        values = settings.get(key, [])
        named += values.items() if isinstance(values, dict) else [(key, each) for each in settings.typed(key, list, [])]
    ids = vocabulary.named()
    for i, (key, value) in enumerate(named):
        token = Section("%s: %s" % (settings.where, key), value if isinstance(value, dict) else {"content": value})
        text = token.get("content")
        if text is None or isinstance(text, bool):
            continue
        rank = ids.get(text) if isinstance(text, str) else None
        require(rank is not None and key in (str(rank), key.lstrip("0123456789")), token.where, "content",
                "an added token of tokenizer.json", text)
        check_flags(token)
        if i < single and rank in vocabulary.added:
            vocabulary.specials[rank] = vocabulary.added.pop(rank)


def check_added_tokens(added, vocabulary):
    """added_tokens.json, {text: id}, adds to the vocabulary, too."""
    ids = vocabulary.named()
    for text, rank in added.values.items():
        require(is_int(rank) and ids.get(text) == rank, added.where, show(text),
                "the id of that added token in tokenizer.json", rank)


def read_tokenizer(directory, config, vocab_size):
    """The vocabulary from tokenizer.json, from original/tokenizer.model, or from both, which then must agree."""
    vocabulary = None
    if os.path.exists(os.path.join(directory, "tokenizer.json")):
        settings = Section.load(directory, "tokenizer_config.json", needed=False)
        vocabulary = read_tokenizer_json(directory, settings)
        check_tokenizer_config(settings, vocabulary)
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
        others = [name for name in ("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
                  if os.path.exists(os.path.join(directory, name))]
        refuse(directory, "tokenizer", "tokenizer.json or original/tokenizer.model",
               "%s, which is not LLaMA 3's tokenizer" % others[0] if others else
               "neither, an incomplete download: %s" % DOWNLOAD)
    drop_beyond(config, vocabulary, vocab_size)
    return vocabulary


def drop_beyond(config, vocabulary, vocab_size):
    """Leave out tokens beyond the embedding table: a padding token, say, that was added and never trained. One that a
    text may hold is refused."""
    cure = "the embeddings were not resized: model.resize_token_embeddings(len(tokenizer)), then save_pretrained"
    if len(vocabulary.ranks) > vocab_size:
        refuse(config.where, "vocab_size", "at least the tokenizer's %d ids" % len(vocabulary.ranks),
               "%d: the tokenizer belongs to another model, or %s" % (vocab_size, cure))
    needed = sorted(rank for rank in (*vocabulary.added, vocabulary.bos) if rank is not None and rank >= vocab_size)
    if needed:
        token = {**vocabulary.specials, **vocabulary.added}[needed[0]]
        refuse(config.where, "vocab_size", "more than %d, the id of %s, which %s" % (
            needed[0], show(token.decode()),
            "a text may hold" if needed[0] in vocabulary.added else "begins every text"), "%d: %s" % (vocab_size, cure))
    beyond = sorted(rank for rank in vocabulary.specials if rank >= vocab_size)
    if beyond:
        shown = ["%d %s" % (rank, show(vocabulary.specials[rank].decode())) for rank in beyond[:3]]
        note("%d special tokens beyond the embedding table of %d are left out: %s%s" % (
            len(beyond), vocab_size, ", ".join(shown), ", ..." * (len(beyond) > 3)))
    for rank in beyond:
        del vocabulary.specials[rank]
    vocabulary.normalized -= set(beyond)


def tokenizer_outputs(vocabulary, vocab_size):
    others = [vocabulary.specials.get(rank) or vocabulary.added.get(rank, b"")
              for rank in range(len(vocabulary.ranks), vocab_size)]
    kinds = bytes(len(vocabulary.ranks)) + bytes(
        1 if rank in vocabulary.specials else 3 if rank in vocabulary.added else 2
        for rank in range(len(vocabulary.ranks), vocab_size))
    tokens = [*vocabulary.ranks, *others]
    offsets = list(itertools.accumulate(map(len, tokens), initial=0))
    return [Output("tokenizer.offsets", "U32", [vocab_size + 1], struct.pack("<%dI" % len(offsets), *offsets)),
            Output("tokenizer.kind", "U8", [vocab_size], kinds),
            Output("tokenizer.bytes", "U8", [offsets[-1]], b"".join(tokens))]


# ---------------------------------------------------------------------------------------------------------------- chat

def read_chat_template(directory):
    """The text of the checkpoint's template, or None."""
    template = Section.load(directory, "tokenizer_config.json", needed=False).get("chat_template")
    if isinstance(template, list):              # several, by name
        template = next((each.get("template") for each in template
                         if isinstance(each, dict) and each.get("name") == "default"), None)
    template = Section.load(directory, "chat_template.json", needed=False).get("chat_template", template)
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        data = read_file(path)
        found = foreign_file(data[:64].lstrip())
        if found:
            refuse(path, "format", "a chat template", found)
        template = data.decode("utf-8", "replace")
    return template if isinstance(template, str) else None


def template_names(directory):
    """The special tokens that a template sees, by name: tokenizer_config.json's, else special_tokens_map.json's."""
    names = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in Section.load(directory, name, needed=False).values.items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                names[key] = value
    return names


def chat_metadata(directory, vocabulary, wanted=None):
    """chat_format and its parameters. wanted: --chat-format's."""
    source, names, ids = read_chat_template(directory), template_names(directory), vocabulary.named()
    if wanted == "none" or (source is None and not wanted):
        return {"chat_format": "none"}
    if source is None:
        chat = chat_template.Chat(wanted, chat_template.first_bos(names, ids))
    else:
        derived = chat_template.derive(source, names, ids, wanted)
        for each in derived.notes:
            note(each)
        chat = derived.chat
    if chat is None:
        return {"chat_format": "none"}
    for token in chat_template.TOKENS[chat.format]:
        if token not in ids:
            refuse("--chat-format %s" % chat.format, "the vocabulary has no %s" % token)
    result = {"chat_format": chat.format}
    if chat.system is not None:
        result["chat_system"] = chat.system
    if chat.date != chat_template.DATE:
        result["chat_date"] = chat.date
    bos = ids[chat.bos] if chat.bos else None
    if bos != vocabulary.bos:
        result["chat_bos_id"] = "" if bos is None else str(bos)
    return result


def lowest_format(metadata, outputs):
    """Which format this file is."""
    kinds = next(output.data for output in outputs if output.name == "tokenizer.kind")
    dtypes = {output.dtype for output in outputs if len(output.shape) == 2}
    newer = (metadata.get("rope_type") == "linear" or metadata["chat_format"] in ("chatml", "deepseek") or 3 in kinds
             or len(dtypes) > 1
             or any(key in metadata for key in ("chat_system", "chat_date", "chat_bos_id", "normalized_ids")))
    return "llama-model/2" if newer else "llama-model/1"


# -------------------------------------------------------------------------------------------------------------- output

class Output:
    """A tensor of model.bin: its data is bytes, or a Tensor or Converted to copy from."""

    def __init__(self, name, dtype, shape, data):
        self.name, self.dtype, self.shape, self.data = name, dtype, shape, data
        self.n_bytes = len(data) if isinstance(data, bytes) else data.n_bytes


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


def open_part(path):
    """OUT.part, empty and locked: what a stopped conversion left is taken over, what one is writing is not."""
    part = path + ".part"
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                refuse(part, "the file to write to, before it is renamed", "a regular file or none", "something else")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse(part, "another conversion is writing it")
            except OSError:                     # a file system without locks
                pass
            if os.path.exists(part) and os.path.samestat(os.stat(part), os.fstat(fd)):
                os.ftruncate(fd, 0)
                return part, fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)                            # it was renamed or removed meanwhile, by who had the lock


def write_model(path, metadata, outputs):
    """Write OUT.part, then rename it: model.bin is whole or it is not there. A symbolic link is followed."""
    header = build_header(metadata, outputs)
    progress = Progress(len(header) + sum(output.n_bytes for output in outputs))
    target = os.path.realpath(path)
    part, fd = open_part(target)
    try:
        try:
            free = shutil.disk_usage(os.path.dirname(part)).free
            if free < progress.total:
                refuse(path, "space", "%.3f GB" % (progress.total / 1e9), "%.3f GB free on that disk" % (free / 1e9))
            write_all(fd, header, progress)
            for output in outputs:
                if isinstance(output.data, bytes):
                    write_all(fd, output.data, progress)
                else:
                    output.data.copy_to(fd, progress)
            os.replace(part, target)
        except BaseException:
            if os.path.exists(part) and os.path.samestat(os.stat(part), os.fstat(fd)):
                os.unlink(part)                 # this one, not another's that came after
            raise
        finally:
            os.close(fd)
    except BaseException:
        progress.end_line()
        raise
    progress.print("wrote %s: %.3f GB" % (path, progress.done / 1e9))


# ---------------------------------------------------------------------------------------------------------------- main

def check_paths(source, path):
    """Replacing a device or one's own input would be a bad surprise."""
    if not os.path.exists(path):
        parent = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(parent):
            refuse(path, "output", "a file in a directory that is there", "no directory %s" % parent)
        return
    if not stat.S_ISREG(os.stat(path).st_mode):
        refuse(path, "output", "a regular file or none", "something else")
    inputs = [source] if not os.path.isdir(source) else [
        os.path.join(top, name) for top in (source, os.path.join(source, "original")) if os.path.isdir(top)
        for name in os.listdir(top) if name.endswith((".safetensors", ".json", ".jinja", ".model"))]
    for each in inputs:
        if os.path.exists(each) and os.path.samefile(each, path):
            refuse(path, "output", "another file than the input", each)


def convert(source, path, vocab_only, chat_format=None):
    check_source(source, vocab_only)
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
        eos, chat = end_ids(source, config, vocab_size), chat_metadata(source, vocabulary, chat_format)
        if chat["chat_format"] != "none":
            chat["converter"] = CONVERTER
    else:
        ranks = read_ranks(source)
        n, vocab_size = len(ranks), len(ranks) + 256
        vocabulary = vocabulary_from_ranks(ranks, vocab_size)
        eos, chat = [n + 1, n + 8, n + 9], {"chat_format": chat_format or "llama3.1"}
    if vocab_only:
        metadata.update(n_layers="0", vocab_size=str(vocab_size))
    metadata.update(bos_id="" if vocabulary.bos is None else str(vocabulary.bos), eos_ids=",".join(map(str, eos)),
                    **chat)
    if vocabulary.normalized:
        metadata["normalized_ids"] = ",".join(map(str, sorted(vocabulary.normalized)))
    if not vocab_only:
        metadata["source"] = name
    outputs += tokenizer_outputs(vocabulary, vocab_size)
    metadata["format"] = lowest_format(metadata, outputs)
    if metadata["format"] != "llama-model/1":
        metadata["converter"] = CONVERTER
    note("%s: %s, %s ids, bos %s, eos %s, chat format %s" % (
        name, "vocabulary only" if vocab_only else "%(n_layers)s layers, dim %(dim)s, rope %(rope_type)s" % metadata,
        vocab_size, metadata["bos_id"] or "none", metadata["eos_ids"] or "none", chat["chat_format"]))
    write_model(path, metadata, outputs)


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(prog="convert.py", description="Convert a HuggingFace LLaMA checkpoint.")
    parser.add_argument("--vocab-only", action="store_true",
                        help="write the tokenizer and no weights; IN may then be a tiktoken ranks file")
    parser.add_argument("--chat-format", metavar="NAME", choices=("none", *chat_template.FORMATS),
                        help="%s or none, in place of what the chat template is found to be"
                             % ", ".join(chat_template.FORMATS))
    parser.add_argument("source", metavar="IN", help="checkpoint directory")
    parser.add_argument("path", metavar="OUT", help="model.bin to write")
    args = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):     # the temporary file must go, whichever it is
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:       # which is how nohup asks
            signal.signal(each, interrupt)
    try:
        convert(args.source, args.path, args.vocab_only, args.chat_format)
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
