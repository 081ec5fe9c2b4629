"""Whole copies of a repository's files on this machine, which prove themselves by their digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal

from projaudit.errors import FormatError, IntegrityError, LimitError
from projaudit.hub.cache import Cache
from projaudit.hub.listing import Repo
from projaudit.hub.ranges import Span
from projaudit.hub.transfer import Progress
from projaudit.inert import clean
from projaudit.source import RepoFile, file_identity, pread

_CHUNK = 4 << 20


class Copies:
    """The copies in huggingface_hub's cache, in ours, and where ours cannot be written."""

    def __init__(
        self, repo: Repo, cache: Cache, notify: Callable[[str], None], progress: Progress
    ) -> None:
        self.scratch: Path | None = None
        """Where ours cannot be written; gone with this object."""
        self._repo = repo
        self._cache = cache
        self._notify = notify
        self._progress = progress
        self._proven: set[tuple[str, ...]] = set()

    def paths(self, file: RepoFile) -> Iterator[Path]:
        """Where a copy may be."""
        from huggingface_hub import try_to_load_from_cache

        for repo in dict.fromkeys((self._repo.id, self._repo.name)):
            found = None
            with suppress(OSError, ValueError):
                found = try_to_load_from_cache(repo, file.path, revision=self._repo.commit)
            if isinstance(found, str):
                yield Path(found)
        if file.content is not None:
            yield self._cache.whole(file.content)
            if self.scratch is not None:
                yield self.scratch / file.content

    def read(
        self, file: RepoFile, spans: Sequence[Span]
    ) -> tuple[list[bytes], Literal["full", "unverified"]] | None:
        """The spans out of a sound copy, and how that is tied to the listing; None without one."""
        for _, descriptor, checked in self._sound(file):
            with suppress(OSError, FormatError):
                return [pread(descriptor, file.path, *span) for span in spans], checked
        return None

    def whole(self, file: RepoFile) -> tuple[Path, Literal["full", "unverified"]] | None:
        """Where a sound copy is, and how that is tied to the listing; None without one."""
        return next(((path, checked) for path, _, checked in self._sound(file)), None)

    def _sound(self, file: RepoFile) -> Iterator[tuple[Path, int, Literal["full", "unverified"]]]:
        """The sound copies: path, descriptor (closed with the next) and what ties them."""
        for path in self.paths(file):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                checked = None
                with suppress(OSError):
                    checked = self._check(descriptor, file)
                if checked is not None:
                    yield path, descriptor, checked
            finally:
                os.close(descriptor)

    def add(self, file: RepoFile, fill: Callable[[BinaryIO], None]) -> None:
        """Makes a copy of what `fill` writes, and proves it.

        Raises IntegrityError (`integrity.sha256`, `integrity.sha1`), LimitError (`limit.disk`), and
        what `fill` raises.
        """
        content, about = file.content, self._repo.about(file.path)
        if content is None:
            raise IntegrityError(
                "the Hub names no digest to verify this file by", "sha256", file=about
            )
        target = self._cache.whole(content)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".")
        except OSError:  # a cache that cannot be written: beside the other temporary files
            if self.scratch is None:
                self.scratch = Path(tempfile.mkdtemp(prefix="projaudit-"))
                weakref.finalize(self, shutil.rmtree, self.scratch, ignore_errors=True)
            target = self.scratch / content
            handle, partial = tempfile.mkstemp(dir=self.scratch, prefix=".")
        try:
            with os.fdopen(handle, "w+b") as out:
                fill(out)
                out.flush()
                if digest(self._pieces(out.fileno(), file), file) != content:
                    raise wrong_digest(file, about)
                self._remember(file_key(out.fileno(), content))
            Path(partial).replace(target)
        except OSError as error:
            raise LimitError(
                f"no room on disk for its {file.size} bytes ({clean(error.strerror)})",
                "disk",
                file=about,
                remedy="set XDG_CACHE_HOME or TMPDIR to a larger disk, or use --verify range",
            ) from None
        finally:
            with suppress(OSError):
                Path(partial).unlink(missing_ok=True)

    def _check(self, descriptor: int, file: RepoFile) -> Literal["full", "unverified"] | None:
        if os.fstat(descriptor).st_size != file.size:
            return None
        if file.content is None:
            return "unverified" if not self._repo.complete else None
        key = file_key(descriptor, file.content)
        if key not in self._proven and self._cache.record(*key) is None:
            if digest(self._pieces(descriptor, file), file) != file.content:
                self._notify(f"{self._repo.about(file.path)}: the cached copy is damaged")
                return None
            self._remember(key)
        self._proven.add(key)
        return "full"

    def _remember(self, key: tuple[str, ...]) -> None:
        self._proven.add(key)
        self._cache.keep_record({}, *key)

    def _pieces(self, descriptor: int, file: RepoFile) -> Iterator[bytes]:
        for at in range(0, file.size, _CHUNK):
            piece = os.pread(descriptor, min(_CHUNK, file.size - at), at)
            self._progress(file.path, at + len(piece), file.size)
            yield piece


def file_key(descriptor: int, content: str) -> tuple[str, ...]:
    """The key under which it is remembered that this very file on disk has this digest."""
    return ("whole", content, *map(str, file_identity(os.fstat(descriptor))))


def digest(pieces: Iterable[bytes], file: RepoFile) -> str:
    """The digest of a content in the kind that the listing names: SHA-256, or git's SHA-1."""
    if file.sha256 is not None:
        running = hashlib.sha256()
    else:
        running = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    for piece in pieces:
        running.update(piece)
    return running.hexdigest()


def wrong_digest(file: RepoFile, about: str) -> IntegrityError:
    """The error that bytes are not those of the listing."""
    kind = "sha1" if file.sha256 is None else "sha256"
    return IntegrityError(
        f"the bytes do not have the {kind} of the listing",
        kind,
        file=about,
        remedy="do not use this file",
    )
