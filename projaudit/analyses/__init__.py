"""What is measured: one decorated function per metric, by theme; importing this records them."""

from __future__ import annotations

import math

from projaudit.analyses import (
    alignment,
    behaviour,
    magnitude,
    merge,
    probes,
    screening,
    spectral,
    structure,
    subspace,
)
from projaudit.analyses.context import ProjectorContext
from projaudit.findings import Measurement, Skipped
from projaudit.metrics import METRICS, Skip, Value

__all__ = [
    "METRICS",
    "ProjectorContext",
    "alignment",
    "behaviour",
    "magnitude",
    "merge",
    "probes",
    "run",
    "screening",
    "spectral",
    "structure",
    "subspace",
    "themes",
]


_ORDER = (
    "structure",
    "magnitude",
    "spectral",
    "subspace",
    "probes",
    "alignment",
    "merge",
    "behaviour",
    "screening",
)


def themes(kind: str) -> list[str]:
    """The themes that have metrics of a subject kind, each after those that it builds on."""
    return sorted({m.theme for m in METRICS.values() if m.subject == kind}, key=_ORDER.index)


def run(
    kind: str, subject: str, of: object, theme: str | None = None
) -> tuple[list[Measurement], list[Skipped]]:
    """Every metric of a subject kind (and theme), asked of one subject; not finite is skipped."""
    measured: list[Measurement] = []
    skipped: list[Skipped] = []
    for metric in METRICS.values():
        if metric.subject != kind or theme not in (None, metric.theme):
            continue
        try:
            result = metric.function(of)
        except Skip as reason:
            skipped.append(Skipped(metric.name, subject, str(reason)))
            continue
        value = result if isinstance(result, Value) else Value(result)
        if math.isfinite(value.value):
            measured.append(
                Measurement(
                    metric.name, subject, value.value, metric.unit, value.detail, value.nulls
                )
            )
        else:
            skipped.append(Skipped(metric.name, subject, f"came out as {value.value}"))
    return measured, skipped
