"""Exact byte ranges of a file on a server that is no Hub, as long as the file stays what it was."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from projaudit.errors import (
    AuthError,
    FormatError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    ProjauditError,
)
from projaudit.hub.failures import host_of, stopped_short
from projaudit.hub.guard import guarded_client
from projaudit.hub.link import Link, Request
from projaudit.inert import clean
from projaudit.source import RepoFile

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_SIZE = re.compile(r"[0-9]{1,19}")
_TOO_FAR = re.compile(r"bytes \*/0")

State = tuple[tuple[str, str], ...]
"""(header, value) of what names a file's state: ETag, generation, time of its last change."""


class NoRanges(Exception):
    """The server answered a range with the whole file."""


@dataclass(frozen=True)
class Item:
    """A file on a server: what was listed, and how to ask for it."""

    file: RepoFile
    about: str
    """The file as errors name it; inert, without signatures."""
    request: Callable[[], Request]
    """URL and headers of one request, signed for the next hour or so."""
    state: State
    """Headers that every answer has to carry with these values."""
    conditional: bool = False
    """Whether the request asks for that state itself, so that an answer may leave them out."""


def get_range(link: Link, item: Item, start: int, stop: int, account: str) -> bytearray:
    """The bytes `start` to `stop` of a file; the missing tail is asked for again, within a budget.

    Raises NoRanges where the server sends the whole file instead, IntegrityError
    (`integrity.content-range`, `.size`, `.encoding`, `.changed`) where it sends another range,
    more, or of another state, and what `Link.exchange` and `refusal` raise.
    """
    data = bytearray()

    def prepare() -> Request:
        url, headers = item.request()
        return url, {**headers, "range": f"bytes={start + len(data)}-{stop - 1}"}

    def consume(response: Any, _: str | None) -> None:
        first, size = start + len(data), item.file.size
        if response.status_code == 200:
            if (start, stop) != (0, size):
                raise NoRanges
            data.clear()
        elif response.status_code == 206:
            said = response.headers.get("content-range", "nothing")
            match = _CONTENT_RANGE.fullmatch(said)
            if match is None or match.groups() != (str(first), str(stop - 1), str(size)):
                raise IntegrityError(
                    f"bytes {first} to {stop - 1} of {size} asked for, the server says "
                    + clean(said, 80),
                    "content-range",
                    file=item.about,
                )
        else:
            raise refusal(response, item.about, account)
        _check_state(response, item)
        _check_length(response, item, stop - start - len(data))
        for chunk in link.body(response, item.about):
            data.extend(chunk)
            if len(data) > stop - start:
                raise IntegrityError("more bytes than asked for", "size", file=item.about)
        if len(data) < stop - start:
            raise stopped_short(item.about)

    with guarded_client(link.endpoint, limits=link.limits):
        link.exchange("GET", prepare, consume, item.about)
    return data


def get_whole(link: Link, item: Item, sink: Callable[[int, bytes], None], account: str) -> None:
    """Gives all of a file to `sink` as (position, bytes), from 0 again after each failure."""

    def consume(response: Any, _: str | None) -> None:
        if response.status_code != 200:
            raise refusal(response, item.about, account)
        _check_state(response, item)
        _check_length(response, item, item.file.size)
        at = 0
        for chunk in link.body(response, item.about):
            if at + len(chunk) > item.file.size:
                raise IntegrityError("more bytes than announced", "size", file=item.about)
            sink(at, chunk)
            at += len(chunk)
        if at < item.file.size:
            raise stopped_short(item.about)

    with guarded_client(link.endpoint, limits=link.limits):
        link.exchange("GET", item.request, consume, item.about)


