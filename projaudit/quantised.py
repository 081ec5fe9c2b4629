"""Quantised weights: which tensors make one weight, its shape, and the values that they stand for.

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
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.safetensors_header import TensorInfo
from projaudit.strict import load_json

if TYPE_CHECKING:
    from torch import Tensor

ReadBytes = Callable[[TensorInfo], bytes]
"""Gives the bytes of a tensor."""

STATE_LIMIT = 16 << 10
"""Bytes of a tensor that says what shape another one has."""
MOST_STATES = 4096
"""Such tensors that are read in one checkpoint."""
ALIKE = 8
"""Layers of one name but for its numbers from which only the first says its shape."""

_BELOW_WEIGHT = {
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes__nf4",
    "bitsandbytes__fp4", "_data", "_scale",
}  # fmt: skip
_BESIDE = {
    "SCB", "weight_format", "qweight", "qzeros", "scales", "g_idx", "weight_scale_inv",
    "weight_scale", "weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx",
    "weight_global_scale", "biases", "input_scale", "output_scale", "activation_scale",
    "input_global_scale", "input_zero_point", "W_q", "codebooks",
}  # fmt: skip
# They quantise what goes through a layer, not its weight: listed among its bytes, not interpreted.
_ACTIVATIONS = {
    "input_scale", "output_scale", "activation_scale", "input_global_scale", "input_zero_point",
}  # fmt: skip
# What transformers takes for weight_scale_inv too, under an FP8 config.
_RENAMED_SCALES = {"scale", "qscale_weight"}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_F8 = {"F8_E4M3", "F8_E5M2"}
_EXPONENTS = {"U8", "F8_E8M0"}
_NUMBER = re.compile(r"\d+")

# bitsandbytes' own kernels take these, whatever quant_map a file brings
# (bitsandbytes 0.50, backends/utils.py).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(
    sign * value
    for sign in (1, -1)
    for value in (0.0, 0.005208333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
)
_E2M1 = tuple(sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
_NEAREST = {
    "bitsandbytes4 nf4", "bitsandbytes4 fp4", "bitsandbytes8", "scaled fp8", "scaled quanto",
}  # fmt: skip
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, modules/linear/gemm.py: nibble i is that column


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


@dataclass(frozen=True)
class Found:
    """The quantised weights of a checkpoint."""

    packed: Mapping[str, Packed]
    """By name of the weight."""
    unread: Mapping[str, tuple[str, str]]
    """Tensors that are a part of a weight that is not read -> (its name, why in one line)."""
    undeclared: bool = False
    """Whether there is a config and it declares no quantisation: transformers would load codes."""


class _Unread(Exception):
    """Why a layer's weight is not read."""


def find(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None, read: ReadBytes
) -> Found:
    """The weights that several of those tensors make together, and what is not understood.

    `config` is the parsed config.json; what it says must agree with the tensors. `read` is asked
    for the few bytes that hold a shape (of bitsandbytes' and packed weights), once for each group
    of layers that differ only in the numbers of their names. Raises what it raises.
    """
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if (split := _split(name, tensors)) is not None:
            modules[split[0]][split[1]] = info
    declared = _Declared(config)
    unread: dict[str, tuple[str, str]] = {}
    if declared.scales_f8:
        unread = {
            name: (name, "is stored in 8 bits, and the scale that the config promises is missing")
            for name, info in tensors.items()
            if name.endswith(".weight")
            and info.dtype in _F8
            and name.removesuffix(".weight") not in modules
        }
    packed: dict[str, Packed] = {}
    shapes = _Shapes(modules, read)
    for module, parts in modules.items():
        name = f"{module}.weight" if module else "weight"
        if name in tensors:
            parts["weight"] = tensors[name]
        try:
            packed[name] = _understood(name, module, parts, declared, shapes)
        except _Unread as why:
            unread |= {info.name: (name, str(why)) for info in parts.values()}
    return Found(packed, unread, config is not None and not declared.there)


_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignored_layers", "ignore")
# They quantise as they load, or take every module that is not left out for quantised and give it
# scales of their own where the file brings none (transformers 5.23; FP8 on a GPU only).
_TAKES_ALL = {"bitsandbytes", "quanto", "fp8", "fbgemm_fp8", "compressed-tensors", "awq"}


