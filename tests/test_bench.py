#!/usr/bin/env python3
"""`llama --bench` on a real engine: the form of its JSON, never a time. Standard library only; the picture is drawn
where matplotlib is."""
import json
import os
import subprocess
import sys
import tempfile

from check import wanted

LLAMA = os.environ.get("LLAMA") or "./llama"
MODEL = os.path.join("model", "stories.bin")
printed = ""        # by the benchmark
counts = {"ok": 0, "FAIL": 0, "SKIP": 0}


def report(verdict, name, why=""):
    counts[verdict] += 1
    print("%s %s%s" % (verdict, name, ": " + why if why else ""), flush=True)


def test(function):
    """A test asserts; where it returns a text, it was skipped for that reason."""
    if not wanted(function.__name__):
        return
    try:
        skipped = function()
        report("SKIP" if skipped else "ok", function.__name__, skipped or "")
    except AssertionError as error:
        report("FAIL", function.__name__, " ".join(str(error).split()) or "an assertion in it")


def bench():
    done = subprocess.run([LLAMA, MODEL, "--bench", "--engine", "cpu", "-c", "128", "--json"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=900)
    assert done.returncode == 0, "exit status %d: %s" % (done.returncode, done.stderr.decode())
    assert done.stderr == b"", done.stderr.decode()
    return done.stdout.decode()


def figure(value):
    assert set(value) == {"median", "min", "max", "samples"}, value
    assert 0 < value["min"] <= value["median"] <= value["max"] and value["samples"] >= 1, value


def test_bench_json():
    global printed
    printed = bench()
    result = json.loads(printed)
    assert list(result) == ["program", "engine", "precision", "machine", "model", "read", "product", "load",
                            "first_token", "first_prompt_of_a_process", "prefill", "decode"], list(result)
    assert (result["engine"], result["precision"]) == ("cpu", "f32"), result["engine"]
    assert set(result["machine"]) == {"name", "software", "memory_bytes", "gpus"}, result["machine"]
    model = result["model"]
    assert (model["synthetic"], model["dim"], model["dtype"]) == (None, 256, "BF16"), model
    assert 0 < model["step_bytes"] <= model["weights_bytes"], model
    for value in (result["read"]["gb_s"], result["product"]["tflop_s"], result["load"]["ms"],
                  result["first_token"]["ms"]):
        figure(value)
    assert [row["tokens"] for row in result["prefill"]] == [128], result["prefill"]
    assert [(row["context"], row["batch"]) for row in result["decode"]] == [(128, 1), (128, 4), (128, 8)], result["decode"]
    for row in result["prefill"] + result["decode"]:
        figure(row["ms"])
        assert row["ms"]["samples"] >= 3 and row["share"] > 0, row
    fresh = result["first_prompt_of_a_process"]
    assert [row["tokens"] for row in fresh] == [1, 17, 64], fresh  # -c has no room for the others
    for row in fresh:
        figure(row["ms"])
        figure(row["warm_ms"])
    for row in result["prefill"]:
        assert abs(row["tokens_s"] * row["ms"]["median"] / 1e3 / row["tokens"] - 1) < 1e-3, row
    for row in result["decode"]:
        assert abs(row["ms_token"] * row["batch"] / row["ms"]["median"] - 1) < 1e-3, row
        assert abs(row["gb_s"] * row["ms"]["median"] * 1e6 / row["bytes"] - 1) < 1e-3, row
        assert row["bytes"] > model["step_bytes"], row


def test_bench_picture():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no matplotlib"
    with tempfile.TemporaryDirectory() as directory:
        source, picture = os.path.join(directory, "bench.json"), os.path.join(directory, "bench.svg")
        with open(source, "w") as file:
            file.write(printed or bench())
        done = subprocess.run([sys.executable, os.path.join("scripts", "plot_bench.py"), source, picture],
                              stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()
        with open(picture) as file:
            assert "<svg" in file.read(2000), "no SVG"
    return None


for each in (test_bench_json, test_bench_picture):
    test(each)
print("%d passed, %d failed, %d skipped" % (counts["ok"], counts["FAIL"], counts["SKIP"]))
sys.exit(1 if counts["FAIL"] else 0)
