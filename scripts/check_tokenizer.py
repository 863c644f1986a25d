#!/usr/bin/env python3
"""Compares ./llama's tokenizer with tiktoken's and HuggingFace tokenizers' ids on a million generated strings and more.

    make check-tokenizer        # which makes a virtual environment with both and calls this

Every code point alone and between letters; vocabulary pieces glued at random; white space, digits, apostrophes,
combining marks, emoji sequences; text of many scripts; and bytes that are not UTF-8 (tiktoken's byte rule alone:
HuggingFace takes no bytes). Where the two agree with each other, we must agree with them; where not, it says so.
Exit status 1 if any string differs. Needs the LLaMA 3 vocabulary (tokenizer.model); --ranks takes a model.bin as well.

    python scripts/check_tokenizer.py --ranks model/stories.bin --write tests/vectors/stories-tokenizer.tsv

writes a few hundred of such strings and their ids for tests/test_tokenizer.c, where tiktoken and HuggingFace agree.
"""

import argparse
import itertools
import os
import random
import subprocess
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from llama3_peers import load_tiktoken, load_tokenizers, load_vocabulary  # noqa: E402  (the variable comes first)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BATCH = 20_000
SPACES = "  \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\u180e\x1c\x1f"
APOSTROPHES = [
    "'", "'s", "'S", "'\u017f", "'T", "'re", "'Re", "'ve", "'VE", "'m", "'ll", "'lL", "'d", "\u2019s", "''", "'l",
    "'v", "\u212a",
]
MARKS = "\u0301\u0308\u0327\u093f\u094d\u0e31\u0e49\u20dd\ufe0f\u3099\u064b\u05b8"
DIGITS = "0123456789\u0661\u0967\u00bd\u00b2\u2167\u3007\u4e00\U0001d7d8"
PUNCTUATION = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\u2026\u2014\u3002\uff0c\u00ab\u2192\u20ac'
EMOJI = [
    "\U0001f600", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f",
    "1\ufe0f\u20e3", "\U0001f1ef\U0001f1f5",
]
SCRIPTS = [
    (0x41, 0x7B), (0xC0, 0x250), (0x370, 0x400), (0x400, 0x500), (0x5D0, 0x5EB), (0x620, 0x650), (0x905, 0x940),
    (0xE01, 0xE3B), (0x1100, 0x1200), (0x3041, 0x3097), (0x30A1, 0x30FB), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4),
    (0x10330, 0x1034B), (0x20000, 0x2A6DF),
]


def code_points():
    """Each alone, and between letters, where it is a letter, a number, white space or none of these to the pattern."""
    for cp in itertools.chain(range(0xD800), range(0xE000, 0x110000)):
        yield chr(cp)
    for cp in itertools.chain(range(0xD800), range(0xE000, 0x110000)):
        yield "a%cb" % cp


def glued(rng, tokens, n):
    """Tokens of the vocabulary one after another: the ways in which merges can go wrong."""
    for _ in range(n):
        yield b"".join(rng.choices(tokens, k=rng.randint(1, 8)))


def pieces(rng, n):
    """What the split pattern's rules are about, in any order."""
    kinds = [
        lambda: "".join(rng.choices(SPACES, k=rng.randint(1, 4))),
        lambda: " " * rng.randint(1, 9),
        lambda: "\n" * rng.randint(1, 3),
        lambda: "".join(rng.choices(DIGITS, k=rng.randint(1, 7))),
        lambda: rng.choice(APOSTROPHES),
        lambda: rng.choice(MARKS),
        lambda: rng.choice(EMOJI),
        lambda: "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 5))),
        lambda: rng.choice(
            ["the", " the", "Hello", " world", "x", "I", "don", "caf\u00e9", "\u4e16\u754c", " \u041c\u0438\u0440"]
        ),
    ]
    for _ in range(n):
        yield "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 12)))


def words(rng, n):
    """Letters of one script or two, in runs that are seldom words."""
    for _ in range(n):
        text = []
        for _ in range(rng.randint(1, 6)):
            first, end = rng.choice(SCRIPTS)
            text.append(
                "".join(chr(rng.randrange(first, end)) for _ in range(rng.randint(1, 14)))
                + rng.choice(["", " ", "", "\n", ", ", "\u3002"])
            )
        yield "".join(text)


