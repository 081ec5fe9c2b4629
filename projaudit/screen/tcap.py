"""TCAP: heads whose attention on the system prompt sets a minority apart (arXiv 2601.21692)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from projaudit.screen.mixture import LEAST, Floats, Mixture, fitted, valley_p
from projaudit.screen.votes import Consensus, dawid_skene

SYSTEM = 0
"""Of the three shares: system, vision, text."""


@dataclass(frozen=True)
class Options:
    """What the paper leaves open, with our choices (`docs/screen.md` says why)."""

    most_components: int = 5
    late: float = 0.5
    """Share of the layers, from the last, whose heads are asked."""
    heads: int = 8
    """Heads of the highest separation that vote."""
    least_share: float = 0.01
    most_share: float = 0.5
    """A target group is a minority of at least and at most this share."""
    vote: float = 0.5
    """Responsibility of the target group from which a head votes for a sample."""
    epsilon: float = 1e-3
    alpha: float = 0.01
    """Of the valley between target group and rest, over all heads (Bonferroni); 1 for no test."""


@dataclass(frozen=True)
class Head:
    """The system shares of one head, scaled to [0, 1], and the minority in them."""

    layer: int
    head: int
    low: float
    high: float
    """The shares that 0 and 1 stand for."""
    mixture: Mixture
    target: npt.NDArray[np.bool_]
    """(components,)."""
    separation: float
    """SS = 1 / (∫ min(Σ_target π φ, Σ_rest π φ) dx + ε)."""
    responsibility: Floats = field(repr=False)
    """(samples,) of the target group; NaN where a sample was not looked at."""


@dataclass(frozen=True)
class Tcap:
    """What TCAP finds in one row of attention of each sample."""

    heads: tuple[Head, ...]
    """The sensitive heads, best first."""
    consensus: Consensus | None
    posterior: Floats
    """(samples,); NaN where a sample was not looked at."""
    nothing: str
    """Why there is nothing to remove; empty where there is something."""

    @property
    def dropped(self) -> npt.NDArray[np.bool_]:
        """(samples,) where the posterior is above ½."""
        return self.posterior > 0.5


def tcap(shares: npt.NDArray[np.float32], *, options: Options | None = None, seed: int = 0) -> Tcap:
    """Samples that the sensitive heads vote apart (paper, §3; Dawid–Skene over the heads).

    `shares` (samples, layers, heads, 3) of one row of attention per sample: mass on system, vision
    and text; NaN for samples that have none, and for heads that a layer does not have.
    """
    o = options or Options()
    system = shares[..., SYSTEM].astype(float)
    samples, layers, heads = system.shape
    real = np.isfinite(system).any(0)
    seen = np.isfinite(system[:, real]).all(1) & real.any()
    blank = np.full(samples, np.nan)
    if seen.sum() < LEAST:
        few = f"{seen.sum()} samples with all shares, and a mixture needs {LEAST}"
        return Tcap((), None, blank, few)
    first = layers - max(1, math.ceil(o.late * layers))
    asked = [(n, h) for n in range(first, layers) for h in range(heads) if real[n, h]]
    alpha = o.alpha / max(len(asked), 1) if o.alpha < 1 else 1.0
    found = [_head(n, h, system[:, n, h], seen, alpha, o, seed) for n, h in asked]
    sensitive = sorted(
        (head for head in found if head is not None),
        key=lambda head: (-head.separation, head.layer, head.head),
    )[: o.heads]
    if not sensitive:
        told = "no late head sets a minority apart: nothing to remove"
        return Tcap((), None, blank, told)
    votes = np.stack([_vote(head.responsibility, o.vote) for head in sensitive], 1)
    consensus = dawid_skene(votes)
    posterior = np.where(seen, consensus.posterior, np.nan)
    share = float(np.nanmean(posterior > 0.5) if seen.any() else 0)
    nothing = ""
    if share > o.most_share:
        nothing = f"the heads agree on {share:.0%} of the samples, which is no minority"
        posterior = blank
    elif not (posterior > 0.5).any():
        nothing = "the heads agree on no sample: nothing to remove"
    return Tcap(tuple(sensitive), consensus, posterior, nothing)


def _vote(responsibility: Floats, threshold: float) -> npt.NDArray[np.int8]:
    cast = np.where(responsibility > threshold, 1, 0)
    return np.where(np.isnan(responsibility), -1, cast).astype(np.int8)


def _head(
    layer: int,
    head: int,
    system: Floats,
    seen: npt.NDArray[np.bool_],
    alpha: float,
    o: Options,
    seed: int,
) -> Head | None:
    """The head with its best minority; None where its shares have one mode or no such minority."""
    low, high = float(system[seen].min()), float(system[seen].max())
    if high - low < 1e-9:
        return None
    values = (system[seen] - low) / (high - low)
    sizes = range(1, min(o.most_components, len(values) // 4) + 1)
    mixture = min((fitted(values, k, seed) for k in sizes), key=lambda m: m.aic)
    best = target_group(mixture, o)
    if best is None:
        return None
    target, overlap = best
    if valley_p(values, mixture, target) > alpha:
        return None
    responsibility = np.full(len(system), np.nan)
    responsibility[seen] = mixture.responsibility(values, target)
    separation = 1 / (overlap + o.epsilon)
    return Head(layer, head, low, high, mixture, target, separation, responsibility)


def target_group(mixture: Mixture, o: Options) -> tuple[npt.NDArray[np.bool_], float] | None:
    """The minority of least overlap with the rest, and that overlap; None where there is none.

    The minorities are the components next to one another whose weights sum to a minority: the
    paper does not say how it splits the components.
    """
    k = mixture.components
    groups = []
    for start in range(k):
        for stop in range(start + 1, k + 1):
            target = np.zeros(k, bool)
            target[start:stop] = True
            if o.least_share <= mixture.weights[target].sum() <= o.most_share and not target.all():
                groups.append((mixture.overlap(target), start, stop, target))
    if not groups:
        return None
    overlap, _, _, target = min(groups, key=lambda group: group[:3])
    return target, overlap
