"""Untrusted text made inert: what repositories and servers say, before anyone shows it."""

from __future__ import annotations

import re
import unicodedata

# Categories that move the cursor, hide or reorder text: control, format (bidi, zero width),
# surrogate, private use, unassigned, line and paragraph separators, spaces of other widths.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
# Hub tokens, passwords in URLs, and the query strings of signed URLs.
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{8,}"
    r"|(?<=://)[^/\s?#@]+@"
    r"|(?<=[?&])[\w\-]*(?:[Ss]ig|[Tt]oken|[Pp]olicy|[Kk]ey|[Cc]redential|[Pp]assw|[Ss]ecret)"
    r"[\w\-\[\]]*=[^&\s]+"
)


def clean(text: object, limit: int = 300) -> str:
    r"""One printable line of `text`: all but graphic characters and blanks as `\u….` escapes.

    Secrets (Hub tokens, signatures in URLs) become `[redacted]`; longer texts are cut to `limit`
    characters with an ellipsis. Every sink (terminal, HTML, JSON, logs, exceptions) uses this.
    """
    raw = str(text)
    cut = raw[: limit + 1]
    shown = "".join(_escape(c) if _hidden(c) else c for c in cut)
    shown = _SECRET.sub("[redacted]", shown)
    return shown if len(raw) <= limit else shown[:limit] + "…"


def _hidden(character: str) -> bool:
    return character != " " and unicodedata.category(character) in _HIDDEN


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
