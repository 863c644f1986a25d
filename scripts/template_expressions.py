"""Expressions of a chat template: the tokens of one tag, as functions of a scope."""
import re

from template_values import FILTERS, TESTS, Undefined, Unreadable, bounded, member, slice_of

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


if __name__ == "__main__":
    print(__doc__)
