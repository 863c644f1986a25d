#!/usr/bin/env python3
"""The Python half of scripts/validate.sh: what is needed before the run, and the report after it.

    validate_report.py preflight MODEL_DIR WORK ENGINE DEVICE    one line and exit 1 if something is missing
    validate_report.py half WORK                                 the dtype of HuggingFace's half-precision run
    validate_report.py report WORK REPORT.md STEPS [bf16]        judges WORK's outputs; exit 1 if a scenario fails
"""
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

GATED = ("Meta's models are gated: accept the licence on the model's page at huggingface.co, then `hf auth login` and "
         "`hf download meta-llama/Llama-3.1-8B-Instruct --local-dir DIR`; scripts/make_random_hf.py makes a random one")
KL_LIMIT = 1.1      # of HuggingFace's own


def stop(message):
    sys.exit("validate.sh: " + message)


def load_libraries():
    """Once there is something to do: --help needs none of them."""
    global torch, transformers, SafetensorError, safe_open
    try:
        import torch
        import transformers
        from safetensors import SafetensorError, safe_open
    except ImportError as missing:
        stop(f"the Python package {missing.name} is missing: pip install -r scripts/requirements.txt")


# ----------------------------------------------------------------------------------------------------------- preflight

def find_weights(directory):
    """The safetensors files of a complete download."""
    if not directory.is_dir():
        stop(f"{directory}: no such directory. {GATED}")
    if not any(directory.iterdir()):
        stop(f"{directory}: empty. {GATED}")
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        files = sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [single] if single.is_file() else []
    if not files:
        if any(directory.glob("**/*.pth")):
            stop(f"{directory}: Meta's own layout (.pth), expected HuggingFace's: download the whole repository")
        stop(f"{directory}: no model.safetensors and no index: the download is incomplete, or was refused. {GATED}")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        stop(f"{directory}: {len(missing)} of {len(files)} weight files are not there ({missing[0]}): "
             "the download is incomplete; run it again")
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            stop(f"{directory}: no {name}: the download is incomplete, or was refused. {GATED}")
    return files


