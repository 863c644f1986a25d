#!/usr/bin/env bash
# safetensors 0.8.0: its NumPy functions write a transposed or cut array as other numbers, without a word.
#
# Good guess: save_file writes the elements of an array in the order of its indices, as tobytes and numpy.save do; or,
# since its documentation asks for contiguous arrays, refuses others, as safetensors.torch does.
# What it does: it writes the array's shape and as many bytes as that takes from where its memory begins. A transposed
# matrix has the new shape and the old order, the first half of the columns has the first rows. Shapes, dtypes and sizes
# are right, so that nobody who reads the file notices. Whoever turns weights of JAX (input x output) into those of
# nn.Linear (output x input) by .T, or splits joined matrices by columns, writes another model;
# numpy.ascontiguousarray before it helps.
# Of [[0 1 2] [3 4 5]]:
#   array            is                       is read back as
#   w.T              [[0 3] [1 4] [2 5]]      [[0 1] [2 3] [4 5]]
#   w[:, :2]         [[0 1] [3 4]]            [[0 1] [2 3]]
#   Fortran order    [[0 1 2] [3 4 5]]        [[0 3 1] [4 2 5]]
#   w[1:]            [[3 4 5]]                [[3 4 5]]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - "$work/model.safetensors" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import numpy
from safetensors.numpy import load, load_file, save, save_file

w = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
arrays = {"w.T": w.T, "w[:, :2]": w[:, :2], "Fortran order": numpy.asfortranarray(w), "w[1:]": w[1:]}
save_file(arrays, sys.argv[1])
found, in_memory = load_file(sys.argv[1]), load(save(arrays))
for name, each in arrays.items():
    print(name, each.astype(int).tolist(), "read back as", found[name].astype(int).tolist())
wanted = {"w.T": [[0, 1], [2, 3], [4, 5]], "w[:, :2]": [[0, 1], [2, 3]], "Fortran order": [[0, 3, 1], [4, 2, 5]],
          "w[1:]": [[3, 4, 5]]}
sys.exit(not all(each[name].tolist() == values for each in (found, in_memory) for name, values in wanted.items()))
PY
