"""Folders in buckets, S3's by s3fs and Google's by gcsfs: listed, pinned, and each file signed."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

from projaudit.errors import (
    AuthError,
    IntegrityError,
    LimitError,
    NetworkError,
    NotFoundError,
    ProjauditError,
    UsageError,
)
from projaudit.hub.link import Link, Request
from projaudit.inert import clean
from projaudit.refs import Ref, is_sound_path
from projaudit.remote.transfer import Item, State
from projaudit.source import MAX_FILES, RepoFile

Page = tuple[list[tuple[str, int, State]], str | None]
"""(key, size, state) of each object of a page of a listing, and what gives the next page."""
Turn = Callable[[str | None], Page]

ACCOUNTS = {
    "s3": "check the account (AWS_PROFILE, AWS_ACCESS_KEY_ID) and what it may read",
    "gs": "check the account (gcloud auth application-default login) and what it may read",
}
PAGE = 1000
"""Objects of one answer; what both services give at most."""
MAX_PAGES = 2000
_HOUR = 3600


def find_objects(ref: Ref, link: Link) -> tuple[dict[str, Item], bool]:
    """The files of a bucket's folder by their relative path, and whether it is one file instead.

    Sets the link's endpoint to the server that holds them. Raises NotFoundError
    (`not-found.path`), AuthError (`auth.refused`), NetworkError, IntegrityError
    (`integrity.path`, `.listing`, `.etag`), LimitError (`limit.files`), and UsageError
    (`usage.extra`) where the library is not installed.
    """
    assert ref.uri is not None
    scheme, _, rest = ref.uri.partition("://")
    bucket, _, key = rest.partition("/")
    listing, signed = _OPEN[scheme](ref, link, bucket)
    found, one_file = _objects(ref, link, listing, key)
    items = {}
    for path, (name, size, state) in found.items():
        about = clean(ref.text if one_file else f"{ref.text}/{path}")
        items[path] = Item(
            RepoFile(path, size),
            about,
            partial(signed, name, state),
            state,
            conditional=scheme == "gs",
        )
    first = next(iter(items.values()))
    url = urlsplit(first.request()[0])
    link.endpoint = f"{url.scheme}://{url.netloc}"
    return items, one_file


def _objects(
    ref: Ref, link: Link, listing: Callable[[str], Turn], key: str
) -> tuple[dict[str, tuple[str, int, State]], bool]:
    """Relative path -> (key, size, state): what lies under the folder, else the one object."""
    for prefix in [f"{key}/", key] if key else [""]:
        one_file = bool(key) and prefix == key
        found: dict[str, tuple[str, int, State]] = {}
        # The object itself stands before all others of that beginning: on the first page.
        most = 1 if one_file else MAX_PAGES
        for name, size, state in _pages(ref, link, listing(prefix), most):
            path = posixpath.basename(name) if one_file else name.removeprefix(prefix)
            if (one_file and name != key) or name.endswith("/") or not path:
                continue  # a neighbour of the same beginning; a folder's own marker
            where = clean(f"{ref.text}/{path}")
            if not name.startswith(prefix) or not is_sound_path(path):
                raise IntegrityError("a name that no file can have", "path", file=where)
            if not 0 <= size < 1 << 63:
                raise IntegrityError(f"listed with size {size}", "size", file=where)
            if not all(value for _, value in state):
                raise IntegrityError("listed without what names its state", "etag", file=where)
            if path in found:
                raise IntegrityError("listed twice", "listing", file=where)
            found[path] = (name, size, state)
            if len(found) > MAX_FILES:
                raise LimitError(
                    f"more than {MAX_FILES} files",
                    "files",
                    file=ref.text,
                    remedy="name the folder of one model",
                )
        if found:
            return dict(sorted(found.items())), one_file
    raise NotFoundError("no such folder or file in the bucket", "path", file=ref.text)


def _pages(ref: Ref, link: Link, turn: Turn, most: int) -> Iterator[tuple[str, int, State]]:
    token: str | None = None
    for _ in range(most):
        link.traffic.requests += 1
        found, following = turn(token)
        yield from found
        if following is None or most == 1:
            return
        if following == token:
            break
        token = following
    raise NetworkError("pages of the listing without an end", "answer", file=ref.text)


def _open_s3(
    ref: Ref, link: Link, bucket: str
) -> tuple[Callable[[str], Turn], Callable[[str, State], Request]]:
    s3fs = _library("s3fs", "s3", ref)
    from fsspec.asyn import sync

    limits = link.limits
    config = {
        "connect_timeout": limits.connect,
        "read_timeout": limits.read,
        "retries": {"max_attempts": 2},
    }

    def connected(**more: Any) -> Any:
        fs = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={**config, **more.pop("config", {})},
            **more,
        )
        fs.retries = 2
        fs.connect()
        return fs

    def anonymous() -> bool:
        session = fs.session
        return sync(fs.loop, session.get_credentials) is None

    # The old signatures that boto still prefers for links do not read what KMS encrypts.
    fs = _asked(ref, "s3", lambda: connected(config={"signature_version": "s3v4"}))
    if _asked(ref, "s3", anonymous):
        link.notify(f"{ref.text}: no AWS account is configured, so it is asked without one")
        fs = _asked(ref, "s3", lambda: connected(anon=True))

    def listing(prefix: str) -> Turn:
        def turn(token: str | None) -> Page:
            more = {"ContinuationToken": token} if token else {}
            answer = _asked(
                ref,
                "s3",
                lambda: fs.call_s3(
                    "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=PAGE, **more
                ),
            )
            page: list[tuple[str, int, State]] = [
                (str(one["Key"]), int(one["Size"]), (("etag", str(one.get("ETag") or "")),))
                for one in answer.get("Contents", ())
            ]
            return page, answer.get("NextContinuationToken") if answer["IsTruncated"] else None

        return turn

    def signed(key: str, state: State) -> Request:
        client = fs.s3
        params = {"Bucket": bucket, "Key": key}
        url = sync(
            fs.loop, client.generate_presigned_url, "get_object", Params=params, ExpiresIn=_HOUR
        )
        return str(url), {}

    return listing, signed


def _open_gs(
    ref: Ref, link: Link, bucket: str
) -> tuple[Callable[[str], Turn], Callable[[str, State], Request]]:
    gcsfs = _library("gcsfs", "gcs", ref)
    fs = _asked(
        ref,
        "gs",
        lambda: gcsfs.GCSFileSystem(
            access="read_only",
            skip_instance_cache=True,
            use_listings_cache=False,
            requests_timeout=link.limits.read,
        ),
    )
    base = f"{fs.base}b/{quote(bucket, safe='')}/o"

    def listing(prefix: str) -> Turn:
        def turn(token: str | None) -> Page:
            more = {"pageToken": token} if token else {}
            answer = _asked(
                ref,
                "gs",
                lambda: fs.call(
                    "GET", "b/{}/o", bucket, prefix=prefix, json_out=True, maxResults=PAGE, **more
                ),
            )
            page: list[tuple[str, int, State]] = [
                (
                    str(one["name"]),
                    int(one["size"]),
                    (("x-goog-generation", str(one["generation"])),),
                )
                for one in answer.get("items", ())
            ]
            return page, answer.get("nextPageToken")

        return turn

    def signed(key: str, state: State) -> Request:
        headers: dict[str, str] = {}
        _asked(ref, "gs", lambda: fs.credentials.apply(headers))
        generation = quote(state[0][1], safe="")
        url = f"{base}/{quote(key, safe='')}?alt=media&ifGenerationMatch={generation}"
        return url, {name.lower(): value for name, value in headers.items()}

    return listing, signed


_OPEN: Mapping[str, Any] = {"s3": _open_s3, "gs": _open_gs}


def _library(name: str, extra: str, ref: Ref) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise missing(name, extra, ref) from None


def missing(name: str, extra: str, ref: Ref) -> UsageError:
    """The error that a library of an extra is not installed."""
    return UsageError(
        f"reading it takes {name}, which is not installed",
        "extra",
        file=ref.text,
        remedy=f"pip install 'projaudit[{extra}]'",
    )


def _asked(ref: Ref, scheme: str, ask: Callable[[], Any]) -> Any:
    """What a call of s3fs or gcsfs gives; what it raises, as an error of ours.

    Their texts hold what servers write, and addresses with signatures; neither is shown.
    """
    try:
        return ask()
    except ProjauditError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        named = _code(error)
        raise NetworkError(
            f"an answer that makes no sense ({named})", "answer", file=ref.text
        ) from None
    except Exception as error:
        raise _explained(ref, scheme, error) from None


def _explained(ref: Ref, scheme: str, error: Exception) -> ProjauditError:
    code, account = _code(error), ACCOUNTS[scheme]
    kinds = {one.__name__ for one in type(error).__mro__}
    if "FileNotFoundError" in kinds:
        return NotFoundError(f"no such bucket ({code})", "path", file=ref.text)
    if kinds & {"PermissionError", "RefreshError", "DefaultCredentialsError"} or any(
        word in code for word in ("Credential", "Token", "AccessKey", "Signature", "401", "403")
    ):
        return AuthError(f"access refused ({code})", "refused", file=ref.text, remedy=account)
    if "Timeout" in code or "TimeoutError" in kinds:
        return NetworkError("no answer in time", "timeout", file=ref.text)
    if "SSL" in code or "Certificate" in code:
        return NetworkError(
            "no trusted TLS connection",
            "tls",
            file=ref.text,
            remedy="check the clock, the proxy, SSL_CERT_FILE and AWS_CA_BUNDLE",
        )
    return NetworkError(f"cannot be listed ({code})", "connection", file=ref.text)


def _code(error: BaseException) -> str:
    """The server's own code of an error, or else the name of its class; inert."""
    cause: BaseException | None = error
    for _ in range(4):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            if code:
                return clean(code, 40)
        if cause is None or cause.__cause__ is None:
            break
        cause = cause.__cause__
    code = getattr(error, "code", None)
    return clean(code, 40) if isinstance(code, int | str) else type(error).__name__
