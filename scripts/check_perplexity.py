#!/usr/bin/env python3
"""Compares `--perplexity-windows half` with llama.cpp's llama-perplexity: the figures must be equal to four digits.

    make check-perplexity

    python3 -m venv build/venv-perplexity && build/venv-perplexity/bin/pip install -r scripts/requirements-perplexity.txt
    build/venv-perplexity/bin/python scripts/check_perplexity.py [--program ./llama] [--model model/stories.bin]

A model.bin is written as GGUF in float32, with its tokenizer, and both programs score a text in windows of several
lengths, in float32. The ids that llama-perplexity makes of the text are compared first: one figure of other ids would say
nothing. llama-perplexity is built, in --work, from the source archive of llama-cpp-python, which is fetched with pip
unless --peer names one that is built. Exit status 1 if any id or figure differs.
"""
import argparse
import glob
import json
import os
import re
import struct
import subprocess
import sys
import tarfile

from hf_tokenizer import byte_alphabet

ARCHIVE = "llama-cpp-python==0.3.36"
WINDOWS = (64, 128, 256, 512)
TOLERANCE = 5e-5                # relative: half a unit of the fourth digit of the smallest number that has four, 1.000


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global gguf, np
    try:
        import gguf
        import numpy as np
    except ImportError as missing:
        sys.exit("check_perplexity.py: the Python package %s is missing: pip install -r scripts/requirements-perplexity.txt"
                 % missing.name)


# --------------------------------------------------------------------------------------------------- llama-perplexity

def build_peer(work):
    """The program, built of the archive's source for this machine's CPU."""
    program = os.path.join(work, "build", "bin", "llama-perplexity")
    if os.path.exists(program):
        return program
    os.makedirs(work, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                    "--no-binary", "llama-cpp-python", "-d", work, ARCHIVE], check=True)
    with tarfile.open(glob.glob(os.path.join(work, "llama_cpp_python-*.tar.gz"))[0]) as archive:
        archive.extractall(work, filter="data")
    source = glob.glob(os.path.join(work, "llama_cpp_python-*", "vendor", "llama.cpp"))[0]
    cmake = os.path.join(os.path.dirname(sys.executable), "cmake")
    cmake = cmake if os.path.exists(cmake) else "cmake"
    settings = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "GGML_OPENMP=OFF", "LLAMA_OPENSSL=OFF",
                "LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF",
                "LLAMA_BUILD_TOOLS=ON", "CMAKE_C_FLAGS=-w", "CMAKE_CXX_FLAGS=-w")
    build = os.path.join(work, "build")
    subprocess.run([cmake, "-S", source, "-B", build, *("-D" + setting for setting in settings)], check=True,
                   stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", build, "--target", "llama-perplexity", "-j", "2"], check=True,
                   stdout=subprocess.DEVNULL)
    return program


def run_peer(program, gguf_path, text_path, window, tokens_path=None):
    """Its figure as text; tokens_path: where it leaves the ids, with all log-probabilities."""
    command = [program, "-m", gguf_path, "-bf", text_path, "-c", str(window), "-b", str(window), "-ub", str(window),
               "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-escape", "-t", "2"]
    if tokens_path:
        command += ["--kl-divergence-base", tokens_path]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    found = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", done.stdout)
    if done.returncode != 0 or not found:
        sys.exit("check_perplexity.py: llama-perplexity: status %d: %s" % (done.returncode, done.stdout[-600:]))
    return found.group(1)


def read_tokens(path):
    """The ids at the head of a file of --kl-divergence-base, of the full windows."""
    with open(path, "rb") as file:
        magic = file.read(8)
        n_ctx, _, n_chunk = struct.unpack("<3i", file.read(12))
        if magic != b"_logits_":
            sys.exit("check_perplexity.py: %s: not a file of log-probabilities" % path)
        return list(struct.unpack("<%di" % (n_ctx * n_chunk), file.read(4 * n_ctx * n_chunk)))


# ------------------------------------------------------------------------------------------------------ model to GGUF

class ModelFile:
    """A model.bin in memory."""

    def __init__(self, path):
        with open(path, "rb") as file:
            blob = file.read()
        length, = struct.unpack("<Q", blob[:8])
        self.entries = json.loads(blob[8:8 + length])
        self.meta, self.data = self.entries.pop("__metadata__"), blob[8 + length:]

    def number(self, key):
        return int(self.meta[key])

    def tensor(self, name):
        """In float32, but for the tokenizer's."""
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        raw = self.data[begin:end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "U32": "<u4", "U8": "u1"}[entry["dtype"]])
            if entry["dtype"] == "F16":
                values = values.astype("<f4")
        return values.reshape(entry["shape"])

    def tokens(self):
        """The bytes and the kind of each."""
        data, offsets = self.tensor("tokenizer.bytes").tobytes(), self.tensor("tokenizer.offsets")
        return [data[offsets[i]:offsets[i + 1]] for i in range(len(offsets) - 1)], self.tensor("tokenizer.kind")


