"""The way to one Hub: one funnel for every request, with its token, its redirects and retries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any, Literal, TypeVar

from projaudit import __version__
from projaudit.errors import AuthError, LimitError, NetworkError, ProjauditError
from projaudit.hub.failures import Retry, broken, busy, host_of, nonsense, not_cached, refusal
from projaudit.hub.guard import MAX_REDIRECTS, Limits, endpoint_origin, http, origin
from projaudit.source import Traffic

T = TypeVar("T")
Request = tuple[str, Mapping[str, str]]
"""URL and headers."""

_BUSY = {408, 429, 500, 502, 503, 504}
_REDIRECT_BODY = 64 << 10


@dataclass
class Link:
    """The way to one Hub: every request goes through `exchange`, which retries within a budget."""

    endpoint: str
    limits: Limits
    offline: bool
    notify: Callable[[str], None]
    traffic: Traffic = field(default_factory=Traffic)
    token: str | None = None
    follow: Callable[[str, str], None] | None = None
    """Told of every redirect (from, to) before it is followed, so that it may refuse; also says
    that this is no Hub's server."""
    _patience: float = field(init=False)

    def __post_init__(self) -> None:
        self._patience = self.limits.patience

    def sign_in(self, about: str) -> None:
        """Takes the token of this account, where there is one; raises AuthError (`auth.token`)."""
        self.token = _find_token(about)
        host = host_of(self.endpoint)
        if self.token and host not in ("huggingface.co", "hf.co"):
            self.notify(f"the Hugging Face token of this account goes to {host} (HF_ENDPOINT)")

    def exchange(
        self,
        method: Literal["GET", "HEAD"],
        prepare: Callable[[], Request],
        consume: Callable[[Any, str | None], T],
        about: str,
    ) -> T:
        """What `consume(response, redirect target)` makes of the answer, tried up to `tries` times.

        `prepare` gives the request of each attempt. Redirects are followed here, except that a
        redirect to a foreign origin which carries the file's metadata is an answer.
        """
        if self.offline:
            raise not_cached(about)
        attempt = 1
        while True:
            try:
                return self._attempt(method, *prepare(), consume, about)
            except Retry as failed:
                if attempt >= self.limits.tries:
                    raise failed.error from None
                self._wait(failed, 0.5 * 2 ** (attempt - 1))
            attempt += 1

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
                raise nonsense(about, "no JSON") from None
            return value, response.links.get("next", {}).get("url")

        return self.exchange("GET", lambda: (url, {}), consume, about)

    def body(self, response: Any, about: str) -> Iterator[bytes]:
        """The pieces of an answer's body, counted; raises Retry where it only trickles."""
        began, counted = monotonic(), 0
        for chunk in response.iter_bytes():
            self.traffic.bytes += response.num_bytes_downloaded - counted
            counted = response.num_bytes_downloaded
            yield chunk
            taken = monotonic() - began
            if taken > self.limits.grace and counted < self.limits.slowest * taken:
                raise Retry(NetworkError("the answer only trickles in", "timeout", file=about))

    def is_home(self, url: str) -> bool:
        """Whether a URL is of the endpoint's own origin."""
        return origin(http().URL(url)) == endpoint_origin(self.endpoint)

    def refusal(self, response: Any, about: str, *, file: bool = False) -> ProjauditError:
        """The error that an unwanted status means."""
        return refusal(response, about, self.endpoint, self.token, file=file)

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

        library = http()
        timeout = library.Timeout(self.limits.read, connect=self.limits.connect)
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
                            if self.follow is not None:
                                self.follow(str(response.request.url), target)
                            self._finish(response)
                            url = target
                            continue
                    if response.status_code in _BUSY:
                        hint = "" if self.token or self.follow else ", or set HF_TOKEN"
                        raise busy(response, about, self._patience, hint)
                    return consume(response, target)
        except library.InvalidURL:
            raise nonsense(about, "it points to what is no URL") from None
        except library.HTTPError as error:
            raise broken(error, host_of(url), about) from None
        except OfflineModeIsEnabled:
            raise not_cached(about) from None
        raise NetworkError(f"more than {MAX_REDIRECTS} redirects", "redirect", file=about)

    def _headers(self, url: str, extra: Mapping[str, str]) -> dict[str, str]:
        headers = {"user-agent": f"projaudit/{__version__}", "accept-encoding": "identity", **extra}
        if self.token is not None and self.is_home(url):
            headers["authorization"] = f"Bearer {self.token}"
        return headers

    def _finish(self, response: Any) -> None:
        # A short body is read so that the connection can be used again; a long one is not.
        with suppress(ValueError):
            if int(response.headers.get("content-length", _REDIRECT_BODY + 1)) <= _REDIRECT_BODY:
                self.traffic.bytes += len(response.read())

    def _wait(self, failed: Retry, backoff: float) -> None:
        seconds = backoff if failed.after is None else failed.after
        if seconds > self._patience:
            error = failed.error
            error.message += f": {seconds:.0f} s to wait, {self._patience:.0f} s left in the budget"
            raise error from None
        self._patience -= seconds
        if seconds >= 1:
            self.notify(f"waiting {seconds:.0f} s: {failed.error.message}")
        if seconds > 0:
            sleep(seconds)


def is_offline() -> bool:
    """Whether the environment asks for offline mode."""
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
