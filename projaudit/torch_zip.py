"""Files of torch.save (`.bin`, `.pt`, `.pth`) by ranges: where their tensors are; no unpickling."""

from __future__ import annotations

import math
import re
import stat
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeGuard

from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.inert import clean
from projaudit.safetensors_header import MAX_DIM, MAX_RANK, MAX_TENSORS, Entry, Header, TensorInfo
from projaudit.source import Source, refuse_lfs_pointer

MAGIC = b"PK\3\4"
PICKLE_LIMIT = 32 << 20
"""Bytes of data.pkl; a hundred thousand tensors take twice that."""
DIRECTORY_LIMIT = 100_000_000
"""Bytes of the zip's directory."""
TAIL = 64 << 10
"""Bytes that the first read of a file's end asks for; few directories are longer."""
ADVICE = "convert it to safetensors; projaudit never unpickles"

_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_ZIP64, _PADDING = 1, int.from_bytes(b"FB", "little")
# Besides the storages, everything that releases of torch have put into the files of torch.save.
_RECORDS = {
    "data.pkl", "byteorder", "version", ".format_version", ".storage_alignment",
    ".data/serialization_id", ".data/version",
}  # fmt: skip
_STORAGE = re.compile(r"data/([0-9]{1,20})", re.ASCII)
_OTHERS: Mapping[bytes, str] = {
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "gzipped",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"\xfd7zXZ": "compressed (xz)",
    b"Rar!": "a RAR archive",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
}

# --- what a state dict is made of: name in the pickle -> dtype as safetensors spells it, bytes ----

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

# What wraps a state dict, and what training leaves beside it that no loader takes for weights.
_WRAPPERS = {"model", "state_dict", "model_state_dict", "module", "weights", "net"}
_LEFTOVERS = {
    "optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "scheduler",
    "lr_scheduler", "lr_schedulers", "scheduler_state_dict", "scaler", "amp_scaler", "rng_state",
    "rng_states", "random_states", "callbacks", "loops",
}  # fmt: skip


BELOW = "below"
"""Key of a header's metadata: in what the tensors lie, where that is one level down."""


def read_torch_zip(source: Source, path: str) -> Header:
    """The tensors of a file that torch.save wrote: where each one's bytes are, none of them read.

    Reads the zip's directory at its end and data.pkl. That is interpreted by a machine that knows
    nothing but what state dicts are made of: it imports and calls nothing. Raises FormatError
    (`format.torch-zip`, `format.lfs-pointer`) for what is malformed or what two readers could take
    for two things; UnsupportedError (`unsupported.format`) for legacy pickles, archives of other
    kinds and pickles of anything but a state dict, flat or one level down (`{"model": {…}}`);
    LimitError (`limit.pickle-size`, `limit.tensors`); and what the source raises. The local
    headers of storages are checked by whoever reads their bytes: `check_frames`.
    """
    size = source.files[path].size
    head = source.read(path, 0, min(size, 512))
    refuse_lfs_pointer(head, path)
    if not head.startswith(MAGIC):
        raise _no_zip(head, path)
    entries = _entries(source, path, size)
    wanted = [entries[name] for name in ("data.pkl", "byteorder") if name in entries]
    if wanted[0].stop - wanted[0].data > PICKLE_LIMIT:
        raise LimitError(
            f"data.pkl has {wanted[0].stop - wanted[0].data} bytes, above {PICKLE_LIMIT}",
            "pickle-size",
            file=clean(path),
        )
    spans = [span for entry in wanted for span in (*entry.frame, (entry.data, entry.stop))]
    found = source.read_spans(path, spans)
    for number, entry in enumerate(wanted):
        _check_frame(entry, found[3 * number], found[3 * number + 1], path)
    if len(wanted) > 1 and found[5] != b"little":
        if found[5] == b"big":
            raise _unsupported(path, "holds big-endian numbers")
        raise _bad(path, f"says its byte order is {clean(found[5][:20])}", "byteorder")
    storages = {
        match[1]: entry for name, entry in entries.items() if (match := _STORAGE.fullmatch(name))
    }
    used: dict[str, _Storage] = {}
    tensors, below = _state_dict(_interpret(found[2], storages, used, path), path)
    unused = storages.keys() - used.keys()
    if unused:
        raise _bad(path, "is a storage of no tensor", f"data/{min(unused)}")
    return Header(
        {name: _info(name, tensor, path) for name, tensor in tensors.items()},
        {BELOW: below} if below else {},
        min((entry.data for entry in storages.values()), default=0),
    )


