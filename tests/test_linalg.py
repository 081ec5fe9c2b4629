"""Singular values, noise edge and subspaces against dense SVDs, planted spikes and pure noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projaudit import lanczos, linalg
from projaudit.linalg import block_krylov, spectrum


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=seeded(seed))


def planted(m: int, n: int, sizes: list[float], seed: int = 0) -> torch.Tensor:
    """Noise with edge 1, and exact singular values `sizes`: the noise is orthogonal to them."""
    g = seeded(seed)
    u = linalg.random_orthonormal(m, len(sizes), generator=g)
    v = linalg.random_orthonormal(n, len(sizes), generator=g)
    bulk = torch.randn(m, n, generator=g) / (math.sqrt(m) + math.sqrt(n))
    bulk = bulk - u @ (u.T @ bulk)
    bulk = bulk - (bulk @ v) @ v.T
    return bulk + (u * torch.tensor(sizes)) @ v.T


DECAY = [40.0 * 0.86**i for i in range(24)]  # down to 1.25 × the edge


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    double=st.booleans(),
    rank=st.integers(0, 6),
    exponent=st.sampled_from([-40, -20, 0, 18, 37]),
    seed=st.integers(0, 2**20),
)
def test_agrees_with_dense_svd(
    m: int, n: int, double: bool, rank: int, exponent: int, seed: int
) -> None:
    a = noise(m, n, seed).double()
    if rank:
        a = noise(m, rank, seed).double() @ noise(rank, n, seed + 1).double()
    a = (a * 10.0**exponent).to(torch.float64 if double else torch.float32)
    if not torch.isfinite(a).all() or not a.any():
        return
    k = min(m, n, 8)
    exact = torch.linalg.svdvals(a.double())
    result = spectrum(a, k, generator=seeded(seed))
    assert result.exact
    assert result.complete
    bound = 1e-6 * float(exact[0])
    torch.testing.assert_close(result.values, exact[:k], rtol=1e-6, atol=bound)
    torch.testing.assert_close(result.nodes, exact, rtol=1e-5, atol=bound)
    assert result.frobenius == pytest.approx(float(exact.square().sum().sqrt()), rel=1e-6)
    assert float(result.residuals.max()) <= 4 * bound
    for side in (result.left, result.right):
        gram = side.double().T @ side.double()
        torch.testing.assert_close(gram, torch.eye(k).double(), rtol=0, atol=2e-5)
    peaks = result.left.gather(0, result.left.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())


@pytest.mark.parametrize(("m", "n"), [(900, 700), (600, 2000), (2000, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterative_path_reaches_the_promised_accuracy(m: int, n: int, dtype: torch.dtype) -> None:
    a = planted(m, n, DECAY).to(dtype)
    result = spectrum(a, 32, generator=seeded())
    exact = torch.linalg.svdvals(a.double())
    assert not result.exact
    assert result.complete
    assert result.above_edge == len(DECAY)
    error = (result.values - exact[:32]).abs() / exact[:32]
    assert float(error[: len(DECAY)].max()) < 1e-5
    nearest = (result.values[:, None] - exact).abs().amin(1)
    assert bool((nearest <= result.residuals + 1e-6 * exact[0]).all())
    assert result.noise_edge == pytest.approx(1.0, rel=0.03)
    reconstructed = result.left.double() @ result.values.diag() @ result.right.double().T
    missed = float(torch.linalg.norm(a.double() - reconstructed))
    assert result.missed <= missed


def test_negative_control_without_depth_the_sketch_misses_the_tolerance() -> None:
    a = planted(700, 600, DECAY)
    exact = torch.linalg.svdvals(a.double())[:24]
    errors = []
    for depth in (2, 8):
        found = block_krylov(a, 24, block=16, depth=depth, generator=seeded())
        errors.append(float(((found.values - exact).abs() / exact).max()))
    assert errors[0] > 1e-2
    assert errors[1] < 1e-5


def test_missed_energy_is_the_residual_of_the_basis() -> None:
    low_rank = planted(300, 200, DECAY) * 0 + noise(300, 5) @ noise(5, 200, 1)
    found = block_krylov(low_rank, 5, block=8, depth=1, generator=seeded())
    assert found.missed < 1e-5 * float(low_rank.norm())
    a = planted(300, 200, [9.0])
    found = block_krylov(a, 16, block=16, depth=1, generator=seeded())
    rest = a - (a @ found.right) @ found.right.T
    assert found.missed == pytest.approx(float(rest.norm()), rel=1e-5)


@pytest.mark.parametrize(("m", "n", "draws"), [(128, 128, 150), (512, 64, 150), (48, 700, 100)])
def test_pure_noise_rarely_exceeds_the_threshold(m: int, n: int, draws: int) -> None:
    alarms = sum(
        spectrum(noise(m, n, seed), 4, generator=seeded()).above_edge > 0 for seed in range(draws)
    )
    assert alarms <= 0.02 * draws


@pytest.mark.parametrize(("m", "n"), [(600, 600), (1500, 550)])
def test_pure_noise_on_the_iterative_path(m: int, n: int) -> None:
    for seed in range(6):
        result = spectrum(noise(m, n, seed), 8, generator=seeded(seed))
        assert (result.above_edge, result.complete) == (0, True)
        edge = linalg.marchenko_pastur_edge(1.0, m, n)
        assert result.noise_edge == pytest.approx(edge, rel=0.003)
        assert result.excess_energy == 0


@pytest.mark.parametrize(("m", "n"), [(400, 300), (900, 700)])
def test_spike_just_above_the_edge_is_counted(m: int, n: int) -> None:
    result = spectrum(planted(m, n, [1.06]), 8, generator=seeded())
    assert result.above_edge == 1
    assert spectrum(planted(m, n, [0.9]), 8, generator=seeded()).above_edge == 0


@pytest.mark.parametrize("pieces", [1, 4, 16, 64])
@pytest.mark.parametrize(("m", "n"), [(512, 256), (1100, 900)])
def test_split_spikes_are_all_counted(pieces: int, m: int, n: int) -> None:
    """Threat K5: equal values, more of them than a Krylov block is wide, beyond the k asked for."""
    a = planted(m, n, [24 / math.sqrt(pieces)] * pieces)
    result = spectrum(a, 8, generator=seeded())
    assert result.above_edge == pieces
    assert result.complete
    energy = (24**2 - pieces * result.noise_edge**2) / result.frobenius**2
    assert result.excess_energy == pytest.approx(energy, rel=1e-3)


def test_update_without_a_bulk_says_that_its_count_is_a_lower_bound() -> None:
    g = seeded()
    u = linalg.random_orthonormal(700, 600, generator=g)
    v = linalg.random_orthonormal(600, 600, generator=g)
    a = (u * torch.logspace(0, -4, 600)) @ v.T
    result = spectrum(a, 32, generator=g)
    assert not result.complete
    assert result.above_edge > 32


def test_crafted_for_the_seed_a_blind_sketch_misses_and_spectrum_does_not() -> None:
    """Threat K18: a spike orthogonal to the whole Krylov space that a known seed produces."""
    m, n, depth = 800, 700, 4
    bulk = noise(m, n, 5) / (math.sqrt(m) + math.sqrt(n))
    omega = torch.randn(m, 16, generator=seeded(7), dtype=torch.float64)
    left, space = [omega], []
    for _ in range(depth):
        space.append(torch.linalg.qr(bulk.double().T @ left[-1])[0])
        left.append(torch.linalg.qr(bulk.double() @ space[-1])[0])
    outside = []
    for taken, size in ((torch.cat(left, 1), m), (torch.cat(space, 1), n)):
        basis = torch.linalg.qr(taken)[0]
        vector = torch.randn(size, generator=seeded(9), dtype=torch.float64)
        for _ in range(2):
            vector = vector - basis @ (basis.T @ vector)
        outside.append(vector / vector.norm())
    a = (bulk.double() + 2 * torch.outer(*outside)).float()
    blind = block_krylov(a, 4, block=16, depth=depth, generator=seeded(7))
    assert float(blind.values[0]) < 1.1
    result = spectrum(a, 4, generator=seeded(7))
    assert float(result.values[0]) == pytest.approx(2.1, rel=0.05)
    assert (result.above_edge, result.complete) == (1, True)


def test_same_seed_is_bit_equal_and_two_seeds_agree() -> None:
    a = planted(900, 700, DECAY)
    one, same, other = (spectrum(a, 24, generator=seeded(s)) for s in (1, 1, 2))
    for name in ("values", "left", "right", "residuals", "nodes", "weights"):
        assert torch.equal(getattr(one, name), getattr(same, name)), name
    assert one.effective_rank == same.effective_rank
    torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.left, other.left, rtol=0, atol=2e-3)
    assert one.above_edge == other.above_edge
    margin = one.effective_rank_error + other.effective_rank_error
    assert abs(one.effective_rank - other.effective_rank) <= margin


@pytest.mark.parametrize(
    ("m", "n", "sizes"), [(800, 800, DECAY), (2000, 600, DECAY), (700, 900, [])]
)
def test_effective_rank_by_quadrature_within_its_stated_error(
    m: int, n: int, sizes: list[float]
) -> None:
    a = planted(m, n, sizes) if sizes else noise(m, n)
    exact = torch.linalg.svdvals(a.double())
    p = exact / exact.sum()
    rank = math.exp(-float((p * p.log()).sum()))
    result = spectrum(a, 16, generator=seeded())
    assert abs(result.effective_rank - rank) <= result.effective_rank_error
    assert result.effective_rank_error < 0.03 * rank
    assert float(result.weights.sum()) == pytest.approx(min(m, n))
    for level in (0.25, 0.5, 0.75):
        x = float(exact.quantile(level))
        below = float(result.weights[result.nodes <= x].sum()) / min(m, n)
        assert below == pytest.approx(level, abs=0.05)


def test_marchenko_pastur_density_integrates_to_one() -> None:
    for m, n in ((400, 100), (100, 400), (300, 200)):
        x = torch.linspace(0, 1.2, 200_001, dtype=torch.float64)
        sigma = 1 / linalg.marchenko_pastur_edge(1.0, m, n)
        density = linalg.marchenko_pastur_density(x, sigma, m, n)
        assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-4)


def test_zero_rank_one_and_single_column() -> None:
    zero = spectrum(torch.zeros(7, 5), 3, generator=seeded())
    assert (zero.frobenius, zero.above_edge, zero.stable_rank, zero.top_energy(2)) == (0, 0, 0, 0)
    assert zero.left.shape == (7, 3)
    for m, n in ((40, 30), (800, 600)):
        one = spectrum(torch.outer(noise(m, 1)[:, 0], noise(n, 1, 1)[:, 0]), 3, generator=seeded())
        assert one.above_edge == 1
        assert one.complete
        assert one.stable_rank == pytest.approx(1)
        # What float32 leaves outside the one direction counts as a bulk: 1.05 on some processors.
        assert one.effective_rank == pytest.approx(1, abs=0.1)
        gram = one.left.T @ one.left
        torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=1e-5)
    column = spectrum(noise(9, 1), 1, generator=seeded())
    assert column.above_edge == 0
    assert column.top_energy(1) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e20, 3e37])
def test_extreme_scales_do_not_change_the_shape(scale: float) -> None:
    for shape in ((300, 200), (700, 600)):
        a = planted(*shape, [4.0, 3.0, 2.0])
        plain = spectrum(a, 4, generator=seeded())
        scaled = spectrum(a * scale, 4, generator=seeded())
        rounding = 0.2 if scale < 1e-38 else 1e-4  # a denormal keeps few bits
        assert scaled.above_edge == plain.above_edge == 3
        values = scaled.values / scale
        torch.testing.assert_close(values[:3], plain.values[:3], rtol=rounding, atol=0)
        assert scaled.stable_rank == pytest.approx(plain.stable_rank, rel=rounding)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_are_refused(bad: float) -> None:
    a = noise(20, 10)
    a[3, 4] = bad
    with pytest.raises(ValueError, match="non-finite"):
        spectrum(a, 2, generator=seeded())


def test_arguments_are_obeyed_or_refused() -> None:
    a = noise(20, 10)
    for k in (0, 11):
        with pytest.raises(ValueError, match="outside"):
            spectrum(a, k, generator=seeded())
    for block, depth in ((6, 2), (1, 2), (0, 1)):
        with pytest.raises(ValueError, match="outside"):
            block_krylov(a, 3, block=block, depth=depth, generator=seeded())
    with pytest.raises(ValueError, match="float32"):
        spectrum(a.bfloat16(), 2, generator=seeded())
    with pytest.raises(ValueError, match="outside"):
        spectrum(a, 2, generator=seeded()).top_energy(3)
    with pytest.raises(ValueError, match="dimensions"):
        linalg.random_orthonormal(3, 4, generator=seeded())
    with pytest.raises(ValueError, match="side"):
        lanczos.resemblance(a, noise(10, 2), side="left")


def test_global_random_state_is_neither_read_nor_written() -> None:
    before = torch.get_rng_state()
    spectrum(noise(600, 550), 4, generator=seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_angles_overlap_knee() -> None:
    u = linalg.random_orthonormal(50, 4, generator=seeded())
    turn = linalg.random_orthonormal(4, 4, generator=seeded(1))
    torch.testing.assert_close(
        linalg.principal_angles(u, u @ turn), torch.ones(4).double(), rtol=0, atol=1e-6
    )
    assert linalg.overlap(u, u @ turn) == pytest.approx(1)
    assert linalg.overlap(u[:, :2], u[:, 2:]) == pytest.approx(0, abs=1e-10)
    assert linalg.knee(torch.tensor([9.0, 8, 7, 6, 5, 0.5, 0.49, 0.48, 0.47, 0.46])) == 5
    assert linalg.knee(torch.ones(8)) == 0
    assert linalg.knee(torch.ones(2)) == 0


def test_lanczos_matches_the_moments_of_the_dense_measure() -> None:
    a, x = planted(60, 40, [3.0, 3.0]).double(), noise(3, 40, 8).double()
    nodes, weights = lanczos.gauss_rule(lanczos.lanczos(a, x, 6))
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
    _, sigma, right = torch.linalg.svd(a, full_matrices=False)
    masses = (x / x.norm(dim=1, keepdim=True) @ right.T).square()
    for degree in range(1, 12):
        found = (weights * nodes ** (2 * degree)).sum(1)
        torch.testing.assert_close(found, (masses * sigma ** (2 * degree)).sum(1))


def test_the_measure_of_the_bulk_leaves_out_what_was_found() -> None:
    a = planted(60, 40, [3.0, 3.0]).double()
    _, sigma, right = torch.linalg.svd(a, full_matrices=False)
    images = right[:2] @ a.T
    basis = lanczos.Basis(a, right[:2], images, images @ a)
    rest = lanczos.bulk(basis, sigma[:2], float(sigma[2:].square().sum()), seeded())
    assert float(rest.nodes.max()) < 1.2
    nodes, weights = rest.measure()
    assert float(weights.sum()) == pytest.approx(40)
    assert float((weights * nodes.square()).sum()) == pytest.approx(float(sigma.square().sum()))


@pytest.mark.parametrize("transposed", [False, True])
def test_products_in_both_orientations(transposed: bool) -> None:
    a = noise(70, 50, 1).T if transposed else noise(50, 70, 1)
    x = noise(4, a.shape[1], 2)
    images, back = lanczos.normal_product(a, x)
    torch.testing.assert_close(images, x @ a.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back, x @ a.T @ a, rtol=1e-5, atol=1e-5)


def base_and_vectors(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A base with a decaying spectrum; columns: singular vectors, mixtures, random directions."""
    g = seeded(3)
    u = linalg.random_orthonormal(m, min(m, n), generator=g)
    v = linalg.random_orthonormal(n, min(m, n), generator=g)
    w = (u * torch.linspace(2, 0.2, min(m, n))) @ v.T
    columns = []
    for basis in (u, v):
        stray = linalg.random_orthonormal(len(basis), 3, generator=g)
        mixed = 0.8 * basis[:, [5, 150]] + 0.6 * stray[:, :2]
        columns.append(torch.cat([basis[:, [0, 40, 200]], mixed, stray], 1))
    return w, columns[0], columns[1]


