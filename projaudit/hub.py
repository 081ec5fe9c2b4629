"""Repositories on a Hub: pinned first, then read by exact byte ranges that are checked and cached.

The order of things: a guarded HTTP client (`guarded_client`), one funnel for every request with its
retries (`_Link`), what is kept on disk (`_Cache`), the plan of ranges (`plan_blocks`), and the
source that ties them together (`open_hub`, `HubSource`).

huggingface_hub supplies the session, the token, the endpoint, the offline switch, the URLs and the
standard cache. Its own listing and download functions are not used: they retry without a bound,
fall back to stale files, follow `Link` headers with the token, and raise what their models raise.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import ssl
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from projaudit.errors import (
    AuthError,
    FormatError,
    IntegrityError,
    LimitError,
    NetworkError,
    NotFoundError,
    OfflineError,
    ProjauditError,
    RateLimitError,
    UsageError,
)
from projaudit.inert import clean
from projaudit.source import (
    MAX_FILES,
    Ref,
    RepoFile,
    Traffic,
    check_revision,
    parse_hub_id,
    refuse_lfs_pointer,
    too_long,
)

Progress = Callable[[str, int, int], None]
Notify = Callable[[str], None]
Span = tuple[int, int]
Origin = tuple[str, str, int]
T = TypeVar("T")

GAP = 1 << 20
"""Bytes between two spans that may be fetched along with them."""
BLOCK = 64 << 20
"""Largest range of one request, in bytes."""
WASTE = 0.05
"""Share of the needed bytes that bridged gaps may add in all."""
MAX_REDIRECTS = 5

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_SIZE = re.compile(r"[0-9]{1,19}")
_CACHED_RANGE = re.compile(r"(\d{1,19})-(\d{1,19})")
# RateLimit: "api";r=0;t=55 — nothing left, the window ends in 55 s.
_EXHAUSTED = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})(?!\d)")
_BUSY = {408, 429, 500, 502, 503, 504}
_PORTS = {"http": 80, "https": 443}
_METADATA_HOSTS = {"metadata", "metadata.google.internal", "instance-data"}
_METADATA_ADDRESSES = {"100.100.100.200", "fd00:ec2::254"}
_LINK_BODY = 64 << 10
_HASH_CHUNK = 4 << 20
# Replaced in tests: patching time.sleep would put a local server to sleep as well.
_sleep = time.sleep


@dataclass(frozen=True)
class Limits:
    """How long and how much a Hub may take; seconds and bytes."""

    connect: float = 10.0
    read: float = 30.0
    """Longest silence inside one answer."""
    tries: int = 5
    """Attempts at one request, and at one range."""
    patience: float = 120.0
    """All waiting between attempts together, over the life of one source."""
    grace: float = 60.0
    """Seconds after which an answer slower than `slowest` counts as stalled."""
    slowest: int = 4096
    """Bytes per second."""
    whole_files: int = 8 << 30
    """What may be read from servers that ignore ranges: one shard of the usual 5 GB and its
    neighbours (minutes on a usual line), and not a whole model of tens of GB unasked."""
    listing: int = 64 << 20
    """Bytes of JSON of one answer."""


# --------------------------------------------------------------------------- the guarded client

_guard_lock = threading.RLock()
_guarded: Counter[Origin] = Counter()
_unguarded: list[Any] = []


@contextmanager
def guarded_client(endpoint: str | None = None, *, limits: Limits | None = None) -> Iterator[None]:
    """A context in which huggingface_hub's HTTP client sends the token to `endpoint` only.

    Every request of every huggingface_hub function in the context: no Authorization to a foreign
    origin (redirects, `Link` pages, Xet routes), no step from https down to http, at most 5
    redirects, only http(s), no link-local or cloud-metadata host, finite connect and read
    timeouts. The client that was configured before is kept underneath (its proxies, certificates
    and offline hook) and restored afterwards. Nests; the client is global to the process, and so is
    the guard. Raises UsageError (`usage.endpoint`); refused requests raise NetworkError
    (`network.redirect`).
    """
    from huggingface_hub import set_client_factory

    origin = _endpoint_origin(_endpoint(endpoint))
    bounds = limits or Limits()
    with _guard_lock:
        if not _guarded:
            # There is no public getter, and a factory that a user has set must come back.
            module = import_module("huggingface_hub.utils._http")
            previous = getattr(module, "_GLOBAL_CLIENT_FACTORY", None)
            previous = previous or module.default_client_factory
            _unguarded.append(previous)
            set_client_factory(lambda: _guard(previous(), bounds))
        _guarded[origin] += 1
    try:
        yield
    finally:
        with _guard_lock:
            _guarded[origin] -= 1
            if not _guarded[origin]:
                del _guarded[origin]
            if not _guarded:
                set_client_factory(_unguarded.pop())


def _guard(client: Any, limits: Limits) -> Any:
    def before(request: Any) -> None:
        if not _guarded:  # a factory may hand out one client for ever
            return
        _check_target(request)
        given = request.extensions.get("timeout") or {}
        finite = {"connect": limits.connect, "read": limits.read}
        finite |= {"write": limits.read, "pool": limits.connect}
        kept = {name: value for name, value in given.items() if value is not None}
        request.extensions = {**request.extensions, "timeout": {**finite, **kept}}

    def after(response: Any) -> None:
        if not _guarded:
            return
        # The client logs this header to the terminal as it came.
        response.headers.pop("x-hf-warning", None)
        if response.has_redirect_location and response.request.url.scheme == "https":
            with suppress(_http().InvalidURL):
                target = response.request.url.join(response.headers["location"])
                if target.scheme == "http":
                    raise _refused(response.request.url.host, "redirects from https to http")

    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks.get("request", []), before],
        "response": [*hooks.get("response", []), after],
    }
    client.max_redirects = min(client.max_redirects, MAX_REDIRECTS)
    return client


def _check_target(request: Any) -> None:
    url = request.url
    if url.scheme not in _PORTS:
        raise _refused(url.host, f"{url.scheme!r} is neither http nor https")
    if _origin(url) in _guarded:
        return
    request.headers.pop("authorization", None)
    if url.scheme == "http" and all(scheme == "https" for scheme, _, _ in _guarded):
        raise _refused(url.host, "a step from https down to http")
    if _is_internal(url.host, {host for _, host, _ in _guarded}):
        raise _refused(url.host, "an address inside this machine or its provider's network")


def _refused(host: str, why: str) -> NetworkError:
    return NetworkError(
        f"refused to follow the server: {why}",
        "redirect",
        file=clean(host),
        remedy="check HF_ENDPOINT and the proxy settings",
    )


def _is_internal(host: str, endpoints: set[str]) -> bool:
    if host.rstrip(".").lower() in _METADATA_HOSTS:
        return True
    address = _address(host)
    if address is None:
        return False
    if address.is_loopback:
        known = [_address(name) for name in endpoints]
        return not any(one is not None and one.is_loopback for one in known)
    return address.is_link_local or address.is_unspecified or str(address) in _METADATA_ADDRESSES


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if host.rstrip(".").lower() == "localhost":
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        try:  # 2852039166 and 0xa9fea9fe are addresses too
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def _http() -> Any:
    """The HTTP library that this huggingface_hub stands on: httpx in 1.x, httpx2 in 2.x."""
    from huggingface_hub.errors import HfHubHTTPError

    for kind in HfHubHTTPError.__mro__:
        if kind.__name__ == "HTTPError":
            return sys.modules[kind.__module__.partition(".")[0]]
    raise RuntimeError("this huggingface_hub does not stand on httpx")


def _origin(url: Any) -> Origin:
    return url.scheme, url.host, url.port or _PORTS.get(url.scheme, 0)


def _endpoint(endpoint: str | None) -> str:
    from huggingface_hub import constants

    return (endpoint or constants.ENDPOINT).rstrip("/")


def _endpoint_origin(endpoint: str) -> Origin:
    http = _http()
    try:
        url = http.URL(endpoint)
    except http.InvalidURL:
        url = None
    if url is None or url.scheme not in _PORTS or not url.host:
        raise UsageError(
            "is not the http(s) address of a Hub",
            "endpoint",
            file="HF_ENDPOINT",
            field=clean(endpoint),
        )
    return _origin(url)


# --------------------------------------------------------------------------- requests and retries


class _Retry(Exception):
    """One attempt failed in a way that a later one may not."""

    def __init__(self, error: ProjauditError, after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after


class _NoRanges(Exception):
    """The server answered a range with the whole file."""


@dataclass
class _Link:
    """The way to one Hub: every request goes through `exchange`, which retries within a budget."""

    endpoint: str
    limits: Limits
    offline: bool
    notify: Notify | None
    traffic: Traffic = field(default_factory=Traffic)
    token: str | None = None
    _left: float = field(init=False)

    def __post_init__(self) -> None:
        self._left = self.limits.patience

    def exchange(
        self,
        method: Literal["GET", "HEAD"],
        prepare: Callable[[], tuple[str, Mapping[str, str]]],
        consume: Callable[[Any, str | None], T],
        about: str,
    ) -> T:
        """What `consume(response, redirect target)` makes of the answer, tried up to `tries` times.

        `prepare` gives URL and headers of each attempt. Redirects are followed here, except that a
        redirect to a foreign origin which carries the file's metadata is an answer.
        """
        if self.offline:
            raise _offline(about)
        for attempt in range(1, self.limits.tries + 1):
            try:
                return self._attempt(method, *prepare(), consume, about)
            except _Retry as failed:
                if attempt == self.limits.tries:
                    raise failed.error from None
                self._wait(failed, 0.5 * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _attempt(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        consume: Callable[[Any, str | None], T],
        about: str,
    ) -> T:
        from huggingface_hub import get_session
        from huggingface_hub.errors import OfflineModeIsEnabled

        http = _http()
        timeout = http.Timeout(self.limits.read, connect=self.limits.connect)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                self.traffic.requests += 1
                with get_session().stream(
                    method,
                    url,
                    headers=self._headers(url, headers),
                    timeout=timeout,
                    follow_redirects=False,
                ) as response:
                    target = None
                    if response.has_redirect_location:
                        target = str(response.request.url.join(response.headers["location"]))
                        metadata = method == "HEAD" and "x-repo-commit" in response.headers
                        if not metadata or self.is_home(target):
                            self._finish(response)
                            url = target
                            continue
                    if response.status_code in _BUSY:
                        raise self._busy(response, about)
                    return consume(response, target)
            raise NetworkError(f"more than {MAX_REDIRECTS} redirects", "redirect", file=about)
        except http.TimeoutException:
            raise _Retry(
                NetworkError(f"no answer from {_host(url)} in time", "timeout", file=about)
            ) from None
        except http.InvalidURL:
            raise NetworkError(
                "the server points to what is no URL", "answer", file=about
            ) from None
        except http.HTTPError as error:
            raise _transport_error(error, _host(url), about) from None
        except OfflineModeIsEnabled:
            raise _offline(about) from None

    def json(self, url: str, about: str) -> tuple[Any, str | None]:
        """The JSON of an API answer and the URL of its next page; raises as `exchange`."""

        def consume(response: Any, _: str | None) -> tuple[Any, str | None]:
            if response.status_code != 200:
                raise self.refusal(response, about)
            body = bytearray()
            for chunk in self.body(response, about):
                body += chunk
                if len(body) > self.limits.listing:
                    raise LimitError(
                        f"an answer above {self.limits.listing} bytes", "listing", file=about
                    )
            try:
                value = json.loads(body)
            except (ValueError, RecursionError):
                raise _nonsense(about, "no JSON") from None
            return value, response.links.get("next", {}).get("url")

        return self.exchange("GET", lambda: (url, {}), consume, about)

    def body(self, response: Any, about: str) -> Iterator[bytes]:
        """The pieces of an answer's body, counted; raises _Retry where it only trickles."""
        encoded = response.headers.get("content-encoding", "identity") != "identity"
        began = time.monotonic()
        counted = 0
        for chunk in response.iter_bytes() if encoded else response.iter_raw():
            self.traffic.bytes += response.num_bytes_downloaded - counted
            counted = response.num_bytes_downloaded
            yield chunk
            taken = time.monotonic() - began
            if taken > self.limits.grace and counted < self.limits.slowest * taken:
                raise _Retry(NetworkError("the answer only trickles in", "timeout", file=about))

    def is_home(self, url: str) -> bool:
        """Whether a URL is of the endpoint's own origin."""
        return _origin(_http().URL(url)) == _endpoint_origin(self.endpoint)

    def refusal(self, response: Any, about: str, *, file: bool = False) -> ProjauditError:
        """The error that an unwanted status means."""
        status, headers = response.status_code, response.headers
        code, said = headers.get("x-error-code", ""), headers.get("x-error-message", "")
        repo = "/".join(about.partition("@")[0].split("/")[:2])
        page = f"{_host(self.endpoint)}/{repo}"
        if code == "GatedRepo":
            return AuthError(
                "gated: its owner grants access on request",
                "gated",
                file=about,
                remedy=f"ask for access at {page} and set HF_TOKEN",
            )
        if code == "RevisionNotFound":
            return NotFoundError("no such branch, tag or commit", "revision", file=about)
        if code == "EntryNotFound" or (status == 404 and file and not code):
            return NotFoundError("no such file at this commit", "file", file=about)
        if said == "Access to this resource is disabled." or status == 451:
            return AuthError("the Hub has disabled this repository", "disabled", file=about)
        if status == 401 and said.startswith("Invalid") and self.token:
            return AuthError(
                "the Hub refuses the token", "token", file=about, remedy="check HF_TOKEN"
            )
        if code == "RepoNotFound" or status in (401, 404, 410):
            seen = "this token cannot see it" if self.token else "no token is set"
            return NotFoundError(
                f"no such repository on {_host(self.endpoint)}, or it is private and {seen}",
                "repo",
                file=repo,
                remedy="check the name; for a private repository set HF_TOKEN",
            )
        if status == 403:
            return AuthError(
                "access refused" + (f" ({clean(said, 200)})" if said else ""),
                "refused",
                file=about,
                remedy="check what HF_TOKEN permits",
            )
        return NetworkError(
            f"{_host(str(response.request.url))} answered {status}"
            + (f" ({clean(said, 200)})" if said else ""),
            "status",
            file=about,
        )

    def _headers(self, url: str, extra: Mapping[str, str]) -> dict[str, str]:
        from projaudit import __version__

        headers = {"user-agent": f"projaudit/{__version__}", "accept-encoding": "identity", **extra}
        if self.token is not None and self.is_home(url):
            headers["authorization"] = f"Bearer {self.token}"
        return headers

    def _finish(self, response: Any) -> None:
        # A short body is read so that the connection can be used again; a long one is not.
        with suppress(ValueError):
            if int(response.headers.get("content-length", _LINK_BODY + 1)) <= _LINK_BODY:
                self.traffic.bytes += len(response.read())

    def _busy(self, response: Any, about: str) -> _Retry:
        after = _retry_after(response.headers)
        host, status = _host(str(response.request.url)), response.status_code
        if status == 429 or (after is not None and after > self._left):
            return _Retry(
                RateLimitError(
                    f"{host} asks for patience ({status})",
                    file=about,
                    remedy="try again later" + ("" if self.token else ", or set HF_TOKEN"),
                ),
                after,
            )
        return _Retry(NetworkError(f"{host} answered {status}", "server", file=about), after)

    def _wait(self, failed: _Retry, backoff: float) -> None:
        seconds = backoff if failed.after is None else failed.after
        if seconds > self._left:
            error = failed.error
            error.message += f": {seconds:.0f} s to wait, {self._left:.0f} s left in the budget"
            raise error from None
        self._left -= seconds
        if seconds >= 1 and self.notify is not None:
            self.notify(f"waiting {seconds:.0f} s: {failed.error.message}")
        if seconds > 0:
            _sleep(seconds)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after", "").strip()
    try:
        window = _EXHAUSTED.search(headers.get("ratelimit", ""))
        if window is not None:
            return float(window[1]) + 1
        if value.isdecimal():
            return float(value[:12])
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time()) if value else None
    except (ValueError, OverflowError):
        return None


