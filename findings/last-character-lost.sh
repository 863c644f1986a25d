#!/usr/bin/env bash
# onnxruntime-extensions 0.15.2: "I <3" is encoded as "I <", if the tokenizer has an added token that begins with "<".
#
# Good guess: what is encoded is the whole text, and what begins as an added token and goes on otherwise is ordinary text.
# What it does: where a text ends within the beginning of an added token, or one character after it, only the first character of that
# beginning is encoded; the rest is lost and nothing is said. One more character, and all is there. Every LLaMA 3 tokenizer has such
# tokens, as "<|eot_id|>".
# Encoded and decoded with the added token <|eot_id|>; tokenizers 0.23.3 gives all of them back:
#   I <3          I <
#   1<2           1<
#   say <|        say <
#   a<b           a<
#   a<b           a<b     with a blank behind
#   <|eot_id      <
#   (a<b)         (a<b)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check onnxruntime-extensions==0.15.2 tokenizers==0.23.3 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, sys
from onnxruntime_extensions import pp_api
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<|eot_id|>"])
tokenizer.save("tokenizer.json")
json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, open("tokenizer_config.json", "w"))
extension = pp_api.Tokenizer(".")
expected = {"I <3": "I <", "1<2": "1<", "say <|": "say <", "a<b": "a<", "a<b ": "a<b ", "<|eot_id": "<", "(a<b)": "(a<b)",
            "I <3 you": "I <3 you"}
wrong = False
for text, whole in expected.items():
    found = extension.detokenize([int(each) for each in extension.tokenize(text)])[0]
    print("%-12r %r" % (text, found))
    wrong |= found != whole or tokenizer.decode(tokenizer.encode(text).ids) != text
sys.exit(wrong)
PY
