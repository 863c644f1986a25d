"""Checkpoints whose matrices are codes and scales already: which of them model.bin can hold, and both as it has them.

Codes and scales are copied, never decoded or rounded: a matrix stands for the same code × scale before and after. What
config.json says of them is read first (read_scheme), then each matrix is taken by the tensors that there are
(quantised_matrix):

    compressed-tensors   float-quantized, int-quantized, naive-quantized   M.weight F8_E4M3 or I8, M.weight_scale
                         pack-quantized, 4 or 8 bits                       M.weight_packed I32, M.weight_scale, M.weight_shape
    fbgemm_fp8           as Meta published Llama 3.1 405B                  M.weight F8_E4M3, M.weight_scale
    fp8                  of transformers, and AutoFP8                      M.weight F8_E4M3, M.weight_scale_inv or M.weight_scale

All scales multiply, weight_scale_inv as well. They are one for each row ([rows] or [rows, 1]), one for each group of 32, 64
or 128 columns, or one for all, which becomes one for each row. Packed codes have half their range added and are dense, the
first in the lowest bits: of 4 bits they are model.bin's own bytes.
"""
import math
import re
import struct

from checked_json import Section
from model_file import Output, write_all
from refusal import note, refuse, require, show
from safetensors_reader import ITEM_BYTES, READ_BYTES

SCALE_DTYPES = ("BF16", "F16", "F32")
GROUPS = (32, 64, 128)
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision")
ACTIVATIONS = re.compile(r"\.((?:[kvq]|kv|input|output|activation)_scale|input_scale_ub|input_global_scale"
                         r"|(?:[kvq]|input|output)_zero_point)\Z")
QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|weight_g_idx|scales|biases|weight_scale\w*|weight_packed|weight_zero_point"
                       r"|weight_global_scale|absmax|quant_map|SCB|weight\.(absmax|quant_map|nested_\w+|quant_state\S*|SCB))\Z")
ORIGINAL = "convert the one that it was made from, with weights in BF16, F16 or F32"


def quantise_it(kind):
    return "%s, then ./llama model.bin --quantize %s -o small.bin" % (ORIGINAL, kind)


def refuse_quantised(where, settings=None):
    """A checkpoint whose codes are none of model.bin's."""
    settings = settings if isinstance(settings, dict) else {}
    method = settings.get("quant_method") or ("mlx" if "group_size" in settings else None)
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") is True else
                                    8 if settings.get("load_in_8bit") is True else None)
    details = ", ".join([str(method)] * bool(method) + ["%s bits" % bits] * bool(bits))
    refuse(where, "a quantised checkpoint%s: %s" % (" (%s)" % details if details else "",
                                                    quantise_it("int8" if bits == 8 else "int4")))


def refuse_blocks(where, block):
    refuse(where, "a scale for each block of %s weights, expected one for each row or for all: %s" % (
        " × ".join(map(str, block)), quantise_it("fp8")))


# -------------------------------------------------------------------------------------------------------- config.json

class Scheme:
    """How the weights are quantised, by config.json: where their scales may be, and of how many bits packed codes are."""

    def __init__(self, strategies, bits=(), group=None, block=None):
        self.strategies, self.bits, self.group, self.block = strategies, bits, group, block


def read_scheme(config):
    """The Scheme of a quantised checkpoint, or None."""
    if config.get("quantization") is not None:
        refuse_quantised(config.where, config.get("quantization"))
    settings = config.get("quantization_config")
    if settings is None:
        return None
    where = config.where + ": quantization_config"
    section = Section(where, settings)
    method = section.get("quant_method")
    if method == "compressed-tensors":
        return read_compressed_tensors(section)
    if method == "fbgemm_fp8":
        note("%s: activations are quantised in products of this checkpoint, here they are not" % where)
        return Scheme({"channel"})
    if method == "fp8":
        if section.get("activation_scheme") is not None:
            note("%s: activations are quantised in products of this checkpoint (%s), here they are not" % (
                where, show(section.get("activation_scheme"))))
        return Scheme({"tensor", "channel"}, block=section.typed("weight_block_size", list, []))
    return refuse_quantised(config.where, settings)


