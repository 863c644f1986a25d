#!/usr/bin/env python3
"""Writes small quantised checkpoints with the libraries that write them, for tests/test_convert_quantised.py:

    pip install -r scripts/requirements.txt -r scripts/requirements-quantised.txt
    python3 scripts/gen_quantised.py tests/vectors/quantised

Each is a directory with config.json and safetensors files as compressed-tensors and transformers save them; a tokenizer is
put beside them by the test. libraries.json has, for each matrix, what the libraries make of it: SHA-256 of the codes
(int8 of [rows][columns], or the bytes of FP8), of the scales and of the weights, both float32 and computed by the library in
float32; and by how much the weights differ from those where it computes as it does by itself. dump.safetensors is
dump_hf.py's dump of the float32 model of these weights.
"""
import argparse
import hashlib
import json
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import dump_hf

IDS = " ".join(str(7 * i * i % 250) for i in range(1, 13))
N_NEW = 24


def config_of(**sizes):
    from transformers import LlamaConfig
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, **sizes}
    return LlamaConfig(vocab_size=280, num_hidden_layers=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=262,
                       eos_token_id=263, pad_token_id=None, tie_word_embeddings=False,
                       rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **sizes)


def random_model(seed, **sizes):
    """In bfloat16; wide enough weights that greedy text does not repeat one token."""
    import torch
    from transformers import LlamaForCausalLM
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config_of(**sizes)).bfloat16()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.1 if "norm" in name else 0.25)
    return model.eval()


# -------------------------------------------------------------------------------------------------- compressed-tensors

def scheme(targets, bits, kind, strategy, group=None, activations=None, **more):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "group_size": group, **more}
    return {"targets": targets, "weights": weights, "input_activations": activations}


def compressed(directory, model, groups, ignore, shard="5GB", wide=False):
    """Scales from the extremes, as calculate_qparams has them; compressed and saved as llm-compressor does."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=ignore))
    for module in model.modules():
        kind = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if kind is not None:
            weight = module.weight.data
            if kind.strategy == "tensor":
                low, high = weight.amin().reshape(1), weight.amax().reshape(1)
            elif kind.strategy == "channel":
                low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            else:
                groups_of = weight.unflatten(1, (-1, kind.group_size))
                low, high = groups_of.amin(2), groups_of.amax(2)
            found, zero = calculate_qparams(low, high, kind)
            module.weight_scale.data.copy_(found.reshape(module.weight_scale.shape))
            if wide:
                module.weight_scale.data = module.weight_scale.data.float()
            if getattr(module, "weight_zero_point", None) is not None:
                module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        if getattr(module, "input_scale", None) is not None:
            module.input_scale.data.fill_(0.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    decoded = {name: decode_compressed(module) for name, module in model.named_modules()
               if getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None}
    model.save_pretrained(directory, max_shard_size=shard)
    compressor.update_config(directory)
    return decoded


def decode_compressed(module):
    """(codes, scales, weights in float32, weights as decompressed) of a compressed module, by the library."""
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    kind = module.quantization_scheme
    state = {name: value.data for name, value in module.named_parameters(recurse=False)}
    state = {name: value for name, value in state.items() if name.startswith("weight")}
    compressor = BaseCompressor.get_value_from_registry(kind.format)
    codes = state.get("weight")
    if codes is None:
        codes = unpack_from_int32(state["weight_packed"], kind.weights.num_bits, state["weight_shape"])
    wide = dict(state, weight_scale=state["weight_scale"].float())
    return codes, state["weight_scale"].float(), compressor.decompress(wide, kind)["weight"].to(torch.float32), \
        compressor.decompress(state, kind)["weight"]


# -------------------------------------------------------------------------------------------------------- transformers

def fbgemm(directory, model):
    """The modules of transformers' FbgemmFp8; FBGEMM's own kernel runs on GPUs only, so codes are from transformers' function
    of the same name. As of Meta's 405B, matrices of the attention and of the last layer are not converted."""
    import torch
    from transformers import FbgemmFp8Config
    from transformers.integrations.compressed_tensors import quantize_fp8_per_row
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
    decoded, kept = {}, ["lm_head"]
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        if "self_attn" in name or ".1." in name:
            kept.append(name)
            continue
        codes, scales = quantize_fp8_per_row(module.weight.data)
        new = FbgemmFp8Linear(module.in_features, module.out_features, False).requires_grad_(False)
        new.weight.data, new.weight_scale.data = codes, scales.view(-1, 1)
        model.set_submodule(name, new)
        weights = codes.float() * new.weight_scale.data
        decoded[name] = codes, new.weight_scale.data, weights, weights.bfloat16()
    model.config.quantization_config = FbgemmFp8Config(modules_to_not_convert=kept).to_dict()
    model.save_pretrained(directory)
    return decoded


