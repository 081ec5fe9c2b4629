"""Where files live: a folder at a fixed state, and reading exact byte ranges of local files."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from projaudit.errors import (
    FormatError,
    IntegrityError,
    LimitError,
    NotFoundError,
    ProjauditError,
)
from projaudit.inert import clean
from projaudit.refs import WEIGHT_SUFFIXES, Ref

MAX_FILES = 100_000
"""Files that a local folder may hold before it is refused."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""First bytes of what `git clone` without LFS leaves in place of a large file."""

# One read(2) moves at most 2 GiB minus a page.
_LARGEST_READ = 1 << 30


@dataclass(frozen=True)
class RepoFile:
    """One file of a source, as its listing describes it."""

    path: str
    """POSIX path relative to the root of the source."""
    size: int
    """Bytes."""
    sha256: str | None = None
    """SHA-256 of the content (LFS object id), 64 hex, where the listing says it."""
    oid: str | None = None
    """Git blob id, where the listing says it."""

    @property
    def content(self) -> str | None:
        """What names the content, where the listing says it: SHA-256, else git blob id."""
        return self.sha256 or self.oid


@dataclass
class Traffic:
    """What has crossed the network so far; stays zero for local files."""

    requests: int = 0
    bytes: int = 0
    from_cache: int = 0
    """Bytes that a cache supplied instead."""


class Source(Protocol):
    """A folder of files at a fixed state, read by exact byte ranges."""

    @property
    def ref(self) -> Ref:
        """The reference that it was opened from."""

    @property
    def name(self) -> str:
        """For display: the repository id, or the path as typed."""

    @property
    def commit(self) -> str | None:
        """40 hex digits that pin the state; None for local files."""

    @property
    def files(self) -> Mapping[str, RepoFile]:
        """The files by their POSIX relative path."""

    @property
    def traffic(self) -> Traffic:
        """The counter of what crossed the network."""

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` (end exclusive) of a file, or an error."""

    def read_spans(self, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span (start, stop), in the order asked for."""

    def read_small(self, path: str, limit: int) -> bytes:
        """The whole of a small file, and no Git LFS pointer; LimitError above `limit` bytes."""

    def at_hand(self, path: str) -> bool:
        """Whether reading all of a file costs no network."""

    def whole(self, path: str) -> Path:
        """Where all of a file lies on this machine, for what reads paths; fetched if need be."""


def refuse_lfs_pointer(head: bytes, file: str) -> None:
    """None, or FormatError (`format.lfs-pointer`) if the file begins as a Git LFS pointer."""
    if head.startswith(LFS_POINTER):
        raise FormatError(
            "is a Git LFS pointer, not the file itself",
            "lfs-pointer",
            file=clean(file),
            remedy="run `git lfs pull` in the folder, or download the repository again",
        )


def open_local(ref: Ref) -> LocalSource:
    """The local folder or single file of a reference, listed.

    Links to files are followed (snapshots of the Hub cache are made of them), links to folders
    and `.git` are not. Raises NotFoundError (`not-found.path`), FormatError (`format.file`) for
    what is no regular file, LimitError (`limit.files`).
    """
    if ref.path is None:
        raise ValueError(f"{ref!r} is no local reference")
    try:
        state = ref.path.stat()
    except OSError as error:
        raise NotFoundError(_reason(error), "path", file=clean(ref.text)) from None
    if stat.S_ISDIR(state.st_mode):
        return LocalSource(ref, ref.path, *_list_folder(ref))
    if not stat.S_ISREG(state.st_mode):
        raise FormatError("is neither a regular file nor a folder", "file", file=clean(ref.text))
    name = ref.path.name
    return LocalSource(
        ref, ref.path.parent, {name: RepoFile(name, state.st_size)}, {name: file_identity(state)}
    )


@dataclass(frozen=True)
class LocalSource:
    """Files of a local folder, or one file, as they were when it was opened."""

    ref: Ref
    root: Path
    files: Mapping[str, RepoFile]
    _states: Mapping[str, tuple[int, ...]] = field(repr=False)
    commit: str | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def name(self) -> str:
        """The path as typed."""
        return self.ref.text

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` of a file.

        Raises NotFoundError (`not-found.file`), FormatError (`format.truncated`, `format.file`)
        or IntegrityError (`integrity.changed`) where the file is not what was listed.
        """
        return self.read_spans(path, [(start, stop)])[0]

    def read_spans(self, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span, in order; raises as `read`."""
        # pread, not mmap: a mapped file that shrinks kills the process.
        descriptor = self._open(path)
        try:
            return [pread(descriptor, path, start, stop) for start, stop in spans]
        except OSError as error:
            raise FormatError(_reason(error), "file", file=clean(path)) from None
        finally:
            os.close(descriptor)

    def read_small(self, path: str, limit: int) -> bytes:
        """The whole file; raises LimitError (`limit.file-size`) above `limit`, or as `read`."""
        size = self._listed(path).size
        if size > limit:
            raise too_long(path, size, limit)
        data = self.read(path, 0, size)
        refuse_lfs_pointer(data, path)
        return data

    def at_hand(self, path: str) -> bool:
        """Always: local files are."""
        return path in self.files

    def whole(self, path: str) -> Path:
        """The file itself, if it is still what was listed; raises as `read`."""
        os.close(self._open(path))
        return self.root / path

    def _listed(self, path: str) -> RepoFile:
        if path not in self.files:
            raise NotFoundError("no such file", "file", file=clean(path))
        return self.files[path]

    def _open(self, path: str) -> int:
        self._listed(path)
        try:
            # Without O_NONBLOCK a file swapped for a pipe would block here for ever.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self.root / path, flags)
        except OSError as error:
            raise FormatError(_reason(error), "file", file=clean(path)) from None
        problem = _problem(self._states[path], os.fstat(descriptor), path)
        if problem is not None:
            os.close(descriptor)
            raise problem
        return descriptor


