#!/usr/bin/env python3
"""Compares how added tokens are found in texts with HuggingFace tokenizers: the ids must be equal.

    python3 -m venv build/venv-chat && build/venv-chat/bin/pip install -r scripts/requirements-chat.txt
    build/venv-chat/bin/python scripts/check_added_tokens.py [--program ./llama]

Random sets of added tokens, special and not, with `normalized` true and false, over few letters so that they overlap in
every way; random texts over the same letters, with special tokens counted and not (tokenizers' encode_special_tokens).
The rule in words is `find` below; with --program each set goes through convert.py --vocab-only, and the program's
`--tokenize --hex`, with and without --special, must give the same ids. Exit status 1 if any text differs.

    check_added_tokens.py --write tests/vectors/added-tokens.tsv

writes sets, texts and ids for the tests instead.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

import check_chat

LETTERS = ["a", "b", "<", "|", ">", " ", "\n", "1", "\u00e9", "\u4e16", "t", "h"]
RANKS = {bytes([byte]): byte for byte in range(256)}
RANKS.update({token: 256 + i for i, token in enumerate((b"th", b"ab", b"<|", b"|>", b" a", b"\xc3\xa9", b"aa", b" <"))})

WRITTEN = """\
# Written by scripts/check_added_tokens.py --write: HuggingFace tokenizers' ids. Tokens 0 to 255 are the bytes;
# `ordinary` are those after them. `set`: added tokens, each [id, text, kind, pass]; then texts under it with
# special tokens counted (`special`) and not (`text`).
"""


class Token:
    def __init__(self, rank, text, special, normalized):
        self.id, self.text, self.special, self.normalized = rank, text, special, normalized

    def entry(self):
        return {"id": self.id, "content": self.text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": self.normalized, "special": self.special}


def random_tokens(rng):
    texts = set()
    while len(texts) < rng.randint(2, 9):
        text = "".join(rng.choices(LETTERS[:rng.choice((3, 6, len(LETTERS)))], k=rng.randint(1, 5)))
        if len(text.encode()) > 1 and text.encode() not in RANKS:
            texts.add(text)
    kinds = [(True, False), (False, False), (False, True), (True, True)]
    texts = sorted(sorted(texts), key=lambda _: rng.random())       # a set's own order is another in each run
    return [Token(len(RANKS) + i, text, *rng.choice(kinds)) for i, text in enumerate(texts)]


def random_text(rng, tokens):
    parts = [token.text for token in tokens] + LETTERS
    return "".join(rng.choice(parts)[rng.choice((0, 0, 0, 1)):] for _ in range(rng.randint(1, 12)))


def find(text, tokens, special):
    """[text or id]: a pass over the whole text with the tokens that are not normalized, then one with the others over
    what the first left. A pass takes the leftmost match, of those that begin there the longest, and goes on after it. A
    special token that does not count (special false) takes its place all the same: it stays characters, and nothing is
    found in it in this pass."""
    parts = [text]
    for normalized in (False, True):
        found = []
        for part in parts:
            found += [part] if isinstance(part, int) else one_pass(
                part, [token for token in tokens if token.normalized == normalized], special)
        parts = found
    return [part for part in parts if part != ""]


def one_pass(text, tokens, special):
    parts, begin, at = [], 0, 0
    while at < len(text):
        token = max((each for each in tokens if text.startswith(each.text, at)), key=lambda each: len(each.text),
                    default=None)
        if token is None:
            at += 1
            continue
        end = at + len(token.text)
        if special or not token.special:
            parts += [text[begin:at], token.id]
            begin = end
        at = end
    return parts + [text[begin:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="./llama, compared as well")
    parser.add_argument("--sets", type=int, default=100, help="of added tokens (100)")
    parser.add_argument("-n", type=int, default=200, help="texts for each set, each twice (200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", metavar="FILE", help="write sets and texts for the tests instead")
    args = parser.parse_args()

    from tokenizers import Tokenizer
    rng, total, wrong, rows = random.Random(args.seed), 0, 0, []
    plain = check_chat.tokenizer_json(RANKS)
    plain["added_tokens"] = []
    ordinary = Tokenizer.from_str(json.dumps(plain))
    for number in range(12 if args.write else args.sets):
        tokens = random_tokens(rng)
        library = Tokenizer.from_str(json.dumps(dict(plain, added_tokens=[token.entry() for token in tokens])))
        texts = [random_text(rng, tokens) for _ in range(12 if args.write else args.n)]
        rows.append(("set", json.dumps([[token.id, token.text, 1 if token.special else 3, 2 if token.normalized else 1]
                                        for token in tokens])))
        with tempfile.TemporaryDirectory() as top:
            model = args.program and write_model(top, plain, tokens)
            for special in (True, False):
                library.encode_special_tokens = not special
                expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
                ours = [[rank for part in find(text, tokens, special) for rank in (
                    [part] if isinstance(part, int) else ordinary.encode(part, add_special_tokens=False).ids)]
                    for text in texts]
                theirs = program_ids(args.program, model, texts, special) if args.program else ours
                for text, want, here, there in zip(texts, expected, ours, theirs):
                    total += 1
                    rows.append(("special" if special else "text",
                                 "%s\t%s" % (json.dumps(text), " ".join(map(str, want)))))
                    if want != here or want != there:
                        wrong += 1
                        if wrong <= 10:
                            print("set %d, %s, special %s:\n  expected %s\n  rule     %s\n  program  %s" % (
                                number, json.dumps(text), special, want, here, there))
    if args.write and not wrong:
        with open(args.write, "w", encoding="ascii", newline="\n") as file:
            file.write(WRITTEN)
            for token, rank in list(RANKS.items())[256:]:
                file.write("ordinary\t%d\t%s\n" % (rank, token.hex()))
            for row in rows:
                file.write("%s\t%s\n" % row)
    print("%d texts, %d differ from tokenizers (%s)" % (
        total, wrong, "the program and the rule" if args.program else "the rule"))
    return 1 if wrong else 0


def write_model(top, plain, tokens):
    source, model = os.path.join(top, "checkpoint"), os.path.join(top, "vocab.bin")
    check_chat.write_checkpoint(source, None, RANKS, dict(plain, added_tokens=[token.entry() for token in tokens]))
    settings = os.path.join(source, "tokenizer_config.json")
    with open(settings, "w", encoding="utf-8") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, file)
    check_chat.convert_vocabulary(source, model)
    return model


def program_ids(program, model, texts, special):
    flags = ["--tokenize", "--hex", "--quiet", *(["--special"] if special else [])]
    run = subprocess.run([program, model, *flags, "-f", "-"],
                         input="".join(text.encode().hex() + "\n" for text in texts).encode(), stdout=subprocess.PIPE,
                         check=True)
    return [list(map(int, line.split())) for line in run.stdout.decode().split("\n")[:-1]]


if __name__ == "__main__":
    sys.exit(main())
