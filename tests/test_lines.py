#!/usr/bin/env python3
"""--prompts line by line: settings of a line's own, keys that come back, errors in their place; the answers' JSON; the hint
about special tokens. Standard library only.

tests/vectors/answers.tsv has what transformers gives in float32 (scripts/check_answers.py --golden): a repetition penalty,
a prompt, its greedy continuation, and the log-probabilities of the prompt's tokens.
"""
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile

from check import wanted

LLAMA = os.environ.get("LLAMA") or "./llama"
MODEL = "model/stories.bin"
ANSWERS = "tests/vectors/answers.tsv"
SPECIAL_CASE = os.path.join("..", "shared", "cases", "special-no-hint", "checkpoint")
SANITIZERS = "exitcode=99:detect_leaks=1:abort_on_error=0"
TOLERANCE = 1e-4                    # of log-probabilities in float32, printed with six decimals
COMPARED = ("prompt_ids", "ids", "text", "finish_reason", "token_texts")
counts = {"ok": 0, "FAIL": 0, "SKIP": 0}
work = tempfile.TemporaryDirectory(prefix="llama-test-")


class Skip(Exception):
    """A test cannot run here."""


def run(*flags, model=MODEL, status=0, stdin=""):
    """Standard output and standard error of a run that ends with this status."""
    environment = dict(os.environ, ASAN_OPTIONS=SANITIZERS, UBSAN_OPTIONS=SANITIZERS, OMP_NUM_THREADS="1")
    engine = () if "--tokenize" in flags else ("--engine", "cpu")
    done = subprocess.run([LLAMA, model, *engine, *flags], input=stdin.encode(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment, timeout=600, check=False)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode()
    assert done.returncode == status, "status %d, expected %d: %s" % (done.returncode, status, err[-300:])
    return out, err


def write_lines(lines):
    """A prompts file of these lines: text as it is, anything else as JSON."""
    path = os.path.join(work.name, "prompts")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return path


def answers(lines, *flags, status=0):
    """The answers to lines, in their order, and standard error."""
    out, err = run("--prompts", write_lines(lines), *flags, status=status)
    found = [json.loads(line) for line in out.splitlines()]
    assert [answer["index"] for answer in found] == list(range(len(lines))), "not an answer for each line, in order"
    return found, err


def alone(*flags):
    return json.loads(run(*flags, "--json", "--quiet")[0])


def check_same(found, expected, what):
    for key in COMPARED:
        assert found[key] == expected[key], "%s: %s %r, expected %r" % (what, key, found[key], expected[key])
    assert len(found.get("logprobs", ())) == len(expected.get("logprobs", ())), what
    for ours, theirs in zip(found.get("logprobs", ()), expected.get("logprobs", ())):
        check_entry(ours, theirs, what)


def check_entry(found, expected, what):
    """One entry of logprobs."""
    assert found["id"] == expected["id"] and len(found["top"]) == len(expected["top"]), what
    for ours, theirs in zip([found, *found["top"]], [expected, *expected["top"]]):
        assert abs(ours["logprob"] - theirs["logprob"]) <= TOLERANCE, (what, ours, theirs)


def chat_checkpoint():
    """A checkpoint with a chat template; Skip: there is none."""
    if not os.path.isdir(SPECIAL_CASE):
        raise Skip("no " + SPECIAL_CASE)
    return SPECIAL_CASE


def equal(found, expected):
    assert found == expected, "%r, expected %r" % (found, expected)


# ------------------------------------------------------------------------------------------------------- transformers

def golden():
    with open(ANSWERS, encoding="ascii") as file:
        for row in file:
            penalty, ids, answer, logprobs = row.rstrip("\n").split("\t")
            yield float(penalty), list(map(int, ids.split())), list(map(int, answer.split())), list(map(float, logprobs.split()))


def test_repetition_penalty_gives_transformers_tokens():
    rows = list(golden())
    lines = [{"ids": ids, "repetition_penalty": penalty, "n": len(answer)} for penalty, ids, answer, _ in rows]
    for batch in ("1", "8"):
        found, _ = answers(lines, "--ignore-eos", "--quiet", "-b", batch)
        for i, (row, each) in enumerate(zip(rows, found)):
            assert each["ids"] == row[2], "-b %s, prompt %d: %s, expected %s" % (batch, i, each["ids"], row[2])


def test_repetition_penalty_changes_what_it_should():
    """Most of the golden answers are others than without it, or they would show nothing."""
    rows = [row for row in golden() if row[0] != 1]
    found, _ = answers([{"ids": ids, "n": len(answer)} for _, ids, answer, _ in rows], "--ignore-eos", "--quiet")
    differ = sum(each["ids"] != row[2] for each, row in zip(found, rows))
    assert differ > len(rows) * 0.8, "%d of %d differ" % (differ, len(rows))


def test_repetition_penalty_flag_and_alias():
    penalty, ids, answer, _ = next(row for row in golden() if row[0] > 1)
    for flag in ("--repetition-penalty", "--repeat-penalty"):
        found = alone("--ids", "-p", json.dumps(ids), "-n", str(len(answer)), "--ignore-eos", flag, str(penalty))
        equal(found["ids"], answer)
        for bad in ("0", "-1", "x", "nan"):
            err = run("-p", "a", flag, bad, status=2)[1]
            assert flag in err and "expected a number" in err, err


def story_chat_model():
    """The story model with a chat format: its metadata is written anew, in the same room."""
    path = os.path.join(work.name, "story-chat.bin")
    with open(MODEL, "rb") as file:
        blob = file.read()
    length, = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8:8 + length])
    header["__metadata__"]["chat_format"] = "llama3"
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    with open(path, "wb") as file:
        file.write(blob[:8] + text.ljust(length) + blob[8 + length:])
    return path