def frames(infos: Sequence[TensorInfo]) -> list[tuple[int, int]]:
    """The spans around the storages of tensors of one file, as `check_frames` wants their bytes."""
    return [span for entry in _entries_of(infos) for span in entry.frame]


def check_frames(infos: Sequence[TensorInfo], data: Sequence[bytes], path: str) -> None:
    """None, or FormatError if the bytes at `frames` put the tensors elsewhere.

    A loader goes by the local header, which the directory does not say the length of.
    """
    for number, entry in enumerate(_entries_of(infos)):
        _check_frame(entry, data[2 * number], data[2 * number + 1], path)


def _entries_of(infos: Sequence[TensorInfo]) -> list[Entry]:
    return list({info.entry.start: info.entry for info in infos if info.entry}.values())


# --- the zip --------------------------------------------------------------------------------------


def _entries(source: Source, path: str, size: int) -> dict[str, Entry]:
    """The entries by their name without the archive's own, all of the file covered by them."""
    at = max(0, size - TAIL)
    tail = source.read(path, at, size)
    start, stop, count = _end(tail, size, path)
    if stop - start > DIRECTORY_LIMIT or count > MAX_TENSORS:
        raise LimitError(f"{count} entries, above {MAX_TENSORS}", "tensors", file=clean(path))
    directory = tail[max(start - at, 0) : stop - at]
    if start < at:
        directory = source.read(path, start, min(at, stop)) + directory
    found = _directory(directory, count, path)
    if not found:
        raise _bad(path, "is an empty zip file")
    found.sort(key=lambda entry: entry[1])
    if found[0][1] != 0:
        raise _bad(path, "has bytes before its first entry", found[0][0])
    prefix = found[0][0].partition("/")[0] + "/"
    entries: dict[str, Entry] = {}
    offsets = [entry[1] for entry in found] + [start]
    for (name, offset, length, flags, crc, zip64), (_, end) in zip(
        found, pairwise(offsets), strict=True
    ):
        data_stop = end - ((24 if zip64 else 16) if flags & _DESCRIPTOR else 0)
        data = data_stop - length
        if not 30 <= data - offset - len(name.encode()) <= 30 + _MAX_16:
            fault = "overlaps the next" if data < offset + 30 else "leaves a hole before the next"
            raise _bad(path, fault, name)
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or not _is_plain(prefix):
            raise _bad(path, "lies outside of the archive's own folder", name)
        if inner == "constants.pkl" or inner.startswith("code/"):
            raise _unsupported(path, "holds a TorchScript program")
        if inner not in _RECORDS and not _STORAGE.fullmatch(inner):
            raise _bad(path, "is nothing that torch.save writes", name)
        if inner in entries:
            raise _bad(path, "stands twice", name)
        entries[inner] = Entry(name, offset, data, data_stop, end, flags, crc, zip64)
    if "data.pkl" not in entries:
        raise _bad(path, "holds no data.pkl, so it is no file of torch.save")
    return entries


def _is_plain(prefix: str) -> bool:
    return prefix.isprintable() and "\\" not in prefix and prefix not in ("/", "./", "../")


def _end(tail: bytes, size: int, path: str) -> tuple[int, int, int]:
    """(start, stop, entries) of the directory, by the end record and its zip64 double."""
    if len(tail) < 22 or tail[-22:-18] != b"PK\5\6":
        if b"PK\5\6" in tail:
            raise _bad(path, "has bytes after the end of its zip directory")
        raise _bad(path, "has no zip directory at its end: truncated")
    disk, first, here, count, length, start, comment = struct.unpack("<4H2LH", tail[-18:])
    if disk or first or comment or here != count:
        raise _bad(path, "has a comment or several disks")
    stop = size - 22
    if tail[-42:-38] == b"PK\6\7":
        disk, place, disks = struct.unpack("<LQL", tail[-38:-22])
        stop = size - 22 - 20 - 56
        if disk or disks != 1 or place != stop or tail[-98:-94] != b"PK\6\6":
            raise _bad(path, "has a zip64 locator that points elsewhere")
        more = struct.unpack("<Q2H2L4Q", tail[-94:-42])
        wide = more[5:]
        if more[0] != 44 or more[3] or more[4] or wide[0] != wide[1]:
            raise _bad(path, "has a malformed zip64 end record")
        narrow = ((count, _MAX_16), (length, _MAX_32), (start, _MAX_32))
        if any(
            said not in (most, true) for (said, most), true in zip(narrow, wide[1:], strict=True)
        ):
            raise _bad(path, "has two end records that differ")
        count, length, start = wide[1:]
    elif count == _MAX_16 or _MAX_32 in (length, start):
        raise _bad(path, "lacks the zip64 end record that it refers to")
    if start + length != stop:
        raise _bad(path, "has a directory that does not end where its end record begins")
    return start, stop, count


