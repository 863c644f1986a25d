"""Reads chat templates: the part of the Jinja language that they use, without jinja2, and with it in a child process.

A template is untrusted code: every quantity here has a limit. render_here and render_jinja2 give the same texts; what
render_here cannot read it says.

Reading order: values, expressions, statements, rendering, jinja2 in a child process.
"""
import importlib.util
import json
import re
import subprocess
import sys

MAX_TEMPLATE = 1 << 20                  # characters of a template, and of what it may write
MAX_STEPS = 200_000
RENDER_SECONDS = 5
RENDER_BYTES = 512 << 20


class Unreadable(Exception):
    """The template uses what is not read here, or too much of it."""


class TemplateError(Exception):
    """The template refuses the conversation, as jinja2 would say."""


# -------------------------------------------------------------------------------------------------------------- values

class Undefined:
    """A name without a value: false, empty and printed as nothing; anything else is an error."""

    def __init__(self, name):
        self.name = name

    def fail(self, *_):
        raise TemplateError("%s is undefined" % self.name)

    __add__ = __radd__ = __sub__ = __rsub__ = __lt__ = __gt__ = __le__ = __ge__ = __call__ = __getitem__ = fail

    def __str__(self):
        return ""

    def __bool__(self):
        return False

    def __len__(self):
        return 0

    def __iter__(self):
        return iter(())

    def __eq__(self, other):
        return isinstance(other, Undefined)

    __hash__ = object.__hash__


class Fields:
    """A value with named fields: a namespace, or `loop`."""

    def __init__(self, **values):
        self.values = values


class Stop(Exception):
    """{% break %} or {% continue %}."""


STRING_METHODS = ("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith", "endswith", "replace", "upper",
                  "lower", "title", "capitalize", "find", "index", "count", "join", "removeprefix", "removesuffix", "isdigit")
DICT_METHODS = ("get", "items", "keys", "values")


def bounded(value):
    if isinstance(value, (str, list, tuple, dict)) and len(value) > MAX_TEMPLATE:
        raise Unreadable("more than %d characters" % MAX_TEMPLATE)
    return value


def replace(text, old, new, count=-1):
    if len(text) + text.count(old) * len(new) > MAX_TEMPLATE:
        raise Unreadable("more than %d characters" % MAX_TEMPLATE)
    return text.replace(old, new, count)


def join(values, separator="", attribute=None):
    parts = [str(member(each, attribute) if attribute else each) for each in values]
    if sum(map(len, parts)) + len(separator) * len(parts) > MAX_TEMPLATE:
        raise Unreadable("more than %d characters" % MAX_TEMPLATE)
    return separator.join(parts)


def member(value, name, dotted=True):
    """value.name or value[name], as jinja2 looks them up."""
    if isinstance(value, Undefined):
        value.fail()
    if isinstance(value, Fields):
        return value.values.get(name, Undefined(name))
    method = isinstance(name, str) and ((isinstance(value, str) and name in STRING_METHODS) or
                                        (isinstance(value, dict) and name in DICT_METHODS))
    if method and (dotted or not isinstance(value, dict) or name not in value):
        if isinstance(value, str) and name in ("replace", "join"):
            return (lambda *rest: replace(value, *rest)) if name == "replace" else lambda values: join(values, value)
        if not hasattr(value, name):
            raise Unreadable(".%s" % name)
        return getattr(value, name)
    if isinstance(value, str) and isinstance(name, str) and hasattr(value, name):
        raise Unreadable("text.%s" % name)
    try:
        return value[name]
    except (KeyError, IndexError, TypeError):
        return Undefined(name)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def default(value, other="", if_false=False):
    return other if isinstance(value, Undefined) or (if_false and not value) else value


def items(value):
    return list(value.items()) if isinstance(value, dict) else []


def slice_of(value, start, stop, step):
    if not isinstance(value, (str, list, tuple)):
        raise TemplateError("a slice of %s" % type(value).__name__)
    return value[start:stop:step]


def is_kind(*kinds):
    return lambda value: isinstance(value, kinds)


FILTERS = {"trim": lambda value, chars=None: str(value).strip(chars), "length": len, "count": len,
           "lower": lambda value: str(value).lower(), "upper": lambda value: str(value).upper(),
           "capitalize": lambda value: str(value).capitalize(), "title": lambda value: str(value).title(),
           "string": str, "safe": str, "default": default, "d": default, "join": join, "list": list, "items": items,
           "first": lambda value: next(iter(value), Undefined("first")),
           "last": lambda value: next(iter(reversed(list(value))), Undefined("last")),
           "replace": lambda value, *rest: replace(str(value), *rest), "tojson": tojson,
           "reverse": lambda value: value[::-1], "int": int, "abs": abs}
