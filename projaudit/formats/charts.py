"""Charts of a report, each with the same in words and numbers beside the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from projaudit.findings import Series
from projaudit.formats.said import outside, place
from projaudit.formats.svg import (
    AXES,
    DOTS,
    bars,
    lines,
    named_points,
    quiet_matplotlib,
    strips,
    swatch,
)
from projaudit.formats.wording import number, percent, plural
from projaudit.inert import clean
from projaudit.report import Report, Standing

MOST = 24
"""Charts that one report draws; an ambiguous repository can have many projectors."""
LAYERS = 4
"""Layers of a projector whose charts are drawn: those that changed most. A Q-Former has dozens."""
_ROWS = 64


@dataclass(frozen=True)
class Chart:
    """A picture and what stands around it."""

    ident: str
    kind: str
    subject: str
    title: str
    reading: str
    """How to read a chart of this kind."""
    summary: str
    """What this one shows, in a sentence: the text alternative."""
    svg: str
    """Empty where no point can be drawn."""
    legend: tuple[tuple[str, str], ...]
    """(swatch as SVG, label)."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: int = 0
    """Rows that the table does not show."""


_TITLES = {
    "spectrum": "Spectrum of the update",
    "energy": "Cumulative energy of the update",
    "response": "Shift against input norm",
    "alignment": "Directions of the shift and what they point at",
}
_READING = {
    "spectrum": "Values above the noise edge are more than a random matrix of that size would "
    "show. Honest fine-tunes have such values too.",
    "energy": "How few directions carry the change. A steep start is a change of low rank.",
    "response": "How far the outputs move as inputs grow, beside random updates of the same base.",
    "alignment": "Cosine of each direction with its nearest token or target. It describes, and "
    "accuses nobody.",
}


def charts(report: Report) -> tuple[Chart, ...]:
    """The charts of the report, by projector and layer; at most `MOST`, of `LAYERS` layers each."""
    order = {kind: place for place, kind in enumerate(_TITLES)}

    def key(series: Series) -> tuple[str, int, str, str, str]:
        projector, _, layer = series.subject.partition("/")
        return projector, order.get(series.chart, len(order)), series.chart, layer, series.subject

    quiet = _quiet_layers(report)
    drawn = sorted((s for s in report.series if s.subject not in quiet), key=key)
    groups = [list(group) for _, group in groupby(drawn, key=key)]
    with quiet_matplotlib():
        return tuple(_chart(f"chart-{n}", group) for n, group in enumerate(groups[:MOST], 1))


def left_out(report: Report) -> int:
    """How many charts `charts` does not draw."""
    quiet = _quiet_layers(report)
    every = {(s.chart, s.subject) for s in report.series}
    return len(every) - min(sum(subject not in quiet for _, subject in every), MOST)


def _quiet_layers(report: Report) -> set[str]:
    """The layers of each projector but the `LAYERS` whose update has most of the base's norm."""
    changed = {m.subject: m.value for m in report.measurements if m.metric == "relative_norm"}
    layers: dict[str, list[str]] = {}
    for subject in dict.fromkeys(series.subject for series in report.series):
        projector, within, _ = subject.partition("/")
        if within:
            layers.setdefault(projector, []).append(subject)
    return {
        subject
        for of in layers.values()
        for subject in sorted(of, key=lambda s: -changed.get(s, 0.0))[LAYERS:]
    }


def standing_chart(standing: Standing) -> Chart:
    """The score among the population's, as strips of dots with a line for the target."""
    groups = {
        "honest fine-tunes": _in_range(standing.honest),
        "backdoored models": _in_range(standing.backdoored),
    }
    groups = {label: values for label, values in groups.items() if values}
    summary = f"The score of this model, {number(standing.score)}, is {place(standing)}"
    if standing.backdoored:
        above = sum(score > standing.score for score in standing.backdoored)
        summary += f"; {above} of {plural(len(standing.backdoored), 'backdoored model')} score more"
    if outside(standing):
        summary += f". It lies {outside(standing)}"
    title, reading = "Where the score stands", "One dot is one model of the population."
    if any(len(values) > DOTS for values in groups.values()):
        reading += f" Of larger groups at most {DOTS} are drawn, evenly by rank."
    drawable = groups and _in_range([standing.score])
    svg = ""
    if drawable:
        with quiet_matplotlib():
            svg = strips("chart-standing", title, summary, standing.score, groups)
    rows = [
        (label, str(len(values)), *(number(_quantile(values, q)) for q in (0, 0.5, 0.95, 1)))
        for label, values in groups.items()
    ]
    rows.append(("this model", "1", "", number(standing.score), "", ""))
    return Chart(
        ident="chart-standing",
        kind="standing",
        subject=clean(standing.calibration, 80),
        title=title,
        reading=reading,
        summary=f"{summary}.",
        svg=svg,
        legend=(),
        columns=("group", "n", "least", "median", "95 %", "most"),
        rows=tuple(rows),
    )


def _in_range(values: Sequence[float]) -> list[float]:
    return sorted(value for value in values if abs(value) < 1e30)


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(int(share * len(values)), len(values) - 1)]