def finegrained(directory, model, block):
    """FineGrainedFP8 without blocks, or with blocks that are rows: its modules, its function that quantises."""
    import torch
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, replace_with_fp8_linear
    settings = FineGrainedFP8Config(weight_block_size=block, modules_to_not_convert=["lm_head"])
    quantizer = type("Quantizer", (), {"quantization_config": settings})()
    weights = {name: module.weight.data for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    replace_with_fp8_linear(model, ["lm_head"], settings, pre_quantized=True)
    decoded = {}
    for name, weight in weights.items():
        made = Fp8Quantize(quantizer).convert({"weight": weight})
        module, codes, scale = model.get_submodule(name), made["weight"], made["weight_scale_inv"]
        scale = scale.reshape(module.weight_scale_inv.shape)
        module.weight = torch.nn.Parameter(codes, requires_grad=False)
        module.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
        back = Fp8Dequantize(quantizer)
        decoded[name] = (codes, scale, back._dequantize_one(codes, scale, torch.float32),
                         back._dequantize_one(codes, scale, torch.bfloat16))
    model.config.quantization_config = settings.to_dict()
    model.save_pretrained(directory)
    return decoded


# --------------------------------------------------------------------------------------------------------- all of them

def make_all(top):
    linear, tokens = ["Linear"], {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    fixed = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    whole = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    heads = ["re:.*lm_head"]

    def place(name):
        return os.path.join(top, name)

    yield "ct-fp8-channel", compressed(place("ct-fp8-channel"), random_model(1), {
        "group_0": scheme(linear, 8, "float", "channel", activations=tokens)}, ["lm_head"])
    yield "ct-fp8-tensor", compressed(place("ct-fp8-tensor"), random_model(2), {
        "group_0": scheme(linear, 8, "float", "tensor", activations=fixed)},
        ["lm_head", "re:.*layers.1.mlp.down_proj", "re:.*layers.0.self_attn.[qkv]_proj"], "24KB")
    yield "ct-int8-channel", compressed(place("ct-int8-channel"), random_model(3).half(), {
        "group_0": scheme(linear, 8, "int", "channel", activations=whole)}, [])
    yield "ct-int4-group", compressed(place("ct-int4-group"), random_model(4, hidden_size=64, num_attention_heads=4), {
        "group_0": scheme(["re:.*self_attn.*", "re:.*mlp.*"], 4, "int", "group", 32, actorder="static"),
        "group_1": scheme(heads, 8, "int", "group", 32)}, [])
    yield "ct-int4-channel", compressed(place("ct-int4-channel"), random_model(5, hidden_size=36), {
        "group_0": scheme(["re:.*self_attn.*"], 4, "int", "channel"), "group_1": scheme(["re:.*mlp.*"], 8, "int", "channel")},
        ["lm_head"], wide=True)
    yield "fbgemm-fp8", fbgemm(place("fbgemm-fp8"), random_model(6))
    yield "fp8-tensor", finegrained(place("fp8-tensor"), random_model(7), None)
    yield "fp8-row", finegrained(place("fp8-row"), random_model(8, intermediate_size=32), (1, 32))


def sha(tensor):
    import torch
    return hashlib.sha256(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def record(directory, decoded):
    """libraries.json and dump.safetensors, from decoded: module → decode_compressed's four."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM
    found, state = {}, {}
    for file in sorted(os.listdir(directory)):
        if file.endswith(".safetensors"):
            state.update({name: value.float() for name, value in load_file(os.path.join(directory, file)).items()
                          if value.dtype in (torch.bfloat16, torch.float16, torch.float32) and "_scale" not in name})
    for name, (codes, scales, weights, own) in decoded.items():
        state[name + ".weight"] = weights
        difference = ((own.float() - weights).abs() / weights.abs().clamp_min(1e-30))[weights != 0].max().item()
        found[name + ".weight"] = {"codes": sha(codes), "scales": sha(scales), "weights": sha(weights),
                                   "largest_relative_difference": "%.3g" % difference, "of": str(own.dtype).split(".")[1]}
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
        settings = json.load(file)
    sizes = {key: settings[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    model = LlamaForCausalLM(config_of(**sizes)).float()
    model.load_state_dict(state)
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work)
        dump_hf.dump(argparse.Namespace(model=work, out=os.path.join(directory, "dump.safetensors"), dtype="float32", device="cpu",
                                        follow=None, prompt=[], ids=[IDS], prompts=None, n=N_NEW, full=1, noise=True))
    with open(os.path.join(directory, "libraries.json"), "w", encoding="ascii") as file:
        json.dump(found, file, indent=1)
        file.write("\n")
    generation = os.path.join(directory, "generation_config.json")
    if os.path.exists(generation):
        os.remove(generation)


def main():
    parser = argparse.ArgumentParser(prog="gen_quantised.py", description="Write small quantised checkpoints for the tests.")
    parser.add_argument("directory", metavar="DIR", help="where a directory for each is made")
    args = parser.parse_args()
    dump_hf.load_libraries()
    for name, decoded in make_all(args.directory):
        record(os.path.join(args.directory, name), decoded)
        print(name)


if __name__ == "__main__":
    main()