def _directory(data: bytes, count: int, path: str) -> list[tuple[str, int, int, int, int, bool]]:
    """(name, offset, length, flags, crc, zip64) of each entry."""
    found = []
    at = 0
    for _ in range(count):
        if data[at : at + 4] != b"PK\1\2" or len(data) < at + 46:
            raise _bad(path, "has a malformed directory")
        fields = struct.unpack("<6H3L5H2L", data[at + 4 : at + 46])
        _, need, flags, method, _, _, crc, packed, length = fields[:9]
        name_length, extra_length, comment, disk, _, attributes, offset = fields[9:]
        middle, at = at + 46 + name_length, at + 46 + name_length + extra_length
        if at > len(data):
            raise _bad(path, "has a malformed directory")
        raw, extra = data[middle - name_length : middle], data[middle:at]
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _bad(path, "has an entry whose name is not UTF-8") from None
        if flags & ~(_DESCRIPTOR | _UTF8) or method or need > 45 or disk or comment:
            fault = "is compressed" if method else "is encrypted, split or of an unknown kind"
            raise _bad(path, fault, name)
        # The low half is that of DOS: torch takes an entry with its bit of folders for empty.
        if attributes & _MAX_16 or stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG):
            raise _bad(path, "is a link or no regular file", name)
        zip64 = bool(extra)
        if zip64:
            wide = [value for value in (length, packed, offset) if value == _MAX_32]
            given = struct.pack("<2H", _ZIP64, 8 * len(wide))
            if not wide or extra[:4] != given or len(extra) != 4 + 8 * len(wide):
                raise _bad(path, "has extra fields that say more than its size", name)
            values = iter(struct.unpack(f"<{len(wide)}Q", extra[4:]))
            length, packed, offset = (
                next(values) if value == _MAX_32 else value for value in (length, packed, offset)
            )
        elif _MAX_32 in (length, packed, offset):
            raise _bad(path, "lacks the zip64 sizes that it refers to", name)
        if packed != length:
            raise _bad(path, "is stored in another size than its own", name)
        found.append((name, offset, length, flags, crc, zip64))
    if at != len(data):
        raise _bad(path, "has bytes in its directory that are no entry")
    return found


def _check_frame(entry: Entry, header: bytes, descriptor: bytes, path: str) -> None:
    """None, or FormatError where local header or descriptor disagree with the directory."""
    name, length = entry.name.encode(), entry.stop - entry.data
    need, flags, method, _, _, crc, packed, size, name_length, extra_length = struct.unpack(
        "<5H3L2H", header[4:30]
    )
    extra = header[30 + name_length :]
    later = bool(entry.flags & _DESCRIPTOR)
    sizes = {min(length, _MAX_32), _MAX_32 if entry.zip64 else length} | ({0} if later else set())
    if (
        header[:4] != MAGIC
        or (flags, method) != (entry.flags, 0)
        or need > 45
        or name_length != len(name)
        or header[30 : 30 + name_length] != name
        or len(extra) != extra_length
        or not {packed, size} <= sizes
        or crc not in ((entry.crc, 0) if later else (entry.crc,))
        or not _is_padding(extra, entry)
    ):
        raise _bad(path, "has a local header that disagrees with the directory", entry.name)
    form = "<4sL2Q" if entry.zip64 else "<4s3L"
    if later and descriptor != struct.pack(form, b"PK\7\x08", entry.crc, length, length):
        raise _bad(path, "has a descriptor that disagrees with the directory", entry.name)


