"""The zip of a file of torch.save: where its entries lie, every byte of the file accounted for."""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Sequence
from itertools import pairwise

from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.inert import clean
from projaudit.safetensors_header import MAX_TENSORS, Entry, TensorInfo
from projaudit.source import Source

MAGIC = b"PK\3\4"
DIRECTORY_LIMIT = 100_000_000
"""Bytes of the zip's directory."""
TAIL = 64 << 10
"""Bytes that the first read of a file's end asks for; few directories are longer."""
ADVICE = "convert it to safetensors; projaudit never unpickles"
STORAGE = re.compile(r"data/([0-9]{1,20})", re.ASCII)
"""Names of the entries that hold tensors."""

_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_ZIP64, _PADDING = 1, int.from_bytes(b"FB", "little")
# Besides the storages, everything that releases of torch have put into the files of torch.save.
_RECORDS = {
    "data.pkl", "byteorder", "version", ".format_version", ".storage_alignment",
    ".data/serialization_id", ".data/version",
}  # fmt: skip


def entries_of(source: Source, path: str, size: int) -> dict[str, Entry]:
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
        raise bad(path, "is an empty zip file")
    found.sort(key=lambda entry: entry[1])
    if found[0][1] != 0:
        raise bad(path, "has bytes before its first entry", found[0][0])
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
            raise bad(path, fault, name)
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or not _is_plain(prefix):
            raise bad(path, "lies outside of the archive's own folder", name)
        if inner not in _RECORDS and not STORAGE.fullmatch(inner):
            raise bad(path, "is nothing that torch.save writes", name)
        if inner in entries:
            raise bad(path, "stands twice", name)
        entries[inner] = Entry(name, offset, data, data_stop, end, flags, crc, zip64)
    if "data.pkl" not in entries:
        raise bad(path, "holds no data.pkl, so it is no file of torch.save")
    return entries


def _is_plain(prefix: str) -> bool:
    return prefix.isprintable() and "\\" not in prefix and prefix not in ("/", "./", "../")


def _end(tail: bytes, size: int, path: str) -> tuple[int, int, int]:
    """(start, stop, entries) of the directory, by the end record and its zip64 double."""
    if len(tail) < 22 or tail[-22:-18] != b"PK\5\6":
        if b"PK\5\6" in tail:
            raise bad(path, "has bytes after the end of its zip directory")
        raise bad(path, "has no zip directory at its end: truncated")
    disk, first, here, count, length, start, comment = struct.unpack("<4H2LH", tail[-18:])
    if disk or first or comment or here != count:
        raise bad(path, "has a comment or several disks")
    stop = size - 22
    if tail[-42:-38] == b"PK\6\7":
        disk, place, disks = struct.unpack("<LQL", tail[-38:-22])
        stop = size - 22 - 20 - 56
        if disk or disks != 1 or place != stop or tail[-98:-94] != b"PK\6\6":
            raise bad(path, "has a zip64 locator that points elsewhere")
        more = struct.unpack("<Q2H2L4Q", tail[-94:-42])
        wide = more[5:]
        if more[0] != 44 or more[3] or more[4] or wide[0] != wide[1]:
            raise bad(path, "has a malformed zip64 end record")
        narrow = ((count, _MAX_16), (length, _MAX_32), (start, _MAX_32))
        if any(
            said not in (most, true) for (said, most), true in zip(narrow, wide[1:], strict=True)
        ):
            raise bad(path, "has two end records that differ")
        count, length, start = wide[1:]
    elif count == _MAX_16 or _MAX_32 in (length, start):
        raise bad(path, "lacks the zip64 end record that it refers to")
    if start + length != stop:
        raise bad(path, "has a directory that does not end where its end record begins")
    return start, stop, count


def _directory(data: bytes, count: int, path: str) -> list[tuple[str, int, int, int, int, bool]]:
    """(name, offset, length, flags, crc, zip64) of each entry."""
    found = []
    at = 0
    for _ in range(count):
        if data[at : at + 4] != b"PK\1\2" or len(data) < at + 46:
            raise bad(path, "has a malformed directory")
        fields = struct.unpack("<6H3L5H2L", data[at + 4 : at + 46])
        _, need, flags, method, _, _, crc, packed, length = fields[:9]
        name_length, extra_length, comment, disk, _, attributes, offset = fields[9:]
        middle, at = at + 46 + name_length, at + 46 + name_length + extra_length
        if at > len(data):
            raise bad(path, "has a malformed directory")
        raw, extra = data[middle - name_length : middle], data[middle:at]
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise bad(path, "has an entry whose name is not UTF-8") from None
        inside = name.partition("/")[2]
        if inside == "constants.pkl" or inside.startswith("code/"):  # which torch compresses
            raise unsupported(path, "holds a TorchScript program")
        if flags & ~(_DESCRIPTOR | _UTF8) or method or need > 45 or disk or comment:
            fault = "is compressed" if method else "is encrypted, split or of an unknown kind"
            raise bad(path, fault, name)
        # The low half is that of DOS: torch takes an entry with its bit of folders for empty.
        if attributes & _MAX_16 or stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG):
            raise bad(path, "is a link or no regular file", name)
        zip64 = bool(extra)
        if zip64:
            wide = [value for value in (length, packed, offset) if value == _MAX_32]
            given = struct.pack("<2H", _ZIP64, 8 * len(wide))
            if not wide or extra[:4] != given or len(extra) != 4 + 8 * len(wide):
                raise bad(path, "has extra fields that say more than its size", name)
            values = iter(struct.unpack(f"<{len(wide)}Q", extra[4:]))
            length, packed, offset = (
                next(values) if value == _MAX_32 else value for value in (length, packed, offset)
            )
        elif _MAX_32 in (length, packed, offset):
            raise bad(path, "lacks the zip64 sizes that it refers to", name)
        if packed != length:
            raise bad(path, "is stored in another size than its own", name)
        found.append((name, offset, length, flags, crc, zip64))
    if at != len(data):
        raise bad(path, "has bytes in its directory that are no entry")
    return found


def check_frame(entry: Entry, header: bytes, descriptor: bytes, path: str) -> None:
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
        raise bad(path, "has a local header that disagrees with the directory", entry.name)
    form = "<4sL2Q" if entry.zip64 else "<4s3L"
    if later and descriptor != struct.pack(form, b"PK\7\x08", entry.crc, length, length):
        raise bad(path, "has a descriptor that disagrees with the directory", entry.name)


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


def frames(infos: Sequence[TensorInfo]) -> list[tuple[int, int]]:
    """The spans around the storages of tensors of one file, as `check_frames` wants their bytes."""
    return [span for entry in _used(infos) for span in entry.frame]


def check_frames(infos: Sequence[TensorInfo], data: Sequence[bytes], path: str) -> None:
    """None, or FormatError if the bytes at `frames` put the tensors elsewhere.

    A loader goes by the local header, which the directory does not say the length of.
    """
    for number, entry in enumerate(_used(infos)):
        check_frame(entry, data[2 * number], data[2 * number + 1], path)


def _used(infos: Sequence[TensorInfo]) -> list[Entry]:
    return list({info.entry.start: info.entry for info in infos if info.entry}.values())


def unsupported(path: str, message: str, remedy: str = ADVICE) -> UnsupportedError:
    """The error for what other readers may take, with what to do."""
    return UnsupportedError(message, "format", file=clean(path), remedy=remedy)


def bad(path: str, message: str, field: str | None = None) -> FormatError:
    """The error for a malformed file, with the entry."""
    return FormatError(
        message,
        "torch-zip",
        file=clean(path),
        field=None if field is None else clean(repr(field), 120),
    )
