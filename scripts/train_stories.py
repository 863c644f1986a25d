#!/usr/bin/env python3
"""Train the small story model that ships with this repository.

    python3 scripts/train_stories.py --corpus ../shared/corpus --out .stories
    python3 scripts/convert.py .stories model/stories.bin

One GPU and about six minutes. The corpus is two xz-compressed text files (see model/STORIES.md for the sources) in
which a line holding only <|endoftext|> ends each story. The result is a HuggingFace checkpoint: the model that is
trained *is* transformers' LlamaForCausalLM, so there is no second definition of the architecture to keep in step.

The steps, in the order of main(): read the stories, train a byte-level BPE, tokenize, train, round to bf16 and save,
then load the saved files again and measure them: what is printed last is true of the files, not of the training run.
"""
import argparse
import json
import lzma
import math
import sys
import time
from pathlib import Path


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global np, torch, F, AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    global AutoTokenizer, LlamaConfig, LlamaForCausalLM
    try:
        import numpy as np
        import torch
        import torch.nn.functional as F
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as missing:
        sys.exit("train_stories.py: the Python package %s is missing: pip install -r scripts/requirements.txt"
                 % missing.name)


# ---------------------------------------------------------------------------------------------------- stories

SOURCES = ["fairy_tales.txt.xz", "fairy_tales_extra.txt.xz"]
HELD_OUT_EVERY = 85  # documents 0, 85, 170, ... of the first file are never trained on, by tokenizer or model
HELD_OUT_WINDOW = 512  # tokens: the figure to compare is bits per byte in windows of this length


def read_documents(path):
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    return [d for d in (d.strip() for d in text.split("<|endoftext|>\n")) if d]


def read_corpus(corpus):
    """Two lists of texts: to train on, and held out."""
    tales, *others = [read_documents(corpus / name) for name in SOURCES]
    train = [text for i, text in enumerate(tales) if i % HELD_OUT_EVERY]
    return train + [text for texts in others for text in texts], tales[::HELD_OUT_EVERY]


# -------------------------------------------------------------------------------------------------- tokenizer

# tiktoken's cl100k split pattern, as in LLaMA 3's tokenizer.json.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
            "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
BOS, EOT = SPECIALS[:2]
STOPS = [EOT, "<|eom_id|>", "<|eot_id|>"]


