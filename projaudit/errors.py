"""The errors that projaudit raises, one tree; each has a stable `code` and an exit status.

ProjauditError                        exit
  x FormatError       format.*        2     a file that cannot be read as what it says it is
  x NetworkError      network.*       2     timeout, TLS, DNS, 5xx, an answer that makes no sense
  x AuthError         auth.*          2     gated, private, token refused
  x NotFoundError     not-found.*     2     no such path, repository, revision or file
  x RateLimitError    rate-limit      2     the server asked for more patience than the budget has
  x IntegrityError    integrity.*     2     bytes, sizes or commits that contradict each other
  x LimitError        limit.*         2     a resource limit of ours
  x OfflineError      offline.*       2     offline, and not in a cache
  x NothingError      nothing.*       3     nothing to audit
  x BaseError         base.*          3     no usable base
  x UnsupportedError  unsupported.*   3     a format, dtype or shape that is not read or compared
  x UsageError        usage.*         4     an option, rule, policy or direction file that is wrong
"""

from __future__ import annotations


class ProjauditError(Exception):
    """What went wrong, in which file and field, and what to do about it."""

    family = "error"
    exit_code = 2

    def __init__(
        self,
        message: str,
        kind: str = "",
        *,
        file: str | None = None,
        field: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = f"{self.family}.{kind}" if kind else self.family
        """Stable dotted name, as `error.code` in JSON: `format.safetensors`, `network.timeout`."""
        self.file = file
        """File, repository or option that the error is about."""
        self.field = field
        """Key, tensor or field inside the file."""
        self.remedy = remedy
        """What the user can do."""

    def __str__(self) -> str:
        """`file: field: message; remedy` with the parts that are known."""
        where = [part for part in (self.file, self.field) if part]
        text = ": ".join([*where, self.message])
        return f"{text}; {self.remedy}" if self.remedy else text


class FormatError(ProjauditError):
    """A file is unreadable, malformed, truncated or not what it says it is."""

    family = "format"


class NetworkError(ProjauditError):
    """A server could not be reached or gave an answer that makes no sense."""

    family = "network"


class AuthError(ProjauditError):
    """The server wants (another) token: gated, private or refused."""

    family = "auth"


class NotFoundError(ProjauditError):
    """No such path, repository, revision or file."""

    family = "not-found"


class RateLimitError(ProjauditError):
    """The server asks to wait longer than the retry budget allows."""

    family = "rate-limit"


class IntegrityError(ProjauditError):
    """Bytes, sizes, digests or commits contradict each other."""

    family = "integrity"


class LimitError(ProjauditError):
    """A limit of ours on bytes, tensors, files or time was reached."""

    family = "limit"


class OfflineError(ProjauditError):
    """Offline mode is on and the bytes are in no cache."""

    family = "offline"


class NothingError(ProjauditError):
    """There is nothing to audit: no weights, no projector."""

    family = "nothing"
    exit_code = 3


class BaseError(ProjauditError):
    """The base is missing or cannot be compared with."""

    family = "base"
    exit_code = 3


class UnsupportedError(ProjauditError):
    """A format, dtype or shape that projaudit does not read or compare."""

    family = "unsupported"
    exit_code = 3


class UsageError(ProjauditError):
    """An option, rule, policy, waiver or direction file is wrong."""

    family = "usage"
    exit_code = 4
