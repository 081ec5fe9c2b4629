"""The strict GGUF header: any bytes give every tensor's place, or one FormatError."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.safetensors_header import MAX_DIM, Header, TensorInfo
from projaudit.source import Source, refuse_lfs_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 100_000_000
"""Bytes before the tensors; the tokenizers of text models take ten million."""
MAX_TENSORS = 100_000
"""The largest text models have ten thousand."""
MAX_KEYS = 100_000
MAX_STRINGS = 5_000_000
"""Strings within the arrays of one file."""
MAX_NAME = 255
"""Bytes of a key or name; llama.cpp allows names of 63."""
MAX_VALUE = 4_096
"""Bytes of a text that is kept."""
MAX_ARRAY = 64
"""Numbers of an array that is kept."""
MAX_RANK = 4
MAX_ALIGNMENT = 1 << 20
PROBE = 64 << 10
"""Bytes that the first read of a file asks for; the headers of projectors are shorter."""
_STEP = 4 << 20  # bytes that no read goes beyond

GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Number of a ggml type -> its name, elements of a block, bytes of a block (ggml.h)."""

_REMOVED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

# Value types of metadata: number -> struct code. Bool is 7, text 8, array 9.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _TEXT, _ARRAY, _U32 = 7, 8, 9, 4
_KEPT = ("general.", "clip.")
_ARCHITECTURE = "general.architecture"


def read_gguf_header(source: Source, path: str) -> Header:
    """The header of a GGUF file of a source, versions 2 and 3, little endian.

    Shapes are in torch's order, dtypes as ggml spells them (`Q8_0`, `F16`). `metadata` holds the
    numbers, short arrays of numbers and short texts of the keys `general.*` and `clip.*`, as text.
    One read of 64 KiB, and more of at most 4 MiB each where it is longer; long arrays of numbers
    are skipped unread, those of texts not kept. Raises what the source raises, and FormatError
    (`format.gguf`, `format.lfs-pointer`) unless the tensors follow each other to the end of the
    file, each on the next multiple of the alignment, as llama.cpp demands. Stricter in what it
    refuses besides: bytes after the last tensor, names that are no UTF-8 or hold NUL, arrays of
    arrays, and what is above the limits.
    """
    cursor = _Cursor(source, path)
    refuse_lfs_pointer(cursor.peek(), path)
    if cursor.take(4, "magic") != MAGIC:
        raise cursor.bad("does not begin as a GGUF file does")
    version = cursor.number("I", "version")
    if version not in VERSIONS:
        says = "is big-endian" if version & 0xFFFF == 0 else f"is of version {version}"
        raise cursor.bad(f"{says}; little-endian files of the versions 2 and 3 are read")
    tensors, keys = cursor.number("Q", "number of tensors"), cursor.number("Q", "number of keys")
    if tensors > MAX_TENSORS:
        raise cursor.bad(f"{tensors} tensors, above the limit of {MAX_TENSORS}")
    if keys > MAX_KEYS:
        raise cursor.bad(f"{keys} metadata keys, above the limit of {MAX_KEYS}")
    metadata, alignment = _metadata(cursor, keys)
    entries = [_entry(cursor) for _ in range(tensors)]
    return _placed(cursor, entries, metadata, alignment)