def _is_padding(extra: bytes, entry: Entry) -> bool:
    """Whether extra fields are what aligns a storage, and sizes that are its own."""
    true = {0, entry.stop - entry.data, entry.start}
    while extra:
        if len(extra) < 4:
            return False
        kind, length = struct.unpack("<2H", extra[:4])
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if len(field) != length or kind not in (_ZIP64, _PADDING):
            return False
        if kind == _ZIP64 and (
            length % 8 or not {v for (v,) in struct.iter_unpack("<Q", field)} <= true
        ):
            return False
    return True


# --- the pickle -----------------------------------------------------------------------------------


Fail = Callable[[str], FormatError]
"""The error of that message, with the place in the pickle."""


@dataclass(frozen=True)
class _Name:
    """A global that the pickle names: a word, never what it stands for elsewhere."""

    text: str


@dataclass(frozen=True, eq=False)
class _Storage:
    kind: str
    dtype: str
    width: int
    count: int
    entry: Entry


@dataclass(frozen=True, eq=False)
class _Tensor:
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


def _interpret(
    data: bytes, storages: Mapping[str, Entry], used: dict[str, _Storage], path: str
) -> object:
    """What the pickle describes, in plain containers, `_Tensor`s and `_Name`s; fills `used`.

    The opcodes are those that state dicts of protocol 2 need, as in torch's own weights-only
    reader, and fewer things may be done with them.
    """
    stack: list[object] = []
    memo: dict[int, object] = {}
    at = 0

    def fail(message: str) -> FormatError:
        return _bad(path, f"{message} at byte {at}", "data.pkl")

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
        raise _unsupported(path, f"is pickled with protocol {data[1] if data[1:] else '?'}, not 2")
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
                    raise _unsupported(path, says, "do not unpickle it; ask for safetensors")
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
    pid: object, storages: Mapping[str, Entry], used: dict[str, _Storage], fail: Fail
) -> _Storage:
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
    if used.setdefault(key, _Storage(kind.text, dtype, width, count, entry)).kind != kind.text:
        raise fail(f"gives storage {key} two types")
    return used[key]


def _built(function: str, arguments: tuple[object, ...], path: str, fail: Fail) -> object:
    """What a function of the allow list makes of its arguments."""
    if function == _DICT and not arguments:
        return _Ordered()
    if function == _SIZE and len(arguments) == 1 and type(arguments[0]) is tuple:
        return arguments[0]
    if function == _PARAMETER and len(arguments) == 3 and type(arguments[0]) is _Tensor:
        return arguments[0]
    if function == _REBUILT and len(arguments) in (6, 7):
        storage, offset, shape, strides, *_ = arguments
        if type(storage) is _Storage:
            metadata = arguments[6] if len(arguments) == 7 else None
            dtype = (storage.dtype, storage.width)
            return _view(storage, dtype, offset, shape, strides, metadata, path, fail)
    if function == _REBUILT_AS and len(arguments) in (7, 8):
        storage, offset, shape, strides, _, _, named, *_ = arguments
        if type(storage) is _Storage and storage.kind == _UNTYPED:
            metadata = arguments[7] if len(arguments) == 8 else None
            if type(named) is _Name and named.text in _DTYPES:
                dtype = _DTYPES[named.text]
                return _view(storage, dtype, offset, shape, strides, metadata, path, fail)
    raise fail(f"calls {function.replace(' ', '.')} in an unknown way")


def _view(
    storage: _Storage,
    dtype: tuple[str, int],
    offset: object,
    shape: object,
    strides: object,
    metadata: object,
    path: str,
    fail: Fail,
) -> _Tensor:
    """A tensor within a storage, all of its elements inside and none of them twice."""
    if metadata:
        raise _unsupported(path, "holds tensors that are conjugated or negated as they are read")
    if type(offset) is not int or not _is_counts(shape) or not _is_counts(strides):
        raise fail("has a shape, strides or offset that are no counts")
    if len(shape) != len(strides) or len(shape) > MAX_RANK or offset < 0:
        raise fail("has a tensor of impossible shape")
    if any(number > MAX_DIM for number in (offset, *shape, *strides)):
        raise fail("has a tensor that is larger than any file")
    base, width = storage.entry.data, dtype[1]
    if 0 in shape:
        return _Tensor(dtype[0], shape, None, storage.entry, base, base)
    last = offset + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
    if (last + 1) * width > storage.count * storage.width:
        raise fail("has a tensor that reaches beyond its storage")
    reach = 1
    for stride, dim in sorted((s, d) for s, d in zip(strides, shape, strict=True) if d > 1):
        if stride < reach:
            raise _unsupported(path, "holds a tensor some of whose elements are the same memory")
        reach = stride * (dim - 1) + reach
    dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    plain = all(s == d or n == 1 for s, d, n in zip(strides, dense, shape, strict=True))
    start, stop = base + offset * width, base + (last + 1) * width
    return _Tensor(dtype[0], shape, None if plain else strides, storage.entry, start, stop)


