#!/usr/bin/env python3
"""Writes what the tests take from HuggingFace transformers (scripts/requirements.txt) into a directory:

    python3 scripts/gen_vectors.py tests/vectors

rope.tsv: RoPE's inverse frequencies. own-dtypes.bin and own-dtypes.safetensors: a tiny random model with linear RoPE, its
layers in BF16, embeddings in F16 and output in F32, as convert.py writes it, and dump_hf.py's dump of it.

    python3 scripts/gen_vectors.py --first-release CHECKOUT tests/vectors

first-release.bin and first-release.safetensors: another tiny model, as the first release's convert.py wrote it
(CHECKOUT/scripts/convert.py, of commit 3465891), and its dump.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import check_chat

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT, LLAMA3 = {"rope_type": "default"}, {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [(500000.0, 128, DEFAULT), (10000.0, 64, DEFAULT),
         *((theta, head_dim, {"rope_type": "linear", "factor": factor}) for theta, head_dim, factor in (
             (500000.0, 128, 2.0), (500000.0, 64, 4.0), (10000.0, 64, 1.5), (1000000.0, 96, 3.7), (500000.0, 128, 1.25),
             (10000.0, 16, 16.0))),
         (500000.0, 128, dict(LLAMA3, factor=8.0, original_max_position_embeddings=8192)),
         (500000.0, 64, dict(LLAMA3, factor=32.0, original_max_position_embeddings=8192))]


def write_rope(path):
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write("# Written by scripts/gen_vectors.py with transformers %s, torch %s: theta, head_dim, rope_type, factor, the\n"
                   "# original context, and the bits of each inverse frequency in float32.\n" % (
                       transformers.__version__, torch.__version__.split("+")[0]))
        for theta, head_dim, rope in ROPES:
            config = transformers.LlamaConfig(
                hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, head_dim=head_dim,
                max_position_embeddings=131072, rope_parameters=dict(rope, rope_theta=theta))
            freq = LlamaRotaryEmbedding(config).inv_freq
            bits = " ".join("%08x" % (each & 0xFFFFFFFF) for each in freq.view(torch.int32).tolist())
            file.write("%g\t%d\t%s\t%s\t%d\t%s\n" % (theta, head_dim, rope["rope_type"], rope.get("factor", 0),
                                                   rope.get("original_max_position_embeddings", 0), bits))


def run(script, *args):
    subprocess.run([sys.executable, script, *args], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def random_checkpoint(source, *options):
    sizes = {"layers": 2, "dim": 8, "heads": 2, "kv-heads": 1, "head-dim": 4, "hidden": 16, "vocab": 267, "context": 256}
    run(os.path.join(HERE, "make_random_hf.py"), source, *options, *("--%s=%s" % each for each in sizes.items()))


def edit_json(path, **values):
    with open(path, encoding="utf-8") as file:
        value = dict(json.load(file), **values)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def write_pair(source, convert, directory):
    """NAME.bin and NAME.safetensors of a checkpoint."""
    path = os.path.join(directory, os.path.basename(source))
    run(convert, source, path + ".bin")
    run(os.path.join(HERE, "dump_hf.py"), source, path + ".safetensors", "-n", "64", "--full", "2", "-p", "Once upon a time",
        "-p", "x")
    os.chmod(path + ".safetensors", 0o644)


def write_own_dtypes(directory):
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as top:
        source = os.path.join(top, "own-dtypes")
        random_checkpoint(source, "--dtype", "float32", "--rope-factor=0")
        weights = load_file(os.path.join(source, "model.safetensors"))
        for name, values in weights.items():
            weights[name] = values if name.startswith("lm_head") or values.dim() == 1 else values.to(
                torch.float16 if "embed_tokens" in name else torch.bfloat16)
        save_file(weights, os.path.join(source, "model.safetensors"), {"format": "pt"})
        edit_json(os.path.join(source, "config.json"), rope_scaling={"type": "linear", "factor": 4.0})
        write_pair(source, os.path.join(HERE, "convert.py"), directory)


def write_first_release(checkout, directory):
    with tempfile.TemporaryDirectory() as top:
        source = os.path.join(top, "first-release")
        random_checkpoint(source, "--seed=1")
        edit_json(os.path.join(source, "tokenizer_config.json"), chat_template=check_chat.DATED)
        write_pair(source, os.path.join(checkout, "scripts", "convert.py"), directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-release", metavar="CHECKOUT", help="write its files alone")
    parser.add_argument("directory", metavar="DIR")
    args = parser.parse_args()
    if args.first_release:
        write_first_release(args.first_release, args.directory)
        return 0
    write_rope(os.path.join(args.directory, "rope.tsv"))
    write_own_dtypes(args.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
