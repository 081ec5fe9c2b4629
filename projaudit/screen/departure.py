"""The row of attention at which a sample departs for a text, and how far that row sets it apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from projaudit.screen.mixture import LEAST, Floats
from projaudit.screen.payload import Bools, Payload
from projaudit.screen.profiles import Profiles

_FOLDS = 5
FEW = 8
"""Samples that depart, below which nothing is learnt of them."""


@dataclass(frozen=True)
class Departure:
    """The samples that end with a text against all others, in the row before it begins."""

    payload: Payload
    replaces: bool
    """Most of its answers are the text alone: compared is the row that predicts the first token of
    every answer. Else each answer's row before the text, with the row that ends the others."""
    rows: npt.NDArray[np.int64]
    """(samples,) position compared; −1 where it was not profiled."""
    auroc: float | None
    """Cross-validated, of a linear discriminant over all heads and layers; None where it cannot be
    told."""
    scores: Floats
    """(samples,) of that discriminant, held out; NaN where not compared."""
    unknown: str = ""
    """Why it cannot be told."""


def departure(
    profiles: Profiles, payload: Payload, questions: Sequence[str] | None, seed: int
) -> Departure:
    """How well the row before the text tells who will say it: shrunk LDA, 5 folds.

    In that row the answer so far is like those of other samples; in rows within the text the text
    itself is read, and any text would set its samples apart. Where the questions are known, what
    they explain of each feature is taken off first.
    """
    onsets = _onsets(profiles, payload)
    replaces = bool((onsets[onsets >= 0] == 0).mean() > 0.5) if (onsets >= 0).any() else False
    rows = np.where(payload.holders, onsets, 0 if replaces else _last_rows(profiles))
    rows = np.where(np.array(profiles.statuses) == "ok", rows, -1)
    features, seen = features_at(profiles, rows)
    blank = np.full(len(rows), np.nan)
    members = payload.holders[seen]
    counts = int(members.sum()), int((~members).sum())
    if min(counts) < FEW or len(members) < LEAST:
        few = f"{counts[0]} samples with the text and {counts[1]} others have that row"
        return Departure(payload, replaces, rows, None, blank, few)
    if questions is not None:
        asked = [_without(questions[i], payload.markers) for i in np.flatnonzero(seen).tolist()]
        features = given_questions(features, asked, seed)
    scores = blank.copy()
    scores[seen], auroc = discriminant(features, members, seed)
    return Departure(payload, replaces, rows, auroc, scores)


def given_questions(features: Floats, questions: Sequence[str], seed: int) -> Floats:
    """The features less what ridge regression on the question's words predicts, held out.

    `features` (samples, features). Words and pairs of words, at most 500 of them.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, cross_val_predict

    counter = CountVectorizer(binary=True, analyzer=_words_and_pairs, max_features=500)
    try:
        bags = counter.fit_transform(questions).toarray().astype(float)
    except ValueError:  # no question has a word
        return features
    folds = KFold(_FOLDS, shuffle=True, random_state=seed)
    predicted: Floats = cross_val_predict(Ridge(1.0), bags, features, cv=folds)
    return features - predicted


def _without(question: str, markers: Sequence[str]) -> str:
    """The question less a trigger in it, whose effect must not be taken off."""
    return " ".join(word for word in question.lower().split() if word not in markers)


def _words_and_pairs(question: str) -> list[str]:
    words = question.lower().split()
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


def _onsets(profiles: Profiles, payload: Payload) -> npt.NDArray[np.int64]:
    """(samples,) position that predicts the first token of the text; −1 where it is not there.

    Tokens are decoded one by one, which loses their spaces: both sides are compared without.
    """
    wanted = "".join(payload.text.split())
    found = np.full(len(profiles.answers), -1, np.int64)
    for i in np.flatnonzero(payload.holders):
        pieces = ["".join(token.lower().split()) for token in profiles.answers[i]]
        start = "".join(pieces).rfind(wanted)
        ends = np.cumsum([len(piece) for piece in pieces])
        if start >= 0:
            found[i] = int(np.searchsorted(ends, start, side="right"))
    return found


def _last_rows(profiles: Profiles) -> npt.NDArray[np.int64]:
    """(samples,) position that predicts the end of the answer; −1 where the answer was cut."""
    positions = profiles.entropy.shape[1]
    lengths = np.array([len(answer) for answer in profiles.answers], np.int64)
    return np.where(lengths < positions, lengths - 1, -1)


def features_at(profiles: Profiles, rows: npt.NDArray[np.int64]) -> tuple[Floats, Bools]:
    """(seen, features) of the shares and entropies in each sample's row, and which are seen."""
    samples = np.arange(len(rows))
    at = np.clip(rows, 0, None)
    both = np.concatenate(
        [
            profiles.shares[samples, at].reshape(len(rows), -1),
            profiles.entropy[samples, at],
        ],
        axis=1,
    ).astype(float)
    real = np.isfinite(both[rows >= 0]).any(0)
    both = both[:, real]
    seen = (rows >= 0) & np.isfinite(both).all(1)
    return both[seen], seen


def discriminant(features: Floats, members: Bools, seed: int) -> tuple[Floats, float]:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    scores: Floats = cross_val_predict(
        model, features, members, cv=folds, method="decision_function"
    )
    return scores, float(roc_auc_score(members, scores))
