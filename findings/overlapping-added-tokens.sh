#!/usr/bin/env bash
# llama.cpp (as xllamacpp 2026.10.11549 has it) and tokenizers 0.23.3: of overlapping added tokens the one takes the
# longest, wherever it stands, the other the first in the text.
#
# Good guess: added tokens are found from the left to the right, at each place the longest, so that a text has the same
# tokens in both.
# What they do: tokenizers does so. llama.cpp goes through all added tokens from the longest to the shortest and cuts
# each out of the whole text before it looks for the next. A long one later in the text takes the end of a shorter one
# before it.
# Where one token begins another, as "<" and "<=>" or runs of blanks, both agree.
#   added tokens <<, <=>, =>, and the text    tokenizers    llama.cpp
#   <=>=>                                     <=> =>        <=> =>
#   <<=>                                      << =>         < <=>
#   a<<=>b                                    a << => b     a < <=> b
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 tokenizers==0.23.3
"$work/venv/bin/python" - "$work/model.gguf" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, sys, urllib.request
import gguf
import numpy
import xllamacpp
from tokenizers import Tokenizer, models, pre_tokenizers

alphabet, added = sorted(pre_tokenizers.ByteLevel.alphabet()), ["<<", "<=>", "=>"]
tokens, kinds = alphabet + ["ab", "<s>"] + added, gguf.TokenType
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet + ["ab"])}, [("a", "b")]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.add_tokens(added)

writer = gguf.GGUFWriter(sys.argv[1], "llama")
writer.add_context_length(256)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(32)
writer.add_head_count(1)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types([kinds.NORMAL] * 257 + [kinds.CONTROL] + [kinds.USER_DEFINED] * len(added))
writer.add_token_merges(["a b"])
writer.add_bos_token_id(257)
writer.add_eos_token_id(257)
for name in "token_embd", "output":
    writer.add_tensor(name + ".weight", numpy.zeros((len(tokens), 32), numpy.float32))
for name in "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down":
    writer.add_tensor("blk.0.%s.weight" % name, numpy.zeros((32, 32), numpy.float32))
for name in "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm":
    writer.add_tensor(name + ".weight", numpy.ones(32, numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.warmup, settings.cpuparams.n_threads = sys.argv[1], 256, False, 1
server = xllamacpp.Server(settings)

def by_llama_cpp(text):
    body = json.dumps({"content": text, "with_pieces": True, "add_special": False}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return [token["piece"] for token in json.load(answer)["tokens"]]

found = []
for text in "<=>=>", "<<=>", "a<<=>b":
    found.append((tokenizer.encode(text).tokens, by_llama_cpp(text)))
    print(text, " tokenizers:", *found[-1][0], " llama.cpp:", *found[-1][1])
sys.exit(found != [(["<=>", "=>"], ["<=>", "=>"]), (["<<", "=>"], ["<", "<=>"]), (["a", "<<", "=>", "b"], ["a", "<", "<=>", "b"])])
PY