def rewrites(config: Mapping[str, object] | None, weights: Iterable[str]) -> str:
    """What a loader with this config makes of weights in full precision; empty where it takes them
    as they are stored: methods that quantise a decoder's blocks only, and modules left out."""
    declared = _Declared(config)
    try:
        method = declared.method
        skipped, groups = declared.texts(*_SKIPPED), declared.targets()
    except _Unread as why:
        return str(why)
    if method in _TAKES_ALL:
        for name in weights:
            module = name.removesuffix(".weight")
            if not any(_names(key, module) for key in skipped) and (
                not groups or any(_names(key, module) is not False for key in groups)
            ):
                return f"{method} quantises {clean(name, 100)}, or takes it for quantised"
        return ""
    known = {"gptq", "mlx"}
    return "" if method in known else f"quant_method {clean(method, 40)!r} is not known here"


_TAME = re.compile(r"(?:[\w^$-]|\\?\.|\.\*)+", re.ASCII)  # expressions that cannot take long


def _names(key: str, module: str) -> bool | None:
    """Whether a config's key for modules is of that one; None where it cannot be told.

    As transformers matches names, from the start or up to the end at whole segments, and
    compressed-tensors expressions (`re:…`), from the start.
    """
    short = module.removeprefix("model.")
    if key.startswith("re:"):
        pattern = key.removeprefix("re:")
        if len(pattern) > 200 or pattern.count("*") > 3 or not _TAME.fullmatch(pattern):
            return None
        try:
            return any(re.match(pattern, name) for name in (short, f"model.{short}"))
        except re.error:
            return None
    if "." not in key and key[:1].isupper():
        return None  # a class of modules
    path, part = f".{short}.", f".{key.removeprefix('model.')}."
    return path.startswith(part) or path.endswith(part)


