"""What projaudit keeps on disk: ranges, whole files, and what repositories were."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projaudit.hub.ranges import Span

_RANGE = re.compile(r"(\d{1,19})-(\d{1,19})")


@dataclass(frozen=True)
class Cache:
    """`$XDG_CACHE_HOME/projaudit`: ranges and whole files by content id, listings by commit.

    Whatever cannot be read, or fails its checksum, is as if it were not there; whatever cannot be
    written is not kept. A range is only as good as the server that sent it under this content id,
    so ranges of a mirror stand apart from the Hub's own; whole files prove their id themselves.
    """

    root: Path
    ranges: str = "ranges"
    """Folder of the ranges of one endpoint."""

    def spans(self, content: str) -> list[Span]:
        """The ranges of a file that are kept, the shortest first."""
        found: list[Span] = []
        with suppress(OSError), os.scandir(self._folder(content)) as entries:
            for entry in entries:
                named = _RANGE.fullmatch(entry.name)
                if named is not None:
                    found.append((int(named[1]), int(named[2])))
        return sorted(found, key=lambda span: span[1] - span[0])

    def load(self, content: str, span: Span) -> bytes | None:
        """The bytes of a kept range; None, and the range forgotten, if its checksum is wrong."""
        path = self._folder(content) / f"{span[0]}-{span[1]}"
        try:
            whole = path.stat().st_size == 32 + span[1] - span[0]
            held = path.read_bytes() if whole else b""
        except OSError:
            return None
        if hashlib.sha256(memoryview(held)[32:]).digest() != held[:32]:
            with suppress(OSError):
                path.unlink()
            return None
        return held[32:]

    def keep(self, content: str, span: Span, data: bytes | bytearray) -> None:
        """Keeps the bytes of a range, preceded by their SHA-256."""
        path = self._folder(content) / f"{span[0]}-{span[1]}"
        _write(path, hashlib.sha256(data).digest(), data)

    def record(self, *key: str) -> dict[str, Any] | None:
        """A kept JSON object, by its key."""
        try:
            value = json.loads(self._record(key).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) and value.get("key") == list(key) else None

    def keep_record(self, value: Mapping[str, Any], *key: str) -> None:
        """Keeps a JSON object under a key."""
        text = json.dumps({"key": list(key), **value}, allow_nan=False)
        _write(self._record(key), text.encode())

    def whole(self, content: str) -> Path:
        """Where a whole file of this content is kept."""
        return self.root / "files" / content[:2] / content

    def _record(self, key: Sequence[str]) -> Path:
        name = hashlib.sha256("\0".join(key).encode()).hexdigest()
        return self.root / "repos" / f"{name}.json"

    def _folder(self, content: str) -> Path:
        return self.root / self.ranges / content[:2] / content


def cache_root() -> Path:
    """The folder of projaudit's own cache: `$XDG_CACHE_HOME/projaudit`, or in `~/.cache`."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if Path(named).is_absolute():
        return Path(named) / "projaudit"
    try:
        return Path.home() / ".cache" / "projaudit"
    except RuntimeError:
        # An account without a home: a place where nothing can be written, since a folder of a
        # known name in a shared one could have been filled by somebody else.
        return Path(os.devnull) / "projaudit"


def open_cache(endpoint: str) -> Cache:
    """The cache of what a Hub sends."""
    if endpoint == "https://huggingface.co":
        return Cache(cache_root())
    return Cache(cache_root(), f"ranges@{hashlib.sha256(endpoint.encode()).hexdigest()[:16]}")


def _write(path: Path, *parts: bytes | bytearray) -> None:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                for part in parts:
                    file.write(part)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
