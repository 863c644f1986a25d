#!/usr/bin/env bash
# tokenizers 0.23.3: what DecodeStream gives, joined, is not the text: what it holds back at the end is never given.
#
# Good guess: the parts that step() gives are the text of all ids, as decode has it; a broken character at the end comes with the last
# step, or can be asked for.
# What it does: as long as the text ends with U+FFFD, step gives None, since the rest of a character may follow; there is no way to say
# that nothing will. An answer that its length limit cuts within a character ends before it, without the mark that decode writes; and a
# U+FFFD that is the text's own, which a model may write, waits for the next character, and at the end is lost.
# Whoever streams an answer and compares it with its decoded ids, or counts characters for stop strings, has two texts.
#   bytes, one token each             decode        joined
#   a, all but the last byte of 日    a\ufffd       a
#   ab, U+FFFD                        ab\ufffd      ab
#   U+FFFD, b                         \ufffdb       \ufffdb
#   a, a broken byte, b               a\ufffdb      a\ufffdb
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

# the 256 characters of byte-level vocabularies, in the order of their bytes
own = [*range(33, 127), *range(161, 173), *range(174, 256)]
rest = [byte for byte in range(256) if byte not in own]
names = {byte: chr(byte) if byte in own else chr(256 + rest.index(byte)) for byte in range(256)}
tokenizer = Tokenizer(models.BPE({name: byte for byte, name in names.items()}, []))
tokenizer.decoder = decoders.ByteLevel()
found = []
for text in "a日".encode()[:-1], "ab\ufffd".encode(), "\ufffdb".encode(), b"a\xe6b":
    stream = DecodeStream(skip_special_tokens=False)
    parts = [stream.step(tokenizer, each) for each in text]
    found.append((tokenizer.decode(list(text)), "".join(filter(None, parts))))
    print(text, *map(ascii, found[-1]), parts)
sys.exit(found != [("a\ufffd", "a"), ("ab\ufffd", "ab"), ("\ufffdb", "\ufffdb"), ("a\ufffdb", "a\ufffdb")])
PY
