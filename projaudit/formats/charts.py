"""Charts of a report as inline SVG, each with the same in words and numbers beside it.

matplotlib draws fixed words and numbers only. Names from repositories are put into the finished
SVG, escaped, so that they reach neither its text layout nor its math markup.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from projaudit.findings import Series
from projaudit.formats.wording import number, percent
from projaudit.inert import clean
from projaudit.report import Report

MOST = 24
"""Charts that one report draws; an ambiguous repository can have many projectors."""
_BARS = 16
_ROWS = 64
_NAME_LENGTH = 22
_SIZE = (4.2, 2.75)
"""Inches of 72 units: small, so that a narrow screen shows the letters at their own size."""


@dataclass(frozen=True)
class Style:
    """How a line looks; told apart by dashes and marker, not by colour alone."""

    role: str
    dashes: tuple[float, ...] = ()
    marker: str = ""
    width: float = 1.5


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


# Placeholders that no colour of matplotlib's own uses; each becomes a CSS variable, so that one
# picture serves light, dark and paper. The second value is for readers without those variables.
_COLOURS: Mapping[str, tuple[str, str]] = {
    "ink": ("#010201", "#3d4858"),
    "axis": ("#010202", "#98a2b0"),
    "grid": ("#010203", "#e4e8ee"),
    "update": ("#010204", "#2f56c4"),
    "equal-norm": ("#010205", "#b35c00"),
    "equal-spectrum": ("#010206", "#0f7f6f"),
    "edge": ("#010207", "#b3261e"),
    "other": ("#010208", "#7a4fb5"),
}

_STYLES = {
    "update": Style("update", (), "o", 1.8),
    "null: equal norm": Style("equal-norm", (4.0, 2.0), "s"),
    "null: equal spectrum": Style("equal-spectrum", (6.0, 1.6, 1.4, 1.6), "^"),
    "noise edge": Style("edge", (1.4, 1.6), "", 1.4),
}
_FALLBACK = Style("other", (2.5, 1.2), "D")

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
_AXES = {
    "spectrum": ("index", "singular value"),
    "energy": ("number of directions", "share of the energy"),
    "response": ("input norm, × typical", "relative shift"),
}


def charts(report: Report) -> tuple[Chart, ...]:
    """The charts of the report, by projector and layer; at most `MOST`."""
    order = {kind: place for place, kind in enumerate(_TITLES)}

    def key(series: Series) -> tuple[str, int, str, str]:
        projector, _, layer = series.subject.partition("/")
        return projector, order.get(series.chart, len(order)), series.chart, layer

    groups = [list(group) for _, group in groupby(sorted(report.series, key=key), key=key)]
    with _quiet_matplotlib():
        return tuple(_chart(f"chart-{n}", group) for n, group in enumerate(groups[:MOST], 1))


def left_out(report: Report) -> int:
    """How many charts `charts` does not draw."""
    return max(len({(s.chart, s.subject) for s in report.series}) - MOST, 0)


def _chart(ident: str, group: Sequence[Series]) -> Chart:
    kind, subject = group[0].chart, group[0].subject
    drawn = [_drawable(series) for series in group]
    hidden = sum(len(a.x) - len(b.x) for a, b in zip(group, drawn, strict=True))
    title = _TITLES.get(kind, f"Chart “{clean(kind, 60)}”")
    summary = _SUMMARIES.get(kind, _summary)(drawn)
    if hidden:
        summary += f" {hidden} points are not finite or out of range and are not drawn."
    visible = [series for series in drawn if series.x]
    named = kind == "alignment"
    svg = ""
    if visible:
        draw = _bars if named else _lines
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
        legend=tuple((_swatch(s.label, bars=named), clean(s.label, 60)) for s in visible),
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


def _style(label: str) -> Style:
    return _STYLES.get(label, _FALLBACK)


def _colour(role: str) -> str:
    return _COLOURS[role][0]


def _lines(ident: str, title: str, summary: str, kind: str, drawn: Sequence[Series]) -> str:
    """A line chart: spectrum, energy, response, and kinds that this version does not know."""
    figure, axes = _axes(left=0.155)
    values = [y for series in drawn for y in series.y]
    places = [x for series in drawn for x in series.x]
    for series in sorted(drawn, key=lambda one: one.label == "update"):  # last is on top
        style = _style(series.label)
        level = series.label == "noise edge" and len(set(series.y)) == 1
        if level:
            low, high = min(places), max(places)
            axes.plot([low, high], [series.y[0]] * 2, **_pen(style, 0))
            axes.annotate(
                "noise edge",
                (1, series.y[0]),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color=_colour("edge"),
            )
        else:
            axes.plot(series.x, series.y, **_pen(style, len(series.x)))
    x_label, y_label = _AXES.get(kind, ("x", "y"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if kind == "energy":
        axes.set_ylim(0, max(1.02, *values))
        _ticks(axes.yaxis, percent)
    elif kind in {"spectrum", "response"} and _wide(values, 3):
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, values)
    else:
        if min(values) >= 0:
            axes.set_ylim(bottom=0)
        _ticks(axes.yaxis, number)
    if kind == "response" and _wide(places, 4):
        axes.set_xscale("log", base=2)
        _fixed_ticks(axes.xaxis, sorted(set(places)))
    elif kind in {"spectrum", "energy"}:
        _index_ticks(axes.xaxis, max(places))
    else:
        _ticks(axes.xaxis, number)
    return _svg(figure, ident, title, summary, ())


def _bars(ident: str, title: str, summary: str, kind: str, drawn: Sequence[Series]) -> str:
    """Horizontal bars, one per named point; what a null gives stands on them as a mark."""
    nulls = {
        (place, series.label): value
        for series in drawn
        if series.label.startswith("null")
        for place, value in zip(series.x, series.y, strict=True)
    }
    bars = [bar for bar in _points(drawn) if not bar[0].startswith("null")][:_BARS]
    bars = bars or _points(drawn)[:_BARS]
    figure, axes = _axes(left=0.37, height=0.55 + 0.19 * max(len(bars), 4))
    names = []
    for row, (label, place, value, name) in enumerate(bars):
        axes.barh(row, value, height=0.62, color=_colour(_style(label).role))
        names.append(f"{number(place)} · {clean(name, _NAME_LENGTH)}" if name else number(place))
        for (at, null), level in nulls.items():
            if at == place:
                tone = _colour(_style(null).role)
                axes.plot([level, level], [row - 0.42, row + 0.42], color=tone, linewidth=1.8)
    axes.set_yticks(range(len(bars)), [_placeholder(n) for n in range(len(bars))])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(0, color=_colour("axis"), linewidth=0.8)
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("cosine")
    _ticks(axes.xaxis, number)
    return _svg(figure, ident, title, summary, names)


def _points(drawn: Iterable[Series]) -> list[tuple[str, float, float, str]]:
    return [
        (series.label, x, y, name)
        for series in drawn
        for x, y, name in zip(series.x, series.y, series.names, strict=True)
    ]


def _axes(left: float, height: float = _SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height))
    FigureCanvasSVG(figure)
    bottom, top = 0.46 / height, 0.1 / height
    axes = figure.add_axes((left, bottom, 0.975 - left, 1 - bottom - top))
    axes.grid(visible=True, color=_colour("grid"), linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in {"left", "bottom"})
    return figure, axes


def _pen(style: Style, points: int) -> dict[str, Any]:
    return {
        "color": _colour(style.role),
        "linewidth": style.width,
        "linestyle": (0, style.dashes) if style.dashes else "-",
        "marker": style.marker or None,
        "markersize": 3.2,
        "markevery": max(points // 12, 1),
    }


def _wide(values: Sequence[float], ratio: float) -> bool:
    return min(values) > 0 and max(values) / min(values) >= ratio


def _ticks(axis: Any, words: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(round(value, 12))))


def _index_ticks(axis: Any, last: float) -> None:
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if last / s <= 8), max(last / 8, 1))
    _fixed_ticks(axis, [1, *(n * step for n in range(1, 9) if 1 < n * step <= last)])


def _log_ticks(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    decades = math.log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    _plain(axis)


def _fixed_ticks(axis: Any, places: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(places if len(places) <= 9 else places[:: len(places) // 8]))
    axis.set_minor_locator(NullLocator())
    _plain(axis)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, ".4g")))


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """A matplotlib that depends on nobody's matplotlibrc and says nothing about its font cache."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(
                {
                    "svg.fonttype": "none",
                    "svg.hashsalt": "projaudit",
                    "text.parse_math": False,
                    "axes.unicode_minus": False,
                    "font.size": 8.5,
                    "text.color": _colour("ink"),
                    "axes.labelcolor": _colour("ink"),
                    "axes.edgecolor": _colour("axis"),
                    "axes.linewidth": 0.8,
                    "xtick.color": _colour("axis"),
                    "ytick.color": _colour("axis"),
                    "xtick.labelcolor": _colour("ink"),
                    "ytick.labelcolor": _colour("ink"),
                }
            )
            yield
    finally:
        log.setLevel(level)


