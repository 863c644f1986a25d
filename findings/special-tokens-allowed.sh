#!/usr/bin/env bash
# xgrammar 0.2.9: inside a JSON string, or whatever allows "<", special tokens are allowed.
#
# Good guess: a grammar is about text: a special token is none, and is masked, but for the one that ends an answer, where an answer may
# end. TokenizerInfo.from_huggingface is given the tokenizer, which says what is special, and has a list special_token_ids.
# What it does: the list is empty; only a token without text counts as special. All others have their names for a text, and where "<",
# letters and "|" may stand, <|start_header_id|> may: a model may write the beginning of a message, or a second beginning of the text,
# inside a string. An end token that is not the one named eos_token is one of them. Decoded with skip_special_tokens the string is
# another than the one that was allowed. llguidance 1.9.1, given the same tokenizer, allows none of them.
# Special tokens allowed after the quotation mark that begins a JSON string; eos_token is <|eot_id|>:
#   xgrammar      <|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|>
#   llguidance    -
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check xgrammar==0.2.9 llguidance==1.9.1 torch==2.11.0 transformers==5.24.0 \
    tokenizers==0.23.3 numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import sys
import llguidance
import llguidance.hf
import llguidance.numpy
import xgrammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(special)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[4])
quotation_mark = tokenizer.encode('"')
ids = tokenizer.convert_tokens_to_ids(special)

info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_json_schema({"type": "string"}))
assert all(map(matcher.accept_token, quotation_mark))
mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
matcher.fill_next_token_bitmask(mask)
masks = {"xgrammar": mask[0].tolist()}

known = llguidance.hf.from_tokenizer(tokenizer)
other = llguidance.LLMatcher(known, llguidance.LLMatcher.grammar_from_json_schema({"type": "string"}))
assert other.consume_tokens(quotation_mark)
mask = llguidance.numpy.allocate_token_bitmask(1, known.vocab_size)
llguidance.numpy.fill_next_token_bitmask(other, mask)
masks["llguidance"] = mask[0].tolist()

allowed = {name: [i for i in range(len(tokenizer)) if mask[i // 32] >> i % 32 & 1] for name, mask in masks.items()}
for name, each in allowed.items():
    special_ones = tokenizer.convert_ids_to_tokens([i for i in each if i in ids])
    print(name, "allows %d ordinary tokens and" % sum(i < 256 for i in each), *special_ones)
text = [*quotation_mark, *tokenizer.encode("a"), ids[2], *quotation_mark]
accepted = all(map(matcher.accept_token, text[1:]))
print("accepted:", accepted, tokenizer.decode(text), tokenizer.decode(text, skip_special_tokens=True))
sys.exit([i for i in allowed["xgrammar"] if i in ids] != ids[:4] or any(i in ids for i in allowed["llguidance"]) or not accepted
         or min(map(len, allowed.values())) < 100 or info.special_token_ids != [] or info.stop_token_ids != [ids[4]])
PY
