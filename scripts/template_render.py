"""What a chat template writes for a conversation: by template_reader, and by jinja2 in a child process.

Both give the same texts; what render_here cannot read it says.

Reading order: rendering here, jinja2 in a child process.
"""
import importlib.util
import json
import subprocess
import sys

from template_reader import Template
from template_values import MAX_TEMPLATE, TemplateError, Unreadable, tojson

RENDER_SECONDS = 5
RENDER_BYTES = 512 << 20


def today_mark(form):
    """What strftime_now gives here: the date is not known when a file is converted."""
    return "\ue000%s\ue000" % form


MARK = today_mark("%d %b %Y")


def raise_exception(message):
    raise TemplateError(str(message))


def render_here(source, names, conversations):
    """The text of each conversation, or the exception that came of it."""
    results = []
    try:
        template = Template(source)
    except (Unreadable, RecursionError) as error:
        return [Unreadable(str(error) if isinstance(error, Unreadable) else "deep nesting")] * len(conversations)
    for messages in conversations:
        try:
            results.append(template.render(dict(
                names, messages=messages, tools=None, documents=None, add_generation_prompt=True,
                raise_exception=raise_exception, strftime_now=today_mark)))
        except (Unreadable, TemplateError) as error:
            results.append(error)
        except RecursionError:
            results.append(Unreadable("deep nesting"))
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            results.append(TemplateError(str(error)))
    return results


# ----------------------------------------------------------------------------------------- jinja2, in a child process

def jinja2_there():
    return importlib.util.find_spec("jinja2") is not None


def render_jinja2(source, names, conversations):
    """The same by jinja2, in a process of its own."""
    question = json.dumps({"source": source, "names": names, "conversations": conversations})
    try:
        child = subprocess.run([sys.executable, __file__, "--render"], input=question.encode(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, timeout=RENDER_SECONDS, check=False)
        answers = json.loads(child.stdout) if child.returncode == 0 else None
    except subprocess.TimeoutExpired:
        return [TemplateError("it takes more than %d seconds" % RENDER_SECONDS)] * len(conversations)
    except ValueError:
        answers = None
    if answers is None:
        return [TemplateError("it takes more than %d seconds or %d MB, or ends the process"
                              % (RENDER_SECONDS, RENDER_BYTES >> 20))] * len(conversations)
    return [answer["text"] if "text" in answer else TemplateError(answer["error"]) for answer in answers]


def child_main():
    """Answers render_jinja2 on standard input and output."""
    import resource
    from jinja2 import TemplateError as JinjaError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message):
        raise JinjaError(message)

    question = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_AS, (RENDER_BYTES, RENDER_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (RENDER_SECONDS, RENDER_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=refuse, strftime_now=today_mark)
    answers = []
    for messages in question["conversations"]:
        try:
            text = environment.from_string(question["source"]).render(
                **dict(question["names"], messages=messages, tools=None, documents=None, add_generation_prompt=True))
            answers.append({"text": text} if len(text) <= MAX_TEMPLATE else
                           {"error": "it writes more than %d characters" % MAX_TEMPLATE})
        except Exception as error:              # a template may raise anything; MemoryError among it
            answers.append({"error": str(error)[:500] or type(error).__name__})
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    if sys.argv[1:] == ["--render"]:
        child_main()
    else:
        print(__doc__)
