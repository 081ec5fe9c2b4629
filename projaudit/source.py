"""Where files live: what a reference means, and reading exact byte ranges of local files."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import unquote, urlsplit

from projaudit.errors import (
    FormatError,
    IntegrityError,
    LimitError,
    NotFoundError,
    ProjauditError,
    UsageError,
)
from projaudit.inert import clean

MAX_FILES = 100_000
"""Files that a local folder may hold before it is refused."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""First bytes of what `git clone` without LFS leaves in place of a large file."""

_HUB_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_NOT_MODELS = {"datasets", "spaces", "api", "docs", "collections", "papers", "models"}
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")
_REPO_SHAPE = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_BUCKET = {
    "s3": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}"),
    "gs": re.compile(r"[a-z0-9][a-z0-9._-]{1,221}"),
}
_MLFLOW = re.compile(r"models:/[^/@:]+(?:@[^/@:]+)?(?:/[^:@]+)?|runs:/[A-Za-z0-9_-]+/[^:]+")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|[0-9a-fA-F:.]{2,45}")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
# One read(2) moves at most 2 GiB minus a page.
_LARGEST_READ = 1 << 30


Kind = Literal["local", "hub", "s3", "gs", "https", "mlflow"]


@dataclass(frozen=True)
class Ref:
    """What the user typed, parsed: a path, a Hub repository at a wanted revision, or a URI."""

    text: str
    """For display: without passwords, and without the query of a URL, which may be a signature."""
    kind: Kind
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    uri: str | None = field(default=None, repr=False)
    """What is fetched, where it is neither a path nor of the Hub; may hold a signature."""


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


def parse_ref(text: str, revision: str | None = None) -> Ref:
    """The reference that a user typed: an existing local path, a URI, or else a Hub id.

    Forms: `org/model`, `org/model@rev`, `hf://org/model@rev`, a Hub URL (also `/tree/<rev>`),
    a local folder, a single file (also `file://`), `s3://bucket/folder`, `gs://bucket/folder`,
    `https://host/model.safetensors`, `models:/name/version`, `models:/name@alias`,
    `runs:/id/path`. An existing path wins over a bare `org/model`; `hf://` always means the Hub.
    Raises UsageError (`usage.reference`, `usage.revision`) for what cannot be a reference,
    NotFoundError (`not-found.path`) for what looks like a path and does not exist.
    """
    if not text or len(text) > 4096 or any(unicodedata.category(c) == "Cc" for c in text):
        raise UsageError(
            "a reference is a path or a Hub id, without control characters",
            "reference",
            file=clean(public(text)) or "''",
        )
    elsewhere = _elsewhere(text)
    if elsewhere is not None:
        if revision is not None:
            raise UsageError(
                "only a Hub repository has a revision", "revision", file=clean(elsewhere.text)
            )
        return elsewhere
    if text.startswith("file://"):
        text = _file_path(text)
    elif text.startswith(("hf://", "http://", "https://")):
        repo, typed = parse_hub_id(text)
        return Ref(text, "hub", repo=repo, revision=_one_revision(text, typed, revision))
    path = Path(text).expanduser() if not text.startswith("~") else _home(text)
    if _exists(path):
        if revision is not None:
            raise UsageError(
                "a local path has no revision",
                "revision",
                file=clean(text),
                remedy="write hf://org/model for the Hub",
            )
        return Ref(text, "local", path=path)
    bare = text.partition("@")[0]
    if (
        text.startswith((".", "/", "~", "\\"))
        or bare.endswith(_WEIGHT_SUFFIXES)
        or not _REPO_SHAPE.fullmatch(bare)
    ):
        raise NotFoundError(
            "no such file or folder, and not of the form org/model", "path", file=clean(text)
        )
    repo, typed = parse_hub_id(text)
    return Ref(text, "hub", repo=repo, revision=_one_revision(text, typed, revision))


def public(text: str) -> str:
    """A reference as it may be shown: without user and password, without a web address's query."""
    scheme, mark, rest = text.partition("://")
    if not mark or scheme == "hf":
        return text
    if scheme in ("http", "https"):
        rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def is_sound_path(path: str) -> bool:
    """Whether a server's name of a file is a plain relative path: nothing that climbs or hides."""
    parts = path.split("/")
    return len(path) <= 4096 and not any(
        part in ("", ".", "..") or any(unicodedata.category(c) in ("Cc", "Cs") for c in part)
        for part in parts
    )


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """The repository id and revision (None: not said) that a text names on the Hub.

    Never looks at the disk, so it is what reads ids that files contain. Raises UsageError
    (`usage.reference`, `usage.revision`).
    """
    if text.startswith(("http://", "https://")):
        repo, revision = _from_url(text)
    else:
        repo, at, rest = text.removeprefix("hf://").partition("@")
        revision = rest if at else None
    if not _REPO_SHAPE.fullmatch(repo) or len(repo) > 200:
        raise _no_repo(text, "a Hub id has the form org/model")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise _no_repo(text, "not a valid Hub id") from None
    return repo, None if revision is None else check_revision(revision, file=text)


