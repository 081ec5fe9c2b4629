"""Leading singular triplets, the noise edge, spectral measures and subspace angles of one matrix.

Every random matrix is drawn on the CPU from a passed `torch.Generator` and then moved, so CPU and
GPU see the same draw. Matrices are float32 or float64; small dense problems are solved in float64.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

EXACT_LIMIT = 512
"""Smaller side up to which the exact path is cheaper (`benchmarks/speed.py spectrum`)."""

BLOCK = 16
"""Rows per Krylov block: one memory-bound pass over A costs about the same for 1 to 16 vectors."""

CAPACITY = 256
"""Largest Krylov basis; it bounds the work where an update has no flat bulk at all."""

TOLERANCE = 2e-6
"""Relative error asked of a value above the edge; 1e-5 is promised, float32 itself costs ~1e-6."""

RESOLUTION = 2e-6
"""Fraction of σ₁ below which a singular value of float32 data is rounding."""

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
    """√(μ + q τ) σ: what the largest singular value of m × n noise stays under, mostly.

    μ and τ as in Johnstone 2001 with the −½ centring of Ma 2012, which is right to O(n^{−2/3}).
    """
    a, b = math.sqrt(max(m - 0.5, 0.5)), math.sqrt(max(n - 0.5, 0.5))
    return sigma * math.sqrt((a + b) ** 2 + quantile * (a + b) * (1 / a + 1 / b) ** (1 / 3))


def _noise(values: Tensor, missed: float, m: int, n: int) -> tuple[float, float, int]:
    """(σ, threshold, r): smallest fixed point of r = #{σᵢ > threshold}, σ² = Eᵣ/((m−r)(n−r)).

    Eᵣ = Σ_{i>r} σᵢ² + `missed`, the squared norm outside `values` (d,). From r = 0 upwards: spikes
    can only raise the first estimate, so that noise is not taken for a spike, and every removal
    uncovers smaller ones. Below RESOLUTION·σ₁ there is only rounding.
    """
    squares = values.square()
    tail = [*(squares.flip(0).cumsum(0).flip(0) + missed).tolist(), missed]
    floor = RESOLUTION * float(values[0])
    found = 0
    while True:
        rows, columns = max(m - found, 1), max(n - found, 1)
        sigma = math.sqrt(max(tail[found], 0.0) / (rows * columns))
        threshold = max(tracy_widom_threshold(sigma, rows, columns), floor)
        count = int((values > threshold).sum())
        if count <= found:
            return sigma, threshold, found
        found = count


# --- bases ----------------------------------------------------------------------------------------


def fix_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(left·s, right·s) with signs s: the largest |entry| of each left column is positive."""
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
    q: Tensor
    q, r = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q.to(device=device, dtype=dtype)


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
        wide = wide / scale.clamp_min(torch.finfo(torch.float64).tiny)
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        kept = values > max((64 * eps) ** 2, 1e-13) * values[-1]
        block = ((vectors[:, kept] / values[kept].sqrt()).T @ wide).to(block.dtype)
    return block


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """cos θ₁ ≥ cos θ₂ …: singular values of UᵀV, (min(k, l),) float64 (Björck & Golub 1973).

    u (n, k), v (n, l): orthonormal columns.
    """
    cosines: Tensor = torch.linalg.svdvals(u.double().T @ v.double())
    return cosines.clamp(0, 1)


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
        return cls(
            a.new_empty(0, a.shape[1]), a.new_empty(a.shape[0], 0), a.new_empty(0, a.shape[1])
        )

    def add(self, a: Tensor, block: Tensor) -> bool:
        """Append the directions that `block` (b, n) adds; two passes over A. False if none are."""
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

    def ritz(self) -> tuple[Tensor, Tensor]:
        """(Ritz values (d,) descending, their rotations w (d, d)) in float64, from eigh of YᵀY."""
        wide = self.images.double()
        values, vectors = torch.linalg.eigh(wide.T @ wide)
        return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)

    def residuals(self, values: Tensor, w: Tensor) -> Tensor:
        """‖Aᵀu − σ v‖ for v = Vᵀw, u = Y w/σ; A v = σ u holds exactly, so this bounds the error."""
        sigma = values.clamp_min(torch.finfo(torch.float64).tiny)
        gap = (w.T @ self.returned.double()) / sigma[:, None]
        gap -= sigma[:, None] * (w.T @ self.rows.double())
        norms: Tensor = torch.linalg.vector_norm(gap, dim=1)
        return norms

    def rotated(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(V′, A V′, AᵀA V′) in float64 for V′ = Vᵀw, w (d, k)."""
        return (
            self.rows.double().T @ w,
            self.images.double() @ w,
            self.returned.double().T @ w,
        )

    def missed_energy(self, a: Tensor, energy: float) -> float:
        """‖A − A VᵀV‖²_F; as a difference of energies, or row by row where that would cancel."""
        missed = energy - float(self.images.double().square().sum())
        if missed > 1e-3 * energy:
            return missed
        total = 0.0
        for start in range(0, len(a), 1024):
            piece = slice(start, start + 1024)
            rest = a[piece] - self.images[piece] @ self.rows
            total += float(rest.double().square().sum())
        return total


def _triplets(
    a: Tensor, right: Tensor, images: Tensor, returned: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(left, values, right, residuals) by Rayleigh–Ritz over orthonormal `right` (n, k), float64.

    images = A·right (m, k); returned = Aᵀ·images (n, k) where it is at hand. A thin SVD, not a
    Gram matrix, so that u stays orthonormal where σ vanishes. As A v = σ u holds by construction,
    the residual is ‖Aᵀu − σ v‖.
    """
    left, values, turn = torch.linalg.svd(images, full_matrices=False)
    right = right @ turn.T
    if returned is not None and float(values[-1]) > RESOLUTION * float(values[0]):
        back = (returned @ turn.T) / values
    else:
        back = (left.T.to(a.dtype) @ a).T.double()
    residuals = torch.linalg.vector_norm(back - right * values, dim=0)
    return left.to(a.dtype), values, right.to(a.dtype), residuals


def _finished(left: Tensor, right: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return fix_signs(*((right, left) if transposed else (left, right)))


def _validated(a: Tensor, k: int) -> None:
    if a.ndim != 2 or a.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a float32 or float64 matrix is needed, not {a.dtype} {tuple(a.shape)}")
    if not 1 <= k <= min(a.shape):
        raise ValueError(f"k = {k} outside 1..{min(a.shape)} for a matrix of {tuple(a.shape)}")


def frobenius(a: Tensor) -> float:
    """‖A‖_F: rows in the dtype of A, their squares summed in float64 (relative error ~1e-8).

    Non-finite where an entry is, or where a row's squares overflow the dtype.
    """
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(a, dim=1).double()))


