#!/usr/bin/env python3
"""Tests scripts/convert.py: small checkpoints are made here, converted, and model.bin is parsed strictly.

    python3 tests/test_convert.py [part of a test's name]

One line per test, then `N passed, N failed, N skipped`; exit 1 if any failed. Standard library only.
"""
import base64
import contextlib
import copy
import errno
import fcntl
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared")
SCRIPT = os.path.join(ROOT, "scripts", "convert.py")
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(SCRIPT))
import checked_json  # noqa: E402  (the path above comes first)
import convert  # noqa: E402
import hf_tokenizer  # noqa: E402
import refusal  # noqa: E402
import safetensors_reader  # noqa: E402
from check import wanted  # noqa: E402

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "U8": 1, "I64": 8}
# LLaMA 3's pattern, written out again: a slip in the program's copy must show
PATTERN = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
           "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")
SPECIALS = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
            "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
            "eot_id", "python_tag"]
MERGES = [(b"t", b"h"), (b" ", b"th"), (b"th", b"e"), (b"a", b"n"), (b" th", b"e"), (b"\xc3", b"\xa9")]
NORMS = ("attention_norm", "ffn_norm", "norm")

class Skip(Exception):
    """This machine cannot run the test."""


# ------------------------------------------------------------------------------------------------- making checkpoints

@functools.lru_cache(maxsize=None)
def byte_characters():
    """GPT-2's table, byte -> character, after its published description."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


def text_of(token):
    characters = byte_characters()
    return "".join(characters[b] for b in token)


def make_ranks():
    return [bytes((b,)) for b in range(256)] + [left + right for left, right in MERGES]


def make_tokenizer(ranks, n_special):
    specials = ["<|%s|>" % name for name in SPECIALS][:n_special]
    n, bos = len(ranks), specials[0]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": n + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {"type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [], "special_tokens": {bos: {"id": bos, "ids": [n], "tokens": [bos]}}}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {text_of(token): i for i, token in enumerate(ranks)},
                  "merges": [[text_of(left), text_of(right)] for left, right in MERGES]}}


def hf_shapes(c):
    """HuggingFace's tensor names and shapes, from a config."""
    dim, hidden, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head_dim = c.get("head_dim") or dim // c["num_attention_heads"]
    q_dim, kv_dim = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": [vocab, dim], "model.norm.weight": [dim]}
    for i in range(c["num_hidden_layers"]):
        for name, shape in (("input_layernorm", [dim]), ("post_attention_layernorm", [dim]),
                            ("self_attn.q_proj", [q_dim, dim]), ("self_attn.k_proj", [kv_dim, dim]),
                            ("self_attn.v_proj", [kv_dim, dim]), ("self_attn.o_proj", [dim, q_dim]),
                            ("mlp.gate_proj", [hidden, dim]), ("mlp.up_proj", [hidden, dim]),
                            ("mlp.down_proj", [dim, hidden])):
            shapes["model.layers.%d.%s.weight" % (i, name)] = shape
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [vocab, dim]
    return shapes


@functools.lru_cache(maxsize=None)
def random_tensor(name, dtype, *shape):
    n, rng = 1, random.Random(name)
    for size in shape:
        n *= size
    values = [rng.gauss(0, 1) for _ in range(n)]
    if dtype == "F16":
        return struct.pack("<%de" % n, *values)
    data = struct.pack("<%df" % n, *values)
    if dtype == "BF16":
        data = b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4))
    return data


def safetensors_bytes(tensors, metadata=None):
    """tensors: name -> (dtype, shape, bytes), written in this order."""
    header, at = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


class Checkpoint:
    """A small checkpoint in HuggingFace layout; a test edits its parts, then writes it."""

    def __init__(self, dtype="BF16", n_special=11, norm_dtype=None, **config):
        ranks = make_ranks()
        self.ranks, n = ranks, len(ranks)
        self.config = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": n,
                       "eos_token_id": n + 1, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
                       "max_position_embeddings": 512, "mlp_bias": False, "model_type": "llama",
                       "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
                       "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
                       "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                        "original_max_position_embeddings": 64, "rope_type": "llama3"},
                       "tie_word_embeddings": False, "vocab_size": 280}
        self.config.update(config)
        self.generation = {"bos_token_id": n, "eos_token_id": [n + 1, n + 8, n + 9]}
        self.settings = {"bos_token": "<|begin_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        self.tokenizer = make_tokenizer(ranks, n_special)
        self.tensors = {}
        for name, shape in sorted(hf_shapes(self.config).items()):
            kind = norm_dtype or dtype if len(shape) == 1 else dtype
            self.tensors[name] = (kind, shape, random_tensor(name, kind, *shape))
        self.shards = None              # or a list of lists of names
        self.index = None               # or what the index should hold
        self.files = {}                 # name -> bytes, None for a file that should not be there, or a change

    def write(self, directory):
        files = {"config.json": self.config, "generation_config.json": self.generation,
                 "tokenizer_config.json": self.settings, "tokenizer.json": self.tokenizer}
        files = {name: json.dumps(value).encode() for name, value in files.items()}
        if self.shards is None:
            files["model.safetensors"] = safetensors_bytes(self.tensors)
        else:
            weight_map = {}
            for i, names in enumerate(self.shards):
                shard = "model-%05d-of-%05d.safetensors" % (i + 1, len(self.shards))
                files[shard] = safetensors_bytes({name: self.tensors[name] for name in names})
                weight_map.update((name, shard) for name in names)
            index = self.index(weight_map) if self.index else {"metadata": {}, "weight_map": weight_map}
            files["model.safetensors.index.json"] = json.dumps(index).encode()
        for name, data in self.files.items():
            files[name] = data(files.get(name)) if callable(data) else data
        for name, data in files.items():
            if data is not None:
                os.makedirs(os.path.dirname(os.path.join(directory, name)), exist_ok=True)
                with open(os.path.join(directory, name), "wb") as file:
                    file.write(data)
        return directory

    def edit(self, path, value):
        """edit("tokenizer/model/merges/0", value): DELETE removes; a file is bytes, None or a change of its bytes."""
        if path.startswith("files/"):
            self.files[path[6:]] = value
            return self
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        target = getattr(self, parents[0])
        for part in parents[1:]:
            target = target[part]
        if value is DELETE:
            del target[last]
        else:
            target[last] = value
        return self


DELETE = object()
LAST = text_of(b"\xc3\xa9")


def ranks_file(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))


# ------------------------------------------------------------------------------------------------ running and parsing

def run(*arguments):
    """convert.py's main in this process: (exit status, standard error)."""
    stderr = io.StringIO()
    with mock.patch.object(sys, "argv", ["convert.py", *arguments]), contextlib.redirect_stderr(stderr):
        try:
            status = convert.main()
        except SystemExit as stop:
            status = stop.code
    return status, stderr.getvalue()


def unique(pairs):
    assert len({key for key, _ in pairs}) == len(pairs), "duplicate key in the header"
    return dict(pairs)


