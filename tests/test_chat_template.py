#!/usr/bin/env python3
"""Tests scripts/chat_template.py and the chat keys that convert.py writes: what is derived from a template, and that it
writes the ids of transformers' apply_chat_template (tests/vectors/chat.tsv).

    python3 tests/test_chat_template.py [part of a test's name]

One line per test, then `N passed, N failed, N skipped`; exit 1 if any failed. Standard library only; jinja2 is compared
with where it is there.
"""
import json
import os
import sys
import tempfile
from unittest import mock

from test_convert import ROOT, Checkpoint, Skip, converted, in_directory, parse_model, run, run_tests
import chat_template
import template_render

BOS = "<|begin_of_text|>"
HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
LOOP = "{% for m in messages %}{{ " + HEADER + " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
LLAMA3 = "{{ bos_token }}" + LOOP + ANSWER
# LLaMA 3's first published form: BOS within the loop, an answer's header always
LLAMA3_FIRST = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
                "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
                "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
                "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}")
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = DATE %}
{%- endif %}
{#- the system message goes into the first block #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = SYSTEM %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is defined and tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for m in messages %}
    {%- if not (m.role == 'tool' or 'tool_calls' in m) %}
        {{- """ + HEADER + """ + m['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {{- m.tool_calls[0].function.arguments | tojson }}
    {%- endif %}
{%- endfor %}
""" + ANSWER.replace("{%", "{%-").replace("{{", "{{-")


def llama31(date="'26 Jul 2024'", system='""'):
    return LLAMA31.replace("DATE", date).replace("SYSTEM", system)


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
R1 = """{%- set ns = namespace(system='') -%}
{%- for m in messages if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages %}
  {%- if m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}{% endif %}
  {%- if m['role'] == 'assistant' and m['content'] is not none %}
    {%- set text = m['content'].split('</think>')[-1] if '</think>' in m['content'] else m['content'] -%}
    {{ '<\uff5cAssistant\uff5c>' + text + '<\uff5cend\u2581of\u2581sentence\uff5c>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"""
SUFFIX = ("{% set more = 'You may call functions.' %}{{ bos_token }}{% for m in messages %}{% set text = m['content'] | trim %}"
          "{% if loop.first and m['role'] == 'system' %}{% set text = text + '\\n' + more %}{% endif %}{{ " + HEADER
          + " + text + '<|eot_id|>' }}{% if loop.first and m['role'] != 'system' %}{{ more }}{% endif %}{% endfor %}" + ANSWER)
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nAnswer briefly.<|eot_id|>' }}{% endif %}"


def chat_checkpoint(template, bos=True):
    """The small checkpoint with ChatML's and R1's tokens, some of them not special."""
    checkpoint = Checkpoint(vocab_size=300)
    tokens = [("<|im_start|>", True), ("<|im_end|>", False), *((text, True) for text in chat_template.TOKENS["deepseek"][2:]),
              *((text, False) for text in chat_template.TOKENS["deepseek"][:2]), ("<think>", False)]
    for i, (text, special) in enumerate(tokens):
        checkpoint.tokenizer["added_tokens"].append({
            "id": 273 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special})
    if not bos:
        checkpoint.tokenizer["post_processor"] = None
    checkpoint.settings["chat_template"] = template
    return checkpoint


def keys(metadata):
    return {key: value for key, value in metadata.items() if key.startswith("chat_")}


# Name, template, chat keys, and a part of the note where one is wanted. The post-processor puts 262, <|begin_of_text|>.
DERIVED = (
    ("llama3", LLAMA3, {"chat_format": "llama3"}, ""),
    ("llama3, BOS in the loop", LLAMA3_FIRST, {"chat_format": "llama3"}, ""),
    ("llama3, newlines written out", LLAMA3.replace("\\n", "\n"), {"chat_format": "llama3"}, ""),
    ("llama3, double quotes", LLAMA3.replace("'", '"'), {"chat_format": "llama3"}, ""),
    ("llama3, BOS in a text", LLAMA3.replace("bos_token", "'<|begin_of_text|>'"), {"chat_format": "llama3"}, ""),
    ("llama3, no BOS", LOOP + ANSWER, {"chat_format": "llama3", "chat_bos_id": ""}, ""),
    ("llama3, another first token", "<|end_of_text|>" + LOOP + ANSWER, {"chat_format": "llama3", "chat_bos_id": "263"}, ""),
    ("llama3, a system message of its own", "{{ bos_token }}" + DEFAULT + LOOP + ANSWER,
     {"chat_format": "llama3", "chat_system": "Answer briefly."}, ""),
    ("llama3, one with white space around", "{{ bos_token }}" + DEFAULT.replace("Answer briefly.", " \\nA.\\n\u3042 ") + LOOP + ANSWER,
     {"chat_format": "llama3", "chat_system": " \nA.\n\u3042 "}, ""),
    ("llama3, an empty one", "{{ bos_token }}" + DEFAULT.replace("Answer briefly.", "") + LOOP + ANSWER,
     {"chat_format": "llama3", "chat_system": ""}, ""),
    ("llama3, generation marks", LLAMA3.replace("{{ " + HEADER, "{{ " + HEADER + " }}{% generation %}{{ '' ").replace(
        "{% endfor %}", "{% endgeneration %}{% endfor %}"), {"chat_format": "llama3"}, ""),
    ("llama3, a macro", "{% macro turn(m, end='<|eot_id|>') %}{{ " + HEADER + " + m.content | trim + end }}{% endmacro %}{{ bos_token }}"
     "{% for m in messages %}{{ turn(m) }}{% endfor %}" + ANSWER, {"chat_format": "llama3"}, ""),
    ("llama3, roles checked", LLAMA3.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role not in ['system', 'user', "
     "'assistant'] %}{{ raise_exception('role ' ~ m.role) }}{% endif %}"), {"chat_format": "llama3"}, ""),
    ("llama3, contents as they are", LLAMA3.replace(" | trim", ""), {"chat_format": "llama3"},
     "differs from format llama3 in a conversation with white space around messages"),
    ("llama3, no system messages", LLAMA3.replace("{% for m in messages %}", "{% if messages[0].role == 'system' %}"
     "{{ raise_exception('no system messages') }}{% endif %}{% for m in messages %}"), {"chat_format": "llama3"},
     "in a conversation with a system message: it fails: no system messages"),
    ("llama3.1", llama31(), {"chat_format": "llama3.1"}, ""),
    ("llama3.1, another date", llama31("'01 Feb 2025'"), {"chat_format": "llama3.1", "chat_date": "01 Feb 2025"}, ""),
    ("llama3.1, today", llama31("strftime_now('%d %b %Y')"), {"chat_format": "llama3.1", "chat_date": "today"}, ""),
    ("llama3.1, today in another form", llama31("strftime_now('%Y-%m-%d')"), {"chat_format": "none"},
     "is not one of llama3, llama3.1, chatml, deepseek and is not used"),
    ("llama3.1, a system message of its own", llama31(system="'You are Anna.'"),
     {"chat_format": "llama3.1", "chat_system": "You are Anna."}, ""),
    ("chatml", CHATML, {"chat_format": "chatml", "chat_bos_id": ""}, ""),
    ("chatml, BOS", "{{ bos_token }}" + CHATML, {"chat_format": "chatml"}, ""),
    ("chatml, a system message of its own", "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
     "{% endif %}" + CHATML, {"chat_format": "chatml", "chat_bos_id": "", "chat_system": "Be kind."}, ""),
    ("chatml, trimmed", CHATML.replace("m['content']", "m['content'].strip()"), {"chat_format": "chatml", "chat_bos_id": ""},
     "with white space around messages: it writes"),
    ("chatml, its own system message of today", "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nIt is ' + "
     "strftime_now('%d %b %Y') + '<|im_end|>\\n' }}{% endif %}" + CHATML, {"chat_format": "chatml", "chat_bos_id": ""},
     "in a conversation without a system message: it writes \"<|im_start|>system\\nIt is (today)"),
    ("chatml, without its newline", CHATML.replace(" + '\\n' }}{% endfor", " }}{% endfor"), {"chat_format": "none"}, "is not used"),
    ("deepseek", R1, {"chat_format": "deepseek"}, ""),
    ("deepseek, a system message of its own", R1.replace("system=''", "system='Think.'"),
     {"chat_format": "deepseek", "chat_system": "Think."}, ""),
    ("deepseek, the first upload", R1.replace("<think>\\n", ""), {"chat_format": "none"}, "where the program writes"),
    ("deepseek, thoughts left in", R1.replace(".split('</think>')[-1]", ""), {"chat_format": "deepseek"},
     "in a conversation with thoughts in an answer"),
    ("more than LLaMA 3's", SUFFIX, {"chat_format": "none"}, "is not used: in a plain conversation it writes"),
    ("an undefined variable", LLAMA3.replace("bos_token", "bos_token + functions"), {"chat_format": "none"}, "functions"),
    ("another model's", "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}", {"chat_format": "none"},
     "is not used"),
    ("not a template", "{% for %}", {"chat_format": "none"}, "is not used"),
    ("an open block", "{% if messages %}", {"chat_format": "none"}, "is not used"),
    ("an unknown tag", "{% import 'x' as y %}", {"chat_format": "none"}, "is not used"),
    ("empty", "", {"chat_format": "none"}, "is not used"),
)


def derived_test(template, wanted, part, jinja2):
    def test():
        if jinja2 and not chat_template.jinja2_there():
            raise Skip("no jinja2")
        with mock.patch("chat_template.jinja2_there", return_value=jinja2):
            metadata, _, stderr = converted(chat_checkpoint(template))
        assert keys(metadata) == wanted, (keys(metadata), stderr)
        assert part in stderr and bool(part) == ("the chat template" in stderr), stderr
        assert metadata.get("converter") == (None if wanted["chat_format"] == "none" and metadata["format"][-1] == "1" else "2")
    return test


def test_formats_of_the_file():
    """Kind 3 alone makes chat_checkpoint's files llama-model/2; without it the lowest format that holds the keys."""
    for template, wanted in ((LLAMA3, "1"), (llama31(), "1"), (LOOP + ANSWER, "2"), (llama31("'01 Feb 2025'"), "2"), (None, "1"),
                             ("{{ bos_token }}" + DEFAULT + LOOP + ANSWER, "2")):
        checkpoint = Checkpoint()
        checkpoint.settings["chat_template"] = template
        metadata, _, _ = converted(checkpoint)
        assert metadata["format"] == "llama-model/" + wanted, template
        assert ("converter" in metadata) == (template is not None), template


def test_bos_of_the_template():
    metadata, _, _ = converted(chat_checkpoint(LLAMA3, bos=False))
    assert metadata["bos_id"] == "" and keys(metadata) == {"chat_format": "llama3", "chat_bos_id": "262"}
    metadata, _, _ = converted(chat_checkpoint(LOOP + ANSWER, bos=False))
    assert metadata["bos_id"] == "" and keys(metadata) == {"chat_format": "llama3"}


def test_where_a_template_is():
    named = [{"name": "tool_use", "template": CHATML}, {"name": "default", "template": LLAMA3}]
    for template, files, wanted in (
            (named, {}, "llama3"), (named[:1], {}, "none"), (None, {}, "none"),
            (None, {"chat_template.jinja": llama31().encode()}, "llama3.1"),
            (LLAMA3, {"chat_template.jinja": llama31().encode()}, "llama3.1"),
            (LLAMA3, {"chat_template.jinja": llama31().replace("\n", "\r\n").encode()}, "llama3.1"),
            (None, {"chat_template.json": json.dumps({"chat_template": LLAMA3}).encode()}, "llama3")):
        checkpoint = Checkpoint()
        checkpoint.settings["chat_template"] = template
        checkpoint.files = files
        metadata, _, stderr = converted(checkpoint)
        assert metadata["chat_format"] == wanted and "chat format " + wanted in stderr, (template, files)
    checkpoint = Checkpoint(n_special=8)        # no <|eot_id|>
    checkpoint.settings["chat_template"] = LLAMA3
    checkpoint.generation = {"eos_token_id": 263}
    metadata, _, stderr = converted(checkpoint)
    assert metadata["chat_format"] == "none" and "the vocabulary has no <|eot_id|>" in stderr, stderr


def test_chat_format_asked_for():
    def asked(name, template):
        metadata, _, stderr = converted(chat_checkpoint(template), "--chat-format", name)
        return keys(metadata), stderr
    assert asked("llama3", LLAMA3)[0] == {"chat_format": "llama3"}
    assert asked("none", LLAMA3)[0] == {"chat_format": "none"}
    assert asked("llama3", None)[0] == {"chat_format": "llama3"}
    found, stderr = asked("llama3", "{{ bos_token }}" + CHATML)
    assert found == {"chat_format": "llama3"} and "is not llama3's: in a plain conversation it writes" in stderr, stderr
    found, stderr = asked("chatml", SUFFIX.replace("more = ", "more = functions + "))
    assert found == {"chat_format": "chatml"} and "was not checked" in stderr, stderr
    assert asked("chatml", "{{ bos_token }}" + CHATML.replace("m['content']", "m['content'] | trim"))[0] == {"chat_format": "chatml"}


@in_directory
def test_chat_format_without_its_tokens(source, out):
    status, stderr = run("--chat-format", "chatml", source, out)
    assert status == 1 and "the vocabulary has no <|im_start|>" in stderr, stderr
    assert run("--chat-format", "mistral", source, out)[0] == 2


def test_vocabulary_only_has_the_keys():
    metadata, tensors, _ = converted(chat_checkpoint("{{ bos_token }}" + DEFAULT + LOOP + ANSWER), "--vocab-only")
    assert keys(metadata) == {"chat_format": "llama3", "chat_system": "Answer briefly."} and len(tensors) == 3
    with tempfile.TemporaryDirectory() as top:
        source, out = os.path.join(top, "ranks"), os.path.join(top, "vocab.bin")
        from test_convert import make_ranks, ranks_file
        with open(source, "wb") as file:
            file.write(ranks_file(make_ranks()))
        assert run("--vocab-only", "--chat-format", "llama3", source, out)[0] == 0
        assert parse_model(out)[0]["chat_format"] == "llama3"


# ---------------------------------------------------------------------------------------------------------- limits

HOSTILE = ("{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{{ a }}{% endfor %}{% endfor %}{% endfor %}",
           "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
           "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaaaaaaaaaa') %}{% endfor %}",
           "{{ 'a' * 999999999999 }}", "{{ range(999999999999) | list }}", "{{ '%999999999d' % 1 }}", "{{ 9 ** 999999999 }}",
           "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
           "{{ ''.__class__.__mro__ }}", "{{ messages.__class__ }}", "{% set messages = messages.append(1) %}", "{{ cycler }}",
           "{{ [[[[[" * 3000, "{#", "{{ 'a", "{{ 1 if }}", "{{ bos_token[::0] }}", "{{ 'x'.join(1) }}", "{{ -'x' }}", "{{ 1 / 0 }}")


def test_hostile_templates():
    """Each comes to an end soon, with a note and no chat; nothing else of the conversion changes."""
    for template in HOSTILE:
        with mock.patch("chat_template.jinja2_there", return_value=False):
            metadata, _, stderr = converted(chat_checkpoint(template))
        assert metadata["chat_format"] == "none" and "is not used" in stderr, (template[:60], stderr)
        assert all(line.startswith("convert.py: ") or "GB/s" in line for line in stderr.splitlines()), stderr


def test_hostile_templates_in_jinja2():
    if not chat_template.jinja2_there():
        raise Skip("no jinja2")
    for template in HOSTILE:
        with mock.patch("template_render.RENDER_SECONDS", 1):     # five are right, and long for a test
            metadata, _, stderr = converted(chat_checkpoint(template))
        assert metadata["chat_format"] == "none" and "is not used" in stderr, (template[:60], stderr)


# --------------------------------------------------------------------------------------------------------- goldens

def read_goldens():
    """(token -> id, [(chat keys, messages, ids)])"""
    tokens, rows = {}, []
    with open(os.path.join(ROOT, "tests", "vectors", "chat.tsv"), encoding="ascii") as file:
        for line in file:
            parts = line.rstrip("\n").split("\t")
            if parts[0] == "token":
                tokens[json.loads(parts[3])] = int(parts[1])
            elif not line.startswith("#"):
                rows.append((json.loads(parts[0]), json.loads(parts[1]), list(map(int, parts[2].split()))))
    return tokens, rows


def byte_ids(text, tokens):
    """The ids of a text on the vocabulary of bytes, with added tokens in it found."""
    ids = []
    while text:
        token = max((each for each in tokens if text.startswith(each)), key=len, default="")
        ids += [tokens[token]] if token else text[0].encode()
        text = text[len(token) or 1:]
    return ids


def test_conversations_as_transformers_writes_them():
    tokens, rows = read_goldens()
    names = {rank: token for token, rank in tokens.items()}
    formats = set()
    for found, messages, wanted in rows:
        bos = found.get("chat_bos_id", found["bos_id"])
        chat = chat_template.Chat(found["chat_format"], names[int(bos)] if bos else "", found.get("chat_system"),
                                  found.get("chat_date", chat_template.DATE))
        ids, text = [], ""
        for kind, part in [*chat_template.render(chat, messages, ""), ("token", "")]:
            if kind == "token":
                ids += byte_ids(text, tokens) + ([tokens[part]] if part else [])
                text = ""
            else:
                text += part
        assert ids == wanted, (found, messages)
        formats.add((found["chat_format"], "chat_system" in found, "chat_date" in found))
    assert len(rows) >= 60 and len(formats) >= 6, (len(rows), formats)


def test_jinja2_and_the_reader_here_agree():
    if not chat_template.jinja2_there():
        raise Skip("no jinja2")
    conversations = [messages for _, messages in chat_template.PROBES]
    names = {"bos_token": BOS, "eos_token": "<|eot_id|>"}
    for name, template, _, _ in DERIVED:
        here = template_render.render_here(template, names, conversations)
        there = template_render.render_jinja2(template, names, conversations)
        for ours, theirs in zip(here, there):
            assert ours == theirs or not isinstance(ours, str) and not isinstance(theirs, str), (name, ours, theirs)


if __name__ == "__main__":
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_") and callable(test)]
    for name, template, wanted, part in DERIVED:
        tests.append(("derives: " + name, derived_test(template, wanted, part, False)))
        tests.append(("derives with jinja2: " + name, derived_test(template, wanted, part, True)))
    sys.exit(run_tests(tests))
