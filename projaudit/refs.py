"""What a reference means: a path, a repository of a Hub at a revision, or a URI."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from projaudit.errors import NotFoundError, UsageError
from projaudit.inert import clean

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
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")
"""Of files that a model may be made of."""

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
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise UsageError(
            "is not read; hf://, s3://, gs://, https://, file:// and models:/ are",
            "reference",
            file=clean(public(text)),
        )
    if (
        text.startswith((".", "/", "~", "\\"))
        or bare.endswith(WEIGHT_SUFFIXES)
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
    if not url.path.lower().endswith(WEIGHT_SUFFIXES):
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
