"""A checkpoint's tokenizer: tokenizer.json, tiktoken ranks, or both, as the ids, kinds and passes of model.bin.

The program splits texts by LLaMA 3's pattern and merges by rank; a tokenizer that does anything else is refused.

Reading order: vocabulary, tiktoken ranks, tokenizer.json, the files beside it, all of a directory's.
"""
import base64
import binascii
import itertools
import os
import struct

from checked_json import Section, is_int, read_file
from model_file import MAX_VOCAB, Output
from refusal import DOWNLOAD, foreign_file, note, refuse, require, show

SPLIT_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")


# ----------------------------------------------------------------------------------------------------------- vocabulary

class Vocabulary:
    """ranks: token -> id, in order, 0..n-1. specials, added: id -> bytes, the tokens of kind 1 and 3. normalized: the
    ids among these that are looked for in the second pass. bos: the id put before a text, or None."""

    def __init__(self, ranks, specials, bos, added=None, normalized=()):
        self.ranks, self.specials, self.bos = ranks, specials, bos
        self.added, self.normalized = added or {}, set(normalized)

    def named(self):
        """text -> id of every token of kind 1 and 3."""
        return {token.decode(): rank for tokens in (self.specials, self.added) for rank, token in tokens.items()}


def rank_order(where, by_rank):
    """token -> rank in rank order, where merging by rank works: 0..n-1, no token twice, every single byte."""
    ranks = {}
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            refuse(where, "token ids", "0 to %d without a gap" % (len(by_rank) - 1), "none with id %d" % rank)
        if ranks.setdefault(by_rank[rank], rank) != rank:
            refuse(where, "token %d" % rank, "each token once",
                   "%s, which is token %d" % (show(by_rank[rank]), ranks[by_rank[rank]]))
    for byte in range(256):
        if bytes((byte,)) not in ranks:
            refuse(where, "token of the single byte 0x%02x" % byte, "one", "none")
    return ranks


# ------------------------------------------------------------------------------------------------------- tiktoken ranks

def read_ranks(path):
    """A tiktoken file: on each line the base64 of a token and its rank."""
    by_rank, data = {}, read_file(path)
    found = foreign_file(data[:64])
    if data.lstrip().startswith(b"{"):
        found = "JSON (name the directory that it is in)"
    elif not data.isascii() or b"\0" in data:
        found = found or "a binary file: SentencePiece, LLaMA 2's kind of tokenizer; LLaMA 3's alone is supported"
    if found:
        refuse(path, "format", "tiktoken ranks", found)
    for number, line in enumerate(data.split(b"\n"), 1):
        parts = line.split()
        try:
            token = base64.b64decode(parts[0], validate=True) if len(parts) == 2 else b""
        except binascii.Error:
            token = b""
        if token and parts[1].isdigit() and len(parts[1]) < 10 and int(parts[1]) not in by_rank:
            by_rank[int(parts[1])] = token
        elif parts:
            refuse(path, "line %d" % number, "base64 of a token and a rank of its own", show(line.decode("ascii")))
    return rank_order(path, by_rank)


def vocabulary_from_ranks(ranks, vocab_size):
    """Ranks alone leave the special tokens open: LLaMA 3.1's, by HuggingFace's names, as far as there is room."""
    n = len(ranks)
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
             "eot_id", "python_tag"] + ["reserved_special_token_%d" % i for i in range(3, 248)]
    specials = {n + i: b"<|%s|>" % name.encode() for i, name in enumerate(names[:max(0, vocab_size - n)])}
    return Vocabulary(ranks, specials, n if specials else None)


# ------------------------------------------------------------------------------------------------------- tokenizer.json