def _chart(ident: str, group: Sequence[Series]) -> Chart:
    kind, subject = group[0].chart, group[0].subject
    drawn = [_drawable(series) for series in group]
    hidden = sum(len(a.x) - len(b.x) for a, b in zip(group, drawn, strict=True))
    title = _TITLES.get(kind, f"Chart “{clean(kind, 60)}”")
    summary = _SUMMARIES.get(kind, _summary)(drawn)
    if hidden:
        summary += f" Not drawn, being not finite or out of range: {plural(hidden, 'point')}."
    visible = [series for series in drawn if series.x]
    named = kind == "alignment"
    svg = ""
    if visible:
        draw = bars if named else lines
        svg = draw(ident, title, summary, kind, visible)
    columns, rows = _named_table(group) if named else _table(kind, group)
    return Chart(
        ident=ident,
        kind=kind,
        subject=subject,
        title=title,
        reading=_READING.get(kind, ""),
        summary=summary,
        svg=svg,
        legend=tuple((swatch(s.label, bars=named), clean(s.label, 60)) for s in visible),
        columns=columns,
        rows=rows[:_ROWS],
        left_out=max(len(rows) - _ROWS, 0),
    )


def _drawable(series: Series) -> Series:
    """The series without the points that cannot be drawn."""
    names = series.names or ("",) * len(series.x)
    points = [
        point
        for point in zip(series.x, series.y, (*names, *("",) * len(series.x)), strict=False)
        if all(value == 0 or 1e-30 < abs(value) < 1e30 for value in point[:2])
    ]
    return Series(
        chart=series.chart,
        subject=series.subject,
        label=series.label,
        x=tuple(x for x, _, _ in points),
        y=tuple(y for _, y, _ in points),
        names=tuple(name for _, _, name in points),
    )


def _table(
    kind: str, group: Sequence[Series]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The numbers behind lines: a row per place, a column per series."""
    by_place: dict[float, dict[int, float]] = {}
    for column, series in enumerate(group):
        for x, y in zip(series.x, series.y, strict=False):
            by_place.setdefault(x, {})[column] = y
    places = sorted(by_place, key=lambda place: (math.isnan(place), place))
    rows = tuple(
        (
            number(place),
            *(
                number(by_place[place][column]) if column in by_place[place] else ""
                for column in range(len(group))
            ),
        )
        for place in places
    )
    return (AXES.get(kind, ("x", "y"))[0], *(series.label for series in group)), rows


def _named_table(
    group: Sequence[Series],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The numbers behind bars: a row per point."""
    rows = tuple(
        (series.label, number(x), series.names[n] if n < len(series.names) else "", number(y))
        for series in group
        for n, (x, y) in enumerate(zip(series.x, series.y, strict=False))
    )
    return ("series", "direction", "nearest", "cosine"), rows


def _labelled(drawn: Sequence[Series], label: str) -> Series | None:
    return next((series for series in drawn if series.label == label and series.x), None)


def _summary(drawn: Sequence[Series]) -> str:
    count = sum(len(series.x) for series in drawn)
    lines = plural(len(drawn), "line")
    return f"{lines} with {plural(count, 'point')}; the numbers are in the table."


def _spectrum_summary(drawn: Sequence[Series]) -> str:
    update, edge = _labelled(drawn, "update"), _labelled(drawn, "noise edge")
    if update is None:
        return _summary(drawn)
    text = f"The largest of the {len(update.y)} singular values shown is {number(max(update.y))}"
    if edge is not None:
        above = sum(value > edge.y[0] for value in update.y)
        text += f"; {above} of them lie above the noise edge of {number(edge.y[0])}"
    null = _labelled(drawn, "null: equal norm")
    if null is not None:
        text += f". A random update of equal norm reaches {number(max(null.y))}"
    return text + "."


def _energy_summary(drawn: Sequence[Series]) -> str:
    update = _labelled(drawn, "update")
    if update is None:
        return _summary(drawn)
    shares = [
        f"{percent(y)} in the first {'direction' if x == 1 else number(x)}"
        for x, y in zip(update.x, update.y, strict=True)
        if x in {1, 5, 30}
    ]
    return f"Share of the update's energy: {', '.join(shares)}." if shares else _summary(drawn)


def _response_summary(drawn: Sequence[Series]) -> str:
    update = _labelled(drawn, "update")
    if update is None:
        return _summary(drawn)
    points = sorted(zip(update.x, update.y, strict=True))
    ends = points[:1] + points[-1:] if len(points) > 1 else points
    told = [f"{percent(y)} at {number(x)} times the typical input norm" for x, y in ends]
    text = f"The outputs shift by {' and by '.join(told)}"
    for label in ("null: equal norm", "null: equal spectrum"):
        null = _labelled(drawn, label)
        if null is not None:
            last = max(zip(null.x, null.y, strict=True))
            text += f"; a random update of {label[6:]} by {percent(last[1])} at {number(last[0])}"
    return text + "."


def _alignment_summary(drawn: Sequence[Series]) -> str:
    points = [point for point in named_points(drawn) if not point[0].startswith("null")]
    if not points:
        return _summary(drawn)
    _, place, value, name = max(points, key=lambda point: abs(point[2]))
    nearest = f" with “{clean(name, 60)}”" if name else ""
    return f"The largest cosine is {number(value)}, of direction {number(place)}{nearest}."


_SUMMARIES: Mapping[str, Callable[[Sequence[Series]], str]] = {
    "spectrum": _spectrum_summary,
    "energy": _energy_summary,
    "response": _response_summary,
    "alignment": _alignment_summary,
}
