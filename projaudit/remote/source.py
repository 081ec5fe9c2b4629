"""Files on servers that are no Hub as a `Source`: by ranges, or copied whole where it must be."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from projaudit.errors import FormatError, LimitError, NotFoundError
from projaudit.hub.link import Link
from projaudit.hub.ranges import BLOCK, Span, cut, plan_blocks, put
from projaudit.inert import clean
from projaudit.refs import Ref
from projaudit.remote.transfer import Item, NoRanges, get_range, get_whole
from projaudit.source import RepoFile, open_local, refuse_lfs_pointer, too_long

Progress = Callable[[str, int, int], None]


class RemoteSource:
    """A folder in a bucket, or one file behind a URL, as it was listed (a `Source`)."""

    def __init__(
        self,
        ref: Ref,
        items: Mapping[str, Item],
        link: Link,
        *,
        account: str,
        one_file: bool,
        progress: Progress | None,
        notify: Callable[[str], None] | None,
    ) -> None:
        self.ref = ref
        self.name = ref.text
        self.id = ref.text
        """What it is called in a report; an MLflow alias names the version that it is now."""
        self.commit: str | None = None
        self.endpoint = link.endpoint
        self.files: Mapping[str, RepoFile] = {path: item.file for path, item in items.items()}
        self.one_file = one_file
        """Whether the reference names a file rather than a folder."""
        self.traffic = link.traffic
        self.verified: dict[str, str] = {}
        """"range" for each file that was read: length and state, the bytes only by transport."""
        self.fallbacks: list[str] = []
        """Files whose server ignored byte ranges, so that they were fetched whole."""
        self._items = items
        self._link = link
        self._account = account
        self._progress = progress or (lambda file, done, total: None)
        self._notify = notify or (lambda line: None)
        self._copies: dict[str, Path] = {}
        self._folder: Path | None = None
        self._whole_left = link.limits.whole_files

    def __repr__(self) -> str:
        return f"RemoteSource({self.name!r})"

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` (end exclusive) of a file; raises as `read_spans`."""
        return self.read_spans(path, [(start, stop)])[0]

    def read_spans(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span (start, stop), in the order asked for.

        From a server that ignores ranges the file is fetched whole, within `Limits.whole_files`.
        Raises NotFoundError (`not-found.file`), FormatError (`format.truncated`), IntegrityError
        (`integrity.changed` where the file is no longer what was listed), LimitError
        (`limit.bytes`), and what the network and its checks raise.
        """
        item = self._item(path)
        for start, stop in spans:
            if not 0 <= start <= stop:
                raise ValueError(f"no span: {start} to {stop}")
            if stop > item.file.size:
                raise FormatError(
                    f"ends at byte {item.file.size}, {stop} expected: truncated",
                    "truncated",
                    file=item.about,
                )
        self.verified[path] = "range"
        if path not in self._copies:
            try:
                return self._by_ranges(item, spans)
            except NoRanges:
                self._fall_back(item)
        return open_local(Ref(item.about, "local", path=self._copies[path])).read_spans(
            self._copies[path].name, spans
        )

    def read_small(self, path: str, limit: int) -> bytes:
        """The whole of a small file; LimitError above `limit` bytes, or raises as `read_spans`."""
        item = self._item(path)
        if item.file.size > limit:
            raise too_long(item.about, item.file.size, limit)
        data = self.read(path, 0, item.file.size)
        refuse_lfs_pointer(data, item.about)
        return data

    def at_hand(self, path: str) -> bool:
        """Whether the file was fetched whole already."""
        return path in self._copies

    def whole(self, path: str) -> Path:
        """A copy of the file on this machine, fetched if need be; gone with this object."""
        item = self._item(path)
        if path not in self._copies:
            try:
                self._copy(item, ranges=True)
            except NoRanges:
                self._fall_back(item)
        self.verified[path] = "range"
        return self._copies[path]

    def _item(self, path: str) -> Item:
        if path not in self._items:
            raise NotFoundError("no such file", "file", file=clean(f"{self.name}/{path}"))
        return self._items[path]

    def _by_ranges(self, item: Item, spans: Sequence[Span]) -> list[bytes]:
        into = [bytearray(stop - start) for start, stop in spans]
        blocks = plan_blocks(spans)
        done, total = 0, sum(stop - start for start, stop in blocks)
        for start, stop in blocks:
            put(into, spans, start, get_range(self._link, item, start, stop, self._account))
            done += stop - start
            self._progress(item.file.path, done, total)
        answer = []
        for index, data in enumerate(into):
            answer.append(bytes(data))
            into[index] = bytearray()  # two copies of one span at a time, not of all
        for (start, _), found in zip(spans, answer, strict=True):
            if start == 0:
                refuse_lfs_pointer(found, item.about)
        return answer

    def _fall_back(self, item: Item) -> None:
        if item.file.size > self._whole_left:
            raise LimitError(
                f"the server ignores byte ranges; {item.file.size} bytes to read, "
                f"{self._whole_left} left of the budget for whole files",
                "bytes",
                file=item.about,
                remedy="download it and audit the file",
            )
        self._whole_left -= item.file.size
        self._notify(
            f"{item.about}: the server ignores byte ranges, so all of it is fetched "
            f"({item.file.size} bytes)"
        )
        self.fallbacks.append(item.file.path)
        self._copy(item, ranges=False)

    def _copy(self, item: Item, *, ranges: bool) -> None:
        """Fetches a whole file into a temporary folder; raises LimitError (`limit.disk`)."""

        def fill(out: BinaryIO) -> None:
            def sink(at: int, data: bytes | bytearray) -> None:
                out.seek(at)
                out.write(data)
                self._progress(item.file.path, at + len(data), item.file.size)

            if ranges:
                for start, stop in cut([(0, item.file.size)], BLOCK):
                    sink(start, get_range(self._link, item, start, stop, self._account))
            else:
                get_whole(self._link, item, sink, self._account)

        try:
            if self._folder is None:
                self._folder = temporary_folder(self)
            # The name comes from the server, so the copy has a number.
            copy = self._folder / f"{len(self._copies)}{Path(item.file.path).suffix[:20]}"
            with copy.open("wb") as out:
                fill(out)
        except OSError as error:
            raise LimitError(
                f"no room on disk for its {item.file.size} bytes ({clean(error.strerror)})",
                "disk",
                file=item.about,
                remedy="set TMPDIR to a larger disk",
            ) from None
        self._copies[item.file.path] = copy


def temporary_folder(owner: object) -> Path:
    """A new folder that is deleted with its owner."""
    folder = Path(tempfile.mkdtemp(prefix="projaudit-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder
