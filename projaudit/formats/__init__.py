"""Report formats: the one table that the command and the library choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from projaudit.formats import html, json, text
from projaudit.report import Report


@dataclass(frozen=True)
class Format:
    """How a report is written in one format."""

    render: Callable[[Report], str]
    suffix: str
    """Of the file that it is written to."""


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "text": Format(text.render, ".txt"),
        "json": Format(json.render, ".json"),
        "html": Format(html.render, ".html"),
    }
)