def _transport_error(error: Exception, host: str, about: str) -> Exception:
    """What a failure below HTTP means; its own text may hold headers, so it is not shown."""
    http = _http()
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 8:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(one, ssl.SSLError) for one in causes):
        return NetworkError(
            f"no trusted TLS connection to {host}",
            "tls",
            file=about,
            remedy="check the clock, the proxy and SSL_CERT_FILE",
        )
    if any(isinstance(one, socket.gaierror) for one in causes):
        return NetworkError(
            f"cannot find the server {host}", "dns", file=about, remedy="check the network"
        )
    if isinstance(error, http.TooManyRedirects):
        return NetworkError(f"more than {MAX_REDIRECTS} redirects", "redirect", file=about)
    if isinstance(error, http.ConnectError):
        return _Retry(NetworkError(f"cannot connect to {host}", "connection", file=about))
    if isinstance(error, http.NetworkError | http.RemoteProtocolError):
        return _Retry(NetworkError(f"{host} dropped the connection", "connection", file=about))
    return NetworkError(
        f"no sound HTTP exchange with {host} ({type(error).__name__})", "connection", file=about
    )


def _nonsense(about: str, what: str) -> NetworkError:
    return NetworkError(
        f"the answer is not a Hub's: {what}",
        "answer",
        file=about,
        remedy="check HF_ENDPOINT and whether a proxy or login page is in between",
    )


