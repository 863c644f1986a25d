#!/usr/bin/env python3
"""--perplexity beside a loop of HuggingFace transformers in float32: six digits.

tests/vectors/perplexity.tsv has that loop's figures for the story model on tests/vectors/tales.txt; where transformers is
installed it runs here as well, and on the reference checkpoints of ../shared/reference (or REFERENCE), whose texts are lists
of ids. Otherwise standard library only.

    python3 tests/test_perplexity.py --write tests/vectors/perplexity.tsv
"""
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

from check import wanted

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "scripts"))
import hf_model  # noqa: E402  (the path above comes first)

LLAMA = os.environ.get("LLAMA") or "./llama"
REFERENCE = os.environ.get("REFERENCE") or os.path.join("..", "shared", "reference")
MODEL, TEXT, GOLDENS = "model/stories.bin", "tests/vectors/tales.txt", "tests/vectors/perplexity.tsv"
CHECKPOINTS = ("gqa4-hd64", "mha-tied", "gqa7-hd128", "gqa3-newlayout")
# Windows, context, stride (half: the context), whether the ids have no BOS.
CASES = (("sliding", 2048, 1024, False), ("sliding", 512, 256, False), ("sliding", 100, 37, False),
         ("sliding", 512, 256, True), ("half", 2048, 2048, False), ("half", 512, 512, False), ("half", 101, 101, False),
         ("half", 512, 512, True))
TOLERANCE = 5e-7                                        # relative: six digits
HEADER = """\
# Written by tests/test_perplexity.py --write: the perplexity of tests/vectors/tales.txt by model/stories.bin in HuggingFace
# transformers, float32. windows, context, stride, bos or none, tokens scored, perplexity
"""

counts = {"ok": 0, "FAIL": 0, "SKIP": 0}


def report(verdict, name, why=""):
    counts[verdict] += 1
    print("%s %s%s" % (verdict, name, ": " + why if why else ""), flush=True)


