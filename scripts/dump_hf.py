#!/usr/bin/env python3
"""Write a reference dump (hf-greedy-dump/1) of what HuggingFace transformers computes, for ./llama --compare.

    python3 scripts/dump_hf.py MODEL_DIR dump.safetensors -p "Once upon a time" -n 200 --full 4
    ./llama model.bin --compare dump.safetensors --precision f32

For each prompt: its ids, the greedy continuation (not stopped at end-of-text), the five largest logits of every step
and all logits of the first --full steps. The model is loaded from disk in the dumped dtype; a live model that is cast
would keep rounded rotary frequencies. Batch 1, no sampling, no TF32.

--noise (on for float32) computes every step again with transformers' other attention, `eager`, and notes the largest
difference of a logit: the reference's own rounding, below which a choice between two tokens means nothing.
--follow DUMP takes prompts and tokens from another dump and writes this model's logits along them, for KL divergence.

MODEL_DIR may be a checkpoint that is quantised already, as convert.py takes it, or a model.bin: the float32 model whose weights are the file's, of quantised matrices the float32 nearest to
code times scale. Prompts are ids then, or another dump's:

    ./llama model.bin --quantize int4 -o small.bin
    python3 scripts/dump_hf.py small.bin dump.safetensors --ids "1 2 3"
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

FORMAT = "hf-greedy-dump/1"
TOP = 5
EAGER_BLOCK = 1024  # prompt tokens at a time: eager keeps a whole score matrix per head


class DumpError(Exception):
    """A message of one line for the user."""


def load_libraries():
    """After the arguments are read: --help needs none of them."""
    global torch, transformers, SafetensorError, safe_open, save_file, AutoModelForCausalLM, AutoTokenizer
    global is_accelerate_available, LlamaConfig
    try:
        import torch
        import transformers
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
        from transformers.utils import is_accelerate_available
    except ImportError as missing:
        sys.exit(f"dump_hf.py: the Python package {missing.name} is missing: pip install -r scripts/requirements.txt")


# ----------------------------------------------------------------------------------------------------- prompts

def read_prompts_file(path):
    """A JSON list, or one JSON value a line. Each is a text, a list of ids, or an object with `text` or `ids`."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text)  # one value: a list of prompts, or the only line
        if not isinstance(values, list) or values and all(type(x) is int for x in values):
            values = [values]
    except json.JSONDecodeError:
        try:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as e:
            raise DumpError(f"{path}: neither a JSON list nor JSON lines: {e}") from None
    prompts = []
    for i, value in enumerate(values):
        if isinstance(value, dict) and len(value.keys() & {"text", "ids"}) == 1:
            value = value.get("text", value.get("ids"))
        if isinstance(value, list) and all(type(x) is int for x in value) or isinstance(value, str):
            prompts.append(value)
        else:
            raise DumpError(f"{path}: prompt {i} is neither a text nor a list of ids")
    return prompts


def parse_ids(text):
    try:
        return [int(x) for x in text.replace(",", " ").split()]
    except ValueError:
        raise DumpError(f'--ids takes numbers separated by spaces or commas, found "{text}"') from None


