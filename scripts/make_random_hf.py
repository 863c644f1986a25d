#!/usr/bin/env python3
"""Write a seeded random LLaMA checkpoint in HuggingFace layout, for a validation where real weights are not at hand.

    python3 scripts/make_random_hf.py random-8b --shape llama-3.1-8b --tokenizer tokenizer.model
    python3 scripts/make_random_hf.py random-tiny --shape tiny --layers 3 --dtype float16

Weights have standard deviation 1.7/sqrt(fan-in) and norms lie in 0.5 to 1.5, so that attention is far from uniform;
with --gain 1 it is 1/sqrt(fan-in), and an error in one layer grows less in the next.
A few channels of the residual stream are much larger than the rest, as in trained models: there bf16 and careless sums
lose most. --outlier-columns F makes one column in 64 of every matrix of the layers F times as large, the same ones in all
that read the residual stream: there weights that share a scale lose most when they are quantised. Every tensor has a
generator of its own, seeded by --seed and its name: the same seed on the same kind of
device gives the same values, however many layers or shards there are.

The tokenizer is --tokenizer, a LLaMA 3 ranks file (original/tokenizer.model of a download), or one token per byte;
LLaMA's special tokens follow it, and ids up to the vocabulary's size stay unused.
"""
import argparse
import base64
import json
import os
import shutil
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

from hf_checkpoint import expected_weights
from hf_tokenizer import SPLIT_PATTERN, byte_alphabet, read_ranks, vocabulary_from_ranks
from refusal import Refused

torch = None                            # once the arguments are read: --help, and importers of SHAPES, need none

KEYS = ("dim", "layers", "heads", "kv_heads", "head_dim", "hidden", "vocab", "tied", "rope_factor")
SHAPES = {name: dict(zip(KEYS, values)) for name, values in {
    "llama-3.1-8b": (4096, 32, 32, 8, 128, 14336, 128256, False, 8.0),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256, True, 32.0),
    "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192, 128256, True, 32.0),
    "llama-3.1-70b": (8192, 80, 64, 8, 128, 28672, 128256, False, 8.0),
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, True, 0.0),
    "tiny": (256, 4, 4, 2, 64, 688, None, False, 8.0)}.items()}     # None: what its tokenizer needs, at least 512
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
END_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


# ----------------------------------------------------------------------------------------------------------- tokenizer

def read_vocabulary(path, vocab):
    """The vocabulary and its size: `vocab`, or without one what the tokens need."""
    if path:
        ranks = read_ranks(path)
        names = 256                                                 # LLaMA 3 reserves so many
    else:
        ranks = {bytes([byte]): byte for byte in range(256)}
        names = 11                                                  # those that have a meaning
    vocab = vocab or max(512, len(ranks) + names)
    if vocab < len(ranks) + 11:
        sys.exit(f"make_random_hf.py: a vocabulary of {vocab}: the tokenizer needs at least {len(ranks) + 11} ids")
    return vocabulary_from_ranks(ranks, min(vocab, len(ranks) + names)), vocab


def merges(ranks, text):
    """Every pair of tokens that joins to a token, in the order of that token's id and then of the parts' ids."""
    for token in ranks:
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        for left, right in sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            yield [text(left), text(right)]


def write_tokenizer(directory, vocabulary, path):
    letters = {byte: char for char, byte in byte_alphabet().items()}

    def text(token):
        return "".join(letters[byte] for byte in token)

    specials = {name.decode(): rank for rank, name in vocabulary.specials.items()}
    bos = vocabulary.specials[vocabulary.bos].decode()
    first, sequence = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [first, sequence, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    write_json(directory, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": rank, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for name, rank in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
            {**byte_level, "add_prefix_space": False, "use_regex": False}]},
        "post_processor": {"type": "Sequence", "processors": [
            {**byte_level, "trim_offsets": False},
            {"type": "TemplateProcessing", "single": [first, sequence], "pair": pair,
             "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos], "tokens": [bos]}}}]},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {text(token): rank for token, rank in vocabulary.ranks.items()},
                  "merges": list(merges(vocabulary.ranks, text))}})
    write_json(directory, "tokenizer_config.json", {"bos_token": bos, "eos_token": "<|eot_id|>",
                                                    "tokenizer_class": "PreTrainedTokenizerFast"})
    os.mkdir(os.path.join(directory, "original"))
    copy = os.path.join(directory, "original", "tokenizer.model")
    if path:
        shutil.copyfile(path, copy)
        return
    with open(copy, "wb") as file:
        file.writelines(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in vocabulary.ranks.items())