def test_repetition_penalty_of_a_conversation():
    """It counts all ids of the conversation, those of messages and answers before, too."""
    model, messages = story_chat_model(), ("The king and the wolf.", "And the king?")
    flags = ("-n", "20", "--ignore-eos", "--quiet", "--repetition-penalty", "1.6")
    prompts = [json.loads(run("--tokenize", "--json", "--chat", "-p", each, model=model)[0])["ids"] for each in messages]
    first = json.loads(run("--chat", "-p", messages[0], "--json", *flags, model=model)[0])
    equal(first["prompt_ids"], prompts[0])
    end, = json.loads(run("--tokenize", "--json", "--special", "-p", "<|eot_id|>", model=model)[0])["ids"]
    conversation = prompts[0] + first["ids"] + [end] + prompts[1][1:]
    second = json.loads(run("--ids", "-p", json.dumps(conversation), "--json", *flags, model=model)[0])
    out, _ = run("--chat", *flags, model=model, stdin="".join(each + "\n" for each in messages))
    equal(out, "%s\n%s\n" % (first["text"], second["text"]))
    alone_ids = json.loads(run("--chat", "-p", messages[1], "--json", *flags, model=model)[0])["ids"]
    assert alone_ids != second["ids"]


def test_repetition_penalty_leaves_log_probabilities():
    """Those of the first new token are the model's own."""
    flags = ("-p", "The king and the king", "-n", "1", "--logprobs", "20")
    plain, penalised = alone(*flags), alone(*flags, "--repetition-penalty", "3")
    equal(penalised["logprobs"][0]["top"], plain["logprobs"][0]["top"])


def test_prompt_logprobs_are_transformers():
    for penalty, ids, _, expected in golden():
        found = alone("--ids", "-p", json.dumps(ids), "-n", "1", "--echo", "--logprobs", "2", "--repetition-penalty",
                      str(penalty))
        first, *others = found["prompt_logprobs"]
        assert first is None and [each["id"] for each in others] == ids[1:], "null, then each id but the first"
        for i, (each, logprob) in enumerate(zip(others, expected)):
            assert abs(each["logprob"] - logprob) <= TOLERANCE, (len(ids), i, each, logprob)
            assert len(each["top"]) == 2 and each["top"][0]["logprob"] >= each["top"][1]["logprob"]


def test_prompt_logprobs_equal_those_of_the_answer():
    """What was generated, given as a prompt, has the log-probabilities that it had."""
    first = alone("-p", "Once upon a time", "-n", "150", "--logprobs", "3", "--ignore-eos")
    ids = first["prompt_ids"] + first["ids"]
    again = alone("--ids", "-p", json.dumps(ids), "-n", "1", "--echo", "--logprobs", "3")
    assert len(again["prompt_logprobs"]) == len(ids)
    for found, expected in zip(again["prompt_logprobs"][len(first["prompt_ids"]):], first["logprobs"]):
        check_entry(found, expected, "after %d ids" % len(first["prompt_ids"]))


