"""What a checkpoint's chat template writes, as parameters of the formats that the program has built in.

A chat template is a program in Jinja. The program runs none: convert.py renders a few plain conversations
(template_render.py), finds the format and the parameters that write the same text, and says so where something
differs. Where jinja2 is importable its rendering counts.

Reading order: the program's formats, deriving, a checkpoint's template.
"""
import json
import os

from checked_json import Section, read_file
from refusal import foreign_file, note, refuse
from template_render import MARK, jinja2_there, render_here, render_jinja2
from template_values import Unreadable

# The day that LLaMA 3.1's template says it is, unless another is given.
DATE = "26 Jul 2024"
TODAY = "today"                         # chat_date: the day of the conversation, as strftime("%d %b %Y") in English
MAX_SYSTEM = 64 << 10                   # bytes of chat_system


# ---------------------------------------------------------------------------------------------- the program's formats

# The tokens that each format writes; all must be in the vocabulary, but for <think>, which else is text.
TOKENS = {"llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
          "chatml": ("<|im_start|>", "<|im_end|>"),
          "deepseek": ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")}
TOKENS["llama3.1"] = TOKENS["llama3"]
FORMATS = ("llama3", "llama3.1", "chatml", "deepseek")
THINK = "<think>"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: %s\n\n"


class Chat:
    """A format with its parameters. bos: the text of the token that comes first, "" for none. system: the template's
    own system message, None for none. date: a text, or TODAY; for llama3.1 alone."""

    def __init__(self, form, bos="", system=None, date=DATE):
        self.format, self.bos, self.system, self.date = form, bos, system, date


def render(chat, messages, today):
    """What the program writes before its answer: a list of (kind, text), where kind is `token` (one of the format's, or
    BOS), `own` (the template's text: tokens in it are matched, special ones as well) or `text` (a message's: special
    tokens and those that the format writes are characters in it). What stands between two tokens is one text to the
    tokenizer; <think> is text in a vocabulary that has no such token. The last message is the user's."""
    parts = [("token", chat.bos)] if chat.bos else []
    system = None
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if chat.format in ("llama3", "llama3.1"):
        start, end, eot = TOKENS[chat.format]

        def add(role, *body):
            parts.extend([("token", start), ("own", role), ("token", end), ("own", "\n\n"), *body, ("token", eot)])
        dates = []
        if chat.format == "llama3.1":
            dates = [("own", DATES % (today if chat.date == TODAY else chat.date))]
        if system is not None:
            add("system", *dates, ("text", system.strip()))
        elif dates or chat.system is not None:
            add("system", *dates, ("own", chat.system or ""))
        for message in messages:
            add(message["role"], ("text", message["content"].strip()))
        parts += [("token", start), ("own", "assistant"), ("token", end), ("own", "\n\n")]
    elif chat.format == "chatml":
        start, end = TOKENS["chatml"]

        def add(role, body):
            parts.extend([("token", start), ("own", role + "\n"), body, ("token", end), ("own", "\n")])
        if system is not None:
            add("system", ("text", system))
        elif chat.system is not None:
            add("system", ("own", chat.system))
        for message in messages:
            add(message["role"], ("text", message["content"]))
        parts += [("token", start), ("own", "assistant\n")]
    else:
        user, assistant, end = TOKENS["deepseek"]
        parts.append(("own", chat.system or "") if system is None else ("text", system))
        for message in messages:
            if message["role"] == "user":
                parts += [("token", user), ("text", message["content"])]
            else:
                parts += [("token", assistant), ("text", message["content"].split("</think>")[-1]), ("token", end)]
        parts += [("token", assistant), ("token", THINK), ("own", "\n")]
    return parts


def render_text(chat, messages, today=MARK):
    return "".join(text for _, text in render(chat, messages, today))


# ------------------------------------------------------------------------------------------------------------ deriving

def conversation(*contents):
    """Messages from texts: the system's first if there is an even number of them, then user and assistant in turn."""
    roles = ["system"] * (len(contents) % 2 == 0) + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


# A format is used if it writes the template's text in the first of these, or in the two after it (a template may do as
# it likes with a system message). Every other difference is told in a note.
PROBES = (("with a system message", conversation("You are terse.", "Hi", "Hello there.", "How are you?")),
          ("without a system message", conversation("Hi")),
          ("of three turns", conversation("Hi", "Hello there.", "How are you?", "Fine.", "Good.")),
          ("with white space around messages",
           conversation("\n You are terse. \n", " Hi\n", "\n\n Hello. ", "\tBye \n")),
          ("with thoughts in an answer", conversation("Hi", "<think>\nA greeting.\n</think>\n\nHello.", "Bye")))


def leading_token(text, tokens):
    """The longest of these with which the text begins, or ""."""
    return max((token for token in tokens if text.startswith(token)), key=len, default="")


def candidates(form, texts, tokens):
    """Parameters of this format that could explain the text without a system message, or the one with it."""
    for text, given in ((texts[1], False), (texts[0], True)):
        if not isinstance(text, str):
            continue
        first = leading_token(text, tokens)
        yield Chat(form, "" if first in TOKENS[form] else first)
        bos = "" if first in TOKENS[form] else first
        rest = text[len(bos):]
        if form in ("llama3", "llama3.1"):
            start, end, eot = TOKENS[form]
            head, tail = start + "system" + end + "\n\n", eot + start + "user" + end
        elif form == "chatml":
            start, end = TOKENS[form]
            head, tail = start + "system\n", end + "\n" + start + "user\n"
        else:
            head, tail = "", TOKENS[form][0]
        system = rest[len(head):rest.find(tail)] if rest.startswith(head) and tail in rest else None
        date = DATE
        if form == "llama3.1":
            before, _, after = DATES.partition("%s")
            if system is None or not system.startswith(before) or after not in system[len(before):]:
                continue
            date, _, system = system[len(before):].partition(after)
            date = TODAY if date == MARK else date
        if given or (form in ("llama3.1", "deepseek") and not system):
            system = None
        sound = (system or "") + (date if date != TODAY else "")
        if "\0" in sound or MARK[0] in sound or "\n" in date or not is_text(sound, MAX_SYSTEM):
            continue                            # cannot be written as metadata, or is another on another day
        yield Chat(form, bos, system, date)


def is_text(text, most):
    """Whether it can be written as UTF-8 in so many bytes."""
    try:
        return len(text.encode("utf-8")) <= most
    except UnicodeEncodeError:
        return False


def quoted(text, most=60):
    text = json.dumps(text.replace(MARK, "(today)"), ensure_ascii=False)
    return text if len(text) <= most else text[:most - 3] + "..."


def difference(theirs, ours):
    """Where two texts part, as a clause."""
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
    at = max(0, at - 12)
    return "it writes %s where the program writes %s" % (quoted(theirs[at:at + 200]), quoted(ours[at:at + 200]))


class Derived:
    """chat: a Chat, or None where no format fits. notes: what a user should know."""

    def __init__(self, chat, notes):
        self.chat, self.notes = chat, notes


def derive(source, names, tokens, wanted=None):
    """The format and its parameters from a template's text.

    names: the variables that a template sees (bos_token and so on). tokens: the texts of the vocabulary's special and
    added tokens. wanted: a format to use whatever the template writes."""
    conversations = [messages for _, messages in PROBES]
    texts = (render_jinja2 if jinja2_there() else render_here)(source, names, conversations)
    if not any(isinstance(text, str) for text in texts[:2]):
        unread = isinstance(texts[0], Unreadable)
        why = "it cannot be read without jinja2" if unread else "it fails on a plain conversation"
        return Derived(Chat(wanted, first_bos(names, tokens)) if wanted else None, [
            "the chat template %s: %s: %s%s" % (
                "was not checked" if wanted else "is not used", why, " ".join(str(texts[0]).split())[:200],
                "; pip install jinja2, or give --chat-format" if unread and not wanted else "")])
    plain = 0 if isinstance(texts[0], str) else 1
    best, best_score = None, None
    for form in [wanted] if wanted else FORMATS:
        for chat in candidates(form, texts, tokens):
            same = [text == render_text(chat, messages) for text, messages in zip(texts, conversations)]
            score = (same[0] or same[1] and same[2], sum(same),
                     likeness(texts[plain], render_text(chat, conversations[plain])))
            if best_score is None or score > best_score:
                best, best_score = chat, score
    missing = [token for token in TOKENS[best.format] if token not in tokens]
    notes = []
    if not best_score[0]:
        notes.append("the chat template is not %s: in a plain conversation %s" % (
            wanted + "'s" if wanted else "one of %s and is not used" % ", ".join(FORMATS),
            difference(texts[plain], render_text(best, conversations[plain]))))
    elif missing:
        notes.append("the chat template is not used: the vocabulary has no %s" % missing[0])
    if notes and not wanted:
        return Derived(None, notes)
    for (name, messages), text in zip(PROBES, texts):
        ours = render_text(best, messages)
        if text != ours and not notes:
            notes.append("the chat template differs from format %s in a conversation %s: %s" % (
                best.format, name, difference(text, ours) if isinstance(text, str) else "it fails: %s" % text))
    return Derived(best, notes)


def likeness(theirs, ours):
    """How many characters two texts share at both ends."""
    return sum(len(os.path.commonprefix(pair)) for pair in ((theirs, ours), (theirs[::-1], ours[::-1])))


def first_bos(names, tokens):
    bos = names.get("bos_token", "")
    return bos if bos in tokens else ""


# ---------------------------------------------------------------------------------------------- a checkpoint's template

def read_chat_template(directory):
    """The text of the checkpoint's template, or None."""
    template = Section.load(directory, "tokenizer_config.json", needed=False).get("chat_template")
    if isinstance(template, list):              # several, by name
        template = next((each.get("template") for each in template
                         if isinstance(each, dict) and each.get("name") == "default"), None)
    template = Section.load(directory, "chat_template.json", needed=False).get("chat_template", template)
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        data = read_file(path)
        found = foreign_file(data[:64].lstrip())
        if found:
            refuse(path, "format", "a chat template", found)
        template = data.decode("utf-8", "replace")
    return template if isinstance(template, str) else None


def template_names(directory):
    """The special tokens that a template sees, by name: tokenizer_config.json's, else special_tokens_map.json's."""
    names = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in Section.load(directory, name, needed=False).values.items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                names[key] = value
    return names


def chat_metadata(directory, vocabulary, wanted=None):
    """chat_format and its parameters. wanted: --chat-format's."""
    source, names, ids = read_chat_template(directory), template_names(directory), vocabulary.named()
    if wanted == "none" or (source is None and not wanted):
        return {"chat_format": "none"}
    if source is None:
        chat = Chat(wanted, first_bos(names, ids))
    else:
        derived = derive(source, names, ids, wanted)
        for each in derived.notes:
            note(each)
        chat = derived.chat
    if chat is None:
        return {"chat_format": "none"}
    for token in TOKENS[chat.format]:
        if token not in ids:
            refuse("--chat-format %s" % chat.format, "the vocabulary has no %s" % token)
    result = {"chat_format": chat.format}
    if chat.system is not None:
        result["chat_system"] = chat.system
    if chat.date != DATE:
        result["chat_date"] = chat.date
    bos = ids[chat.bos] if chat.bos else None
    if bos != vocabulary.bos:
        result["chat_bos_id"] = "" if bos is None else str(bos)
    return result


if __name__ == "__main__":
    print(__doc__)
