#!/usr/bin/env bash
# transformers 5.24.0: after a call with truncation=True a tokenizer is saved as one that cuts texts off, for tokenizers.
#
# Good guess: truncation=True, max_length=N and padding=True are arguments of one call; save_pretrained writes what was loaded, and
# tokenizer.json says how texts become tokens, all of their tokens.
# What it does: the arguments are set in the tokenizer behind, and stay there until the next call sets others; save_pretrained writes them.
# Read by transformers they are undone at the next call. Read by tokenizers every text longer than N loses its end, and shorter ones of a
# batch get padding, without a word: so a checkpoint saved at the end of a training has a tokenizer.json that gives one program whole texts
# and another their beginnings. A call without truncation just before saving writes it whole.
# Tokens of "hello world", of one for each byte:
#   saved before any call, read by tokenizers                       11
#   saved after a call with truncation=True, max_length=5:
#     by transformers                                               11
#     by tokenizers; "a" in a batch with it                         5; 5
#   saved after one more call, of "x" alone                         11
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import os, sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_alone = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate([*alphabet, "<end>"])}, merges=[]))
bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
bytes_alone.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>", pad_token="<end>")

def saved(name):
    directory = os.path.join(sys.argv[1], name)
    tokenizer.save_pretrained(directory)
    read = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    counts = [len(AutoTokenizer.from_pretrained(directory)("hello world").input_ids), len(read.encode("hello world").ids),
              len(read.encode_batch(["hello world", "a"])[1].ids)]
    print("%-14s transformers %d, tokenizers %d, \"a\" in a batch %d" % (name, *counts))
    return counts

found = [saved("before")]
tokenizer(["abc", "abcdefgh"], truncation=True, max_length=5, padding=True)
found.append(saved("after a call"))
tokenizer("x")
found.append(saved("after another"))
sys.exit(found != [[11, 11, 1], [11, 5, 5], [11, 11, 1]])
PY
