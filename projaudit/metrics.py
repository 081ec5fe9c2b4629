"""The register of metrics: a function's name is the metric's name in rules, JSON and docs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from projaudit.findings import Null

Subject = Literal["layer", "vector", "projector", "merge", "behaviour", "checkpoint", "dataset"]
Kind = Literal["structure", "statistic", "behaviour", "screening"]


@dataclass(frozen=True)
class Value:
    """A number with the names behind it, or beside what a random update gives."""

    value: float
    detail: tuple[str, ...] = ()
    nulls: tuple[Null, ...] = ()


@dataclass(frozen=True)
class Metric:
    """What a metric measures and where it comes from."""

    name: str
    subject: Subject
    kind: Kind
    """A structural fact is proven by the bytes; a statistic describes until it is calibrated;
    behaviour was heard, and accuses where a population says how seldom it is; a screening counts
    samples of a dataset."""
    unit: str
    reference: str
    theme: str
    """Module of `analyses` that it stands in; also a stage of the run."""
    formula: str
    """First line of the function's docstring."""
    function: Callable[[Any], float | Value]


class Skip(Exception):
    """Raised by a metric that cannot be computed for this subject; its text is the reason."""


METRICS: dict[str, Metric] = {}


def measures(
    subject: Subject, *, kind: Kind = "statistic", unit: str = "", reference: str = ""
) -> Callable[[Callable[[Any], float | Value]], Callable[[Any], float | Value]]:
    """Records a function as the metric of its name; a second one of that name is a ValueError."""

    def record(function: Callable[[Any], float | Value]) -> Callable[[Any], float | Value]:
        name = function.__name__
        if name in METRICS:
            raise ValueError(f"metric {name} is defined twice")
        formula = (inspect.getdoc(function) or "").partition("\n")[0]
        theme = function.__module__.rpartition(".")[2]
        METRICS[name] = Metric(name, subject, kind, unit, reference, theme, formula, function)
        return function

    return record
