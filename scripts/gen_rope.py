#!/usr/bin/env python3
"""Prints tests/vectors/rope.tsv: RoPE's inverse frequencies as transformers computes them.

    python3 scripts/gen_rope.py > tests/vectors/rope.tsv        (needs torch and transformers)
"""
import argparse
import sys

DEFAULT, LLAMA3 = {"rope_type": "default"}, {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [(500000.0, 128, DEFAULT), (10000.0, 64, DEFAULT),
         *((theta, head_dim, {"rope_type": "linear", "factor": factor}) for theta, head_dim, factor in (
             (500000.0, 128, 2.0), (500000.0, 64, 4.0), (10000.0, 64, 1.5), (1000000.0, 96, 3.7), (500000.0, 128, 1.25),
             (10000.0, 16, 16.0))),
         (500000.0, 128, dict(LLAMA3, factor=8.0, original_max_position_embeddings=8192)),
         (500000.0, 64, dict(LLAMA3, factor=32.0, original_max_position_embeddings=8192))]


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    print("# Written by scripts/gen_rope.py with transformers %s, torch %s: theta, head_dim, rope_type, factor, the original\n"
          "# context, and the bits of each inverse frequency in float32." % (
              transformers.__version__, torch.__version__.split("+")[0]))
    for theta, head_dim, rope in CASES:
        config = transformers.LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, head_dim=head_dim,
            max_position_embeddings=131072, rope_parameters=dict(rope, rope_theta=theta))
        freq = LlamaRotaryEmbedding(config).inv_freq
        bits = " ".join("%08x" % (each & 0xFFFFFFFF) for each in freq.view(torch.int32).tolist())
        print("%g\t%d\t%s\t%s\t%d\t%s" % (theta, head_dim, rope["rope_type"], rope.get("factor", 0),
                                         rope.get("original_max_position_embeddings", 0), bits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