def test_prompt_logprobs_alone():
    """-n 0 scores and adds nothing, in a context that the prompt fills, too."""
    for _, ids, _, expected in golden():
        found = alone("--ids", "-p", json.dumps(ids), "-n", "0", "-c", str(len(ids)), "--echo", "--logprobs", "1")
        equal([found[key] for key in ("ids", "finish_reason", "token_texts", "logprobs")], [[], "length", [], []])
        equal(len(found["prompt_logprobs"]), len(ids))
        for each, logprob in zip(found["prompt_logprobs"][1:], expected):
            assert abs(each["logprob"] - logprob) <= TOLERANCE, (each, logprob)


def test_prompt_logprobs_of_one_token():
    equal(alone("--ids", "-p", "300", "-n", "1", "--echo", "--logprobs", "1")["prompt_logprobs"], [None])


# ------------------------------------------------------------------------------------------------ settings of a line

SETTINGS = (
    ({}, ()),
    ({"n": 3}, ("-n", "3")),
    ({"n": 25, "temp": 0.9, "seed": 11}, ("-n", "25", "--temp", "0.9", "-s", "11")),
    ({"temp": 1.5, "top_k": 40, "seed": 18446744073709551615, "logprobs": 2},
     ("--temp", "1.5", "--top-k", "40", "-s", "18446744073709551615", "--logprobs", "2")),
    ({"temp": 0.8, "top_p": 0.7, "seed": 0}, ("--temp", "0.8", "--top-p", "0.7", "-s", "0")),
    ({"temp": 1, "min_p": 0.05, "seed": 5, "n": 1}, ("--temp", "1", "--min-p", "0.05", "-s", "5", "-n", "1")),
    ({"repetition_penalty": 1.3, "n": 40, "logprobs": 5}, ("--repetition-penalty", "1.3", "-n", "40", "--logprobs", "5")),
    ({"stop": " the"}, ("--stop", " the")),
    ({"n": 0}, ("-n", "0")),
    ({"n": -1}, ("-n", "-1")),
    ({"stop": ["\u00e9", ",", "."], "temp": 7e-1, "seed": 2, "n": 50},
     ("--stop", "\u00e9", "--stop", ",", "--stop", ".", "--temp", "0.7", "-s", "2", "-n", "50")),
    ({"temp": 0.7, "seed": 3, "repetition_penalty": 1.2}, ("--temp", "0.7", "-s", "3", "--repetition-penalty", "1.2")),
)
TEXTS = ("Once upon a time", "The king", "In the morning, when the sun rose over the hills,", "x", "\n\n")


def test_lines_of_all_kinds_give_what_each_gives_alone():
    lines = [dict(settings, text=TEXTS[i % len(TEXTS)]) for i, (settings, _) in enumerate(SETTINGS)]
    context = ("-c", "100")                 # which the answer without a limit fills
    expected = [alone("-p", line["text"], "-n", "20", *context, *flags) for line, (_, flags) in zip(lines, SETTINGS)]
    equal(max(len(each["prompt_ids"]) + len(each["ids"]) for each in expected), 100)
    for batch in ("1", "2", "4", "64"):
        found, _ = answers(lines, "-n", "20", *context, "-b", batch, "--quiet")
        for i, (one, other) in enumerate(zip(found, expected)):
            check_same(one, other, "-b %s, line %d" % (batch, i + 1))
            assert ("logprobs" in one) == ("logprobs" in other)


def test_settings_are_over_the_command_lines():
    flags = ("-n", "9", "--temp", "1", "--top-k", "30", "-s", "4", "--stop", "a", "--logprobs", "1",
             "--repetition-penalty", "1.4")
    found, _ = answers([{"text": "The king"},
                        {"text": "The king", "temp": 0, "stop": [], "n": 12, "repetition_penalty": 1, "logprobs": 3}],
                       *flags, "--quiet")
    check_same(found[0], alone("-p", "The king", *flags), "without keys")
    check_same(found[1], alone("-p", "The king", "-n", "12", "--logprobs", "3"), "with keys")


