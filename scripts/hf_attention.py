#!/usr/bin/env python3
"""HuggingFace transformers with this project's attention kernel.

    python3 scripts/hf_attention.py [--library FILE] [--model FOLDER]

Registers the library with transformers' attention interface and generates greedily in float32, with `sdpa` and with
ours, at prompts of 1, 50 and 200 tokens and on a batch of four prompts of different lengths: the tokens must be equal.
Without --model, on a small LLaMA with random weights. Exits 1 if a token differs.
"""
import argparse
import os
import sys

import check_attention_torch

LIBRARY = None


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global torch, AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, sdpa_mask
    check_attention_torch.load_torch()
    try:
        import torch
        from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
        from transformers.masking_utils import sdpa_mask
    except ImportError as missing:
        sys.exit(f"hf_attention.py: the Python package {missing.name} is missing: "
                 "pip install -r scripts/requirements.txt")


def kernel_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """query [B, H, new, D]; key, value [B, Hkv, T, D], the cache with the new tokens in it. Returns [B, new, H, D]."""
    B, H, S, D = query.shape
    T = key.shape[2]
    out = torch.empty(B, S, H, D, dtype=query.dtype, device=query.device)
    for b in range(B):    # padded on the left: a sequence begins at the first position that its last token attends to
        begin = 0 if attention_mask is None else int(attention_mask[b, 0, -1].to(torch.int).argmax())
        n = min(S, T - begin)    # its new tokens, without padding
        q = query[b].transpose(0, 1)[S - n:].contiguous()
        k, v = (x[b:b + 1, :, begin:].contiguous() for x in (key, value))
        o = torch.empty_like(q)
        a = LIBRARY.args(q, o, k, v)
        a.scale = scaling or 0.0
        (LIBRARY.decode(a, [k.shape[2] - 1]) if n == 1 else LIBRARY.prefill(a, [n], [k.shape[2] - n]))()
        out[b, S - n:] = o
        out[b, :S - n] = 0    # padding
    return out, None


def main():
    global LIBRARY
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--library", dest="lib", default=os.path.join(here, "build", "libattention.so"), metavar="FILE",
                    help="(build/libattention.so, which make lib builds)")
    ap.add_argument("--model", metavar="FOLDER", help="a HuggingFace checkpoint")
    opt = ap.parse_args()
    load_libraries()
    LIBRARY = check_attention_torch.Library(opt.lib)
    AttentionInterface.register("kernel", kernel_attention)
    AttentionMaskInterface.register("kernel", sdpa_mask)
    torch.manual_seed(0)
    if opt.model:
        model = LlamaForCausalLM.from_pretrained(opt.model, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
            vocab_size=4096, max_position_embeddings=1024, initializer_range=0.1))
    model = model.float().cuda().eval()
    vocab, bad = model.config.vocab_size, 0
    cases = [(f"{n} tokens", torch.randint(3, vocab, (1, n)), torch.ones(1, n, dtype=torch.long)) for n in (1, 50, 200)]
    lengths = [7, 31, 64, 120]
    mask = torch.stack([torch.arange(120) >= 120 - n for n in lengths]).long()
    cases.append(("a batch of four", torch.randint(3, vocab, (4, 120)) * mask, mask))
    for name, ids, mask in cases:
        tokens = {}
        for attention in ("sdpa", "kernel"):
            model.set_attn_implementation(attention)
            tokens[attention] = model.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=64,
                                               min_new_tokens=64, do_sample=False, pad_token_id=0)
        new = [t[:, ids.shape[1]:] for t in tokens.values()]
        same = int((new[0] == new[1]).sum())
        bad += same != new[0].numel()
        print(f"{'ok' if same == new[0].numel() else 'FAIL'} {name}: {same} of {new[0].numel()} greedy tokens equal")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
