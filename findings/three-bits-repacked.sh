#!/usr/bin/env bash
# compressed-tensors 0.17.1 and 0.20.1: codes of 3, 5, 6 and 7 bits are packed in two ways under one name,
# and read as other codes.
#
# Good guess: a packed format of a released name is fixed; pack_to_int32 puts as many whole codes into 32 bits as they
# hold, ten of 3 bits, or packs them without gaps, but what one release wrote another reads.
# What it does: to 0.17.1 a word holds whole codes and its upper bits are left over; from 0.18.0 on codes follow one
# another without gaps, across words. unpack_from_int32 takes words of either without a word, and of a row packed by the
# older only the codes of the first word are right. A row of 20 takes two words either way; one of 4096 takes 410 and
# 384, so that whoever compares shapes notices. The format is `pack-quantized` with `num_bits` 3 in both; 2, 4 and 8
# bits, which fill a word, are the same.
#   32 codes -4 -3 ... 3 of 3 bits
#   0.17.1     08fac688 1a23eb1a 2c688fac 0000003e
#   0.20.1     88fac688 c688fac6 fac688fa
#   0.17.1's by 0.20.1    -4 -3 -2 -1 0 1 2 3 -4 -3 -4 1 -3 2 ...
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check compressed-tensors==0.20.1 transformers==5.24.0 torch==2.11.0
"$work/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$work/older" compressed-tensors==0.17.1
cat > "$work/pack.py" <<'PY'
import json, sys
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

codes = {bits: (torch.arange(32) % 2**bits - 2**(bits - 1)).to(torch.int8)[None] for bits in (2, 3, 4, 8)}
made = {str(bits): pack_to_int32(each, bits)[0].tolist() for bits, each in codes.items()}
if len(sys.argv) < 2:
    print(json.dumps(made))
    sys.exit()
older = json.loads(sys.argv[1])
for words in older["3"], made["3"]:
    print(" ".join("%08x" % (each & 0xffffffff) for each in words))
read = unpack_from_int32(torch.tensor([older["3"]], dtype=torch.int32), 3, codes[3].shape)[0].tolist()
print(*read)
short = pack_to_int32(codes[3][:, :20], 3)
same = [bits for bits in made if made[bits] == older[bits]]
sys.exit(same != ["2", "4", "8"] or read[:14] != [-4, -3, -2, -1, 0, 1, 2, 3, -4, -3, -4, 1, -3, 2] or short.shape != (1, 2)
         or made["3"][0] & 0xffffffff != 0x88fac688 or older["3"][0] != 0x08fac688)
PY
older=$(PYTHONPATH="$work/older" "$work/venv/bin/python" "$work/pack.py" 2> "$work/err") &&
    "$work/venv/bin/python" "$work/pack.py" "$older" 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
