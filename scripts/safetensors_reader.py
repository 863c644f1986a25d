"""A safetensors file, its header checked: the tensors in it, and their bytes in pieces."""
import os

from checked_json import Section, is_int, parse_json
from model_file import write_all
from refusal import DOWNLOAD, foreign_file, refuse, require, show

ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
              "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
MAX_HEADER = 100_000_000                # of a safetensors file, by its specification
SENDFILE_BYTES = 32 << 20
READ_BYTES = 256 << 10                  # small enough to stay in cache between a read and a write; a multiple of 4


class Tensor:
    """A tensor in an open safetensors file: where its bytes are."""

    def __init__(self, name, dtype, shape, file, start, n_bytes):
        self.name, self.dtype, self.shape = name, dtype, shape
        self.file, self.start, self.n_bytes = file, start, n_bytes

    def pieces(self, done=0, n_bytes=READ_BYTES, end=None):
        """The bytes from `done` on, n_bytes at a time; a file that has shrunk is an error, not a short copy."""
        end = self.n_bytes if end is None else end
        while done < end:
            piece = read_at(self.file, self.start + done, min(n_bytes, end - done), self.name)
            require(piece, self.file.name, self.name + ": data", "%d bytes" % self.n_bytes, done)
            done += len(piece)
            yield piece

    def whole_pieces(self, done=0, n_bytes=READ_BYTES, end=None):
        """The same with no piece but the last shorter than n_bytes: whole elements, and in step with another tensor."""
        held = b""
        for piece in self.pieces(done, n_bytes, end):
            held = held + piece if held else piece
            while len(held) >= n_bytes:
                yield held[:n_bytes]
                held = held[n_bytes:]
        if held:
            yield held

    def copy_to(self, fd, progress):
        """Copy inside the kernel, which is as fast as cp; where that fails, read and write."""
        done = 0
        try:
            while done < self.n_bytes:
                n = os.sendfile(fd, self.file.fileno(), self.start + done, min(SENDFILE_BYTES, self.n_bytes - done))
                if n == 0:
                    break
                done += n
                progress.add(n)
        except (AttributeError, OSError):       # not on this system; or a real error, which then comes again
            pass
        for piece in self.pieces(done):
            write_all(fd, piece, progress)


def read_at(file, at, n, what):
    """Up to n bytes at a place of their own: readers of one file do not move each other."""
    try:
        return os.pread(file.fileno(), n, at)
    except OSError as error:                    # it would name no file, and be taken for one in writing
        refuse(file.name, "%s: %s" % (what, error.strerror))


def read_header(file, data_start, size):
    """All bytes of the header, however few come at a time."""
    header, at = [], 8
    while at < data_start:
        piece = read_at(file, at, data_start - at, "header")
        require(piece, file.name, "header", "%d bytes" % (data_start - 8), at - 8)
        header.append(piece)
        at += len(piece)
    return b"".join(header)


def open_safetensors(path):
    """All tensors of one file by name, its header checked: the data must be covered exactly once."""
    file = open(path, "rb", buffering=0)
    size, start = os.fstat(file.fileno()).st_size, b""
    while len(start) < min(64, size):
        piece = read_at(file, len(start), 64 - len(start), "header")
        require(piece, path, "size", "%d bytes" % size, len(start))
        start += piece
    if foreign_file(start):
        refuse(path, "format", "safetensors", foreign_file(start))
    incomplete = "an incomplete download: %s" % DOWNLOAD
    if size < 8:
        refuse(path, "size", "at least 8 bytes", "%d, %s" % (size, incomplete))
    data_start = 8 + int.from_bytes(start[:8], "little")
    data_bytes = size - data_start
    if data_start - 8 > MAX_HEADER or start[8:9] not in (b"{", b""):
        refuse(path, "format", "safetensors", "a header of %d bytes that begins with %s"
               % (data_start - 8, show(start[8:16])))
    if data_bytes < 0:
        refuse(path, "size", "at least %d bytes, a header and the tensors" % data_start, "%d, %s" % (size, incomplete))
    header = parse_json(path, read_header(file, data_start, size))
    metadata = header.pop("__metadata__", None)             # null as mlx writes it
    require(isinstance(metadata or {}, dict) and all(isinstance(value, str) for value in (metadata or {}).values()),
            path, "__metadata__", "strings by name", metadata)
    tensors, spans, end = {}, [], 0
    for name, values in header.items():
        entry = Section("%s: %s" % (path, show(name)), values)
        dtype = entry.typed("dtype", str, None)
        if dtype not in ITEM_BYTES:
            refuse(entry.where, "dtype", "one of %s" % ", ".join(ITEM_BYTES), show(dtype))
        shape, offsets = entry.typed("shape", list, None), entry.typed("data_offsets", list, None)
        require(all(is_int(n) and n >= 0 for n in shape), entry.where, "shape", "a list of sizes", shape)
        require(len(offsets) == 2 and all(map(is_int, offsets)) and 0 <= offsets[0] <= offsets[1] < 2**63,
                entry.where, "data_offsets", "two offsets", offsets)
        n_bytes = ITEM_BYTES[dtype]
        for n in shape:
            n_bytes *= n
        require(n_bytes == offsets[1] - offsets[0], entry.where, "bytes", show(n_bytes), offsets[1] - offsets[0])
        tensors[name] = Tensor(name, dtype, shape, file, data_start + offsets[0], n_bytes)
        spans.append((*offsets, entry.where))
        end = max(end, offsets[1])
    if end > data_bytes:
        refuse(path, "size", "%d bytes, by its header" % (data_start + end), "%d, %s" % (size, incomplete))
    at = 0
    for begin, end, where in sorted(spans):
        require(begin == at, where, "data", "to start at %d (no gap, no overlap)" % at, begin)
        at = end
    require(at == data_bytes, path, "data", "%d bytes, to the end of the last tensor" % at, data_bytes)
    return tensors


if __name__ == "__main__":
    print(__doc__)
