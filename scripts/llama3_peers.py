"""LLaMA 3's kind of tokenizer in tiktoken and in HuggingFace tokenizers, both made from a vocabulary's ranks: a
tokenizer.model as it is published, or a model.bin of ours."""

import base64
import json
import struct

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_vocabulary(path):
    """Mergeable tokens to ranks, and the names of special tokens to ids (a tokenizer.model has none)."""
    with open(path, "rb") as file:
        if not path.endswith(".bin"):
            return {
                base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file if line.strip())
            }, {}
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))

        def tensor(name):
            begin, end = header[name]["data_offsets"]
            file.seek(8 + length + begin)
            return file.read(end - begin)

        data, kinds = tensor("tokenizer.bytes"), tensor("tokenizer.kind")
        offsets = [at for (at,) in struct.iter_unpack("<I", tensor("tokenizer.offsets"))]
    tokens = [data[begin:end] for begin, end in zip(offsets, offsets[1:])]
    return (
        {token: i for i, token in enumerate(tokens) if kinds[i] == 0},
        {token.decode(): i for i, token in enumerate(tokens) if kinds[i] == 1},
    )


def load_tiktoken(path):
    import tiktoken

    ranks, specials = load_vocabulary(path)
    return tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def byte_characters():
    """The characters that stand for bytes in a tokenizer.json: printable ones for themselves, others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in shown)
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(0x100 + i) for i, byte in enumerate(hidden)}}


def load_tokenizers(path):
    """As LLaMA 3's own tokenizer.json: whole pieces first (ignore_merges), then pairs that make a token, by rank."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    (ranks, _), shown = load_vocabulary(path), byte_characters()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:i]], names[token[i:]])
        for token in sorted(ranks, key=ranks.get)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    tokenizer = Tokenizer(
        models.BPE({names[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


if __name__ == "__main__":
    print(__doc__)