def _rescaled(a: Tensor) -> tuple[Tensor, float, int]:
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


def block_krylov(a: Tensor, k: int, *, block: int, depth: int, generator: Generator) -> Triplets:
    """The k leading triplets from span{W, (AᵀA)W, …, (AᵀA)^(depth−1)W}, W = AᵀΩ, Ω (m, block).

    Musco & Musco 2015, Alg. 2: all power iterates of the randomized SVD of Halko, Martinsson &
    Tropp 2011 (Alg. 4.4, 5.1) are kept, which needs no further pass over A and converges in about
    the square root of its iterations. Range finder (`_Basis`) and Rayleigh–Ritz are apart;
    1 + 2·depth passes. a (m, n) float32 or float64. Ω comes from `generator` alone: who knows its
    state can build an update that this misses (`spectrum` has not that weakness).
    Raises ValueError for non-finite entries, other dtypes, block·depth outside k..min(m, n).
    """
    _validated(a, k)
    if block < 1 or not k <= block * depth <= min(a.shape):
        raise ValueError(f"{block=} x {depth=} outside {k=}..{min(a.shape)} for {tuple(a.shape)}")
    transposed = a.shape[0] < a.shape[1]
    a, norm, exponent = _rescaled(a.T if transposed else a)
    basis = _Basis.empty(a)
    for _ in range(depth):
        basis.advance(a, block, generator)
    _, w = basis.ritz()
    left, values, right, residuals = _triplets(a, *basis.rotated(w[:, :k]))
    left, right = _finished(left, right, transposed)
    missed = math.sqrt(max(basis.missed_energy(a, norm**2), 0.0))
    scale = 2.0**exponent
    return Triplets(values.cpu() * scale, left, right, residuals.cpu() * scale, missed * scale)


