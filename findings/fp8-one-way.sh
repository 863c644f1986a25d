#!/usr/bin/env bash
# safetensors 0.8.0 with ml_dtypes 0.6.0: safetensors.numpy writes FP8 arrays that it cannot read,
# and bfloat16 that load cannot.
#
# Good guess: it reads what it has written. NumPy has neither bfloat16 nor FP8 of its own; ml_dtypes gives it both, so
# that where ml_dtypes is installed both are read, from a file as from bytes.
# What it does: save_file and save write them all, rightly named; load_file knows ml_dtypes' bfloat16 alone and looks
# for float8_e4m3fn in NumPy itself; load, of the same bytes, knows neither.
#   dtype           in the file   load_file        load
#   bfloat16        BF16          bfloat16         KeyError: 'BF16'
#   float8_e4m3fn   F8_E4M3       AttributeError   KeyError: 'F8_E4M3'
#   float8_e5m2     F8_E5M2       AttributeError   KeyError: 'F8_E5M2'
# The bytes are right: numpy.frombuffer with ml_dtypes' type reads them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
import ml_dtypes
import numpy
from safetensors.numpy import load, load_file, save_file

path = os.path.join(sys.argv[1], "file.safetensors")

def read(function, source, values):
    try:
        weight = function(source)["weight"]
        return str(weight.dtype) if weight.tolist() == values.tolist() else "other values"
    except (AttributeError, KeyError) as error:
        return type(error).__name__

found = []
for kind in ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2:
    values = numpy.array([[1, -0.5], [384, 2**-9]], kind)
    save_file({"weight": values}, path)
    with open(path, "rb") as file:
        data = file.read()
    header = data[8:8 + int.from_bytes(data[:8], "little")]
    assert numpy.frombuffer(data[8 + len(header):], kind).tolist() == values.flatten().tolist()
    found.append((json.loads(header)["weight"]["dtype"], read(load_file, path, values), read(load, data, values)))
    print(*found[-1])
sys.exit(found != [("BF16", "bfloat16", "KeyError"), ("F8_E4M3", "AttributeError", "KeyError"),
                   ("F8_E5M2", "AttributeError", "KeyError")])
PY