def parse_model(path):
    """model.bin by the letter of the format: (metadata, name -> (dtype, shape, bytes))."""
    with open(path, "rb") as file:
        data = file.read()
    (n,) = struct.unpack_from("<Q", data)
    start = 8 + n
    assert start % 4096 == 0, "tensor data starts at %d" % start
    text = data[8:start].decode("utf-8")
    assert text.startswith('{"__metadata__":'), "metadata is not first"
    assert text.rstrip(" ").endswith("}"), "header not padded with spaces"
    header = json.loads(text, object_pairs_hook=unique)
    metadata = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in metadata.values()), "metadata that is not a string"
    at, tensors = 0, {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        n_bytes = ITEM_BYTES[entry["dtype"]]
        for size in entry["shape"]:
            n_bytes *= size
        assert (begin, end) == (at, at + n_bytes), "%s at %d..%d, expected %d + %d" % (name, begin, end, at, n_bytes)
        align = 16 if not name.startswith("tokenizer.") else 4 if entry["dtype"] == "U32" else 1
        assert begin % align == 0, "%s at %d is not aligned" % (name, begin)
        tensors[name] = (entry["dtype"], entry["shape"], data[start + begin:start + end])
        at = end
    assert start + at == len(data), "file of %d bytes, expected %d" % (len(data), start + at)
    assert list(tensors)[-3:] == ["tokenizer.offsets", "tokenizer.kind", "tokenizer.bytes"]
    return metadata, tensors


def vocabulary_of(tensors):
    """[(bytes, kind)] from the three tokenizer tensors."""
    _, (n_offsets,), offsets = tensors["tokenizer.offsets"]
    offsets = struct.unpack("<%dI" % n_offsets, offsets)
    kind_type, (n_ids,), kinds = tensors["tokenizer.kind"]
    data = tensors["tokenizer.bytes"][2]
    assert n_ids == n_offsets - 1 and kind_type == "U8" and offsets[0] == 0 and offsets[-1] == len(data)
    return [(data[offsets[i]:offsets[i + 1]], kinds[i]) for i in range(n_ids)]


def our_name(name):
    """HuggingFace's tensor name -> model.bin's."""
    plain = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    parts = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "wq",
             "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    name = name[:-len(".weight")]
    return plain.get(name) or "layers.%s.%s" % (name.split(".")[2], parts[name.split(".")[-1]])


def widened(dtype, data):
    """float32 bytes of a norm, by arithmetic and not by moving bytes."""
    if dtype == "F16":
        values = struct.unpack("<%de" % (len(data) // 2), data)
    elif dtype == "BF16":
        values = [struct.unpack("<f", struct.pack("<I", bits << 16))[0]
                  for bits in struct.unpack("<%dH" % (len(data) // 2), data)]
    else:
        return data
    return struct.pack("<%df" % len(values), *values)


def check_weights(tensors, source):
    """Every tensor of model.bin has its source's bytes, and there is no other."""
    expected = {}
    for name, (dtype, shape, data) in source.items():
        is_norm = len(shape) == 1
        expected[our_name(name)] = ("F32" if is_norm else dtype, shape, widened(dtype, data) if is_norm else data)
    found = {name: value for name, value in tensors.items() if not name.startswith("tokenizer.")}
    assert set(found) == set(expected), sorted(set(found) ^ set(expected))
    for name in expected:
        assert found[name] == expected[name], "%s differs" % name


def edited(*changes):
    """The small checkpoint, changed."""
    checkpoint = Checkpoint()
    for change in changes:
        change(checkpoint)
    return checkpoint


def converted(checkpoint, *flags):
    """Write, convert and parse: (metadata, tensors, standard error)."""
    with tempfile.TemporaryDirectory() as top:
        source, out = os.path.join(top, "tiny"), os.path.join(top, "model.bin")
        os.mkdir(source)
        checkpoint.write(source)
        status, stderr = run(*flags, source, out)
        assert status == 0, stderr
        assert sorted(os.listdir(top)) == ["model.bin", "tiny"], "files left behind"
        return (*parse_model(out), stderr)


# ----------------------------------------------------------------------------------------------------- what converts

def test_layout_and_metadata():
    checkpoint = Checkpoint()
    metadata, tensors, stderr = converted(checkpoint)
    check_weights(tensors, checkpoint.tensors)
    layer = ["attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"]
    assert list(tensors)[:-3] == ["tok_embeddings"] + ["layers.%d.%s" % (i, name) for i in (0, 1) for name in layer] \
        + ["norm", "output"]
    assert metadata == {
        "format": "llama-model/1", "dim": "32", "hidden_dim": "48", "n_layers": "2", "n_heads": "4",
        "n_kv_heads": "2", "head_dim": "8", "vocab_size": "280", "max_seq_len": "512", "norm_eps": "1e-05",
        "rope_theta": "500000.0", "rope_type": "llama3", "rope_factor": "8.0", "rope_low_freq_factor": "1.0",
        "rope_high_freq_factor": "4.0", "rope_original_max_seq_len": "64", "tie_embeddings": "false",
        "bos_id": "262", "eos_ids": "263,270,271", "chat_format": "none", "source": "tiny"}, metadata
    assert "GB/s" in stderr


def test_tokenizer_tables():
    _, tensors, _ = converted(Checkpoint())
    vocabulary = vocabulary_of(tensors)
    expected = [(token, 0) for token in make_ranks()]
    expected += [(b"<|%s|>" % name.encode(), 1) for name in SPECIALS]
    assert vocabulary == expected + [(b"", 2)] * (280 - len(expected))


def test_weight_and_norm_dtypes():
    for dtype, norm_dtype in (("F16", "F16"), ("F32", "F32"), ("BF16", "F32"), ("F32", "BF16"), ("BF16", "F16")):
        checkpoint = Checkpoint(dtype, norm_dtype=norm_dtype)
        check_weights(converted(checkpoint)[1], checkpoint.tensors)


def test_norm_extremes():
    values = [0x0001, 0x03FF, 0x0400, 0x7BFF, 0x8000, 0x8001, 0xFBFF, 0x3C00] * 4      # f16: subnormals, -0, largest
    checkpoint = Checkpoint("F16")
    checkpoint.tensors["model.norm.weight"] = ("F16", [32], struct.pack("<32H", *values))
    check_weights(converted(checkpoint)[1], checkpoint.tensors)
    values = [0x0001, 0x007F, 0x0080, 0x7F7F, 0x8000, 0x8001, 0xFF7F, 0x3F80] * 4      # bf16: the same
    checkpoint = Checkpoint("BF16")
    checkpoint.tensors["model.norm.weight"] = ("BF16", [32], struct.pack("<32H", *values))
    check_weights(converted(checkpoint)[1], checkpoint.tensors)


def test_shards():
    plain = converted(Checkpoint())
    for n in (1, 2, 5):
        checkpoint = Checkpoint()
        names = sorted(checkpoint.tensors)
        checkpoint.shards = [names[i::n] for i in range(n)]
        assert converted(checkpoint)[:2] == plain[:2], "%d shards" % n
    checkpoint.files["model.safetensors"] = safetensors_bytes(Checkpoint().tensors)
    checkpoint.index = lambda weight_map: {"weight_map": "nonsense"}
    assert converted(checkpoint)[:2] == plain[:2], "a single file comes before an index"


def test_tied():
    checkpoint = Checkpoint(tie_word_embeddings=True)
    metadata, tensors, _ = converted(checkpoint)
    assert metadata["tie_embeddings"] == "true" and "output" not in tensors
    check_weights(tensors, checkpoint.tensors)
    twice = copy.deepcopy(checkpoint)
    twice.tensors["lm_head.weight"] = twice.tensors["model.embed_tokens.weight"]
    assert converted(twice)[:2] == (metadata, tensors)


def test_harmless_fields_and_buffers():
    plain = converted(Checkpoint())
    checkpoint = Checkpoint()
    for i in (0, 1):
        checkpoint.tensors["model.layers.%d.self_attn.rotary_emb.inv_freq" % i] = ("F32", [4], bytes(16))
    checkpoint.config.update(pretraining_tp=2, attention_dropout=0.1, sliding_window=None, partial_rotary_factor=1.0,
                             head_dim=None, quantization_config=None, layer_types=["full_attention"] * 2)
    checkpoint.tokenizer.update(truncation={"max_length": 5}, normalizer={"type": "Sequence", "normalizers": []})
    checkpoint.settings.update(add_bos_token=True, pad_token={"content": "<|end_of_text|>", "lstrip": False},
                               added_tokens_decoder={"262": {"content": "<|begin_of_text|>", "special": True}},
                               additional_special_tokens=["<|eom_id|>"], clean_up_tokenization_spaces=True)
    checkpoint.files = {"added_tokens.json": b'{"<|begin_of_text|>": 262}',
                        "special_tokens_map.json": json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": {
                            "content": "<|end_of_text|>", "lstrip": False}}).encode()}
    assert converted(checkpoint)[:2] == plain[:2]


def test_defaults_of_absent_fields():
    checkpoint = Checkpoint(num_key_value_heads=4)
    for key in ("num_key_value_heads", "attention_bias", "mlp_bias", "hidden_act", "rope_theta", "rope_scaling"):
        del checkpoint.config[key]
    metadata = converted(checkpoint)[0]
    assert (metadata["n_kv_heads"], metadata["rope_theta"], metadata["rope_type"]) == ("4", "10000.0", "default")
    checkpoint = Checkpoint()
    del checkpoint.config["tie_word_embeddings"]
    assert converted(checkpoint)[0]["tie_embeddings"] == "false"


def test_explicit_head_dim():
    checkpoint = Checkpoint(head_dim=16)
    metadata, tensors, _ = converted(checkpoint)
    assert metadata["head_dim"] == "16" and tensors["layers.0.wq"][1] == [64, 32]
    check_weights(tensors, checkpoint.tensors)
    assert converted(Checkpoint(num_attention_heads=3, num_key_value_heads=1, head_dim=8))[0]["head_dim"] == "8"


def test_rope_layouts():
    llama3 = {"factor": 32, "high_freq_factor": 4.0, "low_freq_factor": 1, "original_max_position_embeddings": 8192}
    expected = {"rope_theta": "500000.0", "rope_type": "llama3", "rope_factor": "32.0", "rope_low_freq_factor": "1.0",
                "rope_high_freq_factor": "4.0", "rope_original_max_seq_len": "8192"}
    plain = {"rope_theta": "10000.0", "rope_type": "default"}
    layouts = (
        ({"rope_theta": 500000, "rope_scaling": dict(llama3, rope_type="llama3")}, expected),
        ({"rope_theta": 500000.0, "rope_scaling": dict(llama3, type="llama3")}, expected),
        ({"rope_theta": 500000.0, "rope_scaling": dict(llama3, type="llama3", rope_type="llama3")}, expected),
        ({"rope_parameters": dict(llama3, rope_type="llama3", rope_theta=500000.0)}, expected),
        ({"rope_theta": 5e5, "rope_parameters": dict(llama3, rope_type="llama3", rope_theta=5e5)}, expected),
        ({"rope_theta": 5e5, "rope_parameters": dict(llama3, rope_type="llama3")}, expected),
        ({"rope_theta": 10000.0, "rope_scaling": None}, plain),
        ({"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default"}}, plain),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}, plain),
        ({"rope_parameters": {"rope_theta": 10000.0}}, plain),
        # for versions 4 and 5 of transformers: 5.24 reads the older, with its own rope_theta, the top level's or 10000
        ({"rope_theta": 5e5, "rope_parameters": dict(llama3, rope_type="llama3", rope_theta=5e5),
          "rope_scaling": dict(llama3, rope_type="llama3")}, expected),
        ({"rope_parameters": dict(llama3, rope_type="llama3", rope_theta=5e5),
          "rope_scaling": dict(llama3, rope_type="llama3", rope_theta=5e5)}, expected),
        ({"rope_parameters": dict(llama3, rope_type="llama3", rope_theta=5e5), "rope_scaling": {}}, expected),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "rope_scaling": {"rope_type": "default"}}, plain),
    )
    for layout, wanted in layouts:
        checkpoint = Checkpoint()
        del checkpoint.config["rope_theta"], checkpoint.config["rope_scaling"]
        checkpoint.config.update(layout)
        metadata = converted(checkpoint)[0]
        assert {key: value for key, value in metadata.items() if key.startswith("rope")} == wanted, layout


def test_order_that_aligns():
    checkpoint = Checkpoint(hidden_size=36, head_dim=8, intermediate_size=40, vocab_size=275, tie_word_embeddings=True)
    _, tensors, _ = converted(checkpoint)       # parse_model checks that all starts are aligned
    assert list(tensors)[-4] == "tok_embeddings" and len(tensors["tok_embeddings"][2]) % 16 == 8
    check_weights(tensors, checkpoint.tensors)


def test_end_ids():
    for generation, config, wanted in (({"eos_token_id": 264}, 263, "264"), ({"eos_token_id": [270, 5]}, 5, "270,5"),
                                       ({}, 263, "263"), ({"eos_token_id": None}, [263, 271], "263,271"),
                                       ({}, None, ""), ({"eos_token_id": [263, 263]}, 1, "263"),
                                       ({"eos_token_id": []}, [270], "270"), ({"eos_token_id": []}, [], "")):
        checkpoint = Checkpoint(eos_token_id=config)
        checkpoint.generation = generation
        assert converted(checkpoint)[0]["eos_ids"] == wanted, (generation, config)
    checkpoint = Checkpoint(eos_token_id=[263, 271])
    checkpoint.files["generation_config.json"] = None
    assert converted(checkpoint)[0]["eos_ids"] == "263,271"


def test_no_end_id():
    """Of these transformers 5.24 stops at none; 4.57 at LLaMA 2's id 2, if both the key and the file are missing."""
    for present, config, default in ((False, DELETE, True), (False, None, False), (True, DELETE, False), (True, None, False)):
        checkpoint = Checkpoint().edit("config/eos_token_id", config)
        checkpoint.generation = {}
        if not present:
            checkpoint.files["generation_config.json"] = None
        metadata, _, stderr = converted(checkpoint)
        assert metadata["eos_ids"] == "" and "only the length will end a text" in stderr, stderr
        assert ("; transformers 4 would end it at id 2" in stderr) == default, (present, config, stderr)


def test_bos_from_the_template():
    checkpoint = Checkpoint()
    template = checkpoint.tokenizer["post_processor"]["processors"][1]
    for processor in (None, {"type": "ByteLevel"}, dict(template, single=template["single"][1:])):
        checkpoint.tokenizer["post_processor"] = processor
        assert converted(checkpoint)[0]["bos_id"] == "", processor
    checkpoint.tokenizer["post_processor"] = template
    assert converted(checkpoint)[0]["bos_id"] == "262"


def test_added_tokens_that_are_not_special():
    checkpoint = Checkpoint()
    for i, (special, normalized) in enumerate(((False, False), (False, True), (True, True), (True, False))):
        added(id=273 + i, content="<%d>" % i, special=special, normalized=normalized)(checkpoint)
    metadata, tensors, _ = converted(checkpoint)
    assert metadata["format"] == "llama-model/2" and metadata["normalized_ids"] == "274,275", metadata
    assert metadata["converter"] == "2"
    assert vocabulary_of(tensors)[273:277] == [(b"<0>", 3), (b"<1>", 3), (b"<2>", 1), (b"<3>", 1)]
    metadata, tensors, _ = converted(edited(added(special=False, normalized=False)))
    assert metadata["format"] == "llama-model/2" and "normalized_ids" not in metadata
    assert vocabulary_of(tensors)[273] == (b"<|more|>", 3)
    metadata, tensors, _ = converted(edited(added(special=True, normalized=True)))
    assert metadata["format"] == "llama-model/2" and metadata["normalized_ids"] == "273"


