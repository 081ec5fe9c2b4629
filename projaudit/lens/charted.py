"""One chart of the lens: picture, legend, words and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from projaudit.formats.charts import Chart
from projaudit.formats.svg import swatch


def charted(
    ident: str,
    title: str,
    subject: str,
    reading: str,
    summary: str,
    svg: str,
    labels: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> Chart:
    """The chart; `labels` are the series of its legend, `columns` and `rows` its table."""
    return Chart(
        ident=ident,
        kind="lens",
        subject=subject,
        title=title,
        reading=reading,
        summary=summary,
        svg=svg,
        legend=tuple((swatch(label, bars=False), label) for label in labels),
        columns=tuple(columns),
        rows=tuple(tuple(row) for row in rows),
    )