def byte_alphabet():
    """GPT-2's character for each byte, as character -> byte: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    table.update((chr(0x100 + i), byte) for i, byte in enumerate(sorted(set(range(256)) - set(plain))))
    return table


def refuse_tokenizer(where, why):
    refuse(where, "the tokenizer is not LLaMA 3's: %s; models with another tokenizer are not supported" % why)


def read_tokenizer_json(directory, settings):
    root = Section.load(directory, "tokenizer.json")
    model = Section(root.where + ": model", root.get("model"))
    check_tokenizer_kind(root, model)
    vocab, alphabet, by_rank = model.typed("vocab", dict, None), byte_alphabet(), {}

    def to_bytes(text):
        try:
            return bytes([alphabet[char] for char in text])
        except KeyError:
            refuse_tokenizer(root.where, "token %s is not written in characters that stand for bytes" % show(text))

    added = read_added_tokens(root, vocab, settings)
    ids = {token.text: token.id for token in added}
    for text, rank in vocab.items():
        if not is_int(rank) or not 0 <= rank < MAX_VOCAB or rank in by_rank or not text:
            refuse(model.where, "token %s" % show(text), "a text and an id of its own", show(rank))
        if ids.get(text) != rank:               # else an added token that the model's vocabulary lists as well
            by_rank[rank] = to_bytes(text)
    for token in added:                         # the text of an ordinary token, to be matched before the text is split
        if token.id < len(by_rank):
            refuse(root.where, "added token %s" % show(token.text), "an id after those of ordinary tokens", token.id)
    ranks = rank_order(model.where, by_rank)
    check_merges(model, ranks, to_bytes)
    specials, others = {}, {}
    for token in added:
        data = token.text.encode("utf-8", "replace")
        require(token.id >= len(ranks) and data not in ranks and data.decode() == token.text, root.where,
                "added token %d" % token.id, "an id after the merged tokens, and another text", token.text)
        (specials if token.special else others)[token.id] = data
    return Vocabulary(ranks, specials, template_bos(root, ids), others,
                      (token.id for token in added if token.normalized))


def check_tokenizer_kind(root, model):
    """What happens to a text before merging, and to bytes after: LLaMA 3's rules, which the program has built in."""
    kind = model.get("type", "BPE")
    if kind != "BPE":
        refuse_tokenizer(root.where, "its model is %s and not byte-level BPE" % show(kind))
    if model.get("byte_fallback"):
        refuse_tokenizer(root.where, "it is SentencePiece's BPE with byte fallback, as LLaMA 2's and Mistral's")
    for key, plain in (("unk_token", None), ("dropout", 0), ("continuing_subword_prefix", ""),
                       ("end_of_word_suffix", "")):
        if model.get(key) not in (None, plain) or isinstance(model.get(key), bool):
            refuse_tokenizer(root.where, "%s is %s" % (key, show(model.get(key))))
    normalizer = root.get("normalizer")
    if normalizer not in (None, {"type": "Sequence", "normalizers": []}):
        refuse_tokenizer(root.where, "it changes texts before it splits them (normalizer %s)" % show(normalizer))
    splitter = root.get("pre_tokenizer")
    steps = splitter.get("pretokenizers") if isinstance(splitter, dict) and splitter.get("type") == "Sequence" else None
    kinds = [isinstance(step, dict) and step.get("type") for step in (steps if isinstance(steps, list) else [])]
    if kinds != ["Split", "ByteLevel"]:
        refuse_tokenizer(root.where, "it splits texts by another rule (pre_tokenizer %s)" % show(splitter))
    split, byte_level = steps
    if split.get("pattern") != {"Regex": SPLIT_PATTERN}:
        refuse_tokenizer(root.where, "it splits texts by another pattern, %s" % show(split.get("pattern")))
    for step, key, value in ((split, "behavior", "Isolated"), (split, "invert", False),
                             (byte_level, "add_prefix_space", False), (byte_level, "use_regex", False)):
        if step.get(key) != value or isinstance(step.get(key), bool) != isinstance(value, bool):
            refuse_tokenizer(root.where, "it splits texts by another rule (%s %s)" % (key, show(step.get(key))))
    decoder = root.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        refuse_tokenizer(root.where, "it does not join tokens as bytes (decoder %s)" % show(decoder))


