#!/usr/bin/env bash
# mistral-common 1.13.1: with Mistral's tokenizers v2 and v3 the system message moves to the newest user message at
# every turn.
#
# Good guess: the prompt of a conversation's next turn is the last prompt, the answer and the new message: what a KV
# cache or a prefix cache lives from. The system message stays where it is, at the beginning, as with v1 and v7.
# What it does: v2 and v3 write it into the last user message, whichever that is; the first then stands there without.
# The prompts of two turns share <s>[INST] and nothing more: every turn is computed anew as a whole.
#   v1, v7    the second prompt begins with the first
#   v2, v3    <s>[INST] sys\n\none[/INST]    then    <s>[INST] one[/INST] two</s>[INST] sys\n\nthree[/INST]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check mistral-common==1.13.1 sentencepiece==0.2.3
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

first = [SystemMessage(content="sys"), UserMessage(content="one")]
second = first + [AssistantMessage(content="two"), UserMessage(content="three")]
found = {}
for version in "v1", "v2", "v3", "v7":
    tokenizer = getattr(MistralTokenizer, version)()
    a, b = (tokenizer.encode_chat_completion(ChatCompletionRequest(messages=each)) for each in (first, second))
    shared = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), len(a.tokens))
    print(version, "%d of %d tokens shared:" % (shared, len(a.tokens)), a.text, "then", b.text)
    found[version] = "all" if shared == len(a.tokens) else shared
sys.exit(found != {"v1": "all", "v2": 2, "v3": 2, "v7": "all"})
PY
