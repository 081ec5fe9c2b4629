"""The drawing of a chart: matplotlib's SVG, made fit to stand inside a page.

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
from typing import Any

from projaudit.findings import Series
from projaudit.formats.wording import fit, number, percent
from projaudit.inert import clean
from projaudit.screened import Histogram

AXES = {
    "spectrum": ("index", "singular value"),
    "energy": ("number of directions", "share of the energy"),
    "response": ("input norm, × typical", "shift, relative to the output"),
}
"""What stands at the axes of each kind of chart."""
DOTS = 400
"""Models of a group that are drawn; of more, every second, third, …"""
_BARS = 16
_NAME_LENGTH = 22
_SIZE = (4.2, 2.75)
"""Inches of 72 units: small, so that a narrow screen shows the letters at their own size."""


@dataclass(frozen=True)
class _Style:
    """How a line looks; told apart by dashes and marker, not by colour alone."""

    role: str
    dashes: tuple[float, ...] = ()
    marker: str = ""
    width: float = 1.5
    size: float = 3.2
    """Of the marker; larger where a line tends to lie under another."""


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
    "update": _Style("update", (), "o", 1.8),
    "null: equal norm": _Style("equal-norm", (4.0, 2.0), "s"),
    "null: equal spectrum": _Style("equal-spectrum", (6.0, 1.6, 1.4, 1.6), "^", 1.5, 5.0),
    "noise edge": _Style("edge", (1.4, 1.6), "", 1.4),
    "honest fine-tunes": _Style("equal-spectrum", (), "o", 0),
    "backdoored models": _Style("equal-norm", (), "D", 0),
    "this model": _Style("update", (), "", 2.2),
    "left": _Style("update"),
    "set apart": _Style("equal-norm"),
    "clean": _Style("update", (), "o", 1.8),
    "triggered": _Style("equal-norm", (4.0, 2.0), "D"),
    "clean, high norm": _Style("equal-spectrum", (), "s"),
    "triggered, high norm": _Style("other", (4.0, 2.0), "^", 1.5, 4.2),
    "tuned": _Style("update", (), "o", 0),
    "base": _Style("equal-norm", (), "D", 0),
}
_FALLBACK = _Style("other", (2.5, 1.2), "D")


def style_of(label: str) -> _Style:
    """How a series of that label looks."""
    return _STYLES.get(label, _FALLBACK)


def colour(role: str) -> str:
    """The placeholder of a colour, for matplotlib."""
    return _COLOURS[role][0]


def lines(ident: str, title: str, summary: str, kind: str, drawn: Sequence[Series]) -> str:
    """A line chart: spectrum, energy, response, and kinds that this version does not know."""
    figure, axes = axes_of(left=0.155)
    values = [y for series in drawn for y in series.y]
    places = [x for series in drawn for x in series.x]
    for series in sorted(drawn, key=lambda one: one.label == "update"):  # last is on top
        style = style_of(series.label)
        level = series.label == "noise edge" and len(set(series.y)) == 1
        if level:
            low, high = min(places), max(places)
            axes.plot([low, high], [series.y[0]] * 2, **pen(style, 0))
            axes.annotate(
                "noise edge",
                (1, series.y[0]),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color=colour("edge"),
            )
        else:
            axes.plot(series.x, series.y, **pen(style, len(series.x)))
    x_label, y_label = AXES.get(kind, ("x", "y"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if kind == "energy":
        axes.set_ylim(0, max(1.02, *values))
        ticks(axes.yaxis, percent)
    elif kind in {"spectrum", "response"} and _wide(values, 3):
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, values, percent if kind == "response" else number)
    else:
        if min(values) >= 0:
            axes.set_ylim(bottom=0)
        ticks(axes.yaxis, percent if kind == "response" else number)
    if kind == "response" and _wide(places, 4):
        axes.set_xscale("log", base=2)
        _fixed_ticks(axes.xaxis, sorted(set(places)))
    elif kind in {"spectrum", "energy"}:
        _index_ticks(axes.xaxis, max(places))
    else:
        ticks(axes.xaxis, number)
    return finished(figure, ident, title, summary, ())


def bars(ident: str, title: str, summary: str, kind: str, drawn: Sequence[Series]) -> str:
    """Horizontal bars, one per named point; what a null gives stands on them as a mark."""
    nulls = {
        (place, series.label): value
        for series in drawn
        if series.label.startswith("null")
        for place, value in zip(series.x, series.y, strict=True)
    }
    rows = [bar for bar in named_points(drawn) if not bar[0].startswith("null")][:_BARS]
    rows = rows or named_points(drawn)[:_BARS]
    figure, axes = axes_of(left=0.37, height=0.55 + 0.19 * max(len(rows), 4))
    names = []
    for row, (label, place, value, name) in enumerate(rows):
        axes.barh(row, value, height=0.62, color=colour(style_of(label).role))
        names.append(
            f"{number(place)} · {fit(clean(name), _NAME_LENGTH)}" if name else number(place)
        )
        for (at, null), level in nulls.items():
            if at == place:
                tone = colour(style_of(null).role)
                axes.plot([level, level], [row - 0.42, row + 0.42], color=tone, linewidth=1.8)
    axes.set_yticks(range(len(rows)), [placeholder(n) for n in range(len(rows))])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color=colour("axis"), linewidth=0.8)
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("cosine")
    ticks(axes.xaxis, number)
    return finished(figure, ident, title, summary, names)


def strips(
    ident: str, title: str, summary: str, score: float, groups: Mapping[str, Sequence[float]]
) -> str:
    """Groups of scores as strips of dots on one axis, a dot a model, and the score as a line."""
    figure, axes = axes_of(left=0.19, height=0.95 + 0.62 * len(groups))
    for row, (label, values) in enumerate(groups.items()):
        style = style_of(label)
        # Spread by the golden ratio: no two neighbours on one height, and no draw.
        dots = values[:: max(-(-len(values) // DOTS), 1)]
        heights = [row + 0.66 * ((n * 0.618034) % 1 - 0.5) for n in range(len(dots))]
        axes.scatter(
            dots,
            heights,
            s=9 if style.marker == "o" else 8,
            marker=style.marker,
            color=colour(style.role),
            alpha=0.55,
            linewidths=0,
        )
    names = [f"{label.split()[0]}\nn = {len(values)}" for label, values in groups.items()]
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.45, -1.0)
    axes.plot([score, score], [-0.62, len(groups) - 0.45], **pen(style_of("this model"), 0))
    low, high = axes.get_xlim()
    place = (score - low) / ((high - low) or 1)
    axes.annotate(
        f"this model: {number(score)}",
        (score, -0.68),
        ha="left" if place < 0.2 else "right" if place > 0.8 else "center",
        va="bottom",
        color=colour("update"),
        fontweight="bold",
    )
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("score")
    ticks(axes.xaxis, number)
    return finished(figure, ident, title, summary, ())


def histogram(ident: str, title: str, summary: str, drawn: Histogram, x_label: str) -> str:
    """Two groups of values as stacked bars, and the curves of the mixture that split them."""
    figure, axes = axes_of(left=0.155)
    edges, width = drawn.edges[:-1], drawn.edges[1] - drawn.edges[0]
    for label, counts, below in (
        ("left", drawn.kept, None),
        ("set apart", drawn.taken, drawn.kept),
    ):
        axes.bar(
            edges,
            counts,
            width=width,
            bottom=below,
            align="edge",
            color=colour(style_of(label).role),
            linewidth=0,
            alpha=0.75,
        )
    places = [point[0] for point in drawn.curve]
    for index, dashes in ((1, (3.0, 1.5)), (2, ())):  # the group set apart, the rest
        density = [point[index] for point in drawn.curve]
        style = (0, dashes) if dashes else "-"
        axes.plot(places, density, color=colour("ink"), linewidth=1.1, linestyle=style)
    most = max(a + b for a, b in zip(drawn.kept, drawn.taken, strict=True))
    axes.set_ylim(0, 1.08 * max(most, 1))
    axes.set_xlabel(x_label)
    axes.set_ylabel("samples")
    ticks(axes.xaxis, number)
    ticks(axes.yaxis, number)
    return finished(figure, ident, title, summary, ())


def named_points(drawn: Iterable[Series]) -> list[tuple[str, float, float, str]]:
    """The points of all series as (label of the series, x, y, name)."""
    return [
        (series.label, x, y, name)
        for series in drawn
        for x, y, name in zip(series.x, series.y, series.names, strict=True)
    ]


def axes_of(left: float, height: float = _SIZE[1]) -> tuple[Any, Any]:
    """A figure with one pair of axes, which begin `left` of its width and have `height` inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height))
    FigureCanvasSVG(figure)
    bottom, top = 0.46 / height, 0.1 / height
    axes = figure.add_axes((left, bottom, 0.975 - left, 1 - bottom - top))
    axes.grid(visible=True, color=colour("grid"), linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in {"left", "bottom"})
    return figure, axes


