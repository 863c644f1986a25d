#!/usr/bin/env python3
"""Encoding speed of ./llama's tokenizer beside tiktoken's and HuggingFace tokenizers', on the same bytes in one run.

    make bench-tokenizer        # which makes a virtual environment with both and calls this

Ordinary text, one thread, in process: tiktoken and tokenizers here, ours in build/tests/bench_tokenizer. Every round
times each of them on each text; figures are medians. The ids must be equal. Texts of 10 MB and more come out of Debian
packages (apt-get download); --text NAME=FILE measures another. Needs the LLaMA 3 vocabulary (tokenizer.model).
"""

import argparse
import array
import gzip
import importlib.metadata
import os
import random
import re
import statistics
import subprocess
import sys
import tarfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["RUST_BACKTRACE"] = "0"

from llama3_peers import load_tiktoken, load_tokenizers  # noqa: E402  (the variables come first)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZE = 12_000_000
# kind: packages, which of their files, and whether lines that are plain ASCII (the markup of manual pages) are left out
CORPORA = {
    "English prose": (["linux-doc-6.1"], r"/Documentation/.*\.rst\.gz$", False),
    "source code": (
        ["libpython3.11-stdlib", "golang-1.19-src", "libstdc++-12-dev"],
        r"\.(py|go|s|h|hpp|tcc)$|/c\+\+/[^.]*$",
        False,
    ),
    "zh/ja/ru": (["manpages-zh", "manpages-ja", "manpages-ru", "manpages-ru-dev"], r"/(zh_CN|ja|ru)/.*\.gz$", True),
}
EMOJI = [
    "\U0001f600", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f",
    "1\ufe0f\u20e3", "\U0001f1ef\U0001f1f5", "\U0001f9d1\u200d\U0001f680", "\U0001f916",
]


def package_file(name, folder):
    """The path of a Debian package's file, downloaded if need be."""
    for _ in range(2):
        found = sorted(each for each in os.listdir(folder) if each.startswith(name + "_") and each.endswith(".deb"))
        if found:
            return os.path.join(folder, found[-1])
        subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    sys.exit("bench_tokenizer.py: apt-get download %s left no file" % name)


