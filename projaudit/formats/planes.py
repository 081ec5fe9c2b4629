"""Pictures over two numbers: scatter plots and heat maps, drawn as `svg` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from projaudit.formats.svg import axes_of, colour, finished, placeholder, style_of, ticks
from projaudit.formats.wording import fit, number
from projaudit.inert import clean

DOTS = 500
"""Points of a group that are drawn; of more, every second, third, …"""
_NAME_LENGTH = 18


def scatter(
    ident: str,
    title: str,
    summary: str,
    labels: tuple[str, str],
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    line: float | None = None,
    diagonal: bool = False,
) -> str:
    """Groups of points; an upright line at `line`, and where x = y with `diagonal`."""
    figure, axes = axes_of(left=0.175)
    for label, (x, y) in groups.items():
        style = style_of(label)
        every = max(-(-len(x) // DOTS), 1)
        axes.scatter(
            x[::every],
            y[::every],
            s=8 if style.marker == "o" else 10,
            marker=style.marker,
            facecolors=colour(style.role) if style.marker == "o" else "none",
            edgecolors=colour(style.role),
            alpha=0.55,
            linewidths=0 if style.marker == "o" else 0.7,
        )
    if line is not None:
        axes.axvline(line, color=colour("edge"), linewidth=1.2, linestyle=(0, (1.4, 1.6)))
    if diagonal:
        low = min(min(*x, *y) for x, y in groups.values())
        high = max(max(*x, *y) for x, y in groups.values())
        axes.plot([low, high], [low, high], color=colour("axis"), linewidth=0.8)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    ticks(axes.xaxis, number)
    ticks(axes.yaxis, number)
    return finished(figure, ident, title, summary, ())


def heat(
    ident: str,
    title: str,
    summary: str,
    labels: tuple[str, str],
    rows: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float | None]],
) -> str:
    """Shares as shaded cells with their percents in them; names of rows and columns as they are."""
    from matplotlib.patches import Rectangle

    named = max(map(len, rows)) > 3
    left = 0.34 if named else 0.13
    figure, axes = axes_of(left=left, height=0.62 + 0.27 * len(rows))
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if share is None:
                continue
            place = (j - 0.48, i - 0.46)
            axes.add_patch(
                Rectangle(place, 0.96, 0.92, color=colour("update"), alpha=0.6 * share, lw=0)
            )
            axes.annotate(
                f"{100 * share:.0f}", (j, i), ha="center", va="center", color=colour("ink")
            )
    names = [fit(clean(name), _NAME_LENGTH) for name in (*rows, *columns)]
    axes.set_yticks(range(len(rows)), [placeholder(n) for n in range(len(rows))])
    places = [placeholder(len(rows) + n) for n in range(len(columns))]
    axes.set_xticks(range(len(columns)), places)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xlabel(labels[1])
    if not named:
        axes.set_ylabel(labels[0])
        axes.yaxis.set_label_coords(-0.1, 0.5)  # placeholders are wider than what replaces them
    return finished(figure, ident, title, summary, names)