def look(
    link: Link, request: Request, about: str, account: str, names: tuple[str, ...]
) -> tuple[int, State]:
    """The size of a file and the state that the headers `names` give, by asking for one byte.

    Not by HEAD, which a signature for GET does not cover. Raises FormatError for an empty file,
    NetworkError (`network.answer`) where no size is said, and as `get_range`.
    """

    def prepare() -> Request:
        return request[0], {**request[1], "range": "bytes=0-0"}

    def consume(response: Any, _: str | None) -> tuple[int, State]:
        headers, status = response.headers, response.status_code
        said = headers.get("content-range", "")
        if status == 416 and _TOO_FAR.fullmatch(said):
            raise FormatError("is empty", "truncated", file=about)
        if status not in (200, 206):
            raise refusal(response, about, account)
        match = _CONTENT_RANGE.fullmatch(said) if status == 206 else None
        size = match[3] if match else headers.get("content-length", "") if status == 200 else ""
        if not _SIZE.fullmatch(size):
            raise NetworkError("the server does not say how large it is", "answer", file=about)
        if "text/html" in headers.get("content-type", ""):
            raise NetworkError(
                "the server answers with a web page", "answer", file=about, remedy="check the URL"
            )
        if status == 206:
            for chunk in link.body(response, about):
                if len(chunk) > 1:
                    raise IntegrityError("more bytes than asked for", "size", file=about)
        return int(size), tuple((name, headers[name]) for name in names if name in headers)

    with guarded_client(link.endpoint, limits=link.limits):
        return link.exchange("GET", prepare, consume, about)


def refusal(response: Any, about: str, account: str) -> ProjauditError:
    """The error that an unwanted status means; nothing that the server writes is quoted."""
    status, host = response.status_code, host_of(str(response.request.url))
    if status in (401, 403):
        return AuthError(f"{host} refuses access ({status})", "refused", file=about, remedy=account)
    if status in (404, 410):
        return NotFoundError(f"no such file on {host}", "file", file=about)
    if status == 412:
        return _changed(about)
    if status == 416:
        return IntegrityError(
            "the server holds fewer bytes than announced", "content-range", file=about
        )
    return NetworkError(f"{host} answered {status}", "status", file=about)


def check_redirect(here: str, there: str) -> None:
    """None, or NetworkError (`network.redirect`) where a redirect leads where none should.

    To anything but https from https, to the addresses that only this machine or its provider's
    network answer, and to private networks from a public one. Names are resolved, but may resolve
    to something else a moment later: that is left to whoever runs the resolver.
    """
    old, new = urlsplit(here), urlsplit(there)
    if new.scheme not in ("http", "https"):
        raise _astray(old.hostname, f"to {new.scheme!r}")
    if old.scheme == "https" and new.scheme == "http":
        raise _astray(old.hostname, "from https to http")
    if new.netloc == old.netloc:
        return
    targets = _addresses(new.hostname or "")
    if any(ip.is_link_local or ip.is_unspecified or ip.is_multicast for ip in targets):
        raise _astray(old.hostname, "to an address inside this machine's own network")
    if any(not ip.is_global for ip in targets):
        origin = _addresses(old.hostname or "")
        if not origin or any(ip.is_global for ip in origin):
            raise _astray(old.hostname, "from a public server to a private address")


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """What a name or a number (2852039166 is one too) means as addresses; none if unknown here."""
    found = []
    with suppress(OSError, UnicodeError):
        for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with suppress(ValueError):
                ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
                found.append(getattr(ip, "ipv4_mapped", None) or ip)
    return found


def _astray(host: str | None, where: str) -> NetworkError:
    return NetworkError(
        f"refused to follow the server: it redirects {where}", "redirect", file=clean(host, 100)
    )


def _check_state(response: Any, item: Item) -> None:
    for name, value in item.state:
        if response.headers.get(name, value if item.conditional else "") != value:
            raise _changed(item.about)


def _check_length(response: Any, item: Item, expected: int) -> None:
    headers: Mapping[str, str] = response.headers
    # Some stores keep the encoding that a client wrapped its upload in, and none of its bytes.
    if headers.get("content-encoding", "identity") not in ("identity", "aws-chunked"):
        raise IntegrityError("compressed although asked not to be", "encoding", file=item.about)
    # A shorter body is a broken transfer, and asked for again; a longer one is a lie.
    said = headers.get("content-length", "")
    if _SIZE.fullmatch(said) and int(said) > expected:
        raise IntegrityError(f"{said} bytes, {expected} expected", "size", file=item.about)


def _changed(about: str) -> IntegrityError:
    return IntegrityError(
        "changed while it was audited", "changed", file=about, remedy="audit it again"
    )
