"""What the update does to outputs, token by token: ProjLens' drift, shift direction and norm law.

ΔE (tokens × d) = P_tuned(x) − P_base(x) of one image; fp32 in, fp64 inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from projaudit.lens.result import ENERGIES

BULK = 0.8
"""Share of the tokens below the threshold where norms make no two clusters."""
APART = 0.85
"""Share of the variance that the split of two clusters explains; of a uniform distribution the
best split explains 0.75, of a normal one 0.64."""


@dataclass(frozen=True)
class Direction:
    """The leading singular pair of one image's ΔE."""

    entries: Tensor
    """u0 (tokens,), of length 1."""
    direction: Tensor
    """v0 (d,), of length 1."""


def high_norm(norms: Tensor) -> tuple[float, Literal["two clusters", "quantile"]]:
    """The norm from which on tokens are of high norm, and how it was found (docs/lens.md 4).

    Of norms (n,) the split of their logarithms in two that leaves least variance within; where it
    explains no more than `APART`, there are no two clusters, and the 80 % quantile is taken.
    ProjLens names numbers (45, 175), which are one model's.
    """
    logs = norms.double().clamp_min(1e-12).log().sort().values
    n = len(logs)
    total = float((logs - logs.mean()).square().sum())
    if n < 4 or total <= 1e-12 * n:
        return float(norms.double().quantile(BULK)), "quantile"
    counts = torch.arange(1, n, dtype=torch.float64, device=logs.device)
    sums = logs.cumsum(0)
    low, high = sums[:-1] / counts, (sums[-1] - sums[:-1]) / (n - counts)
    between = counts * (n - counts) / n * (high - low).square()
    best = int(between.argmax())
    if float(between[best]) / total <= APART:
        return float(norms.double().quantile(BULK)), "quantile"
    return float(((logs[best] + logs[best + 1]) / 2).exp()), "two clusters"


def drift_energy(delta: Tensor) -> Tensor:
    """E_k = Σ_{i≤k} σi(ΔE)² / ‖ΔE‖², k = 1 … 30 (ProjLens, embedding drift; docs/lens.md 2).

    Uncentred. (30,) fp64, 1 past the last component; zeros for no drift.
    """
    energies = torch.linalg.svdvals(delta.double()).square()
    total = energies.sum()
    found = torch.zeros(ENERGIES, dtype=torch.float64)
    if float(total) > 0:
        shares = (energies.cumsum(0) / total)[:ENERGIES].cpu()
        found[: len(shares)] = shares
        found[len(shares) :] = 1
    return found


def shift_direction(delta: Tensor, norms: Tensor, *, centred: bool) -> Direction | None:
    """u0 and v0 of ΔE, with or without its mean over tokens; None for no drift.

    ProjLens, shift direction; docs/lens.md 3. An SVD has no sign. Uncentred, tokens lie on the
    positive side on the whole (Σ u0 ≥ 0), so that v0 is where they go; centred, those of high norm
    do (Σ u0·norm ≥ 0).
    """
    matrix = delta.double()
    if centred:
        matrix = matrix - matrix.mean(0)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if float(values[0]) <= 1e-12 * max(1.0, float(delta.abs().max())):
        return None
    entries, direction = left[:, 0], right[0]
    side = entries @ norms.double() if centred else entries.sum()
    sign = -1.0 if float(side) < 0 else 1.0
    return Direction(sign * entries, sign * direction)


def common_direction(directions: Tensor) -> tuple[Tensor, float, float | None]:
    """What v0 of several images (n × d) have in common, and how stable they are (docs/lens.md 3).

    The first right singular vector, its sign that of their mean; the mean |cos| of the images'
    with it; the mean |cos| of pairs of images, None for one.
    """
    rows = directions.double()
    common = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    if float(common @ rows.mean(0)) < 0:
        common = -common
    stability = float((rows @ common).abs().mean())
    n = len(rows)
    if n < 2:
        return common, stability, None
    cosines = (rows @ rows.T).abs()
    pairwise = float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    return common, stability, pairwise


def pearson(x: Tensor, y: Tensor) -> tuple[float | None, float | None]:
    """r = cov(x, y) / (sd x · sd y), and the slope of the line of y over x.

    ProjLens, norm law; docs/lens.md 4. None for fewer than three tokens, or where one is constant.
    """
    if len(x) < 3:
        return None, None
    dx, dy = x.double() - x.double().mean(), y.double() - y.double().mean()
    varies_x, varies_y = float(dx.square().sum()), float(dy.square().sum())
    small = 1e-12 * len(x)  # float32 holds no smaller variation
    if varies_x <= small * float(x.double().square().max()) or varies_y <= small * float(
        y.double().square().max()
    ):
        return None, None
    together = float((dx * dy).sum())
    r = together / (varies_x * varies_y) ** 0.5
    return max(-1.0, min(1.0, r)), together / varies_x