def _offline(about: str, message: str = "not in a cache, and offline mode is on") -> OfflineError:
    return OfflineError(
        message,
        "not-cached",
        file=about,
        remedy="run once online (unset HF_HUB_OFFLINE, or without --offline)",
    )


def _host(url: str) -> str:
    try:
        return clean(urlsplit(url).netloc.rpartition("@")[2], 100)
    except ValueError:
        return "the server"


def _is_offline() -> bool:
    from huggingface_hub import constants

    named = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return bool(constants.HF_HUB_OFFLINE) or any(
        value.upper() in {"1", "ON", "YES", "TRUE"} for value in named
    )


def _find_token(about: str) -> str | None:
    from huggingface_hub import constants, errors, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    names = ("OIDCError", "DeviceCodeError", "LocalTokenNotFoundError", "HfHubHTTPError")
    kinds = tuple(getattr(errors, name) for name in names if hasattr(errors, name))
    try:
        token = get_token()
    except kinds as error:
        raise AuthError(
            f"no token could be obtained ({type(error).__name__})", "token", file=about
        ) from None
    if token is not None and not (token.isascii() and token.isprintable()):
        raise AuthError(
            "the token holds characters that no token has",
            "token",
            file=about,
            remedy="check HF_TOKEN",
        )
    return token


# --------------------------------------------------------------------------- what is kept on disk


