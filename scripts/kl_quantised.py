#!/usr/bin/env python3
"""What quantised weights cost: the mean KL divergence from the 16-bit model's float32 logits, for each type, as a table.

    python3 scripts/kl_quantised.py --dim 512 --layers 4 --vocab 8192             # some minutes on a CPU
    python3 scripts/kl_quantised.py --shape llama-3.1-8b --layers 4 --device cuda
    python3 scripts/kl_quantised.py --model model/stories.bin

The model is one of scripts/make_random_hf.py: a few channels of its residual stream hold a quarter of the energy, and
with --outlier-columns 4 one column in 64 of every matrix is four times as large, so that groups of weights have outliers.
--gain 1 is where bf16, fp8 and int4 cost about what is published of trained models; with 1.7 an error of int4 grows until
the logits have little in common, and the divergence says less of the weights.

Its float32 logits along its own greedy tokens, after prompts of random ids, are transformers' (scripts/dump_hf.py), and so
are those of bf16, weights and arithmetic. `--quantize` makes a file of each type, and `--compare` computes and compares
its logits: in float32, where the weights alone differ, and on GPU engines in bf16, too. With --model the float32 logits are
of that model.bin.

Beside these, int4 without a search: the scale of a group is its largest magnitude over 7, and a code is the nearest. It
is written here into a copy of `--quantize`'s file, whose output matrix stays. Exit status 1 if the search's KL is more
than 0.85 of that. Needs scripts/requirements.txt.
"""
import argparse
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TYPES = ("fp8", "int8", "int8:32", "int8:128", "int4:32", "int4:64", "int4:128")
PLAIN = ("int4:32", "int4:128")         # made without a search as well
SIZES = ("dim", "layers", "heads", "kv_heads", "head_dim", "hidden", "vocab")
LARGEST_RATIO = 0.85


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global torch, safe_open
    try:
        import torch
        import transformers  # which dump_hf.py needs
        from safetensors import safe_open
    except ImportError as missing:
        sys.exit(f"kl_quantised.py: the Python package {missing.name} is missing: pip install -r scripts/requirements.txt")


class Failed(Exception):
    """A message of one line for the user."""


def run(*command, found=None):
    """A step: its standard output, which may fail where it has that; how long it took goes to standard error."""
    start = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          check=False)
    if done.returncode and not (found and found in done.stdout):
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Failed(lines[-1] if lines else f"{command[0]}: exit status {done.returncode}")
    print("%6.1f s  %s" % (time.monotonic() - start, " ".join(map(os.path.basename, command))[:100]), file=sys.stderr)
    return done.stdout


def script(name, *arguments):
    return run(sys.executable, os.path.join(HERE, name), *arguments)


# ------------------------------------------------------------------------------------------- int4 without a search

def plain_codes(weights, group):
    """Codes [rows, cols / 2] and scales [rows, groups] of float32 weights: largest / 7 in bf16, and the nearest code."""
    rows, cols = weights.shape
    groups = -(-cols // group)
    padded = torch.nn.functional.pad(weights, (0, groups * group - cols)).reshape(rows, groups, group)
    scales = (padded.abs().amax(2) / 7).to(torch.bfloat16)
    steps = torch.where(scales == 0, 1, scales).float()[:, :, None]
    codes = (padded / steps).round().clamp(-8, 7).to(torch.int8).reshape(rows, -1)[:, :cols] + 8
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), scales


def relative_error(weights, codes, scales, group):
    """Squared error and square, summed."""
    values = torch.stack([codes & 15, codes >> 4], -1).flatten(1).float() - 8
    values *= scales.float().repeat_interleave(group, 1)[:, :values.shape[1]]
    return (values - weights).double().square().sum().item(), weights.double().square().sum().item()


def write_plain(model, quantised, out, device):
    """A copy of a file with int4 layers, these quantised without a search. Their error, relative."""
    shutil.copyfile(quantised, out)
    errors = squares = 0.0
    with open(out, "r+b") as file, safe_open(model, "pt") as source:
        length, = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
        group = int(entries["__metadata__"]["group"])
        for name, entry in entries.items():
            if name == "__metadata__" or entry["dtype"] != "U8" or name + ".scale" not in entries:
                continue
            weights = source.get_tensor(name).to(device).float()
            codes, scales = plain_codes(weights, group)
            error, square = relative_error(weights, codes, scales, group)
            errors, squares = errors + error, squares + square
            for part, tensor in ((entry, codes), (entries[name + ".scale"], scales)):
                data = tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
                begin, end = part["data_offsets"]
                if end - begin != len(data):
                    raise Failed(f"{quantised}: tensor {name}: {end - begin} bytes, expected {len(data)}")
                file.seek(8 + length + begin)
                file.write(data)
    return (errors / squares) ** 0.5


# -------------------------------------------------------------------------------------------------------- KL divergence

def mean_kl(program, model, dump, engine, precision):
    """Of --compare's report. (Its verdict is that the tokens are not all the float32 model's.)"""
    found = "mean KL divergence "
    out = run(program, model, "--compare", dump, "--precision", precision, *(["--engine", engine] if engine else []),
              found=found)
    return float(out.split(found)[1].split()[0])


def quantize(program, model, kind, out):
    """The error of all weights together, relative."""
    summary = json.loads(run(program, model, "--quantize", kind, "-o", out, "--json"))
    return summary["error"]


