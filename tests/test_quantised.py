#!/usr/bin/env python3
"""Quantised models beside HuggingFace's float32 model of the weights that their codes and scales stand for: stories.bin and
the reference checkpoints in each type, `llama --compare` in float32. Then changes to codes and scales, which must make
the comparison fail. And dump_hf.py on checkpoints that are quantised already, and the table of kl_quantised.py.

Engine cpu computes; with --engine cublas or fused those do.

The dumps are made here, by scripts/dump_hf.py: without torch, transformers and safetensors nothing is tested. The
checkpoints are in ../shared/reference, or where REFERENCE says; without them theirs are skipped.
"""
import argparse
import os
import random
import struct
import subprocess
import sys
import tempfile

from check import wanted

sys.dont_write_bytecode = True
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "scripts"))
sys.path.insert(0, os.path.join(ROOT, "tests"))

LLAMA = os.environ.get("LLAMA") or "./llama"
REFERENCE = os.environ.get("REFERENCE") or os.path.join("..", "shared", "reference")
CHECKPOINTS = ("gqa4-hd64", "mha-tied", "gqa7-hd128", "gqa3-newlayout")
QUANTISED_CHECKPOINTS = ("ct-fp8-tensor", "ct-int4-group", "ct-int4-channel", "fbgemm-fp8")
TYPES = ("fp8", "int8", "int8:32", "int4:32", "int4:64", "int4:128")
N_NEW = 48

options = argparse.Namespace(engine="cpu")
counts = {"ok": 0, "FAIL": 0, "SKIP": 0}


def report(verdict, name, why=""):
    counts[verdict] += 1
    print("%s %s%s" % (verdict, name, ": " + why if why else ""), flush=True)


def run(*command):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def compare(model, dump):
    return run(LLAMA, model, "--compare", dump, "--precision", "f32", "--engine", options.engine, "-t", "1")


# ------------------------------------------------------------------------------------------------------------- changes

def scale_doubled(tensors):
    """Of one matrix, all its scales: the exponent of a BF16 number is 1 more."""
    data = tensors["layers.0.w2.scale"][2]
    for i in range(1, len(data), 2):
        bits = (data[i] << 8 | data[i - 1]) + 0x80
        data[i - 1], data[i] = bits & 255, bits >> 8


def nibbles_swapped(tensors):
    data = tensors["layers.0.wo"][2]
    data[:] = bytes((byte << 4 | byte >> 4) & 255 for byte in data)


def group_shifted(tensors):
    """The scales of a matrix belong to the group before."""
    data = tensors["layers.0.w2.scale"][2]
    data[:] = data[2:] + data[:2]


def signs_changed(tensors):
    """Every code's sign in one row of w1 of 16: value code - 8 becomes 8 - code, but for -8, which stays."""
    dtype, (rows, columns), data = tensors["layers.0.w1"]
    for row in range(0, rows, 16):
        for i in range(row * columns, (row + 1) * columns):
            low, high = data[i] & 15, data[i] >> 4
            data[i] = (16 - low if low else 0) | (16 - high if high else 0) << 4


CHANGES = (scale_doubled, nibbles_swapped, group_shifted, signs_changed)


# --------------------------------------------------------------------------------------------------------------- tests

def make_dump(dump_hf, model, out, ids):
    dump_hf.dump(argparse.Namespace(model=model, out=out, dtype="float32", device="cpu", follow=None, prompt=[],
                                    ids=[ids], prompts=None, n=N_NEW, full=2, noise=True))


def test_model(dump_hf, name, plain, work):
    for kind in TYPES:
        test = "%s_%s" % (name, kind)
        if not wanted(test) and not (name == "stories" and kind == "int4:32"):
            continue
        model, dump = os.path.join(work, "model.bin"), os.path.join(work, "dump.safetensors")
        status, _, errors = run(LLAMA, plain, "--quantize", kind, "-o", model)
        if status:
            report("FAIL", test, errors.strip())
            continue
        rng = random.Random(7)
        make_dump(dump_hf, model, dump, " ".join(str(rng.randrange(250)) for _ in range(24)))
        status, out, errors = compare(model, dump)
        whole = "teacher-forced %d equal (100.00 %%), free-running %d equal (100.00 %%)" % (N_NEW, N_NEW)
        if wanted(test):
            good = status == 0 and whole in out
            report("ok" if good else "FAIL", test, "" if good else (out + errors).strip().replace("\n", "; "))
        if name == "stories" and kind == "int4:32":
            test_changes(model, dump, work)


