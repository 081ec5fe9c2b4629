"""The guarded HTTP client: the token goes to one server, and nothing goes where nobody should."""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from projaudit.errors import NetworkError, UsageError
from projaudit.inert import clean

Origin = tuple[str, str, int]

MAX_REDIRECTS = 5

_PORTS = {"http": 80, "https": 443}
_METADATA_HOSTS = {"metadata", "metadata.google.internal", "instance-data"}
_METADATA_ADDRESSES = {"100.100.100.200", "fd00:ec2::254"}

_lock = threading.RLock()
_guarded: Counter[Origin] = Counter()
_unguarded: list[Any] = []
"""The factory that was set before the outermost guard."""


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

    home = endpoint_origin(address_of(endpoint))
    bounds = limits or Limits()
    with _lock:
        if not _guarded:
            # There is no public getter, and a factory that a user has set must come back.
            module = import_module("huggingface_hub.utils._http")
            previous = getattr(module, "_GLOBAL_CLIENT_FACTORY", None)
            previous = previous or module.default_client_factory
            _unguarded.append(previous)
            set_client_factory(lambda: _guard(previous(), bounds))
        _guarded[home] += 1
    try:
        yield
    finally:
        with _lock:
            _guarded[home] -= 1
            if not _guarded[home]:
                del _guarded[home]
            if not _guarded:
                set_client_factory(_unguarded.pop())


def http() -> Any:
    """The HTTP library that this huggingface_hub stands on: httpx in 1.x, httpx2 in 2.x."""
    from huggingface_hub.errors import HfHubHTTPError

    for kind in HfHubHTTPError.__mro__:
        if kind.__name__ == "HTTPError":
            return sys.modules[kind.__module__.partition(".")[0]]
    raise RuntimeError("this huggingface_hub does not stand on httpx")


def origin(url: Any) -> Origin:
    """Scheme, host and port of a URL of the HTTP library."""
    return url.scheme, url.host, url.port or _PORTS.get(url.scheme, 0)


def address_of(endpoint: str | None) -> str:
    """The address of a Hub, without a slash at its end: the one given, or the configured one."""
    from huggingface_hub import constants

    return (endpoint or constants.ENDPOINT).rstrip("/")


def endpoint_origin(endpoint: str) -> Origin:
    """The origin of a Hub's address; raises UsageError (`usage.endpoint`)."""
    library = http()
    with suppress(library.InvalidURL):
        url = library.URL(endpoint)
        if url.scheme in _PORTS and url.host:
            return origin(url)
    raise UsageError(
        "is not the http(s) address of a Hub", "endpoint", file="HF_ENDPOINT", field=clean(endpoint)
    )


def _guard(client: Any, limits: Limits) -> Any:
    finite = {
        "connect": limits.connect,
        "read": limits.read,
        "write": limits.read,
        "pool": limits.connect,
    }

    def before(request: Any) -> None:
        if not _guarded:  # a factory may hand out one client for ever
            return
        _check_target(request)
        given = request.extensions.get("timeout") or {}
        kept = {name: value for name, value in given.items() if value is not None}
        request.extensions = {**request.extensions, "timeout": {**finite, **kept}}

    def after(response: Any) -> None:
        if not _guarded:
            return
        # The client logs this header to the terminal as it came.
        response.headers.pop("x-hf-warning", None)
        if response.has_redirect_location and response.request.url.scheme == "https":
            with suppress(http().InvalidURL):
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
    if origin(url) in _guarded:
        return
    request.headers.pop("authorization", None)
    if url.scheme == "http" and all(scheme == "https" for scheme, _, _ in _guarded):
        raise _refused(url.host, "a step from https down to http")
    if _is_internal(url.host):
        raise _refused(url.host, "an address inside this machine or its provider's network")


def _refused(host: str, why: str) -> NetworkError:
    return NetworkError(
        f"refused to follow the server: {why}",
        "redirect",
        file=clean(host),
        remedy="check the address (the Hub's is HF_ENDPOINT) and the proxy settings",
    )


def _is_internal(host: str) -> bool:
    if host.rstrip(".").lower() in _METADATA_HOSTS:
        return True
    address = _ip(host)
    if address is None:
        return False
    if address.is_loopback:
        endpoints = (_ip(name) for _, name, _ in _guarded)
        return not any(one is not None and one.is_loopback for one in endpoints)
    return address.is_link_local or address.is_unspecified or str(address) in _METADATA_ADDRESSES


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
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
