#!/usr/bin/env bash
# openvino-tokenizers 2026.4.1.0: ignore_merges, as in every LLaMA 3 tokenizer.json, is not read: a word of the vocabulary is several
# tokens.
#
# Good guess: the converted tokenizer encodes as the one that it was made from: with ignore_merges a word that is in the vocabulary is
# that token, whatever the merges make of it; or the conversion refuses what it does not know.
# What it does: it always merges. Words that merging does not reach (588 of LLaMA 3's tokens, as Vietnamese " việc") are other tokens,
# which decode to the same text, so that nobody notices. A token that no merge makes is the other way round: it is found within longer
# words, too, where the tokenizer merges.
# Tokens ab, bc, abc with the merges b c, a b, ab c, in this order, and xyz without one:
#   text       transformers 5.24.0    openvino-tokenizers
#   abc        abc                    a bc
#   abcd       a bc d                 a bc d
#   xyz        xyz                    xyz
#   xyzd       x y z d                xyz d
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 transformers==5.24.0 \
    tokenizers==0.23.3 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, sys
import numpy
import openvino
from openvino_tokenizers import convert_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

merges = [("b", "c"), ("a", "b"), ("ab", "c")]
tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges] + ["xyz"]
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=True))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r" ?\p{L}+|\s+"), "isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<|eot_id|>"])
tokenizer.save("tokenizer.json")
json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, open("tokenizer_config.json", "w"))
tokenizer = AutoTokenizer.from_pretrained(".")
encode, decode = (openvino.Core().compile_model(each, "CPU") for each in convert_tokenizer(tokenizer, with_detokenizer=True))
wrong = False
for text, expected in (("abc", ("abc", "a bc")), ("abcd", ("a bc d",) * 2), ("xyz", ("xyz",) * 2), ("xyzd", ("x y z d", "xyz d"))):
    ids = tokenizer(text)["input_ids"], encode([text])["input_ids"][0].tolist()
    found = tuple(" ".join(tokens[i] for i in each) for each in ids)
    print(text, *found, sep=" | ")
    wrong |= found != expected or str(decode(numpy.array([ids[1]]))["string_output"][0]) != text
sys.exit(wrong)
PY