def test_flags_of_added_tokens_elsewhere():
    """As transformers 5.24 has them: what is named eos_token is special whatever tokenizer.json says, and keeps its pass;
    added_tokens_decoder sets both flags anew; additional_special_tokens sets neither."""
    def flags(token, settings=None, files=None):
        checkpoint = edited(added(**token))
        checkpoint.settings.update(settings or {})
        checkpoint.files = {name: json.dumps(value).encode() for name, value in (files or {}).items()}
        metadata, tensors, _ = converted(checkpoint)
        return vocabulary_of(tensors)[273][1], metadata.get("normalized_ids")

    plain, entry = {"special": False, "normalized": True}, {"content": "<|more|>", "lstrip": False, "rstrip": False}
    assert flags(plain) == (3, "273")
    assert flags(plain, {"eos_token": "<|more|>"}) == (1, "273")
    assert flags(plain, {"eos_token": dict(entry, special=False, normalized=False)}) == (1, "273")
    assert flags(dict(plain, normalized=False), {"eos_token": "<|more|>"}) == (1, None)
    assert flags(plain, files={"special_tokens_map.json": {"pad_token": "<|more|>"}}) == (1, "273")
    assert flags(plain, {"additional_special_tokens": ["<|more|>"]}) == (3, "273")
    assert flags(plain, {"added_tokens_decoder": {"273": dict(entry, special=True, normalized=False)}}) == (1, None)
    assert flags({"special": True}, {"added_tokens_decoder": {"273": dict(entry, special=False, normalized=True)}}) == (3, "273")
    assert flags({"special": True}, {"added_tokens_decoder": {"273": entry}}) == (3, "273")
    assert flags(plain, files={"added_tokens.json": {"<|more|>": 273}}) == (3, "273")


def test_tokens_beyond_the_embeddings():
    plain = converted(Checkpoint())
    checkpoint = edited(*[added(id=273 + i, content="<%d>" % i) for i in range(8)])
    metadata, tensors, stderr = converted(checkpoint)
    assert "1 special tokens beyond the embedding table of 280 are left out: 280 \"<7>\"" in stderr, stderr
    assert vocabulary_of(tensors)[279] == (b"<6>", 1) and metadata == plain[0]
    checkpoint = edited(*[added(id=273 + i, content="<%d>" % i, special=i < 7, normalized=True) for i in range(8)])
    checkpoint.settings["pad_token"] = "<7>"    # not special in tokenizer.json, but no text needs it
    metadata, tensors, stderr = converted(checkpoint)
    assert "left out" in stderr and metadata["normalized_ids"] == "273,274,275,276,277,278,279"


