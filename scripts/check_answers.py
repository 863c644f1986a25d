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

import hf_model

PENALTIES = (1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 5.0, 0.9, 0.5, 1.0)


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global torch
    try:
        import torch
        import transformers  # which hf_model needs
    except ImportError as missing:
        sys.exit("check_answers.py: the Python package %s is missing: pip install -r scripts/requirements.txt"
                 % missing.name)


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
    model, bos = hf_model.load(args.model)
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
