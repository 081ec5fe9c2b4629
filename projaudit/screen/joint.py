"""Minorities that all heads and layers set apart together, where no single one of them does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from projaudit.screen.departure import FEW, discriminant, features_at, given_questions
from projaudit.screen.mixture import LEAST, Floats, fitted, valley_p
from projaudit.screen.profiles import Profiles

Bools = npt.NDArray[np.bool_]

DIRECTIONS = 15
"""Principal directions that are looked at."""
_TAIL = 0.1
"""Share of the samples that a search starts from: those furthest out in one direction."""
_LEAST, _MOST = 0.02, 0.5
_FAR = 6.0
"""Standard deviations beyond which a feature counts as that far."""
_TINY = 1e-6


@dataclass(frozen=True)
class Group:
    """Samples that lie apart."""

    members: Bools
    """(samples,)."""
    scores: Floats
    """(samples,) of the discriminant, held out; NaN where a sample was not looked at."""
    valley: float
    """p-value of the valley before them."""


def joint(
    profiles: Profiles,
    row: int,
    looked_at: Bools,
    questions: Sequence[str] | None,
    *,
    alpha: float = 0.01,
    seed: int = 0,
) -> tuple[Group, ...]:
    """Minorities in the logarithms of all shares and entropies of a row, most certain first.

    What the question explains of each is taken off, the rest whitened to `DIRECTIONS`. Two normals
    of one covariance are fitted (EM) from the tails of each direction. The minority that comes out
    is learnt (shrunk LDA, 5 folds); along the held-out scores there must be a valley before it, at
    `alpha` over all searches (Bonferroni).
    """
    from sklearn.decomposition import PCA

    features, seen = features_at(profiles, np.where(looked_at, row, -1))
    features = np.log(np.maximum(features, _TINY))
    features = features[:, features.std(0) > _TINY]
    directions = min(DIRECTIONS, len(features) // LEAST, features.shape[1])
    if directions < 2:
        return ()
    if questions is not None:
        asked = [questions[i] for i in np.flatnonzero(seen).tolist()]
        features = given_questions(features, asked, seed)
    features = (features - np.median(features, 0)) / features.std(0)
    white = PCA(directions, whiten=True, random_state=seed).fit_transform(
        np.clip(features, -_FAR, _FAR)
    )
    found: list[Group] = []
    tried: set[bytes] = set()
    for start in _tails(white):
        minority = _minority(white, start)
        if minority is None or minority.tobytes() in tried:
            continue
        tried.add(minority.tobytes())
        held_out, _ = discriminant(white, minority, seed)
        mixture = fitted(held_out, 2, seed, starts=3)
        target = np.arange(2) == np.argmin(mixture.weights)
        valley = valley_p(held_out, mixture, target)
        if valley <= alpha / (2 * directions):
            members, scores = np.zeros(len(seen), bool), np.full(len(seen), np.nan)
            members[seen] = mixture.responsibility(held_out, target) > 0.5
            scores[seen] = held_out
            found.append(Group(members, scores, valley))
    groups: list[Group] = []
    for group in sorted(found, key=lambda group: group.valley):
        if not any((group.members & known.members).any() for known in groups):
            groups.append(group)
    return tuple(groups)


def _tails(white: Floats) -> Iterator[Bools]:
    for column in white.T:
        for values in (column, -column):
            yield values > np.quantile(values, 1 - _TAIL)


def _minority(values: Floats, start: Bools) -> Bools | None:
    """The smaller of two normals of one covariance; None where it is no minority."""
    from sklearn.mixture import GaussianMixture

    share = float(start.mean())
    model = GaussianMixture(
        2,
        covariance_type="tied",
        weights_init=[1 - share, share],
        means_init=[values[~start].mean(0), values[start].mean(0)],
        precisions_init=np.linalg.inv(np.cov(values.T)),
        max_iter=200,
    )
    try:
        labels = model.fit_predict(values)
    except ValueError:  # a component is left without samples
        return None
    members: Bools = labels == np.argmin(np.bincount(labels, minlength=2))
    enough = members.sum() >= FEW and _LEAST <= members.mean() <= _MOST
    return members if enough else None