def _keyed(generator: Generator, a: Tensor) -> Generator:
    """A generator seeded by SHA-256 of one draw and of the bytes of A.

    A test matrix that depends on A cannot be known while A is being crafted, even if the seed is:
    hiding a spike in its null space would need a fixed point of the hash (threat K18).
    """
    draw = torch.randint(2**62, (1,), generator=generator)
    digest = hashlib.sha256(draw.numpy().tobytes())
    digest.update(a.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)


# --- spectral measures ----------------------------------------------------------------------------


def _golub_kahan(a: Tensor, starts: Tensor, steps: int, deflated: Tensor | None = None) -> Tensor:
    """Upper bidiagonal B_i (s, steps, steps) float64 with A Q_i = P_i B_i, Q_i e₁ = starts_i/‖·‖.

    starts (s, n): s independent Golub–Kahan recurrences in one block product per pass, the right
    vectors fully reorthogonalised (enough by Simon & Zha 2000), and kept orthogonal to the columns
    of `deflated` (n, r), right singular vectors of A.
    """
    count, n = starts.shape
    basis = a.new_zeros(count, steps, n)
    b = torch.zeros(count, steps, steps, dtype=torch.float64, device=a.device)
    p, beta = a.new_zeros(a.shape[0], count), a.new_zeros(count)
    tiny = torch.finfo(a.dtype).tiny
    row = starts
    for j in range(steps):
        for _ in range(2):
            if deflated is not None:
                row = row - (row @ deflated) @ deflated.T
            if j:
                known = basis[:, :j]
                row = row - torch.einsum(
                    "sj,sjn->sn", torch.einsum("sjn,sn->sj", known, row), known
                )
        beta = torch.linalg.vector_norm(row, dim=1)
        row = row / beta.clamp_min(tiny)[:, None]
        basis[:, j] = row
        p = a @ row.T - p * beta if j else a @ row.T
        alpha = torch.linalg.vector_norm(p, dim=0)
        p = p / alpha.clamp_min(tiny)
        if j:
            b[:, j - 1, j] = beta.double()
        b[:, j, j] = alpha.double()
        if j + 1 < steps:
            row = p.T @ a - row * alpha[:, None]
    return b


