"""The numbers of the detectors that a user may choose, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from projaudit.errors import UsageError
from projaudit.inert import clean
from projaudit.screen.tcap import Options

# (least, most) of each; a whole number where the least is one. Their defaults: `screen`, `Options`.
_RANGES: dict[str, tuple[float, float]] = {
    "threshold": (1e-6, 1e6),
    "alpha": (1e-300, 1.0),
    "words": (1, 40),
    "most_components": (2, 20),
    "late": (1e-6, 1.0),
    "heads": (1, 10_000),
    "least_share": (1e-6, 1.0),
    "most_share": (1e-6, 1.0),
    "vote": (1e-6, 1.0),
    "epsilon": (1e-12, 1.0),
}
_OF_SCREEN = ("threshold", "alpha", "words")


def numbers(given: Sequence[str]) -> dict[str, float]:
    """The numbers of `NAME=VALUE` texts. Raises UsageError (`usage.option`)."""
    found: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in _RANGES:
            names = ", ".join(_RANGES)
            raise _wrong(f"{clean(name, 40)!r} is none of {names}")
        least, most = _RANGES[name]
        whole = isinstance(least, int)
        try:
            number = int(value) if whole else float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            kind = "whole number" if whole else "number"
            raise _wrong(f"{name} is no {kind} from {least:g} to {most:g}: {clean(value, 40)!r}")
        found[name] = number
    if found.get("least_share", 0) > found.get("most_share", 1):
        raise _wrong("least_share is above most_share")
    return found


def arguments(chosen: Mapping[str, float]) -> dict[str, Any]:
    """What `screen` takes of them."""
    own: dict[str, Any] = {name: chosen[name] for name in _OF_SCREEN if name in chosen}
    of_tcap: dict[str, Any] = {name: n for name, n in chosen.items() if name not in _OF_SCREEN}
    return own | {"options": Options(**of_tcap)}


def _wrong(told: str) -> UsageError:
    return UsageError(told, "option", field="--number")
