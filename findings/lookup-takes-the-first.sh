#!/usr/bin/env bash
# transformers 5.24.0: prompt lookup takes the earliest occurrence of the last n-gram,
# and an end token after it ends the search.
#
# Good guess: what followed the latest occurrence is proposed, it being likeliest to be followed alike again; and if an
# occurrence has nothing to propose, the next one or a shorter n-gram has.
# What it does: of the longest n-gram that is found, the earliest occurrence counts. Its continuation is cut before an
# end token; if that leaves nothing, nothing is proposed, though other occurrences and shorter n-grams follow.
# Continuations that a logits processor forbids are passed over, as one would have it.
#   1 2 10 11 12 1 2 20 21 22 1 2                 10 11 12
#   1 2 10 11 12 5 1 2 20 21 22 5 1 2             20 21 22: 5 1 2 is the longer
#   1 2 7 11 12 1 2 20 21 22 1 2, end token 7     nothing
#   the same, no end token but token 7 banned     20 21 22
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 torch==2.11.0
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import torch
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

def proposed(ids, **options):
    lookup = PromptLookupCandidateGenerator(num_output_tokens=3, max_matching_ngram_size=3, max_length=100, **options)
    return lookup.get_candidates(torch.tensor([ids]))[0][0, len(ids):].tolist()

ends = [1, 2, 7, 11, 12, 1, 2, 20, 21, 22, 1, 2]
banned = LogitsProcessorList([SuppressTokensLogitsProcessor([7])])
found = [proposed([1, 2, 10, 11, 12, 1, 2, 20, 21, 22, 1, 2]), proposed([1, 2, 10, 11, 12, 5, 1, 2, 20, 21, 22, 5, 1, 2]),
         proposed(ends, eos_token_id=torch.tensor([7])), proposed(ends, logits_processor=banned, vocab_size=32)]
for each in found:
    print(each)
sys.exit(found != [[10, 11, 12], [20, 21, 22], [], [20, 21, 22]])
PY