def lanczos_measure(
    a: Tensor, starts: Tensor, *, steps: int, deflated: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gauss rule of Σᵢ ⟨x, vᵢ⟩² δ(σ − σᵢ) per row x: (σ nodes, weights), (s, steps) descending.

    starts (s, n), results float64; weights of a row sum to 1. Exact for polynomials in σ² of
    degree < 2·steps (Golub & Meurant 1994; Ubaru, Chen & Saad 2017). steps ≤ n − r for r deflated
    columns. No node exceeds σ₁.
    """
    return _gauss_rule(_golub_kahan(a, starts, steps, deflated))


def _gauss_rule(b: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of BᵀB's measure at e₁ from bidiagonal B (s, steps, steps)."""
    _, nodes, rotation = torch.linalg.svd(b)
    return nodes, rotation[:, :, 0].square()


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
    w, _, _ = _rescaled(w.T if side == "left" else w)
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
    b = _golub_kahan(w, starts, min(steps, min(m, n)))
    nodes, weights = _gauss_rule(b)
    peak = nodes[:, :1].square().clamp_min(torch.finfo(torch.float64).tiny)
    jacobi = b.mT @ b / peak[:, :, None]
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


def _entropy_rank(nodes: Tensor, weights: Tensor) -> float:
    """exp(−Σ w p ln p), p = σ/Σ wσ, for a spectral measure with `weights` values at `nodes`."""
    total = float((weights * nodes).sum())
    p = nodes / total
    return math.exp(-float((weights * torch.special.xlogy(p, p)).sum()))


# --- the whole spectrum ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bulk:
    """Spectral measure of what is left after the values above the edge, from random probes."""

    nodes: Tensor  # (probes, steps) float64, CPU
    weights: Tensor
    coarse: tuple[Tensor, Tensor]  # the same probes after half the steps


def _bulk(a: Tensor, found: Tensor, generator: Generator) -> _Bulk:
    starts = _gaussian(PROBES, a.shape[1], a, generator)
    b = _golub_kahan(a, starts, QUADRATURE_STEPS, found).cpu()
    half = QUADRATURE_STEPS // 2
    return _Bulk(*_gauss_rule(b), _gauss_rule(b[:, :half, :half]))


def _with_bulk(found: Tensor, nodes: Tensor, weights: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Measure of n values: the found ones with weight 1, the probes' mean for the others."""
    share = weights * ((n - len(found)) / weights.sum())
    joint = torch.cat([found, nodes.flatten()])
    order = joint.argsort(descending=True, stable=True)
    return joint[order], torch.cat([torch.ones_like(found), share.flatten()])[order]


def _rank_of(found: Tensor, bulk: _Bulk, n: int) -> tuple[float, float]:
    """(effective rank, error): jackknife over the probes plus half the change since half depth."""
    rank = _entropy_rank(*_with_bulk(found, bulk.nodes, bulk.weights, n))
    coarse = _entropy_rank(*_with_bulk(found, *bulk.coarse, n))
    others = ~torch.eye(PROBES, dtype=torch.bool)
    left_out = torch.tensor(
        [_entropy_rank(*_with_bulk(found, bulk.nodes[o], bulk.weights[o], n)) for o in others],
        dtype=torch.float64,
    )
    spread = math.sqrt((PROBES - 1) * float(left_out.var(correction=0)))
    return rank, 2 * spread + abs(rank - coarse) / 2


def spectrum(a: Tensor, k: int, *, generator: Generator) -> Spectrum:
    """All that one audit needs of the singular values of a (m, n) float32/float64: see `Spectrum`.

    Smaller side ≤ EXACT_LIMIT: eigh of the float64 Gram matrix; relative to σ₁ its values are good
    to ~1e-8, finer than the rounding of float32 data, and the k leading ones are refined.
    Otherwise block Krylov (Musco & Musco 2015) until every value above the noise edge is settled,
    then stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017) of the remainder, whose largest
    nodes also test whether anything above the edge was missed; if so, a fresh block joins.
    Work is bounded by CAPACITY basis vectors; what did not settle shows as `complete = False`.
    Equal generator state and matrix give equal bits on one machine.
    Raises ValueError for non-finite entries, other dtypes, k outside 1..min(m, n).
    """
    _validated(a, k)
    transposed = a.shape[0] < a.shape[1]
    keyed = _keyed(generator, a)
    a, norm, exponent = _rescaled(a.T if transposed else a)
    n = a.shape[1]
    if norm == 0:
        zeros = torch.zeros(k, dtype=torch.float64)
        left, right = (torch.eye(s, k, dtype=a.dtype, device=a.device) for s in a.shape)
        left, right = _finished(left, right, transposed)
        whole = torch.zeros(n, dtype=torch.float64)
        return Spectrum(
            zeros, left, right, zeros, 0.0, 0.0, True, 0.0, 0.0, 0, True, 0.0, 0.0, 0.0,
            whole, torch.ones_like(whole),
        )  # fmt: skip
    solve = _dense if n <= EXACT_LIMIT else _iterative
    part = solve(a, k, norm, keyed)
    left, values, right, residuals = _triplets(a, *part.leading)
    left, right = _finished(left, right, transposed)
    scale = 2.0**exponent
    above = part.nodes[: part.above]
    edge = marchenko_pastur_edge(part.sigma, *a.shape)
    return Spectrum(
        values=values.cpu() * scale,
        left=left,
        right=right,
        residuals=residuals.cpu() * scale,
        missed=part.missed * scale,
        frobenius=norm * scale,
        exact=solve is _dense,
        noise_edge=edge * scale,
        threshold=part.threshold * scale,
        above_edge=part.above,
        complete=part.complete,
        excess_energy=float((above.square() - edge**2).sum()) / norm**2,
        effective_rank=part.rank,
        effective_rank_error=part.rank_error,
        nodes=part.nodes * scale,
        weights=part.weights,
    )


@dataclass(frozen=True)
class _Part:
    """What either path finds out about a tall matrix, in its rescaled unit."""

    leading: tuple[Tensor, Tensor, Tensor | None]  # what `_triplets` takes after A
    missed: float
    sigma: float
    threshold: float
    above: int
    complete: bool
    nodes: Tensor
    weights: Tensor
    rank: float
    rank_error: float


def _dense(a: Tensor, k: int, norm: float, generator: Generator) -> _Part:
    """Every singular value, from eigh of the float64 Gram matrix."""
    wide = a.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    values, right = values.flip(0).clamp_min(0).sqrt().cpu(), vectors.flip(1)[:, :k]
    sigma, threshold, above = _noise(values, 0.0, *a.shape)
    ones = torch.ones_like(values)
    rank = _entropy_rank(values, ones)
    leading = (right, wide @ right, None)
    return _Part(leading, 0.0, sigma, threshold, above, True, values, ones, rank, 0.0)


def _iterative(a: Tensor, k: int, norm: float, generator: Generator) -> _Part:
    """Values above the edge by block Krylov, the rest by quadrature, which checks the former."""
    n = a.shape[1]
    capacity = min(max(CAPACITY, k + BLOCK), n)
    basis = _Basis.empty(a)
    while len(basis.rows) < min(k + BLOCK, capacity):
        basis.advance(a, BLOCK, generator)
    while True:
        values, w = basis.ritz()
        missed = max(basis.missed_energy(a, norm**2), 0.0)
        sigma, threshold, above = _noise(values.cpu(), missed, *a.shape)
        room = len(basis.rows) < capacity
        settled = _settled(basis, values, w, above)
        if not settled and room:
            basis.advance(a, BLOCK, generator)
            continue
        right = basis.rows.double().T @ w[:, :above]
        bulk = _bulk(a, right.to(a.dtype), generator)
        hidden = float(bulk.nodes.max()) > threshold
        if not (hidden and room):
            break
        basis.last = 0  # a fresh block: equal values beyond the block size need another start
        for _ in range(3):
            basis.advance(a, BLOCK, generator)
    found = values[:above].cpu()
    rank, error = _rank_of(found, bulk, n)
    return _Part(
        leading=basis.rotated(w[:, :k]),
        missed=math.sqrt(missed),
        sigma=sigma,
        threshold=threshold,
        above=above,
        complete=settled and not hidden,
        nodes=(joint := _with_bulk(found, bulk.nodes, bulk.weights, n))[0],
        weights=joint[1],
        rank=rank,
        rank_error=error,
    )


def _settled(basis: _Basis, values: Tensor, w: Tensor, above: int) -> bool:
    """Whether the error bound min(r, r²/gap) of each value above the edge is ≤ TOLERANCE·σ.

    The quadratic bound is Kato–Temple's with the gap to the first value that is not wanted.
    """
    if above == 0:
        return True
    if 2 * above > len(basis.rows):
        return len(basis.rows) >= basis.rows.shape[1]
    wanted = values[:above]
    residuals = basis.residuals(wanted, w[:, :above])
    bound = torch.minimum(residuals, residuals.square() / (wanted - values[above]))
    return bool((bound <= TOLERANCE * wanted).all())
