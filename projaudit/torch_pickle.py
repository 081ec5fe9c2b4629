"""The pickle of a state dict, read by a machine that knows nothing else: no import, no call."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.safetensors_header import MAX_DIM, MAX_RANK, Entry
from projaudit.torch_entries import bad, unsupported

# What a state dict is made of: name in the pickle -> dtype as safetensors spells it, bytes.
_STORAGES: Mapping[str, tuple[str, int]] = {
    "torch DoubleStorage": ("F64", 8),
    "torch FloatStorage": ("F32", 4),
    "torch HalfStorage": ("F16", 2),
    "torch BFloat16Storage": ("BF16", 2),
    "torch LongStorage": ("I64", 8),
    "torch IntStorage": ("I32", 4),
    "torch ShortStorage": ("I16", 2),
    "torch CharStorage": ("I8", 1),
    "torch ByteStorage": ("U8", 1),
    "torch BoolStorage": ("BOOL", 1),
    "torch ComplexFloatStorage": ("C64", 8),
    "torch ComplexDoubleStorage": ("C128", 16),
    "torch.storage UntypedStorage": ("U8", 1),
}
_DTYPES: Mapping[str, tuple[str, int]] = {
    "torch float64": ("F64", 8),
    "torch float32": ("F32", 4),
    "torch float16": ("F16", 2),
    "torch bfloat16": ("BF16", 2),
    "torch float8_e4m3fn": ("F8_E4M3", 1),
    "torch float8_e5m2": ("F8_E5M2", 1),
    "torch float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "torch float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "torch float8_e8m0fnu": ("F8_E8M0", 1),
    "torch int64": ("I64", 8),
    "torch int32": ("I32", 4),
    "torch int16": ("I16", 2),
    "torch int8": ("I8", 1),
    "torch uint64": ("U64", 8),
    "torch uint32": ("U32", 4),
    "torch uint16": ("U16", 2),
    "torch uint8": ("U8", 1),
    "torch bool": ("BOOL", 1),
    "torch complex64": ("C64", 8),
    "torch complex128": ("C128", 16),
}
_UNTYPED = "torch.storage UntypedStorage"
_REBUILT = "torch._utils _rebuild_tensor_v2"
_REBUILT_AS = "torch._utils _rebuild_tensor_v3"
_PARAMETER = "torch._utils _rebuild_parameter"
_SIZE = "torch Size"
_DICT = "collections OrderedDict"
_GLOBALS = {_REBUILT, _REBUILT_AS, _PARAMETER, _SIZE, _DICT, *_STORAGES, *_DTYPES}

Fail = Callable[[str], FormatError]
"""The error of that message, with the place in the pickle."""


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names: a word, never what it stands for elsewhere."""

    text: str


@dataclass(frozen=True, eq=False)
class Storage:
    """An entry of the zip that the pickle takes for numbers of one type."""

    kind: str
    dtype: str
    width: int
    count: int
    entry: Entry


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor within one: its dtype as safetensors spells it, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    entry: Entry
    start: int
    stop: int


class _Ordered(dict[object, object]):
    """An OrderedDict of the pickle, the one thing that may be given attributes."""


class _Mark:
    """Where a group of items on the stack begins."""


_CONSTANTS: Mapping[int, object] = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_TUPLES: Mapping[int, int] = {0x85: 1, 0x86: 2, 0x87: 3}
_INTEGERS: Mapping[int, str] = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}


