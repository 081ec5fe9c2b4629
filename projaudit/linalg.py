"""Leading singular triplets, the noise edge, spectral measures and subspace angles of one matrix.

Every random matrix is drawn on the CPU from a passed `torch.Generator` and then moved, so CPU and
GPU see the same draw. Matrices are float32 or float64; small dense problems are solved in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

EXACT_LIMIT = 512
"""Smaller side up to which the exact path is not slower (measured: benchmarks/speed.py spectrum)."""

BLOCK = 16
"""Rows per Krylov block: one memory-bound pass over A costs about the same for 1 to 16 vectors."""

CAPACITY = 256
"""Largest Krylov basis; it bounds the work where an update has no flat bulk at all."""

TOLERANCE = 2e-6
"""Relative error asked of a value above the edge; 1e-5 is promised, float32 itself costs ~1e-6."""

QUADRATURE_STEPS = 16
PROBES = 16

TRACY_WIDOM_999 = 3.2724
"""99.9 % quantile of the Tracy–Widom law for real noise, F₁ (Bejan 2005, Table 1)."""


@dataclass(frozen=True)
class Triplets:
    """A ≈ left · diag(values) · rightᵀ, with what the approximation is known to miss."""

    values: Tensor
    """(k,) float64, descending; each is a lower bound of the true one up to rounding."""
    left: Tensor
    """(m, k) orthonormal columns, dtype of A."""
    right: Tensor
    """(n, k) orthonormal columns, dtype of A; the largest entry of each left vector is positive."""
    residuals: Tensor
    """(k,) float64, max(‖A v − σ u‖, ‖Aᵀ u − σ v‖): a singular value lies within this of σ."""
    missed: float
    """‖A − Q Qᵀ A‖_F over the whole basis Q, not only its k leading directions."""


@dataclass(frozen=True)
class Spectrum:
    """What one pass over a matrix says about all of its singular values (m × n, s = min(m, n))."""

    values: Tensor
    """(k,) float64 on the CPU, descending."""
    left: Tensor
    """(m, k) left singular vectors, dtype and device of A."""
    right: Tensor
    """(n, k) right singular vectors."""
    residuals: Tensor
    """(k,) float64: a singular value lies within this distance of each reported one."""
    missed: float
    """‖A − Q Qᵀ A‖_F: what the Krylov basis leaves out; 0 on the exact path."""
    frobenius: float
    """‖A‖_F."""
    exact: bool
    """Dense path: every singular value is known, not only the leading ones."""
    noise_edge: float
    """σ(√m + √n): the largest singular value of the flat bulk (Marchenko–Pastur)."""
    threshold: float
    """Edge plus its finite-size margin: pure Gaussian noise exceeds it in 0.1 % of draws."""
    above_edge: int
    """Number of singular values above `threshold`; it may exceed k."""
    complete: bool
    """False where `above_edge` is a lower bound: capacity reached, or a check found more."""
    excess_energy: float
    """Σ (σᵢ² − noise_edge²) / ‖A‖²_F over the values above the threshold."""
    effective_rank: float
    """exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ / Σσ (Roy & Vetterli 2007); 0 for a zero matrix."""
    effective_rank_error: float
    """Two standard errors of the probes plus the quadrature's error; 0 on the exact path."""
    nodes: Tensor
    """(j,) float64 on the CPU, descending: spectral measure, positions (singular values)."""
    weights: Tensor
    """(j,) float64: how many of the s singular values each node stands for; they sum to s."""

    @property
    def stable_rank(self) -> float:
        """‖A‖²_F / σ₁², 0 for a zero matrix."""
        top = float(self.values[0])
        return (self.frobenius / top) ** 2 if top > 0 else 0.0

    @property
    def knee(self) -> int:
        """Number of leading values before the sorted spectrum turns flat (see `knee`)."""
        return knee(self.values)

    def top_energy(self, k: int) -> float:
        """Σ_{i≤k} σᵢ² / ‖A‖²_F, 0 for a zero matrix. Raises ValueError if k exceeds `values`."""
        if not 1 <= k <= len(self.values):
            raise ValueError(f"k = {k} outside 1..{len(self.values)} of the computed values")
        if self.frobenius == 0:
            return 0.0
        return float((self.values[:k] / self.frobenius).square().sum())


# --- noise ----------------------------------------------------------------------------------------


def marchenko_pastur_edge(sigma: float, m: int, n: int) -> float:
    """σ(√m + √n): where the singular values of an m × n matrix of N(0, σ²) entries end."""
    return sigma * (math.sqrt(m) + math.sqrt(n))


