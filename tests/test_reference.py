#!/usr/bin/env python3
"""From a HuggingFace directory to HuggingFace's own tokens: each reference checkpoint through scripts/convert.py and
`llama --compare`, then the mutations that must make the comparison fail. Standard library only.

The checkpoints are in ../shared/reference, or where REFERENCE says; without them their tests are skipped. Two more are
made here, with dumps in tests/vectors:

    python3 tests/test_reference.py --make rope-linear DIR
    python3 scripts/dump_hf.py DIR tests/vectors/rope-linear.safetensors --ids "$(python3 tests/test_reference.py --ids)" \\
        --ids "262 104 105" -n 60 --full 2
"""
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile

from check import wanted

LLAMA = os.environ.get("LLAMA") or "./llama"
REFERENCE = os.environ.get("REFERENCE") or os.path.join("..", "shared", "reference")
CHECKPOINTS = ("gqa4-hd64", "mha-tied", "gqa7-hd128", "gqa3-newlayout", "long-context")
OWN = ("rope-linear", "float32-tables")
# Of |Δlogit|; 1e-4 everywhere else. The own ones have weights of deviation 1: HuggingFace's own back ends are 1e-4
# apart.
TOLERANCE = {"long-context": 3e-4, "rope-linear": 1e-3, "float32-tables": 1e-3}
SANITIZER_STATUS = 99
SANITIZER_OPTIONS = "exitcode=99:detect_leaks=1:abort_on_error=0"
MAX_SECONDS = 1800                          # a program that hangs; long-context takes minutes under sanitizers, ten when lines are counted

counts = {"ok": 0, "FAIL": 0, "SKIP": 0}


def report(verdict, name, why=""):
    counts[verdict] += 1
    print("%s %s%s" % (verdict, name, ": " + why if why else ""), flush=True)


def run(*command, threads="1"):
    """The exit status, standard output and standard error. One thread, where a model is too small to share."""
    environment = dict(os.environ, ASAN_OPTIONS=SANITIZER_OPTIONS, UBSAN_OPTIONS=SANITIZER_OPTIONS)
    if threads:
        environment["OMP_NUM_THREADS"] = threads
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=environment, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        return None, "", "still running after %d s" % MAX_SECONDS
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# -------------------------------------------------------------------------------------------------- safetensors files

class Tensors:
    """A safetensors file in memory: metadata, and name -> [dtype, shape, bytes] in file order."""

    def __init__(self, path):
        with open(path, "rb") as file:
            blob = file.read()
        length, = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8:8 + length])
        self.meta = header.pop("__metadata__")
        self.tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            self.tensors[name] = [entry["dtype"], entry["shape"], bytearray(blob[8 + length + begin:8 + length + end])]

    def write(self, path):
        header, at = {"__metadata__": self.meta}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 4096)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, _, data in self.tensors.values():
                file.write(data)