def _placeholder(index: int) -> str:
    return f"name{index:03d}x"


def _svg(figure: Any, ident: str, title: str, summary: str, names: Sequence[str]) -> str:
    """The figure as an `<svg>` for a page: own ids, colours as variables, title and description."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    drawing = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    # A style element would act on the whole page.
    drawing = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", drawing, count=1, flags=re.S)
    frame, _, body = drawing[drawing.index("<svg") :].partition(">")
    body = body.rpartition("</svg>")[0]
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body).replace("xlink:href", "href")
    used = set(re.findall(r"(?:href=\"#|url\(#)([\w.]+)", body))
    body = re.sub(
        r' id="([\w.]+)"',
        lambda match: f' id="{ident}-{match[1]}"' if match[1] in used else "",
        body,
    )
    body = re.sub(r'(href="#|url\(#)([\w.]+)', rf"\1{ident}-\2", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for role, (colour, plain) in _COLOURS.items():
        body = body.replace(colour, f"var(--chart-{role}, {plain})")
    for index, name in enumerate(names):
        body = body.replace(f">{_placeholder(index)}<", f">{_text(name)}<")
    box = re.search(r'viewBox="([\d. ]+)"', frame)
    return (
        f'<svg class="chart" role="img" viewBox="{box[1] if box else "0 0 300 200"}" '
        f'aria-labelledby="{ident}-title {ident}-desc" '
        'stroke-linejoin="round" stroke-linecap="butt">'
        f'<title id="{ident}-title">{_text(title)}</title>'
        f'<desc id="{ident}-desc">{_text(summary)}</desc>{body}</svg>'
    )


def _swatch(label: str, bars: bool) -> str:
    """A piece of that line or bar, for the legend."""
    style = _style(label)
    colour = f"var(--chart-{style.role}, {_COLOURS[style.role][1]})"
    dashes = " ".join(f"{style.width * dash:g}" for dash in style.dashes)
    if bars and label.startswith("null"):
        drawing = '<path d="M14 0V10" stroke-width="2"/>'
    elif bars:
        drawing = '<path d="M4 5H24" stroke-width="7"/>'
    else:
        mark = {
            "o": '<circle cx="14" cy="5" r="2.6"/>',
            "s": '<rect x="11.6" y="2.6" width="4.8" height="4.8"/>',
            "^": '<path d="M14 2 17 7.6H11z"/>',
            "D": '<path d="M14 1.8 17.2 5 14 8.2 10.8 5z"/>',
        }.get(style.marker, "")
        drawing = (
            f'<path d="M1 5H27" stroke-width="{style.width:g}" '
            f'stroke-dasharray="{dashes or "none"}"/>{mark}'
        )
    return (
        '<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true" '
        f'style="fill:{colour};stroke:{colour}">{drawing}</svg>'
    )


def _text(untrusted: str) -> str:
    return escape(clean(untrusted, 1000))


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
    return (_AXES.get(kind, ("x", "y"))[0], *(series.label for series in group)), rows


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
    return f"{len(drawn)} lines with {count} points; the numbers are in the table."


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
        f"{percent(y)} in the first {number(x)}"
        for x, y in zip(update.x, update.y, strict=True)
        if x in {1, 5, 30}
    ]
    return f"Energy of the update: {', '.join(shares)}." if shares else _summary(drawn)


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
    points = [point for point in _points(drawn) if not point[0].startswith("null")]
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
