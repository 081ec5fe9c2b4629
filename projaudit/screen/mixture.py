"""One-dimensional Gaussian mixtures, whether they are wanted at all, and what they say apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEAST = 20
"""Samples below which nothing is fitted."""
_GRID = 2048


@dataclass(frozen=True)
class Mixture:
    """Σ π_k N(μ_k, σ_k²), components by ascending mean."""

    weights: Floats
    means: Floats
    sds: Floats
    aic: float

    @property
    def components(self) -> int:
        return len(self.means)

    def densities(self, values: Floats) -> Floats:
        """π_k φ_k(x), of shape (values, components)."""
        z = (values[:, None] - self.means) / self.sds
        density: Floats = self.weights * np.exp(-0.5 * z**2) / (self.sds * np.sqrt(2 * np.pi))
        return density

    def responsibility(self, values: Floats, target: npt.NDArray[np.bool_]) -> Floats:
        """Σ_{k in target} π_k φ_k(x) / Σ_k π_k φ_k(x), of shape (values,); 0 where all vanish."""
        density = self.densities(values)
        total = density.sum(1)
        share: Floats = np.divide(
            density[:, target].sum(1), total, out=np.zeros_like(total), where=total > 0
        )
        return share

    def overlap(self, target: npt.NDArray[np.bool_]) -> float:
        """∫ min(Σ_{target} π φ, Σ_{rest} π φ) dx, between 0 and ½."""
        low, high = (self.means - 6 * self.sds).min(), (self.means + 6 * self.sds).max()
        grid = np.unique(
            np.concatenate(
                [
                    np.linspace(low, high, _GRID),
                    *(
                        m + s * np.linspace(-6, 6, 121)
                        for m, s in zip(self.means, self.sds, strict=True)
                    ),
                ]
            )
        )
        density = self.densities(grid)
        least = np.minimum(density[:, target].sum(1), density[:, ~target].sum(1))
        return float(np.trapezoid(least, grid))


def fitted(values: Floats, components: int, seed: int, starts: int = 1) -> Mixture:
    """The most likely mixture of that many components (scikit-learn's EM, best of `starts`)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    column = values[:, None]
    model = GaussianMixture(
        components,
        n_init=starts,
        random_state=seed,
        init_params="k-means++",
        max_iter=300,
        reg_covar=1e-9,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(column)
    order = np.argsort(model.means_[:, 0], kind="stable")
    return Mixture(
        weights=model.weights_[order],
        means=model.means_[order, 0],
        sds=np.sqrt(model.covariances_[order, 0, 0]),
        aic=float(model.aic(column)),
    )


def valley_p(values: Floats, mixture: Mixture, target: npt.NDArray[np.bool_]) -> float:
    """p-value of a valley between a group of components and the rest; 1 where there is none.

    Of one mode, the density at the valley is at least that at the lower of the two peaks beside
    it. So of the samples in two windows of one width, at the valley and at that peak, at most half
    are expected at the peak: a one-sided binomial test. A group between others needs a valley on
    both sides. (The dip test, which asks for the worst case of one mode, is blind to most
    minorities of a tenth: `docs/screen.md`.)
    """
    from scipy.stats import binom

    chosen, rest = np.flatnonzero(target), np.flatnonzero(~target)
    sides = [side for side in (rest[rest < chosen[0]], rest[rest > chosen[-1]]) if len(side)]
    worst = 0.0
    peak = _peak(mixture, chosen)
    for side in sides:
        other = _peak(mixture, side)
        between = np.linspace(peak, other, 201)
        density = mixture.densities(between).sum(1)
        valley = float(between[np.argmin(density)])
        half = min(abs(valley - peak), abs(valley - other)) / 2
        counts = [int((abs(values - at) <= half).sum()) for at in (peak, other, valley)]
        least = min(counts[:2])
        worst = max(worst, float(binom.cdf(counts[2], least + counts[2], 0.5)) if half else 1.0)
    return worst


def _peak(mixture: Mixture, components: npt.NDArray[np.int64]) -> float:
    """Where the components' own density is highest, among their means."""
    means = mixture.means[components]
    density = mixture.densities(means)[:, components].sum(1)
    return float(means[np.argmax(density)])
