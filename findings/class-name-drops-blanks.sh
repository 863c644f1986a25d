#!/usr/bin/env bash
# transformers 5.17.0: the class that tokenizer_config.json names replaces the pre-tokenizer of tokenizer.json.
#
# Good guess: tokenizer.json is complete, and AutoTokenizer encodes as it says;
# tokenizer_class only chooses the wrapper.
# What it does: with "LlamaTokenizer" or "LlamaTokenizerFast" a byte-level tokenizer.json gets the pre-tokenizer and the
# decoder of SentencePiece, whose mark for a blank the vocabulary lacks: every blank is dropped, and nothing is said.
# "a b  c" is then three tokens and decodes to "abc". Without a class, or with PreTrainedTokenizerFast, it is as in
# tokenizer.json. (transformers 5.24.0 sees that the file is byte-level, and leaves it as it is.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.17.0 tokenizers==0.23.3
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

text, directory = "a b  c", os.path.join(sys.argv[1], "model")
os.mkdir(directory)
tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
assert tokenizer.decode(tokenizer.encode(text).ids) == text
tokenizer.save(os.path.join(directory, "tokenizer.json"))
with open(os.path.join(directory, "config.json"), "w") as file:
    json.dump({"model_type": "llama"}, file)

def through(settings):
    """Tokens of the text, and the text again."""
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        json.dump(settings, file)
    loaded = AutoTokenizer.from_pretrained(directory)
    ids = loaded(text, add_special_tokens=False).input_ids
    return len(ids), loaded.decode(ids)

found = [through({}), *(through({"tokenizer_class": name}) for name in (
    "PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"))]
print(found)
sys.exit(found != [(6, text), (6, text), (3, "abc"), (3, "abc")])
PY
