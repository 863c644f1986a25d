#!/usr/bin/env bash
# datasets 5.2.0: after Dataset.from_list every message has tool_calls, and each call the arguments of all other functions.
#
# Good guess: a conversation comes out of a data set as it went in, however it went in; or in every way with the same additions.
# What it does: from_list and from_dict make a table of the messages: each has the keys of all, with None, and the arguments of a call have
# those of every function in the data. A chat template that asks whether `tool_calls` is in a message, as LLaMA 3.1's does, finds it in
# each, and fails or writes a call; where it does not fail, arguments are written that nobody gave. Removing what is None with map does not
# help, as the table keeps its columns. load_dataset of the same lines in a JSON file, and from_generator, keep the messages as they are.
# Two conversations, in each a call, of weather(city) and time(zone); the first one's second message out of the data set:
#   load_dataset("json"), from_generator     role, tool_calls; arguments {"city": "Bonn"}
#   from_list, from_dict                     role, content, tool_calls; arguments {"city": "Bonn", "zone": null}
#   from_list, None removed by map           the same
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 jinja2==3.1.6 numpy==2.4.6
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY' 2> "$work/err" || { tail -n 5 "$work/err" >&2; exit 1; }
import json, os, sys
from datasets import Dataset, load_dataset
from jinja2 import Environment, UndefinedError

def conversation(question, function, arguments, answer):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": function, "arguments": arguments}}]},
                         {"role": "tool", "content": answer}]}

def without_none(value):
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value

template = Environment().from_string(
    "{% for message in messages %}"
    "{% if 'tool_calls' in message %}[calls {{ message.tool_calls[0].function.arguments | tojson }}]{% else %}[{{ message.content }}]{% endif %}"
    "{% endfor %}")
rows = [conversation("Weather in Bonn?", "weather", {"city": "Bonn"}, "sun"), conversation("What time is it?", "time", {"zone": "CET"}, "noon")]
cache, lines = os.path.join(sys.argv[1], "cache"), os.path.join(sys.argv[1], "rows.jsonl")
with open(lines, "w") as file:
    file.writelines(json.dumps(each) + "\n" for each in rows)
from_list = Dataset.from_list(rows)
data = {"load_dataset": load_dataset("json", data_files=lines, split="train", cache_dir=cache),
        "from_generator": Dataset.from_generator(lambda: iter(rows), cache_dir=cache),
        "from_list": from_list,
        "from_dict": Dataset.from_dict({"messages": [each["messages"] for each in rows]}),
        "from_list and map": from_list.map(without_none)}
found = {}
for name, each in data.items():
    messages = each[0]["messages"]
    try:
        text = template.render(messages=messages)
    except UndefinedError as error:
        text = type(error).__name__
    call = messages[1]["tool_calls"][0]["function"]["arguments"]
    found[name] = (messages == rows[0]["messages"], "tool_calls" in messages[0], call, text)
    print(name, *found[name])
right = (True, False, {"city": "Bonn"}, '[Weather in Bonn?][calls {"city": "Bonn"}][sun]')
wrong = (False, True, {"city": "Bonn", "zone": None}, "UndefinedError")
sys.exit(list(found.values()) != [right, right, wrong, wrong, wrong])
PY