def interpret(
    data: bytes, storages: Mapping[str, Entry], used: dict[str, Storage], path: str
) -> object:
    """What the pickle describes, in plain containers, `Tensor`s and `_Name`s; fills `used`.

    The opcodes are those that state dicts of protocol 2 need, as in torch's own weights-only
    reader, and fewer things may be done with them.
    """
    stack: list[object] = []
    memo: dict[int, object] = {}
    at = 0

    def fail(message: str) -> FormatError:
        return bad(path, f"{message} at byte {at}", "data.pkl")

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        if at > len(data):
            raise fail("ends within an item")
        return data[at - count : at]

    def pop() -> object:
        if not stack or stack[-1] is _Mark:
            raise fail("takes an item from an empty stack")
        return stack.pop()

    def group() -> list[object]:
        items: list[object] = []
        while True:
            if not stack:
                raise fail("closes a group that was not opened")
            item = stack.pop()
            if item is _Mark:
                return items[::-1]
            items.append(item)

    def line() -> str:
        nonlocal at
        stop = data.find(b"\n", at)
        if stop < 0:
            raise fail("ends within a name")
        text, at = data[at:stop], stop + 1
        return text.decode("utf-8")

    def append(items: Sequence[object]) -> None:
        target = stack[-1] if stack else None
        if type(target) is not list:
            raise fail("appends to what is no list")
        target.extend(items)

    def put(items: Sequence[object]) -> None:
        target = stack[-1] if stack else None
        if not isinstance(target, dict):
            raise fail("sets an item of what is no dict")
        if len(items) % 2:
            raise fail("sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise fail("has a key that is neither text nor a number")
            if key in target:
                raise fail(f"has the key {clean(repr(key), 80)} twice")
            target[key] = value

    if data[:1] != b"\x80":
        raise fail("is no pickle")
    if data[1:2] != b"\2":
        raise unsupported(path, f"is pickled with protocol {data[1] if data[1:] else '?'}, not 2")
    at = 2
    try:
        while True:
            (code,) = take(1)
            if code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            elif code in (ord("h"), ord("j")):  # BINGET, LONG_BINGET
                number = int.from_bytes(take(1 if code == ord("h") else 4), "little")
                if number not in memo:
                    raise fail("recalls what it never stored")
                stack.append(memo[number])
            elif code in (ord("q"), ord("r")):  # BINPUT, LONG_BINPUT
                number = int.from_bytes(take(1 if code == ord("q") else 4), "little")
                stack.append(pop())
                memo[number] = stack[-1]
            elif code in _INTEGERS:
                form = _INTEGERS[code]
                stack.extend(struct.unpack(form, take(struct.calcsize(form))))
            elif code == 0x8A:  # LONG1
                stack.append(int.from_bytes(take(take(1)[0]), "little", signed=True))
            elif code == ord("X"):  # BINUNICODE
                stack.append(take(int.from_bytes(take(4), "little")).decode("utf-8"))
            elif code == ord("("):
                stack.append(_Mark)
            elif code == ord("t"):
                stack.append(tuple(group()))
            elif code in _TUPLES:
                stack.append(tuple([pop() for _ in range(_TUPLES[code])][::-1]))
            elif code == ord("}"):
                stack.append({})
            elif code == ord("]"):
                stack.append([])
            elif code == ord("a"):
                item = pop()
                append([item])
            elif code == ord("e"):
                append(group())
            elif code == ord("s"):
                value, key = pop(), pop()
                put([key, value])
            elif code == ord("u"):
                put(group())
            elif code == ord("c"):  # GLOBAL
                name = f"{line()} {line()}"
                if name not in _GLOBALS:
                    shown = clean(name.replace(" ", "."), 80)
                    says = f"asks for {shown}, which is no part of a state dict"
                    raise unsupported(path, says, "do not unpickle it; ask for safetensors")
                stack.append(_Name(name))
            elif code == ord("Q"):  # BINPERSID
                stack.append(_storage(pop(), storages, used, fail))
            elif code == ord("R"):  # REDUCE
                arguments, function = pop(), pop()
                if type(function) is not _Name or type(arguments) is not tuple:
                    raise fail("calls what is no function")
                stack.append(_built(function.text, arguments, path, fail))
            elif code == ord("b"):  # BUILD
                state = pop()
                if not stack or type(stack[-1]) is not _Ordered:
                    raise fail("sets attributes of what is no OrderedDict")
                # Any other one could hide the methods by which a loader reads the dict.
                if not isinstance(state, dict) or state.keys() - {"_metadata"}:
                    raise fail("sets attributes other than _metadata")
            elif code == ord("."):
                value = pop()
                if stack or at != len(data):
                    raise fail("has something left at its end")
                return value
            else:
                raise fail(f"has opcode 0x{code:02x}, which is no part of a state dict")
    except UnicodeDecodeError:
        raise fail("has a text that is not UTF-8") from None


def _storage(
    pid: object, storages: Mapping[str, Entry], used: dict[str, Storage], fail: Fail
) -> Storage:
    """The storage that a persistent id ("storage", type, key, device, count) refers to."""
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
        raise fail("refers to something that is no storage")
    _, kind, key, device, count = pid
    if type(kind) is not _Name or kind.text not in _STORAGES or type(device) is not str:
        raise fail("has a storage of no known type")
    if type(key) is not str or key not in storages:
        raise fail(f"refers to the storage {clean(repr(key), 40)}, which is not there")
    dtype, width = _STORAGES[kind.text]
    entry = storages[key]
    if type(count) is not int or count * width != entry.stop - entry.data:
        raise fail(f"gives storage {key} another size than the zip does")
    # torch keeps the first type that it sees of a storage.
    if used.setdefault(key, Storage(kind.text, dtype, width, count, entry)).kind != kind.text:
        raise fail(f"gives storage {key} two types")
    return used[key]


def _built(function: str, arguments: tuple[object, ...], path: str, fail: Fail) -> object:
    """What a function of the allow list makes of its arguments."""
    if function == _DICT and not arguments:
        return _Ordered()
    if function == _SIZE and len(arguments) == 1 and type(arguments[0]) is tuple:
        return arguments[0]
    if function == _PARAMETER and len(arguments) == 3 and type(arguments[0]) is Tensor:
        return arguments[0]
    if function == _REBUILT and len(arguments) in (6, 7):
        storage, offset, shape, strides, *_ = arguments
        if type(storage) is Storage:
            metadata = arguments[6] if len(arguments) == 7 else None
            dtype = (storage.dtype, storage.width)
            return _view(storage, dtype, offset, shape, strides, metadata, path, fail)
    if function == _REBUILT_AS and len(arguments) in (7, 8):
        storage, offset, shape, strides, _, _, named, *_ = arguments
        if type(storage) is Storage and storage.kind == _UNTYPED:
            metadata = arguments[7] if len(arguments) == 8 else None
            if type(named) is _Name and named.text in _DTYPES:
                dtype = _DTYPES[named.text]
                return _view(storage, dtype, offset, shape, strides, metadata, path, fail)
    raise fail(f"calls {function.replace(' ', '.')} in an unknown way")


def _view(
    storage: Storage,
    dtype: tuple[str, int],
    offset: object,
    shape: object,
    strides: object,
    metadata: object,
    path: str,
    fail: Fail,
) -> Tensor:
    """A tensor within a storage, all of its elements inside and none of them twice."""
    if metadata:
        raise unsupported(path, "holds tensors that are conjugated or negated as they are read")
    if type(offset) is not int or not _is_counts(shape) or not _is_counts(strides):
        raise fail("has a shape, strides or offset that are no counts")
    if len(shape) != len(strides) or len(shape) > MAX_RANK or offset < 0:
        raise fail("has a tensor of impossible shape")
    if any(number > MAX_DIM for number in (offset, *shape, *strides)):
        raise fail("has a tensor that is larger than any file")
    base, width = storage.entry.data, dtype[1]
    if 0 in shape:
        return Tensor(dtype[0], shape, None, storage.entry, base, base)
    last = offset + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
    if (last + 1) * width > storage.count * storage.width:
        raise fail("has a tensor that reaches beyond its storage")
    reach = 1
    for stride, dim in sorted((s, d) for s, d in zip(strides, shape, strict=True) if d > 1):
        if stride < reach:
            raise unsupported(path, "holds a tensor some of whose elements are the same memory")
        reach = stride * (dim - 1) + reach
    dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    plain = all(s == d or n == 1 for s, d, n in zip(strides, dense, shape, strict=True))
    start, stop = base + offset * width, base + (last + 1) * width
    return Tensor(dtype[0], shape, None if plain else strides, storage.entry, start, stop)


def _is_counts(value: object) -> TypeGuard[tuple[int, ...]]:
    return type(value) is tuple and all(type(item) is int and item >= 0 for item in value)