def long_runs(rng, n):
    """Pieces on both sides of every switch between methods, and far beyond."""
    alphabets = [
        "a",
        "ab",
        " ",
        "\n",
        "etaoinshr",
        "<>=!-",
        "=",
        "0",
        "\u4e00",
        "\u4e16\u754c\u4e2d\u56fd",
        "\u0430\u043e\u0435",
        "\U0001f600",
        "e\u0301",
    ]
    for _ in range(n):
        yield "".join(
            rng.choices(rng.choice(alphabets), k=rng.choice([31, 32, 33, 63, 64, 65, 66, 130, rng.randint(1, 3000)]))
        )


def raw_bytes(rng, tokens, n):
    """Bytes that are seldom UTF-8: at random, and text that is cut or broken somewhere."""
    for _ in range(n):
        if rng.random() < 0.3:
            yield rng.randbytes(rng.randint(1, 40))
        else:
            text = bytearray(
                b"".join(rng.choices(tokens, k=rng.randint(1, 8))) + rng.choice([b"", b" ", b"\n  ", b"\t"])
            )
            text.insert(rng.randint(0, len(text)), rng.choice(b"\x80\xbf\xc0\xe4\xed\xf0\xf5\xff"))
            yield bytes(text)


class Program:
    """./llama --tokenize --hex on a file of texts, one line each."""

    def __init__(self, path, model):
        self.path, self.model = path, model

    def encode(self, texts):
        lines = "".join(text.hex() + "\n" for text in texts)
        run = subprocess.run(
            [self.path, self.model, "--tokenize", "--hex", "-f", "-"],
            input=lines.encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
        out = run.stdout.decode().split("\n")
        assert len(out) == len(texts) + 1, "%d lines for %d texts" % (len(out) - 1, len(texts))
        return [list(map(int, line.split())) for line in out[:-1]]

    def decode(self, lists):
        lines = "".join(" ".join(map(str, ids)) + "\n" for ids in lists)
        run = subprocess.run(
            [self.path, self.model, "--detokenize", "--hex", "-f", "-"],
            input=lines.encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
        return [bytes.fromhex(line) for line in run.stdout.decode().split("\n")[:-1]]


RULES = [  # a text for each turn of the split pattern
    "I'm sure you'll say they've won",
    "she'd he's we're don't DON'T WE'RE x'lLy 'tis ''s 'ran '\u017fektedir \u2019s",
    "1 12 123 1234 1234567 x1y 3.14 1,000 $5", "\u0661\u0662\u0663\u0664 \u00bd\u00b2\u21675 \U0001d7d8\U0001d7d9",
    "a b  b\tb\t\tb   b \tb", "a\nb a \nb a\n b a\r\n\r\nb a \n  \n  b \t\n", "a   ", "  ", "\n\n\n", "   1",
    "hi!!!\n\nyou ...\r\n b (foo) [[foo]] (1) #!x a.b a..b, x = y;\n}",
    "a\u00a0b a\u3000\u3000b \u00a0! \x85\x85! a\u2028b \u2009b", "\u200by \ufeffx \u180e \x1c\x1d\x1e\x1f a\x1f1",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 ab\u65e5 2\u6708", "\ud55c\uad6d \u3042\u30a2\u30fc",
    "hi \U0001f44d\U0001f3fd\U0001f44d 1\ufe0f\u20e3 \U0001f468\u200d\U0001f469 \U0001f600\nx",
    "e\u0301a \u0301a e\u0301 1 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "", "\0",
    "Once upon a time there was a little girl.", "=" * 70, "a" * 66, " " * 65 + "x",
]
BROKEN = [
    b"\xff", b"a\xff", b"a b\xff", b"a \xff", b"a\n  \xffx y", b"a\n\t \n  \xff", b"a\r\n  \xff", b"12\n  \xff 12",
    b"a.\n\n    \xff", b"1234\xff", b"don't\xff", b"a\xc2\xa0\n \xff", b"a \xe4\xb8",
    b"a\xe4\xb8\x96!\xe4\xb8\xff\xe4\xb8\x96 a b", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
    b"ok \xf0\x9f\x98",
]


def write_vectors(path, source, tiktoken, tokenizers, tokens, specials, rng):
    texts = RULES + [text for generate in (pieces, words) for text in generate(rng, 80)] + list(long_runs(rng, 12))
    texts += [text.decode("utf-8") for text in glued(rng, tokens, 120) if text.isascii()]
    texts += ["%sa %s%sb<|" % (name, name, name) for name in specials]
    bad = BROKEN + [text for text in raw_bytes(rng, tokens, 80) if text.decode("utf-8", "replace").encode() != text]
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write(
            "# Written by scripts/check_tokenizer.py --write: tiktoken's ids with the vocabulary of %s.\n"
            "# kind, text in hex, ids; kinds: text, bytes (not UTF-8), special (special tokens parsed)\n" % source
        )

        def row(kind, data, ids):
            file.write("%s\t%s\t%s\n" % (kind, data.hex(), " ".join(map(str, ids))))

        for text in texts:
            ids = tiktoken.encode_ordinary(text)
            if ids == tokenizers.encode(text, add_special_tokens=False).ids:
                row("text", text.encode("utf-8"), ids)
        for data in bad:
            row("bytes", data, tiktoken._encode_bytes(data))
        for name in specials:
            text = "%sa %s%sb<|" % (name, name, name)
            row("special", text.encode("utf-8"), tiktoken.encode(text, allowed_special="all"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default=os.path.join(ROOT, "..", "shared", "tokenizer", "tokenizer.model"))
    parser.add_argument("--model", help="the same vocabulary as a --vocab-only model.bin")
    parser.add_argument("--write", metavar="FILE", help="write vectors for a test instead")
    parser.add_argument("--program", default=os.path.join(ROOT, "llama"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--scale", type=float, default=1, help="of the numbers of random strings; code points are always all there"
    )
    args = parser.parse_args()

    rng, start = random.Random(args.seed), time.monotonic()
    tiktoken, tokenizers, (ranks, specials) = (
        load_tiktoken(args.ranks),
        load_tokenizers(args.ranks),
        load_vocabulary(args.ranks),
    )
    tokens, ours = list(ranks), Program(args.program, args.model or args.ranks)
    if args.write:
        return write_vectors(args.write, args.ranks, tiktoken, tokenizers, tokens, specials, rng)
    count = lambda n: max(1, int(n * args.scale))
    kinds = [
        ("code points, alone and between letters", code_points()),
        ("glued tokens", glued(rng, tokens, count(400_000))),
        ("spaces, digits, apostrophes, marks, emoji", pieces(rng, count(400_000))),
        ("letters of many scripts", words(rng, count(150_000))),
        ("long runs", long_runs(rng, count(3_000))),
        ("bytes that are not UTF-8", raw_bytes(rng, tokens, count(150_000))),
    ]
    total = wrong = split = only_one = 0
    for kind, strings in kinds:
        n = differ = apart = failed = 0
        while True:
            batch = [
                text if isinstance(text, bytes) else text.encode("utf-8") for text in itertools.islice(strings, BATCH)
            ]
            if not batch:
                break
            got = ours.encode(batch)
            if ours.decode(got) != batch:
                sys.exit("check_tokenizer.py: %s: the ids do not decode to the texts" % kind)
            for data, ids in zip(batch, got):
                n += 1
                hf = None
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError:
                    wanted = tiktoken._encode_bytes(data)  # nobody else has a rule for these
                else:
                    hf = tokenizers.encode(text, add_special_tokens=False).ids
                    try:
                        wanted = tiktoken.encode_ordinary(text)
                    except BaseException as error:  # a panic of its pattern engine, which has a stack
                        if type(error).__name__ != "PanicException":
                            raise
                        wanted, failed = hf, failed + 1
                if hf is not None and hf != wanted:
                    apart += 1
                    print(
                        "%s: tiktoken and HuggingFace differ on %s; we agree with %s"
                        % (
                            kind,
                            data.hex(),
                            "tiktoken" if ids == wanted else "HuggingFace" if ids == hf else "neither",
                        )
                    )
                elif ids != wanted:
                    differ += 1
                    if differ <= 10:
                        print("%s: %s gives %s, expected %s" % (kind, data.hex(), ids, wanted))
        print(
            "%-45s %9d strings, %d where we differ, %d where the two do; tiktoken failed on %d"
            % (kind, n, differ, apart, failed),
            flush=True,
        )
        total, wrong, split, only_one = total + n, wrong + differ, split + apart, only_one + failed
    print(
        "%d strings in %.0f s: %d where we differ, %d where tiktoken and HuggingFace do"
        % (total, time.monotonic() - start, wrong, split)
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