def check_revision(revision: str, *, file: str | None = None) -> str:
    """The revision itself, if it can be one; raises UsageError (`usage.revision`)."""
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(
            f"{clean(revision, 80)!r} is no branch, tag or commit",
            "revision",
            file=None if file is None else clean(file),
        )
    return revision


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


def _elsewhere(text: str) -> Ref | None:
    """The reference to what is neither on this machine nor on the Hub; None for all others."""
    scheme, _, rest = text.partition(":")
    shown = public(text)
    if scheme in _BUCKET and rest.startswith("//"):
        bucket, _, key = rest[2:].partition("/")
        key = key.removesuffix("/")
        if not _BUCKET[scheme].fullmatch(bucket) or (key and not is_sound_path(key)):
            raise _no_repo(text, f"not of the form {scheme}://bucket/folder")
        return Ref(shown.rstrip("/"), scheme, uri=f"{scheme}://{bucket}/{key}")  # type: ignore[arg-type]
    if scheme in ("models", "runs") and rest.startswith("/"):
        if not _MLFLOW.fullmatch(text) or not is_sound_path(rest.strip("/")):
            raise _no_repo(
                text, "not of the form models:/name/version, models:/name@alias or runs:/id/path"
            )
        return Ref(shown.rstrip("/"), "mlflow", uri=text.rstrip("/"))
    if scheme in ("http", "https") and rest.startswith("//") and not _is_hub(text):
        return _web_file(text, shown)
    return None


def _web_file(text: str, shown: str) -> Ref:
    try:
        url = urlsplit(text)
        host, port = url.hostname or "", url.port
    except ValueError:
        raise _no_repo(text, "not a URL") from None
    if not url.path.lower().endswith(_WEIGHT_SUFFIXES):
        raise _no_repo(
            text, "neither a URL of the Hub (huggingface.co, or HF_ENDPOINT) nor of a weight file"
        )
    if url.scheme != "https":
        raise _no_repo(text, "not an https URL, so that anyone in between could change the file")
    if url.username is not None or url.password is not None:
        raise _no_repo(text, "holds a user name or password", "use a signed URL")
    if not text.isascii() or " " in text or not _HOST.fullmatch(host) or port == 0:
        raise _no_repo(text, "not a URL", "percent-encode what is not ASCII")
    if not is_sound_path(unquote(url.path.rpartition("/")[2])):
        raise _no_repo(text, "the name of its file holds what no file name does")
    return Ref(shown, "https", uri=text.partition("#")[0])


def _file_path(text: str) -> str:
    url = text.removeprefix("file://")
    path = unquote(url.removeprefix("localhost"))
    if not path.startswith("/") or any(unicodedata.category(c) == "Cc" for c in path):
        raise _no_repo(text, "not of the form file:///path")
    return path


def _is_hub(text: str) -> bool:
    try:
        url = urlsplit(text)
        endpoint = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError:
        return False
    netloc = url.netloc.lower()
    return netloc in _HUB_HOSTS or bool(netloc and netloc == endpoint.netloc.lower())


def _from_url(text: str) -> tuple[str, str | None]:
    try:
        url = urlsplit(text)
        endpoint = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError:
        raise _no_repo(text, "not a URL") from None
    path = url.path
    if url.netloc and url.netloc.lower() == endpoint.netloc.lower():
        path = path.removeprefix(endpoint.path.rstrip("/"))
    elif url.netloc.lower() not in _HUB_HOSTS:
        raise _no_repo(text, "not a URL of the Hub (huggingface.co, or HF_ENDPOINT)")
    # Split before unquoting: a branch `a/b` arrives as `a%2Fb`.
    parts = [unquote(part) for part in path.strip("/").split("/")]
    if len(parts) < 2 or parts[0] in _NOT_MODELS:
        raise _no_repo(text, "not the URL of a model repository")
    repo, rest = "/".join(parts[:2]), parts[2:]
    if not rest:
        return repo, None
    if rest[0] == "tree" and (len(rest) == 2 or (len(rest) == 4 and rest[1] == "refs")):
        return repo, "/".join(rest[1:])
    raise _no_repo(text, "names a file or folder inside the repository", "write org/model@rev")


def _no_repo(text: str, message: str, remedy: str | None = None) -> UsageError:
    return UsageError(message, "reference", file=clean(public(text)), remedy=remedy)


def _one_revision(text: str, typed: str | None, option: str | None) -> str | None:
    if typed is not None and option is not None:
        raise UsageError(
            "the revision is given twice, in the reference and as an option",
            "revision",
            file=clean(text),
        )
    return typed if option is None else check_revision(option, file=text)


def _home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


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
    if path.endswith(_WEIGHT_SUFFIXES):
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
