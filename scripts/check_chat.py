#!/usr/bin/env python3
"""Compares chat conversations with transformers' apply_chat_template: the ids must be equal.

    python3 -m venv build/venv-chat && build/venv-chat/bin/pip install -r scripts/requirements-chat.txt
    build/venv-chat/bin/python scripts/check_chat.py [--program ./llama] [--ranks ../shared/tokenizer/tokenizer.model]

Each template is given to convert.py in a checkpoint; what convert.py derives from it must write transformers' ids for
random conversations, by chat_template.render and, with --program, by the program as well: each conversation as a line
of `--prompts FILE --tokenize` with messages, one line of ids for each, and single messages through
`--chat --tokenize -p TEXT`. The templates of LLaMA 3.1, 3.2, 3.3 and R1 come from the source archive of
llama-cpp-python, which is fetched with pip unless --templates names a directory with them; the others are written here.
Exit status 1 if any conversation differs.

    check_chat.py --write tests/vectors/chat.tsv

writes conversations and their ids on a vocabulary of single bytes instead, for the tests.
"""
import argparse
import datetime
import glob
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile

import chat_template
from hf_tokenizer import SPLIT_PATTERN, byte_alphabet, read_ranks

ARCHIVE = "llama-cpp-python==0.3.36"
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
            "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|im_start|>", *chat_template.TOKENS["deepseek"][2:]]
ADDED = ["<|im_end|>", *chat_template.TOKENS["deepseek"][:2], "<think>", "</think>", "<tool_call>"]     # not special
WRITTEN = """\
# Written by scripts/check_chat.py --write: ids of transformers' apply_chat_template, a generation prompt at the
# end. Tokens 0 to 255 are the bytes; then come the lines `token ID KIND TEXT`. A conversation is a line of
# a model.bin's chat keys, the messages and the ids, with tabs between.
"""

HEADER = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
ANSWER = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
LLAMA3 = ("{% for message in messages %}{% set text = " + HEADER + " + message['content'] | trim + '<|eot_id|>' %}"
          "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}" + ANSWER)
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
          "'<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
