#!/usr/bin/env bash
# tinygrad 0.13.0 with gguf 0.19.0: of a GGUF model every weight becomes float16, and LLaMA 3.1's RoPE scaling is left out.
#
# Good guess: tinygrad.llm, made to run LLaMA 3 from GGUF, computes with the weights of the file, BF16 and F32 ones as they are, and with
# the divisors of the inverse frequencies that converters write for LLaMA 3.1 and later as rope_freqs.weight.
# What it does: each tensor is cast to float16 after it is decoded, norms as well: what is larger than 65504 becomes infinity, what is
# smaller than 3e-8 zero, and a float32 keeps 11 bits. The environment variable HALF=0 stops that. rope_freqs.weight is loaded and not used,
# with either setting: RoPE is that of LLaMA 3.0, and texts are read otherwise than by llama.cpp. Nothing is said of either.
#   embeddings in the file (F32)     1.0006103 70000 1e-08
#   in the model                     1.0009766 inf 0
#   with HALF=0                      as in the file
#   logits with rope_freqs.weight of 8, and without that tensor        equal; with another rope.freq_base they are not
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check tinygrad==0.13.0 gguf==0.19.0 numpy==2.4.6
export DEV=PYTHON       # no compiler is needed
cat > "$work/read.py" <<'PY'
import os, sys
import gguf
import numpy
from tinygrad import Tensor
from tinygrad.llm.model import Transformer

SHAPES = {"attn_norm": [16], "attn_q": [16, 16], "attn_k": [8, 16], "attn_v": [8, 16], "attn_output": [16, 16], "ffn_norm": [16],
          "ffn_gate": [32, 16], "ffn_up": [32, 16], "ffn_down": [16, 32]}
FEW = [1.0006103515625, 70000, 1e-8]

def model_of(name, base=500000.0, divisors=None, few=None):
    path = os.path.join(sys.argv[1], name + ".gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_context_length, 32), (writer.add_embedding_length, 16), (writer.add_block_count, 1),
                       (writer.add_feed_forward_length, 32), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, 8), (writer.add_rope_freq_base, base),
                       (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, [chr(65 + i) for i in range(8)])):
        add(value)
    random = numpy.random.default_rng(0)
    tensors = {"token_embd": [8, 16], **{"blk.0." + each: shape for each, shape in SHAPES.items()}, "output_norm": [16], "output": [8, 16]}
    for each, shape in tensors.items():
        values = numpy.ones(shape) if len(shape) == 1 else random.standard_normal(shape)
        if each == "token_embd" and few:
            values[0, :len(few)] = few
        writer.add_tensor(each + ".weight", values.astype(numpy.float32))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", numpy.full(4, divisors, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Transformer.from_gguf(path)[0]

def logits(model):
    x = model.token_embd(Tensor([[1, 2, 3, 4, 5, 6]])).float()
    for block in model.blk:
        x = block(x, 0)
    return model.output(model.output_norm(x)).numpy()

found = model_of("few", few=FEW).token_embd.weight[0, :3].numpy().astype(float)
plain, scaled, other = logits(model_of("plain")), logits(model_of("scaled", divisors=8)), logits(model_of("other", base=100.0))
equal = numpy.array_equal(plain, scaled), numpy.allclose(plain, other, atol=1e-3)
print("HALF=" + os.environ["HALF"], "- written", *FEW, "in the model", *("%.8g" % each for each in found),
      "- logits equal with rope_freqs.weight: %s, with another base: %s" % equal)
expected = [1.0009765625, numpy.inf, 0] if os.environ["HALF"] == "1" else numpy.float32(FEW).astype(float)
sys.exit(not numpy.array_equal(found, expected) or equal != (True, False))
PY
for half in 1 0; do
    HALF=$half "$work/venv/bin/python" "$work/read.py" "$work" 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
done
