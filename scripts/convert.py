#!/usr/bin/env python3
"""Convert a LLaMA checkpoint in HuggingFace layout to model.bin.

    convert.py Llama-3.1-8B-Instruct/ model.bin
    convert.py --vocab-only Llama-3.1-8B-Instruct/ vocab.bin     (or a bare tiktoken ranks file)

Standard library only. Weights are copied byte for byte, the codes and scales of quantised ones as well; norms change type (to float32), and embeddings and output
where that loses nothing. Whatever this program cannot carry over exactly is refused: a model that loads and gives
other tokens is worse than none. Memory does not grow with the checkpoint.

This file is the command line and the plan. The modules that it imports are beside it, and are copied with it; in
reading order:

    refusal               how bad input is refused, and what is said
    checked_json          JSON files, the types of their fields checked
    share_writer          codes that change on their way, by several processes
    model_file            model.bin: its formats, and writing one
    safetensors_reader    one safetensors file
    weight_values         BF16, F16 and F32 values, compared and converted exactly
    hf_checkpoint         what a directory is, config.json, shards, weights
    hf_quantised          codes and scales of checkpoints that are quantised already
    hf_tokenizer          tokenizer.json and tiktoken ranks
    chat_template         a chat template as a format with parameters
    template_render       what a template writes for a conversation: read here, or by jinja2 in a child process
    template_reader       Jinja's statements
    template_expressions  its expressions
    template_values       its values, filters and tests, and the limits of all
"""
import argparse
import os
import signal
import stat
import sys

from chat_template import FORMATS, chat_metadata
from checked_json import Section
from hf_checkpoint import check_architecture, check_source, end_ids, model_metadata, open_checkpoint, select_weights
from hf_quantised import read_scheme
from hf_tokenizer import read_ranks, read_tokenizer, tokenizer_outputs, vocabulary_from_ranks
from model_file import MAX_VOCAB, lowest_format, write_model
from refusal import Refused, note, refuse

CONVERTER = "2"                         # this program's version, in the files it writes


def check_paths(source, path):
    """Replacing a device or one's own input would be a bad surprise."""
    if not os.path.exists(path):
        parent = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(parent):
            refuse(path, "output", "a file in a directory that is there", "no directory %s" % parent)
        return
    if not stat.S_ISREG(os.stat(path).st_mode):
        refuse(path, "output", "a regular file or none", "something else")
    inputs = [source] if not os.path.isdir(source) else [
        os.path.join(top, name) for top in (source, os.path.join(source, "original")) if os.path.isdir(top)
        for name in os.listdir(top) if name.endswith((".safetensors", ".json", ".jinja", ".model"))]
    for each in inputs:
        if os.path.exists(each) and os.path.samefile(each, path):
            refuse(path, "output", "another file than the input", each)


def convert(source, path, vocab_only, chat_format=None):
    check_source(source, vocab_only)
    check_paths(source, path)
    name = os.path.basename(os.path.abspath(source)).encode("utf-8", "replace").decode()
    metadata, outputs = {"format": "llama-model/1"}, []
    if os.path.isdir(source):
        config = Section.load(source, "config.json")
        check_architecture(config)
        vocab_size = config.integer("vocab_size", most=MAX_VOCAB)
        if not vocab_only:
            sizes, tied, model = model_metadata(config)
            metadata.update(model)
            scheme = read_scheme(config)
            outputs = select_weights(*open_checkpoint(source), sizes, tied, scheme)
            if any(output.name.endswith(".scale") and len(output.shape) == 2 for output in outputs):
                metadata["group"] = str(scheme.group)
        vocabulary = read_tokenizer(source, config, vocab_size)
        eos, chat = end_ids(source, config, vocab_size), chat_metadata(source, vocabulary, chat_format)
        if chat["chat_format"] != "none":
            chat["converter"] = CONVERTER
    else:
        ranks = read_ranks(source)
        n, vocab_size = len(ranks), len(ranks) + 256
        vocabulary = vocabulary_from_ranks(ranks, vocab_size)
        eos, chat = [n + 1, n + 8, n + 9], {"chat_format": chat_format or "llama3.1"}
    if vocab_only:
        metadata.update(n_layers="0", vocab_size=str(vocab_size))
    metadata.update(bos_id="" if vocabulary.bos is None else str(vocabulary.bos), eos_ids=",".join(map(str, eos)),
                    **chat)
    if vocabulary.normalized:
        metadata["normalized_ids"] = ",".join(map(str, sorted(vocabulary.normalized)))
    if not vocab_only:
        metadata["source"] = name
    outputs += tokenizer_outputs(vocabulary, vocab_size)
    metadata["format"] = lowest_format(metadata, outputs)
    if metadata["format"] != "llama-model/1":
        metadata["converter"] = CONVERTER
    note("%s: %s, %s ids, bos %s, eos %s, chat format %s" % (
        name, "vocabulary only" if vocab_only else "%(n_layers)s layers, dim %(dim)s, rope %(rope_type)s" % metadata,
        vocab_size, metadata["bos_id"] or "none", metadata["eos_ids"] or "none", chat["chat_format"]))
    write_model(path, metadata, outputs)


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(prog="convert.py", description="Convert a HuggingFace LLaMA checkpoint.")
    parser.add_argument("--vocab-only", action="store_true",
                        help="write the tokenizer and no weights; IN may then be a tiktoken ranks file")
    parser.add_argument("--chat-format", metavar="NAME", choices=("none", *FORMATS),
                        help="%s or none, in place of what the chat template is found to be"
                             % ", ".join(FORMATS))
    parser.add_argument("source", metavar="IN", help="checkpoint directory")
    parser.add_argument("path", metavar="OUT", help="model.bin to write")
    args = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):     # the temporary file must go, whichever it is
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:       # which is how nohup asks
            signal.signal(each, interrupt)
    try:
        convert(args.source, args.path, args.vocab_only, args.chat_format)
        return 0
    except Refused as error:
        message = str(error)
    except OSError as error:
        message = "%s: %s" % (error.filename or args.path, error.strerror or error)
    except RecursionError:
        message = "%s: JSON nested too deeply" % args.source
    except MemoryError:
        message = "%s: out of memory" % args.source
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    note(" ".join(message.splitlines()))
    return 1


if __name__ == "__main__":
    sys.exit(main())
