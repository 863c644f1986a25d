"""Values of a chat template: names, members, filters and tests as jinja2 has them, and the limits of a template."""
import json

MAX_TEMPLATE = 1 << 20                  # characters of a template, and of what it may write
MAX_STEPS = 200_000


class Unreadable(Exception):
    """The template uses what is not read here, or too much of it."""


class TemplateError(Exception):
    """The template refuses the conversation, as jinja2 would say."""


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


STRING_METHODS = ("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith", "endswith", "replace",
                  "upper", "lower", "title", "capitalize", "find", "index", "count", "join", "removeprefix",
                  "removesuffix", "isdigit")
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


if __name__ == "__main__":
    print(__doc__)