def check_flags(token):
    """Rules for what lies around an added token, which the program has not."""
    for flag in ("lstrip", "rstrip", "single_word"):
        token.one_of(flag, False, None)


class AddedToken:
    """One of tokenizer.json's added_tokens, as transformers has it after it has read its other files."""

    def __init__(self, text, rank, special, normalized):
        self.text, self.id, self.special, self.normalized = text, rank, special, normalized


def read_added_tokens(root, vocab, settings):
    """The added tokens. Anything that HuggingFace would match by another rule is refused.

    Of tokenizer.json's flags those are valid that added_tokens_decoder in tokenizer_config.json does not set again."""
    added, texts, following = [], set(), len(vocab)
    decoder = settings.get("added_tokens_decoder", {})
    require(isinstance(decoder, dict), settings.where, "added_tokens_decoder", "a JSON dict", decoder)
    for values in root.typed("added_tokens", list, []):
        token = Section(root.where + ": added token", values)
        text, rank = token.typed("content", str, None), token.get("id")
        token.where += " " + show(text)
        check_flags(token)
        # HuggingFace takes no id from here: it looks in the vocabulary, else counts on from the highest
        expected = vocab.get(text, following)
        following += expected == following
        require(is_int(rank) and rank == expected and text and text not in texts, token.where, "id",
                "a new text and %s, which HuggingFace would give it" % show(expected), rank)
        texts.add(text)
        if str(rank) in decoder:
            token = Section("%s: added_tokens_decoder: %d" % (settings.where, rank), decoder[str(rank)])
        special = token.typed("special", bool, False)
        added.append(AddedToken(text, rank, special, token.typed("normalized", bool, not special)))
    return added


def check_merges(model, ranks, to_bytes):
    """Merging by rank, which is what the program does, must give the ids that the merge list gives.

    The list is in rank order, so both ways agree until merging by rank takes a pair that the list lacks. If that
    happens in any text, it also happens in the bytes of the joined token alone: so each token is tried.
    """
    listed, last, none = set(), 0, len(ranks)
    for i, merge in enumerate(model.typed("merges", list, None)):
        pair = merge.split(" ") if isinstance(merge, str) else merge        # newer files have pairs
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            refuse(model.where, "merge %d" % i, "a pair of tokens", show(merge))
        left, right = map(to_bytes, pair)
        rank = ranks.get(left + right, none)
        if rank == none or left not in ranks or right not in ranks:
            refuse(model.where, "merge %d" % i, "tokens of the vocabulary, and joined one as well", show(merge))
        if rank < last:
            refuse(model.where, "merge %d" % i, "merges in the order of the ids that they make",
                   "%s for id %d after one for id %d" % (show(merge), rank, last))
        last = rank
        listed.add((left, right))
    whole_pieces = model.typed("ignore_merges", bool, False)
    for token in ranks:
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        if whole_pieces and all(pair in listed or pair[0] not in ranks or pair[1] not in ranks for pair in splits):
            continue                            # no pair that makes this token is missing from the list
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 1:
            rank, i = min((ranks.get(parts[i] + parts[i + 1], none), i) for i in range(len(parts) - 1))
            if rank == none:
                break
            if (parts[i], parts[i + 1]) not in listed:
                refuse(model.where, "token %d, %s" % (ranks[token], show(token)), "merges as by rank",
                       "none of %s + %s" % (show(parts[i]), show(parts[i + 1])))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1 and not whole_pieces:
            refuse(model.where, "ignore_merges", "true, since merges do not make token %d, %s"
                   % (ranks[token], show(token)), "false")