def architecture(source: Source, path: str) -> str | None:
    """What a GGUF file says first that it is: `clip`, or `llama` of a text model.

    None where its first key is another, empty where it is no GGUF file. Raises as
    `read_gguf_header` does.
    """
    cursor = _Cursor(source, path)
    refuse_lfs_pointer(cursor.peek(), path)
    if cursor.size < len(MAGIC) or cursor.take(len(MAGIC), "magic") != MAGIC:
        return ""
    cursor.skip(12, "number of tensors")
    if cursor.number("Q", "number of keys") and cursor.name("metadata key") == _ARCHITECTURE:
        return _text(cursor, _ARCHITECTURE) if cursor.number("I", _ARCHITECTURE) == _TEXT else None
    return None


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, str], int]:
    """The values that are kept, as text, and the alignment."""
    seen: set[str] = set()
    kept: dict[str, str] = {}
    alignment = 32
    for _ in range(count):
        key = cursor.name("metadata key")
        if key in seen:
            raise cursor.bad("stands twice", key)
        seen.add(key)
        kind = cursor.number("I", key)
        if kind == _ARRAY:
            numbers = _array(cursor, key)
            if numbers is not None and key.startswith(_KEPT):
                kept[key] = numbers
            continue
        value = _text(cursor, key) if kind == _TEXT else _scalar(cursor, kind, key)
        if key == "general.alignment":
            if kind != _U32 or not isinstance(value, int) or not _is_alignment(value):
                raise cursor.bad(f"is no power of two up to {MAX_ALIGNMENT}", key)
            alignment = value
        if key.startswith(_KEPT) and value is not None:
            kept[key] = value if isinstance(value, str) else str(value).lower()
    return kept, alignment


def _text(cursor: _Cursor, key: str) -> str | None:
    """A text; None where it is not kept."""
    length = cursor.number("Q", key)
    if length > MAX_VALUE or not key.startswith(_KEPT):
        cursor.skip(length, key)
        return None
    try:
        return cursor.take(length, key).decode("utf-8")
    except UnicodeDecodeError:
        raise cursor.bad("is not UTF-8", key) from None


def _scalar(cursor: _Cursor, kind: int, key: str) -> int | float | bool:
    if kind not in _SCALARS:
        raise cursor.bad(f"unknown value type {kind}", key)
    value = cursor.number(_SCALARS[kind], key)
    if kind != _BOOL:
        return value
    if value > 1:
        raise cursor.bad(f"is {value} and neither true nor false", key)
    return bool(value)


def _is_alignment(value: int) -> bool:
    return 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0


def _array(cursor: _Cursor, key: str) -> str | None:
    """The numbers of a short array, with commas between; None for others, which are skipped."""
    kind, length = cursor.number("I", key), cursor.number("Q", key)
    if kind in _SCALARS and length <= MAX_ARRAY:
        return ",".join(str(_scalar(cursor, kind, key)).lower() for _ in range(length))
    if kind in _SCALARS:
        cursor.skip(length * struct.calcsize(_SCALARS[kind]), key)
    elif kind == _TEXT:
        cursor.skip_texts(length, key)
    else:
        says = "is an array of arrays" if kind == _ARRAY else f"unknown value type {kind}"
        raise cursor.bad(says, key)
    return None


