"""Reads chat templates: the part of the Jinja language that they use, without jinja2.

A template is untrusted code: every quantity here has a limit. What cannot be read is Unreadable.

Reading order: scopes and limits, tags, statements.
"""
import re

from template_expressions import CODE, Expressions
from template_values import MAX_STEPS, MAX_TEMPLATE, Fields, Stop, TemplateError, Undefined, Unreadable, bounded


# ---------------------------------------------------------------------------------------------------- scopes and limits

class Scope:
    """The names of a block; those around it are seen through it."""

    def __init__(self, outer=None, names=None):
        self.outer, self.names = outer, names or {}

    def get(self, name):
        scope = self
        while scope:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return Undefined(name)


class Run:
    """The limits of one rendering."""

    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Unreadable("more than %d steps" % MAX_STEPS)


class Output(list):
    def __init__(self):
        super().__init__()
        self.size = 0

    def write(self, text):
        self.size += len(text)
        if self.size > MAX_TEMPLATE:
            raise Unreadable("more than %d characters" % MAX_TEMPLATE)
        self.append(text)

    def text(self):
        return "".join(self)


# ----------------------------------------------------------------------------------------------------------------- tags

def split_tags(source):
    """("data", text), ("print", tokens) and ("block", tokens), trim_blocks and lstrip_blocks as in transformers."""
    source = re.sub(r"\r\n?", "\n", source)
    source = source[:-1] if source.endswith("\n") else source
    at, raw = 0, []
    for match in iter(lambda: re.compile(r"\{[{%#]").search(source, at), None):
        data, kind, inside = source[at:match.start()], match.group()[1], match.end()
        sign = source[inside:inside + 1]
        if sign == "-":
            data = data.rstrip()
        elif sign != "+" and kind != "{":
            line = data.rfind("\n") + 1
            if (line or at == 0 or source[at - 1] == "\n") and not data[line:].strip():
                data = data[:line]
        inside += sign in ("-", "+") and sign != ""
        raw.append(("data", data))
        if kind == "#":
            end = re.compile(r"\+#\}|-#\}\s*|#\}\n?").search(source, inside)
            if not end:
                raise Unreadable("a comment without an end")
            at = end.end()
            continue
        tokens, at = read_code(source, inside, kind)
        raw.append(("print" if kind == "{" else "block", tokens))
    raw.append(("data", source[at:]))
    return raw


def read_code(source, at, kind):
    """The tokens of a tag, and where it ends; its end is not looked for inside brackets."""
    end = re.compile(r"\s*(?:-\}\}\s*|\}\})" if kind == "{" else r"\s*(?:\+%\}|-%\}\s*|%\}\n?)")
    tokens, depth = [], 0
    while True:
        found = None if depth else end.match(source, at)
        if found:
            return tokens, found.end()
        match = CODE.match(source, at)
        if not match:
            raise Unreadable("%r" % source[at:at + 20])
        group, text = match.lastgroup, match.group(match.lastgroup)
        if group == "op":
            depth += (text in "([{") - (text in ")]}")
        elif group in ("int", "float"):
            text = int(text) if group == "int" else float(text)
        elif group == "string":
            try:
                text = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            except UnicodeDecodeError:
                raise Unreadable("the text %s" % text[:20]) from None
        tokens.append((group, text))
        at = match.end()


# ----------------------------------------------------------------------------------------------------------- statements

