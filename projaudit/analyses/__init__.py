"""What is measured: one decorated function per metric, by theme; importing this records them."""

from __future__ import annotations

import math

from projaudit.analyses import alignment, magnitude, probes, spectral, structure, subspace
from projaudit.analyses.context import ProjectorContext
from projaudit.findings import Measurement, Skipped
from projaudit.metrics import METRICS, Skip, Value

__all__ = [
    "METRICS",
    "ProjectorContext",
    "alignment",
    "magnitude",
    "probes",
    "run",
    "spectral",
    "structure",
    "subspace",
]


def run(kind: str, subject: str, of: object) -> tuple[list[Measurement], list[Skipped]]:
    """Every metric of a subject kind, asked of one subject; what is not finite is skipped."""
    measured: list[Measurement] = []
    skipped: list[Skipped] = []
    for metric in METRICS.values():
        if metric.subject != kind:
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