@dataclass(frozen=True)
class _Cache:
    """`$XDG_CACHE_HOME/projaudit`: ranges and whole files by content id, listings by commit.

    Whatever cannot be read, or fails its checksum, is as if it were not there; whatever cannot be
    written is not kept. A range is only as good as the server that sent it under this content id,
    so ranges of a mirror stand apart from the Hub's own; whole files prove their id themselves.
    """

    root: Path
    ranges: str = "ranges"
    """Folder of the ranges of one endpoint."""

    def spans(self, oid: str) -> list[Span]:
        """The ranges of a file that are kept, the shortest first."""
        found: list[Span] = []
        with suppress(OSError), os.scandir(self._folder(oid)) as entries:
            for entry in entries:
                named = _CACHED_RANGE.fullmatch(entry.name)
                if named is not None:
                    found.append((int(named[1]), int(named[2])))
        return sorted(found, key=lambda span: span[1] - span[0])

    def load(self, oid: str, span: Span) -> bytes | None:
        """The bytes of a kept range; None, and the range forgotten, if its checksum is wrong."""
        path = self._folder(oid) / f"{span[0]}-{span[1]}"
        try:
            if path.stat().st_size != 32 + span[1] - span[0]:
                raise ValueError
            held = path.read_bytes()
            if hashlib.sha256(memoryview(held)[32:]).digest() != held[:32]:
                raise ValueError
        except OSError:
            return None
        except ValueError:
            with suppress(OSError):
                path.unlink()
            return None
        return held[32:]

    def keep(self, oid: str, span: Span, data: bytes | bytearray) -> None:
        """Keeps the bytes of a range, preceded by their SHA-256."""
        path = self._folder(oid) / f"{span[0]}-{span[1]}"
        self._write(path, hashlib.sha256(data).digest(), data)

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
        self._write(self._record(key), text.encode())

    def whole(self, oid: str) -> Path:
        """Where a whole file of this content is kept."""
        return self.root / "files" / oid[:2] / oid

    def _record(self, key: Sequence[str]) -> Path:
        name = hashlib.sha256("\0".join(key).encode()).hexdigest()
        return self.root / "repos" / f"{name}.json"

    def _folder(self, oid: str) -> Path:
        return self.root / self.ranges / oid[:2] / oid

    def _write(self, path: Path, *parts: bytes | bytearray) -> None:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                for part in parts:
                    file.write(part)
            partial.replace(path)
        except OSError:
            pass
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


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


def _open_cache(endpoint: str) -> _Cache:
    if endpoint == "https://huggingface.co":
        return _Cache(cache_root())
    return _Cache(cache_root(), f"ranges@{hashlib.sha256(endpoint.encode()).hexdigest()[:16]}")


# --------------------------------------------------------------------------- the plan of ranges


def plan_blocks(
    spans: Sequence[Span], *, gap: int = GAP, block: int = BLOCK, waste: float = WASTE
) -> list[Span]:
    """Disjoint ascending ranges (start, stop) that cover the union of the spans.

    No range is longer than `block` bytes. Gaps of at most `gap` bytes are bridged, the shortest
    first, as long as all of them together stay within `waste` times the needed bytes. No byte
    outside the hull of the spans is ever asked for.
    """
    pieces = [piece for segment in _union(spans) for piece in _chop(segment, block)]
    needed = sum(stop - start for start, stop in pieces)
    gaps = sorted(
        (after[0] - before[1], index) for index, (before, after) in enumerate(pairwise(pieces))
    )
    left = int(waste * needed)
    bridged: set[int] = set()
    for length, index in gaps:
        if length > min(gap, left):
            break
        left -= length
        bridged.add(index)
    blocks: list[Span] = []
    for index, (start, stop) in enumerate(pieces):
        if index - 1 in bridged and stop - blocks[-1][0] <= block:
            blocks[-1] = blocks[-1][0], stop
        else:
            blocks.append((start, stop))
    return blocks


def _union(spans: Sequence[Span]) -> list[Span]:
    union: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(stop, union[-1][1])
        else:
            union.append((start, stop))
    return union


def _chop(segment: Span, block: int) -> list[Span]:
    start, stop = segment
    return [(at, min(at + block, stop)) for at in range(start, stop, block)]


def _copy(
    into: Sequence[bytearray], spans: Sequence[Span], at: int, data: bytes | bytearray | memoryview
) -> None:
    """Puts the bytes of `data`, which stands at `at` in the file, where the spans want them."""
    view, end = memoryview(data), at + len(data)
    for target, (start, stop) in zip(into, spans, strict=True):
        a, b = max(start, at), min(stop, end)
        if a < b:
            target[a - start : b - start] = view[a - at : b - at]


# --------------------------------------------------------------------------- the source


@dataclass
class _Remote:
    """Where the bytes of one file lie, as the Hub said for the pinned commit."""

    url: str
    ranges: bool = True


@dataclass(frozen=True)
class _Repo:
    """A repository at one commit, as the Hub or the caches describe it."""

    id: str
    commit: str
    files: Mapping[str, RepoFile]
    base_models: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    gated: str | bool = False
    private: bool = False
    complete: bool = True