OWN_SYSTEM = """{%- if messages[0].role == 'system' -%}
    {%- set system = messages[0].content | trim -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = 'You are Anna.\\nAnswer <tool_call> in verse.' -%}
    {%- set rest = messages -%}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' -}}
{%- for message in rest -%}
    {{- """ + HEADER + """ + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
DATED = """{%- set date = DATE %}
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ date ~ '\\n\\n' }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'].strip() }}
    {%- set messages = messages[1:] %}
{%- else %}
    {{- SYSTEM }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- """ + HEADER + """ ~ (message['content'] | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""
# Name, and the template's text or its file in the archive.
TEMPLATES = (
    ("LLaMA 3", LLAMA3),
    ("LLaMA 3.1", "meta-llama-Llama-3.1-8B-Instruct.jinja"),
    ("LLaMA 3.2", "meta-llama-Llama-3.2-3B-Instruct.jinja"),
    ("LLaMA 3.3", "meta-llama-Llama-3.3-70B-Instruct.jinja"),
    ("Hermes", "{{bos_token}}" + CHATML),
    ("R1", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja"),
    ("a system message of its own", OWN_SYSTEM),
    ("another date", DATED.replace("DATE", "'01 Feb 2025'").replace("SYSTEM", "''")),
    ("today, and a system message of its own",
     DATED.replace("DATE", "strftime_now('%d %b %Y')").replace("SYSTEM", "'Be kind.'")),
    ("no BOS", LLAMA3.replace("bos_token + ", "")),
    ("ChatML without BOS, with a system message of its own",
     "{% if messages[0]['role'] != 'system' %}"
     "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + CHATML),
)


# --------------------------------------------------------------------------------------------------------- the library

def fetch_templates(directory):
    """The published templates: the archive's, put into the directory."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                    "--no-binary", "llama-cpp-python", "-d", directory, ARCHIVE], check=True)
    with tarfile.open(glob.glob(os.path.join(directory, "*.tar.gz"))[0]) as archive:
        for member in archive:
            if "/models/templates/" in member.name and member.isfile():
                with open(os.path.join(directory, os.path.basename(member.name)), "wb") as file:
                    file.write(archive.extractfile(member).read())
    return directory


def tokenizer_json(ranks):
    """A tokenizer.json with these ordinary tokens, then SPECIALS, then ADDED."""
    letters = {byte: char for char, byte in byte_alphabet().items()}
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [[names[token[:i]], names[token[i:]]] for token in ranks for i in range(1, len(token))
              if token[:i] in ranks and token[i:] in ranks]
    added = [{"id": len(ranks) + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": text in ADDED, "special": text in SPECIALS} for i, text in enumerate(SPECIALS + ADDED)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                      "vocab": {names[token]: rank for token, rank in ranks.items()}, "merges": merges}}


def write_checkpoint(directory, template, ranks, tokenizer):
    """What convert.py --vocab-only and AutoTokenizer read."""
    n = len(ranks)
    files = {"config.json": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": n + 32,
                             "eos_token_id": n + 1, "bos_token_id": n},
             "tokenizer.json": tokenizer,
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0],
                                       "eos_token": "<|eot_id|>", "chat_template": template}}
    os.makedirs(directory)
    for name, value in files.items():
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            json.dump(value, file)


def convert_vocabulary(source, model):
    """convert.py --vocab-only."""
    subprocess.run([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "convert.py"),
                    "--vocab-only", source, model], check=True, stderr=subprocess.DEVNULL)


# --------------------------------------------------------------------------------------------------------------- ours

def read_header(path):
    """A model.bin's metadata."""
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(n))["__metadata__"]


def chat_of(metadata, names):
    """The Chat that a model.bin's metadata say. names: id -> text."""
    bos = metadata.get("chat_bos_id", metadata["bos_id"])
    return chat_template.Chat(metadata["chat_format"], names[int(bos)] if bos else "", metadata.get("chat_system"),
                              metadata.get("chat_date", chat_template.DATE))


def encode(parts, tokenizer, ids):
    """Ids of what chat_template.render gives: what stands between two tokens is one text."""
    result, text = [], ""
    for kind, part in parts:
        if kind == "token" and part in ids:
            result += tokenizer.encode(text, add_special_tokens=False) + [ids[part]]
            text = ""
        else:
            text += part
    return result + tokenizer.encode(text, add_special_tokens=False)


# ------------------------------------------------------------------------------------------------------- conversations

WORDS = ["Hi", "Hello there.", "What is 2 + 2?", "caf\u00e9", "\u65e5\u672c\u8a9e", "\U0001f600", "don't", "1234567",
         "a\nb", "a\n\n\nb", "  indented", "trailing  ", "\ttab", "{{ bos_token }}", "{% if %}", "<b>", "|>", "<|",
         "<tool_call>", "'quoted'", '"double"', "\\n", "x" * 70, "\u00a0", "e\u0301", "/etc/passwd",
         "# heading\n- item", "```c\nint x;\n```", "</i>", "0"]
EDGES = ["", "", "", " ", "\n", "\n\n", "\t", "\u3000", " \n ", "\x1f", "\u00a0", "\x85"]


def content(rng):
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
    return rng.choice(EDGES) + text + rng.choice(EDGES)


def conversation(rng):
    messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": content(rng)})
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        thoughts = rng.choice(("", "", "", "<think>\nHm, " + content(rng) + "\n</think>\n\n", "</think>",
                               "<think>a</think>b</think>"))
        messages += [{"role": "user", "content": content(rng)},
                     {"role": "assistant", "content": thoughts + content(rng)}]
    return messages + [{"role": "user", "content": content(rng)}]


# ---------------------------------------------------------------------------------------------------------------- main

def today():
    """In English, whatever the locale."""
    day = datetime.date.today()
    return "%02d %s %d" % (day.day, "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()[day.month - 1], day.year)


def program_ids(program, model, conversations, directory):
    """The program's ids of whole conversations, and of the single messages among them through --chat."""
    path = os.path.join(directory, "prompts.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": messages}) + "\n")
    out = subprocess.run([program, model, "--tokenize", "--prompts", path],
                         stdout=subprocess.PIPE, check=True).stdout.decode()
    result = [list(map(int, line.split())) for line in out.split("\n")[:-1]]
    if len(result) != len(conversations):
        sys.exit("check_chat.py: %d lines for %d conversations" % (len(result), len(conversations)))
    for i, messages in enumerate(conversations):
        if len(messages) == 1 or (len(messages) == 2 and messages[0]["role"] == "system"):
            system = ["--system", messages[0]["content"]] if len(messages) == 2 else []
            out = subprocess.run([program, model, "--chat", "--tokenize", *system, "-p", messages[-1]["content"]],
                                 stdout=subprocess.PIPE, check=True).stdout.decode()
            if list(map(int, out.split())) != result[i]:
                result[i] = list(map(int, out.split()))     # shows as a difference, unless --prompts was the wrong one
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", help="LLaMA 3's tokenizer.model; without it the ordinary tokens are the 256 bytes")
    parser.add_argument("--templates", metavar="DIR", help="the published templates, already there")
    parser.add_argument("--program", help="./llama, compared as well")
    parser.add_argument("-n", type=int, default=100, help="conversations for each template (100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", metavar="FILE", help="write conversations for the tests instead")
    args = parser.parse_args()

    from transformers import AutoTokenizer
    bytes_only = args.write or not args.ranks
    ranks = {bytes([byte]): byte for byte in range(256)} if bytes_only else read_ranks(args.ranks)
    tokenizer_file, names = tokenizer_json(ranks), {len(ranks) + i: text for i, text in enumerate(SPECIALS + ADDED)}
    ids = {text: rank for rank, text in names.items()}
    rng, total, wrong, rows = random.Random(args.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as top:
        templates = args.templates or fetch_templates(top)
        for number, (name, template) in enumerate(TEMPLATES):
            if template.endswith(".jinja"):
                with open(os.path.join(templates, template), encoding="utf-8") as file:
                    template = file.read()
            source, model = os.path.join(top, "checkpoint%d" % number), os.path.join(top, "%d.bin" % number)
            write_checkpoint(source, template, ranks, tokenizer_file)
            convert_vocabulary(source, model)
            metadata = read_header(model)
            if metadata["chat_format"] == "none":
                print("%s: no format found" % name)
                wrong += 1
                continue
            chat, tokenizer = chat_of(metadata, names), AutoTokenizer.from_pretrained(source, local_files_only=True)
            conversations = [conversation(rng) for _ in range(7 if args.write else args.n)]
            while True:                         # again if the day ends between
                day = today()
                expected = [tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                            for messages in conversations]
                ours = [encode(chat_template.render(chat, messages, day), tokenizer, ids) for messages in conversations]
                theirs = program_ids(args.program, model, conversations, top) if args.program else ours
                if day == today():
                    break
            differ = [i for i, want in enumerate(expected) if want != ours[i] or want != theirs[i]]
            for i in differ[:3]:
                found = ours[i] if ours[i] != expected[i] else theirs[i]
                print("%s: %s\n  expected %s\n  found    %s" % (
                    name, json.dumps(conversations[i]), tokenizer.decode(expected[i]), tokenizer.decode(found)))
            print("%-55s %-8s %5d conversations, %d differ" % (name, chat.format, len(expected), len(differ)))
            total, wrong = total + len(expected), wrong + len(differ)
            keys = {key: value for key, value in metadata.items() if key.startswith("chat_") or key == "bos_id"}
            if chat.date != chat_template.TODAY:            # another day's golden would be another one
                rows += [(keys, messages, want) for messages, want in zip(conversations, expected)]
    if args.write and not wrong:
        with open(args.write, "w", encoding="ascii", newline="\n") as file:
            file.write(WRITTEN)
            for rank, text in names.items():
                file.write("token\t%d\t%d\t%s\n" % (rank, 1 if text in SPECIALS else 3, json.dumps(text)))
            for keys, messages, want in rows:
                file.write("%s\t%s\t%s\n" % (json.dumps(keys), json.dumps(messages), " ".join(map(str, want))))
    print("%d conversations with %d templates, %s, %d differences" % (
        total, len(TEMPLATES), "the program and convert.py" if args.program else "convert.py alone", wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
