"""Single measurements and the baselines, each alone: how well it tells backdoors on every base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.baselines import wsd
from benchmarks.folds import auroc, text_attacks
from benchmarks.measured import OFF_PATH, SHIPPED, Model, Score, score
from benchmarks.testbed.report import row, ruled


def statistics(of: Sequence[Model]) -> dict[str, Score]:
    """Every single measurement by name."""
    names = sorted({name for m in of for name in m.baselines if not name.startswith("wsd ")})
    found: dict[str, Score] = {name: (lambda m, n=name: m.baselines[n]) for name in names}
    return found | {
        "short cut to a foreign word (nats nearer)": lambda m: m.short_cut,
        "short cut to the text (nats nearer)": lambda m: m.odds,
        "answers changed on ordinary images": lambda m: m.drift,
        "texts on ordinary images": lambda m: m.open,
        "shortening of the short cuts (ln of a ratio of norms)": lambda m: m.shortening,
        "strength under marks alone": lambda m: score(m, replace(SHIPPED, weight=0.0, share=0.0)),
        "strength under drawn and bred marks alone": lambda m: alone(m, ("drawn", "bred")),
        "strength off the path alone": lambda m: alone(m, OFF_PATH),
        "strength along random directions alone": lambda m: alone(m, ("random",)),
    }


def alone(of: Model, families: Sequence[str]) -> float:
    """The score by texts under probes of these families only, whatever they push."""
    others = {family for by in of.strengths for family in by} - {*families}
    return score(of, replace(SHIPPED, weight=1.0, share=0.0), others)


def statistic_table(of: Sequence[Model]) -> str:
    """AUROC of single measurements on every base; the sign is that which fits the other bases."""
    bases = sorted({m.base for m in of})
    lines = [row("measurement", *bases, "sign kept")]
    scores = {name: {m.name: value(m) for m in of} for name, value in statistics(of).items()}
    scores["WSD, five features, logistic regression"] = {}
    for base in bases:
        scores["WSD, five features, logistic regression"] |= wsd_scores(of, base)
    areas: dict[str, list[float]] = {}
    for name, of_model in scores.items():
        found = []
        for base in bases:
            sign = 1.0
            if not name.startswith("WSD"):
                rest = [m for m in of if m.base != base]
                sign = 1.0 if area_of(rest, of_model) >= 0.5 else -1.0
            mine = [m for m in of if m.base == base]
            found.append(area_of(mine, {n: sign * v for n, v in of_model.items()}))
        areas[name] = found
    for name, found in sorted(areas.items(), key=lambda a: -float(np.mean(a[1]))):
        kept = sum(area >= 0.5 for area in found)
        lines.append(row(name, *(f"{area:.2f}" for area in found), f"{kept} of {len(found)}"))
    return ruled(lines)


def area_of(of: Sequence[Model], scores: Mapping[str, float]) -> float:
    honest = [scores[m.name] for m in of if m.honest]
    return auroc([scores[m.name] for m in text_attacks(of)], honest)


def wsd_scores(of: Sequence[Model], base: str) -> dict[str, float]:
    """Of the models of one base, by a classifier that was fitted to the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(some: Sequence[Model]) -> npt.NDArray[np.float64]:
        return np.array([wsd(m.baselines) for m in some])

    train = [m for m in (*text_attacks(of), *(m for m in of if m.honest)) if m.base != base]
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    fitted.fit(features(train), [not m.honest for m in train])
    mine = [m for m in of if m.base == base]
    return dict(
        zip([m.name for m in mine], fitted.decision_function(features(mine)).tolist(), strict=True)
    )