def norms_of_one(model, wanted):
    """The norms whose names contain `wanted`, set to 1."""
    for name, entry in model.tensors.items():
        if name.endswith("norm") and wanted in name:
            entry[2] = bytearray(struct.pack("<f", 1.0) * (len(entry[2]) // 4))


def modulo_head_map(model):
    """Query head h, its rows of wq and columns of wo, to where K/V head h % n_kv_heads serves it."""
    n_heads, n_kv, head_dim = (int(model.meta[key]) for key in ("n_heads", "n_kv_heads", "head_dim"))
    group = n_heads // n_kv
    heads = sorted(range(n_heads), key=lambda h: h % n_kv * group + h // n_kv)      # by their new place
    for name, entry in model.tensors.items():
        dtype, shape, data = entry
        if name.endswith(".wq"):
            block = len(data) // n_heads
            entry[2] = bytearray().join(data[h * block:(h + 1) * block] for h in heads)
        elif name.endswith(".wo"):
            row = len(data) // shape[0]
            block = row // n_heads
            entry[2] = bytearray().join(data[r * row + h * block:r * row + (h + 1) * block]
                                        for r in range(shape[0]) for h in heads)


def doubled_bos(dump):
    """Every prompt with its first id twice, in the ids alone: what HuggingFace was not asked."""
    for name, entry in dump.tensors.items():
        if name.startswith("prompt_ids."):
            entry[1] = [entry[1][0] + 1]
            entry[2] = entry[2][:4] + entry[2]


def without_texts(dump):
    dump.meta["prompts"] = json.dumps([None] * len(json.loads(dump.meta["prompts"])))


def keep_prompt(dump, index):
    """Only one of the prompts."""
    dump.meta["prompts"] = json.dumps([json.loads(dump.meta["prompts"])[index]])
    dump.tensors = {name.split(".")[0] + ".0": entry for name, entry in dump.tensors.items()
                    if name.split(".")[1] == str(index)}


# ---------------------------------------------------------------------------------------------------- own checkpoints

def make_own(name, directory):
    """RoPE linear; embeddings and output in float32 among bf16, with values that bf16 has not."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import test_convert
    if name == "rope-linear":
        checkpoint = test_convert.Checkpoint("F32", rope_scaling={"type": "linear", "factor": 2.5})
    else:
        checkpoint = test_convert.Checkpoint("BF16")
        for table in (test_convert.EMBED, "lm_head.weight"):
            shape = checkpoint.tensors[table][1]
            checkpoint.tensors[table] = ("F32", shape, test_convert.random_tensor(table, "F32", *shape))
    os.makedirs(directory)
    return checkpoint.write(directory)


def own_ids():
    """A prompt of 181 ids: where positions are far apart a wrong RoPE shows."""
    rng = random.Random(5)
    return " ".join(map(str, [262] + [rng.randrange(262) for _ in range(180)]))


# -------------------------------------------------------------------------------------------------------------- tests

def compare(model, dump):
    long = "long-context" in os.path.basename(model)
    return run(LLAMA, model, "--compare", dump, "--precision", "f32", "--quiet", threads=None if long else "1")


def test_holds(name, model, dump):
    if not wanted(name):
        return
    status, out, err = compare(model, dump)
    delta = re.search(r"^largest \|Δlogit\| (\S+) over (\d+) full rows, (\S+) over the top", out, re.M)
    total = re.search(r"^of (\d+) tokens: teacher-forced (\d+) equal .*free-running (\d+) equal", out, re.M)
    most = TOLERANCE.get(name, 1e-4)
    if status != 0:
        report("FAIL", name, "status %s: %s" % (status, err.strip() or out[-300:]))
    elif err:
        report("FAIL", name, "with --quiet on standard error: " + err.strip())
    elif not delta or not total or "the comparison holds" not in out:
        report("FAIL", name, "an incomplete report: " + out[-300:])
    elif len(set(total.groups())) != 1:
        report("FAIL", name, "not every token is equal: " + total.group())
    elif not (float(delta.group(1)) < most and float(delta.group(3)) < most):
        report("FAIL", name, "%s, expected under %g" % (delta.group(), most))
    else:
        print("   %s tokens; %s" % (total.group(1), delta.group()))
        report("ok", name)


def test_fails(name, model, dump, fragment=""):
    if not wanted(name):
        return
    status, out, err = compare(model, dump)
    if status != 1 or "THE COMPARISON DOES NOT HOLD" not in out:
        report("FAIL", name, "status %s, expected 1 and a comparison that does not hold: %s" %
               (status, err.strip() or out[-300:]))
    elif fragment not in out:
        report("FAIL", name, "the report lacks %r: %s" % (fragment, out[:300]))
    elif err.count("\n") != 1:
        report("FAIL", name, "expected one line on standard error: " + err)
    else:
        report("ok", name)


def test_mutations(checkpoint, model_path, dump_path, work):
    """Mutations of the model, as functions of its Tensors; then of the dump."""
    model_file, dump_file = os.path.join(work, checkpoint + "-mutated.bin"), os.path.join(work, "dump.safetensors")
    dump = Tensors(dump_path)
    if checkpoint == "long-context":        # its 9,000 ids show what its 32,000 do, sooner
        lengths = [dump.tensors["prompt_ids.%d" % i][1][0] for i in range(len(json.loads(dump.meta["prompts"])))]
        keep_prompt(dump, lengths.index(min(length for length in lengths if length > 8192)))
    dump.write(dump_file)
    mutations = {
        "rope-linear": {
            "factor_left_out": lambda m: m.meta.update(rope_type="default"),
            "another_factor": lambda m: m.meta.update(rope_factor="2.0"),
        },
        "gqa4-hd64": {"no_rope_scaling": lambda m: m.meta.update(rope_type="default")},
        "long-context": {
            "no_rope_scaling": lambda m: m.meta.update(rope_type="default"),
            "modulo_head_map": modulo_head_map,
        },
        "gqa3-newlayout": {
            "norms_of_one": lambda m: norms_of_one(m, "norm"),
            "one_attention_norm_of_one": lambda m: norms_of_one(m, "layers.1.attention_norm"),
            "one_ffn_norm_of_one": lambda m: norms_of_one(m, "layers.0.ffn_norm"),
            "modulo_head_map": modulo_head_map,
            "rope_scaling_it_has_not": lambda m: m.meta.update(
                rope_type="llama3", rope_factor="8.0", rope_low_freq_factor="1.0", rope_high_freq_factor="4.0",
                rope_original_max_seq_len="64"),
        },
    }[checkpoint]
    for name, mutate in mutations.items():
        model = Tensors(model_path)
        mutate(model)
        model.write(model_file)
        test_fails("%s_%s" % (checkpoint, name), model_file, dump_file)
    if checkpoint != "gqa3-newlayout":
        return
    doubled_bos(dump)
    dump.write(dump_file)
    test_fails(checkpoint + "_doubled_bos_in_the_ids_alone", model_path, dump_file, "they part at 1")
    without_texts(dump)
    dump.write(dump_file)
    test_fails(checkpoint + "_doubled_bos", model_path, dump_file, "teacher-forced")


def main():
    if sys.argv[1:2] == ["--make"]:
        return print(make_own(*sys.argv[2:4]))
    if sys.argv[1:2] == ["--ids"]:
        return print(own_ids())
    work = tempfile.mkdtemp(prefix="llama-test-")
    try:
        for checkpoint in CHECKPOINTS + OWN:
            source = os.path.join(REFERENCE, checkpoint)
            dump = os.path.join(source, "dump.safetensors")
            if checkpoint in OWN:
                source, dump = make_own(checkpoint, os.path.join(work, checkpoint)), "tests/vectors/%s.safetensors" % checkpoint
            if not os.path.exists(dump):
                report("SKIP", checkpoint, "no %s (the reference checkpoints are not part of the repository)" % dump)
                continue
            if checkpoint == "long-context" and (os.environ.get("SANITIZERS") or os.environ.get("COVERAGE")):
                report("SKIP", checkpoint, "ten minutes under sanitizers, or where lines are counted, and no code that the "
                       "others do not reach")
                continue
            model = os.path.join(work, checkpoint + ".bin")
            status, _, err = run(sys.executable, "scripts/convert.py", source, model)
            if status != 0:
                report("FAIL", checkpoint, "convert.py: status %s: %s" % (status, err.strip()[-300:]))
                continue
            test_holds(checkpoint, model, dump)
            if checkpoint in ("gqa4-hd64", "gqa3-newlayout", "long-context", "rope-linear"):
                test_mutations(checkpoint, model, dump, work)
    finally:
        shutil.rmtree(work)
    print("%d passed, %d failed, %d skipped" % (counts["ok"], counts["FAIL"], counts["SKIP"]))
    return counts["FAIL"] > 0


if __name__ == "__main__":
    sys.exit(main())
