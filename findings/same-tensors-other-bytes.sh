#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors and metadata, written twice, are two files.
#
# Good guess: the bytes follow from what is written, so that a checksum tells whether two checkpoints are the same:
# tensors have their order in the file, and __metadata__ is in the order of the dictionary that was given, or sorted.
# What it does: tensors lie by the size of their elements, the largest first, and then by name,
# whatever order they are given in.
# Metadata goes through a hash map of a new random seed: its keys come in another order each time, even within one
# process. With one key alone, as transformers writes it, the bytes are always the same.
#   save of b, c (float16), z (float32), in any order    z b c
#   20 times the same, metadata of one key               1 file
#   20 times the same, metadata of eight keys            20 files, of equal tensors and equal metadata
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, sys
import numpy
from safetensors.numpy import save

tensors = {"c": numpy.ones(3, numpy.float16), "b": numpy.zeros(5, numpy.float16), "z": numpy.ones(2, numpy.float32)}
eight = {"key%d" % i: str(i) for i in range(8)}

def header(data):
    return json.loads(data[8:8 + int.from_bytes(data[:8], "little")])

orders = {tuple(header(save({name: tensors[name] for name in names}))) for names in ("cbz", "zbc", "bzc")}
one = {save(tensors, {"format": "pt"}) for _ in range(20)}
many = [save(tensors, eight) for _ in range(20)]
assert all(header(each) == header(many[0]) and len(each) == len(many[0]) for each in many)
assert all(each.endswith(many[0][-32:]) for each in many)
print("order", orders, "files of one key", len(one), "of eight", len(set(many)))
sys.exit(not (orders == {("z", "b", "c")} and len(one) == 1 and len(set(many)) > 1))
PY
