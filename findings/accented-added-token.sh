#!/usr/bin/env bash
# tokenizers 0.23.3: with a byte-level decoder not every added token decodes to itself: "café" comes back broken,
# "日本" whole.
#
# Good guess: an added token's content is text, not an alphabet of bytes,
# and is written as it stands: what was encoded is decoded.
# What it does: the decoder takes a token for byte-level text if all its characters are among the 256 that stand for
# bytes. An é is one of them, for byte 233, which alone is no UTF-8; so is Ġ, for the blank. With one character that is
# not, 日 or a blank, the whole token stays. Special tokens are no exception. Encoding finds all of them.
# Who writes contents as they are has other text than tokenizers; who follows it writes U+FFFD.
#   added token     decoded
#   café            caf\ufffd
#   <ü>             <\ufffd>
#   Ġx              a blank and x
#   café au lait    café au lait
#   日本            日本
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_tokens(["café", "Ġx", "café au lait", "日本"])
tokenizer.add_special_tokens(["<ü>"])
found = []
for token in "café", "<ü>", "Ġx", "café au lait", "日本":
    ids = tokenizer.encode(token).ids
    assert ids == [tokenizer.token_to_id(token)]
    found.append(tokenizer.decode(ids, skip_special_tokens=False))
    print(ascii(token), "->", ascii(found[-1]))
sys.exit(found != ["caf\ufffd", "<\ufffd>", " x", "café au lait", "日本"])
PY
