"""Overlap with the base's own subspaces, intruder dimensions, and coupling of two layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_probes import draw, noise, projector, spike, unit
from torch import Tensor

from projaudit import lanczos
from projaudit.analyses import subspace
from projaudit.analyses.context import ProjectorContext
from projaudit.linalg import overlap, random_orthonormal
from projaudit.metrics import Skip, Value
from projaudit.update import LayerUpdate


def layer(before: Tensor, delta: Tensor) -> LayerUpdate:
    return LayerUpdate(
        role="linear_1",
        subject="projector/linear_1",
        before=before,
        after=before + delta,
        before_bias=None,
        after_bias=None,
        changed_fraction=1.0,
        rounding_floor=0.0,
        rank=32,
        generator=torch.Generator().manual_seed(0),
    )


def decaying(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(W0, its left, its right singular vectors), values 1, 0.9, 0.81, …"""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    left = random_orthonormal(rows, k, generator=generator)
    right = random_orthonormal(columns, k, generator=generator)
    return left * 0.9 ** torch.arange(k) @ right.T, left, right


def measure(name: str, of: object) -> Value:
    result = getattr(subspace, name)(of)
    assert isinstance(result, Value)
    return result


# --- overlap with the base ------------------------------------------------------------------------


def test_an_update_along_the_base_overlaps_wholly() -> None:
    base, left, right = decaying(96, 64)
    along = left[:, :5] @ random_orthonormal(64, 5, generator=torch.Generator()).T
    found = layer(base, 0.1 * along)
    assert measure("base_overlap_left", found).value > 0.95
    assert abs(measure("base_overlap_right", found).nulls[0].z(0.0) or 0) < 5
    across = random_orthonormal(96, 5, generator=torch.Generator()) @ right[:, :5].T
    found = layer(base, 0.1 * across)
    assert measure("base_overlap_right", found).value > 0.95
    assert measure("base_overlap_left", found).value < 0.3


def test_a_random_update_overlaps_as_theory_says() -> None:
    base, _, _ = decaying(96, 64)
    for side, size in (("left", 96), ("right", 64)):
        scores = []
        for seed in range(40):
            result = measure(f"base_overlap_{side}", layer(base, noise(96, 64, seed)))
            (null,) = result.nulls
            assert (null.kind, null.draws) == ("equal_norm", 0)
            assert null.mean == pytest.approx(5 / size)
            score = null.z(result.value)
            assert score is not None
            scores.append(score)
        drawn = torch.tensor(scores)
        assert abs(float(drawn.mean())) < 0.5
        assert 0.7 < float(drawn.std()) < 1.4


