#!/usr/bin/env python3
"""Tests scripts/convert.py on checkpoints that are quantised already: small ones that compressed-tensors and transformers
wrote (tests/vectors/quantised, made by scripts/gen_quantised.py) are converted, every code, scale and weight of model.bin is
compared with what the libraries make of them, and engine cpu with the float32 model of these weights; changed ones are
refused or fail.

    python3 tests/test_convert_quantised.py [part of a test's name]

Standard library only; the program is ./llama, or what LLAMA names.
"""
import functools
import hashlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile

import test_convert
from test_convert import ROOT, Checkpoint, Skip, parse_model, read_safetensors, run, safetensors_bytes

LLAMA = os.environ.get("LLAMA") or "./llama"
VECTORS = os.path.join(ROOT, "tests", "vectors", "quantised")
NAMES = ("ct-fp8-channel", "ct-fp8-tensor", "ct-int8-channel", "ct-int4-group", "ct-int4-channel", "fbgemm-fp8", "fp8-tensor",
         "fp8-row")
TYPES = {"ct-fp8-channel": {"F8_E4M3"}, "ct-fp8-tensor": {"F8_E4M3", "BF16"}, "ct-int8-channel": {"I8"},
         "ct-int4-group": {"U8", "I8"}, "ct-int4-channel": {"U8", "I8"}, "fbgemm-fp8": {"F8_E4M3", "BF16"},
         "fp8-tensor": {"F8_E4M3"}, "fp8-row": {"F8_E4M3"}}     # of the matrices of layers and the output
test_convert.ITEM_BYTES.update(I8=1, F8_E4M3=1, I32=4)
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


