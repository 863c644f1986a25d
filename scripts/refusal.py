"""How bad input is refused: one exception, one form of message, names of other kinds of files; and notes for a user."""
import json
import sys

LFS_POINTER = "a Git LFS pointer (the file itself was not downloaded: git lfs pull)"
FOREIGN_FILES = ((b"GGUF", "a GGUF file"), (b"PK\x03\x04", "a PyTorch pickle file"), (b"\x80", "a pickle file"),
                 (b"version https://git-lfs", LFS_POINTER),
                 (b"<!DOCTYPE", "an HTML page"), (b"<!doctype", "an HTML page"), (b"<html", "an HTML page"))
DOWNLOAD = "hf download ORGANISATION/MODEL --local-dir DIR"


class Refused(Exception):
    """The one way to fail on bad input."""


def refuse(where, what, expected=None, found=None):
    """Stop with `where: what, expected X, found Y`."""
    text = "%s: %s" % (where, what)
    text += "" if expected is None else ", expected %s" % expected
    raise Refused(text + ("" if found is None else ", found %s" % found))


def require(holds, where, what, expected, value):
    """Refuse unless it holds; `value` is what the file has, printed as JSON."""
    if not holds:
        refuse(where, what, expected, show(value))


def show(value):
    """A value from a file, on one short line."""
    try:
        text = ascii(value) if isinstance(value, bytes) else json.dumps(value)
    except (ValueError, RecursionError):        # thousands of digits, or of brackets
        text = "a huge value"
    return text if len(text) <= 90 else text[:87] + "..."


def note(text):
    print("convert.py: " + text, file=sys.stderr)


def foreign_file(start):
    """What a file that starts so is, or None. A safetensors file has zeros at 4..8, in its header's length."""
    return next((what for magic, what in FOREIGN_FILES if start.startswith(magic) and start[4:8] != bytes(4)), None)


if __name__ == "__main__":
    print(__doc__)