def pen(style: _Style, points: int) -> dict[str, Any]:
    every = max(points // 12, 1)
    return {
        "color": colour(style.role),
        "linewidth": style.width,
        "linestyle": (0, style.dashes) if style.dashes else "-",
        "marker": style.marker or None,
        "markersize": style.size,
        "markevery": (every // 2 if style.dashes else 0, every),  # lines may coincide
    }


def _wide(values: Sequence[float], ratio: float) -> bool:
    return min(values) > 0 and max(values) / min(values) >= ratio


def ticks(axis: Any, words: Callable[[float], str]) -> None:
    """A few ticks on a linear axis, told by `words`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(round(value, 12))))


def _index_ticks(axis: Any, last: float) -> None:
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if last / s <= 8), max(last / 8, 1))
    _fixed_ticks(axis, [1, *(n * step for n in range(1, 9) if 1 < n * step <= last)])


def _log_ticks(axis: Any, values: Sequence[float], words: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(max(values) / min(values))
    steps = (1.0, 2.0, 3.0, 5.0) if decades < 1.2 else (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def _fixed_ticks(axis: Any, places: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(
        FixedLocator(places if len(places) <= 9 else places[:: len(places) // 8])
    )
    axis.set_minor_locator(NullLocator())
    _plain(axis)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, ".4g")))


@contextmanager
def quiet_matplotlib() -> Iterator[None]:
    """Nothing; inside, matplotlib heeds nobody's matplotlibrc and is silent on its font cache."""
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
                    "text.color": colour("ink"),
                    "axes.labelcolor": colour("ink"),
                    "axes.edgecolor": colour("axis"),
                    "axes.linewidth": 0.8,
                    "xtick.color": colour("axis"),
                    "ytick.color": colour("axis"),
                    "xtick.labelcolor": colour("ink"),
                    "ytick.labelcolor": colour("ink"),
                }
            )
            yield
    finally:
        log.setLevel(level)