def read_compressed_tensors(section):
    sparsity = section.typed("sparsity_config", dict, {}).get("format") or "dense"
    require(sparsity == "dense", section.where, "sparsity_config: format", "dense, or %s" % ORIGINAL, sparsity)
    if section.get("transform_config"):
        refuse(section.where, "transform_config, weights that are rotated: %s" % quantise_it("int4"))
    strategies, bits, groups, activations = set(), set(), set(), section.get("kv_cache_scheme") is not None
    for name, values in section.typed("config_groups", dict, {}).items():
        scheme = Section("%s: config_groups: %s" % (section.where, name), values)
        activations = activations or any(scheme.get(key) for key in ("input_activations", "output_activations"))
        if scheme.get("weights") is not None:
            kind = scheme.get("format") or section.get("format")
            require(kind in FORMATS, scheme.where, "format", "one of %s, or %s" % (", ".join(FORMATS), quantise_it("int4")),
                    kind)
            strategies.add(read_weights(Section(scheme.where + ": weights", scheme.get("weights")), bits, groups))
    if len(groups) > 1:
        refuse(section.where, "group_size", "one size for all matrices", "%s; %s" % (sorted(groups), quantise_it("int4")))
    if activations:
        note("%s: activations, or keys and values, are quantised in this checkpoint, here they are not" % section.where)
    return Scheme(strategies, bits, max(groups, default=None))


def read_weights(weights, bits, groups):
    """The strategy of a group of matrices; their bits and the size of groups are added to those."""
    width, kind = weights.integer("num_bits", 8), weights.get("type", "int")
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy is None:                        # as compressed-tensors takes it
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if not weights.typed("symmetric", bool, True):
        refuse(weights.where, "codes with zero points (\"symmetric\": false), expected symmetric ones: %s"
               % quantise_it("int%d" % width if width in (4, 8) else "int4"))
    if weights.get("actorder") not in (None, False, "weight", "static"):
        refuse(weights.where, "columns in the order of their activations (\"actorder\": %s), expected their own: %s, or a "
               "checkpoint with \"actorder\": \"weight\"" % (show(weights.get("actorder")), ORIGINAL))
    if strategy == "block":
        refuse_blocks(weights.where, weights.typed("block_structure", list, ["?", "?"]))
    require((kind, width) in (("float", 8), ("int", 8), ("int", 4)), weights.where, "num_bits",
            "float of 8, or int of 4 or 8; %s" % quantise_it("int4"), "%s of %d" % (kind, width))
    require(strategy in ("tensor", "channel", "group"), weights.where, "strategy",
            "tensor, channel or group; %s" % quantise_it("int4"), strategy)
    if strategy == "group":
        require(group in GROUPS and kind == "int", weights.where, "group_size",
                "32, 64 or 128 columns of int4 or int8; %s" % quantise_it("int4" if width == 4 else "fp8"), group)
        groups.add(group)
    bits.add(width)
    return strategy


# ------------------------------------------------------------------------------------------------------------ matrices

def find_scale(tensors, module):
    names = [name for name in (module + ".weight_scale", module + ".weight_scale_inv") if name in tensors]
    return names[0] if names else None


def has_codes(tensors, name):
    """Whether M.weight is quantised: by its dtype, or packed."""
    weight = tensors.get(name)
    return name + "_packed" in tensors or weight is not None and weight.dtype in ("F8_E4M3", "F8_E5M2", "I8")


def quantised_matrix(scheme, tensors, ours, name, shape, used):
    """The codes and the scales of matrix `name` (M.weight) as Outputs; the tensors that they come from are added to `used`."""
    module, packed = name[:-len(".weight")], name + "_packed"
    codes = packed_codes(scheme, tensors, ours, packed, shape, used) if packed in tensors else \
        plain_codes(tensors[name], ours, shape)
    used.add(packed if packed in tensors else name)
    scale = find_scale(tensors, module)
    if scale is None:
        refuse(tensors[packed if packed in tensors else name].file.name, name + "_scale", "the scales of %s" % name, "none")
    used.add(scale)
    return [codes, scales_of(scheme, tensors[scale], ours, codes.dtype, shape)]


def plain_codes(tensor, ours, shape):
    path = tensor.file.name
    require(tensor.dtype in ("F8_E4M3", "I8"), path, tensor.name + ": dtype", "F8_E4M3 or I8; %s" % quantise_it("fp8"),
            tensor.dtype)
    require(tensor.shape == shape, path, tensor.name + ": shape", shape, tensor.shape)
    return Output(ours, tensor.dtype, shape, Fp8Codes(tensor) if tensor.dtype == "F8_E4M3" else tensor)


