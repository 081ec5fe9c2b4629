"""What went wrong between us and a server, as errors of ours; every text in them is inert."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from projaudit.errors import (
    AuthError,
    NetworkError,
    NotFoundError,
    OfflineError,
    ProjauditError,
    RateLimitError,
)
from projaudit.hub.guard import http
from projaudit.inert import clean

# RateLimit: "api";r=0;t=55 — nothing left, the window ends in 55 s.
_EXHAUSTED = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})(?!\d)")


class Retry(Exception):
    """One attempt failed in a way that a later one may not."""

    def __init__(self, error: ProjauditError, after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        """What is raised if there is no later one."""
        self.after = after
        """Seconds that the server asks to wait."""


def refusal(
    response: Any, about: str, endpoint: str, token: str | None, *, file: bool
) -> ProjauditError:
    """The error that an unwanted status means, for a file of a repository or for itself."""
    status, headers = response.status_code, response.headers
    code, said = headers.get("x-error-code", ""), headers.get("x-error-message", "")
    repo = "/".join(about.partition("@")[0].split("/")[:2])
    quoted = f" ({clean(said, 200)})" if said else ""
    if code == "GatedRepo":
        return AuthError(
            "gated: its owner grants access on request",
            "gated",
            file=about,
            remedy=f"ask for access at {host_of(endpoint)}/{repo} and set HF_TOKEN",
        )
    if code == "RevisionNotFound":
        return NotFoundError("no such branch, tag or commit", "revision", file=about)
    if code == "EntryNotFound" or (status == 404 and file and not code):
        return NotFoundError("no such file at this commit", "file", file=about)
    if said == "Access to this resource is disabled." or status == 451:
        return AuthError("the Hub has disabled this repository", "disabled", file=about)
    if status == 401 and said.startswith("Invalid") and token:
        return AuthError("the Hub refuses the token", "token", file=about, remedy="check HF_TOKEN")
    if code == "RepoNotFound" or status in (401, 404, 410):
        seen = "this token cannot see it" if token else "no token is set"
        return NotFoundError(
            f"no such repository on {host_of(endpoint)}, or it is private and {seen}",
            "repo",
            file=repo,
            remedy="check the name; for a private repository set HF_TOKEN",
        )
    if status == 403:
        return AuthError(
            f"access refused{quoted}", "refused", file=about, remedy="check what HF_TOKEN permits"
        )
    host = host_of(str(response.request.url))
    return NetworkError(f"{host} answered {status}{quoted}", "status", file=about)


def busy(response: Any, about: str, patience: float, hint: str = "") -> Retry:
    """What a status means that may pass, where `patience` seconds of waiting are left."""
    after = _retry_after(response.headers)
    host, status = host_of(str(response.request.url)), response.status_code
    if status == 429 or (after is not None and after > patience):
        error: ProjauditError = RateLimitError(
            f"{host} asks for patience ({status})",
            file=about,
            remedy=f"try again later{hint}",
        )
    else:
        error = NetworkError(f"{host} answered {status}", "server", file=about)
    return Retry(error, after)


def broken(error: Exception, host: str, about: str) -> Exception:
    """What a failure below HTTP means; its own text may hold headers, so it is not shown."""
    library = http()
    if isinstance(error, library.TimeoutException):
        return Retry(NetworkError(f"no answer from {host} in time", "timeout", file=about))
    causes: list[BaseException | None] = [error]
    while causes[-1] is not None and len(causes) < 8:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
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
    if isinstance(error, library.ConnectError):
        return Retry(NetworkError(f"cannot connect to {host}", "connection", file=about))
    if isinstance(error, library.NetworkError | library.RemoteProtocolError):
        return Retry(NetworkError(f"{host} dropped the connection", "connection", file=about))
    return NetworkError(
        f"no sound HTTP exchange with {host} ({type(error).__name__})", "connection", file=about
    )


def stopped_short(about: str) -> Retry:
    """What it means that a body ends before its end."""
    return Retry(NetworkError("the transfer stopped short", "incomplete", file=about))


def nonsense(about: str, what: str) -> NetworkError:
    """The error that an answer is none that a Hub gives."""
    return NetworkError(
        f"the answer is not a Hub's: {what}",
        "answer",
        file=about,
        remedy="check HF_ENDPOINT and whether a proxy or login page is in between",
    )


def not_cached(about: str, message: str = "not in a cache, and offline mode is on") -> OfflineError:
    """The error that something would have to be fetched in offline mode."""
    return OfflineError(
        message,
        "not-cached",
        file=about,
        remedy="run once online (unset HF_HUB_OFFLINE, or without --offline)",
    )


def host_of(url: str) -> str:
    """The host and port of a URL, to show."""
    with suppress(ValueError):
        return clean(urlsplit(url).netloc.rpartition("@")[2], 100)
    return "the server"


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
