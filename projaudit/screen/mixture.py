"""One-dimensional Gaussian mixtures, whether they are wanted at all, and what they say apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEAST = 20
"""Samples below which nothing is fitted: the dip test's own tables begin about there."""
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


def fitted(values: Floats, components: int, seed: int) -> Mixture:
    """The maximum-likelihood mixture of that many components (scikit-learn's EM)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    column = values[:, None]
    model = GaussianMixture(
        components, random_state=seed, init_params="k-means++", max_iter=300, reg_covar=1e-9
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


def dip_p(values: Floats) -> float:
    """p-value of Hartigan's dip test of unimodality (Hartigan and Hartigan 1985)."""
    import diptest

    return float(diptest.diptest(values)[1])
