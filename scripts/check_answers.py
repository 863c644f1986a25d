#!/usr/bin/env python3
"""Compare --repetition-penalty and prompt_logprobs with HuggingFace transformers: the story model in float32.

    python3 scripts/check_answers.py --program ./llama                       # 200 prompts, 50 tokens each
    python3 scripts/check_answers.py -n 20 --golden tests/vectors/answers.tsv

model/stories.bin is put into transformers' own LlamaForCausalLM; both continue the same ids greedily, each prompt with a
penalty of its own, and both give the log-probability of each token of the prompt. Exit status 1 if a token differs, or a
log-probability by more than 1e-4; the first token that differs is printed with the margin of transformers' penalised
logits there. --golden writes what transformers gives, a line each of penalty, prompt, answer and log-probabilities, which
tests/test_lines.py compares without any package. Needs scripts/requirements.txt.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile

PENALTIES = (1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 5.0, 0.9, 0.5, 1.0)


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global torch, safetensors, LlamaConfig, LlamaForCausalLM
    try:
        import safetensors.torch
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        sys.exit("check_answers.py: the Python package %s is missing: pip install -r scripts/requirements.txt"
                 % missing.name)


def load_model(path):
    """A model.bin as transformers' model, in float32; its weights are exact there."""
    with safetensors.safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    rope = {"rope_type": meta["rope_type"], "rope_theta": float(meta["rope_theta"])}
    if meta["rope_type"] != "default":
        rope["factor"] = float(meta["rope_factor"])
    if meta["rope_type"] == "llama3":
        rope.update(low_freq_factor=float(meta["rope_low_freq_factor"]), high_freq_factor=float(meta["rope_high_freq_factor"]),
                    original_max_position_embeddings=int(float(meta["rope_original_max_seq_len"])))
    tied = meta["tie_embeddings"] in ("1", "true")
    config = LlamaConfig(
        hidden_size=int(meta["dim"]), intermediate_size=int(meta["hidden_dim"]), num_hidden_layers=int(meta["n_layers"]),
        num_attention_heads=int(meta["n_heads"]), num_key_value_heads=int(meta["n_kv_heads"]),
        head_dim=int(meta["head_dim"]), vocab_size=int(meta["vocab_size"]),
        max_position_embeddings=int(meta["max_seq_len"]), rms_norm_eps=float(meta["norm_eps"]),
        rope_parameters=rope, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    names = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
             "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj",
             "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    state = {"model.embed_tokens.weight": tensors["tok_embeddings"], "model.norm.weight": tensors["norm"],
             "lm_head.weight": tensors["tok_embeddings" if tied else "output"]}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            state["model.layers.%d.%s.weight" % (layer, theirs)] = tensors["layers.%d.%s" % (layer, ours)]
    model = LlamaForCausalLM(config).float()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval(), int(meta["bos_id"])


def make_prompts(n, vocab_size, bos):
    """(ids, penalty): as many as asked, every second with BOS; ids come twice, too, and a few prompts are long."""
    rng = random.Random(7)
    prompts = []
    for i in range(n):
        length = rng.choice((63, 64, 65, 129, 200)) if i % 20 == 9 else rng.randrange(1, 12)
        ids = [rng.randrange(vocab_size) for _ in range(length)] * rng.choice((1, 1, 2))
        prompts.append(([bos] if i % 2 else [], ids, PENALTIES[i % len(PENALTIES)]))
    return [(first + ids, penalty) for first, ids, penalty in prompts]


def answer_of_transformers(model, ids, penalty, n_tokens):
    """The new ids, and the margin between the two best penalised logits at each."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n_tokens, repetition_penalty=penalty,
                             eos_token_id=None, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
    margins = [(top[0] - top[1]).item() for top in (scores[0].topk(2).values for scores in out.scores)]
    return out.sequences[0, len(ids):].tolist(), margins


def logprobs_of_transformers(model, ids):
    """Of each id after the first, given those before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return [(row[following] - row.logsumexp(0)).item() for row, following in zip(logits, ids[1:])]


def answers_of_program(program, model, prompts, n_tokens):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for ids, penalty in prompts:
            file.write(json.dumps({"ids": ids, "repetition_penalty": penalty, "n": n_tokens}) + "\n")
        file.flush()
        done = subprocess.run([program, model, "--prompts", file.name, "--ignore-eos", "--engine", "cpu", "--quiet"],
                              stdout=subprocess.PIPE, check=True)
    return [json.loads(line)["ids"] for line in done.stdout.decode().splitlines()]


def logprobs_of_program(program, model, ids):
    done = subprocess.run([program, model, "--ids", "-p", json.dumps(ids), "--echo", "--json", "--logprobs", "1", "-n", "1",
                           "--engine", "cpu", "--quiet"], stdout=subprocess.PIPE, check=True)
    first, *others = json.loads(done.stdout.decode())["prompt_logprobs"]
    assert first is None and [each["id"] for each in others] == ids[1:]
    return [each["logprob"] for each in others]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Needs scripts/requirements.txt.")
    parser.add_argument("--program", default="./llama")
    parser.add_argument("--model", default="model/stories.bin")
    parser.add_argument("-n", type=int, default=200, help="prompts (200)")
    parser.add_argument("--tokens", type=int, default=50, help="new tokens of each (50)")
    parser.add_argument("--golden", help="write transformers' answers to this file, and compare nothing")
    args = parser.parse_args()
    load_libraries()
    model, bos = load_model(args.model)
    prompts = make_prompts(args.n, model.config.vocab_size, bos)
    theirs = [answer_of_transformers(model, ids, penalty, args.tokens) for ids, penalty in prompts]
    their_logprobs = [logprobs_of_transformers(model, ids) for ids, _ in prompts]
    if args.golden:
        with open(args.golden, "w") as file:
            for (ids, penalty), (answer, _), logprobs in zip(prompts, theirs, their_logprobs):
                columns = map(str, ids), map(str, answer), ("%.6f" % each for each in logprobs)
                print(penalty, *map(" ".join, columns), sep="\t", file=file)
        return 0
    ours = answers_of_program(args.program, args.model, prompts, args.tokens)
    differ = 0
    for i, ((ids, penalty), (want, margins), found) in enumerate(zip(prompts, theirs, ours)):
        if found == want:
            continue
        differ += 1
        at = next(k for k in range(args.tokens) if found[k:k + 1] != want[k:k + 1])
        print("prompt %d, penalty %g: token %d is %s, expected %d; margin %.3g" %
              (i, penalty, at, found[at:at + 1], want[at], margins[at]))
    print("%d prompts of %d tokens: %d equal, %d differ" % (len(ours), args.tokens, len(ours) - differ, differ))
    largest = max((abs(a - b) for (ids, _), want in zip(prompts, their_logprobs)
                   for a, b in zip(logprobs_of_program(args.program, args.model, ids), want)), default=0)
    print("%d log-probabilities: the largest difference is %.2g" % (sum(map(len, their_logprobs)), largest))
    return 1 if differ or largest > 1e-4 or len(ours) != len(prompts) else 0


if __name__ == "__main__":
    sys.exit(main())