def _is_counts(value: object) -> TypeGuard[tuple[int, ...]]:
    return type(value) is tuple and all(type(item) is int and item >= 0 for item in value)


# --- the state dict -------------------------------------------------------------------------------


def _state_dict(top: object, path: str) -> tuple[dict[str, _Tensor], str]:
    """The tensors by name, of a flat state dict or of one below a key; that key."""
    if not isinstance(top, dict):
        what = "one tensor" if type(top) is _Tensor else "no dict"
        raise _unsupported(path, f"holds {what}, where a state dict is expected")
    holders = _holders(top)
    direct = _tensors(top, path)
    nested = {key: value for key, value in top.items() if id(value) in holders}
    if not direct:
        nested = {key: value for key, value in nested.items() if key not in _LEFTOVERS}
    if not nested:
        return direct, ""
    shown = ", ".join(clean(repr(key), 40) for key in list(nested)[:3])
    wrapped = [key for key in nested if key in _WRAPPERS]
    flat = all(
        isinstance(value, dict) and not any(id(inner) in holders for inner in value.values())
        for value in nested.values()
    )
    if direct or not flat or (wrapped and len(nested) > 1):
        raise _unsupported(path, f"holds tensors in {shown}, beside or below a state dict")
    found: dict[str, _Tensor] = {}
    for key, value in nested.items():
        assert isinstance(value, dict)
        for name, tensor in _tensors(value, path).items():
            full = name if wrapped else f"{key}.{name}"
            if full in found:
                raise _bad(path, f"has the name {clean(repr(full), 80)} twice", "data.pkl")
            found[full] = tensor
    return found, shown


def _tensors(content: dict[object, object], path: str) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    for key, value in content.items():
        if type(value) is _Tensor:
            if not isinstance(key, str):
                raise _unsupported(path, "holds tensors under numbers, not names")
            found[key] = value
    if len(found) > MAX_TENSORS:
        raise LimitError(f"{len(found)} tensors, above {MAX_TENSORS}", "tensors", file=clean(path))
    return found


def _holders(top: object) -> set[int]:
    """The ids of all containers that hold a tensor, at any depth; circles are fine."""
    parents: dict[int, list[int]] = defaultdict(list)
    seen, todo = {id(top)}, [top]
    holders: set[int] = set()
    while todo:
        container = todo.pop()
        items = container.values() if isinstance(container, dict) else container
        for item in items:  # type: ignore[attr-defined]
            if type(item) in (_Tensor, _Storage):
                holders.add(id(container))
            elif isinstance(item, (dict, list, tuple)):
                parents[id(item)].append(id(container))
                if id(item) not in seen:
                    seen.add(id(item))
                    todo.append(item)
    rising = list(holders)
    while rising:
        for parent in parents[rising.pop()]:
            if parent not in holders:
                holders.add(parent)
                rising.append(parent)
    return holders


def _info(name: str, tensor: _Tensor, path: str) -> TensorInfo:
    return TensorInfo(
        name,
        tensor.dtype,
        tensor.shape,
        path,
        tensor.start,
        tensor.stop,
        tensor.strides,
        tensor.entry,
    )


# --- refusals -------------------------------------------------------------------------------------


def _no_zip(head: bytes, path: str) -> FormatError | UnsupportedError:
    what = next((says for magic, says in _OTHERS.items() if head.startswith(magic)), None)
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        what = "a legacy pickle, as torch wrote before 1.6"
    if head[257:262] == b"ustar":
        what = "a tar archive"
    if what:
        return _unsupported(path, f"is {what}")
    return _bad(path, "is no zip file of torch.save")


def _unsupported(path: str, message: str, remedy: str = ADVICE) -> UnsupportedError:
    return UnsupportedError(message, "format", file=clean(path), remedy=remedy)


def _bad(path: str, message: str, field: str | None = None) -> FormatError:
    return FormatError(
        message,
        "torch-zip",
        file=clean(path),
        field=None if field is None else clean(repr(field), 120),
    )
