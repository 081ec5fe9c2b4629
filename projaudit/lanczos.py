"""Krylov bases of AᵀA, the spectral measures that they give, resemblance to singular vectors.

Matrices are float32 or float64, that of a `Basis` is tall; small dense problems are in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

EXACT_LIMIT = 512
"""Smaller side up to which the exact path is cheaper (`benchmarks/spectrum.py`)."""

PROBES = 16
STEPS = 6
"""Random rows and Krylov steps behind the measure of the bulk."""


# --- products -------------------------------------------------------------------------------------


def normal_product(a: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(X Aᵀ, X AᵀA) for rows X (b, n), in the orientations that BLAS is quick at."""
    images: Tensor = a @ rows.T.contiguous()
    found: Tensor = images.T @ a if a.is_contiguous() else (a.T @ images).T
    return images.T, found


def gaussian(rows: int, columns: int, like: Tensor, generator: Generator) -> Tensor:
    """(rows, columns) standard normal, drawn on the CPU in float64, like `like`."""
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)


def frobenius(a: Tensor) -> float:
    """‖A‖_F of a matrix or vector: rows in its dtype, their squares summed in float64 (~1e-8).

    Scaled first where squares would leave the dtype; non-finite where an entry is.
    """
    rows = a if a.ndim == 2 else a.reshape(1, -1)
    rows = rows.T if rows.T.is_contiguous() else rows  # as they lie in memory
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1).double()))
    if 1e-15 < norm < 1e15 or not a.numel():
        return norm
    peak = float(a.abs().max())
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    return peak * float(torch.linalg.vector_norm((rows / peak).double()))


def rescaled(a: Tensor) -> tuple[Tensor, float, int]:
    """(A·2⁻ᵉ, its Frobenius norm, e): e = 0 and no copy unless squares would leave the dtype.

    Raises ValueError where an entry is not finite.
    """
    norm = frobenius(a)
    if 1e-4 <= norm <= 1e4:
        return a, norm, 0
    peak = float(a.abs().max())
    if not math.isfinite(peak):
        raise ValueError("matrix with non-finite entries")
    if peak == 0:
        return a, 0.0, 0
    exponent = math.frexp(peak)[1] - 1  # 2^e itself stays representable
    half = -exponent // 2  # 2^-e itself may not be representable: denormals
    a = a * 2.0**half * 2.0 ** (-exponent - half)
    return a, frobenius(a), exponent


# --- the basis ------------------------------------------------------------------------------------


