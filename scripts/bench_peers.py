#!/usr/bin/env python3
"""Time HuggingFace transformers and `./llama --bench` on this GPU in one run, and print the ratios; or llama.cpp on the CPU.

    python3 scripts/bench_peers.py                                   LLaMA 3.1 8B's shape, random weights on both sides
    python3 scripts/bench_peers.py --shape llama-3.2-1b --decode 1x2048 --prefill 2048
    python3 scripts/bench_peers.py --model Llama-3.1-8B/ model.bin
    python3 scripts/bench_peers.py --ours bench.json                 a result that is there already
    python3 scripts/bench_peers.py --json peers.json                 for scripts/plot_bench.py --peers, as well
    python3 scripts/bench_peers.py --llama-bench build/bin/llama-bench --shape llama-3.2-1b      llama.cpp, on the CPU
    python3 scripts/bench_peers.py --llama-bench build/bin/llama-bench --shape smollm2-135m      the same, of a small model

transformers goes first, in bf16 with SDPA: prompts, and steps with its default dynamic cache, both eager; the same
steps with a static cache through torch.compile, as generate() compiles them (a minute of compiling for each row). A
time is the median of what a caller waits until the next token's id is there, after a warm-up, as in --bench; a step
finds random keys and values in the cache, as there. Needs scripts/requirements.txt.

--llama-bench takes that program, with llama-quantize beside it, and the engine cpu in turns, with as many threads: a
step at context 128 in --precision f32 and bf16 and a prompt of 512 in bf16, with BF16 weights and with groups of 32 columns
in 8 and 4 bits (whose activations llama.cpp rounds to 8 bits), and a prompt in f32 beside llama.cpp's F32 weights. Needs
scripts/requirements-perplexity.txt; GGUF files of random weights are written to --work and kept (12 GB for the shape of
LLaMA 3.2 1B, 1 GB for that of SmolLM2 135M).
"""
import argparse
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

import llama_cpp_bench
from make_random_hf import SHAPES, hf_config

STEPS, WARM_UPS, PROMPTS = 50, 8, 5


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global torch, transformers, AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
    except ImportError as missing:
        sys.exit(f"bench_peers.py: the Python package {missing.name} is missing: "
                 "pip install -r scripts/requirements.txt")


def load(args):
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model[0], dtype=torch.bfloat16, attn_implementation="sdpa",
                                                    local_files_only=True, device_map="cuda").eval()
    config = LlamaConfig.from_dict(hf_config(SHAPES[args.shape]))
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def milliseconds(run, n, warm_ups):
    """run() ends with a token's id in host memory."""
    times = []
    for _ in range(warm_ups + n):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[warm_ups:])


def prefill(model, length):
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
    return milliseconds(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist(),
                        PROMPTS, 2)


def random_states(model, batch, context):
    config = model.config
    shape = batch, config.num_key_value_heads, context, config.head_dim
    return (torch.rand(shape, dtype=model.dtype, device=model.device) * 2 - 1 for _ in range(2))


def dynamic_cache(model, batch, context):
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*random_states(model, batch, context), layer)
    return cache


def static_cache(model, batch, context):
    config = model.config
    cache = StaticCache(config=config, max_cache_len=context + STEPS + WARM_UPS)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        for kept, states in zip((layer.keys, layer.values), random_states(model, batch, context)):
            kept[:, :, :context] = states
        layer.cumulative_length.fill_(context)
    return cache


def decode(model, batch, context, compiled):
    cache = (static_cache if compiled else dynamic_cache)(model, batch, context)
    call = model.get_compiled_call(None) if compiled else model
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)

    def step():
        nonlocal token
        out = call(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        token.tolist()
    return milliseconds(step, STEPS, WARM_UPS)


def attempt(name, measure, *args):
    print(f"bench_peers.py: {name} ...", end=" ", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        result = measure(*args)
    except torch.OutOfMemoryError:
        result = None
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{result:.2f} ms" if result else "does not fit", f"({time.perf_counter() - begin:.0f} s)", file=sys.stderr)
    return result


def measure_peers(args):
    """(tokens of a prompt, or (batch, context)) -> milliseconds, eager and compiled. In a process of its own."""
    load_libraries()
    with torch.inference_mode():
        return measure_model(args)


def measure_model(args):
    transformers.utils.logging.set_verbosity_error()
    model, eager, compiled = load(args), {}, {}
    for length in args.prefill:
        eager[length] = attempt(f"prompt of {length}", prefill, model, length)
    for batch, context in args.decode:
        name = f"step, batch {batch}, context {context}"
        eager[batch, context] = attempt(name + ", dynamic cache", decode, model, batch, context, False)
        if not args.no_compile:
            torch._dynamo.reset()
            compiled[batch, context] = attempt(name + ", static cache, compiled", decode, model, batch, context, True)
    return eager, compiled


def write_peer(path, eager, compiled):
    """What plot_bench.py --peers reads: of each row the faster way of transformers'."""
    def best(key):
        times = [times[key] for times in (eager, compiled) if times.get(key)]
        return min(times) if times else None
    prompts = [key for key in eager if isinstance(key, int) and best(key)]
    steps = [key for key in eager if not isinstance(key, int) and best(key)]
    ways = "steps: the faster of eager and static cache with torch.compile; prompts: eager" if compiled else "eager"
    peer = {"name": "transformers", "version": transformers.__version__,
            "how": f"torch {torch.__version__}, bf16, SDPA; {ways}",
            "machine": torch.cuda.get_device_name(),
            "decode": [{"batch": key[0], "context": key[1], "ms": round(best(key), 4)} for key in steps],
            "prefill": [{"tokens": key, "ms": round(best(key), 4)} for key in prompts]}
    with open(path, "w") as file:
        json.dump([peer], file, indent=1)
        file.write("\n")


def measure_ours(args):
    if args.ours:
        with open(args.ours) as file:
            return json.load(file)
    contexts = args.prefill + [context for _, context in args.decode]
    model = args.model[1:] if args.model else ["--synthetic", args.shape]
    command = [args.llama, *model, "--bench", "--json", "-c", str(max(contexts)),
               "-b", str(max(batch for batch, _ in args.decode))]
    print("bench_peers.py:", *command, file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"bench_peers.py: {args.llama} failed: exit status {done.returncode}")
    return json.loads(done.stdout)


def cell(value):
    return f"{value:.2f}" if value else "-"


def ratio(theirs, ours):
    return f"{theirs / ours:.2f} ×" if theirs and ours else "-"


def report(eager, compiled, ours):
    times = {row["tokens"]: row["ms"]["median"] for row in ours["prefill"] if "ms" in row}
    times.update({(row["batch"], row["context"]): row["ms"]["median"] for row in ours["decode"] if "ms" in row})
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, transformers {transformers.__version__}, bf16, "
          f"sdpa; {ours['program']}, engine {ours['engine']}, {ours['precision']}; it reads "
          f"{ours['read']['gb_s']['median']:.0f} GB/s and multiplies {ours['product']['tflop_s']['median']:.0f} "
          "TFLOP/s at most\n")
    print("| ms | transformers | static cache, compiled | llama | transformers / llama | compiled / llama |")
    print("|---|---|---|---|---|---|")
    for key, theirs in eager.items():
        name = f"prompt of {key}" if isinstance(key, int) else f"step, batch {key[0]}, context {key[1]}"
        mine, other = times.get(key), compiled.get(key)
        print(f"| {name} | {cell(theirs)} | {cell(other)} | {cell(mine)} | {ratio(theirs, mine)} "
              f"| {ratio(other, mine)} |")


def step_size(text):
    batch, context = text.split("x")
    return int(batch), int(context)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="of random weights (llama-3.1-8b)")
    parser.add_argument("--model", nargs=2, metavar=("DIR", "BIN"), help="a HuggingFace checkpoint and its model.bin")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048, 8192, 32768], metavar="N",
                        help="tokens of prompts (512 2048 8192 32768)")
    parser.add_argument("--decode", type=step_size, nargs="+", metavar="BxC",
                        default=[(1, 128), (1, 2048), (1, 8192), (8, 2048), (16, 2048)],
                        help="batch and context of steps (1x128 1x2048 1x8192 8x2048 16x2048)")
    parser.add_argument("--no-compile", action="store_true", help="leave the static cache and torch.compile out")
    parser.add_argument("--ours", metavar="JSON", help="what ./llama --bench --json printed; without it, it is run")
    parser.add_argument("--json", metavar="FILE", help="write what transformers took there, for plot_bench.py --peers")
    parser.add_argument("--llama", default=os.path.join(".", "llama"), metavar="PROGRAM", help="(./llama)")
    parser.add_argument("--llama-bench", metavar="PROGRAM", help="llama.cpp's: the CPU, and no GPU")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="with --llama-bench: runs of each (5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="with --llama-bench (as many as there are CPUs)")
    parser.add_argument("--work", default=os.path.join("build", "llama-bench"), metavar="DIR",
                        help="with --llama-bench: for GGUF files (build/llama-bench)")
    args = parser.parse_args()
    if args.llama_bench:
        llama_cpp_bench.compare(args, SHAPES[args.shape])
        return
    load_libraries()
    if not torch.cuda.is_available():
        sys.exit("bench_peers.py: no GPU that PyTorch can use")
    with multiprocessing.get_context("spawn").Pool(1) as pool:   # whose end gives all of the GPU's memory back
        eager, compiled = pool.apply(measure_peers, (args,))
    if args.json:
        write_peer(args.json, eager, compiled)
    report(eager, compiled, measure_ours(args))


if __name__ == "__main__":
    main()
