#!/usr/bin/env python3
"""Time HuggingFace transformers (bf16, SDPA) on this GPU: what `./llama MODEL --bench` is measured against.

    python3 scripts/bench_hf.py --shape llama-3.1-8b      random weights of that shape, made on the GPU
    python3 scripts/bench_hf.py --model Llama-3.1-8B/

Prefill fills a fresh cache and computes the last token's logits, as generate() does; medians of 5 after a warm-up.
Decode is greedy, with transformers' default dynamic cache; --batch also times a batch with a static cache, eager.
"""
import argparse
import statistics
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from make_random_hf import SHAPES, hf_config


def load(args):
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa",
                                                    local_files_only=True, device_map="cuda").eval()
    config = LlamaConfig.from_dict(hf_config(SHAPES[args.shape]))
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def milliseconds(run, n, warm):
    times = []
    for i in range(warm + n):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times += [begin.elapsed_time(end)] if i >= warm else []
    return statistics.median(times)


def decode(model, batch, context, cache, n=30):
    """A step of greedy decoding after `context` tokens."""
    prompt = torch.randint(0, model.config.vocab_size, (batch, context), device="cuda")
    out = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    state = {"cache": out.past_key_values, "token": out.logits[:, -1:].argmax(-1)}

    def step():
        out = model(input_ids=state["token"], past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        state["token"] = out.logits[:, -1:].argmax(-1)
    return milliseconds(step, n, 5)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="HuggingFace checkpoint directory")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="without --model (llama-3.1-8b)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], metavar="N",
                        help="of prefill (512 2048 8192)")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="before a decode step (2048)")
    parser.add_argument("--batch", type=int, metavar="B", help="also a decode step of so many sequences")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_hf.py: no GPU that PyTorch can use")
    transformers.utils.logging.set_verbosity_error()
    model = load(args)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          "bf16, sdpa\n")
    print("| | ms | tokens/s |\n|---|---|---|")
    for length in args.lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, length), device="cuda")
        time = milliseconds(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), 5, 2)
        print(f"| prefill {length} | {time:.2f} | {length / time * 1e3:.0f} |", flush=True)
    time = decode(model, 1, args.context, None)
    print(f"| decode, batch 1, context {args.context}, dynamic cache | {time:.2f} | {1e3 / time:.0f} |", flush=True)
    if args.batch:
        cache = StaticCache(config=model.config, max_cache_len=args.context + 64)
        time = decode(model, args.batch, args.context, cache)
        print(f"| decode, batch {args.batch}, context {args.context}, static cache | {time:.2f} "
              f"| {args.batch / time * 1e3:.0f} |")


if __name__ == "__main__":
    main()
