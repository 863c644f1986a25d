"""The JSON files of a checkpoint, read strictly: parse_json for a whole file, Section for fields of checked types."""
import json
import os

from refusal import DOWNLOAD, foreign_file, refuse, require, show

MAX_JSON = 200_000_000


def parse_json(where, data):
    """Strict JSON: an object, UTF-8, no duplicate keys, no NaN or Infinity. A file of another kind is named."""
    answer = "the site's answer and not the file: hf auth login, then %s" % DOWNLOAD
    if data.lstrip()[:1] == b"<":
        refuse(where, "format", "JSON", "an HTML page, " + answer)
    if foreign_file(data[:64]):
        refuse(where, "format", "JSON", foreign_file(data[:64]))
    if not data.strip(b" \t\r\n\0"):
        refuse(where, "format", "JSON", "an empty file of %d bytes, an incomplete download: %s" % (len(data), DOWNLOAD))
    def without_duplicates(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = sorted(key for key, _ in pairs)
            refuse(where, "duplicate key %s" % show(next(a for a, b in zip(keys, keys[1:]) if a == b)))
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates,
                           parse_constant=lambda name: refuse(where, "not valid JSON: %s" % name))
    except RecursionError:
        refuse(where, "JSON nested too deeply")
    except ValueError as error:                 # not UTF-8, not JSON, or an integer of thousands of digits
        if data.lstrip()[:1].isalpha() and len(data) < 1000 and data.isascii() and b"\0" not in data:
            refuse(where, "format", "JSON", "the text %s, %s" % (show(data.decode().strip()), answer))
        if data.lstrip()[:1] == b"{" and data.rstrip()[-1:] != b"}":
            refuse(where, "JSON that breaks off after %d bytes, as after an incomplete download (%s): %s"
                   % (len(data), error, DOWNLOAD))
        refuse(where, "not valid JSON: %s" % error)
    require(isinstance(value, dict), where, "JSON", "an object", value)
    return value


def read_file(path, limit=MAX_JSON):
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        require(size <= limit, path, "size", "at most %d bytes" % limit, size)
        return file.read(limit + 1)


def is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


class Section:
    """A JSON object whose fields are read with their types checked; null is as good as absent."""

    def __init__(self, where, values):
        require(isinstance(values, dict), where, "JSON", "an object", values)
        self.where, self.values = where, values

    @classmethod
    def load(cls, directory, name, needed=True):
        path = os.path.join(directory, name)
        return cls(path, parse_json(path, read_file(path)) if needed or os.path.exists(path) else {})

    def get(self, key, default=None):
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key, default=None, most=2**31 - 1):
        value = self.get(key, default)
        require(is_int(value) and 0 < value <= most, self.where, key, "an integer from 1 to %d" % most, value)
        return value

    def real(self, key):
        value = self.get(key)
        require((is_int(value) or isinstance(value, float)) and 1e-30 < value < 1e30, self.where, key,
                "a positive number", value)
        return float(value)

    def typed(self, key, kind, default):
        value = self.get(key, default)
        require(isinstance(value, kind), self.where, key, "a JSON %s" % kind.__name__, value)
        return value

    def one_of(self, key, *allowed):
        """The field, which must be one of these values; None among them allows it to be absent."""
        value = self.get(key)
        require(any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed),
                self.where, key, " or ".join("none" if each is None else show(each) for each in allowed), value)
        return value


if __name__ == "__main__":
    print(__doc__)
