"""A repository on a Hub as a `Source`: opened at a commit, read from disk first, then by ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from projaudit.errors import FormatError, IntegrityError, NotFoundError
from projaudit.hub.cache import Cache, open_cache
from projaudit.hub.copies import Copies, digest, wrong_digest
from projaudit.hub.failures import not_cached
from projaudit.hub.guard import Limits, address_of, endpoint_origin, guarded_client
from projaudit.hub.link import Link, is_offline
from projaudit.hub.listing import Repo, resolve
from projaudit.hub.offline import recall, remember
from projaudit.hub.ranges import BLOCK, Span, cut, plan_blocks, put
from projaudit.hub.transfer import Progress, Transfer
from projaudit.refs import Ref, check_revision, parse_hub_id
from projaudit.source import RepoFile, refuse_lfs_pointer, too_long

Verified = Literal["full", "range", "unverified"]


def open_hub(
    ref: Ref,
    *,
    offline: bool = False,
    verify: Literal["range", "full"] = "range",
    endpoint: str | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> HubSource:
    """The repository of a Hub reference, pinned to a commit and listed, before any other byte.

    Offline (`offline`, HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE) the commit and the listing come from
    the caches and no request is made. `verify="full"` downloads every file that is read from as a
    whole and checks its digest. `progress(file, done, total)` counts bytes of the transfer at hand,
    `notify(line)` is told of waits. Raises NetworkError, AuthError, NotFoundError, RateLimitError,
    IntegrityError, LimitError, OfflineError and UsageError.
    """
    if ref.kind != "hub" or ref.repo is None:
        raise ValueError(f"{ref!r} is no reference to a Hub")
    where = address_of(endpoint)
    endpoint_origin(where)
    parse_hub_id(ref.repo)
    if ref.revision is not None:
        check_revision(ref.revision, file=ref.repo)
    link = Link(where, limits or Limits(), offline or is_offline(), notify or (lambda line: None))
    cache = open_cache(where)
    if link.offline:
        repo = recall(ref.repo, ref.revision, where, cache)
    else:
        with guarded_client(where, limits=link.limits):
            link.sign_in(ref.repo)
            repo = resolve(ref.repo, ref.revision, link)
        remember(repo, ref.revision, where, cache)
    return HubSource(ref, repo, link, cache, verify, progress or (lambda file, done, total: None))


class HubSource:
    """A Hub repository at one commit, read by checked byte ranges (a `Source`)."""

    def __init__(
        self,
        ref: Ref,
        repo: Repo,
        link: Link,
        cache: Cache,
        verify: Literal["range", "full"],
        progress: Progress,
    ) -> None:
        self.ref = ref
        self.name: str = repo.name
        """The repository id that was asked for."""
        self.id = repo.id
        """The repository id that the Hub answered with."""
        self.commit: str = repo.commit
        """40 hex digits; a plain str."""
        self.files: Mapping[str, RepoFile] = repo.files
        self.base_models = repo.base_models
        """The Hub's lineage, as (repository, relation): a claim of the uploader, not checked."""
        self.tags = repo.tags
        self.gated = repo.gated
        """False, or how access is granted: "auto", "manual"."""
        self.private = repo.private
        self.complete = repo.complete
        """False where the listing is only what an offline snapshot happens to hold."""
        self.endpoint = link.endpoint
        self.from_cache = link.offline
        """Whether commit and listing were taken from the caches."""
        self.traffic = link.traffic
        """Requests sent, body bytes received, and bytes that caches supplied instead."""
        self.verified: dict[str, Verified] = {}
        """How each file that was read is tied to the listing: "full" (digest of the whole file),
        "range" (commit, size and digest as announced; the bytes themselves only by transport),
        "unverified" (an offline snapshot that names no digest)."""
        self._repo = repo
        self._cache = cache
        self._verify = verify
        self._copies = Copies(repo, cache, link.notify, progress)
        self._transfer = Transfer(repo, link, progress)
        self.fallbacks: Sequence[str] = self._transfer.fallbacks
        """Files whose server ignored byte ranges, so that they were read from their start."""

    def __repr__(self) -> str:
        return f"HubSource({self.id!r}, {self.commit!r})"

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` (end exclusive) of a file; raises as `read_spans`."""
        return self.read_spans(path, [(start, stop)])[0]

    def read_spans(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span (start, stop), in the order asked for.

        From a cached whole file, else from cached ranges, else in as few ranges as the waste bound
        permits. Raises NotFoundError (`not-found.file`), FormatError (`format.truncated`), and
        what the network and its checks raise.
        """
        file, about = self._listed(path), self._repo.about(path)
        for start, stop in spans:
            if not 0 <= start <= stop:
                raise ValueError(f"no span: {start} to {stop}")
            if stop > file.size:
                raise FormatError(
                    f"ends at byte {file.size}, {stop} expected: truncated", "truncated", file=about
                )
        answer = self._read_copy(file, spans)
        if answer is None and self._verify == "full":
            if self.from_cache:
                raise not_cached(about, "offline, and not in a cache as a whole")
            self._download(file)
            answer = self._read_copy(file, spans)
            if answer is None:
                raise IntegrityError("changed right after its download", "changed", file=about)
        if answer is None:
            answer = self._read_ranges(file, spans)
        for (start, _), data in zip(spans, answer, strict=True):
            if start == 0:
                refuse_lfs_pointer(data, about)
        return answer

    def read_small(self, path: str, limit: int) -> bytes:
        """The whole of a small file, its digest checked; LimitError above `limit` bytes.

        Raises IntegrityError (`integrity.sha256`, `integrity.sha1`) where the bytes are not those
        of the listing, FormatError (`format.lfs-pointer`), or as `read_spans`.
        """
        file, about = self._listed(path), self._repo.about(path)
        if file.size > limit:
            raise too_long(about, file.size, limit)
        held = self._read_copy(file, [(0, file.size)])
        data = self._read_small(file) if held is None else held[0]
        refuse_lfs_pointer(data, about)
        return data

    def at_hand(self, path: str) -> bool:
        """Whether a whole copy of the file is on this machine, so that reading it is free."""
        return any(found.is_file() for found in self._copies.paths(self._listed(path)))

    def whole(self, path: str) -> Path:
        """A whole copy of the file on this machine, its digest checked; downloaded if need be.

        Good for as long as this object is, as that may own the only copy. Raises OfflineError
        (`offline.not-cached`) where it would have to be downloaded offline, and as `read_spans`.
        """
        file, about = self._listed(path), self._repo.about(path)
        held = self._copies.whole(file)
        if held is None:
            if self.from_cache:
                raise not_cached(about, "offline, and not in a cache as a whole")
            self._download(file)
            held = self._copies.whole(file)
            if held is None:
                raise IntegrityError("changed right after its download", "changed", file=about)
        found, how = held
        self._note(file, how)
        return found

    def _listed(self, path: str) -> RepoFile:
        file = self.files.get(path)
        if file is not None:
            return file
        if not self.complete:
            raise not_cached(self._repo.about(path))
        raise NotFoundError("no such file at this commit", "file", file=self._repo.about(path))

    def _note(self, file: RepoFile, how: Verified) -> None:
        if self.verified.get(file.path) != "range":
            self.verified[file.path] = how

    def _read_copy(self, file: RepoFile, spans: Sequence[Span]) -> list[bytes] | None:
        held = self._copies.read(file, spans)
        if held is None:
            return None
        answer, how = held
        self.traffic.from_cache += sum(map(len, answer))
        self._note(file, how)
        return answer

    def _read_small(self, file: RepoFile) -> bytes:
        everything = (0, file.size)
        if file.content is not None:
            kept = self._cache.load(file.content, everything)
            if kept is not None and digest([kept], file) == file.content:
                self.traffic.from_cache += len(kept)
                self._note(file, "full")
                return kept
        if self.from_cache:
            raise not_cached(self._repo.about(file.path))
        data = self._transfer.fetch_small(file)
        if file.content is None:
            self._note(file, "range")
            return data
        if digest([data], file) != file.content:
            raise wrong_digest(file, self._repo.about(file.path))
        self._cache.keep(file.content, everything, data)
        self._note(file, "full")
        return data

    def _download(self, file: RepoFile) -> None:
        """Fetches a whole file into the cache, its digest checked."""

        def fill(out: BinaryIO) -> None:
            def sink(at: int, data: bytes | bytearray) -> None:
                out.seek(at)
                out.write(data)

            self._transfer.fetch(file, cut([(0, file.size)], BLOCK), sink, bounded=False)

        self._copies.add(file, fill)

    def _read_ranges(self, file: RepoFile, spans: Sequence[Span]) -> list[bytes]:
        self._note(file, "range")
        into = [bytearray(stop - start) for start, stop in spans]
        missing = self._fill_from_cache(file, spans, into)
        if missing:
            if self.from_cache:
                raise not_cached(self._repo.about(file.path))
            self._fill_by_transfer(file, missing, spans, into)
        answer: list[bytes] = []
        for index, data in enumerate(into):
            answer.append(bytes(data))
            into[index] = bytearray()  # two copies of one span at a time, not of all
        return answer

    def _fill_from_cache(
        self, file: RepoFile, spans: Sequence[Span], into: Sequence[bytearray]
    ) -> list[Span]:
        """Fills in what the range cache holds; the pieces that it does not hold."""
        pieces = cut(spans, BLOCK)
        if file.content is None:
            return pieces
        kept = self._cache.spans(file.content)
        missing: list[Span] = []
        held: Span | None = None
        data: bytes | None = None
        for start, stop in pieces:
            found = next((span for span in kept if span[0] <= start and stop <= span[1]), None)
            if found != held:
                held, data = found, None if found is None else self._cache.load(file.content, found)
            if held is None or data is None:
                missing.append((start, stop))
                continue
            self.traffic.from_cache += stop - start
            put(into, spans, start, memoryview(data)[start - held[0] : stop - held[0]])
        return missing

    def _fill_by_transfer(
        self,
        file: RepoFile,
        missing: Sequence[Span],
        spans: Sequence[Span],
        into: Sequence[bytearray],
    ) -> None:
        def sink(at: int, data: bytes | bytearray) -> None:
            if file.content is not None and file.path not in self.fallbacks:
                self._cache.keep(file.content, (at, at + len(data)), data)
            put(into, spans, at, data)

        self._transfer.fetch(file, plan_blocks(missing), sink, bounded=True)
        if file.content is not None and file.path in self.fallbacks:
            for span, data in zip(spans, into, strict=True):
                if data:
                    self._cache.keep(file.content, span, data)