def train_tokenizer(texts, vocab_size):
    """The 256 bytes come first and each merge adds the next id, so a token's id is its rank, as tiktoken wants it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1",
                                      special_tokens=[(BOS, bos_id)])])
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"{tokenizer.get_vocab_size()} tokens from this text, expected {vocab_size}: too little text")
    return tokenizer


def tokenize(tokenizer, texts):
    """Begin-of-text, the text, end-of-text, for each document."""
    end = tokenizer.token_to_id(EOT)
    encoded = tokenizer.encode_batch_fast(texts)  # the post-processor puts the begin-of-text there
    return [np.array(e.ids + [end], dtype=np.int32) for e in encoded]


# ------------------------------------------------------------------------------------------------------ model

def make_config(args, tokenizer):
    """LLaMA 3.1 in small: grouped-query attention, SwiGLU, RMSNorm, no biases, RoPE with llama3 frequency scaling.

    The scaling acts as soon as a wavelength exceeds a quarter of the original context, so with 512 it changes three
    quarters of the frequencies: the model cannot be run right without it, which is what makes it a good test.
    """
    return LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.dim, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=2 * args.kv_heads, num_key_value_heads=args.kv_heads, head_dim=64,
        max_position_embeddings=args.context, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=[tokenizer.token_to_id(s) for s in STOPS])


def make_model(args, config):
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers))  # what enters the residual
    if args.dropout:  # on what each block adds to the residual stream; LlamaForCausalLM has none of its own
        def drop(module, _, output):
            return F.dropout(output, args.dropout, module.training)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)
    return model


# --------------------------------------------------------------------------------------------------- training

def batches(documents, args, rng):
    """(inputs, targets), for ever. Each epoch shuffles the documents, joins them and cuts them at other places."""
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        stream = torch.from_numpy(stream[rng.integers(args.context):]).to(args.device).long()
        n = (len(stream) - 1) // args.context
        inputs = stream[:n * args.context].view(n, args.context)
        targets = stream[1:n * args.context + 1].view(n, args.context)
        rows = torch.from_numpy(rng.permutation(n)).to(args.device)
        for i in range(0, n - args.batch + 1, args.batch):
            yield inputs[rows[i:i + args.batch]], targets[rows[i:i + args.batch]]


def loss_sum(model, inputs, targets):
    """Summed loss in nats. The dummy target -100 does not count."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def bits_per_byte(model, documents, n_bytes, context, device, autocast=False):
    """Each document alone, in windows that do not overlap: a token sees at most context - 1 tokens before it."""
    windows = [(d[i:i + context], d[i + 1:i + context + 1])
               for d in documents for i in range(0, len(d) - 1, context)]
    inputs = torch.zeros(len(windows), context, dtype=torch.long)
    targets = torch.full((len(windows), context), -100)
    for row, (x, y) in enumerate(windows):  # the last input of a document, its end-of-text, predicts nothing
        inputs[row, :len(x)] = torch.from_numpy(x)
        targets[row, :len(y)] = torch.from_numpy(y)
    model.eval()
    nats = 0.0
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        for x, y in zip(inputs.split(32768 // context), targets.split(32768 // context)):
            nats += loss_sum(model, x.to(device), y.to(device)).item()
    model.train()
    return nats / math.log(2) / n_bytes


def schedule(step, args):
    """Warm-up, level, then linearly to zero: the level part learns, the decay settles."""
    return min(1, (step + 1) / args.warmup, (args.steps - step) / (args.steps * args.decay))


def train(model, documents, held_out, n_bytes, args):
    # Muon (orthogonalized momentum) for the matrices, AdamW for the embedding and the norms. match_rms_adamw scales
    # Muon's updates to the size of AdamW's, so that one learning rate means the same for both.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, momentum=0.95,
                            adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": [model.model.embed_tokens.weight], "weight_decay": args.weight_decay},
                               {"params": norms, "weight_decay": 0.0}],
                              lr=args.embedding_lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    step_loss = torch.compile(loss_sum) if args.device == "cuda" else loss_sum
    tokens_per_step = args.batch * args.context
    data = batches(documents, args, np.random.default_rng(args.seed))
    start = last = time.time()
    for step in range(args.steps):
        for optimizer, lr in ((muon, args.lr), (adamw, args.embedding_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, args)
        inputs, targets = next(data)
        with torch.autocast(args.device, torch.bfloat16):
            loss = step_loss(model, inputs, targets) / tokens_per_step
        loss.backward()
        muon.step()
        adamw.step()
        model.zero_grad(set_to_none=True)
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            nats, now = loss.item(), time.time()  # item() waits for the GPU: time after it
            rate = (step % args.report + 1) * tokens_per_step / (now - last)
            held = bits_per_byte(model, held_out, n_bytes, HELD_OUT_WINDOW, args.device, autocast=True)
            print(f"step {step + 1:5d}/{args.steps}  training loss {nats:.4f} nats/token  "
                  f"held out {held:.4f} bits/byte  {rate / 1e6:.2f} M tokens/s  {now - start:.0f} s", flush=True)
            last = time.time()
    return time.time() - start


# ------------------------------------------------------------------------------------------------ checkpoint

def save(model, out):
    """Rounds the weights to bf16, in the model itself too, and writes them with the configuration."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    # A copy, because the cast would round the live model's rotary frequencies too.
    rounded = LlamaForCausalLM(model.config).bfloat16()
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(out)


def check_and_sample(model, held_out, n_bytes, args):
    """Everything here is measured on the files as loaded from disk, in float32 arithmetic."""
    torch.set_float32_matmul_precision("highest")
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    ids = torch.from_numpy(held_out[0][None, :HELD_OUT_WINDOW]).long().to(args.device)
    model.eval()
    with torch.no_grad():
        delta = (model(ids).logits - saved(ids).logits).abs().max().item()
    print(f"largest difference of logits, trained model against the saved files: {delta:.2g}")
    if not delta < 1e-4:
        raise SystemExit("the saved checkpoint does not compute what was trained")
    for seed in range(args.samples):
        torch.manual_seed(seed)
        prompt = tokenizer(args.prompt, return_tensors="pt").to(args.device)
        story = saved.generate(**prompt, max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.9, top_k=0)
        print(f"--- sample, seed {seed}\n{tokenizer.decode(story[0], skip_special_tokens=True)}")
    for context in (args.context, HELD_OUT_WINDOW):
        bits = bits_per_byte(saved, held_out, n_bytes, context, args.device)
        print(f"bf16 checkpoint: {bits:.4f} bits per byte on {len(held_out)} held-out documents, "
              f"windows of {context}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("../shared/corpus"), help="folder with the .txt.xz files")
    parser.add_argument("--out", type=Path, default=Path(".stories"), help="the checkpoint goes here")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens, the special ones included")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2, help="K/V heads, each with two query heads of 64")
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window, and the model's maximum")
    parser.add_argument("--batch", type=int, default=32, help="windows in a step")
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.6, help="part of the steps in which the rate goes to zero")
    parser.add_argument("--lr", type=float, default=4e-3, help="of the matrices")
    parser.add_argument("--embedding-lr", type=float, default=3e-3, help="of the embedding and the norms")
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=int, default=560, help="steps from one line of progress to the next")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--device", help="(cuda where there is one)")
    args = parser.parse_args()
    missing = [name for name in SOURCES if not (args.corpus / name).is_file()]
    if missing:
        raise SystemExit(f"train_stories.py: no {missing[0]} in {args.corpus}")
    load_libraries()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)

    texts, held_texts = read_corpus(args.corpus)
    n_bytes = sum(len(t.encode()) for t in held_texts)
    tokenizer = train_tokenizer(texts, args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": BOS, "eos_token": EOT, "clean_up_tokenization_spaces": False,
        "model_max_length": args.context, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    tokens = tokenize(tokenizer, texts)
    held_out = tokenize(tokenizer, held_texts)
    n_held = sum(map(len, held_out))
    print(f"{len(texts)} documents, {sum(map(len, tokens)) / 1e6:.2f} M tokens an epoch; "
          f"held out: {len(held_out)} documents, {n_bytes} bytes, {n_held} tokens; {time.time() - start:.0f} s",
          flush=True)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = make_model(args, make_config(args, tokenizer)).to(args.device)
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:.2f} M parameters, {args.steps} steps of {args.batch * args.context} tokens", flush=True)
    seconds = train(model, tokens, held_out, n_bytes, args)
    save(model, args.out)
    check_and_sample(model, held_out, n_bytes, args)
    print(f"trained for {seconds:.0f} s, {time.time() - start:.0f} s in all; {n} parameters")


if __name__ == "__main__":
    main()