def placeholder(index: int) -> str:
    """What is drawn in place of a name, which `finished` puts in."""
    return f"name{index:03d}x"


def finished(figure: Any, ident: str, title: str, summary: str, names: Sequence[str]) -> str:
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
    for role, (drawn, plain) in _COLOURS.items():
        body = body.replace(drawn, f"var(--chart-{role}, {plain})")
    for index, name in enumerate(names):
        body = body.replace(f">{placeholder(index)}<", f">{_text(name)}<")
    box = re.search(r'viewBox="([\d. ]+)"', frame)
    return (
        f'<svg class="chart" role="img" viewBox="{box[1] if box else "0 0 300 200"}" '
        f'aria-labelledby="{ident}-title {ident}-desc" '
        'stroke-linejoin="round" stroke-linecap="butt">'
        f'<title id="{ident}-title">{_text(title)}</title>'
        f'<desc id="{ident}-desc">{_text(summary)}</desc>{body}</svg>'
    )


def swatch(label: str, bars: bool) -> str:
    """A piece of that line or bar, for the legend."""
    style = style_of(label)
    tone = f"var(--chart-{style.role}, {_COLOURS[style.role][1]})"
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
        f'style="fill:{tone};stroke:{tone}">{drawing}</svg>'
    )


def _text(untrusted: str) -> str:
    return escape(clean(untrusted, 1000))