def test_lines_without_a_seed_have_streams_of_their_own():
    flags = ("-n", "12", "--temp", "1", "-s", "4", "--quiet")
    found, _ = answers([{"text": "The king"}, {"text": "The king"}, {"text": "The king", "seed": 4}], *flags)
    assert found[0]["ids"] != found[1]["ids"]
    equal(found[2]["ids"], found[0]["ids"])
    # An error before does not move the others' streams.
    moved, _ = answers(["{", {"text": "The king"}], *flags, status=1)
    equal(moved[1]["ids"], found[1]["ids"])


def test_context_is_what_the_lines_need():
    """A line that needs more than the command line's -n has it, and each its own n."""
    found, err = answers([{"text": "The king", "n": 600}, {"text": "x", "n": 1}, {"text": "x"}], "-n", "2", "--ignore-eos")
    equal([len(each["ids"]) for each in found], [600, 1, 2])
    assert "leaves room" not in err, err
    found, err = answers([{"ids": [300] * 30, "n": 50}, {"ids": [300]}], "-n", "2", "-c", "40", "--ignore-eos")
    equal([len(each["ids"]) for each in found], [10, 2])
    assert "the context of 40 leaves room for fewer new tokens than asked for after 1 of 2 prompts" in err, err


# ------------------------------------------------------------------------------------------------------- other keys

def test_other_keys_come_back_byte_for_byte():
    others = ('"id": 7', '"\\u0069d2": 1.50E+3', '"nested"  :  {"a" : [1,2 , {"b": null}], "a": "\\ud800\\u0000\\/"}',
              '"e": ""', '"": [ ]', '"text2":"\u00e9\\u00e9\U0001F600"', '"deep":' + "[" * 64 + "]" * 64, '"big": ' + "9" * 400)
    written = [part.split(":", 1) for part in others]
    expected = "".join(", %s: %s" % (key.strip(), value.strip()) for key, value in written) + "}\n"
    for at in (0, 3, len(others)):          # wherever the text is among them
        parts = others[:at] + ('"text": "x"',) + others[at:]
        out, _ = run("--prompts", write_lines(["{" + " , ".join(parts) + " }"]), "-n", "1", "--quiet")
        assert out.endswith('"p95_ms": 0.0000, "shared_tokens": 0, "evictions": 0}' + expected), out[-900:]
        out, _ = run("--tokenize", "--json", "--prompts", write_lines(["{" + ",".join(parts) + "}"]), "--quiet")
        assert out.startswith('{"ids": [') and out.endswith("]" + expected), out


def test_notes_of_other_keys():
    lines = [{"text": "x", "temprature": 1, "id": 1}, {"text": "x", "id": 2, "topk": 3, "prompt": "y"},
             {"id": 1, "text": "x", "max_tokens": 5, "temprature": 2, "repetition_penaltyy": 1}]
    path = write_lines(lines)
    err = run("--prompts", path, "-n", "1")[1]
    notes = [line for line in err.splitlines() if "unknown key" in line]
    near = {"temprature": "temp", "id": None, "topk": "top_k", "prompt": "text", "max_tokens": "n",
            "repetition_penaltyy": "repetition_penalty"}
    equal(sorted(notes), sorted('llama: %s:%d: unknown key "%s", which comes back with the answer%s' %
                                (path, 1 + next(i for i, line in enumerate(lines) if name in line), name,
                                 '; the nearest known one is "%s"' % known if known else "")
                                for name, known in near.items()))
    equal(run("--prompts", path, "-n", "1", "--quiet")[1], "")
    err = run("--prompts", write_lines([{"text": "x", "key%d" % i: 0} for i in range(60)]), "-n", "1", "-b", "64")[1]
    equal(err.count("unknown key"), 32)
    assert '"key31", which comes back with the answer; of further ones there is no note' in err, err


# ----------------------------------------------------------------------------------------------------------- errors

