"""Probes through the whole projector: closed forms, their nulls' calibration, planted changes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from projaudit.analyses import probes, responses
from projaudit.analyses.context import ProjectorContext
from projaudit.analyses.nulls import gaussian_values, null_of, random_action, real_change
from projaudit.analyses.responses import (
    AIMED_NORMS,
    BUDGET,
    NORMS,
    ProbeBudget,
    run_probes,
    typical_norm,
)
from projaudit.chain import forward
from projaudit.findings import Measurement
from projaudit.linalg import random_orthonormal
from projaudit.metrics import METRICS, Skip, Value
from projaudit.update import LayerUpdate, ProjectorUpdate, VectorUpdate

NAMES = [name for name, metric in METRICS.items() if metric.function.__module__ == probes.__name__]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(size: int, seed: int) -> Tensor:
    vector = draw(size, seed=seed)
    return vector / vector.norm()


def spike(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A rank-1 matrix of norm 1."""
    return torch.outer(unit(rows, 100 + seed), unit(columns, 200 + seed))


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A Gaussian matrix of norm 1."""
    matrix = draw(rows, columns, seed=300 + seed)
    return matrix / matrix.norm()


def projector(
    *deltas: Tensor,
    activation: str = "gelu",
    bias: Tensor | float | None = 0.05,
    bias_delta: Tensor | None = None,
    norm_first: bool = False,
    relative: float = 0.05,
    seed: int = 0,
    device: str = "cpu",
) -> ProjectorUpdate:
    """An update by `relative · ‖W0‖F · delta` per layer, and by `bias_delta` in the last bias."""
    layers, chain = [], []
    for n, delta in enumerate(deltas):
        rows, columns = delta.shape
        before = draw(rows, columns, seed=7 * n + seed) / columns**0.5
        after = before + relative * before.norm() * delta
        bias0 = None if bias is None else bias * draw(rows, seed=50 + n + seed)
        last = n == len(deltas) - 1
        bias1 = bias0
        if last and bias_delta is not None:
            bias1 = bias_delta if bias0 is None else bias0 + bias_delta
        role = f"linear_{n + 1}"
        chain += [role] if last else [role, f"act:{activation}"]
        on = [None if t is None else t.to(device) for t in (before, after, bias0, bias1)]
        layers.append(
            LayerUpdate(
                role=role,
                subject=f"projector/{role}",
                before=on[0],
                after=on[1],
                before_bias=on[2],
                after_bias=on[3],
                changed_fraction=1.0,
                rounding_floor=0.0,
                rank=32,
                generator=torch.Generator().manual_seed(1),
            )
        )
    width = deltas[0].shape[1]
    vectors: tuple[VectorUpdate, ...] = ()
    if norm_first:  # its affine part is folded into the first layer
        vectors = (VectorUpdate("norm.weight", "projector/norm.weight", *[torch.ones(width)] * 2),)
        chain = ["norm:norm", *chain]
    return ProjectorUpdate(
        subject="projector",
        layers=tuple(layers),
        vectors=vectors,
        chain=tuple(chain),
        base_chain=tuple(chain),
        nonfinite={},
        generator=torch.Generator().manual_seed(2 + seed),
        in_features=width,
    )


def measured(update: ProjectorUpdate) -> dict[str, Value | str]:
    """Metric -> its value, or the reason why there is none."""
    ctx = ProjectorContext(update)
    found: dict[str, Value | str] = {}
    for name in NAMES:
        try:
            result = METRICS[name].function(ctx)
        except Skip as reason:
            found[name] = str(reason)
            continue
        assert isinstance(result, Value)
        assert math.isfinite(result.value)
        assert all(math.isfinite(null.mean) and math.isfinite(null.sd) for null in result.nulls)
        found[name] = result
    return found


def value(found: dict[str, Value | str], name: str) -> float:
    result = found[name]
    assert isinstance(result, Value), f"{name}: {result}"
    return result.value


def z(found: dict[str, Value | str], name: str, kind: str) -> float:
    result = found[name]
    assert isinstance(result, Value), f"{name}: {result}"
    null = next(null for null in result.nulls if null.kind == kind)
    score = null.z(result.value)
    assert score is not None
    return score


# --- closed forms ---------------------------------------------------------------------------------


def test_inputs_of_typical_norm_give_pre_activations_of_rms_one() -> None:
    update = projector(noise(96, 64), noise(48, 96))
    x = draw(2000, 64, seed=5)
    x *= typical_norm(update) / x.norm(dim=1, keepdim=True)
    rms = (x @ update.layers[0].before.T).square().mean().sqrt()
    assert float(rms) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("activation", ["gelu", "relu", "quick_gelu"])
@pytest.mark.parametrize(
    "shapes", [[(40, 48)], [(64, 48), (40, 64)], [(64, 48), (64, 64), (40, 64)]]
)
@pytest.mark.parametrize("bias", [None, 0.05])
def test_the_shift_is_what_the_two_projectors_differ_by(
    activation: str, shapes: list[tuple[int, int]], bias: float | None
) -> None:
    deltas = [noise(*shape, seed=n) for n, shape in enumerate(shapes)]
    update = projector(
        *deltas, activation=activation, bias=bias, bias_delta=0.01 * draw(40, seed=9)
    )
    inputs = typical_norm(update) * draw(6, 48, seed=2) / 48**0.5
    states = responses._states(update, inputs)
    shift = responses._shift(update, real_change(update), states)
    base = forward(update.chain, update.weights("before"), inputs)
    tuned = forward(update.chain, update.weights("after"), inputs)
    assert torch.equal(states[-1], base)
    assert float((shift - (tuned - base)).norm() / shift.norm()) < 1e-4


def test_responses_are_those_of_the_named_inputs() -> None:
    update = projector(noise(64, 48), noise(40, 64), bias_delta=0.01 * draw(40, seed=9))
    found = run_probes(update)
    response = found.update.groups["singular"]
    assert response.names == ("+v1", "-v1", "+v2", "-v2")
    x = found.typical * update.layers[0].spectrum.right[:, :2].T.repeat_interleave(2, 0)
    x[1::2] *= -1
    x = torch.cat([norm * x for norm in AIMED_NORMS])
    base = forward(update.chain, update.weights("before"), x)
    shift = forward(update.chain, update.weights("after"), x) - base
    assert torch.allclose(response.gram.float(), shift @ shift.T, rtol=1e-3, atol=1e-4)
    assert torch.allclose(response.size.float().flatten(), shift.norm(dim=1), rtol=1e-4)
    assert torch.allclose(response.base.float().flatten(), base.norm(dim=1), rtol=1e-5)


def test_a_linear_projector_shifts_in_proportion_to_its_input() -> None:
    found = measured(projector(noise(40, 48), bias=None))
    assert value(found, "shift_slope") == pytest.approx(1, abs=1e-5)
    assert value(found, "shift_rotation") == pytest.approx(0, abs=1e-5)
    assert value(found, "shift_magnitude") == pytest.approx(
        value(found, "shift_magnitude_high"), rel=1e-5
    )


def test_a_bias_alone_moves_every_input_alike() -> None:  # K6
    zero = torch.zeros(64, 48), torch.zeros(40, 64)
    found = measured(projector(*zero, bias_delta=0.1 * draw(40, seed=3)))
    assert value(found, "shift_slope") == 0
    assert value(found, "shift_concentration") == 1
    assert value(found, "shift_energy_top1") == 1
    assert value(found, "shift_rotation") == 0
    assert value(found, "shift_magnitude") > 0.01
    assert "same for every input" in str(found["shift_slope_r2"])
    assert "no directions" in str(found["singular_shift_magnitude"])
    for name in ("shift_concentration", "shift_slope", "shift_rotation"):
        result = found[name]  # a random bias does the same: nothing varies, so no z-score
        assert isinstance(result, Value)
        assert [null.z(result.value) for null in result.nulls] == [None, None]


def test_a_projector_without_change_has_no_shift() -> None:
    found = measured(projector(torch.zeros(64, 48), torch.zeros(40, 64)))
    assert value(found, "shift_magnitude") == 0
    for name in ("shift_slope", "shift_concentration", "shift_energy_top1", "shift_rotation"):
        assert "does not move" in str(found[name])


def test_behind_a_norm_the_input_norm_has_no_effect() -> None:
    found = measured(projector(noise(64, 48), noise(40, 64), norm_first=True))
    assert value(found, "shift_magnitude") > 0
    assert value(found, "singular_shift_magnitude") > 0
    for name in ("shift_slope", "shift_magnitude_high", "shift_rotation"):
        assert "normalises" in str(found[name])


# --- nulls ----------------------------------------------------------------------------------------


def test_a_random_action_is_a_dense_draw_in_distribution() -> None:
    m, n, k, inputs = 24, 32, 3, 6
    generator = torch.Generator().manual_seed(0)
    left = random_orthonormal(m, k, generator=generator)
    right = random_orthonormal(n, k, generator=generator)
    values = torch.tensor([3.0, 2.0, 1.0])
    x = draw(inputs, n, seed=4)
    x[3] = 5 * x[2]  # parallel inputs, as a grid of norms has them
    p, q = torch.eye(m) - left @ left.T, torch.eye(n) - right @ right.T
    lead = left * values @ right.T

    def dense() -> Tensor:
        bulk = p @ torch.randn(m, n, generator=generator) @ q
        return x @ (lead + 0.5 * bulk).T

    def sampled() -> Tensor:
        return random_action(left, values, right, 0.5, None, x, generator=generator)

    def moments(source: Any) -> tuple[Tensor, Tensor]:
        flat = torch.stack([source().flatten() for _ in range(4000)]).double()
        return flat.mean(0), torch.cov(flat.T)

    (mean, covariance), (other_mean, other) = moments(dense), moments(sampled)
    spread = covariance.diagonal().mean().sqrt()
    assert float((mean - other_mean).abs().max() / spread) < 0.5
    size = covariance.diagonal().max()
    assert float((covariance - other).abs().max() / size) < 0.15  # 5 σ of 4,000 draws
    once = sampled()
    assert torch.allclose(once[3], 5 * once[2], rtol=1e-3, atol=1e-3)


def test_a_random_action_has_the_singular_vectors_that_it_was_given() -> None:
    generator = torch.Generator().manual_seed(0)
    left = random_orthonormal(24, 3, generator=generator)
    right = random_orthonormal(32, 3, generator=generator)
    values = torch.tensor([3.0, 2.0, 1.0])
    moved = random_action(left, values, right, 0.5, None, right.T, generator=generator)
    assert torch.allclose(moved, (left * values).T, atol=1e-4)


@pytest.mark.parametrize(("m", "n"), [(256, 64), (64, 256), (200, 200), (16, 8), (5, 1)])
def test_leading_values_of_a_gaussian_follow_marchenko_pastur(m: int, n: int) -> None:
    drawn = torch.stack([torch.linalg.svdvals(noise(m, n, seed=s))[:5] for s in range(20)]).mean(0)
    expected = gaussian_values(m, n, 1.0, 5)
    assert len(expected) == min(5, m, n)
    assert torch.allclose(expected, drawn.double(), rtol=0.06 if min(m, n) > 20 else 0.2)


def test_random_updates_have_ordinary_z_scores() -> None:
    scores: dict[str, list[float]] = {name: [] for name in NAMES}
    for seed in range(24):
        update = projector(noise(96, 64, seed), noise(48, 96, 50 + seed), seed=1000 * seed)
        found = measured(update)
        for name in NAMES:
            if name == "shift_slope_r2":
                continue  # skewed: bounded by 1
            scores[name].append(z(found, name, "equal_norm"))
    for name, drawn in scores.items():
        if drawn:
            # t with 7 degrees of freedom: median |z| 0.75, above 2.5 in 5 %
            assert 0.3 < torch.tensor(drawn).abs().median() < 1.5, name
            assert sum(abs(score) > 3.7 for score in drawn) <= 3, name
    every = torch.tensor([score for drawn in scores.values() for score in drawn])
    assert 0.5 < every.abs().median() < 1.0
    assert float((every.abs() > 2.5).double().mean()) < 0.15


def test_nulls_of_a_random_update_are_alike() -> None:
    """A Gaussian update has its own leading values: both nulls then describe it."""
    found = measured(projector(noise(96, 64), noise(48, 96)))
    for name in ("shift_magnitude", "shift_concentration", "shift_energy_top5"):
        result = found[name]
        assert isinstance(result, Value)
        norm, spectrum = result.nulls
        assert (norm.kind, spectrum.kind) == ("equal_norm", "equal_spectrum")
        assert norm.mean == pytest.approx(spectrum.mean, rel=0.1)
        assert norm.draws == spectrum.draws == BUDGET.draws


def test_a_null_that_does_not_vary_gives_no_score() -> None:
    assert null_of("equal_norm", [1.0]) is None
    still = null_of("equal_norm", [1.0, 1.0 + 1e-9])
    assert still is not None
    assert still.z(2.0) is None
    assert null_of("equal_norm", [1.0, float("inf")]) is None


# --- planted changes ------------------------------------------------------------------------------


def test_a_rank_one_change_stands_out_and_a_random_one_of_equal_norm_does_not() -> None:
    planted = measured(projector(spike(96, 64), spike(48, 96), relative=0.1))
    random = measured(projector(noise(96, 64), noise(48, 96), relative=0.1))
    for name in (
        "shift_energy_top1",
        "shift_energy_top2",
        "shift_energy_top5",
        "singular_shift_magnitude",
        "singular_shift_magnitude_high",
        "subspace_shift_magnitude",
    ):
        assert z(planted, name, "equal_norm") > 6, name
        assert abs(z(random, name, "equal_norm")) < 5, name


def test_one_output_for_all_inputs_shows_as_concentration() -> None:
    """ΔW2 reads the mean activation, as a backdoor of constant payload does."""
    update = projector(torch.zeros(96, 64), torch.outer(unit(48, 1), torch.ones(96) / 96**0.5))
    found = measured(update)
    assert value(found, "shift_concentration") > 0.99
    assert z(found, "shift_concentration", "equal_norm") > 6
    assert value(found, "shift_rotation") < 1e-3
    assert value(found, "shift_energy_top1") > 0.999


def test_many_inputs_read_and_one_output_written_shows_in_the_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = random_orthonormal(96, 5, generator=generator)
    read = hidden @ random_orthonormal(64, 5, generator=generator).T / 5**0.5
    one = torch.outer(unit(48, 1), hidden.sum(1)) / 5**0.5
    own = random_orthonormal(48, 5, generator=generator) @ hidden.T / 5**0.5
    joined = measured(projector(read, one, relative=0.5))
    apart = measured(projector(read, own, relative=0.5))
    name = "subspace_shift_energy_top1"
    assert value(joined, name) > value(apart, name) + 0.1
    assert z(joined, name, "equal_spectrum") > 3
    assert abs(z(apart, name, "equal_spectrum")) < 3


@pytest.mark.parametrize("k", [1, 4, 16])
def test_a_change_split_into_directions_is_still_seen(k: int) -> None:  # K5
    generator = torch.Generator().manual_seed(k)
    left = random_orthonormal(256, k, generator=generator)
    delta = left @ random_orthonormal(192, k, generator=generator).T / k**0.5
    found = measured(projector(delta, torch.zeros(48, 256), relative=0.1))
    assert z(found, "subspace_shift_magnitude", "equal_norm") > 4
    assert z(found, "singular_shift_magnitude", "equal_norm") > 4


def test_a_trigger_direction_outside_the_isotropic_probes_is_found() -> None:  # K12
    found = measured(projector(spike(96, 256), torch.zeros(48, 96), relative=0.05))
    assert value(found, "singular_shift_magnitude") > 5 * value(found, "shift_magnitude")
    result = found["singular_shift_magnitude"]
    assert isinstance(result, Value)
    assert result.detail[0] in {"+v1", "-v1"}


# --- could not tell -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chain": (), "base_chain": ()}, "forward path is not known"),
        ({"chain": ("linear_1", "act:relu", "linear_2")}, "different functions"),
        (
            {
                "chain": ("linear_1", "act:mish2", "linear_2"),
                "base_chain": ("linear_1", "act:mish2", "linear_2"),
            },
            "mish2 is not known",
        ),
        ({"nonfinite": {"linear_1.weight": 3}, "layers": ()}, "NaN or Inf"),
        (
            {
                "chain": ("norm:norm", "linear_1", "act:gelu", "linear_2"),
                "base_chain": ("norm:norm", "linear_1", "act:gelu", "linear_2"),
            },
            "norm is in only one",
        ),
    ],
)
def test_where_the_function_is_not_known_every_probe_says_so(
    changes: dict[str, Any], reason: str
) -> None:
    update = replace(projector(noise(64, 48), noise(40, 64)), **changes)
    found = measured(update)
    assert all(reason in str(result) for result in found.values())
    assert probes.series(ProjectorContext(update)) == ()


@pytest.mark.parametrize("place", [0, 1])
def test_overflow_is_said_and_not_measured(place: int) -> None:
    update = projector(noise(64, 48), noise(40, 64), activation="linear")
    layers = list(update.layers)
    layers[place] = replace(layers[place], after=layers[place].after * 3e38)
    found = measured(replace(update, layers=tuple(layers)))
    for name in ("shift_magnitude_high", "singular_shift_magnitude_high", "shift_slope"):
        assert "overflow" in str(found[name]), name
    assert "overflow" in str(found["shift_rotation"])


# --- invariances ----------------------------------------------------------------------------------


def test_equal_seeds_give_equal_numbers_and_others_do_not() -> None:
    def run(seed: int) -> dict[str, Value | str]:
        update = projector(noise(64, 48), noise(40, 64))
        return measured(replace(update, generator=torch.Generator().manual_seed(seed)))

    assert run(5) == run(5)
    assert run(5) != run(6)


@settings(max_examples=15, deadline=None)
@given(st.floats(-8, 8), st.integers(0, 1000))
def test_a_common_scale_of_the_output_changes_no_ratio(exponent: float, seed: int) -> None:
    budget = ProbeBudget(directions=4, singular=1, subspace=2, draws=2)
    update = projector(noise(32, 24, seed), spike(20, 32, seed), bias=0.05)

    def scaled(factor: float) -> Value:
        first, last = update.layers
        fields = ("before", "after", "before_bias", "after_bias")
        last = replace(last, **{name: getattr(last, name) * factor for name in fields})
        generator = torch.Generator().manual_seed(seed)
        ctx = ProjectorContext(replace(update, layers=(first, last), generator=generator))
        vars(ctx)["probes"] = run_probes(ctx.update, budget)
        found = [METRICS[name].function(ctx) for name in ("shift_magnitude", "shift_energy_top1")]
        assert all(isinstance(result, Value) for result in found)
        return found

    for one, other in zip(scaled(1.0), scaled(2.0**exponent), strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=2e-6)


def test_storage_rounding_hardly_moves_the_probes() -> None:
    update = projector(noise(96, 64), spike(48, 96), relative=0.1)
    rounded = tuple(
        replace(layer, before=layer.before.bfloat16().float(), after=layer.after.bfloat16().float())
        for layer in update.layers
    )
    exact = measured(projector(noise(96, 64), spike(48, 96), relative=0.1))
    coarse = measured(replace(update, layers=rounded))
    for name in ("shift_magnitude", "shift_slope", "shift_concentration", "shift_energy_top1"):
        assert value(coarse, name) == pytest.approx(value(exact, name), rel=0.03), name


def test_fractions_are_fractions() -> None:
    found = measured(projector(noise(64, 48), spike(40, 64)))
    tops = [value(found, f"shift_energy_top{k}") for k in (1, 2, 5)]
    assert 0 < tops[0] < tops[1] < tops[2] <= 1
    assert 0 <= value(found, "shift_concentration") <= 1
    assert 0 <= value(found, "subspace_shift_energy_top1") <= 1
    assert 0 <= value(found, "shift_slope_r2") <= 1


def test_tiny_and_narrow_layers_are_measured() -> None:
    found = measured(projector(noise(3, 2), noise(2, 3)))
    assert value(found, "shift_magnitude") > 0
    found = measured(projector(noise(1, 1), bias=None))
    assert value(found, "shift_slope") == pytest.approx(1, abs=1e-5)


def test_the_curves_are_those_of_the_metric() -> None:
    ctx = ProjectorContext(projector(noise(64, 48), noise(40, 64)))
    update, norm, spectrum = probes.series(ctx)
    assert [s.label for s in (update, norm, spectrum)] == [
        "update",
        "null: equal norm",
        "null: equal spectrum",
    ]
    assert update.x == NORMS
    assert update.subject == "projector"
    magnitude = probes.shift_magnitude(ctx)
    assert isinstance(magnitude, Value)
    assert update.y[NORMS.index(1.0)] == pytest.approx(magnitude.value)
    assert norm.y[NORMS.index(1.0)] == pytest.approx(magnitude.nulls[0].mean)
    assert Measurement("shift_magnitude", "projector", magnitude.value).nulls == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_measures_what_the_cpu_measures() -> None:
    cpu = measured(projector(noise(96, 64), spike(48, 96)))
    cuda = measured(projector(noise(96, 64), spike(48, 96), device="cuda"))
    for name in NAMES:
        assert value(cuda, name) == pytest.approx(value(cpu, name), rel=1e-3, abs=1e-4), name
