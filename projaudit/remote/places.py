"""From a reference to a `Source`, for what is neither on this machine nor on a Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from projaudit.errors import OfflineError, UsageError
from projaudit.hub.guard import Limits
from projaudit.hub.link import Link, is_offline
from projaudit.refs import Ref
from projaudit.remote import buckets, web
from projaudit.remote.registry import open_model
from projaudit.remote.source import Progress, RemoteSource
from projaudit.remote.transfer import check_redirect
from projaudit.source import Source


def open_remote(
    ref: Ref,
    *,
    offline: bool = False,
    verify: Literal["range", "full"] = "range",
    limits: Limits | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Source:
    """The source of an `s3://`, `gs://`, `https://`, `models:/` or `runs:/` reference, listed.

    The state of every file is pinned as it is listed, and checked at each read. Nothing is kept on
    disk when it is closed, so offline there is nothing to read. Raises OfflineError
    (`offline.not-cached`), UsageError (`usage.extra` where a library is missing, `usage.option` for
    `verify="full"`: these places name no digests), and what the network and its checks raise.
    """
    if verify == "full":
        raise UsageError(
            "names no digests to verify whole files by", "option", file=ref.text, field="--verify"
        )
    if offline or is_offline():
        raise OfflineError(
            "offline mode is on, and nothing of it is cached",
            "not-cached",
            file=ref.text,
            remedy="download it and audit the folder, or run online",
        )

    def opened(wanted: Ref) -> RemoteSource:
        bounds = limits or Limits()
        link = Link("https://invalid", bounds, False, notify or _quiet, follow=check_redirect)
        assert wanted.uri is not None
        scheme = wanted.uri.partition(":")[0]
        if scheme == "https":
            link.endpoint = "https://" + wanted.uri.split("/")[2]
            items, one_file = web.find_file(wanted, link)
        else:
            items, one_file = buckets.find_objects(wanted, link)
        account = buckets.ACCOUNTS.get(scheme, web.ACCOUNT)
        return RemoteSource(
            wanted,
            items,
            link,
            account=account,
            one_file=one_file,
            progress=progress,
            notify=notify,
        )

    if ref.kind == "mlflow":
        return open_model(ref, opened, limits or Limits(), notify or _quiet)
    return opened(ref)


def _quiet(line: str) -> None:
    """Told of nothing."""