def read_dump(path):
    """(text or None, ids, tokens) of each prompt in a dump."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise DumpError(f'{path}: format is "{metadata.get("format")}", expected "{FORMAT}"')
        texts = json.loads(metadata["prompts"])
        return [(text, f.get_tensor(f"prompt_ids.{i}").tolist(), f.get_tensor(f"tokens.{i}").tolist())
                for i, text in enumerate(texts)]


def check_prompt(i, ids, tokens, n, config):
    if not ids:
        raise DumpError(f"prompt {i} has no tokens")
    wrong = [t for t in ids + tokens if not 0 <= t < config.vocab_size]
    if wrong:
        raise DumpError(f"prompt {i}: id {wrong[0]} is outside the vocabulary of {config.vocab_size}")
    if len(ids) + n > config.max_position_embeddings:
        raise DumpError(f"prompt {i}: {len(ids)} prompt tokens and {n} new ones exceed the model's context of "
                        f"{config.max_position_embeddings}")


# ----------------------------------------------------------------------------------------------------- running

def load_model(directory, dtype, device):
    # Sharded or not, the weights must be in the directory: never look for them on the network.
    # With accelerate they go straight to the GPU: no float32 copy of an 8B model in host memory.
    straight = {"device_map": device} if device != "cpu" and is_accelerate_available() else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa",
                                                 local_files_only=True, **straight)
    return model.to(device).eval()


def config_of_file(meta):
    """The configuration in the metadata of a model.bin."""
    rope = {"rope_type": meta["rope_type"], "rope_theta": float(meta["rope_theta"])}
    if "rope_factor" in meta:
        rope["factor"] = float(meta["rope_factor"])
    if rope["rope_type"] == "llama3":
        rope.update(low_freq_factor=float(meta["rope_low_freq_factor"]),
                    high_freq_factor=float(meta["rope_high_freq_factor"]),
                    original_max_position_embeddings=int(meta["rope_original_max_seq_len"]))
    if hasattr(LlamaConfig(), "rope_parameters"):
        named = {"rope_parameters": rope}
    else:                                       # before transformers 5
        named = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}
    return LlamaConfig(hidden_size=int(meta["dim"]), intermediate_size=int(meta["hidden_dim"]),
                       num_hidden_layers=int(meta["n_layers"]), num_attention_heads=int(meta["n_heads"]),
                       num_key_value_heads=int(meta["n_kv_heads"]), head_dim=int(meta["head_dim"]),
                       vocab_size=int(meta["vocab_size"]), max_position_embeddings=int(meta["max_seq_len"]),
                       rms_norm_eps=float(meta["norm_eps"]), tie_word_embeddings=meta["tie_embeddings"] == "true",
                       bos_token_id=None, eos_token_id=None, **named)


def decode(file, name, device):
    """A tensor of a model.bin in float32: of a quantised matrix each weight is the float32 nearest to code × scale."""
    codes = file.get_tensor(name).to(device)
    if f"{name}.scale" not in file.keys():
        return codes.float()
    scale = file.get_tensor(f"{name}.scale").to(device).float()
    if codes.dtype == torch.uint8:              # int4, the lower column in the low nibble
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).to(torch.int8) - 8
    if scale.dim() == 1:
        scale = scale[:, None]
    else:                                       # a last group may be shorter
        scale = scale.repeat_interleave(int(file.metadata()["group"]), 1)[:, :codes.shape[1]]
    return codes.float() * scale


def load_file(path, device):
    """The float32 model of a model.bin."""
    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
             "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj", "attention_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}
    with safe_open(path, "pt") as file:
        meta = file.metadata() or {}
        if not meta.get("format", "").startswith("llama-model/") or meta.get("n_layers") == "0":
            raise DumpError(f"{path}: neither a HuggingFace checkpoint directory nor a model.bin with weights")
        config = config_of_file(meta)
        with torch.device("meta"):              # without weights of its own, which take a minute to draw for 8B
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        weights = {"model.embed_tokens.weight": decode(file, "tok_embeddings", device),
                   "model.norm.weight": decode(file, "norm", device)}
        weights["lm_head.weight"] = (weights["model.embed_tokens.weight"] if config.tie_word_embeddings else
                                     decode(file, "output", device))
        for layer in range(config.num_hidden_layers):
            for name, full in names.items():
                weights[f"model.layers.{layer}.{full}.weight"] = decode(file, f"layers.{layer}.{name}", device)
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # its table is no weight
    return model.eval()


def load_quantised(directory, device):
    """The same of a checkpoint that is quantised already: of the codes and scales that convert.py copies from it."""
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, "model.bin")
        done = subprocess.run([sys.executable, str(Path(__file__).with_name("convert.py")), directory, path],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise DumpError(done.stderr.strip().splitlines()[-1])
        return load_file(path, device)


def is_quantised(directory):
    return json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("quantization_config") is not None


def run(model, ids, n, tokens=None, block=None):
    """Logits [n, vocab] in float32 and the n tokens: greedy, or along `tokens` where they are given."""
    with torch.no_grad():
        return run_without_gradients(model, ids, n, tokens, block)


def run_without_gradients(model, ids, n, tokens, block):
    ids = torch.tensor([ids], device=model.device)
    cache, rows, chosen = None, [], []
    pieces = list(ids.split(block or ids.shape[1], dim=1))
    for step in range(n):
        for piece in pieces:
            out = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
        row = out.logits[0, -1].float()
        if not row.isfinite().all():
            raise DumpError(f"a logit is not finite at position {cache.get_seq_length() - 1}")
        rows.append(row.cpu())
        chosen.append(int(row.argmax()) if tokens is None else tokens[step])
        pieces = [torch.tensor([[chosen[-1]]], device=model.device)]
    return torch.stack(rows), chosen


def largest(logits):
    """(values, ids) of the TOP largest of each row, of equal ones the lowest id first, as argmax has it. topk has no
    order of those, and in bf16 they are common."""
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :TOP].clone(), ids[:, :TOP].clone()


def measure_noise(model, ids, tokens, logits):
    model.set_attn_implementation("eager")
    other, _ = run(model, ids, len(tokens), tokens, EAGER_BLOCK)
    model.set_attn_implementation("sdpa")
    return (other - logits).abs().max().item()


def dump(args):
    from_file = Path(args.model).is_file()
    if from_file and args.dtype != "float32":
        raise DumpError(f"{args.model}: a model.bin is dumped in float32")
    if not from_file and not (Path(args.model) / "config.json").is_file():
        raise DumpError(f"{args.model}: no config.json there, expected a HuggingFace checkpoint directory")
    quantised = not from_file and is_quantised(args.model)
    if quantised and args.dtype != "float32":
        raise DumpError(f"{args.model}: a quantised checkpoint is dumped in float32")
    if not Path(args.out).absolute().parent.is_dir():  # found out now, not after the run
        raise DumpError(f"{args.out}: no such directory")
    dtype = getattr(torch, args.dtype)
    torch.set_float32_matmul_precision("highest")  # no TF32

    if args.follow:
        prompts = read_dump(args.follow)
    else:
        sources = list(args.prompt) + [parse_ids(text) for text in args.ids]
        if args.prompts:
            sources += read_prompts_file(args.prompts)
        tokenizer = None
        if from_file and any(isinstance(s, str) for s in sources):
            raise DumpError(f"{args.model}: texts need a tokenizer: give ids, or a checkpoint directory")
        if any(isinstance(s, str) for s in sources):
            tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
        prompts = [(s, tokenizer(s).input_ids, None) if isinstance(s, str) else (None, s, None)
                   for s in sources]

    if from_file:
        model = load_file(args.model, args.device)
    elif quantised:
        model = load_quantised(args.model, args.device)
    else:
        model = load_model(args.model, dtype, args.device)
    for i, (_, ids, tokens) in enumerate(prompts):
        check_prompt(i, ids, tokens or [], len(tokens) if tokens else args.n, model.config)

    tensors, noise = {}, 0.0
    for i, (text, ids, follow) in enumerate(prompts):
        logits, tokens = run(model, ids, args.n if follow is None else len(follow), follow)
        top = largest(logits)
        tensors[f"prompt_ids.{i}"] = torch.tensor(ids, dtype=torch.int32)
        tensors[f"tokens.{i}"] = torch.tensor(tokens, dtype=torch.int32)
        tensors[f"top_ids.{i}"] = top[1].to(torch.int32)
        tensors[f"top_logits.{i}"] = top[0]
        tensors[f"logits.{i}"] = logits[:args.full].clone()
        if args.noise:
            noise = max(noise, measure_noise(model, ids, tokens, logits))
        margin = (top[0][:, 0] - top[0][:, 1]).min().item()
        print(f"prompt {i}: {len(ids)} ids, {len(tokens)} tokens, smallest top-2 margin {margin:.2g}", file=sys.stderr)

    metadata = {"format": FORMAT, "dtype": args.dtype, "transformers": transformers.__version__,
                "prompts": json.dumps([text for text, _, _ in prompts], ensure_ascii=False)}
    if args.noise:
        metadata["noise"] = f"{noise:.6g}"
        print(f"largest difference between sdpa and eager: {noise:.2g}", file=sys.stderr)
    partial = f"{args.out}.tmp"
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, args.out)
    finally:
        Path(partial).unlink(missing_ok=True)
    print(f"{args.out}: {len(prompts)} prompts, {os.path.getsize(args.out)} bytes", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="HuggingFace checkpoint directory, or model.bin")
    parser.add_argument("out", metavar="OUT.safetensors")
    parser.add_argument("-p", "--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--ids", action="append", default=[], metavar='"1 2 3"', help="a prompt as ids, likewise")
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines with text or ids, or a JSON list of texts")
    parser.add_argument("-n", type=int, default=200, help="new tokens for each prompt (200)")
    parser.add_argument("--full", type=int, default=4, metavar="K", help="steps with all logits (4)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--noise", action=argparse.BooleanOptionalAction, help="measure sdpa against eager")
    parser.add_argument("--follow", metavar="DUMP", help="prompts and tokens from this dump")
    args = parser.parse_args()
    if args.n < 1 or args.full < 0:
        parser.error("-n must be at least 1 and --full at least 0")
    given = bool(args.prompt or args.ids or args.prompts)
    if given == bool(args.follow):
        parser.error("give prompts (-p, --ids, --prompts) or --follow, one of the two")
    if args.noise is None:
        args.noise = args.dtype == "float32"
    elif args.noise and args.dtype != "float32":
        parser.error("--noise is defined for float32")
    load_libraries()
    warnings.simplefilter("ignore", FutureWarning)      # of names that later releases of transformers will have
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        dump(args)
    except (DumpError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        message = str(e).strip().splitlines() or [type(e).__name__]
        sys.exit(f"dump_hf.py: {message[0]}")


if __name__ == "__main__":
    main()
