"""The CPU engine beside llama.cpp's llama-bench: steps at context 128 and prompts, in turns. For bench_peers.py."""
import json
import os
import statistics
import subprocess
import sys

CONTEXT, STEPS, PROMPT = 128, 32, 512
# What --weights calls it, llama-quantize, people, and the precisions of engine cpu that steps and prompts are measured
# in: llama.cpp rounds activations to bf16 or 8 bits, but of F32 weights none. (A step with those reads twice as much
# there.)
TYPES = (("bf16", None, "BF16", ("f32", "bf16"), ("bf16",)), ("int8:32", "Q8_0", "Q8_0", ("f32", "bf16"), ("bf16",)),
         ("int4:32", "Q4_0", "Q4_0", ("f32", "bf16"), ("bf16",)), ("bf16", "F32", "F32", (), ("f32",)))


def stop(text):
    sys.exit("bench_peers.py: " + text)


def run(command):
    """What it prints, or the end."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        stop("%s: %s" % (command[0], error.strerror))
    if done.returncode:
        stop("%s: exit status %d: %s" % (command[0], done.returncode, done.stderr.strip()[-300:]))
    return done.stdout


# ----------------------------------------------------------------------------------------------------- random weights

def write_gguf(path, shape):
    """A model of that shape in BF16, of random weights and without a vocabulary."""
    try:
        import gguf
        import numpy as np
    except ImportError as missing:
        stop("the Python package %s is missing: pip install -r scripts/requirements-perplexity.txt" % missing.name)
    random = np.random.default_rng(0)
    numbers = ((random.standard_normal(1 << 22) * 0.02).astype("<f4").view("<u4") >> 16).astype("<u2")
    dim, hidden, head_dim = shape["dim"], shape["hidden"], shape["head_dim"]
    q_dim, kv_dim = shape["heads"] * head_dim, shape["kv_heads"] * head_dim
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(dim)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")

    def add(name, rows, cols):
        values = np.resize(np.roll(numbers, int(random.integers(numbers.size))), rows * cols)
        writer.add_tensor(name + ".weight", values.view(np.uint8).reshape(rows, 2 * cols),
                          raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd", shape["vocab"], dim)
    if not shape["tied"]:
        add("output", shape["vocab"], dim)
    writer.add_tensor("output_norm.weight", np.ones(dim, "<f4"))
    for layer in range(shape["layers"]):
        block = "blk.%d." % layer
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(block + norm + ".weight", np.ones(dim, "<f4"))
        for name, rows, cols in (("attn_q", q_dim, dim), ("attn_k", kv_dim, dim), ("attn_v", kv_dim, dim),
                                 ("attn_output", dim, q_dim), ("ffn_gate", hidden, dim), ("ffn_up", hidden, dim),
                                 ("ffn_down", dim, hidden)):
            add(block + name, rows, cols)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_files(args, shape):
    """Those of TYPES, made where they are not there yet."""
    os.makedirs(args.work, exist_ok=True)
    source = os.path.join(args.work, "%s-bf16.gguf" % args.shape)
    quantize = os.path.join(os.path.dirname(args.llama_bench), "llama-quantize")
    paths = []
    for _, name, *_ in TYPES:
        path = os.path.join(args.work, "%s-%s.gguf" % (args.shape, name)) if name else source
        if not os.path.exists(path):
            print("bench_peers.py: writing %s" % path, file=sys.stderr, flush=True)
            part = path + ".part"
            if name:
                run([quantize, source, part, name])
            else:
                write_gguf(part, shape)
            os.rename(part, path)
        paths.append(path)
    return paths


# ----------------------------------------------------------------------------------------------------------- measuring

def time_ours(args, vocab, weights, precision, prompt):
    """Milliseconds of a token, after CONTEXT of them, or of a prompt."""
    n = PROMPT if prompt else CONTEXT
    ids = " ".join(str((1000 + 37 * i) % vocab) for i in range(n))
    line = run([args.llama, "--synthetic", args.shape, "--weights", weights, "--engine", "cpu", "-t", str(args.threads),
                "--precision", precision, "--ids", "-p", ids, "-n", str(1 if prompt else STEPS), "--json", "--quiet"])
    return json.loads(line)["timings"]["first_token_ms" if prompt else "ms_per_token"]


def time_theirs(args, path, prompt):
    what = ["-p", str(PROMPT), "-n", "0"] if prompt else ["-p", "0", "-n", str(STEPS), "-d", str(CONTEXT)]
    rows = json.loads(run([args.llama_bench, "-m", path, "-t", str(args.threads), *what, "-r", "1", "-o", "json"]))
    return rows[0]["samples_ns"][0] * 1e-6 / (1 if prompt else STEPS)


def compare(args, shape):
    """Prints the table; a ratio above 1 means that llama is faster."""
    if shape["vocab"] is None:
        stop("--shape %s: engine cpu makes no weights of that shape" % args.shape)
    paths = gguf_files(args, shape)
    print("%s's shape, %d threads; ms, medians (smallest) of %d runs in turns\n" % (args.shape, args.threads, args.turns))
    print("| | llama | llama.cpp | llama.cpp / llama |")
    print("|---|---|---|---|")
    for prompt in (False, True):
        for (weights, _, name, *precisions), path in zip(TYPES, paths):
            ours, theirs = {precision: [] for precision in precisions[prompt]}, []
            for _ in range(args.turns if ours else 0):
                for precision, times in ours.items():
                    times.append(time_ours(args, shape["vocab"], weights, precision, prompt))
                theirs.append(time_theirs(args, path, prompt))
            for precision, times in ours.items():
                mine, other = statistics.median(times), statistics.median(theirs)
                what = "prompt of %d" % PROMPT if prompt else "step, context %d" % CONTEXT
                print("| %s in %s, %s and %s | %.1f (%.1f) | %.1f (%.1f) | %.2f × (%.2f ×) |" %
                      (what, precision, weights, name, mine, min(times), other, min(theirs), other / mine,
                       min(theirs) / min(times)), flush=True)


if __name__ == "__main__":
    print(__doc__)
