"""The bytes of a repository's files by HTTP, checked against its listing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from projaudit.errors import AuthError, IntegrityError, LimitError
from projaudit.hub.failures import Retry, nonsense, stopped_short
from projaudit.hub.guard import guarded_client
from projaudit.hub.link import Link, Request
from projaudit.hub.listing import ETAG, Repo
from projaudit.hub.ranges import Span
from projaudit.inert import clean
from projaudit.source import RepoFile

Sink = Callable[[int, bytes | bytearray], None]
"""Takes bytes and where they stand in the file."""
Progress = Callable[[str, int, int], None]
"""Takes a file, the bytes done and their total."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_SIZE = re.compile(r"[0-9]{1,19}")


class _NoRanges(Exception):
    """The server answered a range with the whole file."""


class Transfer:
    """Fetches from one repository over one link."""

    def __init__(self, repo: Repo, link: Link, progress: Progress) -> None:
        self.fallbacks: list[str] = []
        """Files whose server ignored byte ranges, so that they were read from their start."""
        self._repo = repo
        self._link = link
        self._progress = progress
        self._urls: dict[str, str] = {}
        self._stored: dict[str, str] = {}
        self._whole_left = link.limits.whole_files

    def fetch(self, file: RepoFile, blocks: Sequence[Span], sink: Sink, *, bounded: bool) -> None:
        """Gives the bytes of ascending blocks to `sink`, a block at a time.

        Where the server ignores ranges: everything up to the last block, in smaller pieces, and
        from 0 again after each failure. `bounded` keeps that within `Limits.whole_files`. Raises
        IntegrityError, LimitError (`limit.bytes`), and what `Link.exchange` raises.
        """
        with guarded_client(self._link.endpoint, limits=self._link.limits):
            if file.path not in self.fallbacks:
                done, total = 0, sum(stop - start for start, stop in blocks)
                try:
                    for start, stop in blocks:
                        sink(start, self._get_range(file, start, stop))
                        done += stop - start
                        self._progress(file.path, done, total)
                    return
                except _NoRanges:
                    self.fallbacks.append(file.path)
            self._get_from_start(file, blocks[-1][1], sink, bounded)

    def fetch_small(self, file: RepoFile) -> bytes:
        """The whole of a small file, its digest unchecked; raises as `fetch`."""
        about = self._repo.about(file.path)

        def prepare() -> Request:
            # Without a digest to prove the bytes, what the Hub says of the file is checked first.
            return self._hub_url(file) if file.content else self._url(file), {}

        def consume(response: Any, _: str | None) -> bytes:
            if response.status_code != 200:
                raise self._link.refusal(response, about, file=True)
            data = bytearray()
            for chunk in self._link.body(response, about):
                data += chunk
                if len(data) > file.size:
                    raise self._contradiction(file, "more bytes than listed", "size")
            if len(data) < file.size:
                raise stopped_short(about)
            return bytes(data)

        with guarded_client(self._link.endpoint, limits=self._link.limits):
            return self._link.exchange("GET", prepare, consume, about)

    def _get_range(self, file: RepoFile, start: int, stop: int) -> bytearray:
        """The bytes start to stop; raises _NoRanges if the server has none."""
        about, data = self._repo.about(file.path), bytearray()
        signed_again = False

        def prepare() -> Request:
            return self._url(file), {"range": f"bytes={start + len(data)}-{stop - 1}"}

        def consume(response: Any, _: str | None) -> None:
            nonlocal signed_again
            status = response.status_code
            if status == 200:
                if (start, stop) != (0, file.size):
                    raise _NoRanges
                data.clear()
            elif status == 206:
                first = start + len(data)
                expected = (str(first), str(stop - 1), str(file.size))
                said = response.headers.get("content-range", "nothing")
                match = _CONTENT_RANGE.fullmatch(said)
                if match is None or match.groups() != expected:
                    raise self._contradiction(
                        file,
                        f"bytes {first} to {stop - 1} of {file.size} asked for, the server says "
                        + clean(said, 80),
                        "content-range",
                    )
            elif status in (401, 403) and not self._link.is_home(str(response.request.url)):
                error = AuthError("the storage refuses the Hub's link", "refused", file=about)
                if signed_again:
                    raise error
                signed_again = True
                del self._urls[file.path]  # signed links expire after about an hour
                raise Retry(error, 0.0)
            elif status == 416:
                raise self._contradiction(file, "the storage holds fewer bytes", "content-range")
            else:
                raise self._link.refusal(response, about, file=True)
            self._check_body(response, file, stop - start - len(data))
            for chunk in self._link.body(response, about):
                data.extend(chunk)
                if len(data) > stop - start:
                    raise self._contradiction(file, "more bytes than asked for", "size")
            if len(data) < stop - start:
                raise stopped_short(about)

        self._link.exchange("GET", prepare, consume, about)
        return data

    def _get_from_start(self, file: RepoFile, end: int, sink: Sink, bounded: bool) -> None:
        """Streams bytes 0 to `end` to the sink, from 0 again in each attempt."""
        about = self._repo.about(file.path)

        def prepare() -> Request:
            if bounded and end > self._whole_left:
                raise LimitError(
                    f"the server ignores byte ranges; {end} bytes to read, "
                    f"{max(0, self._whole_left)} left of the budget for whole files",
                    "bytes",
                    file=about,
                    remedy="download the repository and audit the folder",
                )
            return self._url(file), {}

        def consume(response: Any, _: str | None) -> None:
            if response.status_code != 200:
                raise self._link.refusal(response, about, file=True)
            self._check_body(response, file, file.size)
            at = 0
            for chunk in self._link.body(response, about):
                piece = chunk[: end - at]
                sink(at, piece)
                at += len(piece)
                if bounded:
                    self._whole_left -= len(piece)
                self._progress(file.path, at, end)
                if at == end:
                    return
            raise stopped_short(about)

        self._link.exchange("GET", prepare, consume, about)

    def _url(self, file: RepoFile) -> str:
        """Where the file lies, after its commit, size and digest were compared with the listing."""
        about = self._repo.about(file.path)

        def consume(response: Any, target: str | None) -> str:
            headers = response.headers
            if response.status_code >= 400:
                raise self._link.refusal(response, about, file=True)
            commit = headers.get("x-repo-commit")
            if commit is None:
                raise nonsense(about, "it names no commit")
            if commit != self._repo.commit:
                said = f"pinned to {self._repo.commit}, answered {clean(commit, 60)}"
                raise self._contradiction(file, said, "commit")
            etag = headers.get("x-linked-etag") or headers.get("etag") or ""
            etag = etag.removeprefix("W/").strip('"')
            if not ETAG.fullmatch(etag) or file.content not in (None, etag):
                raise self._contradiction(file, f"ETag {clean(etag, 80)!r}", "etag")
            size = headers.get("x-linked-size")
            if size is None and target is None:
                size = headers.get("content-length", "no")
            # Where a redirect leaves the size out, the total of each Content-Range is the check.
            if size is not None and not (_SIZE.fullmatch(size) and int(size) == file.size):
                said = f"{clean(size, 30)} bytes, listed with {file.size}"
                raise self._contradiction(file, said, "size")
            return target or str(response.request.url)

        if file.path not in self._urls:
            url = self._hub_url(file)
            self._urls[file.path] = self._link.exchange("HEAD", lambda: (url, {}), consume, about)
        return self._urls[file.path]

    def _hub_url(self, file: RepoFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            self._repo.id, file.path, revision=self._repo.commit, endpoint=self._link.endpoint
        )

    def _check_body(self, response: Any, file: RepoFile, expected: int) -> None:
        headers = response.headers
        if headers.get("content-encoding", "identity") != "identity":
            raise self._contradiction(file, "compressed although asked not to be", "encoding")
        # A shorter body is a broken transfer, and asked for again; a longer one is a lie.
        said = headers.get("content-length", "")
        if _SIZE.fullmatch(said) and int(said) > expected:
            raise self._contradiction(file, f"{said} bytes, {expected} expected", "size")
        # The storage's own ETag, which is not the Hub's; kept when a link is signed anew.
        etag = headers.get("etag")
        if etag is not None and self._stored.setdefault(file.path, etag) != etag:
            raise self._contradiction(file, "the stored file changed between two ranges", "etag")

    def _contradiction(self, file: RepoFile, message: str, kind: str) -> IntegrityError:
        return IntegrityError(message, kind, file=self._repo.about(file.path))