TESTS = {"defined": lambda value: not isinstance(value, Undefined), "undefined": is_kind(Undefined),
         "none": lambda value: value is None, "string": is_kind(str), "mapping": is_kind(dict),
         "iterable": is_kind(str, list, tuple, dict, Undefined), "sequence": is_kind(str, list, tuple, dict, Undefined),
         "number": is_kind(int, float), "integer": lambda value: is_kind(int)(value) and not is_kind(bool)(value),
         "boolean": is_kind(bool), "true": lambda value: value is True, "false": lambda value: value is False,
         "equalto": lambda value, other: value == other, "eq": lambda value, other: value == other,
         "==": lambda value, other: value == other, "ne": lambda value, other: value != other,
         "in": lambda value, other: value in other, "odd": lambda value: value % 2 == 1,
         "even": lambda value: value % 2 == 0, "divisibleby": lambda value, by: value % by == 0}


def chosen(keep, attribute):
    """The filters select, reject, selectattr and rejectattr."""
    def apply(values, *arguments):
        name, arguments = (arguments[0], arguments[1:]) if attribute else (None, arguments)
        test = TESTS[arguments[0]] if arguments else bool
        return [each for each in values or ()
                if bool(test(member(each, name) if attribute else each, *arguments[1:])) == keep]
    return apply


FILTERS.update(select=chosen(True, False), reject=chosen(False, False), selectattr=chosen(True, True),
               rejectattr=chosen(False, True))


# --------------------------------------------------------------------------------------------------------- expressions

CODE = re.compile(r"""\s*(?:(?P<float>\d+\.\d+)|(?P<int>\d+)|(?P<name>[^\W\d]\w*)
                  |(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
                  |(?P<op>==|!=|<=|>=|//|\*\*|[-+*/%~<>=.,:;|()\[\]{}]))""", re.S | re.X)
COMPARISONS = {"==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b, ">": lambda a, b: a > b,
               "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "in": lambda a, b: a in b,
               "not in": lambda a, b: a not in b}
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
END = ("op", "")


def minus(a, b):
    return a - b


def times(a, b):
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)) or max(abs(a), abs(b)) > 1e9:
        raise Unreadable("a product other than of two small numbers")
    return a * b


def remainder(a, b):
    if not isinstance(a, (int, float)):
        raise Unreadable("% on a text")
    return a % b


OPERATORS = {"+": lambda a, b: bounded(a + b), "-": minus, "~": lambda a, b: bounded(str(a) + str(b)), "*": times,
             "/": lambda a, b: a / b, "//": lambda a, b: a // b, "%": remainder}


class Expressions:
    """Reads the tokens of one tag into functions of a scope, by jinja2's order of precedence."""

    def __init__(self, tokens, run):
        self.tokens, self.at, self.run = tokens, 0, run

    def peek(self, *texts):
        """Whether the next token is one of these names or operators."""
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else END
        return kind in ("op", "name") and text in texts and bool(text)

    def take(self, *texts):
        found = self.peek(*texts)
        self.at += found
        return found

    def expect(self, text):
        if not self.take(text):
            raise Unreadable("expected %r" % text)

    def next(self, kind):
        found, text = self.tokens[self.at] if self.at < len(self.tokens) else END
        if found != kind:
            raise Unreadable("expected a %s" % kind)
        self.at += 1
        return text

    def ended(self):
        return self.at == len(self.tokens)

    def end(self):
        if not self.ended():
            raise Unreadable("%r" % (self.tokens[self.at][1],))

    def expression(self):
        value = self.either()
        while self.take("if"):
            condition, first = self.either(), value
            other = self.expression() if self.take("else") else lambda scope: Undefined("else")
            value = (lambda condition, first, other: lambda scope:
                     (first if condition(scope) else other)(scope))(condition, first, other)
        return value

    def either(self):
        left = self.both()
        while self.take("or"):
            left = (lambda a, b: lambda scope: a(scope) or b(scope))(left, self.both())
        return left

    def both(self):
        left = self.negated()
        while self.take("and"):
            left = (lambda a, b: lambda scope: a(scope) and b(scope))(left, self.negated())
        return left

    def negated(self):
        if self.take("not"):
            value = self.negated()
            return lambda scope: not value(scope)
        return self.compared()

    def compared(self):
        first, rest = self.binary(0), []
        while True:
            if self.peek("not") and self.at + 1 < len(self.tokens) and self.tokens[self.at + 1] == ("name", "in"):
                self.at += 2
                rest.append((COMPARISONS["not in"], self.binary(0)))
            elif self.peek(*COMPARISONS):
                operation = COMPARISONS[self.tokens[self.at][1]]
                self.at += 1
                rest.append((operation, self.binary(0)))
            else:
                break
        if not rest:
            return first

        def compare(scope):
            left = first(scope)
            for operation, operand in rest:
                right = operand(scope)
                if not operation(left, right):
                    return False
                left = right
            return True
        return compare

    def binary(self, level):
        """+ and -, then ~, then * / // %."""
        levels = (("+", "-"), ("~",), ("*", "/", "//", "%"))
        if level == len(levels):
            return self.unary()
        left = self.binary(level + 1)
        while self.peek(*levels[level]):
            operation = OPERATORS[self.tokens[self.at][1]]
            self.at += 1
            right = self.binary(level + 1)
            left = (lambda a, b, operation: lambda scope: operation(a(scope), b(scope)))(left, right, operation)
        return left

    def unary(self, filters=True):
        if self.take("-"):
            inner = self.unary(False)
            value = lambda scope: -inner(scope)         # noqa: E731
        elif self.take("+"):
            value = self.unary(False)
        else:
            value = self.primary()
        value = self.postfix(value)
        return self.filtered(value) if filters else value

    def primary(self):
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else END
        self.at += 1
        if kind == "name":
            return (lambda scope: CONSTANTS[text]) if text in CONSTANTS else self.variable(text)
        if kind == "string":
            while self.at < len(self.tokens) and self.tokens[self.at][0] == "string":      # side by side: one text
                text += self.tokens[self.at][1]
                self.at += 1
        if kind in ("string", "int", "float"):
            return lambda scope: text
        if text == "(":
            values, comma = [], False
            while not self.take(")"):
                values.append(self.expression())
                comma = self.take(",") or comma
                if not comma:
                    self.expect(")")
                    return values[0]
            return lambda scope: tuple(each(scope) for each in values)
        if text == "[":
            values = self.several("]")
            return lambda scope: [each(scope) for each in values]
        if text == "{":
            pairs = []
            while not self.take("}"):
                key = self.expression()
                self.expect(":")
                pairs.append((key, self.expression()))
                if not self.take(","):
                    self.expect("}")
                    break
            return lambda scope: {key(scope): value(scope) for key, value in pairs}
        raise Unreadable("%r in an expression" % (text,))

    def variable(self, name):
        def look_up(scope):
            self.run.step()
            return scope.get(name)
        return look_up

    def several(self, close):
        values = []
        while not self.take(close):
            values.append(self.expression())
            if not self.take(","):
                self.expect(close)
                break
        return values

    def postfix(self, value):
        while True:
            if self.take("."):
                kind, name = self.tokens[self.at] if self.at < len(self.tokens) else END
                self.at += 1
                if kind not in ("name", "int"):
                    raise Unreadable("%r after a point" % (name,))
                value = (lambda value, name: lambda scope: member(value(scope), name))(value, name)
            elif self.take("["):
                value = self.subscript(value)
            elif self.take("("):
                value = self.call(value)
            else:
                return value

    def subscript(self, value):
        parts, colons = [None], 0
        while not self.take("]"):
            if self.take(":"):
                parts.append(None)
                colons += 1
            else:
                parts[-1] = self.expression()
        if colons == 0 and parts[0]:
            index = parts[0]
            return lambda scope: member(value(scope), index(scope), dotted=False)
        if not 1 <= colons <= 2:
            raise Unreadable("a subscript")
        parts += [None] * (3 - len(parts))
        return lambda scope: slice_of(value(scope), *(each and each(scope) for each in parts))

    def arguments(self):
        """After "(": values in order and by name."""
        values, named = [], {}
        while not self.take(")"):
            kind, text = self.tokens[self.at] if self.at < len(self.tokens) else END
            if kind == "name" and self.tokens[self.at + 1:self.at + 2] == [("op", "=")]:
                self.at += 2
                named[text] = self.expression()
            else:
                values.append(self.expression())
            if not self.take(","):
                self.expect(")")
                break
        return lambda scope: ([each(scope) for each in values], {key: each(scope) for key, each in named.items()})

    def call(self, function):
        arguments = self.arguments()

        def call(scope):
            self.run.step()
            values, named = arguments(scope)
            return bounded(function(scope)(*values, **named))
        return call

    def filtered(self, value):
        while True:
            if self.take("|"):
                name = self.next("name")
                arguments = self.arguments() if self.take("(") else lambda scope: ([], {})
                value = self.filter(name, value, arguments)
            elif self.take("is"):
                value = self.test(value)
            else:
                return value

    def filter(self, name, value, arguments):
        def apply(scope):
            self.run.step()
            if name not in FILTERS:
                raise Unreadable("the filter %s" % name)
            values, named = arguments(scope)
            return bounded(FILTERS[name](value(scope), *values, **named))
        return apply

    def test(self, value):
        negative = self.take("not")
        name = self.next("name")
        if self.take("("):
            arguments = self.arguments()
        elif not self.ended() and not self.peek("else", "or", "and", "if", "is") \
                and (self.tokens[self.at][0] != "op" or self.peek("[", "{")):
            argument = self.postfix(self.primary())
            arguments = lambda scope: ([argument(scope)], {})           # noqa: E731
        else:
            arguments = lambda scope: ([], {})                          # noqa: E731

        def apply(scope):
            if name not in TESTS:
                raise Unreadable("the test %s" % name)
            return bool(TESTS[name](value(scope), *arguments(scope)[0])) != negative
        return apply


# ---------------------------------------------------------------------------------------------------------- statements

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


def split_tags(source):
    """("data", text), ("print", tokens) and ("block", tokens), with trim_blocks and lstrip_blocks as transformers sets."""
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


# ----------------------------------------------------------------------------------------------------------- rendering

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