@dataclass(frozen=True)
class _Entry:
    """What a file says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def _entry(cursor: _Cursor) -> _Entry:
    name = cursor.name("tensor name")
    rank = cursor.number("I", name)
    if rank > MAX_RANK:
        raise cursor.bad(f"{rank} dimensions, above the limit of {MAX_RANK}", name)
    dims = [cursor.number("Q", name) for _ in range(rank)]
    if any(dim > MAX_DIM for dim in dims):
        raise cursor.bad("a dimension above 2^53", name)
    number = cursor.number("I", name)
    if number not in GGML_TYPES:
        old = _REMOVED.get(number)
        says = f"type {number} ({old}), which ggml removed" if old else f"unknown type {number}"
        raise cursor.bad(says, name)
    dtype, block, size = GGML_TYPES[number]
    if (dims[0] if dims else 1) % block:
        raise cursor.bad(
            f"rows of {dims[0] if dims else 1}, no multiple of {dtype}'s {block}", name
        )
    # Dimensions beyond any file whose product is nonetheless 0 overflow other readers.
    if math.prod(dim for dim in dims if dim) // block * size >= 1 << 63:
        raise cursor.bad("shape is larger than any file", name)
    nbytes = math.prod(dims) // block * size
    return _Entry(name, dtype, tuple(reversed(dims)), nbytes, cursor.number("Q", name))


def _placed(
    cursor: _Cursor, entries: list[_Entry], metadata: dict[str, str], alignment: int
) -> Header:
    """The header, if every tensor stands where the one before it ends."""

    def aligned(at: int) -> int:
        return -(-at // alignment) * alignment

    start = aligned(cursor.at)
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for entry in entries:
        if entry.name in tensors:
            raise cursor.bad("stands twice", entry.name)
        if entry.offset != aligned(end):
            fault = "overlaps the one before" if entry.offset < end else "is not where it belongs"
            raise cursor.bad(f"{fault}: offset {entry.offset}, not {aligned(end)}", entry.name)
        end = entry.offset + entry.nbytes
        at = start + entry.offset
        tensors[entry.name] = TensorInfo(
            entry.name, entry.dtype, entry.shape, cursor.path, at, at + entry.nbytes
        )
    if not entries:
        start = end = cursor.at
    stop = start + end if entries else cursor.at
    if stop > cursor.size:
        raise cursor.bad(f"tensors need {stop} bytes, the file has {cursor.size}: truncated")
    if cursor.size > aligned(stop):
        raise cursor.bad(f"{cursor.size - stop} bytes after the last tensor")
    return Header(tensors, metadata, start)


@dataclass
class _Cursor:
    """A place in a file, and the bytes around it that were read."""

    source: Source
    path: str
    at: int = 0
    strings: int = 0
    """Within arrays, so far."""
    size: int = field(init=False)
    _start: int = field(init=False, default=0)
    """Offset of the window."""
    _window: bytes = field(init=False, default=b"")

    def __post_init__(self) -> None:
        self.size = self.source.files[self.path].size

    def peek(self) -> bytes:
        """The first bytes of the file."""
        self._fill(0)
        return self._window

    def take(self, length: int, where: str) -> bytes:
        """The next bytes; those that are no part of the file are an error."""
        self._need(length, where)
        if self.at + length > self._start + len(self._window):
            self._fill(length)
        begin = self.at - self._start
        self.at += length
        return self._window[begin : begin + length]

    def number(self, code: str, where: str) -> int:
        """The next number of a struct code; floats too, which only metadata hold."""
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), where))[0]
        return value

    def name(self, what: str) -> str:
        """The next key or tensor name."""
        length = self.number("Q", what)
        if not 0 < length <= MAX_NAME:
            raise self.bad(f"{what} of {length} bytes, {MAX_NAME} are allowed")
        try:
            name = self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None
        if "\0" in name:
            raise self.bad(f"{what} holds a NUL", name)
        return name

    def skip(self, length: int, where: str) -> None:
        """Goes on behind that many bytes, which are not read if they are many."""
        self._need(length, where)
        self.at += length

    def skip_texts(self, count: int, where: str) -> None:
        """Goes on behind that many texts."""
        self._need(8 * count, where)
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise self.bad(f"more than {MAX_STRINGS} texts in arrays", where)
        for _ in range(count):
            # As take and skip would, without what they cost for a million tokens.
            begin = self.at - self._start
            if begin + 8 > len(self._window):
                self._need(8, where)
                self._fill(8)
                begin = 0
            self.at += 8 + int.from_bytes(self._window[begin : begin + 8], "little")
            if self.at > self.size:
                self._need(0, where)
        self._need(0, where)

    def _need(self, length: int, where: str) -> None:
        end = self.at + length
        if end > self.size:
            raise self.bad(f"needs {end} bytes, the file has {self.size}: truncated", where)
        if end > MAX_HEADER:
            raise self.bad(f"header of more than {MAX_HEADER} bytes", where)

    def _fill(self, length: int) -> None:
        """Reads from here on, twice as much as the last time, and what is asked for at least."""
        wanted = max(length, min(2 * len(self._window), _STEP), PROBE)
        self._window = self.source.read(self.path, self.at, min(self.at + wanted, self.size))
        self._start = self.at

    def bad(self, message: str, where: str | None = None) -> FormatError:
        """The error that the file is not as it should be."""
        return FormatError(
            message,
            "gguf",
            file=clean(self.path),
            field=None if where is None else clean(repr(where), 120),
        )
