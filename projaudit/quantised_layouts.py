"""Which tensors make a quantised weight, and its shape, layout by layout.

Read are the public layouts of bitsandbytes (nf4, fp4, int8), GPTQ, AWQ, FP8 and int8 with scales
per tensor, channel, group or block (transformers, compressed-tensors, quanto), compressed-tensors'
packed integers, nvfp4 and mxfp4, and MLX. Anything else has a reason why it is not read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.quantised_config import Declared, Unread
from projaudit.safetensors_header import TensorInfo
from projaudit.strict import load_json

ReadBytes = Callable[[TensorInfo], bytes]
"""Gives the bytes of a tensor."""
STATE_LIMIT = 16 << 10
"""Bytes of a tensor that says what shape another one has."""
MOST_STATES = 4096
"""Such tensors that are read in one checkpoint."""
ALIKE = 8
"""Layers of one name but for its numbers from which only the first says its shape."""
# They quantise what goes through a layer, not its weight: listed among its bytes, not interpreted.
_ACTIVATIONS = {
    "input_scale", "output_scale", "activation_scale", "input_global_scale", "input_zero_point",
}  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16"}
F8 = {"F8_E4M3", "F8_E5M2"}
_EXPONENTS = {"U8", "F8_E8M0"}
_NUMBER = re.compile(r"\d+")
_NEAREST = {
    "bitsandbytes4 nf4", "bitsandbytes4 fp4", "bitsandbytes8", "scaled fp8", "scaled quanto",
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A weight that several tensors make together."""

    name: str
    """Of the weight as a loader names it: `L.weight`."""
    shape: tuple[int, int]
    """(out, in)."""
    scheme: str
    """`bitsandbytes nf4`, `gptq`, …"""
    parts: Mapping[str, TensorInfo]
    """By their names below the layer: `qweight`, `weight.absmax`, …"""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Bits, group and block sizes, and what else the config and the shapes say."""

    @property
    def calibrated(self) -> bool:
        """Whether its quantisers move codes away from the nearest, to make up for other errors."""
        return self.scheme not in _NEAREST


class Shapes:
    """The shapes that small tensors hold, read for one of many layers that are alike."""

    def __init__(self, modules: Iterable[str], read: ReadBytes) -> None:
        self._read = read
        self._count = 0
        self._known: dict[tuple[object, ...], object] = {}
        self._alike: dict[str, int] = defaultdict(int)
        for module in modules:
            self._alike[_NUMBER.sub("#", module)] += 1

    def of(self, module: str, info: TensorInfo, kind: str, among: object) -> Any:
        """What the tensor says, or the same tensor of a layer that is alike in `among` too."""
        pattern = _NUMBER.sub("#", module)
        key = (pattern, info.nbytes, kind, among)
        many = self._alike[pattern] > ALIKE
        if many and key in self._known:
            return self._known[key]
        if info.nbytes > STATE_LIMIT:
            raise Unread(f"its {kind} has {info.nbytes} bytes, above {STATE_LIMIT}")
        self._count += 1
        if self._count > MOST_STATES:
            raise Unread(f"is one of more than {MOST_STATES} layers that differ in their names")
        found = parse_state(info, self._read(info))
        self._known[key] = found
        return found


def parse_state(info: TensorInfo, data: bytes) -> Mapping[str, Any] | tuple[int, ...]:
    """What a tensor that holds no weights says: bitsandbytes' JSON, or a shape.

    Raises FormatError (`format.quantised`) where it is neither.
    """
    if info.dtype == "U8":
        said = load_json(data, file=info.file, limit=STATE_LIMIT, kind="quantised")
        if not isinstance(said, dict):
            raise wrong(info, "is no JSON object")
        return said
    size = {"I64": 8, "I32": 4}.get(info.dtype)
    if size is None or len(data) != 2 * size:
        raise wrong(info, "is no pair of counts")
    numbers = tuple(int.from_bytes(data[i : i + size], "little", signed=True) for i in (0, size))
    if not all(0 < n < 1 << 31 for n in numbers):
        raise wrong(info, "is no pair of counts")
    return numbers


def wrong(info: TensorInfo, message: str) -> FormatError:
    return FormatError(message, "quantised", file=clean(info.file), field=clean(info.name))


Parts = Mapping[str, TensorInfo]


def understood(name: str, module: str, parts: Parts, declared: Declared, shapes: Shapes) -> Packed:
    """The weight that the parts of one layer make; Unread says why none."""
    weight = parts["weight"].dtype if "weight" in parts else ""
    if any(leaf.startswith("weight.quant_state.") for leaf in parts):
        return _bitsandbytes_4(name, module, parts, declared, shapes)
    if "SCB" in parts:
        return _bitsandbytes_8(name, parts, declared)
    if "qweight" in parts:
        return _gptq_or_awq(name, parts, declared)
    if "weight_packed" in parts:
        fp4 = parts["weight_packed"].dtype == "U8"
        return (_fp4 if fp4 else _integers)(name, module, parts, declared, shapes)
    if "weight._data" in parts:
        return _quanto(name, parts, declared)
    if weight == "U32":
        return _mlx(name, module, parts, declared)
    if weight in F8 | {"I8"}:
        return _scaled(name, parts, declared)
    if weight in _FLOATS:
        others = sorted(parts.keys() - {"weight"})
        raise Unread(f"is in full precision, and {clean(others[0])} beside it says quantised")
    raise Unread(_HOW)


_HOW = "is quantised or packed in a way that is not read"


def _take(parts: Parts, needed: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raises where a part is missing, or there is one that this layout does not have."""
    if missing := sorted(needed - parts.keys()):
        raise Unread(f"is quantised, and its {missing[0]} is missing")
    if more := sorted(parts.keys() - needed - optional):
        raise Unread(f"is quantised, and has {more[0]} too, which its layout does not")


