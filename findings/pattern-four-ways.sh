#!/usr/bin/env bash
# llguidance 1.9.1, xgrammar 0.2.9 and outlines-core 0.2.14: a regular expression is not the same texts in each.
#
# Good guess: answers masked by a simple pattern are the texts that Python's re.fullmatch takes; what an engine does not know, it
# refuses.
# What they do: to xgrammar "." is also a line break, \d and \w are ASCII, and \D and \W all else: a field that shall be one line gets
# several, and \w+ has no é. For outlines-core a lazy quantifier changes what is matched: a*? ends at the shortest, and nothing but the
# end may come after it. It and llguidance know POSIX classes, which Python and xgrammar take for sets of characters. Otherwise
# llguidance agrees with Python. A pattern that was tried in Python so lets through, or keeps back, other texts.
#   pattern        text    Python    llguidance    xgrammar    outlines-core
#   .              \n      no        no            yes         no
#   \d             ٣       yes       yes           no          yes
#   [^\d]          ٣       no        no            yes         no
#   \w             é       yes       yes           no          yes
#   a*?            aa      yes       yes           yes         no
#   [[:alpha:]]    a       no        yes           no          yes
# (٣ is an Arabic digit, U+0663.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check llguidance==1.9.1 xgrammar==0.2.9 outlines-core==0.2.14 torch==2.11.0 \
    numpy==2.4.6
"$work/venv/bin/python" - <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import re, sys
import llguidance
import xgrammar
from outlines_core import Index, Vocabulary

def by_python(pattern, text):
    return bool(re.fullmatch(pattern, text))

def by_llguidance(pattern, text):
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_regex(pattern))
    ids = list(text.encode())
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

def by_xgrammar(pattern, text):
    tokens = [bytes([i]) for i in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_regex(pattern))
    return all(map(matcher.accept_token, text.encode())) and matcher.accept_token(256)

def by_outlines(pattern, text):
    index = Index(pattern, Vocabulary(256, {bytes([i]): [i] for i in range(256)}))
    state = index.get_initial_state()
    for byte in text.encode():
        state = index.get_next_state(state, byte)
        if state is None:
            return False
    return index.is_final_state(state)

engines = by_python, by_llguidance, by_xgrammar, by_outlines
wrong = False
for pattern, text, expected in ((".", "\n", (0, 0, 1, 0)), (".", "é", (1, 1, 1, 1)), (r"\d", "٣", (1, 1, 0, 1)),
                                (r"\d", "3", (1, 1, 1, 1)), (r"[^\d]", "٣", (0, 0, 1, 0)), (r"\D", "٣", (0, 0, 1, 0)),
                                (r"\w", "é", (1, 1, 0, 1)), (r"\W", "é", (0, 0, 1, 0)),
                                ("a*?", "aa", (1, 1, 1, 0)), ("a*", "aa", (1, 1, 1, 1)),
                                ("[[:alpha:]]", "a", (0, 1, 0, 1))):
    found = tuple(int(engine(pattern, text)) for engine in engines)
    print("%-12s %-6s" % (pattern, ascii(text)), *("yes" if each else "no" for each in found))
    wrong |= found != expected
sys.exit(wrong)
PY
