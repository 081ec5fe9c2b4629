"""Leading singular triplets, the noise edge, spectral measures and subspace angles of one matrix.

Every random matrix is drawn on the CPU from a passed `torch.Generator` and then moved, so CPU and
GPU see the same draw. Matrices are float32 or float64; small dense problems are solved in float64.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from projaudit.lanczos import EXACT_LIMIT, Basis, bulk, entropy_rank, rescaled, ritz

BLOCK = 16
"""Rows per Krylov block: one memory-bound pass over A costs about the same for 1 to 16 vectors."""

CAPACITY = 256
"""Largest Krylov basis; it bounds the work where an update has no flat bulk at all."""

TOLERANCE = 2e-6
"""Relative error asked of a value above the edge; 1e-5 is promised, float32 itself costs ~1e-6."""

RESOLUTION = 2e-6
"""Fraction of σ₁ below which a singular value of float32 data is rounding."""

_PIECE = 1 << 23  # bytes hashed by one thread at a time

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
    """Dense path or factors: every singular value is known, not only the leading ones."""
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


def block_krylov(a: Tensor, k: int, *, block: int, depth: int, generator: Generator) -> Triplets:
    """The k leading triplets from span{W, (AᵀA)W, …, (AᵀA)^(depth−1)W}, W = AᵀΩ, Ω (m, block).

    Musco & Musco 2015, Alg. 2: all power iterates of the randomized SVD of Halko, Martinsson &
    Tropp 2011 (Alg. 4.4, 5.1) are kept, which needs no further pass over A and converges in about
    the square root of its iterations. Range finder (`Basis`) and Rayleigh–Ritz are apart;
    1 + 2·depth passes. a (m, n) float32 or float64. Ω comes from `generator` alone: who knows its
    state can build an update that this misses (`spectrum` has not that weakness).
    Raises ValueError for non-finite entries, other dtypes, block·depth outside k..min(m, n).
    """
    _validated(a, k)
    if block < 1 or not k <= block * depth <= min(a.shape):
        raise ValueError(f"{block=} x {depth=} outside {k=}..{min(a.shape)} for {tuple(a.shape)}")
    transposed = a.shape[0] < a.shape[1]
    a, norm, exponent = rescaled(a.T if transposed else a)
    basis = Basis.empty(a)
    for _ in range(depth):
        basis.advance(block, generator)
    found, w = ritz(basis.images)
    left, values, right, residuals = _triplets(a, *basis.rotated(w[:, :k]))
    left, right = _finished(left, right, transposed)
    missed = math.sqrt(max(basis.missed_energy(found, norm**2), 0.0))
    scale = 2.0**exponent
    return Triplets(values.cpu() * scale, left, right, residuals.cpu() * scale, missed * scale)


def leading(a: Tensor, k: int, *, generator: Generator) -> Triplets:
    """The k leading triplets (k ≤ BLOCK): exact for a smaller side ≤ EXACT_LIMIT, else a sketch.

    The sketch has a fixed effort, nine passes over A at most. Near a value that has close
    neighbours its vectors are mixtures of theirs (see residuals).
    """
    least = min(a.shape)
    if least <= EXACT_LIMIT:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        left, right = fix_signs(u[:, :k], vh[:k].T)
        values = s[:k].double().cpu()
        return Triplets(values, left, right, torch.zeros_like(values), float(s[k:].norm()))
    block = min(BLOCK, least)
    depth = min(4, least // block)
    return block_krylov(a, min(k, block), block=block, depth=depth, generator=generator)


def spectrum_of_product(left: Tensor, right: Tensor, k: int, *, generator: Generator) -> Spectrum:
    """The spectrum of A = left · right (m × r, r × n, float32) without forming A, exactly.

    QR of either factor leaves an r × r core whose SVD is A's; the other min(m, n) − r values are 0
    and have random orthonormal vectors. In float64. What it says means the same as `spectrum` of
    the dense A, of which it is the exact path. Raises ValueError for non-finite entries, a product
    that is zero, r > min(m, n), k outside 1..min(m, n).
    """
    (m, r), n = left.shape, right.shape[1]
    least = min(m, n)
    if not (1 <= k <= least and r <= least and left.isfinite().all() and right.isfinite().all()):
        raise ValueError(f"{k=}, factors of {tuple(left.shape)} and {tuple(right.shape)}")
    # One draw of the passed generator, as `spectrum` takes: what is drawn later is the same.
    keyed, pad = _keyed(generator, left), max(k - r, 0)
    bases, cores = [], []
    for factor in (left, right.T):
        noise = torch.randn(len(factor), pad, generator=keyed, dtype=torch.float64)
        q, core = torch.linalg.qr(torch.cat([factor.double(), noise.to(factor.device)], dim=1))
        bases.append(q)
        cores.append(core[:r, :r])
    u, s, vh = torch.linalg.svd(cores[0] @ cores[1].T)
    norm = float(s.norm())
    if norm == 0:
        raise ValueError("the product is zero")
    turned = [
        torch.cat([q[:, :r] @ turn, q[:, r:]], dim=1)[:, :k].to(left.dtype)
        for q, turn in zip(bases, (u, vh.T), strict=True)
    ]
    u, v = fix_signs(turned[0], turned[1])
    values = torch.zeros(least, dtype=torch.float64)
    values[:r] = s.cpu()
    ones = torch.ones_like(values)
    sigma, threshold, above = _noise(values, 0.0, max(m, n), least)
    edge = marchenko_pastur_edge(sigma, m, n)
    return Spectrum(
        values=values[:k],
        left=u,
        right=v,
        residuals=torch.zeros(k, dtype=torch.float64),
        missed=0.0,
        frobenius=norm,
        exact=True,
        noise_edge=edge,
        threshold=threshold,
        above_edge=above,
        complete=True,
        excess_energy=float((values[:above].square() - edge**2).sum()) / norm**2,
        effective_rank=entropy_rank(values, ones),
        effective_rank_error=0.0,
        nodes=values,
        weights=ones,
    )


def _keyed(generator: Generator, a: Tensor) -> Generator:
    """A generator seeded by SHA-256 of one draw and of the bytes of A.

    A test matrix that depends on A cannot be known while A is being crafted, even if the seed is:
    hiding a spike in its null space would need a fixed point of the hash (threat K18).
    """
    draw = torch.randint(2**62, (1,), generator=generator)
    digest = hashlib.sha256(draw.numpy().tobytes())
    data = a.detach().cpu().contiguous().view(torch.uint8).flatten().numpy().data
    pieces = (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for part in pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces):
            digest.update(part)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)


# --- the whole spectrum ---------------------------------------------------------------------------


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
    a, norm, exponent = rescaled(a.T if transposed else a)
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
    rank = entropy_rank(values, ones)
    leading = (right, wide @ right, None)
    return _Part(leading, 0.0, sigma, threshold, above, True, values, ones, rank, 0.0)


def _iterative(a: Tensor, k: int, norm: float, generator: Generator) -> _Part:
    """Values above the edge by block Krylov; the probes of the bulk look for what it missed."""
    n = a.shape[1]
    capacity = min(max(CAPACITY, k + BLOCK), n)
    basis, checked = Basis.empty(a), -1
    while True:
        while len(basis.rows) < min(k + BLOCK, capacity):
            basis.advance(BLOCK, generator)
        values, w = ritz(basis.images)
        missed = max(basis.missed_energy(values, norm**2), 0.0)
        sigma, threshold, above = _noise(values.cpu(), missed, *a.shape)
        settled = _settled(basis, values, w, above)
        if not settled and len(basis.rows) < capacity:
            basis.advance(BLOCK, generator)
            continue
        fresh = basis.restarted(w[:, :above])
        found = values[:above].cpu()
        energy = max(norm**2 - float(found.square().sum()), 0.0)
        rest = bulk(fresh, found, energy, generator)
        hidden = bool((rest.nodes > threshold).any())
        if not hidden or above <= checked or len(fresh.rows) > capacity:
            break
        basis, checked = fresh, above  # which has their directions already
    nodes, weights = rest.measure()
    rank, error = rest.effective_rank()
    return _Part(
        leading=basis.rotated(w[:, :k]),
        missed=math.sqrt(missed),
        sigma=sigma,
        threshold=threshold,
        above=above,
        complete=settled and not hidden,
        nodes=nodes,
        weights=weights,
        rank=rank,
        rank_error=error,
    )


def _settled(basis: Basis, values: Tensor, w: Tensor, above: int) -> bool:
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