def _fits(parts: Parts, leaf: str, dtypes: Set[str], *shapes: Sequence[int]) -> None:
    """Raises unless a part has one of those dtypes and shapes."""
    info = parts[leaf]
    if info.dtype not in dtypes:
        raise Unread(f"its {leaf} is {info.dtype}, not {' or '.join(sorted(dtypes))}")
    if info.shape not in {tuple(shape) for shape in shapes}:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise Unread(f"its {leaf} has shape {list(info.shape)}, its layout wants {wanted}")


def _matrix(parts: Parts, leaf: str, dtypes: Set[str]) -> tuple[int, int]:
    info = parts[leaf]
    if info.dtype not in dtypes or len(info.shape) != 2 or 0 in info.shape:
        raise Unread(
            f"its {leaf} is {info.dtype} of shape {list(info.shape)}, no matrix of "
            f"{' or '.join(sorted(dtypes))}"
        )
    return info.shape[0], info.shape[1]


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


def _bitsandbytes_4(
    name: str, module: str, parts: Parts, declared: Declared, shapes: Shapes
) -> Packed:
    kinds = [leaf for leaf in parts if leaf.startswith("weight.quant_state.")]
    if len(kinds) > 1:
        raise Unread("has two quant_states")
    declared.require("bitsandbytes")
    if declared.flag("load_in_8bit"):
        raise Unread("is stored in 4 bits, and the config says load_in_8bit")
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    needed = {"weight", "weight.absmax", "weight.quant_map", kinds[0]}
    _take(parts, needed | nested if nested & parts.keys() else needed)
    packed = parts["weight"]
    if packed.dtype not in {"U8", "I8", *_FLOATS} or max(packed.shape, default=0) != packed.numel:
        raise Unread("is no column of packed bytes")
    among = (packed.nbytes, parts["weight.absmax"].shape)
    state = shapes.of(module, parts[kinds[0]], "state", among)
    shape, numbers = bitsandbytes_state(state, kinds[0][-3:], bool(nested & parts.keys()))
    count = math.prod(shape)
    if packed.nbytes != _ceil(count, 2):
        raise Unread(f"has {packed.nbytes} bytes, and its quant_state a shape of {list(shape)}")
    blocks = _ceil(count, numbers["block"])
    _fits(parts, "weight.quant_map", {"F32"}, (16,))
    if "nested" in numbers:
        _fits(parts, "weight.absmax", {"U8"}, (blocks,))
        _fits(parts, "weight.nested_absmax", {"F32"}, (_ceil(blocks, numbers["nested"]),))
        _fits(parts, "weight.nested_quant_map", {"F32"}, (256,))
    else:
        _fits(parts, "weight.absmax", {"F32"}, (blocks,))
    return Packed(name, shape, f"bitsandbytes4 {kinds[0][-3:]}", parts, numbers)