def count_weights(files):
    """(parameters, bytes, dtype) by the files' headers; a file cut short is found here."""
    parameters, dtypes = 0, {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    n = 1
                    for size in part.get_shape():
                        n *= size
                    parameters += n
                    dtypes[part.get_dtype()] = dtypes.get(part.get_dtype(), 0) + n
        except (SafetensorError, OSError) as error:
            stop(f"{path}: {str(error).splitlines()[0]}: the download is incomplete, or a Git LFS pointer; "
                 "run it again")
    return parameters, sum(path.stat().st_size for path in files), max(dtypes, key=dtypes.get)


def memory_available():
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def find_gpu(engine, device):
    """Name, driver and memory of the GPU that runs, or None where neither side needs one."""
    if engine == "cpu" and device == "cpu":
        print("validate.sh: engine cpu: this shows nothing about a GPU", file=sys.stderr)
        return None
    other = "ENGINE=cpu validates the CPU engine"
    try:
        query = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"],
                               capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        stop(f"no NVIDIA GPU here (nvidia-smi does not answer); {other}")
    name, driver, capability = (part.strip() for part in query.split(","))
    if not torch.cuda.is_available():
        stop(f"{name}, driver {driver}: PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: "
             "the driver is too old, or PyTorch was built for the CPU only")
    free, total = torch.cuda.mem_get_info()
    return {"name": name, "driver": driver, "capability": capability, "free": free, "total": total}


def preflight(model, work, engine, device):
    model, work = Path(model), Path(work)
    gpu = find_gpu(engine, device)
    files = find_weights(model)
    parameters, size, dtype = count_weights(files)
    free, float32 = shutil.disk_usage(work).free, 4 * parameters
    try:
        import accelerate
        straight = device != "cpu" and accelerate.__version__
    except ImportError:
        straight = None
    if free < 2 * size:
        stop(f"{work}: {free / 1e9:.1f} GB free on that disk, expected {2 * size / 1e9:.1f}, twice the model "
             "(WORK names another)")
    if device != "cpu" and gpu["free"] < 1.05 * float32 + 1e9:
        stop(f"{gpu['name']}: {gpu['free'] / 1e9:.1f} GB of its memory are free, HuggingFace in float32 needs "
             f"{(1.05 * float32 + 1e9) / 1e9:.1f} (DEVICE=cpu runs it on the CPU)")
    host = (0 if straight else float32) + (float32 if engine == "cpu" else 0) + 2e9
    if memory_available() < host:
        stop(f"{memory_available() / 1e9:.1f} GB of memory available, expected {host / 1e9:.1f}"
             + ("" if straight or device == "cpu" else " (with the Python package accelerate, 2)"))
    config = json.loads((model / "config.json").read_text())
    facts = {"model": model.resolve().name, "files": len(files), "parameters": parameters, "bytes": size,
             "dtype": dtype, "config": config, "engine": engine, "device": device, "gpu": gpu,
             "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__,
             "host": f"{platform.machine()}, {os.cpu_count()} threads, {platform.system()} {platform.release()}, "
                     f"Python {platform.python_version()}"}
    (work / "preflight.json").write_text(json.dumps(facts, indent=1))
    where = f"{gpu['name']}, driver {gpu['driver']}" if gpu else "the CPU"
    print(f"validate.sh: {parameters / 1e9:.3f} billion parameters, {size / 1e9:.2f} GB of {dtype} in {len(files)} "
          f"files; {where}; {free / 1e9:.0f} GB of disk free", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ the dump

def greedy_token(ids, logits):
    """What argmax gives, from the five largest of a step: the lowest id of the largest logit. In bf16 several are often
    equal, and topk's first is any of them."""
    return min(each for each, logit in zip(ids, logits) if logit == max(logits))


class Dump:
    """A dump's prompts and tokens. tokens: what was fed, greedily chosen or another dump's (--follow); choices: what
    this model would choose at each of these steps, which are the same tokens if it chose them itself."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self.n = len(json.loads(metadata["prompts"]))
            self.noise = float(metadata.get("noise", 0))
            each = {key: [file.get_tensor(f"{key}.{i}") for i in range(self.n)]
                    for key in ("prompt_ids", "tokens", "top_ids", "top_logits", "logits")}
        self.prompt_ids, self.tokens = ([t.tolist() for t in each[key]] for key in ("prompt_ids", "tokens"))
        self.choices = [list(map(greedy_token, ids.tolist(), logits.tolist()))
                        for ids, logits in zip(each["top_ids"], each["top_logits"])]
        self.margins = [(t[:, 0] - t[:, 1]).tolist() for t in each["top_logits"]]
        self.logits = each["logits"]

    def rows(self):
        return sum(len(t) for t in self.logits)

    def total(self):
        return sum(map(len, self.tokens))


def read_answers(work, name):
    """The JSON lines that a run wrote, or an empty list if it failed."""
    text, status = (work / f"{name}.out").read_text(), statuses(work).get(name)
    return [json.loads(line) for line in text.splitlines()] if status == 0 else []


def statuses(work):
    lines = [line.split("\t") for line in (work / "steps.tsv").read_text().splitlines()]
    return {name: int(status) for name, _, status in lines}


def last_line(work, name):
    lines = (work / f"{name}.err").read_text().strip().splitlines()
    return lines[-1] if lines else "no message"


def compare_answers(dump, answers, indices, n):
    """(equal, total, differences): up to the first difference of each answer, which must be a near tie to pass."""
    equal = total = 0
    differences = []
    for i, answer in zip(indices, answers):
        expected, ids = dump.tokens[i][:n], answer["ids"]
        total += len(expected)
        if answer["prompt_ids"] != dump.prompt_ids[i]:
            differences.append((f"prompt {i}: encodes to other ids", False))
            continue
        step = next((s for s, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
        equal += step
        if step < len(expected):
            near = step < len(ids) and dump.margins[i][step] < 4 * dump.noise
            found = ids[step] if step < len(ids) else "nothing"
            differences.append((f"prompt {i}, step {step}: {found}, the dump has {expected[step]}; its margin is "
                                f"{dump.margins[i][step]:.3g}{', a near tie' if near else ''}", near))
    return equal, total, differences


# ---------------------------------------------------------------------------------------------------------- scenarios

class Scenario:
    def __init__(self, title):
        self.title, self.held, self.figures, self.notes = title, False, "", []

    def tokens(self, dump, answers, indices, n):
        if len(answers) != len(indices):
            self.figures = f"{len(answers)} answers of {len(indices)}"
            return
        equal, total, differences = compare_answers(dump, answers, indices, n)
        self.held = all(near for _, near in differences)
        self.figures = f"{equal} of {total} tokens equal"
        self.notes += [text for text, _ in differences]


def scenario_tokens(work, dump, title, name, indices, n):
    result = Scenario(title)
    result.tokens(dump, read_answers(work, name), indices, n)
    if statuses(work).get(name) != 0:
        result.notes.append(last_line(work, name))
    return result


def scenario_compare(work, dump, n):
    result = Scenario(f"{n} tokens of {dump.n} prompts, teacher-forced and free-running")
    text, total = (work / "compare.out").read_text(), dump.total()
    found = re.search(r"teacher-forced (\d+) equal \((\S+) %\), free-running (\d+) equal \((\S+) %\)\n"
                      r"largest \|Δlogit\| (\S+) over (\d+) full rows, (\S+) over the top", text)
    if not found:
        result.figures, result.notes = "no result", [last_line(work, "compare")]
        return result
    forced, forced_percent, free, free_percent, delta, rows, delta_top = found.groups()
    result.held = statuses(work).get("compare") == 0 and "the comparison holds" in text
    result.figures = (f"ids {'DIFFER' if 'DIFFER' in text else 'equal'}; teacher-forced {forced} of {total} "
                      f"({forced_percent} %), free-running {free} of {total} ({free_percent} %); largest "
                      f"&#124;Δlogit&#124; {delta} over {rows} full rows, {delta_top} over the top five of every step")
    return result


def printed_cache(work, name):
    """(MB, pages, positions of a page, bytes per token, bytes with full multi-head) as --verbose prints them."""
    text = (work / f"{name}.err").read_text()
    found = re.search(r"K/V cache (\S+) MB: (\d+) pages of (\d+) positions of (\d+) bytes "
                      r"\(with a K/V head for every head (\d+)\)", text)
    return found and (float(found[1]), *map(int, found.groups()[1:]))


def scenario_memory(work, config, half):
    """The cache's size as --verbose prints it, against the shape's arithmetic."""
    result, found = Scenario("memory of the K/V cache"), printed_cache(work, "fifty")
    if not found:
        result.figures, result.notes = "--verbose says nothing about it", [last_line(work, "fifty")]
        return result
    megabytes, pages, length, per_token, multi_head = found
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    expected = 2 * layers * kv_heads * head_dim * 4
    result.held = (per_token == expected and multi_head == expected * heads // kv_heads
                   and abs(megabytes * 1e6 - pages * length * expected) <= 1000)
    result.figures = (f"{per_token:,} bytes per token for {kv_heads} K/V heads (computed: {expected:,}), "
                      f"{multi_head:,} for {heads} with full multi-head: {heads // kv_heads} × less; {megabytes} MB "
                      f"for {pages} pages of {length} positions")
    in_half = half and printed_cache(work, "half")
    if in_half:
        result.figures += f"; in bf16 mode {in_half[3]:,} bytes per token"
    return result


def scenario_batch(work, dump, n):
    result = Scenario(f"{dump.n} prompts of {', '.join(str(len(ids)) for ids in dump.prompt_ids)} ids in one batch")
    single, batch = read_answers(work, "single"), read_answers(work, "batch")
    result.tokens(dump, batch, range(dump.n), n)
    held, figures = result.held, result.figures
    result.tokens(dump, single, range(dump.n), n)
    same = sum(a["ids"] == b["ids"] for a, b in zip(single, batch))
    result.held = result.held and held and same == dump.n
    result.figures = (f"in the batch {figures}; one at a time {result.figures}; {same} of {dump.n} answers the same "
                      "both ways")
    result.notes += [last_line(work, name) for name in ("single", "batch") if statuses(work).get(name) != 0]
    return result


def kl_divergence(p, q):
    """Mean over rows of KL(p‖q), in nats."""
    p, q = (torch.log_softmax(x.double(), dim=1) for x in (p, q))
    return (p.exp() * (p - q)).sum(dim=1)


def scenario_half(work, dump, lines):
    """bf16 mode against the float32 dump, beside HuggingFace's own half precision along the same tokens."""
    result, text = Scenario("bf16 mode beside HuggingFace's"), (work / "half.out").read_text()
    ours = re.search(r"teacher-forced (\d+) equal .*\n.*mean KL divergence (\S+)", text)
    if not ours or statuses(work).get("hf-half") != 0:
        name = "half" if statuses(work).get("half") != 0 else "hf-half"
        result.figures, result.notes = "no result", [last_line(work, name)]
        return result
    other = Dump(work / "hf-half.safetensors")
    kl = torch.cat([kl_divergence(p, q) for p, q in zip(dump.logits, other.logits)])
    theirs, rows = kl.mean().item(), dump.rows()
    agree = sum(a == b for x, y in zip(dump.tokens, other.choices) for a, b in zip(x, y))
    agree_rows = sum(a == b for x, y, rows_of in zip(dump.tokens, other.choices, dump.logits)
                     for a, b, _ in zip(x, y, rows_of))
    wrong_rows = sum(int(step) < len(dump.logits[int(i)])
                     for i, step in re.findall(r"prompt (\d+), step (\d+): teacher-forced", text))
    n_equal, our_kl, total = int(ours[1]), float(ours[2]), dump.total()
    result.held = our_kl <= KL_LIMIT * theirs
    result.figures = (f"mean KL {our_kl:.3g} against {theirs:.3g}: {our_kl / theirs if theirs else 0:.2f} of "
                      f"HuggingFace's (at most {KL_LIMIT})")
    lines += ["", "## bf16 mode along the float32 dump's tokens", "",
              f"| against float32 | mean KL over {rows} full rows, nats | argmax agrees, these rows | "
              f"argmax agrees, all {total} steps |",
              "|---|---|---|---|",
              f"| ours | {our_kl:.3g} | {rows - wrong_rows} ({(rows - wrong_rows) / rows:.1%}) | "
              f"{n_equal} ({n_equal / total:.1%}) |",
              f"| HuggingFace, sdpa | {theirs:.3g} (median {kl.median():.3g}, largest {kl.max():.3g}) | {agree_rows} "
              f"({agree_rows / rows:.1%}) | {agree} ({agree / total:.1%}) |"]
    return result


# ------------------------------------------------------------------------------------------------------------- report

def fenced(text):
    """Text that may hold anything, as an indented block."""
    text = text.replace("\r", "\n").replace("\t", "    ")
    clean = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return ["    " + line for line in clean.rstrip("\n").split("\n")]


def facts_table(facts, work, dump):
    config, gpu = facts["config"], facts["gpu"]
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rows = {
        "model": f"{facts['model']}: {facts['parameters'] / 1e9:.3f} billion parameters, {facts['bytes'] / 1e9:.2f} GB "
                 f"of {facts['dtype']} in {facts['files']} files; {config['num_hidden_layers']} layers, dim "
                 f"{config['hidden_size']}, {heads} heads over {config.get('num_key_value_heads') or heads} K/V heads, "
                 f"hidden {config['intermediate_size']}, vocabulary {config['vocab_size']}, "
                 f"RoPE {rope.get('rope_type', 'default')}",
        "program": f"{(work / 'version.out').read_text().strip()}, engine {facts['engine']}, --precision f32",
        "GPU": "none used" if not gpu else f"{gpu['name']} ({gpu['total'] / 2**30:.0f} GiB, compute capability "
                                           f"{gpu['capability']}), driver {gpu['driver']}",
        "HuggingFace": f"transformers {facts['transformers']}, torch {facts['torch']} (CUDA {facts['cuda']}) on "
                       f"{facts['device']}, float32, TF32 off, sdpa; sdpa and eager differ by at most {dump.noise:.2g} "
                       f"in a logit; smallest top-2 margin {min(map(min, dump.margins)):.2g}",
        "machine": facts["host"],
    }
    return ["| | |", "|---|---|"] + [f"| {key} | {value} |" for key, value in rows.items()]


def report(work, path, n, half):
    work, n = Path(work), int(n)
    facts, dump = json.loads((work / "preflight.json").read_text()), Dump(work / "dump.safetensors")
    everything, extra = range(dump.n), []
    scenarios = [scenario_tokens(work, dump, "one token", "one", [0], 1),
                 scenario_tokens(work, dump, f"50 tokens of {dump.n} prompts", "fifty", everything, 50),
                 scenario_compare(work, dump, n),
                 scenario_memory(work, facts["config"], half),
                 scenario_batch(work, dump, n)]
    if half:
        scenarios.append(scenario_half(work, dump, extra))
    failed = [s for s in scenarios if not s.held]
    verdict = f"{len(failed)} OF {len(scenarios)} FAIL" if failed else f"all {len(scenarios)} scenarios hold"
    lines = [f"# Validation: {verdict}", "", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), ""]
    lines += facts_table(facts, work, dump)
    lines += ["", "| | scenario | found | |", "|---|---|---|---|"]
    lines += [f"| {i} | {s.title} | {s.figures} | {'PASS' if s.held else 'FAIL'} |" for i, s in enumerate(scenarios, 1)]
    for i, scenario in enumerate(scenarios, 1):
        lines += [""] * bool(scenario.notes) + [f"- scenario {i}: {note}" for note in dict.fromkeys(scenario.notes)]
    lines += extra
    lines += ["", "## Three continuations", ""]
    for i, answer in enumerate(read_answers(work, "single")[:3]):
        prompt = json.loads((work / "prompts.jsonl").read_text().splitlines()[i])["text"]
        lines += [f"Prompt {i}, {len(answer['prompt_ids'])} ids, and the first 60 words of its continuation:", ""]
        lines += fenced(prompt) + ["", *fenced("".join(re.findall(r"\s*\S+", answer["text"])[:60]) or "(no text)"), ""]
    lines += ["## What the program printed", "", "--compare:", "", *fenced((work / "compare.out").read_text()), ""]
    for name in ("one", "fifty", "single", "batch", *(["half"] if half else [])):
        lines += [f"{name}:", "", *fenced((work / f"{name}.err").read_text()), ""]
    lines += ["| step | seconds | exit status |", "|---|---|---|"]
    lines += ["| " + line.replace("\t", " | ") + " |" for line in (work / "steps.tsv").read_text().splitlines()]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for i, scenario in enumerate(scenarios, 1):
        print(f"{'PASS' if scenario.held else 'FAIL'} {i} {scenario.title}: {scenario.figures.replace('&#124;', '|')}")
    print(f"{path}: {verdict}")
    return 1 if failed else 0


def main():
    command, *args = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command != "half":
        load_libraries()
    if command == "preflight" and len(args) == 4:
        preflight(*args)
    elif command == "half" and len(args) == 1:
        print("float16" if json.loads((Path(args[0]) / "preflight.json").read_text())["dtype"] == "F16" else "bfloat16")
    elif command == "report" and len(args) in (3, 4):
        sys.exit(report(*args[:3], args[3:] == ["bf16"]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
