"""What a sample is, from voters of unknown reliability: Dawid and Skene's EM for two classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Consensus:
    """What EM came to."""

    posterior: Floats
    """(samples,) of the class that the votes of 1 stand for; the prior where nobody voted."""
    hits: Floats
    """(voters,) share of that class which a voter votes 1 for."""
    false_alarms: Floats
    """(voters,) share of the other class which it votes 1 for."""
    share: float
    """Of the class in all samples: its prior."""


def dawid_skene(
    votes: npt.NDArray[np.int8], *, rounds: int = 100, tolerance: float = 1e-5
) -> Consensus:
    """P(class | votes) by maximum likelihood (Dawid and Skene 1979, eq. 2.3–2.5).

    `votes` (samples, voters) holds 1, 0, and −1 for no vote. EM starts from the share of votes of
    1, and ends when the log-likelihood per sample gains less than `tolerance`.
    """
    cast = votes >= 0
    yes, no = (votes == 1).astype(float), (votes == 0).astype(float)
    count = cast.sum(1)
    posterior = np.divide(yes.sum(1), count, out=np.full(len(votes), 0.5), where=count > 0)
    if not count.any():
        nothing = np.zeros(votes.shape[1])
        return Consensus(posterior, nothing, nothing, 0.5)
    before = -np.inf
    for _ in range(rounds):
        share = float(posterior[count > 0].mean())
        hits = _rate(posterior, yes, cast)
        false_alarms = _rate(1 - posterior, yes, cast)
        log_odds, likelihood = _weigh(share, hits, false_alarms, yes, no)
        posterior = 1 / (1 + np.exp(-np.clip(log_odds, -500, 500)))
        if likelihood - before < tolerance:
            break
        before = likelihood
    return Consensus(posterior, hits, false_alarms, share)


def _rate(weight: Floats, yes: Floats, cast: npt.NDArray[np.bool_]) -> Floats:
    total = weight @ cast
    rate: Floats = np.divide(weight @ yes, total, out=np.zeros_like(total), where=total > 0)
    return rate


def _weigh(
    share: float, hits: Floats, false_alarms: Floats, yes: Floats, no: Floats
) -> tuple[Floats, float]:
    """Log-odds of the class per sample, and the mean log-likelihood."""
    tiny = 1e-10  # as crowd-kit does, so that a voter who was never wrong so far may be
    one = np.log(share + tiny) + yes @ np.log(hits + tiny) + no @ np.log(1 - hits + tiny)
    other = np.log(1 - share + tiny)
    other = other + yes @ np.log(false_alarms + tiny) + no @ np.log(1 - false_alarms + tiny)
    return one - other, float(np.logaddexp(one, other).mean())