def _orthonormal_rows(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows spanning what `block` (b, n) adds to the rows of `basis`; maybe none.

    Gram–Schmidt against the basis, then orthonormalisation by the eigenvectors of the float64 Gram
    matrix (Stathopoulos & Wu 2002), twice. A direction of which less than ~1e-5 is new is rounding
    and is dropped, not normalised.
    """
    info = torch.finfo(block.dtype)
    for _ in range(2):
        block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(info.tiny)
        block = block - (block @ basis.T) @ basis
        wide = block.double()
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        kept = values > max((64 * info.eps) ** 2, 1e-13)
        block = ((vectors[:, kept] / values[kept].sqrt()).T @ wide).to(block.dtype)
    return block


@dataclass
class Basis:
    """Rows V of a Krylov space of AᵀA with Y = V Aᵀ and Z = Y A, grown one block at a time."""

    a: Tensor
    rows: Tensor
    """V (d, n), orthonormal."""
    images: Tensor
    """Y (d, m)."""
    returned: Tensor
    """Z (d, n)."""
    last: int = 0
    """Rows of the newest block: the next one starts from their Z."""

    @classmethod
    def empty(cls, a: Tensor) -> Basis:
        """No rows yet."""
        m, n = a.shape
        return cls(a, a.new_empty(0, n), a.new_empty(0, m), a.new_empty(0, n))

    def restarted(self, w: Tensor) -> Basis:
        """A basis of the rows wᵀV, w (d, k) with orthonormal columns, without products with A."""
        rows, images, returned = (side.T.to(self.a.dtype) for side in self.rotated(w))
        return Basis(self.a, rows, images, returned)

    def add(self, block: Tensor) -> bool:
        """Append the directions that `block` (b, n) adds. False if there are none."""
        room = min(self.a.shape) - len(self.rows)
        block = _orthonormal_rows(block, self.rows)[-room:] if room else block[:0]
        self.last = len(block)
        if not self.last:
            return False
        images, returned = normal_product(self.a, block)
        self.rows = torch.cat([self.rows, block])
        self.images = torch.cat([self.images, images])
        self.returned = torch.cat([self.returned, returned])
        return True

    def advance(self, size: int, generator: Generator) -> None:
        """One Krylov step; at first or where the space is exhausted, `size` fresh random rows."""
        if self.last and self.add(self.returned[-self.last :]):
            return
        m, n = self.a.shape
        if not self.add(gaussian(m, size, self.a, generator).T @ self.a):
            self.add(gaussian(size, n, self.a, generator))  # rank reached: any complement serves

    def residuals(self, values: Tensor, w: Tensor) -> Tensor:
        """‖Aᵀu − σ v‖ for v = Vᵀw, u = Yᵀw/σ; A v = σ u holds exactly, so this bounds the error."""
        sigma = values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        gap = (w.T @ self.returned.double()) / sigma - sigma * (w.T @ self.rows.double())
        norms: Tensor = torch.linalg.vector_norm(gap, dim=1)
        return norms

    def rotated(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(V′, A V′, AᵀA V′) as columns in float64 for V′ = Vᵀw, w (d, k)."""
        right, images, returned = (
            side.double().T @ w for side in (self.rows, self.images, self.returned)
        )
        return right, images, returned

    def missed_energy(self, values: Tensor, energy: float) -> float:
        """‖A − A VᵀV‖²_F from all Ritz values and ‖A‖²_F, or row by row where that would cancel."""
        missed = energy - float(values.square().sum())
        if missed > 1e-3 * energy:
            return missed
        total = 0.0
        for start in range(0, len(self.a), 1024):
            piece = slice(start, start + 1024)
            rest = self.a[piece] - self.images[:, piece].T @ self.rows
            total += float(rest.double().square().sum())
        return total


def ritz(images: Tensor) -> tuple[Tensor, Tensor]:
    """(Ritz values (d,) descending, their rotations w (d, d)) of images Y (d, m), in float64."""
    wide = images.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


# --- spectral measures ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bulk:
    """Spectral measure of the n − r directions that r found vectors leave, by random probes."""

    found: Tensor
    """(r,) float64, CPU: values of weight 1."""
    nodes: Tensor
    """(j,) float64, CPU: those of a block Gauss rule (Golub & Meurant 2010, ch. 6)."""
    masses: Tensor
    """(PROBES, j): share of each probe's square at each node; a row sums to 1."""
    coarse: Bulk | None
    """The rule after half the steps."""
    count: int
    """n − r."""
    energy: float
    """‖A‖²_F without the found values."""

    def measure(self, used: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        """(nodes, weights) of all n values: the found ones, and the mean of the `used` probes.

        Scaled to the energy that is known exactly, a control variate of Σσ.
        """
        weights = self.count * self.masses[used].mean(0)
        have = float((weights * self.nodes.square()).sum())
        nodes = self.nodes * math.sqrt(self.energy / have) if have > 0 else self.nodes
        joint, order = torch.cat([self.found, nodes]).sort(descending=True, stable=True)
        return joint, torch.cat([torch.ones_like(self.found), weights])[order]

    def effective_rank(self) -> tuple[float, float]:
        """(effective rank, error): two standard errors (jackknife) and the correction.

        Gauss rules of s steps err by O(s⁻²) where the values of a square matrix crowd at 0, and far
        less elsewhere: extrapolated from half the steps, the correction counted as the error.
        """
        assert self.coarse is not None
        rank = entropy_rank(*self.measure())
        correction = (rank - entropy_rank(*self.coarse.measure())) / 3
        probes = len(self.masses)
        others = ~torch.eye(probes, dtype=torch.bool)
        left_out = torch.tensor(
            [entropy_rank(*self.measure(o)) for o in others], dtype=torch.float64
        )
        spread = math.sqrt((probes - 1) * float(left_out.var(correction=0)))
        return rank + correction, 2 * spread + abs(correction)


def bulk(basis: Basis, found: Tensor, energy: float, generator: Generator) -> Bulk:
    """The measure beside the r found values, whose right vectors are all that `basis` has so far.

    `energy` is ‖A‖²_F without them. PROBES random rows and their Krylov space are added to the
    basis, so that values which were missed show among the nodes.
    """
    n, r = basis.a.shape[1], len(found)
    starts = gaussian(PROBES, n, basis.a, generator)
    starts = starts - (starts @ basis.rows.T) @ basis.rows
    basis.add(starts)
    for _ in range(STEPS - 1):
        basis.advance(PROBES, generator)

    def rule(stop: int, coarse: Bulk | None) -> Bulk:
        nodes, w = ritz(basis.images[r:stop])
        masses = ((starts @ basis.rows[r:stop].T).double() @ w).square()
        masses = (masses / masses.sum(1, keepdim=True)).cpu()
        return Bulk(found, nodes.cpu(), masses, coarse, n - r, energy)

    return rule(len(basis.rows), rule(r + PROBES * STEPS // 2, None))


def entropy_rank(nodes: Tensor, weights: Tensor) -> float:
    """exp(−Σ w p ln p), p = σ/Σ wσ, for a spectral measure with `weights` values at `nodes`."""
    total = float((weights * nodes).sum())
    p = nodes / total
    return math.exp(-float((weights * torch.special.xlogy(p, p)).sum()))


# --- resemblance ----------------------------------------------------------------------------------


def lanczos(a: Tensor, starts: Tensor, steps: int) -> Tensor:
    """Jacobi matrices (s, steps, steps) float64 of Σᵢ ⟨x, vᵢ⟩² δ(ξ − σᵢ²) per row x.

    s independent Lanczos recurrences with AᵀA in one block product per step, fully
    reorthogonalised. starts (s, n); steps ≤ n.
    """
    count, n = starts.shape
    basis = a.new_zeros(count, steps, n)
    t = torch.zeros(count, steps, steps, dtype=torch.float64, device=a.device)
    tiny = torch.finfo(a.dtype).tiny
    row = starts
    for j in range(steps):
        length = torch.linalg.vector_norm(row, dim=1)
        row = basis[:, j] = row / length.clamp_min(tiny)[:, None]
        if j:
            t[:, j - 1, j] = t[:, j, j - 1] = length.double()
        images, row = normal_product(a, row)
        t[:, j, j] = images.double().square().sum(1)
        known = basis[:, : j + 1]
        for _ in range(2):
            row = row - ((known @ row[:, :, None]).mT @ known)[:, 0]
    return t


def gauss_rule(t: Tensor) -> tuple[Tensor, Tensor]:
    """(σ nodes, weights), (s, steps) descending, of Jacobi matrices; weights of a row sum to 1.

    Exact for polynomials in σ² of degree < 2·steps (Golub & Meurant 1994).
    """
    values, vectors = torch.linalg.eigh(t)
    return values.flip(1).clamp_min(0).sqrt(), vectors[:, 0].flip(1).square()


def resemblance(
    w: Tensor, x: Tensor, *, side: str, steps: int = 24, limit: int = EXACT_LIMIT
) -> tuple[Tensor, bool]:
    """(maxᵢ |cos(x, singular vectorᵢ of w)| for each column of x (·, k) float64, whether exact).

    The intruder test of arXiv 2410.21228 without an SVD of the base. side: "left" (x is m × k) or
    "right" (n × k). Exact by a dense SVD up to a smaller side of `limit`. Beyond, an upper bound:
    no point mass of a measure exceeds its Christoffel function ρ(ξ) = 1/Σ_{j<steps} pⱼ(ξ)², pⱼ the
    orthonormal polynomials that Lanczos yields (Chebyshev–Markov–Stieltjes; Akhiezer 1965, ch. 2),
    so |cos|² ≤ max ρ, over the nodes and a grid refined at its maximum (float rounding and grid
    error ~1e-3). Certified: a small value means that no singular vector resembles x (an intruder).
    Estimated: a large one also arises where several close singular values share x; it falls to the
    mass of that cluster as `steps` grow. A vector spread over all of them shows about √(3/steps).
    On the longer side only vectors of values above 1e-3 σ₁ count (its null space has none).
    Raises ValueError for another side, mismatched shapes, or non-finite entries of w.
    """
    if side not in ("left", "right") or x.shape[0] != w.shape[side == "right"]:
        raise ValueError(f"{side=} vectors {tuple(x.shape)} for a matrix of {tuple(w.shape)}")
    w, _, _ = rescaled(w.T if side == "left" else w)
    m, n = w.shape  # x lives in the n dimensions from here on
    x = x / torch.linalg.vector_norm(x, dim=0)
    if min(m, n) <= limit:
        _, _, right = torch.linalg.svd(w.double(), full_matrices=False)
        return (right @ x.double()).abs().amax(0), True
    mass = torch.ones(x.shape[1], dtype=torch.float64, device=w.device)
    longer = n > m
    starts = x.T
    if longer:  # ⟨x, vᵢ⟩ = ⟨W x, uᵢ⟩/σᵢ: start on the short side, divide by ξ = σ²
        starts, w = (w @ x).T, w.T
        mass = starts.double().square().sum(1)
    jacobi = lanczos(w, starts, min(steps, min(m, n)))
    nodes, weights = gauss_rule(jacobi)
    peak = nodes[:, :1].square().clamp_min(torch.finfo(torch.float64).tiny)
    jacobi = jacobi / peak[:, :, None]
    theta = nodes.square() / peak  # (k, steps), descending, in units of σ₁²

    def mass_bound(xi: Tensor, rho: Tensor) -> Tensor:
        if not longer:
            return rho
        return torch.where(xi > 1e-6, mass[:, None] * rho / (xi * peak).clamp_min(1e-300), 0)

    best = mass_bound(theta, weights).amax(1)
    between = torch.linspace(0, 1, 9, dtype=torch.float64, device=w.device)
    xi = (theta[:, :-1, None] * (1 - between) + theta[:, 1:, None] * between).flatten(1)
    for _ in range(3):  # the grid, then twice around its maximum
        bound = mass_bound(xi, _christoffel(jacobi, xi))
        best = torch.maximum(best, bound.amax(1))
        at = bound.argmax(1, keepdim=True)
        low = xi.gather(1, (at + 1).clamp_max(xi.shape[1] - 1))
        high = xi.gather(1, (at - 1).clamp_min(0))
        xi = high + (low - high) * torch.linspace(0, 1, 17, dtype=torch.float64, device=w.device)
    return best.clamp(0, 1).sqrt(), False


def _christoffel(t: Tensor, xi: Tensor) -> Tensor:
    """1/Σⱼ pⱼ(ξ)², pⱼ the orthonormal polynomials of the Jacobi matrices t (k, m, m), xi (k, g)."""
    diagonal, off = t.diagonal(dim1=1, dim2=2), t.diagonal(1, 1, 2)
    before, now, total = torch.zeros_like(xi), torch.ones_like(xi), torch.ones_like(xi)
    for j in range(t.shape[1] - 1):
        step = (xi - diagonal[:, j, None]) * now
        if j:
            step = step - off[:, j - 1, None] * before
        before, now = now, step / off[:, j, None].clamp_min(1e-300)
        total = total + now.square()
    return torch.nan_to_num(
        1 / total, nan=0.0
    )  # NaN only after overflow, where the sum is infinite