def dequantise(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(values, step), both (out, in) fp32: what the parts stand for, and how far apart there
    the values are that they can stand for.

    Where the gaps on either side differ, the step is the wider one, so step²/12 is at least the
    variance of the rounding error. `parts` are as stored (unsigned words as int32). Raises
    FormatError (`format.quantised`) where their contents contradict each other.
    """
    return _DEQUANTISE[weight.scheme.partition(" ")[0]](weight, parts)


def _split(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """(module, name below it) of a part of a quantised weight, None for any other tensor."""
    path, _, last = name.rpartition(".")
    if last in _BESIDE:
        return path, last
    if last in _RENAMED_SCALES:
        weight = tensors.get(f"{path}.weight")
        return (path, last) if weight is not None and weight.dtype in _F8 else None
    if last in _BELOW_WEIGHT:
        below = f"quant_state.{last}" if last.startswith("bitsandbytes__") else last
        module = name.removesuffix(f"weight.{below}")
        if module != name and (not module or module.endswith(".")):
            return module.removesuffix("."), f"weight.{below}"
    return None


# --- what the config says -------------------------------------------------------------------------


# Where a config describes the language model; loaders take its quantisation for the whole model's.
_TEXT = {"text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator"}


class _Declared:
    """The quantisation that config.json declares, its values strictly typed."""

    def __init__(self, config: Mapping[str, object] | None) -> None:
        config = config or {}
        parts = {"": config, **{k: v for k, v in config.items() if isinstance(v, Mapping)}}
        keys = ("quantization_config", "compression_config", "quantization")
        found = [
            (key, part[key])
            for where, part in parts.items()
            for key in keys
            if part.get(key) and (not where or where in _TEXT or where.endswith("_config"))
        ]
        self.faults = [f"{key} is no object" for key, v in found if not isinstance(v, Mapping)]
        self.faults += [
            f"the config declares a quantisation in {clean(where, 60)}, where no loader looks"
            for where, part in parts.items()
            if where.endswith("_config") and where not in _TEXT and any(part.get(k) for k in keys)
        ]
        if any(value != found[0][1] for _, value in found):
            self.faults.append("the config declares two quantisations that differ")
        self.there = bool(found)
        self._key = found[0][0] if found else ""
        said = found[0][1] if found else {}
        self._said: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        self._is_mlx = any(key == "quantization" for key, _ in found)

    @property
    def method(self) -> str:
        """`quant_method`, empty where no quantisation is declared."""
        if self.faults:
            raise _Unread(self.faults[0])
        method: str = self.value("quant_method", str, "")
        if not method and self._is_mlx:
            return "mlx"
        if not method and (self.flag("load_in_4bit") or self.flag("load_in_8bit")):
            return "bitsandbytes"
        if not method and self.there:
            raise _Unread(f"{self._key} names no quant_method")
        return method.lower()

    @property
    def scales_f8(self) -> bool:
        """Whether 8-bit floats of this checkpoint need a scale."""
        try:
            return self.method in {"fp8", "fbgemm_fp8", "compressed-tensors"}
        except _Unread:
            return True

    def require(self, *methods: str, silent: bool = True) -> str:
        """The declared method, which is one of those; `silent`: or none is declared."""
        method = self.method
        if not method and not silent:
            raise _Unread(f"is laid out as {methods[0]}, and no quantization_config says how")
        if method and method not in methods:
            raise _Unread(f"is laid out as {methods[0]}, and the config says {clean(method, 40)!r}")
        return method

    def value(self, key: str, kind: type, default: Any, of: Mapping[str, Any] | None = None) -> Any:
        """The value of that key, which has that type; the default for none."""
        value = (self._said if of is None else of).get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise _Unread(f"{self._key}: {key} is no {_KINDS[kind]}")
        return value

    def flag(self, key: str) -> bool:
        """Whether that key is true."""
        return bool(self.value(key, bool, False))

    def texts(self, *keys: str) -> list[str]:
        """The texts of those lists."""
        lists = [self.value(key, list, []) for key in keys]
        return [text for texts in lists for text in texts if isinstance(text, str) and text]

    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale where the scales are a grid; 128 × 128 unless said."""
        sizes = [self.value("weight_block_size", list, None)]
        sizes += [self.value("block_structure", list, None, of=w) for w in self.weights()]
        given = [tuple(size) for size in sizes if size is not None] or [(128, 128)]
        if any(len(b) != 2 or any(type(n) is not int or n < 1 for n in b) for b in given):
            raise _Unread(f"{self._key}: the size of a block is no pair of counts")
        if len(set(given)) > 1:
            raise _Unread(f"{self._key}: blocks of several sizes")
        return given[0]

    def weights(self) -> list[Mapping[str, Any]]:
        """What compressed-tensors' groups say of weights."""
        groups = self.value("config_groups", dict, {}).values()
        if not all(isinstance(group, Mapping) for group in groups):
            raise _Unread(f"{self._key}: config_groups is no object of objects")
        found = [self.value("weights", dict, {}, of=group) for group in groups]
        return [weights for weights in found if weights]

    def targets(self) -> list[str]:
        """The modules that compressed-tensors' groups are of, by name, expression or class."""
        groups = self.value("config_groups", dict, {}).values()
        listed = [self.value("targets", list, [], of=g) for g in groups if isinstance(g, Mapping)]
        return [text for texts in listed for text in texts if isinstance(text, str)]

    def refuse_more(self) -> None:
        """Raises where compressed-tensors does more to a layer than to quantise it."""
        if self.value("transform_config", dict, {}):
            raise _Unread("transform_config turns what goes through the layers, which is not read")
        sparse = self.value("sparsity_config", dict, {}).get("format")
        if sparse not in (None, "dense"):
            raise _Unread(f"sparsity {clean(sparse, 40)!r} is not read")

    def layer(self, module: str) -> Mapping[str, Any]:
        """MLX: what is said of that layer, else of all."""
        own = self._said.get(module)
        if own is False:
            raise _Unread("is laid out as mlx, and the config says that it is not quantised")
        return own if isinstance(own, Mapping) else self._said


_KINDS: Mapping[type, str] = {
    str: "text", int: "whole number", bool: "true or false", list: "list", dict: "object",
}  # fmt: skip


# --- which tensors make a weight ------------------------------------------------------------------


class _Shapes:
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
            raise _Unread(f"its {kind} has {info.nbytes} bytes, above {STATE_LIMIT}")
        self._count += 1
        if self._count > MOST_STATES:
            raise _Unread(f"is one of more than {MOST_STATES} layers that differ in their names")
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
            raise _wrong(info, "is no JSON object")
        return said
    size = {"I64": 8, "I32": 4}.get(info.dtype)
    if size is None or len(data) != 2 * size:
        raise _wrong(info, "is no pair of counts")
    numbers = tuple(int.from_bytes(data[i : i + size], "little", signed=True) for i in (0, size))
    if not all(0 < n < 1 << 31 for n in numbers):
        raise _wrong(info, "is no pair of counts")
    return numbers


def _wrong(info: TensorInfo, message: str) -> FormatError:
    return FormatError(message, "quantised", file=clean(info.file), field=clean(info.name))


Parts = Mapping[str, TensorInfo]


def _understood(
    name: str, module: str, parts: Parts, declared: _Declared, shapes: _Shapes
) -> Packed:
    """The weight that the parts of one layer make; _Unread says why none."""
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
    if weight in _F8 | {"I8"}:
        return _scaled(name, parts, declared)
    if weight in _FLOATS:
        others = sorted(parts.keys() - {"weight"})
        raise _Unread(f"is in full precision, and {clean(others[0])} beside it says quantised")
    raise _Unread(_HOW)


_HOW = "is quantised or packed in a way that is not read"


def _take(parts: Parts, needed: Set[str], optional: Set[str] = frozenset()) -> None:
    """Raises where a part is missing, or there is one that this layout does not have."""
    if missing := sorted(needed - parts.keys()):
        raise _Unread(f"is quantised, and its {missing[0]} is missing")
    if more := sorted(parts.keys() - needed - optional):
        raise _Unread(f"is quantised, and has {more[0]} too, which its layout does not")


def _fits(parts: Parts, leaf: str, dtypes: Set[str], *shapes: Sequence[int]) -> None:
    """Raises unless a part has one of those dtypes and shapes."""
    info = parts[leaf]
    if info.dtype not in dtypes:
        raise _Unread(f"its {leaf} is {info.dtype}, not {' or '.join(sorted(dtypes))}")
    if info.shape not in {tuple(shape) for shape in shapes}:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise _Unread(f"its {leaf} has shape {list(info.shape)}, its layout wants {wanted}")


def _matrix(parts: Parts, leaf: str, dtypes: Set[str]) -> tuple[int, int]:
    info = parts[leaf]
    if info.dtype not in dtypes or len(info.shape) != 2 or 0 in info.shape:
        raise _Unread(
            f"its {leaf} is {info.dtype} of shape {list(info.shape)}, no matrix of "
            f"{' or '.join(sorted(dtypes))}"
        )
    return info.shape[0], info.shape[1]


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


def _bitsandbytes_4(
    name: str, module: str, parts: Parts, declared: _Declared, shapes: _Shapes
) -> Packed:
    kinds = [leaf for leaf in parts if leaf.startswith("weight.quant_state.")]
    if len(kinds) > 1:
        raise _Unread("has two quant_states")
    declared.require("bitsandbytes")
    if declared.flag("load_in_8bit"):
        raise _Unread("is stored in 4 bits, and the config says load_in_8bit")
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    needed = {"weight", "weight.absmax", "weight.quant_map", kinds[0]}
    _take(parts, needed | nested if nested & parts.keys() else needed)
    packed = parts["weight"]
    if packed.dtype not in {"U8", "I8", *_FLOATS} or max(packed.shape, default=0) != packed.numel:
        raise _Unread("is no column of packed bytes")
    among = (packed.nbytes, parts["weight.absmax"].shape)
    state = shapes.of(module, parts[kinds[0]], "state", among)
    shape, numbers = bitsandbytes_state(state, kinds[0][-3:], bool(nested & parts.keys()))
    count = math.prod(shape)
    if packed.nbytes != _ceil(count, 2):
        raise _Unread(f"has {packed.nbytes} bytes, and its quant_state a shape of {list(shape)}")
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
    """(shape, block sizes) of a quant_state; _Unread where it is not as bitsandbytes writes it."""
    if said.get("quant_type") != kind:
        raise _Unread(f"its quant_state is called {kind} and says {clean(said.get('quant_type'))}")
    shape = said.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        raise _Unread("its quant_state has no shape")
    if len(shape) != 2:
        raise _Unread(f"its shape {clean(shape, 60)} is no matrix's")
    numbers = {"block": said.get("blocksize")}
    if nested:
        numbers["nested"] = said.get("nested_blocksize")
        offset = said.get("nested_offset")
        if not isinstance(offset, float | int) or isinstance(offset, bool):
            raise _Unread("its quant_state has no nested_offset")
    sizes = {key: n for key, n in numbers.items() if type(n) is int and 0 < n <= 1 << 16}
    if sizes.keys() != numbers.keys():
        raise _Unread("its quant_state has a block size that is no count")
    return (shape[0], shape[1]), sizes


def _bitsandbytes_8(name: str, parts: Parts, declared: _Declared) -> Packed:
    declared.require("bitsandbytes")
    if declared.flag("load_in_4bit"):
        raise _Unread("is stored in 8 bits, and the config says load_in_4bit")
    _take(parts, {"weight", "SCB"}, {"weight_format"})
    shape = _matrix(parts, "weight", {"I8"})
    _fits(parts, "SCB", {"F32", "F16", "BF16"}, (shape[0],))
    if "weight_format" in parts:
        _fits(parts, "weight_format", {"U8"}, (), (1,))
    return Packed(name, shape, "bitsandbytes8", parts)


def _gptq_or_awq(name: str, parts: Parts, declared: _Declared) -> Packed:
    _take(parts, {"qweight", "qzeros", "scales"}, {"g_idx"})
    rows, columns = _matrix(parts, "qweight", {"I32"})
    groups, out = _matrix(parts, "scales", _FLOATS)
    awq = out != columns
    method = declared.require(*(("awq",) if awq else ("gptq",)), silent=False)
    bits = declared.value("bits", int, 0)
    if bits not in ((4,) if awq else (2, 3, 4, 8)):
        raise _Unread(f"{method} of {bits} bits is not read")
    # AutoGPTQ called it checkpoint_format, transformers and gptqmodel call it format.
    keys = ("version", "format") if awq else ("checkpoint_format", "format")
    layouts = {text.lower() for key in keys if (text := declared.value(key, str, ""))}
    layout = layouts.pop() if layouts else ("gemm" if awq else "gptq")
    if layouts or layout not in ({"gemm"} if awq else {"gptq", "gptq_v2"}):
        raise _Unread(f"{method} laid out as {clean(layout, 40)!r} is not read")
    if declared.value("pack_dtype", str, "int32") != "int32":
        raise _Unread("is packed in other words than int32")
    numbers = {"bits": bits, "offset": int(layout == "gptq")}
    if awq:
        if columns * 32 != out * bits or "g_idx" in parts:
            raise _Unread(f"has a qweight of shape {[rows, columns]} for {out} outputs")
        inputs = rows
    else:
        inputs = rows * 32 // bits
        if rows * 32 % bits:
            raise _Unread(f"has {rows} words of {bits} bits in a column")
    if out * bits % 32:
        raise _Unread(f"has {out} outputs, which {bits} bits do not fill words with")
    size = declared.value("group_size", int, 128)
    size = inputs if size == -1 else size
    if size < 1 or _ceil(inputs, size) != groups:
        raise _Unread(f"has {groups} groups of {size} for {inputs} inputs")
    _fits(parts, "qzeros", {"I32"}, (groups, out * bits // 32))
    if "g_idx" in parts:
        _fits(parts, "g_idx", {"I32"}, (inputs,))
    elif declared.flag("desc_act"):
        raise _Unread("is quantised, and its g_idx is missing")
    numbers["group"] = size
    return Packed(name, (out, inputs), "awq" if awq else layout, parts, numbers)


def _integers(name: str, module: str, parts: Parts, declared: _Declared, shapes: _Shapes) -> Packed:
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
        raise _Unread(
            f"has {words} words in a row for a shape of {list(shape)} and {sorted(said)} bits"
        )
    bits, numbers = fitting[0], _groups(parts["weight_scale"], out, inputs)
    if numbers.pop("block", 0):
        raise _Unread("is packed, and has a scale for each block")
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
        raise _Unread(f"its scale is {scale.dtype}, which is not read")
    shape = scale.shape
    if scale.numel == 1 or shape == (out,):
        return {"group": inputs}
    if len(shape) == 2 and shape[0] == out and shape[1] and inputs % shape[1] == 0:
        return {"group": inputs // shape[1]}
    if len(shape) == 2:
        return {"group": inputs, "block": 1}
    raise _Unread(f"its scale has shape {list(shape)} for {[out, inputs]} weights")


def _fp4(name: str, module: str, parts: Parts, declared: _Declared, shapes: _Shapes) -> Packed:
    """compressed-tensors' nvfp4 and mxfp4."""
    declared.require("compressed-tensors")
    declared.refuse_more()
    nvidia = "weight_global_scale" in parts
    needed = {"weight_packed", "weight_scale"} | ({"weight_global_scale"} if nvidia else set())
    _take(parts, needed, _ACTIVATIONS)
    out, half = _matrix(parts, "weight_packed", {"U8"})
    size = 16 if nvidia else 32
    if 2 * half % size:
        raise _Unread(f"has {2 * half} inputs, no multiple of {size}")
    dtypes = {"F8_E4M3"} if nvidia else _EXPONENTS
    _fits(parts, "weight_scale", dtypes, (out, 2 * half // size))
    if nvidia:
        _fits(parts, "weight_global_scale", {"F32"}, (), (1,))
    scheme = "nvfp4" if nvidia else "mxfp4"
    return Packed(name, (out, 2 * half), scheme, parts, {"group": size})


def _scaled(name: str, parts: Parts, declared: _Declared) -> Packed:
    """8-bit floats or integers in the shape of the weight, with scales beside them."""
    inverse = "weight_scale_inv" in parts
    leaf = "weight_scale_inv" if inverse else "weight_scale"
    methods = ("fp8",) if inverse else ("compressed-tensors", "fbgemm_fp8", "fp8", "modelopt")
    _take(parts, {"weight", leaf}, {"weight_zero_point", *_ACTIVATIONS})
    declared.require(*methods)
    declared.refuse_more()
    dtypes = _F8 if inverse else _F8 | {"I8"}
    out, inputs = _matrix(parts, "weight", dtypes)
    numbers = _groups(parts[leaf], out, inputs)
    grid = parts[leaf].shape
    rows, columns = declared.block()
    blocks = declared.value("weight_block_size", list, None) is not None
    if inverse and (blocks or (len(grid) == 2 and parts[leaf].numel > 1)):
        numbers = {"block": 1}  # a grid by its config, also where it has a row for each output
    if numbers.pop("block", 0):
        if grid != (_ceil(out, rows), _ceil(inputs, columns)):
            raise _Unread(
                f"has scales of shape {list(grid)} for {[out, inputs]} weights in blocks of "
                f"{[rows, columns]}"
            )
        numbers = {"rows": rows, "group": columns}
    if "weight_zero_point" in parts:
        if "rows" in numbers:
            raise _Unread("has zero points for blocks")
        _fits(parts, "weight_zero_point", {"I8"}, parts[leaf].shape)
    kind = "int8" if parts["weight"].dtype == "I8" else "fp8"
    return Packed(name, (out, inputs), f"scaled {kind}", parts, numbers)


def _quanto(name: str, parts: Parts, declared: _Declared) -> Packed:
    declared.require("quanto")
    _take(parts, {"weight._data", "weight._scale"}, _ACTIVATIONS)
    shape = _matrix(parts, "weight._data", _F8 | {"I8"})
    _fits(parts, "weight._scale", _FLOATS, (shape[0], 1), (), (1,))
    return Packed(name, shape, "scaled quanto", parts, {"group": shape[1]})


def _mlx(name: str, module: str, parts: Parts, declared: _Declared) -> Packed:
    declared.require("mlx", silent=False)
    said = declared.layer(module)
    mode = declared.value("mode", str, "affine", of=said)
    if mode != "affine":
        raise _Unread(f"MLX's mode {clean(mode, 40)!r} is not read")
    _take(parts, {"weight", "scales", "biases"})
    bits = declared.value("bits", int, 4, of=said)
    size = declared.value("group_size", int, 64, of=said)
    out, words = _matrix(parts, "weight", {"U32"})
    inputs = words * 32 // bits if bits in (2, 3, 4, 5, 6, 8) else 0
    if size < 1 or inputs * bits != words * 32 or inputs % size:
        raise _Unread(f"has {words} words in a row, for {bits} bits and groups of {size}")
    for leaf in ("scales", "biases"):
        _fits(parts, leaf, _FLOATS, (out, inputs // size))
    return Packed(name, (out, inputs), "mlx", parts, {"bits": bits, "group": size})


# --- the values -----------------------------------------------------------------------------------

_WORDS = 1 << 21  # values unpacked at once


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(rows, count) uint8 from (rows, words) int32: value i of a row is the `bits` bits of its
    little-endian words from bit `bits`·i on."""
    import torch

    at = torch.arange(count) * bits
    index, shift = at // 32, at % 32
    wide = torch.nn.functional.pad(words, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    out = torch.empty(words.shape[0], count, dtype=torch.uint8)
    step = max(1, _WORDS // max(count, 1))
    for first in range(0, words.shape[0], step):
        part = wide[first : first + step]
        low = part[:, index] >> shift
        # Shifts of 64-bit words by up to 32; what overflows is above the bits that are kept.
        high = part[:, index + 1] << (32 - shift)
        out[first : first + step] = ((low | high) & ((1 << bits) - 1)).to(torch.uint8)
    return out


def _gaps(levels: Sequence[float]) -> list[float]:
    """For each level, the wider of the gaps to the next lower and the next higher one."""
    order = sorted(set(levels))
    between = [b - a for a, b in pairwise(order)]
    wider = dict(zip(order, map(max, [0.0, *between], [*between, 0.0]), strict=True))
    return [wider[level] for level in levels]


def _leveled(codes: Tensor, levels: Sequence[float], scale: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    index = codes.long()
    return (
        torch.tensor(levels, dtype=torch.float32)[index] * scale,
        torch.tensor(_gaps(levels), dtype=torch.float32)[index] * scale.abs(),
    )


def _nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) half of every byte."""
    return packed & 0xF, packed >> 4


def _from_bitsandbytes_4(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    kind = weight.scheme[-3:]
    levels = _NF4 if kind == "nf4" else _FP4
    if not torch.allclose(parts["weight.quant_map"], torch.tensor(levels), rtol=0, atol=1e-5):
        raise _wrong(
            weight.parts["weight.quant_map"], f"is not {kind}'s, which is what bitsandbytes takes"
        )
    leaf = f"weight.quant_state.bitsandbytes__{kind}"
    said = parse_state(weight.parts[leaf], bytes(parts[leaf].tolist()))
    assert isinstance(said, Mapping)
    try:
        found = bitsandbytes_state(said, kind, "nested" in weight.numbers)
    except _Unread as why:
        raise _wrong(weight.parts[leaf], str(why)) from None
    if found != (weight.shape, weight.numbers):
        raise _wrong(weight.parts[leaf], "says another shape than layers of its name")
    count = math.prod(weight.shape)
    absmax, error = parts["weight.absmax"], None
    if "nested" in weight.numbers:
        table = parts["weight.nested_quant_map"]
        if not bool(torch.isfinite(table).all()):
            raise _wrong(weight.parts["weight.nested_quant_map"], "has NaN or Inf entries")
        outer = parts["weight.nested_absmax"].repeat_interleave(weight.numbers["nested"])
        outer, index = outer[: len(absmax)], absmax.long()
        absmax = table[index] * outer + float(said["nested_offset"])
        error = torch.tensor(_gaps(table.tolist()))[index] * outer.abs()
    size = weight.numbers["block"]
    scale = absmax.repeat_interleave(size)[:count]
    low, high = _nibbles(parts["weight"].contiguous().view(torch.uint8).reshape(-1))
    codes = torch.stack((high, low), dim=1).reshape(-1)[:count]
    values, step = _leveled(codes, levels, scale)
    if error is not None:  # of the scale itself
        code = torch.tensor(levels)[codes.long()].abs()
        step += code * error.repeat_interleave(size)[:count]
    return values.reshape(weight.shape), step.reshape(weight.shape)


def _from_bitsandbytes_8(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    layout = parts.get("weight_format")
    if layout is not None and int(layout.reshape(-1)[0]) != 0:
        raise _wrong(weight.parts["weight_format"], "is not `row`, the one that is loaded")
    step = (parts["SCB"].float() / 127)[:, None]
    values = parts["weight"].float() * step
    return values, step.abs().expand(values.shape)


def _by_input(groups: Tensor, weight: Packed, order: Tensor | None) -> Tensor:
    """(groups, out) → (in, out): each input's, by `g_idx` where there is one."""
    import torch

    if order is None:
        order = torch.arange(weight.shape[1]) // weight.numbers["group"]
    return groups[order.long()]


def _order(weight: Packed, parts: Mapping[str, Tensor], leaf: str, groups: int) -> Tensor | None:
    """The group of each input where a tensor says it; FormatError where there is none such."""
    order = parts.get(leaf)
    if order is None:
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise _wrong(weight.parts[leaf], f"names a group that is none of the {groups}")
    return order


def _from_gptq(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    out, inputs = weight.shape
    bits = weight.numbers["bits"]
    order = _order(weight, parts, "g_idx", parts["scales"].shape[0])
    codes = unpack(parts["qweight"].T.contiguous(), bits, inputs)
    # The first format stores zero points less one, and lets that wrap around.
    zeros = (unpack(parts["qzeros"], bits, out) + weight.numbers["offset"]) & ((1 << bits) - 1)
    scale = _by_input(parts["scales"].float(), weight, order).T
    return (codes.float() - _by_input(zeros.float(), weight, order).T) * scale, scale.abs()


def _from_awq(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    column = torch.arange(weight.shape[0])
    where = torch.tensor([_AWQ_ORDER.index(i) for i in range(8)])
    place = column // 8 * 8 + where[column % 8]
    codes, zeros = (unpack(parts[leaf], 4, len(column))[:, place] for leaf in ("qweight", "qzeros"))
    scale = _by_input(parts["scales"].float(), weight, None)
    values = (codes.float() - _by_input(zeros.float(), weight, None)) * scale
    return values.T.contiguous(), scale.abs().T


def _scale_of(stored: Tensor) -> Tensor:
    """A scale in fp32; whole numbers are exponents of two."""
    import torch

    if stored.dtype == torch.uint8:
        return (stored.float() - 127).exp2()
    return stored.float()


def _spread(groups: Tensor, weight: Packed) -> Tensor:
    """One value for all, each output, group or block -> (out, in)."""
    out, inputs = weight.shape
    if groups.numel() == 1:
        return groups.reshape(1, 1).expand(out, inputs)
    groups = groups.reshape(groups.shape[0], -1)
    if "rows" in weight.numbers:
        groups = groups.repeat_interleave(weight.numbers["rows"], dim=0)[:out]
    return groups.repeat_interleave(weight.numbers["group"], dim=1)[:, :inputs]


def _from_integers(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    out, inputs = weight.shape
    bits, size = weight.numbers["bits"], weight.numbers["group"]
    shape = parts["weight_shape"].tolist()
    if shape != [out, inputs]:
        raise _wrong(weight.parts["weight_shape"], "says another shape than layers of its name")
    middle, groups = 1 << (bits - 1), inputs // size
    order = _order(weight, parts, "weight_g_idx", groups)
    scale = _scale_of(parts["weight_scale"])
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(out, groups)
    scale = _by_input(scale.reshape(out, groups).T, weight, order).T
    zero: Tensor | int = middle
    if "weight_zero_point" in parts:
        # Packed along the outputs; both sides are shifted by the same half of the range.
        zeros = unpack(parts["weight_zero_point"].T.contiguous(), bits, out).float()
        zero = _by_input(zeros, weight, order).T
    codes = unpack(parts["weight_packed"], bits, inputs)
    return (codes.float() - zero) * scale, scale.abs()


def _from_fp4(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    scale = _scale_of(parts["weight_scale"])
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"].reshape(())
    codes = torch.stack(_nibbles(parts["weight_packed"]), dim=2).reshape(weight.shape)
    return _leveled(codes, _E2M1, _spread(scale, weight))


def _from_scaled(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    leaves = ("weight_scale_inv", "weight_scale", "weight._scale")
    scale = _spread(_scale_of(next(parts[leaf] for leaf in leaves if leaf in parts)), weight)
    codes = parts["weight._data" if "weight._data" in parts else "weight"]
    values = codes.float()
    if codes.dtype == torch.int8:
        if "weight_zero_point" in parts:
            values = values - _spread(parts["weight_zero_point"].float(), weight)
        return values * scale, scale.abs()
    mantissa, least = (3, -6) if codes.dtype == torch.float8_e4m3fn else (2, -14)
    exponent = (torch.frexp(values).exponent - 1).clamp_min(least) - mantissa
    return values * scale, exponent.float().exp2() * scale.abs()


def _from_mlx(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    codes = unpack(parts["weight"], weight.numbers["bits"], weight.shape[1])
    scale, bias = (_spread(parts[leaf].float(), weight) for leaf in ("scales", "biases"))
    return codes.float() * scale + bias, scale.abs()


_DEQUANTISE: Mapping[str, Callable[[Packed, Mapping[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "bitsandbytes4": _from_bitsandbytes_4,
    "bitsandbytes8": _from_bitsandbytes_8,
    "gptq": _from_gptq,
    "gptq_v2": _from_gptq,
    "awq": _from_awq,
    "integers": _from_integers,
    "nvfp4": _from_fp4,
    "mxfp4": _from_fp4,
    "scaled": _from_scaled,
    "mlx": _from_mlx,
}