def marchenko_pastur_density(x: Tensor, sigma: float, m: int, n: int) -> Tensor:
    """Density of the singular values of m × n N(0, σ²) noise at x, integrating to 1.

    p(x) = √((b² − x²)(x² − a²)) / (π x σ² s), with a, b = σ|√m ∓ √n| and s = min(m, n).
    x: any shape, in the unit of the matrix.
    """
    low, high = sigma * abs(math.sqrt(m) - math.sqrt(n)), marchenko_pastur_edge(sigma, m, n)
    square = x.double().square()
    inside = ((high**2 - square) * (square - low**2)).clamp_min(0).sqrt()
    return inside / (math.pi * sigma**2 * min(m, n) * x.double().clamp_min(high * 1e-12))


def tracy_widom_threshold(sigma: float, m: int, n: int, quantile: float = TRACY_WIDOM_999) -> float:
    """√(μ + q τ) σ: what the largest singular value of m × n noise exceeds with a stated probability.

    μ and τ as in Johnstone 2001 with the −½ centring of Ma 2012, which is right to O(n^{−2/3}).
    """
    a, b = math.sqrt(max(m - 0.5, 0.5)), math.sqrt(max(n - 0.5, 0.5))
    return sigma * math.sqrt((a + b) ** 2 + quantile * (a + b) * (1 / a + 1 / b) ** (1 / 3))


def _noise(values: Tensor, energy: float, m: int, n: int, floor: float) -> tuple[float, int]:
    """(σ, r): the smallest fixed point of r = #{σᵢ > threshold(σ)}, σ² = (E − Σ_{i≤r} σᵢ²)/((m−r)(n−r)).

    From r = 0 upwards: spikes can only raise the first estimate, so noise is never counted as a
    spike, and each removal uncovers smaller ones. `floor`: norm below which the remainder is
    rounding of the matrix itself.
    """
    tail = (energy - values.square().cumsum(0)).tolist()
    found = 0
    while True:
        rest = max(tail[found - 1] if found else energy, floor**2)
        rows, columns = max(m - found, 1), max(n - found, 1)
        sigma = math.sqrt(rest / (rows * columns))
        count = int((values > tracy_widom_threshold(sigma, rows, columns)).sum())
        if count <= found:
            return sigma, found
        found = count


# --- bases ----------------------------------------------------------------------------------------


def fix_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(left·s, right·s) with signs s such that the largest |entry| of each left column is positive."""
    if not left.numel():
        return left, right
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return left * signs, right * signs


def _gaussian(rows: int, columns: int, like: Tensor, generator: Generator) -> Tensor:
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)


def random_orthonormal(
    n: int,
    k: int,
    *,
    generator: Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(n, k) columns, orthonormal, uniform (Haar): Q of a Gaussian's QR with R's diagonal positive.

    Raises ValueError if k > n.
    """
    if k > n:
        raise ValueError(f"no {k} orthonormal vectors in {n} dimensions")
    q, r = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).to(device=device, dtype=dtype)