def bitsandbytes_state(
    said: Mapping[str, Any], kind: str, nested: bool
) -> tuple[tuple[int, int], dict[str, int]]:
    """(shape, block sizes) of a quant_state; Unread where it is not as bitsandbytes writes it."""
    if said.get("quant_type") != kind:
        raise Unread(f"its quant_state is called {kind} and says {clean(said.get('quant_type'))}")
    shape = said.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        raise Unread("its quant_state has no shape")
    if len(shape) != 2:
        raise Unread(f"its shape {clean(shape, 60)} is no matrix's")
    numbers = {"block": said.get("blocksize")}
    if nested:
        numbers["nested"] = said.get("nested_blocksize")
        offset = said.get("nested_offset")
        if not isinstance(offset, float | int) or isinstance(offset, bool):
            raise Unread("its quant_state has no nested_offset")
    sizes = {key: n for key, n in numbers.items() if type(n) is int and 0 < n <= 1 << 16}
    if sizes.keys() != numbers.keys():
        raise Unread("its quant_state has a block size that is no count")
    return (shape[0], shape[1]), sizes


def _bitsandbytes_8(name: str, parts: Parts, declared: Declared) -> Packed:
    declared.require("bitsandbytes")
    if declared.flag("load_in_4bit"):
        raise Unread("is stored in 8 bits, and the config says load_in_4bit")
    _take(parts, {"weight", "SCB"}, {"weight_format"})
    shape = _matrix(parts, "weight", {"I8"})
    _fits(parts, "SCB", {"F32", "F16", "BF16"}, (shape[0],))
    if "weight_format" in parts:
        _fits(parts, "weight_format", {"U8"}, (), (1,))
    return Packed(name, shape, "bitsandbytes8", parts)


