"""BYE: samples whose image tokens are attended to with less entropy (arXiv 2505.16916)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from projaudit.screen.mixture import LEAST, Floats, Mixture, fitted, valley_p

LayerRule = Literal["paper", "code"]
_STARTS = 5
_LOW = np.array([True, False])
"""The component of lower mean."""


@dataclass(frozen=True)
class Layer:
    """The entropies of one layer, split in two."""

    layer: int
    mixture: Mixture
    index: float
    """BSI = |μ1 − μ2| / √(σ1² + σ2²)."""
    valley: float
    """p-value of a valley between the two."""
    sensitive: bool


@dataclass(frozen=True)
class Bye:
    """What BYE finds in one row of attention of each sample."""

    layers: tuple[Layer, ...]
    mean: Floats
    """(samples,) H̄, the mean entropy over the sensitive layers; NaN where there is none."""
    mixture: Mixture | None
    """Of H̄."""
    posterior: Floats
    """(samples,) of the component of lower mean; NaN where a sample was not looked at."""
    nothing: str
    """Why there is nothing to remove; empty where there is something."""

    @property
    def dropped(self) -> npt.NDArray[np.bool_]:
        """(samples,) where the posterior is above ½."""
        return self.posterior > 0.5


def bye(
    entropy: npt.NDArray[np.float32],
    *,
    threshold: float = 2.0,
    rule: LayerRule = "paper",
    alpha: float = 0.01,
    seed: int = 0,
) -> Bye:
    """Samples in the low mode of the mean entropy over bimodal layers (paper, §4).

    `entropy` (samples, layers), in nats, of one row of attention per sample, NaN for samples that
    have none. A layer is sensitive where BSI ≥ `threshold` (`rule` paper), or where
    |μ1 − μ2| > `threshold`·(σ1 + σ2) (`rule` code, as released), and there is a valley between
    its two modes at `alpha` over all layers (Bonferroni). So must there be in H̄. `alpha` 1 is the
    paper's own way, which removes a mode wherever a layer is sensitive.
    """
    values = entropy.astype(float)
    seen = np.isfinite(values).all(1)
    blank = np.full(len(values), np.nan)
    if seen.sum() < LEAST:
        few = f"{seen.sum()} samples with all entropies, and a mixture needs {LEAST}"
        return Bye((), blank, None, blank, few)
    each = alpha / values.shape[1] if alpha < 1 else 1.0
    layers = tuple(
        _layer(n, values[seen, n], threshold, rule, each, seed) for n in range(values.shape[1])
    )
    sensitive = [layer.layer for layer in layers if layer.sensitive]
    if not sensitive:
        return Bye(layers, blank, None, blank, "no layer is bimodal: nothing to remove")
    mean = blank.copy()
    mean[seen] = values[seen][:, sensitive].mean(1)
    told = "the mean over the bimodal layers has one mode: nothing to remove"
    if not _varies(mean[seen]):
        return Bye(layers, mean, None, blank, told)
    mixture = fitted(mean[seen], 2, seed, _STARTS)
    if alpha < 1 and valley_p(mean[seen], mixture, _LOW) > alpha:
        return Bye(layers, mean, mixture, blank, told)
    posterior = blank.copy()
    posterior[seen] = mixture.responsibility(mean[seen], _LOW)
    return Bye(layers, mean, mixture, posterior, "")


def _layer(
    number: int, values: Floats, threshold: float, rule: LayerRule, alpha: float, seed: int
) -> Layer:
    if not _varies(values):
        one = Mixture(np.ones(1), values[:1], np.zeros(1), np.inf)
        return Layer(number, one, 0.0, 1.0, False)
    mixture = fitted(values, 2, seed, _STARTS)
    distance = float(abs(mixture.means[1] - mixture.means[0]))
    index = distance / float(np.sqrt((mixture.sds**2).sum()))
    apart = index >= threshold
    if rule == "code":
        apart = distance > threshold * float(mixture.sds.sum())
    valley = valley_p(values, mixture, _LOW)
    return Layer(number, mixture, index, valley, bool(apart and valley <= alpha))


def _varies(values: Floats) -> bool:
    return bool(np.ptp(values) > 1e-9)