def too_long(path: str, size: int, limit: int) -> LimitError:
    """The error that a file is larger than what is read of its kind."""
    return LimitError(f"{size} bytes, above the limit of {limit}", "file-size", file=clean(path))


def pread(descriptor: int, path: str, start: int, stop: int) -> bytes:
    """Exactly the bytes `start` to `stop` of an open file; raises FormatError where it ends."""
    if not 0 <= start <= stop:
        raise ValueError(f"no span: {start} to {stop}")
    parts: list[bytes] = []
    at = start
    while at < stop:
        part = os.pread(descriptor, min(stop - at, _LARGEST_READ), at)
        if not part:
            raise _truncated(path, at, stop)
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def file_identity(state: os.stat_result) -> tuple[int, ...]:
    """What tells a file on disk from any other, and from itself after a change; its size first."""
    return (state.st_size, state.st_dev, state.st_ino, state.st_mtime_ns)


def _list_folder(ref: Ref) -> tuple[dict[str, RepoFile], dict[str, tuple[int, ...]]]:
    files: dict[str, RepoFile] = {}
    states: dict[str, tuple[int, ...]] = {}
    assert ref.path is not None
    pending = [(ref.path, "")]
    seen = 0
    while pending:
        folder, prefix = pending.pop()
        try:
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            raise FormatError(_reason(error), "file", file=clean(prefix or ref.text)) from None
        for entry in entries:
            seen += 1
            if seen > MAX_FILES:
                raise LimitError(
                    f"more than {MAX_FILES} files",
                    "files",
                    file=clean(ref.text),
                    remedy="name the folder of one model",
                )
            path = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name != ".git":
                    pending.append((Path(entry.path), f"{path}/"))
                continue
            try:
                state = entry.stat()
            except OSError as error:
                _refuse_if_needed(path, _reason(error))
                continue
            if stat.S_ISREG(state.st_mode):
                files[path] = RepoFile(path, state.st_size)
                states[path] = file_identity(state)
            elif not stat.S_ISDIR(state.st_mode):
                _refuse_if_needed(path, "is not a regular file")
    return dict(sorted(files.items())), states


def _refuse_if_needed(path: str, reason: str) -> None:
    # A dangling link or a pipe in the place of a model's file must not read as "not there".
    if path.endswith(WEIGHT_SUFFIXES):
        raise FormatError(reason, "file", file=clean(path))


def _problem(listed: tuple[int, ...], state: os.stat_result, path: str) -> ProjauditError | None:
    if not stat.S_ISREG(state.st_mode):
        return FormatError("is not a regular file", "file", file=clean(path))
    if state.st_size < listed[0]:
        return _truncated(path, state.st_size, listed[0])
    if file_identity(state) != listed:
        return IntegrityError("changed while it was audited", "changed", file=clean(path))
    return None


def _truncated(path: str, size: int, wanted: int) -> FormatError:
    return FormatError(
        f"ends at byte {size}, {wanted} expected: truncated",
        "truncated",
        file=clean(path),
        remedy="copy or download the file again",
    )


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
