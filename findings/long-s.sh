#!/usr/bin/env bash
# fastokens 0.3.5, splintr-rs 0.22.0 and tokie 0.1.4: of a LLaMA 3 tokenizer.json they split "'ſ" otherwise than tokenizers, and tokie
# some blanks, too.
#
# Good guess: made to replace tokenizers, they give the same tokens for any text, and where they differ it is a pattern they do not know.
# What they do: in LLaMA 3's pattern (?i:'s|'t|...) ſ, the long s of old prints, is an s in another case, so that 'ſ is a piece of its own.
# These three know the pattern, but only s and S. tokie also cuts after a no-break space, which French has before a colon, and before a
# vertical tab or a form feed gives blanks one by one. gigatoken 0.10.0 and kitoken 0.11.1 agree with tokenizers in all.
# Pieces, seen by merges across the places where they may be cut:
#   text                       tokenizers    fastokens, splintr    tokie
#   'ſx                        'ſ x          'ſx                   'ſx
#   a, no-break space, b       a _b          a _b                  a _ b
#   2 blanks, vertical tab     __ VT         __ VT                 _ _ VT
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3 fastokens==0.3.5 splintr-rs==0.22.0 tokie==0.1.4 \
    gigatoken==0.10.0 kitoken==0.11.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import fastokens
import gigatoken
import kitoken
import splintr
import tokie
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
spelled = lambda text: byte_level.pre_tokenize_str(text)[0][0]
long_s, no_break, blank = spelled("ſ"), spelled("\u00a0"), spelled(" ")
merges = [tuple(long_s), (long_s, "x"), tuple(no_break), (no_break, "b"), (blank, blank)]
vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, ignore_merges=True))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<|eot_id|>"])
tokenizer.save("tokenizer.json")
encoders = {"tokenizers": lambda text: tokenizer.encode(text).ids,
            "gigatoken": gigatoken.Tokenizer("tokenizer.json").encode,
            "kitoken": lambda text: kitoken.Kitoken.from_file("tokenizer.json").encode(text, False),
            "fastokens": lambda text: fastokens.Tokenizer.from_file("tokenizer.json").encode(text).ids,
            "splintr": splintr.from_json("tokenizer.json").encode,
            "tokie": lambda text: tokie.Tokenizer.from_json("tokenizer.json").encode(text, add_special_tokens=False).ids}
counts = {}
for name, encode in encoders.items():
    counts[name] = [len(encode(text)) for text in ("'ſx", "a\u00a0b", "  \v x")]
    print("%-12s tokens of the three texts:" % name, *counts[name])
right = [3, 2, 4]
sys.exit(counts != {"tokenizers": right, "gigatoken": right, "kitoken": right, "fastokens": [2, 2, 4], "splintr": [2, 2, 4],
                    "tokie": [2, 3, 5]})
PY