@pytest.mark.parametrize(("m", "n"), [(400, 400), (600, 300), (300, 600)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_resemblance_bounds_the_dense_answer(m: int, n: int, side: str) -> None:
    w, left, right = base_and_vectors(m, n)
    x = left if side == "left" else right
    dense, exact = lanczos.resemblance(w, x, side=side)
    assert exact
    bound, exact = lanczos.resemblance(w, x, side=side, limit=10)
    assert not exact
    assert bool((bound >= dense - 1e-3).all())
    torch.testing.assert_close(bound[:5] > 0.5, dense[:5] > 0.5)  # what resembles one, does
    assert bool((bound[5:] < 0.5).all())  # certified intruders
    finer, _ = lanczos.resemblance(w, x, side=side, limit=10, steps=60)
    assert bool((finer <= bound + 1e-3).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("m", "n"), [(300, 200), (900, 700)])
def test_cuda_agrees_with_cpu(m: int, n: int) -> None:
    a = planted(m, n, DECAY)
    cpu = spectrum(a, 24, generator=seeded())
    gpu = spectrum(a.cuda(), 24, generator=seeded())
    torch.testing.assert_close(gpu.values, cpu.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(gpu.left.cpu(), cpu.left, rtol=0, atol=2e-3)
    assert gpu.above_edge == cpu.above_edge
    assert gpu.left.device.type == "cuda"
    x = cpu.right[:, :4]
    on_cpu, _ = lanczos.resemblance(a, x, side="right", limit=10)
    on_gpu, _ = lanczos.resemblance(a.cuda(), x.cuda(), side="right", limit=10)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-4)
