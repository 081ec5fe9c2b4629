"""Arrays of a screening as the plain values that lists and reports are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from projaudit.inert import clean
from projaudit.screen.departure import Departure
from projaudit.screen.detect import FIRST, Screening, departs, is_confirmed
from projaudit.screen.mixture import Floats, Mixture
from projaudit.screen.payload import WORDS, most_common_ending
from projaudit.screen.profiles import Profiles
from projaudit.screened import (
    SHOWN,
    Fate,
    Histogram,
    NamedWord,
    Screened,
    ScreenedSample,
    SharedAttention,
    SharedText,
)

_BINS = 48
_CURVE = 160
_TEXT = 400
_HISTOGRAMS = 12


def screened(
    profiles: Profiles,
    screening: Screening,
    dataset: str,
    questions: Sequence[str],
    answers: Sequence[str],
) -> tuple[Screened, list[ScreenedSample]]:
    """The summary for a report, without pictures, and the evidence of every sample in order."""
    samples = [
        _sample(i, profiles, screening, questions[i], answers[i]) for i in range(len(profiles.ids))
    ]
    said = [answers[i] for i in np.flatnonzero(screening.looked_at).tolist()]
    common_text, common_share = most_common_ending(said, WORDS)
    fates = Counter(sample.fate for sample in samples)
    summary = Screened(
        dataset=dataset,
        method=screening.method,
        samples=len(samples),
        fates=dict(sorted(fates.items())),
        statuses=dict(sorted(Counter(profiles.statuses).items())),
        layers=len(layers_of(profiles)),
        layers_left_out=int(profiles.about.get("layers_left_out", 0)),
        later_answers=int(profiles.about.get("later_answers", 0)),
        texts=tuple(_text(found) for found in screening.departures),
        groups=tuple(
            SharedAttention(int(one.group.members.sum()), one.group.valley, one.fate, one.says)
            for one in screening.judged
        ),
        nothing=screening.nothing,
        common_text=common_text,
        common_share=common_share,
        shown=tuple(_shown(samples)),
        histograms=tuple(_histograms(profiles, screening))[:_HISTOGRAMS],
    )
    return summary, samples


def _sample(
    i: int, profiles: Profiles, screening: Screening, question: str, answer: str
) -> ScreenedSample:
    fate: Fate = "keep"
    if not screening.looked_at[i]:
        fate = "unread"
    elif screening.dropped[i]:
        fate = "drop"
    elif screening.apart[i]:
        fate = "apart"
    texts = [found for found in screening.departures if found.payload.holders[i]]
    texts = sorted(filter(departs, texts), key=lambda found: not is_confirmed(found))
    groups = [one.group for one in screening.judged if one.group.members[i]]
    return ScreenedSample(
        number=int(profiles.numbers[i]),
        id=profiles.ids[i],
        fate=fate,
        status=profiles.statuses[i],
        detail=profiles.details[i],
        bye=None if screening.bye is None else _finite(screening.bye.posterior[i]),
        tcap=None if screening.tcap is None else _finite(screening.tcap.posterior[i]),
        joint=_finite(groups[0].scores[i]) if groups else None,
        departure=_finite(texts[0].scores[i]) if texts else None,
        text=texts[0].payload.text if texts else "",
        question=clean(question, _TEXT),
        answer=clean(answer, _TEXT),
    )


def _finite(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _shown(samples: Sequence[ScreenedSample]) -> Iterator[ScreenedSample]:
    """At most `SHOWN` of each fate but `keep`, those with most evidence first."""

    def evidence(sample: ScreenedSample) -> tuple[float, int]:
        scores = (sample.departure, sample.joint, sample.tcap, sample.bye)
        return -sum(score for score in scores if score is not None), sample.number

    for fate in ("drop", "apart", "unread"):
        yield from sorted((s for s in samples if s.fate == fate), key=evidence)[:SHOWN]


def _text(found: Departure) -> SharedText:
    named = found.payload.named
    return SharedText(
        text=found.payload.text,
        samples=int(found.payload.holders.sum()),
        explained=found.payload.explained or 0.0,
        markers=found.payload.markers,
        replaces=found.replaces,
        auroc=found.auroc,
        confirmed=is_confirmed(found),
        unknown=found.unknown,
        named=None if named is None else NamedWord(named.word, named.answers, named.holders),
        apart=named is not None and departs(found),
    )


def _histograms(profiles: Profiles, screening: Screening) -> Iterator[Histogram]:
    """What was split: departures, all heads together, BYE's layers and their mean, TCAP's heads."""
    for found in screening.departures[:4]:
        values, taken = found.scores, found.payload.holders
        yield _histogram("departure", found.payload.text, values, taken, None, None, found.auroc)
    for one in screening.judged[:4]:
        group = one.group
        name = f"{int(group.members.sum())} samples"
        yield _histogram("joint", name, group.scores, group.members, None, None, group.valley)
    layers = layers_of(profiles)
    low = screening.bye
    if low is not None:
        target = np.array([True, False])
        for layer in low.layers:
            if layer.sensitive:
                values = profiles.entropy[:, FIRST, layer.layer].astype(float)
                values[~screening.looked_at] = np.nan
                mode = _posterior(layer.mixture, values, target) > 0.5
                name = f"layer {layers[layer.layer]}"
                yield _histogram(
                    "bye-layer", name, values, mode, layer.mixture, target, layer.index
                )
        if low.mixture is not None:
            name = "mean over the bimodal layers"
            yield _histogram("bye-mean", name, low.mean, low.dropped, low.mixture, target, None)
    for head in screening.tcap.heads if screening.tcap is not None else ():
        values = profiles.shares[:, FIRST, head.layer, head.head, 0].astype(float)
        values = (values - head.low) / (head.high - head.low)
        values[np.isnan(head.responsibility)] = np.nan
        name = f"layer {layers[head.layer]}, head {head.head}"
        yield _histogram(
            "tcap-head",
            name,
            values,
            head.responsibility > 0.5,
            head.mixture,
            head.target,
            head.separation,
        )


def layers_of(profiles: Profiles) -> list[int]:
    """The numbers of the layers whose attention was read."""
    return list(profiles.about.get("layer_numbers") or range(profiles.entropy.shape[2]))


def _posterior(mixture: Mixture, values: Floats, target: npt.NDArray[np.bool_]) -> Floats:
    seen = np.isfinite(values)
    found = np.full(len(values), np.nan)
    found[seen] = mixture.responsibility(values[seen], target)
    return found


def _histogram(
    kind: str,
    subject: str,
    values: Floats,
    taken: npt.NDArray[np.bool_],
    mixture: Mixture | None,
    target: npt.NDArray[np.bool_] | None,
    statistic: float | None,
) -> Histogram:
    seen = np.isfinite(values)
    if not seen.any():
        return Histogram(kind, subject, (0.0, 1.0), (0,), (0,), (), statistic)  # type: ignore[arg-type]
    edges = np.histogram_bin_edges(values[seen], _BINS)
    counts = [np.histogram(values[seen & group], edges)[0] for group in (~taken, taken)]
    curve: list[tuple[float, float, float]] = []
    if mixture is not None and target is not None:
        grid = np.linspace(edges[0], edges[-1], _CURVE)
        density = mixture.densities(grid) * seen.sum() * (edges[1] - edges[0])
        both = density[:, target].sum(1), density[:, ~target].sum(1)
        curve = [(float(x), float(a), float(b)) for x, a, b in zip(grid, *both, strict=True)]
    return Histogram(
        kind=kind,  # type: ignore[arg-type]
        subject=subject,
        edges=tuple(float(edge) for edge in edges),
        kept=tuple(int(n) for n in counts[0]),
        taken=tuple(int(n) for n in counts[1]),
        curve=tuple(curve),
        statistic=statistic,
    )