class Template:
    """A template, read; render(conversation, names) gives its text."""

    def __init__(self, source):
        bounded(source)
        self.run = Run()
        self.parts, self.at = split_tags(source), 0
        self.body = self.block(())
        if self.at < len(self.parts):
            raise Unreadable("%r" % (self.parts[self.at][1][0][1],))

    def render(self, names):
        self.run.steps = 0
        output = Output()
        self.body(Scope(names=dict(names, namespace=self.namespace, range=self.range, dict=dict)), output)
        return output.text()

    def namespace(self, **values):
        return Fields(**values)

    def range(self, *bounds):
        if len(range(*bounds)) > 10_000:
            raise Unreadable("a range of more than 10000")
        return list(range(*bounds))

    def block(self, ends):
        """What stands before one of these tags, as a function that writes it. The tag itself is left."""
        steps = []
        while self.at < len(self.parts):
            kind, value = self.parts[self.at]
            if kind == "block" and value and value[0] in [("name", name) for name in ends]:
                break
            self.at += 1
            if kind == "data":
                steps.append((lambda text: lambda scope, output: output.write(text))(value))
            elif kind == "print":
                reader = Expressions(value, self.run)
                expression = reader.expression()
                reader.end()
                steps.append((lambda each: lambda scope, output: output.write(str(each(scope))))(expression))
            else:
                steps.append(self.statement(Expressions(value, self.run)))

        def write(scope, output):
            for step in steps:
                self.run.step()
                step(scope, output)
        return write

    def tag(self):
        """The tag at which a block ended."""
        if self.at >= len(self.parts):
            raise Unreadable("a block without an end")
        self.at += 1
        reader = Expressions(self.parts[self.at - 1][1], self.run)
        return reader.next("name"), reader

    def statement(self, reader):
        name = reader.next("name")
        if name not in ("if", "for", "set", "macro", "filter", "generation", "break", "continue"):
            raise Unreadable("{%% %s %%}" % name)
        return getattr(self, name + "_statement")(reader)

    def if_statement(self, reader):
        branches, otherwise, name = [], None, "if"
        while name != "endif":
            condition = reader.expression() if name in ("if", "elif") else None
            reader.end()
            body = self.block(("elif", "else", "endif"))
            if condition:
                branches.append((condition, body))
            else:
                otherwise = body
            name, reader = self.tag()

        def write(scope, output):
            for condition, body in branches:
                if condition(scope):
                    return body(scope, output)
            return otherwise(scope, output) if otherwise else None
        return write

    def for_statement(self, reader):
        names = self.targets(reader)
        reader.expect("in")
        values = reader.either()                # `if` after it is the loop's
        condition = reader.expression() if reader.take("if") else None
        reader.end()
        body, otherwise = self.block(("else", "endfor")), None
        if self.tag()[0] == "else":
            otherwise = self.block(("endfor",))
            self.tag()

        def write(scope, output):
            found = values(scope)
            if found is None or isinstance(found, (bool, int, float)):
                raise TemplateError("%r is not iterable" % (found,))
            found = list(found)
            if condition:
                found = [each for each in found if condition(self.bind(Scope(scope), names, each))]
            if not found and otherwise:
                return otherwise(scope, output)
            for i, each in enumerate(found):
                inner = self.bind(Scope(scope), names, each)
                inner.names["loop"] = Fields(
                    index=i + 1, index0=i, first=i == 0, last=i == len(found) - 1, length=len(found),
                    revindex=len(found) - i, revindex0=len(found) - i - 1,
                    previtem=found[i - 1] if i else Undefined("previtem"),
                    nextitem=found[i + 1] if i + 1 < len(found) else Undefined("nextitem"))
                try:
                    body(inner, output)
                except Stop as stop:
                    if stop.args[0] == "break":
                        break
            return None
        return write

    def targets(self, reader):
        names = [reader.next("name")]
        while reader.take(","):
            names.append(reader.next("name"))
        return names

    def bind(self, scope, names, value):
        values = [value] if len(names) == 1 else list(value)
        if len(values) != len(names):
            raise TemplateError("%d values for %d names" % (len(values), len(names)))
        scope.names.update(zip(names, values))
        return scope

    def set_statement(self, reader):
        names = self.targets(reader)
        field = reader.next("name") if reader.take(".") else None
        if reader.take("="):
            value = reader.expression()
            if reader.take(","):
                raise Unreadable("several values in {% set %}")
            reader.end()
        else:                                   # {% set name %}...{% endset %}
            wrap = reader.filtered(lambda scope: scope.get("set"))
            reader.end()
            body = self.block(("endset",))
            self.tag()

            def value(scope):
                inside = Output()
                body(Scope(scope), inside)
                return wrap(Scope(scope, {"set": inside.text()}))

        def write(scope, output):
            found = value(scope)
            if field is None:
                self.bind(scope, names, found)
                return
            holder = scope.get(names[0])
            if not isinstance(holder, Fields):
                raise TemplateError("%s is not a namespace" % names[0])
            holder.values[field] = found
        return write

    def macro_statement(self, reader):
        name, parameters = reader.next("name"), []
        reader.expect("(")
        while not reader.take(")"):
            parameter, other = reader.next("name"), None
            if reader.take("="):
                other = reader.expression()
            parameters.append((parameter, other))
            if not reader.take(","):
                reader.expect(")")
                break
        reader.end()
        body = self.block(("endmacro",))
        self.tag()

        def write(scope, output):
            def call(*values, **named):
                inner = Scope(scope)
                for i, (parameter, other) in enumerate(parameters):
                    inner.names[parameter] = values[i] if i < len(values) else named[parameter] \
                        if parameter in named else other(scope) if other else Undefined(parameter)
                inside = Output()
                body(inner, inside)
                return inside.text()
            scope.names[name] = call
        return write

    def filter_statement(self, reader):
        reader.tokens.insert(reader.at, ("op", "|"))
        wrap = reader.filtered(lambda scope: scope.get("filter"))
        reader.end()
        body = self.block(("endfilter",))
        self.tag()

        def write(scope, output):
            inside = Output()
            body(Scope(scope), inside)
            output.write(str(wrap(Scope(scope, {"filter": inside.text()}))))
        return write

    def generation_statement(self, reader):     # transformers marks what the model wrote; the text is the same
        reader.end()
        body = self.block(("endgeneration",))
        self.tag()
        return lambda scope, output: body(Scope(scope), output)

    def break_statement(self, reader):
        def write(scope, output):
            raise Stop("break")
        return write

    def continue_statement(self, reader):
        def write(scope, output):
            raise Stop("continue")
        return write


if __name__ == "__main__":
    print(__doc__)