def interleaved(weight, n_heads):
    """Rows of q or k from half-split RoPE order to that of pairs, which llama.cpp's LLaMA has."""
    rows, cols = weight.shape
    return np.ascontiguousarray(weight.reshape(n_heads, 2, rows // n_heads // 2, cols).swapaxes(1, 2)).reshape(rows, cols)


def rope_factors(model):
    """What each inverse frequency is divided by, in float32; None: by 1."""
    kind = model.meta["rope_type"]
    if kind == "default":
        return None
    factor = float(model.meta["rope_factor"])
    half = model.number("head_dim") // 2
    if kind == "linear":
        return np.full(half, factor, dtype="<f4")
    low, high = float(model.meta["rope_low_freq_factor"]), float(model.meta["rope_high_freq_factor"])
    original = float(model.meta["rope_original_max_seq_len"])
    wavelength = 2 * np.pi * float(model.meta["rope_theta"]) ** (np.arange(half) / half)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype("<f4")


def add_tokenizer(writer, model):
    letters = {byte: char for char, byte in byte_alphabet().items()}
    tokens, kinds = model.tokens()
    names, types = [], []
    ranks = {token for token, kind in zip(tokens, kinds) if kind == 0}
    for i, (token, kind) in enumerate(zip(tokens, kinds)):
        names.append("".join(letters[byte] for byte in token) if kind == 0 else
                     token.decode() if kind in (1, 3) else "[UNUSED%d]" % i)
        types.append(gguf.TokenType.NORMAL if kind == 0 else gguf.TokenType.CONTROL if kind == 1 else
                     gguf.TokenType.USER_DEFINED if kind == 3 else gguf.TokenType.UNUSED)
    merges = ["".join(letters[byte] for byte in token[:i]) + " " + "".join(letters[byte] for byte in token[i:])
              for token, kind in zip(tokens, kinds) if kind == 0 for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if model.meta["bos_id"]:
        writer.add_bos_token_id(int(model.meta["bos_id"]))
    writer.add_add_bos_token(bool(model.meta["bos_id"]))
    writer.add_eos_token_id(int(model.meta["eos_ids"].split(",")[0]))


def write_gguf(model, path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(model.number("max_seq_len"))
    writer.add_embedding_length(model.number("dim"))
    writer.add_block_count(model.number("n_layers"))
    writer.add_feed_forward_length(model.number("hidden_dim"))
    writer.add_head_count(model.number("n_heads"))
    writer.add_head_count_kv(model.number("n_kv_heads"))
    writer.add_key_length(model.number("head_dim"))
    writer.add_value_length(model.number("head_dim"))
    writer.add_rope_dimension_count(model.number("head_dim"))
    writer.add_rope_freq_base(float(model.meta["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(model.meta["norm_eps"]))
    writer.add_vocab_size(model.number("vocab_size"))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, model)
    writer.add_tensor("token_embd.weight", model.tensor("tok_embeddings"))
    writer.add_tensor("output_norm.weight", model.tensor("norm"))
    if "output" in model.entries:
        writer.add_tensor("output.weight", model.tensor("output"))
    factors = rope_factors(model)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    names = {"attention_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
             "ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
    for layer in range(model.number("n_layers")):
        for ours, theirs in names.items():
            weight = model.tensor("layers.%d.%s" % (layer, ours))
            if ours in ("wq", "wk"):
                weight = interleaved(weight, model.number("n_heads" if ours == "wq" else "n_kv_heads"))
            writer.add_tensor("blk.%d.%s.weight" % (layer, theirs), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --------------------------------------------------------------------------------------------------------- comparison

def run_ours(program, *args):
    done = subprocess.run([program, *args, "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit("check_perplexity.py: %s: %s" % (program, done.stderr.strip()))
    return done.stdout


def check_ids(args, model, gguf_path):
    """Whether both programs make the same ids of the text, BOS and all, up to the last full window."""
    ours = [int(i) for i in run_ours(args.program, args.model, "--tokenize", "-f", args.text).split()]
    if model.meta["bos_id"]:
        ours.insert(0, int(model.meta["bos_id"]))
    path = os.path.join(args.work, "tokens")
    window = min(WINDOWS)
    run_peer(args.peer, gguf_path, args.text, window, path)
    theirs = read_tokens(path)
    os.remove(path)
    n = len(ours) // window * window
    if theirs == ours[:n]:
        print("ok the ids of %s: %d of %d, in full windows" % (args.text, n, len(ours)))
        return True
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(n, len(theirs)))
    print("FAIL the ids of %s: they part at %d" % (args.text, at))
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="./llama")
    parser.add_argument("--peer", help="a llama-perplexity; without it, one is built")
    parser.add_argument("--model", default="model/stories.bin")
    parser.add_argument("--text", default="tests/vectors/tales.txt")
    parser.add_argument("--work", default="build/llama-perplexity", help="for the archive, its build and the GGUF file")
    args = parser.parse_args()
    load_libraries()
    os.makedirs(args.work, exist_ok=True)
    args.peer = args.peer or build_peer(args.work)
    model, gguf_path = ModelFile(args.model), os.path.join(args.work, "model.gguf")
    write_gguf(model, gguf_path)
    equal = check_ids(args, model, gguf_path)
    for window in WINDOWS:
        theirs = float(run_peer(args.peer, gguf_path, args.text, window))
        line = json.loads(run_ours(args.program, args.model, "--perplexity", args.text, "-c", str(window),
                                   "--perplexity-windows", "half", "--precision", "f32", "--json"))
        difference = abs(line["perplexity"] / theirs - 1)
        equal &= difference < TOLERANCE
        print("%s windows of %d: %.6f, llama-perplexity %.4f, over %d tokens; %.1e apart" %
              ("ok" if difference < TOLERANCE else "FAIL", window, line["perplexity"], theirs, line["tokens"], difference))
    return not equal


if __name__ == "__main__":
    sys.exit(main())