def test_checkpoint(dump_hf, name, work):
    """What the libraries quantised: dump_hf.py's dump of it has the tokens and logits of the model of the weights that the
    libraries decode, which the checkpoint's own dump is of."""
    from safetensors.torch import load_file
    from test_convert_quantised import VECTORS, Quantised
    test = "dump_of_%s" % name
    if not wanted(test):
        return
    source, dump = os.path.join(work, name), os.path.join(work, "dump.safetensors")
    Quantised(name).write(source)
    recorded = load_file(os.path.join(VECTORS, name, "dump.safetensors"))
    ids, n = " ".join(map(str, recorded["prompt_ids.0"].tolist())), len(recorded["tokens.0"])
    dump_hf.dump(argparse.Namespace(model=source, out=dump, dtype="float32", device="cpu", follow=None, prompt=[], ids=[ids],
                                    prompts=None, n=n, full=1, noise=False))
    found = load_file(dump)
    far = (found["logits.0"] - recorded["logits.0"]).abs().max().item()
    good = found["tokens.0"].tolist() == recorded["tokens.0"].tolist() and far < 1e-4
    report("ok" if good else "FAIL", test, "" if good else "logits up to %g apart" % far)


def plain_weights(weights, group):
    """int4 without a search, in Python's own numbers: a list of rows of code × scale."""
    rows = []
    for row in weights:
        rows.append([])
        for first in range(0, len(row), group):
            part = row[first:first + group]
            bits, = struct.unpack("<I", struct.pack("<f", max(map(abs, part)) / 7))
            bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
            scale, = struct.unpack("<f", struct.pack("<I", bits))
            rows[-1] += [max(-8, min(7, round(x / scale))) * scale if scale else 0.0 for x in part]
    return rows


def test_plain_codes():
    """Of kl_quantised.py: a last group that is shorter, one of zeros, and nibbles in their order."""
    import kl_quantised
    import torch
    if not wanted("plain_codes"):
        return
    kl_quantised.load_libraries()
    rng = random.Random(3)
    weights = [[rng.gauss(0, 1) * (i < 32 or row != 1) for i in range(80)] for row in range(5)]
    weights = torch.tensor(weights).tolist()
    codes, scales = kl_quantised.plain_codes(torch.tensor(weights), 32)
    found = torch.stack([codes & 15, codes >> 4], -1).flatten(1).double() - 8
    found *= scales.double().repeat_interleave(32, 1)[:, :80]
    far = (found - torch.tensor(plain_weights(weights, 32), dtype=torch.float64)).abs().max().item()
    good = list(scales.shape) == [5, 3] and scales.dtype == torch.bfloat16 and far < 1e-6
    report("ok" if good else "FAIL", "plain_codes", "" if good else "%s, weights up to %g apart" % (list(scales.shape), far))


def test_kl_table(work):
    """Of the story model, which is trained: more bits cost less, a search costs less than none."""
    if not wanted("kl_table"):
        return
    status, out, errors = run(sys.executable, os.path.join(ROOT, "scripts", "kl_quantised.py"), "--program", LLAMA, "--model",
                              os.path.join(ROOT, "model", "stories.bin"), "--engine", "cpu", "--prompts", "2", "-n", "24",
                              "--work", work)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    kl = {row[0]: float(row[3]) for row in rows[2:]}
    order = ("16 bits", "int8:32", "int8", "fp8", "int4:32", "int4:128", "int4:128, largest ÷ 7")
    good = (status == 0 and len(kl) == 10 and all(name in kl for name in order)
            and all(kl[a] < kl[b] for a, b in zip(order, order[1:])) and kl["16 bits"] < 1e-9 and kl["int4:128"] < 0.2)
    report("ok" if good else "FAIL", "kl_table", "" if good else (out + errors).strip().replace("\n", "; "))


def test_changes(model, dump, work):
    from test_reference import Tensors
    for change in CHANGES:
        if not wanted(change.__name__):
            continue
        changed = Tensors(model)
        change(changed.tensors)
        path = os.path.join(work, "changed.bin")
        changed.write(path)
        status, out, errors = compare(path, dump)
        failed = status == 1 and "THE COMPARISON DOES NOT HOLD" in out
        report("ok" if failed else "FAIL", change.__name__, "" if failed else (out + errors).strip().replace("\n", "; "))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="cpu")
    parser.parse_args(namespace=options)
    try:
        import dump_hf
        import torch
        import transformers
        import safetensors
        assert torch and transformers and safetensors
    except ImportError as missing:
        report("SKIP", "quantised_models", "no Python package %s" % missing.name)
        return finish()
    dump_hf.load_libraries()
    torch.set_num_threads(1)
    stderr, sys.stderr = sys.stderr, open(os.devnull, "w")
    with tempfile.TemporaryDirectory() as work:
        test_plain_codes()
        test_kl_table(work)
        test_model(dump_hf, "stories", os.path.join(ROOT, "model", "stories.bin"), work)
        for name in QUANTISED_CHECKPOINTS:
            test_checkpoint(dump_hf, name, work)
        for name in CHECKPOINTS:
            source, plain = os.path.join(REFERENCE, name), os.path.join(work, "plain.bin")
            if not os.path.isdir(source):
                report("SKIP", name, "no %s" % source)
                continue
            status, _, errors = run(sys.executable, os.path.join(ROOT, "scripts", "convert.py"), source, plain)
            if status:
                report("FAIL", name, errors.strip())
                continue
            test_model(dump_hf, name, plain, work)
    sys.stderr = stderr
    return finish()


def finish():
    print("%(ok)d passed, %(FAIL)d failed, %(SKIP)d skipped" % counts)
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