def template_bos(root, ids):
    """The id that HuggingFace puts before a text, or None; anything put elsewhere is refused.

    ids: those of added tokens."""
    processor, bos = Section(root.where + ": post_processor", root.get("post_processor", {})), None
    steps = [processor.values]
    if processor.get("type") == "Sequence":
        steps = processor.typed("processors", list, None)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    for step in (Section(processor.where, step) for step in steps):
        kind = step.one_of("type", "TemplateProcessing", "ByteLevel", None)
        single = step.get("single")
        if kind != "TemplateProcessing" or single == [text]:    # ByteLevel moves offsets, never ids
            continue
        try:
            name = single[0]["SpecialToken"]["id"]
            (rank,) = step.get("special_tokens")[name]["ids"]
        except (TypeError, ValueError, LookupError):
            name, rank = None, None
        require(single == [{"SpecialToken": {"id": name, "type_id": 0}}, text] and is_int(rank) and rank in ids.values()
                and bos is None, step.where, "single", "at most one special token, then the text", single)
        bos = rank
    return bos


# -------------------------------------------------------------------------------------------------- the files beside it

def check_tokenizer_config(settings, vocabulary):
    """tokenizer_config.json can change what tokenizer.json says: then the ids depend on who reads it.

    add_bos_token and add_eos_token do not: transformers 5 reads neither beside a tokenizer.json, and earlier releases
    did for the class LlamaTokenizer alone."""
    for key in ("add_prefix_space", "split_special_tokens"):
        settings.one_of(key, False, None)
    has_bos = vocabulary.bos is not None
    llama_class = settings.get("tokenizer_class", "LlamaTokenizer") in ("LlamaTokenizer", "LlamaTokenizerFast")
    add_bos = settings.typed("add_bos_token", bool, llama_class or has_bos)
    add_eos = settings.typed("add_eos_token", bool, False)
    if llama_class and (add_bos != has_bos or add_eos):
        note("%s: add_bos_token and add_eos_token are left aside, as in transformers 5; transformers 4 would put %s "
             "token before a text and %s after it"
             % (settings.where, "a BOS" if add_bos else "no", "an EOS" if add_eos else "none"))
    if settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        note("%s: tokenizer_class %s beside a byte-level tokenizer.json: transformers 5.17 drops every blank there; "
             "5.24 and 4.57 do not" % (settings.where, settings.get("tokenizer_class")))
    check_named_tokens(settings, vocabulary)


def check_named_tokens(settings, vocabulary):
    """Tokens that tokenizer_config.json or special_tokens_map.json names are added to a vocabulary that lacks them.

    What is named as bos_token, eos_token, pad_token and so on is special, whatever tokenizer.json says."""
    named = [(key, value) for key, value in settings.values.items() if key.endswith("_token")]
    single = len(named)
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        values = settings.get(key, [])
        named += values.items() if isinstance(values, dict) else [(key, each) for each in settings.typed(key, list, [])]
    ids = vocabulary.named()
    for i, (key, value) in enumerate(named):
        token = Section("%s: %s" % (settings.where, key), value if isinstance(value, dict) else {"content": value})
        text = token.get("content")
        if text is None or isinstance(text, bool):
            continue
        rank = ids.get(text) if isinstance(text, str) else None
        require(rank is not None and key in (str(rank), key.lstrip("0123456789")), token.where, "content",
                "an added token of tokenizer.json", text)
        check_flags(token)
        if i < single and rank in vocabulary.added:
            vocabulary.specials[rank] = vocabulary.added.pop(rank)


def check_added_tokens(added, vocabulary):
    """added_tokens.json, {text: id}, adds to the vocabulary, too."""
    ids = vocabulary.named()
    for text, rank in added.values.items():
        require(is_int(rank) and ids.get(text) == rank, added.where, show(text),
                "the id of that added token in tokenizer.json", rank)


# ------------------------------------------------------------------------------------------------- all of a directory's