def _orthonormal_rows(block: Tensor, against: Tensor | None) -> Tensor:
    """Orthonormal rows spanning what `block` (b, n) adds to the rows of `against`; maybe none.

    Gram–Schmidt against the basis, then orthonormalisation by the eigenvectors of the float64 Gram
    matrix (Stathopoulos & Wu 2002), twice. A row that keeps less than ~1e-5 of its norm was already
    in the basis: what is left of it is rounding and is dropped, not normalised.
    """
    eps = torch.finfo(block.dtype).eps
    for attempt in range(2):
        norms = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        block = block[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
        if against is not None and len(block):
            block = block - (block @ against.T) @ against
            if attempt == 0:
                block = block[torch.linalg.vector_norm(block, dim=1) > 64 * eps]
        if not len(block):
            return block
        wide = block.double()
        scale = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide = wide / scale
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        kept = values > (64 * eps) ** 2 * values[-1]
        block = ((vectors[:, kept] / values[kept].sqrt()).T @ wide).to(block.dtype)
    return block


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """cos θ₁ ≥ cos θ₂ …: singular values of UᵀV, (min(k, l),) float64 (Björck & Golub 1973).

    u (n, k), v (n, l): orthonormal columns.
    """
    return torch.linalg.svdvals(u.double().T @ v.double()).clamp(0, 1)


def overlap(u: Tensor, v: Tensor) -> float:
    """‖UᵀV‖²_F / k: mean squared cosine of the k columns of u with the span of v, in [0, 1]."""
    return float((u.double().T @ v.double()).square().sum() / u.shape[1])


def knee(values: Tensor) -> int:
    """Number of values before the point farthest below the chord from the first to the last.

    values (k,) descending, both axes scaled to [0, 1] (Satopää et al. 2011, "Kneedle"). 0 where
    there is no such point: fewer than three values, or no fall.
    """
    fall = float(values[0] - values[-1]) if len(values) > 2 else 0.0
    if fall <= 0 or fall < 1e-6 * float(values[0]):
        return 0
    along = torch.linspace(0, 1, len(values), dtype=torch.float64)
    depth = 1 - along - (values.double().cpu() - float(values[-1])) / fall
    index = int(depth.argmax())
    return index if float(depth[index]) > 0 else 0


# --- the engine -----------------------------------------------------------------------------------


@dataclass
class _Basis:
    """Rows V of a Krylov space of AᵀA with Y = A Vᵀ and Z = Yᵀ A, grown one block at a time."""

    rows: Tensor  # V (d, n)
    images: Tensor  # Y (m, d)
    returned: Tensor  # Z (d, n)
    last: int = 0  # rows of the newest block: the next one starts from their Z

    @classmethod
    def empty(cls, a: Tensor) -> _Basis:
        return cls(a.new_empty(0, a.shape[1]), a.new_empty(a.shape[0], 0), a.new_empty(0, a.shape[1]))

    def add(self, a: Tensor, block: Tensor) -> bool:
        """Append the directions that `block` (b, n) adds; two passes over A. False if there are none."""
        room = min(a.shape) - len(self.rows)
        block = _orthonormal_rows(block, self.rows if len(self.rows) else None)[-room:]
        self.last = len(block) if room else 0
        if not self.last:
            return False
        image = a @ block.T
        self.rows = torch.cat([self.rows, block])
        self.images = torch.cat([self.images, image], 1)
        self.returned = torch.cat([self.returned, image.T @ a])
        return True

    def advance(self, a: Tensor, size: int, generator: Generator) -> None:
        """One Krylov step; where the space is exhausted, a fresh random block."""
        if self.last and self.add(a, self.returned[-self.last :]):
            return
        fresh = _gaussian(a.shape[0], size, a, generator).T @ a
        if not self.add(a, fresh):  # rank of A reached: any complement serves
            self.add(a, _gaussian(size, a.shape[1], a, generator))

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(all Ritz values (d,), rotation of the k leading (d, k), their residuals (k,)), float64.

        With v = Vᵀw and u = Y w/σ, A v = σ u holds exactly, and ‖Aᵀu − σ v‖ is at hand in Z.
        """
        wide = self.images.double()
        values, vectors = torch.linalg.eigh(wide.T @ wide)
        values, w = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)[:, :k]
        sigma = values[:k].clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        gap = (w.T @ self.returned.double()) / sigma - sigma * (w.T @ self.rows.double())
        return values, w, torch.linalg.vector_norm(gap, dim=1)

    def triplets(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(left (m, k), values (k,), right (n, k)), float64, from a thin SVD rather than a Gram."""
        _, w, _ = self.ritz(k)
        left, values, turn = torch.linalg.svd(self.images.double() @ w, full_matrices=False)
        return left, values, self.rows.double().T @ (w @ turn.T)


def randomized_svd(
    a: Tensor, k: int, *, oversample: int, power_iters: int, generator: Generator
) -> Triplets:
    """The k leading triplets from a block Krylov space of block k + oversample, all iterates kept.

    Halko, Martinsson & Tropp 2011 (Alg. 4.4, 5.1) keeps the last of `power_iters` iterates; keeping
    all of them costs no further pass over A and converges like the square root of the iterations
    (Musco & Musco 2015, Alg. 2). power_iters = 0 is the plain sketch. 3 + 2·power_iters passes.
    a (m, n) float32 or float64. The sketch depends on `generator` alone: whoever knows its state
    can build an update that it misses; `spectrum` does not have that weakness.
    Raises ValueError for non-finite or other dtypes, k outside 1..min(m, n), negative options.
    """
    _validate(a, k)
    if oversample < 0 or power_iters < 0:
        raise ValueError(f"oversample = {oversample}, power_iters = {power_iters}: negative")
    if k + oversample > min(a.shape):
        raise ValueError(f"k + oversample = {k + oversample} exceeds min{tuple(a.shape)}")
    a, exponent = _rescaled(a, frobenius(a))
    basis = _Basis.empty(a)
    for _ in range(power_iters + 1):
        basis.advance(a, k + oversample, generator)
    left, values, right = basis.triplets(k)
    return Triplets(
        values=torch.ldexp(values, torch.tensor(exponent)),
        **_vectors(a, left, right),
        residuals=torch.ldexp(_residuals(a, left, values, right), torch.tensor(exponent)),
        missed=math.ldexp(_unexplained(a, basis.images, basis.rows), exponent),
    )