def _gptq_or_awq(name: str, parts: Parts, declared: Declared) -> Packed:
    _take(parts, {"qweight", "qzeros", "scales"}, {"g_idx"})
    rows, columns = _matrix(parts, "qweight", {"I32"})
    groups, out = _matrix(parts, "scales", _FLOATS)
    awq = out != columns
    method = declared.require(*(("awq",) if awq else ("gptq",)), silent=False)
    bits = declared.value("bits", int, 0)
    if bits not in ((4,) if awq else (2, 3, 4, 8)):
        raise Unread(f"{method} of {bits} bits is not read")
    # AutoGPTQ called it checkpoint_format, transformers and gptqmodel call it format.
    keys = ("version", "format") if awq else ("checkpoint_format", "format")
    layouts = {text.lower() for key in keys if (text := declared.value(key, str, ""))}
    layout = layouts.pop() if layouts else ("gemm" if awq else "gptq")
    if layouts or layout not in ({"gemm"} if awq else {"gptq", "gptq_v2"}):
        raise Unread(f"{method} laid out as {clean(layout, 40)!r} is not read")
    if declared.value("pack_dtype", str, "int32") != "int32":
        raise Unread("is packed in other words than int32")
    numbers = {"bits": bits, "offset": int(layout == "gptq")}
    if awq:
        if columns * 32 != out * bits or "g_idx" in parts:
            raise Unread(f"has a qweight of shape {[rows, columns]} for {out} outputs")
        inputs = rows
    else:
        inputs = rows * 32 // bits
        if rows * 32 % bits:
            raise Unread(f"has {rows} words of {bits} bits in a column")
    if out * bits % 32:
        raise Unread(f"has {out} outputs, which {bits} bits do not fill words with")
    size = declared.value("group_size", int, 128)
    size = inputs if size == -1 else size
    if size < 1 or _ceil(inputs, size) != groups:
        raise Unread(f"has {groups} groups of {size} for {inputs} inputs")
    _fits(parts, "qzeros", {"I32"}, (groups, out * bits // 32))
    if "g_idx" in parts:
        _fits(parts, "g_idx", {"I32"}, (inputs,))
    elif declared.flag("desc_act"):
        raise Unread("is quantised, and its g_idx is missing")
    numbers["group"] = size
    return Packed(name, (out, inputs), "awq" if awq else layout, parts, numbers)


def _integers(name: str, module: str, parts: Parts, declared: Declared, shapes: Shapes) -> Packed:
    """compressed-tensors' pack-quantized."""
    declared.require("compressed-tensors", silent=False)
    declared.refuse_more()
    _take(
        parts,
        {"weight_packed", "weight_scale", "weight_shape"},
        {"weight_zero_point", "weight_g_idx", *_ACTIVATIONS},
    )
    out, words = _matrix(parts, "weight_packed", {"I32"})
    _fits(parts, "weight_shape", {"I64", "I32"}, (2,))
    shape = shapes.of(module, parts["weight_shape"], "shape", (out, words))
    inputs = shape[1]
    # Older releases fill a word with whole values, newer ones with all bits: alike for 2, 4, 8.
    said = {declared.value("num_bits", int, 8, of=w) for w in declared.weights()}
    fitting = [bits for bits in sorted(said & {2, 4, 8}) if _ceil(inputs * bits, 32) == words]
    if shape[0] != out or len(fitting) != 1:
        raise Unread(
            f"has {words} words in a row for a shape of {list(shape)} and {sorted(said)} bits"
        )
    bits, numbers = fitting[0], _groups(parts["weight_scale"], out, inputs)
    if numbers.pop("block", 0):
        raise Unread("is packed, and has a scale for each block")
    if "weight_zero_point" in parts:
        _fits(
            parts, "weight_zero_point", {"I32"}, (_ceil(out * bits, 32), inputs // numbers["group"])
        )
    if "weight_g_idx" in parts:
        _fits(parts, "weight_g_idx", {"I32", "I64"}, (inputs,))
    return Packed(name, (out, inputs), "integers", parts, {**numbers, "bits": bits})


def _groups(scale: TensorInfo, out: int, inputs: int) -> dict[str, int]:
    """{group: inputs that share a scale}, with {block: 1} where the grid is not one of rows.

    A scale for each output, or for all, is a group of all inputs.
    """
    if scale.dtype not in _FLOATS | _EXPONENTS | {"F8_E4M3"}:
        raise Unread(f"its scale is {scale.dtype}, which is not read")
    shape = scale.shape
    if scale.numel == 1 or shape == (out,):
        return {"group": inputs}
    if len(shape) == 2 and shape[0] == out and shape[1] and inputs % shape[1] == 0:
        return {"group": inputs // shape[1]}
    if len(shape) == 2:
        return {"group": inputs, "block": 1}
    raise Unread(f"its scale has shape {list(shape)} for {[out, inputs]} weights")


def _fp4(name: str, module: str, parts: Parts, declared: Declared, shapes: Shapes) -> Packed:
    """compressed-tensors' nvfp4 and mxfp4."""
    declared.require("compressed-tensors")
    declared.refuse_more()
    nvidia = "weight_global_scale" in parts
    needed = {"weight_packed", "weight_scale"} | ({"weight_global_scale"} if nvidia else set())
    _take(parts, needed, _ACTIVATIONS)
    out, half = _matrix(parts, "weight_packed", {"U8"})
    size = 16 if nvidia else 32
    if 2 * half % size:
        raise Unread(f"has {2 * half} inputs, no multiple of {size}")
    dtypes = {"F8_E4M3"} if nvidia else _EXPONENTS
    _fits(parts, "weight_scale", dtypes, (out, 2 * half // size))
    if nvidia:
        _fits(parts, "weight_global_scale", {"F32"}, (), (1,))
    scheme = "nvfp4" if nvidia else "mxfp4"
    return Packed(name, (out, 2 * half), scheme, parts, {"group": size})


def _scaled(name: str, parts: Parts, declared: Declared) -> Packed:
    """8-bit floats or integers in the shape of the weight, with scales beside them."""
    inverse = "weight_scale_inv" in parts
    leaf = "weight_scale_inv" if inverse else "weight_scale"
    methods = ("fp8",) if inverse else ("compressed-tensors", "fbgemm_fp8", "fp8", "modelopt")
    _take(parts, {"weight", leaf}, {"weight_zero_point", *_ACTIVATIONS})
    declared.require(*methods)
    declared.refuse_more()
    dtypes = F8 if inverse else F8 | {"I8"}
    out, inputs = _matrix(parts, "weight", dtypes)
    numbers = _groups(parts[leaf], out, inputs)
    grid = parts[leaf].shape
    rows, columns = declared.block()
    blocks = declared.value("weight_block_size", list, None) is not None
    if inverse and (blocks or (len(grid) == 2 and parts[leaf].numel > 1)):
        numbers = {"block": 1}  # a grid by its config, also where it has a row for each output
    if numbers.pop("block", 0):
        if grid != (_ceil(out, rows), _ceil(inputs, columns)):
            raise Unread(
                f"has scales of shape {list(grid)} for {[out, inputs]} weights in blocks of "
                f"{[rows, columns]}"
            )
        numbers = {"rows": rows, "group": columns}
    if "weight_zero_point" in parts:
        if "rows" in numbers:
            raise Unread("has zero points for blocks")
        _fits(parts, "weight_zero_point", {"I8"}, parts[leaf].shape)
    kind = "int8" if parts["weight"].dtype == "I8" else "fp8"
    return Packed(name, (out, inputs), f"scaled {kind}", parts, numbers)


def _quanto(name: str, parts: Parts, declared: Declared) -> Packed:
    declared.require("quanto")
    _take(parts, {"weight._data", "weight._scale"}, _ACTIVATIONS)
    shape = _matrix(parts, "weight._data", F8 | {"I8"})
    _fits(parts, "weight._scale", _FLOATS, (shape[0], 1), (), (1,))
    return Packed(name, shape, "scaled quanto", parts, {"group": shape[1]})


def _mlx(name: str, module: str, parts: Parts, declared: Declared) -> Packed:
    declared.require("mlx", silent=False)
    said = declared.layer(module)
    mode = declared.value("mode", str, "affine", of=said)
    if mode != "affine":
        raise Unread(f"MLX's mode {clean(mode, 40)!r} is not read")
    _take(parts, {"weight", "scales", "biases"})
    bits = declared.value("bits", int, 4, of=said)
    size = declared.value("group_size", int, 64, of=said)
    out, words = _matrix(parts, "weight", {"U32"})
    inputs = words * 32 // bits if bits in (2, 3, 4, 5, 6, 8) else 0
    if size < 1 or inputs * bits != words * 32 or inputs % size:
        raise Unread(f"has {words} words in a row, for {bits} bits and groups of {size}")
    for leaf in ("scales", "biases"):
        _fits(parts, leaf, _FLOATS, (out, inputs // size))
    return Packed(name, (out, inputs), "mlx", parts, {"bits": bits, "group": size})
