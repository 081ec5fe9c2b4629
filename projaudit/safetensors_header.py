"""The strict safetensors header: any bytes give every tensor's place, or one FormatError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.source import Source, refuse_lfs_pointer
from projaudit.strict import decode_json

MAX_HEADER = 100_000_000
"""Bytes of JSON, the format's own limit."""
MAX_TENSORS = 1_000_000
MAX_RANK = 16
MAX_DIM = 1 << 53
PROBE = 64 << 10
"""Bytes that the first read of a file asks for; few headers are longer."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element."""

_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """One file inside a zip, by what the zip's directory says of it; offsets in the outer file."""

    name: str
    start: int
    """Where its local header begins."""
    data: int
    stop: int
    """Its bytes, end exclusive; they stand right before the descriptor or the next entry."""
    end: int
    """Where the next entry begins."""
    flags: int
    crc: int
    zip64: bool

    @property
    def frame(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The spans before and after its bytes: local header and descriptor."""
        return (self.start, self.data), (self.stop, self.end)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, by where its bytes are."""

    name: str
    dtype: str
    """As safetensors spells it: `F32`, `BF16`, …; of a GGUF file as ggml does: `Q8_0`, …"""
    shape: tuple[int, ...]
    file: str
    """Path of its file in the source."""
    start: int
    stop: int
    """Byte offsets in the file, end exclusive."""
    strides: tuple[int, ...] | None = None
    """Steps between neighbours, in elements, where they are not those of rows in order."""
    entry: Entry | None = field(default=None, repr=False)
    """Where the file is a zip: what its bytes are in, to be checked when they are read."""
    added: float = 0.0
    """What a converter added to every value, which is taken off where the tensor is loaded."""

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file of weights says it holds."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    """Offset in the file at which the tensors begin."""


def parse_header(raw: bytes, *, file: str, size: int) -> Header:
    """The header of a file of `size` bytes that begins with `raw`.

    `raw` holds at least the length and the JSON, and may go on. Raises FormatError
    (`format.safetensors`) unless the tensors cover the rest of the file exactly: no hole, overlap
    or trailing byte. Stricter than the reference implementation in what it refuses besides: keys
    that stand twice, unknown keys, arrays in place of objects, dimensions above 2^53, more than 16
    of them, sizes that would overflow 64 bits but for a dimension of 0, and more than a million
    tensors.
    """
    length = _header_length(raw, file, size)
    if len(raw) < 8 + length:
        raise _bad(file, f"header of {length} bytes, {len(raw) - 8} given")
    content = decode_json(raw[8 : 8 + length], file=file, kind="safetensors")
    if not isinstance(content, dict):
        raise _bad(file, "header is no JSON object")
    metadata = _metadata(content.pop("__metadata__", {}), file)
    if len(content) > MAX_TENSORS:
        raise _bad(file, f"{len(content)} tensors, above the limit of {MAX_TENSORS}")
    start = 8 + length
    tensors = {name: _tensor(name, entry, file, start) for name, entry in content.items()}
    at = start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != at:
            fault = "overlaps the one before" if info.start < at else "leaves a hole before it"
            raise _bad(file, fault, info.name)
        at = info.stop
    if at < size:
        raise _bad(file, f"{size - at} bytes after the last tensor")
    if at > size:
        raise _bad(file, f"tensors need {at} bytes, the file has {size}: truncated")
    return Header(tensors, metadata, start)


def read_header(source: Source, path: str) -> Header:
    """The header of a file of a source: one read of 64 KiB, and a second where it is longer.

    Raises FormatError (`format.safetensors`, `format.lfs-pointer`), or what the source raises.
    """
    size = source.files[path].size
    raw = source.read(path, 0, min(size, PROBE))
    refuse_lfs_pointer(raw, path)
    stop = 8 + _header_length(raw, path, size)
    if stop > len(raw):
        raw += source.read(path, len(raw), stop)
    return parse_header(raw, file=path, size=size)


def _header_length(raw: bytes, file: str, size: int) -> int:
    if len(raw) < 8:
        raise _bad(file, f"{len(raw)} bytes are no safetensors file")
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER:
        raise _bad(file, f"says its header has {length} bytes, above the limit of {MAX_HEADER}")
    if 8 + length > size:
        raise _bad(file, f"says its header has {length} bytes, the file has {size}: truncated")
    return length


def _metadata(value: object, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _bad(file, "is no object of texts", "__metadata__")
    return value


def _tensor(name: str, entry: object, file: str, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _bad(file, "is no object of dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(file, f"unknown dtype {clean(dtype, 40)!r}", name)
    if not _is_counts(shape) or len(shape) > MAX_RANK or any(dim > MAX_DIM for dim in shape):
        raise _bad(file, f"shape is no list of at most {MAX_RANK} counts up to 2^53", name)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(file, "data_offsets is no pair of rising offsets", name)
    # Dimensions beyond any file whose product is nonetheless 0 overflow other readers.
    bits = math.prod(dim for dim in shape if dim) * DTYPE_BITS[dtype]
    if bits >= 1 << 64:
        raise _bad(file, "shape is larger than any file", name)
    if 0 in shape:
        bits = 0
    if bits != 8 * (offsets[1] - offsets[0]):
        given = offsets[1] - offsets[0]
        raise _bad(
            file, f"shape and dtype need {bits / 8:g} bytes, data_offsets give {given}", name
        )
    return TensorInfo(
        name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1]
    )


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _bad(file: str, message: str, field: str | None = None) -> FormatError:
    return FormatError(
        message,
        "safetensors",
        file=clean(file),
        field=None if field is None else clean(repr(field), 120),
    )