BAD_LINES = (
    ("nonsense", "bad JSON at byte 0: expected '{'", {}),
    ("[1]", "bad JSON at byte 0: expected '{'", {}),
    ('{"id": 1, "text": "a"', "bad JSON at byte 21: expected '}'", {"id": 1}),
    ('{"id": 1, text: "a"}', "bad JSON at byte 10: expected a string", {"id": 1}),
    ('{"id": 1, "id2": tru}', "bad JSON at byte 17: expected a value", {"id": 1}),
    ('{"text": "a"} {}', "bad JSON at byte 14: expected the end", {}),
    ('{"id": 01}', "bad JSON at byte 9: expected a number without leading zeros", {}),
    ('{"id": "\\x"}', "bad JSON at byte 9: expected an escape", {}),
    ('{"a": ' + "[" * 65 + "]" * 65 + "}", "expected fewer lists and objects in one another", {}),
    ("{}", 'no "text", "ids" or "messages"', {}),
    ('{"prompt": "a"}', 'no "text", "ids" or "messages"', {"prompt": "a"}),
    ('{"text": "a", "ids": [1], "id": [2]}', '"text" and "ids": expected one of them', {"id": [2]}),
    ('{"text": "a", "text": "b", "id": 3}', 'a second key "text"', {"id": 3}),
    ('{"text": "a", "n": 1, "n": 1}', 'a second key "n"', {}),
    ('{"text": "a", "id": 1, "\\u0069d": 2, "z": 3}', 'a second key "id"', {"id": 1, "z": 3}),
    ('{"text": 1, "id": 4}', "expected a string", {"id": 4}),
    ('{"ids": [1, 8192], "id": 5}', "id 8192, expected below 8192", {"id": 5}),
    ('{"ids": [1, -1]}', "expected a whole number", {}),
    ('{"ids": []}', "the prompt is empty, and ids get no BOS", {}),
    ('{"messages": []}', "messages: this model has no chat format", {}),
    ('{"text": "a", "temp": -0.5}', '"temp" -0.5: expected a number from 0 to 1e+06', {}),
    ('{"text": "a", "temp": "1"}', '"temp" "1": expected a number from 0 to 1e+06', {}),
    ('{"text": "a", "temp": null}', '"temp" null: expected a number from 0 to 1e+06', {}),
    ('{"text": "a", "top_p": 1.01}', '"top_p" 1.01: expected a number from 0 to 1', {}),
    ('{"text": "a", "min_p": 2}', '"min_p" 2: expected a number from 0 to 1', {}),
    ('{"text": "a", "top_k": 1.5}', '"top_k" 1.5: expected a whole number', {}),
    ('{"text": "a", "n": 3e0}', '"n" 3e0: expected a whole number', {}),
    ('{"text": "a", "n": 2147483648}', '"n" 2147483648: expected a whole number', {}),
    ('{"text": "a", "n": -2}', '"n" -2: expected a whole number from -1', {}),
    ('{"text": "a", "seed": -1}', '"seed" -1: expected a whole number from 0 to 2^64-1', {}),
    ('{"text": "a", "seed": 18446744073709551616}', "expected a whole number from 0 to 2^64-1", {}),
    ('{"text": "a", "logprobs": 65}', '"logprobs" 65: expected a whole number from 1 to 64', {}),
    ('{"text": "a", "repetition_penalty": 0}', '"repetition_penalty" 0: expected a number from', {}),
    ('{"text": "a", "temp": 0.%s}' % ("0" * 70), '"temp" has 72 bytes, expected a number', {}),
    ('{"text": "a", "stop": ""}', '"stop": expected a text that is not empty', {}),
    ('{"text": "a", "stop": ["b", 1]}', "expected a string", {}),
    ('{"text": "a", "stop": %s}' % json.dumps(["s"] * 17), '"stop": more than 16 of them', {}),
    *(('{"text": "a", "%s": 1, "id": 6}' % name, 'the key "%s" is one of the answers\' own' % name, {"id": 6})
      for name in ("index", "prompt_ids", "finish_reason", "timings", "error", "line", "token_texts", "prompt_logprobs",
                   "speculation")),
    ("{%s}" % ", ".join('"k%d": 0' % i for i in range(257)), "more than 256 keys", {"k%d" % i: 0 for i in range(256)}),
)


def test_bad_lines_have_their_error():
    good = {"text": "The king", "id": "good"}
    found, err = answers([line for bad, _, _ in BAD_LINES for line in (bad, good)], "-n", "2", "-b", "64", status=1)
    expected = alone("-p", "The king", "-n", "2")
    for i, (bad, fragment, own) in enumerate(BAD_LINES):
        answer = found[2 * i]
        assert fragment in answer["error"], "%s: error %r, expected %r" % (bad[:80], answer["error"], fragment)
        equal(answer, {"index": 2 * i, "line": 2 * i + 1, "error": answer["error"], **own})
        check_same(found[2 * i + 1], expected, "after " + bad[:80])
        equal(found[2 * i + 1]["id"], "good")
    reported = [line for line in err.splitlines() if "prompts:" in line and "unknown key" not in line]
    equal(len(reported), 11)                    # ten lines, then how many there are
    for i, line in enumerate(reported[:-1]):
        equal(line, "llama: %s/prompts:%d: %s" % (work.name, 2 * i + 1, found[2 * i]["error"]))
    assert reported[-1].endswith("prompts: %d of %d lines have an error and no answer" % (len(BAD_LINES), 2 * len(BAD_LINES)))
    assert err.splitlines()[-1] == reported[-1], err