def packed_codes(scheme, tensors, ours, name, shape, used):
    """Codes of 4 or 8 bits, four bytes at a time; a row's last ones are padding where its columns do not fill them."""
    tensor, (rows, columns) = tensors[name], shape
    path = tensor.file.name
    require(tensor.dtype == "I32", path, name + ": dtype", "I32", tensor.dtype)
    widths = {-(-columns * bits // 32): bits for bits in sorted(scheme.bits)}
    require(len(tensor.shape) == 2 and tensor.shape[0] == rows and tensor.shape[1] in widths, path, name + ": shape",
            " or ".join(str([rows, width]) for width in widths) or "none (by config.json)", tensor.shape)
    bits = widths[tensor.shape[1]]
    require(columns * bits % 8 == 0, path, name + ": columns", "an even number", columns)
    sizes = tensors.get(name[:-len("_packed")] + "_shape")
    if sizes is not None:
        used.add(sizes.name)
        require(sizes.dtype in ("I64", "I32") and sizes.shape == [2], path, sizes.name, "two integers", sizes.shape)
        found = struct.unpack("<2q" if sizes.dtype == "I64" else "<2i", b"".join(sizes.pieces()))
        require(list(found) == shape, path, sizes.name, shape, list(found))
    row_bytes = columns * bits // 8
    if bits == 4:
        whole = row_bytes == 4 * tensor.shape[1]
        return Output(ours, "U8", [rows, row_bytes], tensor if whole else PackedCodes(tensor, row_bytes, None))
    return Output(ours, "I8", shape, PackedCodes(tensor, row_bytes, bytes(byte ^ 0x80 for byte in range(256))))


def scales_of(scheme, tensor, ours, dtype, shape):
    """[rows] or [rows][groups]."""
    rows, columns = shape
    path, where, name = tensor.file.name, tensor.name + ": shape", ours + ".scale"
    require(tensor.dtype in SCALE_DTYPES, path, tensor.name + ": dtype", " or ".join(SCALE_DTYPES), tensor.dtype)
    if "channel" in scheme.strategies and tensor.shape in ([rows], [rows, 1]):
        return Output(name, tensor.dtype, [rows], Scales(tensor))
    if "tensor" in scheme.strategies and math.prod(tensor.shape) == 1:
        return Output(name, tensor.dtype, [rows], b"".join(Scales(tensor).pieces()) * rows)
    expected = ["[%d, 1]" % rows] * ("channel" in scheme.strategies) + ["[1]"] * ("tensor" in scheme.strategies)
    if "group" in scheme.strategies and dtype != "F8_E4M3":
        groups = -(-columns // scheme.group)
        if tensor.shape == [rows, groups]:      # of one group: a scale for each row
            return Output(name, tensor.dtype, [rows] if groups == 1 else tensor.shape, Scales(tensor))
        expected.append("[%d, %d]" % (rows, groups))
    if dtype == "F8_E4M3" and len(tensor.shape) == 2 and tensor.shape != [rows, 1]:
        refuse_blocks("%s: %s" % (path, tensor.name), scheme.block or [-(-size // max(n, 1)) for size, n in
                                                                       zip(shape, tensor.shape)])
    return require(False, path, where, " or ".join(expected) or "none (by config.json)", tensor.shape)


def check_rest(tensors, used):
    """What else belongs to quantised matrices: scales of activations are left out, whatever changes weights is refused."""
    left = sorted(name for name in tensors if name not in used and ACTIVATIONS.search(name))
    if left:
        used.update(left)
        kinds = sorted({ACTIVATIONS.search(name).group(1) for name in left})
        note("%s: %d tensors (%s) are left out: activations, keys and values are not quantised here" % (
            tensors[left[0]].file.name, len(left), ", ".join(kinds)))
    for name in sorted(set(tensors) - used):
        where = "%s: %s" % (tensors[name].file.name, show(name))
        if name.endswith("g_idx"):
            refuse(where, "columns in the order of their activations, expected their own: %s" % quantise_it("int4"))
        if name.endswith(".weight_zero_point"):
            if any(piece.strip(b"\0") for piece in tensors[name].pieces()):
                refuse(where, "codes with zero points, expected symmetric ones: %s" % quantise_it("int4"))
            used.add(name)
        elif find_scale({name: None}, name.rsplit(".", 1)[0]) and name.rsplit(".", 1)[0] + ".weight" in tensors:
            refuse(where, "scales of a matrix that is not quantised (%s), as before compression: save it compressed, or convert "
                   "the one that it was made from" % tensors[name.rsplit(".", 1)[0] + ".weight"].dtype)
        elif QUANTISED.search(name):
            refuse_quantised(where)


def check_alike(outputs):
    """Matrices that are multiplied by together have codes and scales of one kind."""
    by_name = {output.name: output for output in outputs}
    for output in outputs:
        others = {"wq": ("wk", "wv"), "w1": ("w3",)}.get(output.name.rsplit(".", 1)[-1], ())
        for other in others:
            name = output.name[:-2] + other
            kinds = [kind_of(by_name, output.name), kind_of(by_name, name)]
            if kinds[0] != kinds[1]:
                refuse(output.name, "%s, and %s is %s, expected both alike: quantise q_proj, k_proj and v_proj of a layer the "
                       "same way or none of them, and so gate_proj and up_proj" % (kinds[0], name, kinds[1]))


def kind_of(by_name, name):
    matrix, scale = by_name[name], by_name.get(name + ".scale")
    return matrix.dtype if scale is None else "%s with a scale (%s) for each %s" % (
        matrix.dtype, scale.dtype, "row" if len(scale.shape) == 1 else "group of columns")


# ---------------------------------------------------------------------------------------------------------------- bytes

class Fp8Codes:
    """F8_E4M3 codes, none of them NaN."""

    def __init__(self, tensor):
        self.tensor, (self.rows, self.row_bytes), self.n_bytes = tensor, tensor.shape, tensor.n_bytes

    def pieces(self, first, end):
        """Of rows [first, end)."""
        done = first * self.row_bytes
        for piece in self.tensor.pieces(done, READ_BYTES, end * self.row_bytes):
            for code in (b"\x7f", b"\xff"):
                if code in piece:
                    row, column = divmod(done + piece.index(code), self.row_bytes)
                    refuse(self.tensor.file.name, "%s[%d][%d]" % (self.tensor.name, row, column), "a finite number", "NaN")
            done += len(piece)
            yield piece


class PackedCodes:
    """Packed codes without the padding at the end of each row, their bytes by a table."""

    def __init__(self, tensor, row_bytes, table):
        self.tensor, self.row_bytes, self.table = tensor, row_bytes, table
        self.rows = tensor.shape[0]
        self.n_bytes = self.rows * row_bytes

    def pieces(self, first, end):
        """Of rows [first, end)."""
        width = 4 * self.tensor.shape[1]
        for piece in self.tensor.whole_pieces(first * width, max(READ_BYTES // width, 1) * width, end * width):
            if width != self.row_bytes:
                piece = b"".join([piece[at:at + self.row_bytes] for at in range(0, len(piece), width)])
            # (bytes.translate takes twice as long as bytearray's: it looks whether anything changes)
            yield piece if self.table is None else bytearray(piece).translate(self.table)


# For the highest byte of a number: whether it may be infinite or NaN.
NOT_FINITE = {"F16": bytes(byte & 0x7C == 0x7C for byte in range(256)),
              "BF16": bytes(byte & 0x7F == 0x7F for byte in range(256))}
NOT_FINITE["F32"] = NOT_FINITE["BF16"]


class Scales:
    """Scales, all of them finite."""

    def __init__(self, tensor):
        self.tensor, self.n_bytes = tensor, tensor.n_bytes

    def pieces(self):
        tensor, done = self.tensor, 0
        item = ITEM_BYTES[tensor.dtype]
        for piece in tensor.whole_pieces():
            if 1 in piece[item - 1::item].translate(NOT_FINITE[tensor.dtype]):
                wide = piece if tensor.dtype != "BF16" else b"".join(b"\0\0" + piece[i:i + 2] for i in range(0, len(piece), 2))
                n = len(piece) // item
                for i, value in enumerate(struct.unpack("<%d%s" % (n, "e" if tensor.dtype == "F16" else "f"), wide)):
                    require(math.isfinite(value), tensor.file.name, "%s: element %d" % (tensor.name, done + i),
                            "a finite number", value)
            done += len(piece) // item
            yield piece

    def copy_to(self, fd, progress):
        for piece in self.pieces():
            write_all(fd, piece, progress)


if __name__ == "__main__":
    print(__doc__)
