"""Values of BF16, F16 and F32 weights: compared, and carried from one type to another where that is exact."""
import math
import struct

from model_file import write_all
from refusal import require
from safetensors_reader import ITEM_BYTES, READ_BYTES


def equal_values(a, b):
    if a.dtype == b.dtype:
        return all(x == y for x, y in zip(a.whole_pieces(), b.whole_pieces()))
    wide, narrow = sorted((a, b), key=lambda each: -each.n_bytes)
    half = READ_BYTES * narrow.n_bytes // wide.n_bytes
    return all(piece_to_float32(wide.dtype, x) == piece_to_float32(narrow.dtype, y)
               for x, y in zip(wide.whole_pieces(), narrow.whole_pieces(n_bytes=half)))


class Converted:
    """A tensor in another dtype that holds each of its values exactly."""

    def __init__(self, tensor, dtype):
        self.tensor, self.dtype = tensor, dtype
        self.n_bytes = tensor.n_bytes // ITEM_BYTES[tensor.dtype] * ITEM_BYTES[dtype]

    def copy_to(self, fd, progress):
        for piece in self.tensor.whole_pieces():
            data = from_float32(self.dtype, piece_to_float32(self.tensor.dtype, piece))
            require(data is not None, self.tensor.file.name, self.tensor.name, "the values that it had", "others")
            write_all(fd, data, progress)


def piece_to_float32(dtype, data):
    """BF16, F16 or F32 as float32 bytes; every value of the three is exact there."""
    if dtype == "BF16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return bytes(wide)
    if dtype == "F16":
        n = len(data) // 2
        return struct.pack("<%df" % n, *struct.unpack("<%de" % n, data))
    return data


def from_float32(dtype, data):
    """float32 bytes as BF16, F16 or F32; None if that would change a value."""
    if dtype == "BF16":
        if data[0::4].strip(b"\0") or data[1::4].strip(b"\0"):
            return None
        narrow = bytearray(len(data) // 2)
        narrow[0::2], narrow[1::2] = data[2::4], data[3::4]
        return bytes(narrow)
    if dtype == "F16":
        n = len(data) // 4
        try:
            narrow = struct.pack("<%de" % n, *struct.unpack("<%df" % n, data))
        except OverflowError:
            return None
        return narrow if piece_to_float32("F16", narrow) == data else None
    return data


def widen(tensor):
    """A norm as float32 bytes."""
    data = piece_to_float32(tensor.dtype, b"".join(tensor.pieces()))
    for i, value in enumerate(struct.unpack("<%df" % tensor.shape[0], data)):
        require(math.isfinite(value), tensor.file.name, "%s[%d]" % (tensor.name, i), "a finite number", value)
    return data


if __name__ == "__main__":
    print(__doc__)