def read_tokenizer(directory, config, vocab_size):
    """The vocabulary from tokenizer.json, from original/tokenizer.model, or from both, which then must agree."""
    vocabulary = None
    if os.path.exists(os.path.join(directory, "tokenizer.json")):
        settings = Section.load(directory, "tokenizer_config.json", needed=False)
        vocabulary = read_tokenizer_json(directory, settings)
        check_tokenizer_config(settings, vocabulary)
        check_named_tokens(Section.load(directory, "special_tokens_map.json", needed=False), vocabulary)
        check_added_tokens(Section.load(directory, "added_tokens.json", needed=False), vocabulary)
    for path in (os.path.join(directory, "original", "tokenizer.model"), os.path.join(directory, "tokenizer.model")):
        if not os.path.exists(path):
            continue
        ranks = read_ranks(path)
        if vocabulary is None:
            vocabulary = vocabulary_from_ranks(ranks, vocab_size)
            config.one_of("bos_token_id", vocabulary.bos, None)
            note("%s: the special tokens are taken to be LLaMA 3.1's" % path)
        for rank, (ours, theirs) in enumerate(itertools.zip_longest(vocabulary.ranks, ranks)):
            if ours != theirs:
                refuse(path, "token %d" % rank, "%s as elsewhere" % show(ours), show(theirs))
    if vocabulary is None:
        others = [name for name in ("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
                  if os.path.exists(os.path.join(directory, name))]
        refuse(directory, "tokenizer", "tokenizer.json or original/tokenizer.model",
               "%s, which is not LLaMA 3's tokenizer" % others[0] if others else
               "neither, an incomplete download: %s" % DOWNLOAD)
    drop_beyond(config, vocabulary, vocab_size)
    return vocabulary


def drop_beyond(config, vocabulary, vocab_size):
    """Leave out tokens beyond the embedding table: a padding token, say, that was added and never trained. One that a
    text may hold is refused."""
    cure = "the embeddings were not resized: model.resize_token_embeddings(len(tokenizer)), then save_pretrained"
    if len(vocabulary.ranks) > vocab_size:
        refuse(config.where, "vocab_size", "at least the tokenizer's %d ids" % len(vocabulary.ranks),
               "%d: the tokenizer belongs to another model, or %s" % (vocab_size, cure))
    needed = sorted(rank for rank in (*vocabulary.added, vocabulary.bos) if rank is not None and rank >= vocab_size)
    if needed:
        token = {**vocabulary.specials, **vocabulary.added}[needed[0]]
        refuse(config.where, "vocab_size", "more than %d, the id of %s, which %s" % (
            needed[0], show(token.decode()),
            "a text may hold" if needed[0] in vocabulary.added else "begins every text"), "%d: %s" % (vocab_size, cure))
    beyond = sorted(rank for rank in vocabulary.specials if rank >= vocab_size)
    if beyond:
        shown = ["%d %s" % (rank, show(vocabulary.specials[rank].decode())) for rank in beyond[:3]]
        note("%d special tokens beyond the embedding table of %d are left out: %s%s" % (
            len(beyond), vocab_size, ", ".join(shown), ", ..." * (len(beyond) > 3)))
    for rank in beyond:
        del vocabulary.specials[rank]
    vocabulary.normalized -= set(beyond)


def tokenizer_outputs(vocabulary, vocab_size):
    others = [vocabulary.specials.get(rank) or vocabulary.added.get(rank, b"")
              for rank in range(len(vocabulary.ranks), vocab_size)]
    kinds = bytes(len(vocabulary.ranks)) + bytes(
        1 if rank in vocabulary.specials else 3 if rank in vocabulary.added else 2
        for rank in range(len(vocabulary.ranks), vocab_size))
    tokens = [*vocabulary.ranks, *others]
    offsets = list(itertools.accumulate(map(len, tokens), initial=0))
    return [Output("tokenizer.offsets", "U32", [vocab_size + 1], struct.pack("<%dI" % len(offsets), *offsets)),
            Output("tokenizer.kind", "U8", [vocab_size], kinds),
            Output("tokenizer.bytes", "U8", [offsets[-1]], b"".join(tokens))]


if __name__ == "__main__":
    print(__doc__)