def run(*arguments):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([LLAMA, *arguments, "--quiet"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# ------------------------------------------------------------------------------------------------------- transformers

def perplexity(model, ids, windows, context, stride, bos):
    """The loop of transformers' guide (https://huggingface.co/docs/transformers/perplexity) but for two things. A window's
    loss is of as many tokens as have a label after the shift; the guide takes one off in every window, also where the
    window's own first token has none. And the loss of the model's float32 logits is taken in float64: torch's in float32 is
    1.3e-6 lower in every window of the story model."""
    total, n_tokens, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        if windows == "half":
            if end - begin < context:
                break
            inputs[0, 0] = inputs[0, 0] if bos is None else bos
            done = begin + context // 2 + 1
        targets = inputs.clone()
        targets[:, :done - begin] = -100
        with torch.no_grad():
            logits = model(inputs).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, targets[0, 1:], reduction="sum").item()
        n = (targets[:, 1:] != -100).sum().item()
        n_tokens += n
        done = end
        if end == len(ids) and windows == "sliding":
            break
    return math.exp(total / n_tokens), n_tokens


def story_ids(no_bos):
    with open(MODEL, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        bos = int(json.loads(file.read(length))["__metadata__"]["bos_id"])
    status, out, err = run(MODEL, "--tokenize", "-f", TEXT)
    if status != 0:
        sys.exit("test_perplexity.py: %s" % err.strip())
    return [bos] * (not no_bos) + [int(i) for i in out.split()], None if no_bos else bos


def write_goldens(path):
    model, _ = hf_model.load(MODEL)
    with open(path, "w", encoding="utf-8") as file:
        file.write(HEADER)
        for windows, context, stride, no_bos in CASES:
            ids, bos = story_ids(no_bos)
            value, n = perplexity(model, ids, windows, context, stride, bos)
            file.write("%s\t%d\t%d\t%s\t%d\t%.9g\n" % (windows, context, stride, "none" if no_bos else "bos", n, value))


# -------------------------------------------------------------------------------------------------------------- tests

def check(name, arguments, windows, context, stride, tokens, expected):
    flags = ["--perplexity-windows", "half"] if windows == "half" else ["--stride", str(stride)]
    status, out, err = run(*arguments, "-c", str(context), *flags, "--precision", "f32", "--json")
    if status != 0 or err:
        return report("FAIL", name, "status %s: %s" % (status, err.strip()))
    found = json.loads(out)
    apart = abs(found["perplexity"] / expected - 1)
    shape = (found["windows"], found["context"], found["stride"], found["tokens"], found["tokens_in_all"])
    if shape != (windows, context, stride, tokens, tokens):
        report("FAIL", name, "printed %s" % out.strip())
    elif not apart < TOLERANCE:
        report("FAIL", name, "%.9g, transformers %.9g: %.1e apart" % (found["perplexity"], expected, apart))
    else:
        print("   %.7g over %d tokens, %.1e from transformers" % (found["perplexity"], tokens, apart))
        report("ok", name)


def test_stories(rows, what, work):
    """Each row of the goldens, or computed now; ids without BOS go through --ids."""
    ids_file = os.path.join(work, "ids")
    with open(ids_file, "w", encoding="utf-8") as file:
        print(*story_ids(True)[0], file=file)
    for windows, context, stride, start, tokens, value in rows:
        name = "perplexity_%s_%s_%d_%d_%s" % (what, windows, context, stride, start)
        arguments = (MODEL, "--perplexity", ids_file, "--ids") if start == "none" else (MODEL, "--perplexity", TEXT)
        if wanted(name):
            check(name, arguments, windows, context, stride, tokens, value)


def test_checkpoint(name, work):
    source, model_path = os.path.join(REFERENCE, name), os.path.join(work, name + ".bin")
    if not wanted("perplexity_" + name):
        return
    done = subprocess.run([sys.executable, "scripts/convert.py", source, model_path], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        return report("FAIL", "perplexity_" + name, "convert.py: " + done.stderr.decode().strip()[-300:])
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    rng = random.Random(7)
    ids = [rng.randrange(model.config.vocab_size) for _ in range(2000)]  # few tokens are mostly rounding
    ids_file = os.path.join(work, name + ".ids")
    with open(ids_file, "w", encoding="utf-8") as file:
        print(*ids, file=file)
    for windows, context, stride in (("sliding", 128, 50), ("half", 128, 128)):
        value, n = perplexity(model, ids, windows, context, stride, None)
        check("perplexity_%s_%s" % (name, windows), (model_path, "--perplexity", ids_file, "--ids"), windows, context,
              stride, n, value)


def load_transformers():
    """Why there is none; None: it is loaded."""
    global torch, transformers
    try:
        import torch
        import transformers
    except ImportError as missing:
        return "the Python package %s is missing" % missing.name
    torch.set_num_threads(1)
    return None


def main():
    if os.environ.get("SANITIZERS") or os.environ.get("COVERAGE"):
        report("SKIP", "perplexity", "minutes under sanitizers, or where lines are counted, and no code that test_cli.c does not reach")
        return print("0 passed, 0 failed, 1 skipped")
    missing = load_transformers()
    if sys.argv[1:2] == ["--write"]:
        return sys.exit(missing) if missing else write_goldens(sys.argv[2])
    work = tempfile.mkdtemp(prefix="llama-test-")
    try:
        with open(GOLDENS, encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t") for line in file if not line.startswith("#")]
        goldens = [(r[0], int(r[1]), int(r[2]), r[3], int(r[4]), float(r[5])) for r in rows]
        test_stories(goldens, "stories", work)
        if missing or not os.path.isdir(REFERENCE):
            report("SKIP", "perplexity_of_checkpoints", missing or "no %s" % REFERENCE)
        if missing:
            report("SKIP", "perplexity_beside_transformers", missing)
        else:
            (model, _), now = hf_model.load(MODEL), []
            for windows, context, stride, no_bos in CASES[1:2] + CASES[-1:]:
                ids, bos = story_ids(no_bos)
                value, n = perplexity(model, ids, windows, context, stride, bos)
                now.append((windows, context, stride, "none" if no_bos else "bos", n, value))
            test_stories(now, "beside_transformers", work)
            for name in CHECKPOINTS if os.path.isdir(REFERENCE) else ():
                test_checkpoint(name, work)
    finally:
        shutil.rmtree(work)
    print("%d passed, %d failed, %d skipped" % (counts["ok"], counts["FAIL"], counts["SKIP"]))
    return counts["FAIL"] > 0


if __name__ == "__main__":
    sys.exit(main())
