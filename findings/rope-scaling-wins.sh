#!/usr/bin/env bash
# transformers 5.24.0: of rope_parameters and the older rope_scaling in one config.json the older counts,
# and rope_theta is lost.
#
# Good guess: rope_parameters is what this version writes, so it counts, and rope_scaling is read where the other is
# missing. If both say the same, in a file made for versions 4 and 5, it does not matter which.
# What it does: a rope_scaling that is not null replaces all of rope_parameters. Its rope_theta comes from the top
# level; what stood in rope_parameters is gone, and without one at the top level it is 10000.
#   rope_parameters: llama3, theta 500000    rope_scaling            read
#                                            missing, or null        llama3, 500000
#                                            the same llama3         llama3, 10000
#                                            the same, top 500000    llama3, 500000
#                                            linear, factor 2        linear, 10000
# scripts/convert.py refuses a file whose two disagree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
from transformers import AutoConfig

llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}

def read(**older):
    config = {"model_type": "llama", "max_position_embeddings": 131072, **older}
    config["rope_parameters"] = dict(llama3, rope_theta=500000.0)
    with open(os.path.join(sys.argv[1], "config.json"), "w") as file:
        json.dump(config, file)
    rope = AutoConfig.from_pretrained(sys.argv[1]).rope_parameters
    print(older, "->", rope["rope_type"], rope["rope_theta"])
    return rope["rope_type"], rope["rope_theta"]

found = [read(), read(rope_scaling=None), read(rope_scaling=llama3), read(rope_scaling=llama3, rope_theta=500000.0),
         read(rope_scaling={"rope_type": "linear", "factor": 2.0})]
sys.exit(found != [("llama3", 500000), ("llama3", 500000), ("llama3", 10000), ("llama3", 500000), ("linear", 10000)])
PY
