"""model.bin: its formats, and writing one: whole, under a lock, and put in the old one's place at the end."""
import fcntl
import json
import os
import shutil
import stat
import struct
import sys
import time

from refusal import refuse
from share_writer import shares_of, write_shares

# What is written, beside the tensors: `__metadata__`, all values text. The lowest format that can hold it:
#
# llama-model/1   what the first release reads. `converter` is new in it and ignored by older programs: it is there if
#                 chat_format was compared with the checkpoint's template, or asked for.
# llama-model/2   if there is any of these:
#   rope_type `linear`, with rope_factor: float32 inverse frequencies divided by it
#   chat_format `chatml` or `deepseek`: chat_template.render says what each format writes
#   chat_system      the template's own system message, which stands where a conversation has none: written as it is,
#                    without trimming, and tokens in it count, special ones too (it is the template's text)
#   chat_date        the date that llama3.1 writes: a text, or `today` (as "%d %b %Y" in English); absent: 26 Jul 2024
#   chat_bos_id      what the template writes first: an id, or nothing (empty); absent: bos_id
#   tokenizer.kind 3 added and not special
#   normalized_ids   comma-separated, ascending: tokens of kind 1 and 3 that are looked for in a second pass, over what
#                    the first leaves; absent: none. A pass takes the leftmost match, of those the longest, and goes on
#                    after it. A special token that does not count in a text takes its place all the same: it stays
#                    characters, and nothing is found in it in that pass.
#   tok_embeddings or output in a dtype of its own: BF16, F16 or F32
#   quantised matrices: M (F8_E4M3, I8, or U8 with two to a byte) with M.scale; README.md, "model.bin"
#   group            columns that share a scale, where scales are of groups: 32, 64 or 128

MAX_VOCAB = 1 << 24
DATA_ALIGN = 4096                       # tensor data starts on a page


def lowest_format(metadata, outputs):
    """Which format this file is."""
    kinds = next(output.data for output in outputs if output.name == "tokenizer.kind")
    dtypes = {output.dtype for output in outputs if len(output.shape) == 2}
    newer = (metadata.get("rope_type") == "linear" or metadata["chat_format"] in ("chatml", "deepseek") or 3 in kinds
             or len(dtypes) > 1
             or any(key in metadata for key in ("chat_system", "chat_date", "chat_bos_id", "normalized_ids")))
    return "llama-model/2" if newer else "llama-model/1"


class Output:
    """A tensor of model.bin: its data is bytes, a Tensor or Converted to copy from, or codes that have rows."""

    def __init__(self, name, dtype, shape, data):
        self.name, self.dtype, self.shape, self.data = name, dtype, shape, data
        self.n_bytes = len(data) if isinstance(data, bytes) else data.n_bytes


def build_header(metadata, outputs):
    entries, at = {"__metadata__": metadata}, 0
    for output in outputs:
        entries[output.name] = {"dtype": output.dtype, "shape": output.shape,
                                "data_offsets": [at, at + output.n_bytes]}
        at += output.n_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGN)
    return struct.pack("<Q", len(text)) + text


class Progress:
    """GB/s on standard error: one line rewritten on a terminal, else a line now and then."""

    def __init__(self, total):
        self.total, self.done, self.start, self.tty = total, 0, time.monotonic(), sys.stderr.isatty()
        self.next = self.start

    def add(self, n):
        self.done += n
        now = time.monotonic()
        if now >= self.next + (0.2 if self.tty else 10):
            self.next = now
            self.print("%.2f of %.2f GB" % (self.done / 1e9, self.total / 1e9), "" if self.tty else "\n")

    def end_line(self):
        if self.tty:
            print(file=sys.stderr)

    def print(self, text, end="\n"):
        seconds = max(time.monotonic() - self.start, 1e-9)
        print("%s%s in %.1f s, %.2f GB/s" % ("\r\x1b[K" if self.tty else "", text, seconds, self.done / 1e9 / seconds),
              end=end, file=sys.stderr, flush=True)


def write_all(fd, data, progress):
    data = memoryview(data)
    while data:
        n = os.write(fd, data)
        progress.add(n)
        data = data[n:]


def write_outputs(fd, at, outputs, progress):
    """The data of all outputs, of which the first goes to `at`: codes that change by several processes (share_writer.py)."""
    shares, plain = [], []
    for output in outputs:
        if hasattr(output.data, "rows"):
            shares += shares_of(output.data, at)
        else:
            plain.append((at, output.data))
        at += output.n_bytes

    def write_plain():
        for start, data in plain:
            os.lseek(fd, start, os.SEEK_SET)
            if isinstance(data, bytes):
                write_all(fd, data, progress)
            else:
                data.copy_to(fd, progress)

    write_shares(fd, shares, progress, write_plain)


def open_part(path):
    """OUT.part, empty and locked: what a stopped conversion left is taken over, what one is writing is not."""
    part = path + ".part"
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                refuse(part, "the file to write to, before it is renamed", "a regular file or none", "something else")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse(part, "another conversion is writing it")
            except OSError:                     # a file system without locks
                pass
            if os.path.exists(part) and os.path.samestat(os.stat(part), os.fstat(fd)):
                if os.fstat(fd).st_size:        # of an empty file it would make close() wait for the disk (ext4)
                    os.ftruncate(fd, 0)
                return part, fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)                            # it was renamed or removed meanwhile, by who had the lock


def write_model(path, metadata, outputs):
    """Write OUT.part, then rename it: model.bin is whole or it is not there. A symbolic link is followed."""
    header = build_header(metadata, outputs)
    progress = Progress(len(header) + sum(output.n_bytes for output in outputs))
    target = os.path.realpath(path)
    part, fd = open_part(target)
    try:
        try:
            free = shutil.disk_usage(os.path.dirname(part)).free
            if free < progress.total:
                refuse(path, "space", "%.3f GB" % (progress.total / 1e9), "%.3f GB free on that disk" % (free / 1e9))
            write_all(fd, header, progress)
            write_outputs(fd, len(header), outputs, progress)
            os.replace(part, target)
        except BaseException:
            if os.path.exists(part) and os.path.samestat(os.stat(part), os.fstat(fd)):
                os.unlink(part)                 # this one, not another's that came after
            raise
        finally:
            os.close(fd)
    except BaseException:
        progress.end_line()
        raise
    progress.print("wrote %s: %.3f GB" % (path, progress.done / 1e9))


if __name__ == "__main__":
    print(__doc__)