# -------------------------------------------------------------------------------------------------------------- config

def hf_config(shape, dtype="bfloat16", context=131072, bos=128000, eos=(128001, 128008, 128009)):
    """config.json as LLaMA 3.1 has it."""
    scaling = {"factor": shape["rope_factor"], "high_freq_factor": 4.0, "low_freq_factor": 1.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    return {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": bos, "eos_token_id": list(eos), "head_dim": shape["head_dim"], "hidden_act": "silu",
            "hidden_size": shape["dim"], "initializer_range": 0.02, "intermediate_size": shape["hidden"],
            "max_position_embeddings": context, "mlp_bias": False, "model_type": "llama",
            "num_attention_heads": shape["heads"], "num_hidden_layers": shape["layers"],
            "num_key_value_heads": shape["kv_heads"], "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": scaling if shape["rope_factor"] else None, "rope_theta": 500000.0,
            "tie_word_embeddings": shape["tied"], "torch_dtype": dtype, "transformers_version": "4.43.0",
            "use_cache": True, "vocab_size": shape["vocab"]}


def write_json(directory, name, value):
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=None if name == "tokenizer.json" else 2, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------- weights

def generator(seed, name, device):
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def outliers(shape, seed):
    """A few channels of the residual stream and their scale, by which they hold a quarter of its energy."""
    n = max(2, shape["dim"] // 1024)
    channels = torch.randperm(shape["dim"], generator=generator(seed, "outliers", "cpu"))[:n]
    return channels, (shape["dim"] / (3 * n)) ** 0.5


def outlier_columns(name, size, seed):
    """One in 64 columns of a layer's matrix: those of the residual stream, or the matrix's own."""
    own = name.endswith(("o_proj.weight", "down_proj.weight"))
    draw = generator(seed, f"columns of {name}" if own else "columns", "cpu")
    return torch.randperm(size[1], generator=draw)[:max(1, size[1] // 64)]


def make_tensor(name, size, shape, seed, device, gain=1.7, column_scale=1.0):
    draw = generator(seed, name, device)
    if len(size) == 1:
        return torch.empty(size, device=device).uniform_(0.5, 1.5, generator=draw)
    embeddings = name == "model.embed_tokens.weight"
    deviation = 1.0 if embeddings and not shape["tied"] else gain / size[1] ** 0.5
    values = torch.empty(size, device=device).normal_(0, deviation, generator=draw)
    channels, scale = outliers(shape, seed)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        values[channels.to(device)] *= scale
    elif embeddings and not shape["tied"]:          # tied, they would outweigh all else in the logits
        values[:, channels.to(device)] *= scale
    if ".layers." in name and column_scale != 1:
        values[:, outlier_columns(name, size, seed).to(device)] *= column_scale
    return values


def plan_shards(shape, item_bytes, limit):
    """[[(name, size, bytes)]] by shard."""
    sizes = {"dim": shape["dim"], "hidden_dim": shape["hidden"], "n_layers": shape["layers"], "n_heads": shape["heads"],
             "n_kv_heads": shape["kv_heads"], "head_dim": shape["head_dim"], "vocab_size": shape["vocab"]}
    shards, room = [], 0
    for _, name, size in expected_weights(sizes, shape["tied"]):
        n_bytes = item_bytes
        for n in size:
            n_bytes *= n
        if not shards or n_bytes > room:
            shards.append([])
            room = limit
        shards[-1].append((name, size, n_bytes))
        room -= n_bytes
    return shards


def write_shard(path, tensors, shape, args):
    """Tensor by tensor, so that memory is needed for one: safetensors' own writer would want them all."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, size, n_bytes in tensors:
        header[name] = {"dtype": DTYPES[args.dtype], "shape": size, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size, _ in tensors:
            values = make_tensor(name, size, shape, args.seed, args.device, args.gain, args.outlier_columns)
            values = values.to(getattr(torch, args.dtype)).cpu()
            file.write(values.view(torch.uint8).numpy().data)


def write_weights(directory, shape, args):
    shards = plan_shards(shape, getattr(torch, args.dtype).itemsize, int(args.shard_gb * 1e9))
    total, start = sum(n_bytes for shard in shards for _, _, n_bytes in shard), time.monotonic()
    free = shutil.disk_usage(directory).free
    if free < total:
        raise OSError(f"{directory}: {total / 1e9:.2f} GB of weights, {free / 1e9:.2f} GB free on that disk")
    names = ["model.safetensors"] if len(shards) == 1 else [
        "model-%05d-of-%05d.safetensors" % (i + 1, len(shards)) for i in range(len(shards))]
    paths = [os.path.join(directory, name) for name in names]
    with ThreadPoolExecutor(4) as pool:             # one generates while others are writing
        list(pool.map(lambda path, shard: write_shard(path, shard, shape, args), paths, shards))
    if len(shards) > 1:
        write_json(directory, "model.safetensors.index.json", {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in zip(names, shards) for name, _, _ in shard}})
    return total, time.monotonic() - start


# ---------------------------------------------------------------------------------------------------------------- main

def load_torch():
    global torch
    try:
        import torch
    except ImportError:
        sys.exit("make_random_hf.py: the Python package torch is missing: pip install -r scripts/requirements.txt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="OUT_DIR", help="a new or empty directory")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="(tiny)")
    for key in KEYS[:7]:
        parser.add_argument("--" + key.replace("_", "-"), type=int, metavar="N", help="in place of the shape's")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="in place of the shape's")
    parser.add_argument("--rope-factor", type=float, metavar="F", help="llama3 RoPE scaling; 0: none")
    parser.add_argument("--context", type=int, default=131072, metavar="N", help="the longest (131072)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokenizer", metavar="FILE", help="LLaMA 3 ranks; without it, one token for each byte")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gain", type=float, default=1.7, metavar="G", help="weights' deviation times sqrt(fan-in) (1.7)")
    parser.add_argument("--outlier-columns", type=float, default=1.0, metavar="F", help="one in 64, F times as large (1)")
    parser.add_argument("--device",
                        help="where values are drawn (cuda where there is one)")
    parser.add_argument("--shard-gb", type=float, default=5, metavar="GB", help="the largest file (5)")
    args = parser.parse_args()
    load_torch()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = {key: SHAPES[args.shape][key] if getattr(args, key) is None else getattr(args, key) for key in KEYS}
    if any(shape[key] is not None and shape[key] < 1 for key in KEYS[:7]) or shape["heads"] % shape["kv_heads"]:
        parser.error("sizes must be positive, and --heads a multiple of --kv-heads")
    try:
        os.makedirs(args.directory, exist_ok=True)
        if os.listdir(args.directory):
            raise OSError(f"{args.directory}: not empty; nothing is overwritten")
        vocabulary, shape["vocab"] = read_vocabulary(args.tokenizer, shape["vocab"])
        ids = {name.decode(): rank for rank, name in vocabulary.specials.items()}
        ends = [ids[name] for name in END_NAMES]
        write_tokenizer(args.directory, vocabulary, args.tokenizer)
        total, seconds = write_weights(args.directory, shape, args)
        write_json(args.directory, "generation_config.json", {"bos_token_id": vocabulary.bos, "eos_token_id": ends})
        write_json(args.directory, "config.json", hf_config(shape, args.dtype, args.context, vocabulary.bos, ends))
    except (OSError, RuntimeError, Refused) as error:
        sys.exit("make_random_hf.py: " + (str(error).strip().splitlines() or [type(error).__name__])[0])
    print(f"{args.directory}: {total / 1e9:.3f} GB of weights ({args.dtype}, {shape['layers']} layers, "
          f"dim {shape['dim']}, vocabulary {shape['vocab']}, seed {args.seed}) in {seconds:.1f} s on {args.device}",
          file=sys.stderr)


if __name__ == "__main__":
    main()
