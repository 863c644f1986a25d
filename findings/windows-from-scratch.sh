#!/usr/bin/env bash
# lm-eval 0.4.13: in its perplexity of a long text the first token of each window has one token before it, and only the last window more.
#
# Good guess: windows overlap, so that each token is predicted from at least half a window, as in llama.cpp's perplexity and in
# transformers' guide; or the text is cut into windows that are scored alike.
# What it does: with loglikelihood_rolling's settings windows lie end to end: a token's context is as long as its place in its window, 1 to
# the model's length, and every token counts. The last window, if it is not full, reaches back and is full: its tokens, be it one, have the
# longest context. So the perplexity is higher than that of a sliding window, and falls with the length that the model says of itself.
# The first token, which other programs leave out, is predicted from the beginning-of-text token. acc_norm, next to it, divides by the
# number of characters of an answer, not of its tokens or bytes.
# Of tokens 1 to 10 and a length of 4, after the token 0: scored, and how many tokens were before each
#   1 2 3 4    1 2 3 4
#   5 6 7 8    1 2 3 4
#   9 10       3 4
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check lm-eval==0.4.13 datasets==4.4.1
"$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask

windows = utils.get_rolling_token_windows(token_list=list(range(1, 11)), prefix_token=0, max_seq_len=4, context_len=1)
found = []
for context, scored in map(utils.make_disjoint_window, windows):
    found.append((scored, [len(context) + each for each in range(len(scored))]))
    print("scored", *scored, "tokens before each", *found[-1][1])
path = os.path.join(sys.argv[1], "questions.json")
answers = ["日本国", "ab"]          # 3 characters, 9 bytes; 2 characters, 2 bytes
with open(path, "w") as file:
    json.dump([{"question": "q", "choices": answers, "gold": 0}], file)
task = ConfigurableTask(config={"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": path}},
                                "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
                                "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc_norm"}]})
by_character = []
for first in -3.1, -2.9:            # against -2 of the second, whose log-likelihood is -1 a character
    by_character.append(task.process_results(next(iter(task.test_docs())), [(first, False), (-2.0, False)])["acc_norm"])
print("acc_norm of the first answer at -3.1 and at -2.9:", *by_character)
sys.exit(found != [([1, 2, 3, 4], [1, 2, 3, 4]), ([5, 6, 7, 8], [1, 2, 3, 4]), ([9, 10], [3, 4])] or by_character != [0, 1])
PY