def open_hub(
    ref: Ref,
    *,
    offline: bool = False,
    verify: Literal["range", "full"] = "range",
    endpoint: str | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
    notify: Notify | None = None,
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
    offline = offline or _is_offline()
    where = _endpoint(endpoint)
    _endpoint_origin(where)
    parse_hub_id(ref.repo)
    if ref.revision is not None:
        check_revision(ref.revision, file=ref.repo)
    link = _Link(where, limits or Limits(), offline, notify)
    cache = _open_cache(where)
    if offline:
        repo = _recall(ref.repo, ref.revision, where, cache)
    else:
        with guarded_client(where, limits=link.limits):
            link.token = _find_token(ref.repo)
            _warn_of_token(link)
            repo = _resolve(ref.repo, ref.revision, link)
        _remember(ref.repo, ref.revision, repo, where, cache)
    return HubSource(ref, repo, link, cache, verify, progress)


class HubSource:
    """A Hub repository at one commit, read by checked byte ranges (a `Source`)."""

    def __init__(
        self,
        ref: Ref,
        repo: _Repo,
        link: _Link,
        cache: _Cache,
        verify: Literal["range", "full"],
        progress: Progress | None,
    ) -> None:
        self.ref = ref
        self.requested: str = ref.repo or repo.id
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
        self.verified: dict[str, Literal["full", "range", "unverified"]] = {}
        """How each file that was read is tied to the listing: "full" (digest of the whole file),
        "range" (commit, size and digest as announced; the bytes themselves only by transport),
        "unverified" (an offline snapshot that names no digest)."""
        self.fallbacks: list[str] = []
        """Files whose server ignored byte ranges, so that they were read from their start."""
        self._link = link
        self._cache = cache
        self._verify = verify
        self._progress = progress
        self._remotes: dict[str, _Remote] = {}
        self._storage: dict[str, str] = {}
        self._whole_left = link.limits.whole_files
        self._hashed: set[tuple[str, ...]] = set()
        self._scratch: Path | None = None

    def __repr__(self) -> str:
        return f"HubSource({self.id!r}, {self.commit!r})"

    @property
    def name(self) -> str:
        """The repository id that was asked for."""
        return self.requested

    @property
    def traffic(self) -> Traffic:
        """Requests sent, body bytes received, and bytes that caches supplied instead."""
        return self._link.traffic

    @property
    def renamed(self) -> bool:
        """Whether the Hub answered for another repository than the one asked for."""
        return self.id.casefold() != self.requested.casefold()

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` (end exclusive) of a file; raises as `read_spans`."""
        return self.read_spans(path, [(start, stop)])[0]

    def read_spans(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span (start, stop), in the order asked for.

        From a cached whole file, else from cached ranges, else in as few ranges as the waste bound
        permits. Raises NotFoundError (`not-found.file`), FormatError (`format.truncated`), and
        what the network and its checks raise.
        """
        file = self._listed(path)
        for start, stop in spans:
            if not 0 <= start <= stop:
                raise ValueError(f"no span: {start} to {stop}")
            if stop > file.size:
                raise FormatError(
                    f"ends at byte {file.size}, {stop} expected: truncated",
                    "truncated",
                    file=self._about(path),
                )
        held = self._read_whole(file, spans)
        if held is None and self._verify == "full":
            if self._link.offline:
                raise _offline(self._about(path), "offline, and not in a cache as a whole")
            self._download(file)
            held = self._read_whole(file, spans)
            if held is None:
                raise IntegrityError(
                    "changed right after its download", "changed", file=self._about(path)
                )
        answer = self._read_ranges(file, spans) if held is None else held
        for (start, _), data in zip(spans, answer, strict=True):
            if start == 0:
                refuse_lfs_pointer(data, self._about(path))
        return answer

    def _read_ranges(self, file: RepoFile, spans: Sequence[Span]) -> list[bytes]:
        path = file.path
        self.verified[path] = "range"
        into = [bytearray(stop - start) for start, stop in spans]
        missing = self._read_cached(file, spans, into)
        if missing:
            if self._link.offline:
                raise _offline(self._about(path))
            with guarded_client(self.endpoint, limits=self._link.limits):
                self._fetch(file, plan_blocks(missing), spans, into)
        answer: list[bytes] = []
        for index, data in enumerate(into):
            answer.append(bytes(data))
            into[index] = bytearray()  # two copies of one span at a time, not of all
        return answer

    def read_small(self, path: str, limit: int) -> bytes:
        """The whole of a small file, its digest checked; LimitError above `limit` bytes.

        Raises IntegrityError (`integrity.sha256`, `integrity.sha1`) where the bytes are not those
        of the listing, FormatError (`format.lfs-pointer`), or as `read_spans`.
        """
        file = self._listed(path)
        if file.size > limit:
            raise too_long(self._about(path), file.size, limit)
        everything = (0, file.size)
        held = self._read_whole(file, [everything])
        data = held[0] if held is not None else None
        oid = _content_id(file)
        if data is None and oid is not None:
            data = self._cache.load(oid, everything)
            if data is not None and _digest([data], file) != oid:
                data = None
            if data is not None:
                self.traffic.from_cache += len(data)
        if data is None:
            if self._link.offline:
                raise _offline(self._about(path))
            with guarded_client(self.endpoint, limits=self._link.limits):
                data = self._get_small(file)
            if oid is not None:
                if _digest([data], file) != oid:
                    raise self._wrong_digest(file)
                self._cache.keep(oid, everything, data)
        if held is None:
            self._note(path, "range" if oid is None else "full")
        refuse_lfs_pointer(data, self._about(path))
        return data

    # ----------------------------------------------------------------- whole files on disk

    def _read_whole(self, file: RepoFile, spans: Sequence[Span]) -> list[bytes] | None:
        """The spans out of a whole file that a cache holds and whose digest is right, or None."""
        for path in self._candidates(file):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                checked = self._check_whole(descriptor, file)
                if checked is None:
                    continue
                answer = [_pread(descriptor, start, stop) for start, stop in spans]
            except OSError:
                continue
            finally:
                os.close(descriptor)
            if any(
                len(data) != stop - start for data, (start, stop) in zip(answer, spans, strict=True)
            ):
                continue
            self.traffic.from_cache += sum(map(len, answer))
            self._note(file.path, checked)
            return answer
        return None

    def at_hand(self, path: str) -> bool:
        """Whether a whole copy of the file is on this machine, so that reading it is free."""
        return any(found.is_file() for found in self._candidates(self._listed(path)))

    def _candidates(self, file: RepoFile) -> Iterator[Path]:
        from huggingface_hub import try_to_load_from_cache

        for repo in dict.fromkeys((self.id, self.requested)):
            try:
                found = try_to_load_from_cache(repo, file.path, revision=self.commit)
            except (OSError, ValueError):
                continue
            if isinstance(found, str):
                yield Path(found)
        oid = _content_id(file)
        if oid is not None:
            yield self._cache.whole(oid)
            if self._scratch is not None:
                yield self._scratch / oid

    def _check_whole(self, descriptor: int, file: RepoFile) -> Literal["full", "unverified"] | None:
        state = os.fstat(descriptor)
        if state.st_size != file.size:
            return None
        oid = _content_id(file)
        if oid is None:
            return "unverified" if not self.complete else None
        key = _identity(state, oid)
        if key not in self._hashed and self._cache.record(*key) is None:
            if _digest(self._hash_pieces(descriptor, file), file) != oid:
                if self._link.notify is not None:
                    self._link.notify(f"{self._about(file.path)}: the cached copy is damaged")
                return None
            self._memoise(key)
        self._hashed.add(key)
        return "full"

    def _memoise(self, key: tuple[str, ...]) -> None:
        self._hashed.add(key)
        self._cache.keep_record({}, *key)

    def _hash_pieces(self, descriptor: int, file: RepoFile) -> Iterator[bytes]:
        for at in range(0, file.size, _HASH_CHUNK):
            piece = os.pread(descriptor, min(_HASH_CHUNK, file.size - at), at)
            self._show(file, at + len(piece), file.size)
            yield piece

    def _download(self, file: RepoFile) -> None:
        """Fetches a whole file into the cache and checks its digest, which is thereby memoised."""
        oid = _content_id(file)
        if oid is None:
            raise IntegrityError(
                "the Hub names no digest to verify this file by",
                "sha256",
                file=self._about(file.path),
            )
        target = self._cache.whole(oid)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".")
        except OSError:  # a cache that cannot be written: beside the other temporary files
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="projaudit-"))
                weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
            target = self._scratch / oid
            handle, partial = tempfile.mkstemp(dir=self._scratch, prefix=".")
        kept = False
        try:
            with os.fdopen(handle, "w+b") as out:
                with guarded_client(self.endpoint, limits=self._link.limits):
                    self._download_to(file, out)
                out.flush()
                if _digest(self._hash_pieces(out.fileno(), file), file) != oid:
                    raise self._wrong_digest(file)
                self._memoise(_identity(os.fstat(out.fileno()), oid))
            Path(partial).replace(target)
            kept = True
        except OSError as error:
            raise LimitError(
                f"no room on disk for its {file.size} bytes ({clean(error.strerror)})",
                "disk",
                file=self._about(file.path),
                remedy="set XDG_CACHE_HOME or TMPDIR to a larger disk, or use --verify range",
            ) from None
        finally:
            if not kept:
                with suppress(OSError):
                    Path(partial).unlink()

    def _download_to(self, file: RepoFile, out: Any) -> None:
        for start, stop in _chop((0, file.size), BLOCK):
            try:
                data = self._get_range(file, start, stop)
            except _NoRanges:
                self._fall_back(file)
                break
            out.write(data)
            self._show(file, stop, file.size)
        else:
            return

        def sink(at: int, chunk: bytes) -> None:
            out.seek(at)
            out.write(chunk)
            self._show(file, at + len(chunk), file.size)

        self._get_from_start(file, file.size, sink)

    # ----------------------------------------------------------------- ranges

    def _read_cached(
        self, file: RepoFile, spans: Sequence[Span], into: Sequence[bytearray]
    ) -> list[Span]:
        """Fills in what the range cache holds; the pieces that it does not hold."""
        pieces = [piece for segment in _union(spans) for piece in _chop(segment, BLOCK)]
        oid = _content_id(file)
        if oid is None:
            return pieces
        kept = self._cache.spans(oid)
        wanted: dict[Span, list[Span]] = {}
        missing: list[Span] = []
        for piece in pieces:
            covering = (span for span in kept if span[0] <= piece[0] and piece[1] <= span[1])
            found = next(covering, None)
            if found is None:
                missing.append(piece)
            else:
                wanted.setdefault(found, []).append(piece)
        for found, inside in wanted.items():
            data = self._cache.load(oid, found)
            if data is None:
                missing += inside
                continue
            view = memoryview(data)
            for start, stop in inside:
                part = view[start - found[0] : stop - found[0]]
                self.traffic.from_cache += len(part)
                _copy(into, spans, start, part)
        return sorted(missing)

    def _fetch(
        self,
        file: RepoFile,
        blocks: Sequence[Span],
        spans: Sequence[Span],
        into: Sequence[bytearray],
    ) -> None:
        oid = _content_id(file)
        total, done = sum(stop - start for start, stop in blocks), 0
        for index, (start, stop) in enumerate(blocks):
            try:
                data = self._get_range(file, start, stop)
            except _NoRanges:
                self._fall_back(file)
                self._fetch_from_start(file, blocks[index:], spans, into)
                return
            if oid is not None:
                self._cache.keep(oid, (start, stop), data)
            _copy(into, spans, start, data)
            done += stop - start
            self._show(file, done, total)

    def _fetch_from_start(
        self,
        file: RepoFile,
        blocks: Sequence[Span],
        spans: Sequence[Span],
        into: Sequence[bytearray],
    ) -> None:
        """Reads on from byte 0 to the last wanted one, keeping only what is wanted."""
        end = blocks[-1][1]

        def sink(at: int, chunk: bytes) -> None:
            self._whole_left -= len(chunk)
            _copy(into, spans, at, chunk)
            self._show(file, min(at + len(chunk), end), end)

        def affordable() -> None:
            if end > self._whole_left:
                raise LimitError(
                    f"the server ignores byte ranges; {end} bytes to read, "
                    f"{max(0, self._whole_left)} left of the budget for whole files",
                    "bytes",
                    file=self._about(file.path),
                    remedy="download the repository and audit the folder",
                )

        self._get_from_start(file, end, sink, affordable)
        oid = _content_id(file)
        if oid is not None:
            for span, data in zip(spans, into, strict=True):
                if data:
                    self._cache.keep(oid, span, data)

    def _get_range(self, file: RepoFile, start: int, stop: int) -> bytearray:
        """The bytes start to stop by HTTP; raises _NoRanges if the server has none."""
        about, data = self._about(file.path), bytearray()
        signed_again = False

        def prepare() -> tuple[str, Mapping[str, str]]:
            remote = self._remote(file)
            if not remote.ranges:
                raise _NoRanges
            return remote.url, {"range": f"bytes={start + len(data)}-{stop - 1}"}

        def consume(response: Any, _: str | None) -> None:
            nonlocal signed_again
            status = response.status_code
            if status == 200:
                if (start, stop) != (0, file.size):
                    raise _NoRanges
                data.clear()
                self._check_length(response, file, file.size)
            elif status == 206:
                first = start + len(data)
                expected = (str(first), str(stop - 1), str(file.size))
                said = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
                if said is None or said.groups() != expected:
                    raise self._contradiction(
                        file,
                        f"bytes {first} to {stop - 1} of {file.size} asked for, the server says "
                        + clean(response.headers.get("content-range", "nothing"), 80),
                        "content-range",
                    )
                self._check_length(response, file, stop - first)
            elif status in (401, 403) and not self._link.is_home(str(response.request.url)):
                error = AuthError("the storage refuses the Hub's link", "refused", file=about)
                if signed_again:
                    raise error
                signed_again = True
                del self._remotes[file.path]  # signed links expire after about an hour
                raise _Retry(error, 0.0)
            elif status == 416:
                raise self._contradiction(file, "the storage holds fewer bytes", "content-range")
            else:
                raise self._link.refusal(response, about, file=True)
            self._check_storage(response, file)
            for chunk in self._link.body(response, about):
                data.extend(chunk)
                if len(data) > stop - start:
                    raise self._contradiction(file, "more bytes than asked for", "size")
            if len(data) < stop - start:
                raise _Retry(NetworkError("the transfer stopped short", "incomplete", file=about))

        if start < stop:
            self._link.exchange("GET", prepare, consume, about)
        return data

    def _get_from_start(
        self,
        file: RepoFile,
        end: int,
        sink: Callable[[int, bytes], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Streams bytes 0 to `end` to `sink(offset, chunk)`, from 0 again in each attempt."""
        about = self._about(file.path)

        def prepare() -> tuple[str, Mapping[str, str]]:
            check()
            return self._remote(file).url, {}

        def consume(response: Any, _: str | None) -> None:
            if response.status_code != 200:
                raise self._link.refusal(response, about, file=True)
            self._check_length(response, file, file.size)
            self._check_storage(response, file)
            at = 0
            for chunk in self._link.body(response, about):
                sink(at, chunk[: end - at])
                at += len(chunk)
                if at >= end:
                    return
            raise _Retry(NetworkError("the transfer stopped short", "incomplete", file=about))

        if end:
            self._link.exchange("GET", prepare, consume, about)

    def _get_small(self, file: RepoFile) -> bytes:
        about = self._about(file.path)

        def consume(response: Any, _: str | None) -> bytes:
            if response.status_code != 200:
                raise self._link.refusal(response, about, file=True)
            data = bytearray()
            for chunk in self._link.body(response, about):
                data += chunk
                if len(data) > file.size:
                    raise self._contradiction(file, "more bytes than listed", "size")
            if len(data) < file.size:
                raise _Retry(NetworkError("the transfer stopped short", "incomplete", file=about))
            return bytes(data)

        if _content_id(file) is None:
            return bytes(self._get_range(file, 0, file.size))
        return self._link.exchange("GET", lambda: (self._resolve_url(file), {}), consume, about)

    def _remote(self, file: RepoFile) -> _Remote:
        """Where the file lies, after its commit, size and digest were compared with the listing."""
        if file.path in self._remotes:
            return self._remotes[file.path]
        about = self._about(file.path)

        def consume(response: Any, target: str | None) -> _Remote:
            headers = response.headers
            if response.status_code >= 400:
                raise self._link.refusal(response, about, file=True)
            commit = headers.get("x-repo-commit")
            etag = headers.get("x-linked-etag") or headers.get("etag")
            size = headers.get("x-linked-size")
            if size is None and target is None:
                size = headers.get("content-length")
            if commit is None:
                raise _nonsense(about, "it names no commit")
            if commit != self.commit:
                raise self._contradiction(
                    file, f"pinned to {self.commit}, answered {clean(commit, 60)}", "commit"
                )
            etag = (etag or "").removeprefix("W/").strip('"')
            oid = _content_id(file)
            if not _ETAG.fullmatch(etag) or (oid is not None and etag != oid):
                raise self._contradiction(file, f"ETag {clean(etag, 80)!r}", "etag")
            # Where a redirect leaves the size out, the total of each Content-Range is the check.
            silent = size is None and target is not None
            if not silent and (size is None or not _SIZE.fullmatch(size) or int(size) != file.size):
                raise self._contradiction(
                    file, f"{clean(size, 30)} bytes, listed with {file.size}", "size"
                )
            return _Remote(target or str(response.request.url))

        url = self._resolve_url(file)
        remote = self._link.exchange("HEAD", lambda: (url, {}), consume, about)
        if file.path in self.fallbacks:
            remote.ranges = False
        self._remotes[file.path] = remote
        return remote

    def _check_length(self, response: Any, file: RepoFile, expected: int) -> None:
        said = response.headers.get("content-length")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._contradiction(file, "compressed although asked not to be", "encoding")
        # A shorter body is a broken transfer, and asked for again; a longer one is a lie.
        if said is not None and said.isdecimal() and len(said) < 20 and int(said) > expected:
            raise self._contradiction(file, f"{said} bytes, {expected} expected", "size")

    def _check_storage(self, response: Any, file: RepoFile) -> None:
        # The storage's own ETag, which is not the Hub's; kept when a link is signed anew.
        etag = response.headers.get("etag")
        if etag is not None and self._storage.setdefault(file.path, etag) != etag:
            raise self._contradiction(file, "the stored file changed between two ranges", "etag")

    # ----------------------------------------------------------------- small things

    def _listed(self, path: str) -> RepoFile:
        file = self.files.get(path)
        if file is None:
            if not self.complete:
                raise _offline(self._about(path))
            raise NotFoundError("no such file at this commit", "file", file=self._about(path))
        return file

    def _about(self, path: str) -> str:
        return clean(f"{self.requested}/{path}")

    def _resolve_url(self, file: RepoFile) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.id, file.path, revision=self.commit, endpoint=self.endpoint)

    def _note(self, path: str, how: Literal["full", "unverified"] | Literal["range"]) -> None:
        if self.verified.get(path) != "range":
            self.verified[path] = how

    def _show(self, file: RepoFile, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(file.path, done, total)

    def _fall_back(self, file: RepoFile) -> None:
        if file.path not in self.fallbacks:
            self.fallbacks.append(file.path)
        self._remote(file).ranges = False

    def _contradiction(self, file: RepoFile, message: str, kind: str) -> IntegrityError:
        return IntegrityError(message, kind, file=self._about(file.path))

    def _wrong_digest(self, file: RepoFile) -> IntegrityError:
        kind = "sha1" if file.sha256 is None else "sha256"
        return IntegrityError(
            f"the bytes do not have the {kind} of the listing",
            kind,
            file=self._about(file.path),
            remedy="do not use this file",
        )


# --------------------------------------------------------------------------- pinning and listing


def _resolve(name: str, revision: str | None, link: _Link) -> _Repo:
    info_url = f"{link.endpoint}/api/models/{name}"
    if revision is not None:
        info_url += f"/revision/{quote(revision, safe='')}"
    # Without cardData: one odd key in a README must not hide the rest.
    wanted = ("sha", "baseModels", "tags", "gated", "private")
    about = name if revision is None else f"{name}@{clean(revision, 80)}"
    info, _ = link.json(f"{info_url}?{urlencode([('expand', one) for one in wanted])}", about)
    if not isinstance(info, dict) or not isinstance(info.get("id"), str):
        raise _nonsense(about, "it names no repository")
    try:
        identity, _ = parse_hub_id(info["id"])
    except UsageError:
        raise _nonsense(about, f"repository id {clean(info['id'], 80)!r}") from None
    commit = info.get("sha")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise IntegrityError(f"the Hub says commit {clean(commit, 80)!r}", "commit", file=about)
    if revision is not None and _COMMIT.fullmatch(revision) and commit != revision:
        raise IntegrityError(f"the Hub answers for commit {commit}", "commit", file=about)
    gated, tags = info.get("gated"), info.get("tags")
    return _Repo(
        identity,
        commit,
        _list(identity, commit, link),
        _lineage(info.get("baseModels")),
        tuple(tag[:200] for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
        gated[:20] if isinstance(gated, str) else bool(gated),
        bool(info.get("private")),
    )


def _list(name: str, commit: str, link: _Link) -> dict[str, RepoFile]:
    first = f"{link.endpoint}/api/models/{name}/tree/{commit}?recursive=true&expand=false"
    files: dict[str, RepoFile] = {}
    url: str | None = first
    seen: set[str] = set()
    while url is not None:
        seen.add(url)
        page, following = link.json(url, name)
        if not isinstance(page, list):
            raise _nonsense(name, "no list of files")
        for entry in page:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise _nonsense(name, "an entry without a path")
            if entry.get("type") == "file":
                file = _entry(entry, name)
                if file.path in files:
                    raise IntegrityError(
                        "listed twice", "listing", file=clean(f"{name}/{file.path}")
                    )
                files[file.path] = file
        if len(files) > MAX_FILES or len(seen) > MAX_FILES // 50:
            raise LimitError(f"more than {MAX_FILES} files", "files", file=name)
        url = None if following is None else _next_page(first, following, name)
        if url in seen:
            raise _nonsense(name, "pages of the listing in a circle")
    return dict(sorted(files.items()))


def _next_page(first: str, following: str, name: str) -> str:
    http = _http()
    here = http.URL(first)
    try:
        target = here.join(following)
    except http.InvalidURL:
        raise _nonsense(name, "a next page that is no URL") from None
    if _origin(target) != _origin(here):
        raise NetworkError(
            f"the listing goes on at a foreign server, {clean(target.host, 80)}",
            "answer",
            file=name,
            remedy="check HF_ENDPOINT",
        )
    return str(target)


def _entry(entry: Mapping[str, Any], name: str) -> RepoFile:
    path, size, oid, lfs = (entry.get(key) for key in ("path", "size", "oid", "lfs"))
    assert isinstance(path, str)
    about = clean(f"{name}/{path}")
    parts = path.split("/")
    if not 0 < len(path) <= 4096 or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise IntegrityError("a path that no repository can hold", "path", file=about)
    sha256 = None
    if lfs is not None:
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise IntegrityError("listed without a proper LFS object id", "etag", file=about)
        if lfs.get("size", size) != size:
            raise IntegrityError("listed with two sizes", "size", file=about)
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise IntegrityError(f"listed with size {clean(size, 40)}", "size", file=about)
    if oid is not None and (not isinstance(oid, str) or not _ETAG.fullmatch(oid)):
        raise IntegrityError("listed with an improper object id", "etag", file=about)
    return RepoFile(path, size, sha256, oid)


def _lineage(value: Any) -> tuple[tuple[str, str], ...]:
    """(repository, relation) of the Hub's `baseModels`; what is not of its form is left out."""
    groups = value if isinstance(value, list) else [value]
    found: list[tuple[str, str]] = []
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("models"), list):
            continue
        relation = group.get("relation")
        for model in group["models"][:32]:
            if isinstance(model, dict) and isinstance(model.get("id"), str):
                said = relation if isinstance(relation, str) else ""
                found.append((model["id"][:200], said[:40]))
    return tuple(found)


def _warn_of_token(link: _Link) -> None:
    host = _host(link.endpoint)
    if link.token and link.notify and host not in ("huggingface.co", "hf.co"):
        link.notify(f"the Hugging Face token of this account goes to {host} (HF_ENDPOINT)")


def _remember(name: str, revision: str | None, repo: _Repo, endpoint: str, cache: _Cache) -> None:
    """Keeps what offline mode needs and the standard cache does not hold."""
    listing = {
        "id": repo.id,
        "base_models": repo.base_models,
        "tags": repo.tags,
        "gated": repo.gated,
        "private": repo.private,
        "files": [[file.path, file.size, file.sha256, file.oid] for file in repo.files.values()],
    }
    cache.keep_record(listing, "commit", endpoint, name, repo.commit)
    asked = {"commit": repo.commit, "when": time.time()}
    cache.keep_record(asked, "revision", endpoint, name, revision or "main")


def _recall(name: str, revision: str | None, endpoint: str, cache: _Cache) -> _Repo:
    """The repository as the caches know it: ours, then the standard one's snapshot."""
    about = name if revision is None else f"{name}@{clean(revision, 80)}"
    folder = _snapshots(name)
    commit = revision if revision is not None and _COMMIT.fullmatch(revision) else None
    if commit is None:
        # Two caches may know the branch; the later knowledge is what a loader would use.
        known: list[tuple[float, str]] = []
        asked = cache.record("revision", endpoint, name, revision or "main") or {}
        if isinstance(asked.get("when"), int | float):
            known.append((float(asked["when"]), str(asked.get("commit"))))
        with suppress(OSError, ValueError):
            path = folder / "refs" / (revision or "main")
            known.append((path.stat().st_mtime, path.read_text().strip()))
        known = [one for one in known if _COMMIT.fullmatch(one[1])]
        if not known:
            raise _offline(about, "offline, and no cache knows which commit this is")
        commit = max(known)[1]
    held = cache.record("commit", endpoint, name, commit)
    if held is not None:
        with suppress(KeyError, TypeError, ValueError):
            return _Repo(
                str(held["id"]),
                commit,
                {
                    str(path): RepoFile(path, int(size), sha, oid)
                    for path, size, sha, oid in held["files"]
                },
                tuple((str(base), str(relation)) for base, relation in held["base_models"]),
                tuple(map(str, held["tags"])),
                held["gated"],
                bool(held["private"]),
            )
    files = _snapshot_files(folder / "snapshots" / commit)
    if not files:
        raise _offline(about, f"offline, and commit {commit} is in no cache")
    return _Repo(name, commit, files, complete=False)


def _snapshots(name: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def _snapshot_files(folder: Path) -> dict[str, RepoFile]:
    """The files of a snapshot in the standard cache, with the digests that its blob names are."""
    files: dict[str, RepoFile] = {}
    for path in sorted(folder.rglob("*")):
        try:
            size = path.stat().st_size
            blob = path.readlink().name if path.is_symlink() else ""
        except OSError:
            continue
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            sha256 = blob if _SHA256.fullmatch(blob) else None
            files[name] = RepoFile(name, size, sha256, blob if _COMMIT.fullmatch(blob) else None)
    return files


def _identity(state: os.stat_result, oid: str) -> tuple[str, ...]:
    """The key under which it is remembered that this very file on disk has this digest."""
    parts = (state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
    return ("whole", oid, *map(str, parts))


def _content_id(file: RepoFile) -> str | None:
    return file.sha256 or file.oid


def _digest(pieces: Iterator[bytes] | Sequence[bytes], file: RepoFile) -> str:
    """The digest of a content in the kind that the listing names: SHA-256, or git's SHA-1."""
    if file.sha256 is not None:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    parts: list[bytes] = []
    while start < stop:
        part = os.pread(descriptor, min(stop - start, 1 << 30), start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
