#!/usr/bin/env bash
# llama.cpp (as xllamacpp 2026.10.11549 has it): a token ends the answer by its name, whatever the file says of it.
#
# Good guess: an answer ends at the ids that the GGUF file gives (tokenizer.ggml.eos_token_id, eot_token_id); other tokens are text or, if they
# are of the type CONTROL, are not shown.
# What it does: a list of names is looked for in the vocabulary: `<|im_end|>`, `<|end|>`, `<EOT>`, `</s>`, `<|endoftext|>`, `<end_of_turn>`,
# `<|return|>`, `<|call|>` and others. A token of such a name ends every answer, also one of the type NORMAL that the model uses in its text
# (code in which `</s>` is a tag, say) or that a merged vocabulary has left from another model. The text before it is given, the reason is
# the usual one ("eos"), and nothing says that this was not the model's own end token. A name not on the list has no such effect.
# A model that writes b, the token, c, d and then its end token, <s>:
#   the token, NORMAL       answer
#   <|fin|>                 b<|fin|>cd
#   <|im_end|> or others    b
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
from tokenizers import pre_tokenizers

alphabet, kinds = sorted(pre_tokenizers.ByteLevel.alphabet()), gguf.TokenType

def write(name, kind):
    """A model without layers that do anything: after each token of the list comes the next one."""
    tokens = alphabet + ["<s>", name]
    size = -(-len(tokens) // 32) * 32
    embeddings, output = numpy.zeros((2, len(tokens), size), numpy.float32)
    numpy.fill_diagonal(embeddings, 1)
    ids = [tokens.index(each) for each in ("a", "b", name, "c", "d", "<s>")]
    output[ids[1:], ids[:-1]] = 1
    writer = gguf.GGUFWriter(sys.argv[1], "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.NORMAL] * len(alphabet) + [kinds.CONTROL, kind])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(alphabet))
    writer.add_eos_token_id(len(alphabet))
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output.weight", output)
    for part, shape in {"attn_q": (size, size), "attn_k": (size, size), "attn_v": (size, size), "attn_output": (size, size),
                        "ffn_gate": (32, size), "ffn_up": (32, size), "ffn_down": (size, 32)}.items():
        writer.add_tensor("blk.0.%s.weight" % part, numpy.zeros(shape, numpy.float32))
    for part in "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm":
        writer.add_tensor(part + ".weight", numpy.ones(size, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

def answer():
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.cpuparams.n_threads = sys.argv[1], 64, False, 1
    server = xllamacpp.Server(settings)
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps({"prompt": "a", "n_predict": 10, "temperature": 0}).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as got:
        got = json.load(got)
        return got["content"], got["stop_type"]

found = {}
for kind in kinds.NORMAL, kinds.USER_DEFINED, kinds.CONTROL:
    for name in "<|fin|>", "<|im_end|>", "<|end|>", "<EOT>", "</s>", "<|endoftext|>", "<end_of_turn>", "<|return|>", "<|call|>":
        write(name, kind)
        found[kind, name] = answer()
        print(kind.name, name, *found[kind, name], flush=True)
sys.exit(any(got != (("bcd" if kind == kinds.CONTROL else "b<|fin|>cd") if name == "<|fin|>" else "b", "eos") for (kind, name), got in found.items()))
PY