def package_texts(path, pattern, only_foreign):
    """The texts of a package's files whose names match, in the order of their names."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as process:
        files = {}
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                if member.isfile() and re.search(pattern, member.name):
                    data = tar.extractfile(member).read()
                    files[member.name] = gzip.decompress(data) if member.name.endswith(".gz") else data
    for _, data in sorted(files.items()):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if only_foreign:
            text = "".join(line for line in text.splitlines(keepends=True) if not line.isascii())
        yield text


def corpus(kind, folder):
    packages, pattern, only_foreign = CORPORA[kind]
    each = [list(package_texts(package_file(name, folder), pattern, only_foreign)) for name in packages]
    parts, total = [], 0
    while any(each) and total < SIZE:  # a file of each package in turn, so that kinds and languages mix
        for texts in each:
            if texts:
                parts.append(texts.pop(0))
                total += len(parts[-1].encode("utf-8"))
    return "".join(parts)


def worst_cases():
    """A megabyte each of what the pattern cuts nowhere, everywhere, or in odd places."""
    rng, n = random.Random(1), 1 << 20
    letters, code_points = "abcdefghijklmnopqrstuvwxyz", [*range(0x20, 0xD800), *range(0xE000, 0x30000)]
    yield "1 MB of one letter", "a" * n
    yield "1 MB without a space", "".join(rng.choices(letters, k=n))
    yield "1 MB of spaces", " " * n
    yield "1 MB of digits", "".join(rng.choices("0123456789", k=n))
    yield "1 MB of newlines", "\n" * n
    yield "1 MB of emoji", "".join(rng.choices(EMOJI, k=n // 10))
    yield "1 MB of mixed white space", "".join(rng.choices(" \t\r\n\u3000", k=n))
    yield "1 MB of apostrophes", "'" * n
    yield "1 MB of punctuation", "".join(rng.choices("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~", k=n))
    yield "1 MB of one ideograph", "\u4e00" * (n // 3)
    yield "1 MB of random ideographs", "".join(map(chr, rng.choices(range(0x4E00, 0xA000), k=n // 3)))
    yield "1 MB of random code points", "".join(map(chr, rng.choices(code_points, k=n // 3)))
    yield "1 MB of random words", " ".join("".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(n // 7))
    yield "1 MB of base64", "".join(rng.choices(letters + letters.upper() + "0123456789+/", k=n))
    yield "1 MB of random bytes", rng.randbytes(n)
    line = "The quick brown fox's 12 jumps, over\nthe dog: \u00e9t\u00e9 \u4e16\u754c \U0001f600 x == y;  return 0; }\n"
    yield "1 MB of one line", line * (n // 80)


def measure_ours(program, model, path):
    run = subprocess.run([program, model, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if run.returncode:
        sys.exit("bench_tokenizer.py: " + run.stderr.decode().strip())
    words = run.stderr.decode().split()
    return {key: float(value) for key, value in zip(words[::2], words[1::2])}, array.array("i", run.stdout).tolist()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default=os.path.join(ROOT, "..", "shared", "tokenizer", "tokenizer.model"))
    parser.add_argument("--model", required=True, help="the same vocabulary as a --vocab-only model.bin")
    parser.add_argument("--program", default=os.path.join(ROOT, "build", "tests", "bench_tokenizer"))
    parser.add_argument(
        "--texts", default=os.path.join(ROOT, "build", "bench-tokenizer"), help="folder of what is downloaded"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="rows whose name has this in it")
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE", help="a text of your own, in UTF-8"
    )
    parser.add_argument("--csv", help="also write the figures there")
    args = parser.parse_args()
    os.makedirs(args.texts, exist_ok=True)

    tiktoken, tokenizers = load_tiktoken(args.ranks), load_tokenizers(args.ranks)
    print(
        "tiktoken %s, tokenizers %s, Python %s; MB/s of one thread, median of %d rounds"
        % (
            importlib.metadata.version("tiktoken"),
            importlib.metadata.version("tokenizers"),
            sys.version.split()[0],
            args.rounds,
        )
    )
    print("%-28s %6s %9s %9s %9s %9s" % ("", "MB", "ours", "tiktoken", "HF", "ours ÷ tiktoken"))
    rows = [(kind, lambda kind=kind: corpus(kind, args.texts)) for kind in CORPORA]
    rows += [(name, lambda text=text: text) for name, text in worst_cases()]
    rows += [
        (each.split("=", 1)[0], lambda each=each: open(each.split("=", 1)[1], encoding="utf-8", newline="").read())
        for each in args.text
    ]
    ready, peak, lines, slower = [], [], [], []
    for name, make in rows:
        if args.only and args.only not in name:
            continue
        text = make()
        data = text if isinstance(text, bytes) else text.encode("utf-8")
        path = os.path.join(args.texts, "text")
        with open(path, "wb") as file:
            file.write(data)
        peers = (
            {"tiktoken": lambda: tiktoken._encode_bytes(data)}
            if isinstance(text, bytes)
            else {
                "tiktoken": lambda: tiktoken.encode_ordinary(text),
                "HF": lambda: tokenizers.encode_batch_fast([text], add_special_tokens=False)[0],
            }
        )
        times = {"ours": [], **{peer: [] for peer in peers}}
        for _ in range(args.rounds):
            figures, ours = measure_ours(args.program, args.model, path)
            times["ours"].append(figures["seconds"])
            ready.append(figures["ready_ms"])
            peak.append(figures["peak_mib"])
            for peer, encode in list(peers.items()):
                start = time.perf_counter()
                try:
                    ids = encode()
                except BaseException as error:  # pyo3's panics are no Exceptions
                    if type(error).__name__ != "PanicException":
                        raise
                    del peers[peer], times[peer]  # tiktoken's pattern engine runs out of stack on some
                    continue
                times[peer].append(time.perf_counter() - start)
                if list(getattr(ids, "ids", ids)) != ours:
                    sys.exit("bench_tokenizer.py: %s: other ids than %s's" % (name, peer))
        speed = {who: len(data) / 1e6 / statistics.median(seconds) for who, seconds in times.items()}
        columns = [
            "%.1f" % speed[who] if who in speed else "-" if who == "HF" and isinstance(text, bytes) else "fails"
            for who in ("ours", "tiktoken", "HF")
        ]
        if "tiktoken" in times:  # neighbours in time: the machine's moods cancel
            ratio = statistics.median(theirs / ours for ours, theirs in zip(times["ours"], times["tiktoken"]))
            slower += [name] if ratio < 1 else []
        columns.append("%.2f" % ratio if "tiktoken" in times else "-")
        lines.append(",".join([name.replace(",", ""), str(len(data)), *columns]))
        print("%-28s %6.1f %9s %9s %9s %9s" % (name, len(data) / 1e6, *columns), flush=True)
    print(
        "vocabulary ready from model.bin in %.1f ms; peak memory of the process then %.1f MiB"
        % (statistics.median(ready), statistics.median(peak))
    )
    print("slower than tiktoken on: %s" % (", ".join(slower) or "nothing"))
    if args.csv:
        with open(args.csv, "w") as file:
            file.write("text,bytes,ours,tiktoken,hf,ours_by_tiktoken\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