def test_bos_and_eos_flags_that_transformers_ignores():
    """transformers 5.24 reads neither beside a tokenizer.json, for any class; 4.57 did for LlamaTokenizer alone."""
    plain = converted(Checkpoint())[:2]
    for values, noted in (({"add_bos_token": False}, False), ({"add_eos_token": True}, False),
                          ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, True),
                          ({"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, False)):
        checkpoint = Checkpoint()
        checkpoint.settings.update(values)
        metadata, tensors, stderr = converted(checkpoint)
        assert (metadata, tensors) == plain and ("transformers 4 would put" in stderr) == noted, (values, stderr)
        assert ("drops every blank" in stderr) == (values.get("tokenizer_class") is not None), stderr
    checkpoint = Checkpoint()
    checkpoint.tokenizer["post_processor"] = None
    checkpoint.settings["add_bos_token"] = True
    assert converted(checkpoint)[0]["bos_id"] == ""


def test_names_without_model():
    for tied in (False, True):
        checkpoint = Checkpoint(tie_word_embeddings=tied)
        plain = converted(checkpoint)[:2]
        checkpoint.tensors = {name[6:] if name.startswith("model.") else name: value
                              for name, value in checkpoint.tensors.items()}
        assert converted(checkpoint)[:2] == plain
    checkpoint.config["architectures"] = ["LlamaModel"]
    assert converted(checkpoint)[:2] == plain


def test_tied_tables():
    """One larger than the buffer, stored twice in one file; and under the head's name alone, as transformers loads it."""
    checkpoint = Checkpoint(tie_word_embeddings=True, vocab_size=9000)
    plain = converted(checkpoint)[:2]
    table = checkpoint.tensors[EMBED]
    assert len(table[2]) > 2 * safetensors_reader.READ_BYTES
    checkpoint.tensors["lm_head.weight"] = table
    assert converted(checkpoint)[:2] == plain
    checkpoint.tensors["lm_head.weight"] = ("F32", table[1], widened("BF16", table[2]))
    assert converted(checkpoint)[:2] == plain, "the same values in another dtype"
    del checkpoint.tensors[EMBED]
    checkpoint.tensors["lm_head.weight"] = table
    assert converted(checkpoint)[:2] == plain


def test_index_that_lies():
    plain = converted(Checkpoint())[:2]
    for index, shards in ((lambda index: index["weight_map"].update(surplus="model-00001-of-00002.safetensors"), None),
                          (lambda index: index["weight_map"].pop(NORM) and None, None),
                          (lambda index: index["weight_map"].__setitem__(NORM, "model-00002-of-00002.safetensors"), None),
                          (lambda index: index["weight_map"].__setitem__(NORM, "model-00001-of-00002.safetensors"), None),
                          (lambda index: [index["weight_map"].pop(name) for name, shard in list(index["weight_map"].items())
                                          if shard.startswith("model-00002")] and None, None),
                          (None, lambda shards: shards[0].append(shards[1][0]))):
        checkpoint = edited(sharded(index, shards))
        assert converted(checkpoint)[:2] == plain, (index, shards)


def test_tensor_in_two_shards():
    """The same values do no harm; others are refused whatever the index says: transformers 5.24 reads the last shard's."""
    plain = converted(Checkpoint(vocab_size=9000))[:2]
    for index, files in ((SHARDS[0], {}), (SHARDS[1], {}), (None, {}), (None, {INDEX: None})):
        checkpoint = Checkpoint(vocab_size=9000)
        in_both_shards(EMBED, index)(checkpoint)
        checkpoint.files.update(files)
        assert converted(checkpoint)[:2] == plain, (index, files)
    checkpoint = Checkpoint(vocab_size=9000)            # the last byte of a table larger than what is read at once
    assert len(checkpoint.tensors[EMBED][2]) > 2 * safetensors_reader.READ_BYTES
    in_both_shards(EMBED, SHARDS[0], lambda data: data[:-1] + bytes([data[-1] ^ 1]))(checkpoint)
    with tempfile.TemporaryDirectory() as top:
        status, stderr = run(checkpoint.write(os.path.join(top, "tiny")), os.path.join(top, "model.bin"))
        assert status == 1 and os.listdir(top) == ["tiny"], stderr
        assert stderr == (
            'convert.py: %s/tiny/%s: "%s", expected the same tensor as in %s/tiny/%s, found another of that name (transformers '
            "reads the last of the index's shards, not the one that it names)\n" % (top, SHARDS[1], EMBED, top, SHARDS[0])), stderr


def test_shards_without_an_index():
    plain = converted(Checkpoint())[:2]
    checkpoint = edited(sharded(), raw(INDEX, None))
    metadata, tensors, stderr = converted(checkpoint)
    assert (metadata, tensors) == plain and "no model.safetensors.index.json; the tensors are taken from 2 shards" in stderr


def test_tables_of_another_dtype():
    def table(name, dtype, data):
        return tensor(name, dtype, data=data)

    checkpoint = Checkpoint("BF16")
    exact = widened("BF16", checkpoint.tensors[EMBED][2])
    plain = converted(checkpoint)[:2]
    metadata, tensors, stderr = converted(edited(table(EMBED, "F32", exact), table("lm_head.weight", "F32", widened(
        "BF16", checkpoint.tensors["lm_head.weight"][2]))))
    assert (metadata, tensors) == plain and stderr.count("F32 among BF16 weights: stored as BF16, in which every value") == 2
    inexact = exact[:-4] + struct.pack("<f", 0.1)
    metadata, tensors, stderr = converted(edited(table(EMBED, "F32", inexact)))
    assert metadata["format"] == "llama-model/2" and tensors["tok_embeddings"] == ("F32", [280, 32], inexact)
    assert "stored as F32" in stderr and tensors["output"][0] == "BF16"
    for dtype, values, exact in (("F16", [1.5, -0.0, 6e-8, 65504.0], False), ("F16", [1.5, -2.0, 0.0, 65504.0], False),
                                 ("F16", [1.5, -2.0, 0.0, 0.25], True)):
        data = struct.pack("<4e", *values) * (280 * 8)
        narrow = b"".join(struct.pack("<f", value)[2:] for value in values) * (280 * 8)
        _, tensors, _ = converted(edited(table("lm_head.weight", dtype, data)))
        assert tensors["output"] == (("BF16", [280, 32], narrow) if exact else (dtype, [280, 32], data)), values
    checkpoint = Checkpoint("F16")              # float32 among float16: 65520 is none, 2**-24 is the smallest
    for values, exact in (([1.0, 2**-24, -65504.0, 0.5], True), ([1.0, 65520.0, 0.0, 0.0], False), ([1e38, 0.0, 0.0, 0.0], False),
                          ([2**-25, 0.0, 0.0, 0.0], False), ([float("inf"), -0.0, 1.0, 1.0], True)):
        data = struct.pack("<4f", *values) * (280 * 8)
        checkpoint.tensors["lm_head.weight"] = ("F32", [280, 32], data)
        _, tensors, _ = converted(checkpoint)
        assert tensors["output"] == (("F16", [280, 32], struct.pack("<4e", *values) * (280 * 8)) if exact
                                     else ("F32", [280, 32], data)), values
    checkpoint = Checkpoint("F32")              # 16 bits among float32 widen, which format 1 can hold
    checkpoint.tensors[EMBED] = Checkpoint("BF16").tensors[EMBED]
    metadata, tensors, _ = converted(checkpoint)
    assert metadata["format"] == "llama-model/1" and tensors["tok_embeddings"][2] == widened("BF16", checkpoint.tensors[EMBED][2])


def test_rope_linear():
    for layout in ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
                   {"rope_scaling": None, "rope_theta": None,
                    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}):
        metadata = converted(Checkpoint(**layout))[0]
        assert metadata["format"] == "llama-model/2" and {key: value for key, value in metadata.items() if "rope" in key} == {
            "rope_type": "linear", "rope_factor": "2.0", "rope_theta": "500000.0"}, layout
    metadata = converted(Checkpoint(rope_scaling={"type": "linear", "factor": 1.0}))[0]
    assert metadata["rope_type"] == "default" and metadata["format"] == "llama-model/1" and "rope_factor" not in metadata


def test_safetensors_as_mlx_writes_it():
    """"__metadata__": null, a header of any length, data in another order than the header's and unaligned."""
    checkpoint = Checkpoint()
    plain = converted(checkpoint)[:2]
    at, header = 0, {"__metadata__": None}
    blobs = []
    for name in sorted(checkpoint.tensors, key=lambda name: name[::-1]):
        dtype, shape, data = checkpoint.tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        blobs.append(data)
        at += len(data)
    text = json.dumps({name: header[name] for name in sorted(header)}).encode()
    text += b" " * (1 - len(text) % 2)
    checkpoint.files["model.safetensors"] = struct.pack("<Q", len(text)) + text + b"".join(blobs)
    assert len(text) % 8 and converted(checkpoint)[:2] == plain


# ------------------------------------------------------------------------------------------------ what a source is

def test_directories_that_are_no_checkpoint():
    """Each message says what it is and what helps."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
    page = b"<!DOCTYPE html>\n<html><body>Access denied</body></html>"
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}).encode()
    for files, parts in (
            ({}, ["an empty directory", "hf download"]),
            ({"adapter_config.json": adapter, "adapter_model.safetensors": b""},
             ["a LoRA adapter", '"meta-llama/Llama-3.1-8B"', "merge_and_unload"]),
            ({"adapter_config.json": b"{", "config.json": b"{}"}, ["a LoRA adapter", "merge_and_unload"]),
            ({"consolidated.00.pth": b"", "params.json": b"{}", "tokenizer.model": b""}, ["Meta's own layout (consolidated.00.pth)"]),
            ({"params.json": b"{}", "tokenizer.model": b""}, ["Meta's own layout (params.json)"]),
            ({"Llama-3.1-8B-Q4_K_M.gguf": b"GGUF"}, ["a directory with a GGUF file", "the checkpoint that it was made from"]),
            ({"snapshots/0e9e39f/config.json": b"{}", "refs/main": b"0e9e39f"}, ["the hub's cache", "snapshots/0e9e39f"]),
            ({"checkpoint-500/config.json": b"{}", "trainer_state.json": b"{}"}, ["name that directory", "checkpoint-500"]),
            ({"model.safetensors.incomplete": b""}, ["an incomplete download (model.safetensors.incomplete)"]),
            ({"README.md": b"#"}, ["no config.json, so not a checkpoint in HuggingFace layout"]),
            ({"config.json": pointer}, ["config.json: format, expected JSON, found a Git LFS pointer", "git lfs pull"]),
            ({"config.json": page}, ["config.json: format, expected JSON, found an HTML page", "hf auth login"]),
            ({"config.json": b"\n\n<html>"}, ["found an HTML page"]),
            ({"config.json": b"<?xml version='1.0'?><Error/>"}, ["found an HTML page"]),
            ({"config.json": b"Entry not found"}, ['found the text "Entry not found", the site\'s answer', "hf auth login"]),
            ({"config.json": b'{"architectures": ["Llama'}, ["JSON that breaks off after 25 bytes", "hf download"])):
        with tempfile.TemporaryDirectory() as top:
            source = os.path.join(top, "in")
            os.mkdir(source)
            for name, data in files.items():
                os.makedirs(os.path.dirname(os.path.join(source, name)), exist_ok=True)
                with open(os.path.join(source, name), "wb") as file:
                    file.write(data)
            status, stderr = run(source, os.path.join(top, "out"))
            assert status == 1 and len(stderr.splitlines()) == 1 and all(part in stderr for part in parts), (files, stderr)
            assert "No such file" not in stderr and "not valid JSON" not in stderr
            assert os.listdir(top) == ["in"]
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        with tempfile.TemporaryDirectory() as top:
            os.mkdir(os.path.join(top, "in"))
            status, stderr = run(edited(raw(name, pointer)).write(os.path.join(top, "in")), os.path.join(top, "out"))
            assert status == 1 and name + ": format, expected JSON, found a Git LFS pointer" in stderr, stderr


def test_a_hub_id():
    status, stderr = run("meta-llama/Llama-3.1-8B-Instruct", "/tmp/none")
    assert status == 1 and "hf download meta-llama/Llama-3.1-8B-Instruct --local-dir Llama-3.1-8B-Instruct" in stderr, stderr
    status, stderr = run("https://huggingface.co/meta-llama/Llama-3.1-8B", "/tmp/none")
    assert status == 1 and "hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B," in stderr, stderr
    status, stderr = run("./no/such", "/tmp/none")
    assert status == 1 and "./no/such: no such file or directory" in stderr


def test_leftover_lora_tensors():
    for name in ("model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.model.norm.weight",
                 "model.layers.0.self_attn.q_proj.base_layer.weight"):
        with tempfile.TemporaryDirectory() as top:
            os.mkdir(os.path.join(top, "in"))
            status, stderr = run(edited(tensor(name)).write(os.path.join(top, "in")), os.path.join(top, "out"))
            assert status == 1 and "leftover LoRA tensors" in stderr and "merge_and_unload" in stderr, stderr


def test_incomplete_shards():
    checkpoint = edited(sharded(), raw(INDEX, None), raw("model-00002-of-00002.safetensors", None))
    with tempfile.TemporaryDirectory() as top:
        os.mkdir(os.path.join(top, "in"))
        status, stderr = run(checkpoint.write(os.path.join(top, "in")), os.path.join(top, "out"))
        assert status == 1 and "model-00002-of-00002.safetensors: not there, 1 of 2 shards are missing" in stderr, stderr


def test_merges_as_text():
    plain = converted(Checkpoint())
    checkpoint = Checkpoint()
    checkpoint.tokenizer["model"]["merges"] = [" ".join(pair) for pair in checkpoint.tokenizer["model"]["merges"]]
    assert converted(checkpoint)[:2] == plain[:2]


def test_special_token_listed_in_vocab():
    plain = converted(Checkpoint())
    checkpoint = Checkpoint()
    for token in checkpoint.tokenizer["added_tokens"]:
        checkpoint.tokenizer["model"]["vocab"][token["content"]] = token["id"]
    assert converted(checkpoint)[:2] == plain[:2]


def test_ignore_merges_false_when_merges_make_every_token():
    plain = converted(Checkpoint())
    assert converted(Checkpoint().edit("tokenizer/model/ignore_merges", False))[:2] == plain[:2]


def test_tokenizer_from_ranks():
    plain = converted(Checkpoint())
    for name in ("original/tokenizer.model", "tokenizer.model"):
        checkpoint = Checkpoint()
        checkpoint.files[name] = ranks_file(checkpoint.ranks)
        assert converted(checkpoint)[:2] == plain[:2], "both, in agreement"
        checkpoint.files["tokenizer.json"] = None
        metadata, tensors, stderr = converted(checkpoint)
        vocabulary = vocabulary_of(tensors)
        assert metadata["bos_id"] == "262" and "LLaMA 3.1's" in stderr
        assert vocabulary[262] == (b"<|begin_of_text|>", 1) and vocabulary[279] == (b"<|reserved_special_token_9|>", 1)
    checkpoint = Checkpoint(vocab_size=600)
    checkpoint.files = {"tokenizer.json": None, "tokenizer.model": ranks_file(checkpoint.ranks)}
    vocabulary = vocabulary_of(converted(checkpoint)[1])
    assert vocabulary[517] == (b"<|reserved_special_token_247|>", 1) and vocabulary[518:] == [(b"", 2)] * 82


def test_vocab_only():
    checkpoint = Checkpoint()
    full = converted(checkpoint)
    checkpoint.files["model.safetensors"] = None
    metadata, tensors, _ = converted(checkpoint, "--vocab-only")
    assert metadata == {"format": "llama-model/1", "n_layers": "0", "vocab_size": "280", "bos_id": "262",
                        "eos_ids": "263,270,271", "chat_format": "none"}, metadata
    assert vocabulary_of(tensors) == vocabulary_of(full[1]) and len(tensors) == 3


def test_vocab_only_from_ranks():
    with tempfile.TemporaryDirectory() as top:
        source, out = os.path.join(top, "ranks"), os.path.join(top, "vocab.bin")
        with open(source, "wb") as file:
            file.write(ranks_file(make_ranks()))
        status, stderr = run("--vocab-only", source, out)
        assert status == 0, stderr
        metadata, tensors = parse_model(out)
    assert metadata == {"format": "llama-model/1", "n_layers": "0", "vocab_size": "518", "bos_id": "262",
                        "eos_ids": "263,270,271", "chat_format": "llama3.1"}, metadata
    names = SPECIALS + ["reserved_special_token_%d" % i for i in range(3, 248)]
    assert vocabulary_of(tensors) == [(token, 0) for token in make_ranks()] \
        + [(b"<|%s|>" % name.encode(), 1) for name in names]


def test_merge_check_is_exact():
    """Small random vocabularies, complete merge lists and lists with holes: refused if and only if ids differ."""
    def encode(text, ranks, allowed):
        parts = [text[i:i + 1] for i in range(len(text))]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                     if a + b in ranks and (allowed is None or (a, b) in allowed)]
            if not pairs:
                return parts
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]

    rng, refused = random.Random(7), 0
    for _ in range(400):
        tokens, pairs = [b"a", b"b", b"c"], []
        for _ in range(rng.randint(1, 9)):
            a, b = rng.choice(tokens), rng.choice(tokens)
            if a + b not in tokens and len(a + b) < 8:
                tokens.append(a + b)
                pairs.append((a, b))
        ranks = {bytes((b,)): b for b in range(256)}
        for token in tokens[3:]:
            ranks[token] = len(ranks)
        if rng.random() < 0.6:
            pairs = sorted(((t[:i], t[i:]) for t in tokens for i in range(1, len(t))
                            if t[:i] in ranks and t[i:] in ranks and rng.random() < 0.85),
                           key=lambda pair: [ranks[part] for part in (pair[0] + pair[1], *pair)])
        whole = rng.random() < 0.5
        model = checked_json.Section("m", {"merges": [[part.decode("latin1") for part in pair] for pair in pairs],
                                           "ignore_merges": whole})
        try:
            hf_tokenizer.check_merges(model, ranks, lambda text: text.encode("latin1"))
            accepted = True
        except refusal.Refused:
            accepted = False
            refused += 1
        texts = tokens + [bytes(rng.choice(b"abc") for _ in range(rng.randint(2, 14))) for _ in range(60)]
        differs = any(encode(text, ranks, set(pairs)) != encode(text, ranks, None)
                      or (not whole and text in ranks and encode(text, ranks, None) != [text]) for text in texts)
        assert accepted != differs, (pairs, whole)
    assert 50 < refused < 350, refused


# ------------------------------------------------------------------------------------------------ writing the output

def in_directory(test):
    """Give a test a written checkpoint and an output path, in a directory of their own."""
    def wrapped():
        with tempfile.TemporaryDirectory() as top:
            source = os.path.join(top, "tiny")
            os.mkdir(source)
            test(Checkpoint().write(source), os.path.join(top, "model.bin"))
    wrapped.__name__ = test.__name__
    return wrapped


def left_beside(out):
    return sorted(os.listdir(os.path.dirname(out)))


@in_directory
def test_without_sendfile(source, out):
    assert run(source, out)[0] == 0
    with open(out, "rb") as file:
        plain = file.read()
    with mock.patch("os.sendfile", side_effect=OSError(errno.EINVAL, "no"), create=True):
        assert run(source, out)[0] == 0
    with open(out, "rb") as file:
        assert file.read() == plain
    real, calls = os.sendfile, []

    def part_of_it(to, source, at, n):          # short counts, then an error in the middle
        calls.append(n)
        if len(calls) % 3 == 0:
            raise OSError(errno.EIO, "flaky")
        return real(to, source, at, min(n, 100))

    with mock.patch("os.sendfile", side_effect=part_of_it):
        assert run(source, out)[0] == 0
    with open(out, "rb") as file:
        assert file.read() == plain


@in_directory
def test_replaces_an_old_output(source, out):
    with open(out, "wb") as file:
        file.write(b"old")
    assert run(source, out)[0] == 0
    parse_model(out)
    inside = os.path.join(source, "model.bin")
    assert run(source, inside)[0] == 0 and run(source, inside)[0] == 0, "an output inside the checkpoint"


@in_directory
def test_output_through_a_link(source, out):
    real = os.path.join(os.path.dirname(out), "elsewhere", "real.bin")
    os.mkdir(os.path.dirname(real))
    os.symlink(real, out)
    for _ in range(2):                          # it does not exist yet; it does
        assert run(source, out)[0] == 0
        assert os.path.islink(out) and not os.path.islink(real)
        parse_model(real)
    assert left_beside(real) == ["real.bin"] and left_beside(out) == ["elsewhere", "model.bin", "tiny"]


@in_directory
def test_a_leftover_part_is_replaced(source, out):
    with open(out + ".part", "wb") as file:
        file.write(bytes(10**6))
    assert run(source, out)[0] == 0 and left_beside(out) == ["model.bin", "tiny"]
    parse_model(out)


@in_directory
def test_a_part_that_is_being_written(source, out):
    with open(out + ".part", "wb") as file:
        file.write(b"half")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        status, stderr = run(source, out)
        assert status == 1 and "another conversion is writing it" in stderr, stderr
        with open(out + ".part", "rb") as other:
            assert other.read() == b"half", "the running one was touched"
    assert left_beside(out) == ["model.bin.part", "tiny"]


@in_directory
def test_a_part_that_is_no_file(source, out):
    os.symlink("/tmp/elsewhere", out + ".part")
    assert run(source, out)[0] == 1 and os.path.islink(out + ".part")
    os.unlink(out + ".part")
    os.mkdir(out + ".part")
    status, stderr = run(source, out)
    assert status == 1 and ".part" in stderr and len(stderr.splitlines()) == 2, stderr


@in_directory
def test_too_little_space(source, out):
    usage = shutil.disk_usage(os.path.dirname(out))
    with mock.patch("shutil.disk_usage", return_value=usage._replace(free=70000)):
        status, stderr = run(source, out)
    assert status == 1 and "space, expected 0.000 GB, found 0.000 GB free" in stderr, stderr
    assert left_beside(out) == ["tiny"]
    with mock.patch("shutil.disk_usage", return_value=usage._replace(free=10**6)):
        assert run(source, out)[0] == 0


@in_directory
def test_short_reads(source, out):
    assert run(source, out)[0] == 0
    with open(out, "rb") as file:
        plain = file.read()
    real = os.pread
    with mock.patch("os.pread", side_effect=lambda fd, n, at: real(fd, min(n, 1000), at)), \
            mock.patch("os.sendfile", side_effect=OSError(errno.EINVAL, "no"), create=True):
        assert run(source, out)[0] == 0
    with open(out, "rb") as file:
        assert file.read() == plain


@in_directory
def test_signals_leave_nothing(source, out):
    with open(out, "wb") as file:
        file.write(b"old")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)       # whoever runs the tests may have it ignored
        with mock.patch("os.sendfile", side_effect=lambda *_: os.kill(os.getpid(), number)):
            status, stderr = run(source, out)
        assert status == 130 and stderr.splitlines()[-1] == "convert.py: interrupted", (status, stderr)
        assert left_beside(out) == ["model.bin", "tiny"]
        with open(out, "rb") as file:
            assert file.read() == b"old"


@in_directory
def test_source_that_shrinks(source, out):
    def shrink(*_):
        os.truncate(os.path.join(source, "model.safetensors"), 6000)
        return 0
    with mock.patch("os.sendfile", side_effect=shrink):
        status, stderr = run(source, out)
    assert status == 1 and "data, expected" in stderr and left_beside(out) == ["tiny"], stderr


@in_directory
def test_full_disk(source, out):
    """A limit on the size of files stands for a full disk: the same path, another errno."""
    process = subprocess.run([sys.executable, SCRIPT, source, out], stderr=subprocess.PIPE, universal_newlines=True,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    assert process.returncode == 1 and "File too large" in process.stderr.splitlines()[-1], process.stderr
    assert left_beside(out) == ["tiny"] and "Traceback" not in process.stderr


@in_directory
def test_refused_outputs(source, out):
    weights = os.path.join(source, "model.safetensors")
    os.symlink(weights, out)
    for path, fragment in ((weights, "expected another file than the input"), (out, "another file than the input"),
                           (source, "expected a regular file"), ("/dev/null", "expected a regular file"),
                           (os.path.join(source, "no", "such"), "expected a file in a directory that is there")):
        status, stderr = run(source, path)
        assert status == 1 and fragment in stderr.splitlines()[-1], (path, stderr)
    with open(weights, "rb") as file:
        assert file.read() == safetensors_bytes(Checkpoint().tensors), "the input was touched"


@in_directory
def test_exit_statuses(source, out):
    for arguments, status in (([], 2), ([source], 2), ([source, out, "--nope"], 2), ([source + "x", out], 1),
                              ([source, out], 0), (["--help"], 0)):
        process = subprocess.run([sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 universal_newlines=True)
        assert process.returncode == status and "Traceback" not in process.stderr, (arguments, process)
        assert "--help" in arguments or process.stdout == "", "standard output is for answers"


# ------------------------------------------------------------------------------------------------------------ refusals

def edits(*pairs):
    """Edits of a checkpoint by path: config/..., generation/..., settings/..., tokenizer/..., files/..."""
    return lambda checkpoint: [checkpoint.edit(path, value) for path, value in zip(pairs[::2], pairs[1::2])]


def tensor(name, dtype=None, shape=None, data=None):
    def edit(checkpoint):
        old = checkpoint.tensors.get(name, ("BF16", [2], bytes(4)))
        checkpoint.tensors[name] = (dtype or old[0], shape or old[1], old[2] if data is None else data)
    return edit


def header(change):
    """Rewrite the header of model.safetensors."""
    def rewrite(data):
        n = int.from_bytes(data[:8], "little")
        fields = json.loads(data[8:8 + n])
        text = change(fields)
        text = json.dumps(fields).encode() if text is None else text
        return struct.pack("<Q", len(text)) + text + data[8 + n:]
    return edits("files/model.safetensors", rewrite)


def set_entry(name, key, value):
    return header(lambda fields: fields[name].__setitem__(key, value))


def raw(name, change):
    return edits("files/" + name, change)


def sharded(index=None, shards=None):
    def edit(checkpoint):
        names = sorted(checkpoint.tensors)
        checkpoint.shards = [names[::2], names[1::2]]
        if shards:
            shards(checkpoint.shards)
        if index:
            def change(weight_map):
                value = {"weight_map": weight_map}
                return index(value) or value
            checkpoint.index = change
    return edit


def in_both_shards(name, index, change=None):
    """The tensor is the last of both shards; the index names one of them for it, or none; the second file changed."""
    def place(shards):
        for shard in shards:
            shard[:] = [each for each in shard if each != name] + [name]

    def edit(checkpoint):
        sharded(lambda value: value["weight_map"].update({name: index}) if index else value["weight_map"].pop(name) and None, place)(
            checkpoint)
        if change:
            checkpoint.edit("files/" + SHARDS[1], change)
    return edit


def map_to(shard):
    return sharded(lambda index: index["weight_map"].__setitem__("model.norm.weight", shard))


def added(**values):
    """A twelfth added token, sound but for these values."""
    token = dict(id=273, content="<|more|>", single_word=False, lstrip=False, rstrip=False, normalized=False,
                 special=True)
    token.update(values)
    return lambda checkpoint: checkpoint.tokenizer["added_tokens"].append(token)


def vocab(change):
    return lambda checkpoint: change(checkpoint.tokenizer["model"]["vocab"])


def model_ranks(data, name="original/tokenizer.model"):
    return edits("files/" + name, data)


EMBED, NORM, Q = "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
INDEX, SHARDS = "model.safetensors.index.json", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BOS_STEP = "tokenizer/post_processor/processors/1/"
CLS = {"SpecialToken": {"id": "<|eot_id|>", "type_id": 0}}
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
NEST = b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"

REFUSALS = [
    # config.json
    ("config missing", "no config.json, so not a checkpoint in HuggingFace layout", raw("config.json", None)),
    ("config cut short", "config.json: JSON that breaks off after 1 bytes", raw("config.json", b"{")),
    ("config not JSON", "config.json: not valid JSON", raw("config.json", b'{"a" 1}')),
    ("config empty", "an empty file of 0 bytes, an incomplete download", raw("config.json", b"")),
    ("config not UTF-8", "config.json: not valid JSON", raw("config.json", b'{"a": "\xff"}')),
    ("config with NaN", "not valid JSON: NaN", raw("config.json", b'{"a": NaN}')),
    ("config a list", "config.json: JSON, expected an object, found []", raw("config.json", b"[]")),
    ("config nested", "nested too deeply", raw("config.json", NEST)),
    ("config nested less", "architectures, expected", edits("config/architectures", json.loads("[" * 400 + "]" * 400))),
    ("config duplicate key", 'duplicate key "a"', raw("config.json", b'{"a": 1, "a": 2}')),
    ("config endless integer", "config.json: ", raw("config.json", b'{"vocab_size": ' + b"9" * 9999 + b"}")),
    ("other model type", 'model_type, expected "llama", found "mllama"', edits("config/model_type", "mllama")),
    ("other architecture", "LlamaForSequenceClassification",
     edits("config/architectures", ["LlamaForSequenceClassification"])),
    ("no architecture", 'architectures, expected ["LlamaForCausalLM"] or ["LlamaModel"], found null',
     edits("config/architectures", DELETE)),
    ("attention bias", "attention_bias, expected false or none, found true", edits("config/attention_bias", True)),
    ("mlp bias", "mlp_bias, expected false", edits("config/mlp_bias", True)),
    ("activation", 'hidden_act, expected "silu" or none, found "gelu"', edits("config/hidden_act", "gelu")),
    ("quantised", "a quantised checkpoint (gptq, 4 bits): convert the one that it was made from",
     edits("config/quantization_config", {"bits": 4, "quant_method": "gptq"})),
    ("quantised by bitsandbytes", "a quantised checkpoint (bitsandbytes, 8 bits)",
     edits("config/quantization_config", {"load_in_8bit": True, "quant_method": "bitsandbytes"})),
    ("quantised by mlx", "a quantised checkpoint (mlx, 4 bits)", edits("config/quantization", {"group_size": 64, "bits": 4})),
    ("quantised tensors", "q_proj.qweight\": a quantised checkpoint", tensor("model.layers.0.self_attn.q_proj.qweight")),
    ("quantised dtype", "dtype I8: a quantised checkpoint", lambda c: tensor(Q, "I8", data=bytes(1024))(c)),
    ("sliding window", "sliding_window, expected none, found 4096", edits("config/sliding_window", 4096)),
    ("chunked attention", "attention_chunk_size, expected none, found 8192", edits("config/attention_chunk_size", 8192)),
    ("not causal", "is_causal, expected true or none, found false", edits("config/is_causal", False)),
    ("adapter beside weights", "a model with an adapter beside it (adapter_config.json)", raw("adapter_config.json", b"{}")),
    ("weights elsewhere", 'transformers_weights, expected none or "model.safetensors", found "tuned.safetensors"',
     edits("config/transformers_weights", "tuned.safetensors")),
    ("layer types", "layer_types", edits("config/layer_types", ["sliding_attention"])),
    ("vision", "vision_config, expected none", edits("config/vision_config", {})),
    ("partial rotary", "partial_rotary_factor, expected 1 or none, found 0.5",
     edits("config/partial_rotary_factor", 0.5)),
    ("dim missing", "hidden_size, expected an integer from 1 to 2147483647, found null",
     edits("config/hidden_size", DELETE)),
    ("dim a string", 'hidden_size, expected an integer from 1 to 2147483647, found "32"',
     edits("config/hidden_size", "32")),
    ("dim a bool", "hidden_size, expected an integer", edits("config/hidden_size", True)),
    ("dim a float", "hidden_size, expected an integer from 1 to 2147483647, found 32.0",
     edits("config/hidden_size", 32.0)),
    ("layers negative", "num_hidden_layers, expected an integer", edits("config/num_hidden_layers", -1)),
    ("layers zero", "num_hidden_layers, expected an integer", edits("config/num_hidden_layers", 0)),
    ("layers a billion", "model.layers.2.input_layernorm.weight, expected a tensor, found none",
     edits("config/num_hidden_layers", 10**9)),
    ("layers beyond 32 bits", "num_hidden_layers, expected an integer", edits("config/num_hidden_layers", 2**31)),
    ("vocabulary zero", "vocab_size, expected an integer from 1", edits("config/vocab_size", 0)),
    ("vocabulary huge", "vocab_size, expected an integer from 1 to 16777216", edits("config/vocab_size", 2**30)),
    ("heads not divisible", "num_attention_heads, expected a multiple of num_key_value_heads 3, found 4",
     edits("config/num_key_value_heads", 3)),
    ("dim not divisible", "hidden_size, expected a multiple of num_attention_heads 6, found 32",
     edits("config/num_attention_heads", 6)),
    ("odd head_dim", "head_dim, expected an even number", edits("config/head_dim", 7)),
    ("tie a string", 'tie_word_embeddings, expected a JSON bool, found "yes"',
     edits("config/tie_word_embeddings", "yes")),
    ("eps zero", "rms_norm_eps, expected a positive number, found 0", edits("config/rms_norm_eps", 0)),
    ("eps missing", "rms_norm_eps, expected a positive number, found null", edits("config/rms_norm_eps", None)),
    ("eps infinite", "rms_norm_eps, expected a positive number", raw("config.json", lambda data: data.replace(
        b"1e-05", b"1e999"))),
    # RoPE
    ("rope linear without factor", "rope_scaling: factor, expected a positive number, found null",
     edits("config/rope_scaling", {"type": "linear"})),
    ("rope dynamic", 'rope_scaling: rope_type, expected default, linear or llama3, found "dynamic"',
     edits("config/rope_scaling", {"type": "dynamic", "factor": 2.0})),
    ("rope yarn", 'rope_parameters: rope_type, expected default, linear or llama3, found "yarn"',
     edits("config/rope_parameters", {"rope_type": "yarn"}, "config/rope_scaling", None)),
    ("rope not a name", "rope_type, expected default, linear or llama3, found 3", edits("config/rope_scaling/rope_type", 3)),
    ("rope type twice", 'type, expected "llama3" or none, found "linear"', edits("config/rope_scaling/type", "linear")),
    ("rope a list", "rope_scaling: JSON, expected an object", edits("config/rope_scaling", [1])),
    ("rope by layer type", "rope_parameters: parameters, expected one set for all layers",
     edits("config/rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "config/rope_scaling", None)),
    ("rope both layouts", 'rope_scaling, expected what rope_parameters says, found {"rope_type": "llama3", "factor": 8.0,',
     edits("config/rope_parameters", {"rope_type": "default"})),
    ("rope both layouts, theta in one", 'found {"rope_theta": 10000.0}, which is what transformers reads, as rope_scaling replaces '
     "rope_parameters and its rope_theta: delete rope_scaling if rope_parameters is right, else rope_parameters",
     lambda c: c.config.update(rope_parameters=dict(c.config["rope_scaling"], rope_theta=c.config.pop("rope_theta")))),
    ("rope both layouts, two thetas", 'found {"rope_theta": 1000000.0}, which is what transformers reads',
     lambda c: (c.config.update(rope_parameters=dict(c.config["rope_scaling"])), edits("config/rope_scaling/rope_theta", 1e6)(c))),
    ("rope both layouts, one a list", "rope_scaling: JSON, expected an object", edits(
        "config/rope_parameters", {"rope_type": "default"}, "config/rope_scaling", [1])),
    ("rope thetas", "rope_theta, expected one value, found [10000.0, 500000.0]",
     edits("config/rope_parameters", {"rope_theta": 10000.0}, "config/rope_scaling", None)),
    ("rope theta negative", "rope_theta, expected a positive number", edits("config/rope_theta", -1.0)),
    ("rope theta a string", "rope_theta, expected a positive number", edits("config/rope_theta", "1e4")),
    ("rope factor missing", "factor, expected a positive number, found null",
     edits("config/rope_scaling/factor", DELETE)),
    ("rope low above high", "low_freq_factor, expected less than high_freq_factor 4.0, found 4.0",
     edits("config/rope_scaling/low_freq_factor", 4.0)),
    ("rope original length", "original_max_position_embeddings, expected an integer",
     edits("config/rope_scaling/original_max_position_embeddings", 8192.0)),
    ("rope partial", "rope_scaling: partial_rotary_factor", edits("config/rope_scaling/partial_rotary_factor", 0.25)),
    # end ids
    ("end id too large", "eos_token_id, expected ids from 0 to 279, found 280", edits("generation/eos_token_id", 280)),
    ("end id a string", 'eos_token_id, expected ids from 0 to 279, found "263"',
     edits("generation/eos_token_id", "263")),
    ("end id in a list", "eos_token_id, expected ids", edits("generation/eos_token_id", [263, True])),
    ("end id in config", "config.json: eos_token_id, expected ids from 0 to 279, found -1",
     edits("generation/eos_token_id", None, "config/eos_token_id", -1)),
    # files of weights
    ("no weights", "weights, expected model.safetensors, or shards of it, found neither, an incomplete download",
     raw("model.safetensors", None)),
    ("pickle only", "pytorch_model.bin", edits("files/model.safetensors", None, "files/pytorch_model.bin", b"PK")),
    ("gguf only", "model.gguf\" (a GGUF file: convert the checkpoint that it was made from)", edits("files/model.safetensors", None, "files/model.gguf", b"GGUF")),
    ("gguf inside", "expected safetensors, found a GGUF file", raw("model.safetensors", b"GGUF\3\0\0\0" + bytes(50))),
    ("pickle inside", "found a PyTorch pickle file", raw("model.safetensors", b"PK\3\4\0\0\x08\x08" + bytes(50))),
    ("git lfs pointer", "found a Git LFS pointer", raw("model.safetensors", b"version https://git-lfs.github.com/")),
    ("weights empty", "size, expected at least 8 bytes, found 0", raw("model.safetensors", b"")),
    ("weights of 7 bytes", "size, expected at least 8 bytes, found 7", raw("model.safetensors", bytes(7))),
    ("header beyond file", "size, expected at least 65543 bytes, a header and the tensors, found 10, an incomplete download",
     raw("model.safetensors", b"\xff\xff\0\0\0\0\0\0{}")),
    ("header of 2^63", "expected safetensors, found a header of 9223372036854775808 bytes", raw("model.safetensors", b"\0" * 7 + b"\x80{}")),
    ("header not JSON", "not valid JSON", raw("model.safetensors", struct.pack("<Q", 4) + b"{1}}")),
    ("header a list", "expected safetensors, found a header of 2 bytes that begins with", header(lambda fields: b"[]")),
    ("header nested", "nested too deeply", header(lambda fields: NEST)),
    ("header duplicate", 'duplicate key "x"', header(lambda fields: b'{"x":{},"x":{}}')),
    ("tensor named by a surrogate", '"\\ud800", expected no such tensor', tensor("\ud800")),
    ("metadata of numbers", "__metadata__, expected strings",
     header(lambda fields: fields["__metadata__"].update(a=1))),
    ("entry not an object", "JSON, expected an object", header(lambda fields: fields.update(a=1))),
    ("dtype unknown", "dtype, expected", set_entry(NORM, "dtype", "F4")),
    ("dtype a list", "dtype, expected", set_entry(NORM, "dtype", ["F32"])),
    ("shape not a list", "shape, expected a JSON list", set_entry(NORM, "shape", 32)),
    ("shape negative", "shape, expected a list of sizes", set_entry(NORM, "shape", [-32])),
    ("shape of bools", "shape, expected a list of sizes", set_entry(NORM, "shape", [32, True])),
    ("shape times dtype", "bytes, expected 66, found 64", set_entry(NORM, "shape", [33])),
    ("shape that wraps", "bytes, expected", set_entry(NORM, "shape", [2**32, 2**32])),
    ("shape of 8000 digits", "bytes, expected", set_entry(NORM, "shape", [10**4000] * 2)),
    ("offsets reversed", "data_offsets, expected two offsets", set_entry(NORM, "data_offsets", [64, 0])),
    ("offsets beyond", "bytes, by its header, found", set_entry(NORM, "data_offsets", [10**9, 10**9 + 64])),
    ("offsets of three", "data_offsets, expected two offsets", set_entry(NORM, "data_offsets", [0, 64, 64])),
    ("overlap", "data, expected to start at", set_entry(NORM, "data_offsets", [0, 64])),
    ("hole", "data, expected to start at", header(lambda fields: fields.pop(EMBED) and None)),
    ("bytes after the end", "data, expected", raw("model.safetensors", lambda data: data + b"\0")),
    ("truncated data", "bytes, by its header, found", raw("model.safetensors", lambda data: data[:-1])),
    ("truncated much", "an incomplete download: hf download", raw("model.safetensors", lambda data: data[:9000])),
    # tensors
    ("tensor missing", EMBED + ", expected a tensor, found none", lambda checkpoint: checkpoint.tensors.pop(EMBED)),
    ("head missing", "lm_head.weight, expected a tensor, found none",
     lambda checkpoint: checkpoint.tensors.pop("lm_head.weight")),
    ("surplus bias", '"model.layers.0.self_attn.q_proj.bias", expected no such tensor',
     tensor("model.layers.0.self_attn.q_proj.bias")),
    ("surplus layer", "surplus", tensor("model.layers.2.input_layernorm.weight")),
    ("tied with another head", 'set "tie_word_embeddings": false in config.json',
     edits("config/tie_word_embeddings", True)),
    ("wrong shape", Q + ": shape, expected [32, 32], found [16, 64]", tensor(Q, shape=[16, 64])),
    ("norm of two dimensions", NORM + ": shape, expected [32], found [32, 1]", tensor(NORM, shape=[32, 1])),
    ("integer weights", "dtype, expected BF16 or F16 or F32, found \"I64\"", tensor(Q, "I64", data=bytes(8192))),
    ("mixed dtypes", Q + ": dtype, expected BF16 as model.layers.0.self_attn.q_proj.weight has, found \"F16\"", tensor(Q, "F16")),
    ("norm NaN", NORM + "[1], expected a finite number, found NaN",
     tensor(NORM, data=b"\x80\x3f\xc0\x7f" + bytes(60))),
    ("norm infinite", "expected a finite number, found -Infinity", tensor(NORM, data=b"\x80\xff" * 32)),
    ("cannot be aligned", "bytes of tok_embeddings [275, 36] and output [275, 36], expected multiples of 16",
     lambda checkpoint: checkpoint.__init__(hidden_size=36, head_dim=8, intermediate_size=40, vocab_size=275)),
    # shards
    ("index not JSON", INDEX + ": not valid JSON", lambda c: (sharded()(c), raw(INDEX, b"]")(c))),
    ("index without map", "weight_map, expected a JSON dict", sharded(lambda index: index.clear())),
    ("shard a number", "expected a plain file name", map_to(7)),
    ("shard up", "expected a plain file name", map_to("../model.safetensors")),
    ("shard absolute", "expected a plain file name", map_to("/etc/passwd")),
    ("shard in a folder", "expected a plain file name", map_to("sub/model.safetensors")),
    ("shard with NUL", "expected a plain file name", map_to("a\0b")),
    ("shard dots", "expected a plain file name", map_to("..")),
    ("shard missing", "model-00002-of-00002.safetensors: not there, 1 of 2 shards are missing: an incomplete download",
     lambda c: (sharded()(c), raw("model-00002-of-00002.safetensors", None)(c))),
    ("tensor in no shard", "model.norm.weight, expected a tensor, found none",
     sharded(shards=lambda shards: [shard.remove(NORM) for shard in shards if NORM in shard], index=lambda index:
             index["weight_map"].__setitem__(NORM, "model-00002-of-00002.safetensors"))),
    ("tensor in two shards, the first in the index", SHARDS[0] + ", found another of that name (transformers reads",
     in_both_shards(NORM, SHARDS[0], lambda data: data[:-2] + b"\0\0")),
    ("tensor in two shards, the second in the index", SHARDS[0] + ", found another of that name (transformers reads",
     in_both_shards(NORM, SHARDS[1], lambda data: data[:-2] + b"\0\0")),
    ("tensor in two shards, none in the index", SHARDS[0] + ", found another of that name (transformers reads",
     in_both_shards(NORM, None, lambda data: data[:-2] + b"\0\0")),
    ("tensor in two shards, of two dtypes", SHARDS[0] + ", found another of that name (transformers reads",
     in_both_shards(NORM, SHARDS[0], lambda data: b'"F16" '.join(data.rsplit(b'"BF16"', 1)))),
    # tokenizer.json
    ("no tokenizer", "tokenizer, expected tokenizer.json or original/tokenizer.model, found neither, an incomplete download",
     raw("tokenizer.json", None)),
    ("tokenizer cut short", "tokenizer.json: JSON that breaks off after", raw("tokenizer.json", lambda data: data[:-20])),
    ("tokenizer without model", "tokenizer.json: model: JSON, expected an object, found null",
     edits("tokenizer/model", DELETE)),
    ("unigram", 'the tokenizer is not LLaMA 3\'s: its model is "Unigram"', edits("tokenizer/model/type", "Unigram")),
    ("normalizer", 'not LLaMA 3\'s: it changes texts before it splits them (normalizer {"type": "NFC"})',
     edits("tokenizer/normalizer", {"type": "NFC"})),
    ("no pre_tokenizer", "not LLaMA 3's: it splits texts by another rule (pre_tokenizer null)",
     edits("tokenizer/pre_tokenizer", None)),
    ("GPT-2 pre_tokenizer", "not LLaMA 3's: it splits texts by another rule",
     edits("tokenizer/pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False})),
    ("other pattern", "not LLaMA 3's: it splits texts by another pattern", edits("tokenizer/pre_tokenizer/pretokenizers/0/pattern/Regex",
                                                 PATTERN.replace("{1,3}", ""))),
    ("pattern as a string", "not LLaMA 3's: it splits texts by another pattern", edits("tokenizer/pre_tokenizer/pretokenizers/0/pattern",
                                                       {"String": PATTERN})),
    ("split removed", 'not LLaMA 3\'s: it splits texts by another rule (behavior "Removed")', edits("tokenizer/pre_tokenizer/pretokenizers/0/behavior",
                                                             "Removed")),
    ("split inverted", "not LLaMA 3's: it splits texts by another rule (invert true)", edits("tokenizer/pre_tokenizer/pretokenizers/0/invert", True)),
    ("third step", "not LLaMA 3's: it splits texts by another rule",
     lambda c: c.tokenizer["pre_tokenizer"]["pretokenizers"].append({"type": "Digits"})),
    ("prefix space", "not LLaMA 3's: it splits texts by another rule (add_prefix_space true)",
     edits("tokenizer/pre_tokenizer/pretokenizers/1/add_prefix_space", True)),
    ("regex by default", "not LLaMA 3's: it splits texts by another rule (use_regex null)",
     edits("tokenizer/pre_tokenizer/pretokenizers/1/use_regex", DELETE)),
    ("no decoder", "not LLaMA 3's: it does not join tokens as bytes (decoder null)", edits("tokenizer/decoder", None)),
    ("other decoder", 'not LLaMA 3\'s: it does not join tokens as bytes (decoder {"type": "Metaspace"})',
     edits("tokenizer/decoder", {"type": "Metaspace"})),
    ("byte fallback", "not LLaMA 3's: it is SentencePiece's BPE with byte fallback, as LLaMA 2's", edits("tokenizer/model/byte_fallback", True)),
    ("unknown token", 'not LLaMA 3\'s: unk_token is "<unk>"', edits("tokenizer/model/unk_token", "<unk>")),
    ("dropout", "not LLaMA 3's: dropout is 0.1", edits("tokenizer/model/dropout", 0.1)),
    ("subword prefix", "continuing_subword_prefix", edits("tokenizer/model/continuing_subword_prefix", "##")),
    ("word suffix", "end_of_word_suffix", edits("tokenizer/model/end_of_word_suffix", "</w>")),
    ("vocabulary a list", "vocab, expected a JSON dict", edits("tokenizer/model/vocab", [])),
    ("id a string", "expected a text and an id of its own", vocab(lambda v: v.update(a="97"))),
    ("id negative", "expected a text and an id of its own", vocab(lambda v: v.update(a=-1))),
    ("id twice", "expected a text and an id of its own", vocab(lambda v: v.update({text_of(b"an"): 256}))),
    ("empty token", 'token "", expected a text', vocab(lambda v: v.update({"": v.pop(LAST)}))),
    ("not of the alphabet", "is not written in characters that stand for bytes",
     vocab(lambda v: v.update({"\u4e00": v.pop(LAST)}))),
    ("surrogate token", "is not written in characters that stand for bytes", vocab(lambda v: v.update({"\ud800": v.pop(LAST)}))),
    ("gap in the ids", "token ids, expected 0 to 261 without a gap, found none with id 261",
     vocab(lambda v: v.update({text_of(b"\xc3\xa9"): 262}))),
    ("byte missing", "token of the single byte 0x61, expected one, found none",
     vocab(lambda v: (v.pop("a"), v.update({"ab": 97})))),
    # merges
    ("merges missing", "merges, expected a JSON list", edits("tokenizer/model/merges", DELETE)),
    ("merge of three", "merge 0, expected a pair of tokens", edits("tokenizer/model/merges/0", ["a", "b", "c"])),
    ("merge without space", "merge 0, expected a pair of tokens", edits("tokenizer/model/merges/0", "th")),
    ("merge of numbers", "merge 0, expected a pair of tokens", edits("tokenizer/model/merges/0", [1, 2])),
    ("merge not in vocabulary", "merge 0, expected tokens of the vocabulary",
     edits("tokenizer/model/merges/0", ["q", "q"])),
    ("merges out of order", "merge 1, expected merges in the order of the ids",
     lambda c: c.tokenizer["model"]["merges"].reverse()),
    ("merge left out", "expected merges as by rank", edits("tokenizer/model/merges/0", DELETE)),
    ("no merges at all", "expected merges as by rank", edits("tokenizer/model/merges", [])),
    ("ignore_merges a number", "ignore_merges, expected a JSON bool", edits("tokenizer/model/ignore_merges", 1)),
    ("ignore_merges false", "ignore_merges, expected true, since merges do not make token 262",
     lambda c: (edits("tokenizer/model/ignore_merges", False, "tokenizer/added_tokens", [],
                      "tokenizer/post_processor", None)(c), c.tokenizer["model"]["vocab"].update(xyz=262))),
    # added tokens
    ("added tokens an object", "added_tokens, expected a JSON list", edits("tokenizer/added_tokens", {})),
    ("added token a string", "JSON, expected an object", edits("tokenizer/added_tokens/3", "x")),
    ("added with lstrip", "lstrip, expected false", added(lstrip=True)),
    ("added with rstrip", "rstrip, expected false", added(rstrip=True)),
    ("added single_word", "single_word, expected false", added(single_word=True)),
    ("added special a number", "special, expected a JSON bool", added(special=1)),
    ("added after a gap", "id, expected a new text and 273, which HuggingFace would give it, found 274", added(id=274)),
    ("added twice", "id, expected a new text", added(content="<|eot_id|>")),
    ("added empty", "id, expected a new text", added(content="")),
    ("added of a surrogate", "added token 273", added(content="\ud800")),
    ("added id a string", "id, expected a new text", added(id="273")),
    ("added an ordinary token", 'added token "!", expected an id after those of ordinary tokens, found 33',
     added(id=33, content="!")),
    ("vocabulary too small", "vocab_size, expected at least the tokenizer's 262 ids, found 200",
     lambda c: c.__init__(vocab_size=200)),
    ("vocabulary without BOS", "expected more than 262, the id of \"<|begin_of_text|>\", which begins every text, found 262",
     lambda c: c.__init__(vocab_size=262)),
    ("vocabulary without an added token", "expected more than 280, the id of \"<7>\", which a text may hold, found 280: the "
     "embeddings were not resized", lambda c: [added(id=273 + i, content="<%d>" % i, special=False)(c) for i in range(8)]),
    # post-processor
    ("end token added", "single, expected at most one special token, then the text",
     lambda c: c.tokenizer["post_processor"]["processors"][1]["single"].append(CLS)),
    ("two tokens before", "single, expected at most one special token",
     lambda c: c.tokenizer["post_processor"]["processors"][1]["single"].insert(0, CLS)),
    ("single missing", "single, expected at most one", edits(BOS_STEP + "single", DELETE)),
    ("bos id unknown", "single, expected at most one", edits(BOS_STEP + "special_tokens/<|begin_of_text|>/ids", [5])),
    ("bos of two ids", "single, expected at most one",
     edits(BOS_STEP + "special_tokens/<|begin_of_text|>/ids", [262, 262])),
    ("other post-processor", 'post_processor: type, expected "TemplateProcessing"',
     edits("tokenizer/post_processor", {"type": "BertProcessing"})),
    # tokenizer_config.json
    ("bos a number", "add_bos_token, expected a JSON bool", edits("settings/add_bos_token", 1)),
    ("special tokens split", "split_special_tokens, expected false", edits("settings/split_special_tokens", True)),
    ("pad token unknown", 'pad_token: content, expected an added token of tokenizer.json, found "[PAD]"',
     edits("settings/pad_token", "[PAD]")),
    ("pad token ordinary", "pad_token: content, expected an added token", edits("settings/pad_token", "!")),
    ("pad token strips", "pad_token: lstrip, expected false",
     edits("settings/pad_token", {"content": "<|eot_id|>", "lstrip": True})),
    ("decoder of other ids", "263: content, expected an added token",
     edits("settings/added_tokens_decoder", {"263": {"content": "<|begin_of_text|>"}})),
    ("extra tokens unknown", "additional_special_tokens: content", edits("settings/additional_special_tokens", ["x"])),
    ("token of odd type", "sep_token: content", edits("settings/sep_token", ["x"])),
    # other files that add tokens
    ("added token elsewhere", "added_tokens.json: \"<foo>\", expected the id of that added token",
     raw("added_tokens.json", b'{"<foo>": 274}')),
    ("added token of another id", "added_tokens.json: \"<|begin_of_text|>\", expected the id of that added token in "
     "tokenizer.json, found 263", raw("added_tokens.json", b'{"<|begin_of_text|>": 263}')),
    ("special map with a pad token", 'special_tokens_map.json: pad_token: content, expected an added token',
     raw("special_tokens_map.json", b'{"pad_token": "<pad>"}')),
    # tokenizer.model
    ("SentencePiece", "expected tiktoken ranks, found a binary file: SentencePiece, LLaMA 2's kind of tokenizer",
     lambda c: (model_ranks(SENTENCEPIECE, "tokenizer.model")(c), raw("tokenizer.json", None)(c))),
    ("SentencePiece beside JSON", "SentencePiece, LLaMA 2's kind of tokenizer", model_ranks(SENTENCEPIECE, "tokenizer.model")),
    ("ranks differ", "token 257, expected b' th' as elsewhere, found b' tx'",
     lambda c: model_ranks(ranks_file(c.ranks[:257] + [b" tx"] + c.ranks[258:]))(c)),
    ("ranks shorter", "token 261", lambda c: model_ranks(ranks_file(c.ranks[:-1]))(c)),
    ("ranks not base64", "line 263, expected base64", lambda c: model_ranks(ranks_file(c.ranks) + b"!! 262")(c)),
    ("rank not a number", "line 263, expected base64", lambda c: model_ranks(ranks_file(c.ranks) + b"eHg= -1")(c)),
    ("rank twice", "line 263, expected base64 of a token and a rank of its own",
     lambda c: model_ranks(ranks_file(c.ranks) + b"eHg= 5")(c)),
    ("ranks with a gap", "expected 0 to 262 without a gap",
     lambda c: model_ranks(ranks_file(c.ranks) + b"eHg= 300")(c)),
    ("token twice", "token 262, expected each token once, found b'a', which is token 97",
     lambda c: model_ranks(ranks_file(c.ranks) + b"YQ== 262")(c)),
    ("ranks empty", "single byte 0x00", model_ranks(b"")),
    ("ranks with another bos", "bos_token_id, expected 262 or none, found 1",
     lambda c: (model_ranks(ranks_file(c.ranks))(c), edits("files/tokenizer.json", None, "config/bos_token_id", 1)(c))),
]


def refusal_test(fragment, change):
    def test():
        checkpoint = Checkpoint()
        change(checkpoint)
        with tempfile.TemporaryDirectory() as top:
            source, out = os.path.join(top, "tiny"), os.path.join(top, "model.bin")
            os.mkdir(source)
            status, stderr = run(checkpoint.write(source), out)
            lines = stderr.splitlines()
            assert status == 1, "exit %s, expected 1: %s" % (status, stderr)
            assert lines[-1].startswith("convert.py: ") and fragment in lines[-1], "found " + lines[-1]
            assert len(lines) == 1 or all(": the special tokens" in line for line in lines[:-1]), "found " + stderr
            assert left_beside(out) == ["tiny"], "left %s" % left_beside(out)
    return test


def test_files_that_are_no_directory():
    with tempfile.TemporaryDirectory() as top:
        source, out = os.path.join(top, "in"), os.path.join(top, "out")
        for data, flags, fragment in (
                (b"GGUF\3\0\0\0", [], "expected a directory in HuggingFace layout, found a GGUF file: convert the checkpoint"),
                (safetensors_bytes({}), [], "expected a directory in HuggingFace layout, found a file"),
                (b"GGUF\3\0\0\0", ["--vocab-only"], "expected tiktoken ranks, found a GGUF file"),
                (b"{}", ["--vocab-only"], "expected tiktoken ranks, found JSON"),
                (b"\x80\x02}q\x01", ["--vocab-only"], "expected tiktoken ranks, found a pickle file"),
                (b"YQ== 0\n", ["--vocab-only"], "single byte 0x00")):
            with open(source, "wb") as file:
                file.write(data)
            status, stderr = run(*flags, source, out)
            assert status == 1 and fragment in stderr and len(stderr.splitlines()) == 1, (data, stderr)
            assert left_beside(out) == ["in"]


def test_mutated_files():
    """Seeded damage to every file: converted or refused in one line, never a traceback, never a half file."""
    rng, refused = random.Random(3), 0
    values = (None, True, -1, 0, 2**64, 1.5, "", "x", "\ud800", [], {}, [None], {"type": "x"}, [[1]], 1e300)

    def nodes(value, parent=None, key=None):
        if parent is not None:
            yield parent, key
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for inner, each in list(items)[:40]:
            yield from nodes(each, value, inner)

    with tempfile.TemporaryDirectory() as top:
        for i in range(240):
            checkpoint = Checkpoint()
            checkpoint.files["original/tokenizer.model"] = ranks_file(checkpoint.ranks)
            if i % 4:                           # a value of another type or size somewhere in a JSON file
                tree = rng.choice((checkpoint.config, checkpoint.generation, checkpoint.settings, checkpoint.tokenizer,
                                   checkpoint.tokenizer))
                parent, key = rng.choice(list(nodes(tree)))
                parent[key] = copy.deepcopy(rng.choice(values))
            else:                               # bytes cut off, flipped or repeated
                name = rng.choice(("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
                                   "model.safetensors", "original/tokenizer.model"))

                def damage(data):
                    data = data or ranks_file(checkpoint.ranks)
                    at = rng.randrange(min(len(data), 4000))
                    return rng.choice((data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1:],
                                       data[:at] + data[at // 2:]))
                checkpoint.files[name] = damage
            source, out = os.path.join(top, "tiny%d" % i), os.path.join(top, "model.bin")
            os.mkdir(source)
            status, stderr = run(checkpoint.write(source), out)
            shutil.rmtree(source)
            last = stderr.splitlines()[-1]
            if status == 0:
                parse_model(out)
                os.unlink(out)
            else:
                refused += 1
                assert status == 1 and last.startswith("convert.py: "), (i, status, stderr)
                assert os.listdir(top) == [], os.listdir(top)
    assert 120 < refused < 240, refused


# ---------------------------------------------------------------------------------------------- the reference files

def shared(*parts):
    path = os.path.join(SHARED, *parts)
    if not os.path.exists(path):
        raise Skip("no ../shared/%s" % "/".join(parts))
    return path


def read_safetensors(path):
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[start:][slice(*entry["data_offsets"])])
            for name, entry in entries.items()}


def test_reference_checkpoints():
    directory = shared("reference")
    names = sorted(name for name in os.listdir(directory) if os.path.isdir(os.path.join(directory, name)))
    assert names, "no checkpoint in " + directory
    for name in names:
        source = os.path.join(directory, name)
        with tempfile.TemporaryDirectory() as top:
            status, stderr = run(source, os.path.join(top, "model.bin"))
            assert status == 0, stderr
            metadata, tensors = parse_model(os.path.join(top, "model.bin"))
        weights = {}
        for file in os.listdir(source):
            if file.startswith("model") and file.endswith(".safetensors"):
                weights.update(read_safetensors(os.path.join(source, file)))
        check_weights(tensors, weights)
        with open(os.path.join(source, "config.json")) as file:
            config = json.load(file)
        with open(os.path.join(source, "tokenizer.json")) as file:
            tokenizer = json.load(file)
        bytes_of = {character: byte for byte, character in byte_characters().items()}
        wanted = [(b"", 2)] * config["vocab_size"]
        for text, i in tokenizer["model"]["vocab"].items():
            wanted[i] = (bytes(bytes_of[character] for character in text), 0)
        for token in tokenizer["added_tokens"]:
            wanted[token["id"]] = (token["content"].encode(), 1)
        assert vocabulary_of(tensors) == wanted, name
        assert int(metadata["bos_id"]) == config["bos_token_id"] and metadata["source"] == name


def test_llama3_vocabulary():
    ranks, table = shared("tokenizer", "tokenizer.model"), shared("tokenizer", "special_tokens.tsv")
    with tempfile.TemporaryDirectory() as top:
        status, stderr = run("--vocab-only", ranks, os.path.join(top, "vocab.bin"))
        assert status == 0, stderr
        metadata, tensors = parse_model(os.path.join(top, "vocab.bin"))
    vocabulary = vocabulary_of(tensors)
    with open(ranks, "rb") as file:
        for line in file:
            token, rank = line.split()
            assert vocabulary[int(rank)] == (base64.b64decode(token), 0), rank
    with open(table, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    assert [token for token, kind in vocabulary[128000:] if kind == 1] == [row[2].encode() for row in rows]
    assert (metadata["bos_id"], metadata["eos_ids"]) == ("128000", "128001,128008,128009")


# ---------------------------------------------------------------------------------------------------------------- main

def run_tests(tests):
    """Runs (name, function) pairs whose name has the first argument in it; the exit status."""
    if len(sys.argv) > 1:
        os.environ["ONLY"] = sys.argv[1]
    counts = {"ok": 0, "FAIL": 0, "SKIP": 0}
    for name, test in tests:
        if not wanted(name):
            continue
        verdict, why = "ok", ""
        try:
            test()
        except Skip as skip:
            verdict, why = "SKIP", str(skip)
        except Exception as error:              # a failed assertion, or a crash of the program: both fail the test
            verdict, why = "FAIL", "%s: %s" % (type(error).__name__, str(error)[:500])
        counts[verdict] += 1
        print("%s %s%s" % (verdict, name, why and ": " + " ".join(why.split("\n"))), flush=True)
    print("%(ok)d passed, %(FAIL)d failed, %(SKIP)d skipped" % counts)
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(run_tests([(name, test) for name, test in globals().items() if name.startswith("test_") and callable(test)]
                       + [("refuses: " + name, refusal_test(fragment, change)) for name, fragment, change in REFUSALS]))
