#!/usr/bin/env bash
# mlx-lm 0.32.2: the text of an answer has lost its first blank, though a byte-level model wrote it.
#
# Good guess: with a byte-level tokenizer, as LLaMA 3 has it, the streamed pieces put together are what the tokens
# decode to; blanks are trimmed only where SentencePiece puts one before a text.
# What it does: the streaming detokenizer, which generate and stream_generate use, drops a blank at the beginning for
# byte-level tokenizers too. The prompt and the answer put together are another text than the model's ("Parisis" for
# "Paris is"), with other tokens; indented code begins one column too far left. tokenizer.decode keeps the blank.
#   tokens                decoded           streamed
#   " is", " big"         " is big"         "is big"
#   "   ", " x"           "    x"           "   x"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, pathlib, sys
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

directory = pathlib.Path(sys.argv[1])
tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġis", "Ġbig", "ĠĠĠ", "Ġx"]
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(str(directory / "tokenizer.json"))
(directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
loaded = load(directory)
detokenizer = loaded.detokenizer
found = []
for ids in [256, 257], [258, 259]:
    detokenizer.reset()
    pieces = []
    for each in ids:
        detokenizer.add_token(each)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    pieces.append(detokenizer.last_segment)
    found.append((loaded.decode(ids), "".join(pieces)))
    print("decoded %r, streamed %r" % found[-1])
sys.exit(type(detokenizer) is not BPEStreamingDetokenizer or found != [(" is big", "is big"), ("    x", "   x")])
PY
