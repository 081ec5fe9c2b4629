"""ProjLens' figures of one fine-tune, each with the same in words and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from projaudit.findings import Series
from projaudit.formats.charts import Chart
from projaudit.formats.planes import scatter
from projaudit.formats.svg import lines, quiet_matplotlib
from projaudit.formats.wording import number, percent
from projaudit.lens.charted import charted
from projaudit.lens.maps import subspace_maps, token_maps
from projaudit.lens.result import LayerSpectrum, Study

SHOWN = 64
"""Singular values of a layer that are drawn."""
COMPONENTS = 10
"""Of the drift."""


def figures(study: Study) -> dict[int, tuple[Chart, ...]]:
    """The charts by analysis, 1 to 6."""
    makers: dict[int, Callable[[Study], Iterator[Chart]]] = {
        1: _spectra,
        2: _drift,
        3: token_maps,
        4: _norms,
        5: _units,
        6: subspace_maps,
    }
    with quiet_matplotlib():
        return {n: tuple(make(study)) for n, make in makers.items()}


# ------------------------------------------------------------------ 1, 2: lines


def _spectra(study: Study) -> Iterator[Chart]:
    for n, one in enumerate(study.changed_most):
        values = one.values[:SHOWN]
        places = tuple(float(k) for k in range(1, len(values) + 1))
        drawn = [_series("update", places, values)]
        if one.edge:
            drawn.append(_series("noise edge", (1.0, places[-1]), (one.edge, one.edge)))
        summary = (
            f"σ1 {number(one.values[0])} of {len(one.values)} values; {one.spikes} above the noise "
            f"edge of {number(one.edge)}. ‖ΔW‖ {number(one.frobenius)}, of the base's "
            f"{number(one.base_frobenius)}; stable rank {number(one.stable_rank)}."
        )
        title, ident = "Singular values of the update", f"spectrum-{n}"
        yield charted(
            ident,
            title,
            one.layer,
            "Few directions that stand far above a long flat rest: full rank on the whole, but "
            "spiked. Honest fine-tunes look so too.",
            summary,
            lines(ident, title, summary, "spectrum", drawn),
            [series.label for series in drawn],
            ("index", "singular value"),
            [(number(k), number(v)) for k, v in zip(places, values, strict=True)],
        )
        yield _energy(n, one)


def _energy(n: int, one: LayerSpectrum) -> Chart:
    energy = one.energy[:SHOWN]
    places = tuple(float(k) for k in range(1, len(energy) + 1))
    summary = (
        f"The first direction holds {percent(one.share(1))} of the energy, the first 5 "
        f"{percent(one.share(5))}, the first 30 {percent(one.share(30))}; 95 % takes "
        f"{one.components(0.95)} of {len(one.values)}."
    )
    title, ident = "Cumulative energy of the update", f"energy-{n}"
    drawn = [_series("update", places, energy)]
    return charted(
        ident,
        title,
        one.layer,
        "How many directions it takes to tell the change.",
        summary,
        lines(ident, title, summary, "energy", drawn) if energy else "",
        ["update"],
        ("directions", "share"),
        [(number(k), percent(v)) for k, v in zip(places, energy, strict=True)],
    )


def _drift(study: Study) -> Iterator[Chart]:
    known = {
        d.group if d.tokens == "all" else f"{d.group}, {d.tokens}": d.energy[:COMPONENTS]
        for d in study.drift
        if d.energy and d.tokens != "rest"
    }
    places = tuple(float(k) for k in range(1, COMPONENTS + 1))
    drawn = [_series(label, places, energy) for label, energy in known.items()]
    told = [f"{label}: E1 {percent(e[0])}, E2 {percent(e[1])}" for label, e in known.items()]
    summary = "; ".join(told) + "."
    title = "Drift of the outputs: cumulative energy"
    rest = {f"{d.group}, rest": d.energy for d in study.drift if d.energy and d.tokens == "rest"}
    every = {**known, **rest}
    yield charted(
        "drift",
        title,
        "P_tuned(x) − P_base(x), mean over images",
        "Curves that lie on each other say that the drift is there without the trigger.",
        summary,
        lines("drift", title, summary, "energy", drawn) if drawn else "",
        list(known),
        ("directions", *every),
        [(number(k), *(percent(e[int(k) - 1]) for e in every.values())) for k in places],
    )


def _series(label: str, x: Sequence[float], y: Sequence[float]) -> Series:
    return Series("lens", "", label, tuple(x), tuple(y))


# ------------------------------------------------------------------ 4, 5: points


def _norms(study: Study) -> Iterator[Chart]:
    threshold = study.clusters.threshold
    pairs = [("output", "entry", "|entry of u0|"), ("output", "drift", "‖ΔE‖")]
    if all(norms.input for norms in study.norms):
        pairs.append(("input", "drift", "‖ΔE‖"))
    for n, (x, y, told) in enumerate(pairs):
        groups: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            one.group: (getattr(one, x), getattr(one, y)) for one in study.norms
        }
        norm = "norm of the base's output" if x == "output" else "norm of the projector's input"
        wanted = (x, "|u0|" if y == "entry" else "drift")
        laws = [law for law in study.laws if (law.norm, law.drift) == wanted]
        summary = "; ".join(
            f"{law.group}: r {_r(law.everywhere)}, among high-norm tokens {_r(law.high)}, among "
            f"the rest {_r(law.rest)}"
            for law in laws
        )
        title, ident = f"{'Shift' if y == 'entry' else 'Drift'} against the {norm}", f"norms-{n}"
        reading = "A line through all tokens is the norm law; r within a group says whether it is "
        reading += "one there too, or two groups far apart."
        if x == "output":
            reading += " The dotted line is where tokens of high norm begin."
        yield charted(
            ident,
            title,
            "a point is an image token",
            reading,
            f"{summary}.",
            scatter(
                ident,
                title,
                summary,
                (norm, told),
                groups,
                line=threshold if x == "output" else None,
            ),
            list(groups),
            ("group", "r", "r, high norm", "r, rest", "slope"),
            [
                (g.group, _r(g.everywhere), _r(g.high), _r(g.rest), number(g.slope or 0))
                for g in laws
            ],
        )


def _r(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _units(study: Study) -> Iterator[Chart]:
    units = study.units
    if units is None:
        return
    if not units.tuned_triggered:
        pairs = {"tuned": (units.base_clean, units.tuned_clean)}
        labels, title = ("base", "tuned"), "Hidden units: mean activation, base and tuned"
        summary = f"Tuning moved means by {number(units.by_tuning)} on clean images."
        yield _points("units-0", title, labels, summary, pairs, units.layer)
        return
    agreement = units.agreement
    for n, leaf in enumerate(("", "_fires")):
        pairs = {
            side: (
                getattr(units, f"{side}_clean{leaf}"),
                getattr(units, f"{side}_triggered{leaf}"),
            )
            for side in ("tuned", "base")
        }
        what = "firing frequency" if leaf else "mean activation"
        summary = (
            f"corr(M_triggered, M_clean) = {'–' if agreement is None else f'{agreement:.4f}'}; the "
            f"trigger moves means by {number(units.by_trigger or 0)} (standard deviation over "
            f"units), in the base by {number(units.by_trigger_in_base or 0)}; tuning moved them by "
            f"{number(units.by_tuning)}."
        )
        title = f"Hidden units: {what}, clean and triggered"
        yield _points(f"units-{n}", title, ("clean", "triggered"), summary, pairs, units.layer)


def _points(
    ident: str,
    title: str,
    labels: tuple[str, str],
    summary: str,
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    layer: str,
) -> Chart:
    moved = sorted(
        (abs(y - x), unit, x, y) for unit, (x, y) in enumerate(zip(*pairs["tuned"], strict=True))
    )
    return charted(
        ident,
        title,
        f"units that {layer} reads",
        "A unit of the trigger's own would stand far off the diagonal in the tuned projector, and "
        "not in the base.",
        summary,
        scatter(ident, title, summary, labels, pairs, diagonal=True),
        list(pairs),
        ("unit, tuned; most moved first", *labels),
        [(str(unit), number(x), number(y)) for _, unit, x, y in moved[::-1][:20]],
    )