def test_prompts_too_long_are_lines_with_an_error():
    found, _ = answers([{"ids": [300] * 40}, {"ids": [300] * 39}, {"ids": [300] * 5, "n": 3}], "-c", "40", "-n", "8",
                       "--quiet", "--ignore-eos", status=1)
    equal(found[0]["error"], "the prompt has 40 tokens, the context holds 40 and needs room for one more (-c)")
    equal([len(each["ids"]) for each in found[1:]], [1, 3])
    found, _ = answers([{"text": "word " * 60000, "id": 1}, {"ids": [300] * 2048}, {"text": "x"}], "-n", "2", "--quiet",
                       status=1)
    assert "the prompt of 300000 bytes has at least" in found[0]["error"] and found[0]["id"] == 1, found[0]
    equal(found[1]["error"], "the prompt has 2048 tokens, the context holds 2048 and needs room for one more")
    equal(len(found[2]["ids"]), 2)


def test_interrupt_beside_lines_with_an_error():
    """An interrupt is the run's end, whatever lines there are: those that it has printed, and status 130."""
    lines = [{"text": "x", "n": 1}, "nonsense", *({"text": "The king", "n": 1500} for _ in range(20)), "nonsense"]
    command = [LLAMA, MODEL, "--engine", "cpu", "--prompts", write_lines(lines), "-b", "1", "--ignore-eos", "-s", "1",
               "--temp", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    equal(process.returncode, 130)
    found = [json.loads(line) for line in (first + out).splitlines()]
    reasons = [answer.get("finish_reason", "error") for answer in found]
    assert reasons in (["length", "error", "interrupted"], ["length"]), reasons     # the latter: the third had not begun
    assert b"lines have an error" not in err and b":2: bad JSON" in err and b":23: bad JSON" in err, err


def test_messages_name_standard_input():
    err = run("--prompts", "-", "-n", "1", status=1, stdin='{"text": "x", "id": 1}\nnonsense\n')[1]
    for part in ('standard input:1: unknown key "id"', "standard input:2: bad JSON", "standard input: 1 of 2 lines have"):
        assert "llama: " + part in err, err
    equal(run("--prompts", "-", status=1, stdin="\n")[1], "llama: standard input: no prompts\n")
    equal(run("--perplexity", "-", status=1, stdin="")[1], "llama: standard input: 1 tokens, expected at least 2\n")


def test_nothing_is_loaded_where_no_line_is_right():
    found, err = answers(["{", {"id": 1}], "--verbose", status=1)
    equal([sorted(each) for each in found], [["error", "index", "line"], ["error", "id", "index", "line"]])
    assert "engine" not in err and err.endswith("prompts: 2 of 2 lines have an error and no answer\n"), err


def test_messages_without_a_template():
    """What keeps the template from a line keeps it from those after it, and no note speaks of a template."""
    line = {"messages": [{"role": "user", "content": "Hi"}]}
    found, err = answers([line, {"text": "x"}, line, line], "-n", "1", status=1)
    for i in (0, 2, 3):
        assert "has no chat format" in found[i].get("error", ""), found[i]
    assert "ids" in found[1] and "was not compared" not in err, err
    model = os.path.join(work.name, "chat.bin")
    subprocess.run([sys.executable, "scripts/convert.py", chat_checkpoint(), model, "--chat-format", "llama3"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = run("--prompts", write_lines([line] * 3), "--date", "today", model=model, status=1)[0]
    equal(["expected llama3.1" in json.loads(answer)["error"] for answer in out.splitlines()], [True] * 3)


def test_tokenize_of_bad_lines():
    path = write_lines([{"ids": [1, 2]}, '{"id": 9', {"ids": [3]}])
    out, err = run("--tokenize", "--prompts", path, "--quiet", status=1)
    equal(out, "1 2\n\n3\n")
    equal(len(err.splitlines()), 2)
    out, _ = run("--tokenize", "--json", "--prompts", path, "--quiet", status=1)
    equal([json.loads(line) for line in out.splitlines()],
          [{"ids": [1, 2]}, {"index": 1, "line": 2, "error": "bad JSON at byte 8: expected '}'", "id": 9}, {"ids": [3]}])


# ------------------------------------------------------------------------------------------------- answers and hints

def test_token_texts():
    found = alone("-p", "Once upon a time", "-n", "40", "--ignore-eos")
    equal(len(found["token_texts"]), len(found["ids"]))
    equal("".join(found["token_texts"]), found["text"])
    assert len(set(found["token_texts"])) > 5
    line, = answers([{"text": "Once upon a time"}], "-n", "40", "--ignore-eos", "--quiet")[0]
    equal(line["token_texts"], found["token_texts"])


def test_ids_take_the_list_that_json_printed():
    found = alone("-p", "The king", "-n", "5")
    for written in (json.dumps(found["prompt_ids"]), " [%s]\n" % ",".join(map(str, found["prompt_ids"])),
                    " ".join(map(str, found["prompt_ids"]))):
        equal(alone("--ids", "-p", written, "-n", "5")["ids"], found["ids"])
    assert json.loads(run("--detokenize", "--json", "-p", json.dumps(found["ids"]))[0])["text"] == found["text"]
    for bad in ("[1, 2", "1, 2]", "[[1]]", "[1] 2"):
        err = run("--ids", "-p", bad, status=1)[1]
        assert "expected whole numbers below 8192" in err, err


def test_hint_about_special_tokens():
    eot, hint = "<|end_of_text|>", "is ordinary characters; with --special it is the special token"
    prompts = write_lines([{"text": "a"}, {"text": "b" + eot}, {"text": eot}])
    for flags in (("-p", "x%sy<|begin_of_text|>" % eot, "-n", "1"), ("--tokenize", "-p", eot),
                  ("--prompts", prompts, "-n", "1"), ("--tokenize", "--prompts", prompts)):
        err = run(*flags)[1]
        equal(err.count(hint), 1)
        assert "llama: %s in the prompt %s\n" % (eot, hint) in err, err
        equal(run(*flags, "--quiet")[1], "")
        assert hint not in run(*flags, "--special")[1]
    assert hint not in run("-p", "<|end_of_text", "-n", "1")[1]


def test_hint_about_special_tokens_in_a_message():
    model = os.path.join(work.name, "chat.bin")
    subprocess.run([sys.executable, "scripts/convert.py", chat_checkpoint(), model], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    hint = "llama: <|eot_id|> in the message is ordinary characters; special tokens in a conversation are the template's\n"
    prompts = write_lines([{"messages": [{"role": "user", "content": "a <|eot_id|>"}]}] * 2)
    for flags, stdin in ((("--chat", "-p", "a <|eot_id|>", "-n", "2"), ""), (("--prompts", prompts, "-n", "2"), ""),
                         (("--prompts", prompts, "-n", "2", "--special"), ""),
                         (("--chat", "-p", "a", "-n", "2", "--system", "<|eot_id|>"), ""),
                         (("--chat", "-n", "2"), "a <|eot_id|>\nb <|eot_id|>\n"),
                         (("--chat", "--tokenize", "-p", "a <|eot_id|>"), "")):
        equal(run(*flags, model=model, stdin=stdin)[1].count(hint), 1)
        assert hint not in run(*flags, "--quiet", model=model, stdin=stdin)[1]


def main():
    for name, test in list(globals().items()):
        if not name.startswith("test_") or not wanted(name):
            continue
        verdict, why = "ok", ""
        try:
            test()
        except Skip as reason:
            verdict, why = "SKIP", ": %s" % reason
        except Exception as failure:        # of any kind: the others run
            text = "%s: %s" % (type(failure).__name__, failure)
            verdict, why = "FAIL", ": " + text.replace("\n", " ")[:600]
        counts[verdict] += 1
        print(verdict, name + why, flush=True)
    work.cleanup()
    print("%d passed, %d failed, %d skipped" % (counts["ok"], counts["FAIL"], counts["SKIP"]))
    return counts["FAIL"] > 0


if __name__ == "__main__":
    sys.exit(main())