class Quantised:
    """A checkpoint of the libraries, which a test may change, with a tokenizer beside it."""

    def __init__(self, name):
        with open(os.path.join(VECTORS, name, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        self.files = {}                         # name -> tensors
        for file in sorted(os.listdir(os.path.join(VECTORS, name))):
            if file.startswith("model") and file.endswith(".safetensors"):
                self.files[file] = read_safetensors(os.path.join(VECTORS, name, file))
        self.index = os.path.join(VECTORS, name, "model.safetensors.index.json")

    @property
    def tensors(self):
        return {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}

    def file_of(self, name):
        return next((tensors for tensors in self.files.values() if name in tensors), next(iter(self.files.values())))

    def put(self, name, dtype, shape, data):
        self.file_of(name)[name] = (dtype, shape, data)

    def change(self, name, function):
        dtype, shape, data = self.tensors[name]
        changed = bytearray(data)
        function(changed)
        self.put(name, dtype, shape, bytes(changed))

    def weights(self, group="group_0"):
        return self.config["quantization_config"]["config_groups"][group]["weights"]

    def write(self, directory):
        os.mkdir(directory)
        plain = Checkpoint()
        files = {"config.json": self.config, "generation_config.json": plain.generation, "tokenizer.json": plain.tokenizer,
                 "tokenizer_config.json": plain.settings}
        files = {name: json.dumps(value).encode() for name, value in files.items()}
        files.update((name, safetensors_bytes(tensors)) for name, tensors in self.files.items())
        if os.path.exists(self.index):
            with open(self.index, "rb") as file:
                files["model.safetensors.index.json"] = file.read()
        for name, data in files.items():
            with open(os.path.join(directory, name), "wb") as file:
                file.write(data)

    def convert(self, out):
        """(status, standard error)"""
        with tempfile.TemporaryDirectory() as top:
            self.write(os.path.join(top, "tiny"))
            return run(os.path.join(top, "tiny"), out)

    def converted(self):
        """(metadata, tensors, standard error)"""
        with tempfile.TemporaryDirectory() as top:
            out = os.path.join(top, "model.bin")
            status, stderr = self.convert(out)
            assert status == 0, stderr
            return (*parse_model(out), stderr)


# ------------------------------------------------------------------------------------------- model.bin's own definition

@functools.lru_cache(maxsize=None)
def fp8_value(code):
    exponent, fraction = code >> 3 & 15, code & 7
    assert not (exponent == 15 and fraction == 7), "NaN"
    value = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -value if code & 0x80 else value


def code_values(dtype, data):
    """(what libraries.json has the hash of, values)"""
    if dtype == "F8_E4M3":
        return data, [fp8_value(code) for code in data]
    if dtype == "U8":
        data = struct.pack("%db" % (2 * len(data)), *(code - 8 for byte in data for code in (byte & 15, byte >> 4)))
    return data, list(struct.unpack("%db" % len(data), data))


def numbers(dtype, data):
    return struct.unpack("<%df" % (len(data) // (4 if dtype == "F32" else 2)), test_convert.widened(dtype, data))


def float32_bytes(values):
    return struct.pack("<%df" % len(values), *values)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def differing(name, metadata, tensors, source):
    """The matrices of model.bin that are not what the libraries have, with what differs."""
    with open(os.path.join(VECTORS, name, "libraries.json"), encoding="ascii") as file:
        recorded, wrong = json.load(file), []
    for theirs in test_convert.hf_shapes({**Quantised(name).config}):
        ours = test_convert.our_name(theirs)
        dtype, shape, data = tensors[ours]
        if theirs not in recorded:
            expected = source[theirs]
            data_as = test_convert.widened(expected[0], expected[2]) if len(shape) == 1 else expected[2]
            wrong += [ours + ": not quantised"] * ((data_as, expected[1]) != (data, shape) or ours + ".scale" in tensors)
            continue
        codes, values = code_values(dtype, data)
        scale_dtype, scale_shape, scales = tensors[ours + ".scale"]
        scales = numbers(scale_dtype, scales)
        groups = scale_shape[1] if len(scale_shape) == 2 else 1
        columns = shape[1] * (2 if dtype == "U8" else 1)
        width = int(metadata["group"]) if len(scale_shape) == 2 else columns
        weights = [value * scales[i // columns * groups + i % columns // width] for i, value in enumerate(values)]
        expected = recorded[theirs]
        one = len(set(scales)) == 1 and sha(float32_bytes(scales[:1])) == expected["scales"]
        wrong += [ours + ": codes"] * (sha(codes) != expected["codes"])
        wrong += [ours + ": scales"] * (not one and sha(float32_bytes(scales)) != expected["scales"])
        wrong += [ours + ": weights"] * (sha(float32_bytes(weights)) != expected["weights"])
    return wrong


# --------------------------------------------------------------------------------------------------- what converts

def test_every_code_and_scale_is_the_libraries(name):
    checkpoint = Quantised(name)
    metadata, tensors, stderr = checkpoint.converted()
    wrong = differing(name, metadata, tensors, checkpoint.tensors)
    assert not wrong, wrong
    found = {tensors[each][0] for each in tensors if each[:-1].endswith((".w", ".w1", ".w2", ".w3")) or each == "output"}
    matrices = {tensors[each][0] for each in tensors if each.startswith("layers.") and len(tensors[each][1]) == 2
                and not each.endswith(".scale")}
    assert found and (matrices | {tensors["output"][0]}) - {"BF16", "F16"} == TYPES[name] - {"BF16"}, matrices
    assert metadata["format"] == "llama-model/2" and metadata["converter"] == "2"
    assert metadata.get("group") == ("32" if name == "ct-int4-group" else None)
    assert not any("_scale" in each or "packed" in each for each in tensors)
    quantises = name not in ("ct-int4-group", "ct-int4-channel")
    assert ("activations" in stderr) == quantises, stderr


def test_engine_cpu_gives_transformers_tokens(name):
    if not os.path.exists(LLAMA):
        raise Skip("no program %s" % LLAMA)
    with tempfile.TemporaryDirectory() as top:
        model = os.path.join(top, "model.bin")
        status, stderr = Quantised(name).convert(model)
        assert status == 0, stderr
        done = compare(model, name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "teacher-forced 24 equal (100.00 %), free-running 24 equal (100.00 %)" in done.stdout, done.stdout


def compare(model, name):
    return subprocess.run([LLAMA, model, "--compare", os.path.join(VECTORS, name, "dump.safetensors"), "--precision", "f32",
                           "--engine", "cpu", "-t", "1"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_the_libraries_own_rounding_is_as_the_readme_has_it():
    """Decompressed in BF16 a weight differs by at most 2^-8 of itself from code × scale, in F16 by 2^-11, in float32 not."""
    bounds = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0}
    largest = {"bfloat16": 0, "float16": 0, "float32": 0}
    for name in NAMES:
        with open(os.path.join(VECTORS, name, "libraries.json"), encoding="ascii") as file:
            for each in json.load(file).values():
                largest[each["of"]] = max(largest[each["of"]], float(each["largest_relative_difference"]))
    assert all(bounds[kind] * 0.9 <= largest[kind] <= bounds[kind] for kind in bounds), largest


def test_an_output_matrix_of_its_own_type():
    metadata, tensors, _ = Quantised("ct-int4-group").converted()
    assert metadata["group"] == "32" and metadata["tie_embeddings"] == "false"
    assert tensors["output"][:2] == ("I8", [280, 64]) and tensors["output.scale"][:2] == ("BF16", [280, 2])
    assert tensors["tok_embeddings"][0] == "BF16" and tensors["layers.1.w2.scale"][1] == [64, 2]


def test_scales_of_activations_are_left_out():
    checkpoint = Quantised("ct-fp8-tensor")
    for name in ("self_attn.k_scale", "self_attn.v_scale", "self_attn.q_scale", "self_attn.k_proj.output_scale"):
        checkpoint.put("model.layers.0." + name, "BF16", [1], b"\x80\x3f")
    checkpoint.config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    metadata, tensors, stderr = checkpoint.converted()
    assert not differing("ct-fp8-tensor", metadata, tensors, checkpoint.tensors)
    assert "14 tensors (input_scale, k_scale, output_scale, q_scale, v_scale) are left out" in stderr, stderr
    assert "activations, or keys and values, are quantised in this checkpoint, here they are not" in stderr, stderr


def test_fp8_as_autofp8_writes_it():
    """weight_scale in place of weight_scale_inv, no block size in config.json, an input_scale."""
    checkpoint = Quantised("fp8-tensor")
    checkpoint.config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    for tensors in checkpoint.files.values():
        for name in list(tensors):
            if name.endswith("_inv"):
                tensors[name[:-len("_inv")]] = tensors.pop(name)
                tensors[name[:-len("weight_scale_inv")] + "input_scale"] = ("F32", [], b"\0\0\0\x3f")
    metadata, tensors, stderr = checkpoint.converted()
    assert not differing("fp8-tensor", metadata, tensors, checkpoint.tensors)
    assert "activations are quantised in products of this checkpoint (\"static\")" in stderr, stderr


def test_zero_points_of_zero_are_none():
    checkpoint = Quantised("ct-int8-channel")
    checkpoint.put(Q + ".weight_zero_point", "I8", [32, 1], bytes(32))
    metadata, tensors, _ = checkpoint.converted()
    assert not differing("ct-int8-channel", metadata, tensors, checkpoint.tensors)


def test_padding_of_packed_rows_is_cut():
    """Rows of 36 int4 are 18 bytes in 20: whatever the last two hold, they are not in model.bin."""
    checkpoint = Quantised("ct-int4-channel")

    def fill(data):
        for row in range(32):
            data[row * 20 + 18:row * 20 + 20] = b"\xab\xcd"

    checkpoint.change(Q + ".weight_packed", fill)
    metadata, tensors, _ = checkpoint.converted()
    assert tensors["layers.1.wq"][:2] == ("U8", [32, 18])
    assert not differing("ct-int4-channel", metadata, tensors, checkpoint.tensors)


def test_minus_128_is_carried():
    checkpoint = Quantised("ct-int8-channel")
    checkpoint.change(DOWN + ".weight", lambda data: data.__setitem__(5, 0x80))
    _, tensors, _ = checkpoint.converted()
    assert tensors["layers.0.w2"][2][5] == 0x80


def test_large_and_subnormal_scales_are_carried():
    for value in (3e38, -1e-42, 0.0, -1.5):
        checkpoint = Quantised("fbgemm-fp8")
        checkpoint.change(DOWN + ".weight_scale", lambda data, value=value: struct.pack_into("<f", data, 8, value))
        _, tensors, _ = checkpoint.converted()
        assert struct.unpack_from("<f", tensors["layers.0.w2.scale"][2], 8) == struct.unpack("<f", struct.pack("<f", value))


def test_a_vocabulary_is_taken_from_any_quantised_checkpoint():
    checkpoint = Checkpoint()
    checkpoint.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    metadata, _, _ = test_convert.converted(checkpoint, "--vocab-only")
    assert metadata["n_layers"] == "0"


# -------------------------------------------------------------------------------------------------------- changes

def flip(index):
    return lambda data: data.__setitem__(index, data[index] ^ 0x11)


def swap_scales(data):
    data[:4], data[4:8] = data[4:8], data[:4]


CHANGES = (("ct-fp8-channel", Q + ".weight", flip(7), "layers.1.wq: codes"),
           ("ct-int8-channel", DOWN + ".weight", flip(100), "layers.0.w2: codes"),
           ("ct-int4-group", Q + ".weight_packed", flip(33), "layers.1.wq: codes"),
           ("ct-int4-channel", DOWN + ".weight_packed", flip(9), "layers.0.w2: codes"),
           ("ct-int4-group", Q + ".weight_scale", swap_scales, "layers.1.wq: scales"),
           ("fbgemm-fp8", DOWN + ".weight_scale", swap_scales, "layers.0.w2: scales"),
           ("fp8-tensor", Q + ".weight_scale_inv", flip(3), "layers.1.wq: scales"),
           ("ct-fp8-tensor", "lm_head.weight", flip(1), "output: not quantised"))


def test_a_change_of_one_code_or_scale_is_found():
    for name, tensor, function, expected in CHANGES:
        checkpoint, whole = Quantised(name), Quantised(name).tensors
        checkpoint.change(tensor, function)
        metadata, tensors, _ = checkpoint.converted()
        wrong = differing(name, metadata, tensors, whole)
        assert wrong and wrong[0] == expected and {each.split(":")[0] for each in wrong} == {expected.split(":")[0]}, wrong


def swapped_nibbles(data):
    data[:] = bytes(byte >> 4 | (byte & 15) << 4 for byte in data)


def other_signs(data):
    data[:] = bytes(byte ^ 0x80 for byte in data)


def test_the_comparison_fails_where_codes_are_read_wrongly():
    if not os.path.exists(LLAMA):
        raise Skip("no program %s" % LLAMA)
    for name, tensor, function in (("ct-int4-group", DOWN + ".weight_packed", swapped_nibbles),
                                   ("ct-int4-channel", DOWN + ".weight_packed", other_signs),
                                   ("ct-fp8-channel", DOWN + ".weight", other_signs),
                                   ("fp8-tensor", DOWN + ".weight_scale_inv", flip(2))):
        checkpoint = Quantised(name)
        checkpoint.change(tensor, function)
        with tempfile.TemporaryDirectory() as top:
            model = os.path.join(top, "model.bin")
            assert checkpoint.convert(model)[0] == 0
            done = compare(model, name)
            assert done.returncode == 1 and "THE COMPARISON DOES NOT HOLD" in done.stdout, (name, done.stdout + done.stderr)


# ------------------------------------------------------------------------------------------------------- refusals

def setting(path, value, group="group_0"):
    """Of the weights of a group, or with a path that begins with / of quantization_config."""
    def change(checkpoint):
        target = checkpoint.config["quantization_config"] if path.startswith("/") else checkpoint.weights(group)
        target[path.strip("/")] = value
    return change


def tensor(name, dtype, shape, data):
    return lambda checkpoint: checkpoint.put(name, dtype, shape, data)


def changed(name, function):
    return lambda checkpoint: checkpoint.change(name, function)


def without(name):
    return lambda checkpoint: checkpoint.file_of(name).pop(name)


def method(**values):
    return lambda checkpoint: checkpoint.config.__setitem__("quantization_config", values)


def dequantised(name):
    """A matrix in 16 bits, its scales gone."""
    def change(checkpoint):
        _, shape, data = checkpoint.tensors[name + ".weight"]
        checkpoint.put(name + ".weight", "BF16", shape, bytes(2 * len(data)))
        checkpoint.file_of(name + ".weight_scale").pop(name + ".weight_scale")
    return change


def codes_in_embeddings(checkpoint):
    checkpoint.put("model.embed_tokens.weight", "F8_E4M3", [280, 32], bytes(280 * 32))


NAN16, NAN32 = b"\xc0\x7f", b"\0\0\xc0\x7f"
QUANTISE = "with weights in BF16, F16 or F32, then ./llama model.bin --quantize "
REFUSALS = (
    ("gptq", "fp8-tensor", "a quantised checkpoint (gptq, 4 bits): convert the one that it was made from, " + QUANTISE + "int4",
     method(quant_method="gptq", bits=4, desc_act=False)),
    ("gptq of 8 bits", "fp8-tensor", "(gptq, 8 bits)", method(quant_method="gptq", bits=8)),
    ("awq", "fp8-tensor", "a quantised checkpoint (awq, 4 bits): convert the one", method(quant_method="awq", bits=4)),
    ("bitsandbytes", "fp8-tensor", "(bitsandbytes, 4 bits): convert the one", method(
        quant_method="bitsandbytes", load_in_4bit=True)),
    ("gguf", "fp8-tensor", "a quantised checkpoint (gguf)", method(quant_method="gguf")),
    ("quantised by nothing", "fp8-tensor", "a quantised checkpoint: convert the one", method(bits=None)),
    ("blocks of fp8", "fp8-row", "a scale for each block of 1 × 32 weights, expected one for each row or for all: convert",
     tensor(Q + ".weight_scale_inv", "F32", [32, 2], bytes(256))),
    ("blocks of fp8 by config", "fp8-row", "a scale for each block of 128 × 128 weights", lambda c: (
        setting("/weight_block_size", [128, 128])(c), c.put(Q + ".weight_scale_inv", "F32", [2, 2], bytes(16)))),
    ("blocks of compressed-tensors", "ct-fp8-channel", "a scale for each block of 128 × 128 weights", lambda c: (
        setting("strategy", "block")(c), setting("block_structure", [128, 128])(c))),
    ("zero points", "ct-int4-group", "codes with zero points (\"symmetric\": false), expected symmetric ones: convert",
     setting("symmetric", False)),
    ("zero points in a file", "ct-int4-group", "codes with zero points, expected symmetric",
     tensor(Q + ".weight_zero_point", "I32", [8, 2], b"\1" * 64)),
    ("act-order", "ct-int4-group", "columns in the order of their activations (\"actorder\": \"group\")",
     setting("actorder", "group")),
    ("act-order, older", "ct-int4-group", "columns in the order of their activations (\"actorder\": true)",
     setting("actorder", True)),
    ("act-order in a file", "ct-int4-group", "q_proj.weight_g_idx\": columns in the order of their activations",
     tensor(Q + ".weight_g_idx", "I32", [64], bytes(256))),
    ("groups of 16", "ct-int4-group", "group_size, expected 32, 64 or 128 columns of int4 or int8; convert",
     setting("group_size", 16)),
    ("groups of two sizes", "ct-int4-group", "group_size, expected one size for all matrices, found [32, 64]",
     setting("group_size", 64)),
    ("other groups than in the file", "ct-int4-group", "q_proj.weight_scale: shape, expected [64, 1], found [64, 2]", lambda c: (
        setting("group_size", 64)(c), setting("group_size", 64, "group_1")(c))),
    ("groups of fp8", "ct-fp8-channel", "group_size, expected 32, 64 or 128 columns of int4 or int8", lambda c: (
        setting("strategy", "group")(c), setting("group_size", 32)(c))),
    ("3 bits", "ct-int4-group", "num_bits, expected float of 8, or int of 4 or 8;", setting("num_bits", 3)),
    ("fp4", "ct-int4-group", "found \"float of 4\"", setting("type", "float")),
    ("nvfp4", "ct-int4-group", "format, expected one of float-quantized",
     lambda c: c.config["quantization_config"]["config_groups"]["group_0"].__setitem__("format", "nvfp4-pack-quantized")),
    ("sparse", "ct-fp8-channel", "sparsity_config: format, expected dense",
     setting("/sparsity_config", {"format": "sparse-24-bitmask"})),
    ("rotated", "ct-fp8-channel", "transform_config, weights that are rotated", setting("/transform_config", {"config_groups": {}, "a": 1})),
    ("no scale", "ct-fp8-channel", "q_proj.weight_scale, expected the scales of " + Q + ".weight, found none",
     without(Q + ".weight_scale")),
    ("no packed codes", "ct-int4-group", Q + ".weight, expected a tensor, found none", without(Q + ".weight_packed")),
    ("not compressed", "ct-fp8-channel", "scales of a matrix that is not quantised (BF16), as before compression",
     lambda c: c.put(Q + ".weight", "BF16", [32, 32], bytes(2048))),
    ("scales of fp8 in groups", "ct-fp8-channel", "a scale for each block of 1 × 16 weights",
     tensor(Q + ".weight_scale", "BF16", [32, 2], bytes(128))),
    ("scales too few", "ct-int8-channel", "q_proj.weight_scale: shape, expected [32, 1], found [16, 1]",
     tensor(Q + ".weight_scale", "F16", [16, 1], bytes(32))),
    ("one scale where rows have one", "ct-int8-channel", "shape, expected [32, 1], found [1]",
     tensor(Q + ".weight_scale", "F16", [1], bytes(2))),
    ("a scale for each row where one is for all", "ct-fp8-tensor", "q_proj.weight_scale: shape, expected [1], found [32]",
     tensor(Q + ".weight_scale", "BF16", [32], bytes(64))),
    ("a column of scales where one is for all", "ct-fp8-tensor", "q_proj.weight_scale: shape, expected [1], found [32, 1]",
     tensor(Q + ".weight_scale", "BF16", [32, 1], bytes(64))),
    ("scales of another dtype", "ct-int8-channel", "weight_scale: dtype, expected BF16 or F16 or F32, found \"U8\"",
     tensor(Q + ".weight_scale", "U8", [32, 1], bytes(32))),
    ("a scale that is NaN", "ct-fp8-channel", "q_proj.weight_scale: element 3, expected a finite number, found NaN",
     changed(Q + ".weight_scale", lambda data: data.__setitem__(slice(6, 8), NAN16))),
    ("a scale that is infinite", "ct-int8-channel", "q_proj.weight_scale: element 3, expected a finite number, found -Infinity",
     changed(Q + ".weight_scale", lambda data: data.__setitem__(slice(6, 8), b"\0\xfc"))),
    ("a float32 scale that is NaN", "fbgemm-fp8", "down_proj.weight_scale: element 1, expected a finite number, found NaN",
     changed(DOWN + ".weight_scale", lambda data: data.__setitem__(slice(4, 8), NAN32))),
    ("the scale of all that is NaN", "fp8-tensor", "weight_scale_inv: element 0, expected a finite number",
     changed(Q + ".weight_scale_inv", lambda data: data.__setitem__(slice(0, 4), NAN32))),
    ("a code that is NaN", "ct-fp8-channel", Q + ".weight[2][3], expected a finite number, found NaN",
     changed(Q + ".weight", lambda data: data.__setitem__(2 * 32 + 3, 0x7F))),
    ("a code that is the other NaN", "fbgemm-fp8", DOWN + ".weight[1][0], expected a finite number",
     changed(DOWN + ".weight", lambda data: data.__setitem__(64, 0xFF))),
    ("e5m2", "fp8-tensor", "dtype, expected F8_E4M3 or I8", tensor(Q + ".weight", "F8_E5M2", [32, 32], bytes(1024))),
    ("codes of another shape", "fp8-tensor", "q_proj.weight: shape, expected [32, 32]",
     tensor(Q + ".weight", "F8_E4M3", [16, 64], bytes(1024))),
    ("packed codes of another shape", "ct-int4-group", "weight_packed: shape, expected [64, 8] or [64, 16], found [64, 4]",
     tensor(Q + ".weight_packed", "I32", [64, 4], bytes(1024))),
    ("packed codes of another dtype", "ct-int4-group", "weight_packed: dtype, expected I32",
     tensor(Q + ".weight_packed", "U8", [64, 8], bytes(512))),
    ("another weight_shape", "ct-int4-group", "q_proj.weight_shape, expected [64, 64], found [64, 63]",
     tensor(Q + ".weight_shape", "I64", [2], struct.pack("<2q", 64, 63))),
    ("embeddings of codes", "fp8-tensor", "model.embed_tokens.weight of dtype F8_E4M3: a quantised checkpoint", codes_in_embeddings),
    ("QKV of two types", "ct-fp8-channel", "layers.1.wq: BF16, and layers.1.wk is F8_E4M3 with a scale (BF16) for each row, expected "
     "both alike: quantise q_proj, k_proj and v_proj", dequantised(Q)),
    ("gate and up of two types", "ct-fp8-channel", "layers.0.w1: F8_E4M3 with a scale (BF16) for each row, and layers.0.w3 is BF16",
     dequantised("model.layers.0.mlp.up_proj")),
    ("QKV with scales of two dtypes", "fp8-row", "layers.1.wq: F8_E4M3 with a scale (BF16) for each row, and",
     tensor(Q + ".weight_scale_inv", "BF16", [32, 1], bytes(64))),
    ("a tied model with a quantised output", "ct-int8-channel", "lm_head.weight is quantised, though tie_word_embeddings is true: set",
     lambda c: c.config.__setitem__("tie_word_embeddings", True)),
    ("a bias", "ct-int8-channel", "\"%s.bias\", expected no such tensor" % Q, tensor(Q + ".bias", "F16", [32], bytes(64))),
    ("qweight beside codes", "ct-int8-channel", "q_proj.qweight\": a quantised checkpoint", tensor(Q + ".qweight", "I32", [4], bytes(16))),
)


# convert.py with shares of one row, and so many processes.
IN_SHARES = """
import sys
sys.path.insert(0, "scripts")
import convert, share_writer
processes = int(sys.argv.pop(1))
share_writer.SHARE_BYTES, share_writer.processors = 1, lambda: processes
sys.exit(convert.main())
"""


def test_several_processes_write_what_one_does():
    for name in ("ct-fp8-channel", "ct-int4-group"):
        checkpoint, written = Quantised(name), []           # of INT4 some are packed with 8 bits
        with tempfile.TemporaryDirectory() as top:
            checkpoint.write(os.path.join(top, "tiny"))
            for processes in ("1", "2", "5"):
                out = os.path.join(top, "model.bin")
                done = subprocess.run([sys.executable, "-c", IN_SHARES, processes, os.path.join(top, "tiny"), out],
                                      stderr=subprocess.PIPE, timeout=60)
                assert done.returncode == 0, done.stderr
                with open(out, "rb") as file:
                    written.append(file.read())
            assert written[0] == written[1] == written[2], name


def test_the_first_of_several_errors_of_processes_is_reported():
    checkpoint = Quantised("ct-fp8-channel")
    for row in (29, 3, 11):
        checkpoint.change(Q + ".weight", lambda data, at=32 * row + 5: data.__setitem__(at, 0x7F))
    with tempfile.TemporaryDirectory() as top:
        checkpoint.write(os.path.join(top, "tiny"))
        for processes in ("1", "3", "4"):
            done = subprocess.run([sys.executable, "-c", IN_SHARES, processes, os.path.join(top, "tiny"),
                                   os.path.join(top, "model.bin")], stderr=subprocess.PIPE, timeout=60)
            last = done.stderr.decode().splitlines()[-1]
            assert done.returncode == 1 and Q + ".weight[3][5], expected a finite number, found NaN" in last, done.stderr
            assert os.listdir(top) == ["tiny"], os.listdir(top)


# convert.py whose processes do what {write} says in place of writing.
INSTEAD = """
import os, signal, sys
sys.path.insert(0, "scripts")
import convert, model_file, share_writer
parent, fork, shares_of = os.getpid(), os.fork, share_writer.shares_of
share_writer.processors = lambda: 3
model_file.shares_of = lambda codes, at: 10000 * shares_of(codes, at)   # more than a pipe holds what is told of them

def write(share, fd):
    %s
    return 1

def fork_and_interrupt():
    pid = fork()
    if pid:
        os.kill(parent, signal.SIGINT)
    return pid

share_writer.Share.write = write
%s
sys.exit(convert.main())
"""


def run_instead(top, write, more=""):
    """Returns when all processes have ended, for each of them has standard error."""
    return subprocess.run([sys.executable, "-c", INSTEAD % (write, more), os.path.join(top, "tiny"), os.path.join(top, "model.bin")],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)


def test_processes_end_when_their_parent_is_killed():
    with tempfile.TemporaryDirectory() as top:
        Quantised("ct-fp8-channel").write(os.path.join(top, "tiny"))
        done = run_instead(top, "os.getppid() == parent and os.kill(parent, signal.SIGKILL)")
        assert done.returncode == -signal.SIGKILL, done
        assert sorted(os.listdir(top)) == ["model.bin.part", "tiny"], os.listdir(top)
        run(os.path.join(top, "tiny"), os.path.join(top, "model.bin"))      # which nobody has locked
        assert sorted(os.listdir(top)) == ["model.bin", "tiny"], os.listdir(top)


def test_a_process_that_is_killed_is_reported_once():
    with tempfile.TemporaryDirectory() as top:
        Quantised("ct-fp8-channel").write(os.path.join(top, "tiny"))
        done = run_instead(top, "os.kill(os.getpid(), signal.SIGKILL)")
        last = done.stderr.decode().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("convert.py: a process that copies was ended"), done.stderr
        assert os.listdir(top) == ["tiny"], os.listdir(top)


def test_an_interrupt_between_two_starts_leaves_no_process():
    with tempfile.TemporaryDirectory() as top:
        Quantised("ct-fp8-channel").write(os.path.join(top, "tiny"))
        done = run_instead(top, "signal.pause()", "os.fork = fork_and_interrupt")
        assert done.returncode == 130 and done.stderr.decode().splitlines()[-1] == "convert.py: interrupted", done
        assert os.listdir(top) == ["tiny"], os.listdir(top)


def refusal(name, fragment, change):
    def test():
        checkpoint = Quantised(name)
        change(checkpoint)
        with tempfile.TemporaryDirectory() as top:
            status, stderr = checkpoint.convert(os.path.join(top, "model.bin"))
            lines = [line for line in stderr.splitlines() if not any(
                each in line for each in ("GB/s", "here they are not", "left out", "layers, dim"))]
            assert status == 1 and len(lines) == 1 and fragment in lines[0], (status, stderr)
            assert os.listdir(top) == [], os.listdir(top)
    return test


def with_name(test, name):
    return lambda: test(name)


PER_CHECKPOINT = (test_every_code_and_scale_is_the_libraries, test_engine_cpu_gives_transformers_tokens)


if __name__ == "__main__":
    os.chdir(ROOT)
    TESTS = [("%s_%s" % (test.__name__, name), with_name(test, name)) for test in PER_CHECKPOINT for name in NAMES]
    TESTS += [(name, test) for name, test in globals().items() if name.startswith("test_") and callable(test)
              and test not in PER_CHECKPOINT]
    TESTS += [("refuses: " + name, refusal(vector, fragment, change)) for name, vector, fragment, change in REFUSALS]
    sys.exit(test_convert.run_tests(TESTS))