@pytest.mark.parametrize(("n", "k"), [(12, 1), (12, 5), (40, 3)])
def test_moments_of_the_overlap_of_random_subspaces(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    fixed = torch.eye(n)[:, :k]
    drawn = torch.tensor(
        [overlap(random_orthonormal(n, k, generator=generator), fixed) for _ in range(3000)]
    )
    null = subspace._random_overlap(n, k)
    assert float(drawn.mean()) == pytest.approx(null.mean, rel=0.05)
    assert float(drawn.std()) == pytest.approx(null.sd, rel=0.08)


def test_a_subspace_that_is_the_whole_space_has_no_spread() -> None:
    result = measure("base_overlap_right", layer(draw(8, 3, seed=1), noise(8, 3)))
    assert result.value == pytest.approx(1)
    assert result.nulls[0].z(result.value) is None


# --- intruders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [512, 16])  # exact, and by the certified bound
def test_planted_directions_are_intruders(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = lanczos.resemblance

    def limited(w: Tensor, x: Tensor, *, side: str) -> tuple[Tensor, bool]:
        return exact(w, x, side=side, limit=limit)

    monkeypatch.setattr(lanczos, "resemblance", limited)
    base = noise(200, 160) * 160**0.5
    generator = torch.Generator().manual_seed(5)
    for count in (0, 1, 3):
        planted = random_orthonormal(200, count, generator=generator) if count else base[:, :0]
        delta = 6 * planted @ random_orthonormal(160, 160, generator=generator)[:, :count].T
        quiet = 1e-4 * noise(200, 160, 3)
        result = measure("intruder_dimensions", layer(base, delta + quiet))
        assert result.value == count, limit
        found = [line for line in result.detail if "settled" not in line]
        assert len(found) == count
        assert all(("≤" if limit == 16 else "=") in line for line in found)


def test_a_stronger_base_direction_is_no_intruder() -> None:
    base, left, right = decaying(96, 64)
    grown = torch.outer(left[:, 20], right[:, 20])
    assert measure("intruder_dimensions", layer(base, 3 * grown)).value == 0


# --- coupling -------------------------------------------------------------------------------------


def test_a_read_direction_that_was_written_is_coupled() -> None:
    hidden = unit(96, 1)
    first = torch.outer(hidden, unit(48, 2)) + 0.05 * noise(96, 48)
    second = torch.outer(unit(40, 3), hidden) + 0.05 * noise(40, 96)
    coupled = measure("layer_coupling", ProjectorContext(projector(first, second)))
    apart = measure("layer_coupling", ProjectorContext(projector(spike(96, 48), spike(40, 96, 5))))
    assert coupled.value > 0.19  # one of five directions
    assert coupled.detail == ("linear_1 → linear_2",)
    score = coupled.nulls[0].z(coupled.value)
    assert score is not None
    assert score > 5
    other = apart.nulls[0].z(apart.value)
    assert other is not None
    assert abs(other) < 4


def test_coupling_of_random_updates_is_ordinary() -> None:
    scores = []
    for seed in range(30):
        update = projector(noise(96, 48, seed), noise(40, 96, seed + 40))
        result = measure("layer_coupling", ProjectorContext(update))
        score = result.nulls[0].z(result.value)
        assert score is not None
        scores.append(score)
    drawn = torch.tensor(scores)
    assert abs(float(drawn.mean())) < 0.6
    assert 0.6 < float(drawn.std()) < 1.5


def test_of_three_layers_the_most_coupled_pair_is_named() -> None:
    hidden = random_orthonormal(64, 5, generator=torch.Generator())
    second = hidden @ random_orthonormal(64, 5, generator=torch.Generator().manual_seed(3)).T
    third = random_orthonormal(40, 5, generator=torch.Generator().manual_seed(4)) @ hidden.T
    update = projector(noise(64, 48), second / 5**0.5, third / 5**0.5)
    result = measure("layer_coupling", ProjectorContext(update))
    assert result.value > 0.99
    assert result.detail == ("linear_2 → linear_3",)


# --- could not tell -------------------------------------------------------------------------------


def test_what_cannot_be_told_is_skipped() -> None:
    zero = layer(draw(8, 6, seed=1), torch.zeros(8, 6))
    for name in ("base_overlap_left", "base_overlap_right", "intruder_dimensions"):
        with pytest.raises(Skip, match="update is zero"):
            getattr(subspace, name)(zero)
    with pytest.raises(Skip, match="one layer"):
        subspace.layer_coupling(ProjectorContext(projector(noise(40, 48))))
    half = projector(torch.zeros(64, 48), noise(40, 64))
    with pytest.raises(Skip, match="no two neighbouring"):
        subspace.layer_coupling(ProjectorContext(half))
    nan = replace(half, layers=(), nonfinite={"linear_1.weight": 1})
    with pytest.raises(Skip, match="NaN"):
        subspace.layer_coupling(ProjectorContext(nan))


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (700, 2), (17, 600)])
def test_any_shape_is_measured(shape: tuple[int, int]) -> None:
    found = layer(draw(*shape, seed=1), 0.1 * noise(*shape))
    for name in ("base_overlap_left", "base_overlap_right", "intruder_dimensions"):
        assert measure(name, found).value >= 0


def test_large_layers_take_the_bounded_path() -> None:
    base = noise(640, 600) * 600**0.5
    delta = 8 * spike(640, 600) + 0.01 * noise(640, 600, 4)
    result = measure("intruder_dimensions", layer(base, delta))
    assert result.value >= 1
    assert "≤" in result.detail[0]
    exact = (
        torch.linalg.svd(base.double())[0].T
        @ torch.linalg.svd((base + delta).double(), full_matrices=False)[0][:, :10]
    )
    assert result.value <= int((exact.abs().amax(0) < 0.5).sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_measures_what_the_cpu_measures() -> None:
    base, delta = draw(96, 64, seed=1), spike(96, 64) + 0.1 * noise(96, 64)
    cpu, cuda = layer(base, delta), layer(base.cuda(), delta.cuda())
    for name in ("base_overlap_left", "base_overlap_right", "intruder_dimensions"):
        assert measure(name, cuda).value == pytest.approx(measure(name, cpu).value, abs=1e-3)