def kl_of_dumps(reference, other):
    """The same of two dumps of the same tokens."""
    total = rows = 0
    with safe_open(reference, "pt") as p, safe_open(other, "pt") as q:
        for name in (key for key in p.keys() if key.startswith("logits.")):
            a, b = (torch.log_softmax(file.get_tensor(name).double(), 1) for file in (p, q))
            total += (a.exp() * (a - b)).sum().item()
            rows += len(a)
    return total / rows


def dump_float32(args, model, out):
    """Logits of a checkpoint directory or a model.bin, after prompts of random ids."""
    vocab = vocabulary_size(model)
    rng = random.Random(args.seed)
    prompts = [" ".join(str(rng.randrange(vocab)) for _ in range(16)) for _ in range(args.prompts)]
    script("dump_hf.py", model, out, *(word for ids in prompts for word in ("--ids", ids)), "-n", str(args.n),
           "--full", str(args.n), "--device", args.device, "--no-noise")


def vocabulary_size(model):
    if os.path.isdir(model):
        with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
            return json.load(file)["vocab_size"]
    with safe_open(model, "pt") as file:
        return int(file.metadata()["vocab_size"])


def make_model(args, work):
    """model.bin, the dump of its logits in float32, and that in bf16; of a given model None."""
    directory, model = os.path.join(work, "hf"), os.path.join(work, "model.bin")
    dumps = [os.path.join(work, name) for name in ("float32.safetensors", "bfloat16.safetensors")]
    if args.model:
        dump_float32(args, args.model, dumps[0])
        return args.model, dumps[0], None
    sizes = [word for key in SIZES if getattr(args, key) for word in ("--" + key.replace("_", "-"), str(getattr(args, key)))]
    script("make_random_hf.py", directory, "--shape", args.shape, *sizes, "--seed", str(args.seed), "--device", args.device,
           "--gain", str(args.gain), "--outlier-columns", str(args.outlier_columns))
    script("convert.py", directory, model)
    dump_float32(args, directory, dumps[0])
    script("dump_hf.py", directory, dumps[1], "--follow", dumps[0], "--dtype", "bfloat16", "--full", str(args.n),
           "--device", args.device)
    shutil.rmtree(directory)
    return model, *dumps


def measure(args, work):
    """Rows of the table: (weights, bytes, error, KL in float32, KL in bf16)."""
    model, dump, dump_bf16 = make_model(args, work)
    quantised, plain = os.path.join(work, "quantised.bin"), os.path.join(work, "plain.bin")
    in_bf16 = args.engine != "cpu" and not re.search(r"build: cpu\.", run(args.program, "--help"))

    def row(weights, path, error):
        kls = [mean_kl(args.program, path, dump, args.engine, precision) for precision in ("f32", "bf16")[:1 + in_bf16]]
        return weights, os.path.getsize(path), error, *kls, *[None] * (2 - len(kls))

    rows = [row("16 bits", model, 0.0)]
    if dump_bf16:
        rows.append(("16 bits, transformers", os.path.getsize(model), 0.0, None, kl_of_dumps(dump, dump_bf16)))
    for kind in TYPES:
        rows.append(row(kind, quantised, quantize(args.program, model, kind, quantised)))
        if kind in PLAIN:
            rows.append(row(kind + ", largest ÷ 7", plain, write_plain(model, quantised, plain, args.device)))
            os.unlink(plain)
        os.unlink(quantised)
    return rows


def print_table(rows):
    print("| weights | file, GB | error of the weights | KL, computed in float32 | in bf16 |\n|---|---|---|---|---|")
    for weights, size, error, *kls in rows:
        print("| %s | %.3f | %s | %s |" % (weights, size / 1e9, "%.2f %%" % (100 * error) if error else "",
                                           " | ".join("–" if kl is None else "%.3g" % kl for kl in kls)))


def report(rows):
    """The table, and the verdict on the search for scales."""
    print_table(rows)
    kl = {row[0]: row[3] for row in rows}
    bad = False
    for kind in PLAIN:
        ratio = kl[kind] / kl[kind + ", largest ÷ 7"]
        bad = bad or ratio > LARGEST_RATIO
        print("%s: KL of the search is %.3f of that of largest ÷ 7, at most %.2f%s" %
              (kind, ratio, LARGEST_RATIO, ": TOO MUCH" if ratio > LARGEST_RATIO else ""))
    return 1 if bad else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="of make_random_hf.py (tiny)")
    for key in SIZES:
        parser.add_argument("--" + key.replace("_", "-"), type=int, metavar="N", help="in place of the shape's")
    parser.add_argument("--gain", type=float, default=1.0, metavar="G", help="of make_random_hf.py (1)")
    parser.add_argument("--outlier-columns", type=float, default=4.0, metavar="F", help="of make_random_hf.py (4)")
    parser.add_argument("--model", metavar="FILE", help="a model.bin of 16 bits in place of a random one")
    parser.add_argument("--program", default="./llama")
    parser.add_argument("--engine", help="of the program (the fastest here)")
    parser.add_argument("--device", default="cpu", help="of transformers: cpu or cuda (cpu)")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("-n", type=int, default=64, help="tokens of each, and rows of logits (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", metavar="DIR", help="where the files go: three of the model's size (a temporary one)")
    args = parser.parse_args()
    load_libraries()
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            return report(measure(args, work))
    except (Failed, OSError, RuntimeError) as error:
        sys.exit("kl_quantised.py: " + (str(error).strip().splitlines() or [type(error).__name__])[0])


if __name__ == "__main__":
    sys.exit(main())
