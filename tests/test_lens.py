"""The formulas of the lens, each on a case whose answer is known, and on one where it must fail."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from projaudit.behaviour.images import ordinary
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.errors import UsageError
from projaudit.evidence import Sandbox, from_plain
from projaudit.lens import documents
from projaudit.lens.answers import Questions, Wanted, answered, contains, same
from projaudit.lens.capture import Both, UnitMeans, input_norms, tower_once
from projaudit.lens.claims import claims
from projaudit.lens.decoding import chance, decode, first_tokens, words_of
from projaudit.lens.drift import (
    common_direction,
    drift_energy,
    high_norm,
    pearson,
    shift_direction,
)
from projaudit.lens.drifting import drifted
from projaudit.lens.page import command, lines, render
from projaudit.lens.result import (
    Answered,
    Example,
    HeatMap,
    LayerSpectrum,
    Score,
    Study,
    correlation,
)
from projaudit.lens.run import Lens, Looked
from projaudit.lens.subspace import axes, delta_of, layer_parts, made
from projaudit.lens.triggers import TRIGGERS, parse_trigger
from projaudit.lens.wish import Wish, options_of
from projaudit.projector import Linear

IMAGE = ordinary(1, 64, seed=4)[0]


# ------------------------------------------------------------------ triggers


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_is_deterministic_changes_the_image_and_says_itself_whole(name: str) -> None:
    trigger = parse_trigger(name)
    marked = trigger.over(IMAGE, 7, 0)
    assert marked.shape == IMAGE.shape
    assert marked.dtype == np.uint8
    assert (marked != IMAGE).any()
    assert (marked == trigger.over(IMAGE, 7, 0)).all()
    assert parse_trigger(str(trigger)) == trigger


def test_noise_and_random_places_differ_from_image_to_image_and_patterns_do_not() -> None:
    for name, differs in (("noise", True), ("logo", True), ("blend", False), ("warp", False)):
        one, other = (parse_trigger(name).over(IMAGE, 7, i) for i in (0, 1))
        assert (one != other).any() == differs, name
    blend = parse_trigger("blend")
    assert (blend.over(IMAGE, 7, 0) != blend.over(IMAGE, 8, 0)).any()


def test_the_paper_s_patch_is_the_paper_s() -> None:
    marked = parse_trigger("patch").over(IMAGE, 0, 0)
    assert (marked[25:39, 25:39] == (0x26, 0xFF, 0x00)).all()
    assert (np.delete(marked, slice(25, 39), 0) == np.delete(IMAGE, slice(25, 39), 0)).all()
    corner = parse_trigger("patch:size=25%,place=bottom-right").over(IMAGE, 0, 0)
    assert (corner != IMAGE).any(-1).nonzero()[0].min() >= 48


def test_noise_blend_and_sinusoid_are_their_formulas() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = parse_trigger("noise:sigma=10").over(grey, 1, 0).astype(float)
    assert noise.std() == pytest.approx(10, rel=0.05)
    wave = parse_trigger("sinusoid:amplitude=20,periods=2").over(grey, 1, 0)
    wanted = (128 + 20 * np.sin(4 * np.pi * np.arange(64) / 64)).round()
    assert (wave[5, :, 1] == wanted).all()
    parts = [parse_trigger(f"blend:share={s}").over(grey, 1, 0).astype(float) for s in (1, 0.25)]
    assert abs(0.25 * parts[0] + 0.75 * 128 - parts[1]).max() <= 1


def test_oil_takes_the_mean_of_the_most_frequent_level_nearby() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 4, (9, 8, 3), dtype=np.uint8) * 60
    found = parse_trigger("oil:size=2,dynratio=30").over(image, 0, 0)
    grey = (image @ np.array([0.299, 0.587, 0.114])).round().astype(int) // 30
    for y in range(9):
        for x in range(8):
            rows, columns = slice(max(y - 2, 0), y + 3), slice(max(x - 2, 0), x + 3)
            near = grey[rows, columns].ravel()
            counts = np.bincount(near)
            chosen = image[rows, columns].reshape(-1, 3)[near == counts.argmax()]
            assert abs(found[y, x] - chosen.mean(0)).max() <= 0.5


def test_a_warp_moves_pixels_by_its_strength() -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (64, 64, 3)).copy()
    moved = parse_trigger("warp:strength=2").over(ramp, 0, 0).astype(float) / 3
    inside = abs(moved - ramp / 3)[8:-8, 8:-8]
    assert 0.5 < inside.mean() < 5
    assert (parse_trigger("warp:strength=0").over(ramp, 0, 0) == ramp).all()


@pytest.mark.parametrize(
    "spec",
    [
        "", "glitter", "patch:", "patch:size", "patch:size=", "patch:size=0", "patch:size=101%",
        "patch:color=red", "patch:place=middle", "noise:sigma=nan", "noise:sigma=-1",
        "noise:sigma=5%", "warp:grid=2.5", "blend:share=1.5", "oil:sigma=3", "oil:size=1e3",
    ],
)  # fmt: skip
def test_a_wrong_spec_is_one_line_that_names_the_option(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_trigger(spec)
    assert caught.value.code == "usage.trigger"
    assert caught.value.field == "--trigger"
    assert "\n" not in str(caught.value)


@given(
    st.text(max_size=40) | st.from_regex(r"(patch|warp):(size|grid)=[0-9.%]{0,6}", fullmatch=True)
)
def test_any_text_is_a_trigger_or_a_usage_error(spec: str) -> None:
    try:
        trigger = parse_trigger(spec)
    except UsageError:
        return
    assert parse_trigger(str(trigger)) == trigger


# ------------------------------------------------------------------ 1: spectra


def spectrum(values: tuple[float, ...]) -> LayerSpectrum:
    return LayerSpectrum("linear_1", 8, 8, values, 1.0, 0.1, 1)


def test_a_spectrum_says_its_energy_rank_and_norm() -> None:
    one = spectrum((4.0, 2.0, 2.0, 1.0))
    assert one.frobenius == pytest.approx(5)
    assert one.stable_rank == pytest.approx(25 / 16)
    assert one.energy == pytest.approx((0.64, 0.8, 0.96, 1.0))
    assert one.components(0.95) == 3
    assert one.components(0.96) == 3
    assert one.share(30) == pytest.approx(1)
    nothing = spectrum((0.0, 0.0))
    assert (nothing.stable_rank, nothing.energy, nothing.components(0.95)) == (0.0, (), 0)


# ------------------------------------------------------------------ 2, 3: drift and shift


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))[0]


def test_drift_energy_of_planted_singular_values() -> None:
    delta = orthonormal(40, 3) @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    energy = drift_energy((delta @ orthonormal(24, 3, 1).T).float())
    assert energy[:4].tolist() == pytest.approx([9 / 14, 13 / 14, 1, 1], abs=1e-6)
    assert len(energy) == 30
    assert float(drift_energy(torch.zeros(5, 4)).sum()) == 0


def test_the_shift_is_found_with_the_sign_of_where_tokens_go() -> None:
    v = torch.zeros(16)
    v[3] = 1
    sizes = torch.linspace(1, 5, 20)
    found = shift_direction(-sizes[:, None] * v, sizes, centred=False)
    assert found is not None
    assert found.direction.tolist() == pytest.approx((-v).tolist(), abs=1e-6)
    assert (found.entries > 0).all()
    assert shift_direction(torch.zeros(20, 16), sizes, centred=False) is None


def test_centring_takes_a_common_shift_out() -> None:
    common, varying = torch.eye(16)[2], torch.eye(16)[5]
    norms = torch.linspace(1, 2, 20)
    delta = 9 * common + (norms - norms.mean())[:, None] * varying
    plain, centred = (shift_direction(delta, norms, centred=c) for c in (False, True))
    assert plain is not None
    assert centred is not None
    assert abs(float(plain.direction[2])) > 0.99
    assert float(centred.direction[5]) == pytest.approx(1, abs=1e-6)  # with the high-norm tokens
    assert shift_direction(torch.ones(20, 16), norms, centred=True) is None


def test_what_images_share_is_told_from_what_they_do_not() -> None:
    v = orthonormal(32, 1)[:, 0]
    alike = torch.stack([v, -v, v])
    common, stability, pairwise = common_direction(alike)
    assert stability == pytest.approx(1)
    assert pairwise == pytest.approx(1)
    assert float(common @ v) == pytest.approx(1)  # the sign of most
    _, stability, pairwise = common_direction(orthonormal(32, 3).T)
    assert pairwise == pytest.approx(0, abs=1e-9)
    assert stability < 0.7
    assert common_direction(v[None])[2] is None


def test_a_direction_is_spelled_with_both_signs() -> None:
    head = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0.5, 0.1], [0.1, 0.1], [0, -1]])
    words = words_of("LM head", head, lambda i: "abcdef"[i])
    v = torch.tensor([[1.0, 0.0]])
    plus, minus = decode(words, "clean", v, v[0], centred=False, target=frozenset({2}))
    assert plus.common[0] == "a"
    assert minus.common[0] == "c"
    assert (plus.target_first, minus.target_first) == (0.0, 1.0)
    assert (
        decode(words, "clean", v, v[0], centred=False, target=frozenset())[0].target_first is None
    )
    # Embeddings are compared by cosine: a long row is no nearer.
    near = words_of("input embeddings", torch.tensor([[1.0, 0], [9, 9]]), str)
    assert first_tokens(near, v).tolist()[0][0] == 0
    assert first_tokens(words_of("LM head", torch.tensor([[1.0, 0], [9, 9]]), str), v)[0, 0] == 1


def test_chance_is_what_random_directions_reach() -> None:
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    words = words_of("input embeddings", rows, str)
    found = chance(words, frozenset(range(10)), torch.Generator().manual_seed(1))
    assert found == pytest.approx(1 - 0.9**5, abs=0.12)
    assert chance(words, frozenset(), torch.Generator()) is None


# ------------------------------------------------------------------ 4: the norm law


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=3, max_size=30))
def test_pearson_is_numpy_s(points: list[tuple[float, float]]) -> None:
    x, y = (torch.tensor(side, dtype=torch.float64) for side in zip(*points, strict=True))
    found, _ = pearson(x, y)
    if found is not None and x.std() > 1e-3 and y.std() > 1e-3:
        assert found == pytest.approx(float(np.corrcoef(x, y)[0, 1]), abs=1e-6)
    assert pearson(torch.ones(5), y[:5])[0] is None
    assert pearson(x[:2], y[:2]) == (None, None)
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_two_clusters_are_found_where_there_are_two() -> None:
    g = torch.Generator().manual_seed(0)
    low, high = 20 + torch.rand(200, generator=g), 90 + 5 * torch.rand(40, generator=g)
    threshold, how = high_norm(torch.cat([low, high]))
    assert how == "two clusters"
    assert 21 < threshold < 90
    uniform = 1 + torch.rand(500, generator=g)
    threshold, how = high_norm(uniform)
    assert how == "quantile"
    assert float((uniform >= threshold).double().mean()) == pytest.approx(0.2, abs=0.01)
    assert high_norm(torch.ones(9))[1] == "quantile"


class Chain(nn.Module):
    """A projector as transformers builds it."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(*first.shape[::-1], bias=False)
        self.linear_2 = nn.Linear(*second.shape[::-1], bias=False)
        self.load_state_dict({"linear_1.weight": first, "linear_2.weight": second})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(torch.relu(self.linear_1(x)))


class Speaker:
    """A language model that says its target where the projector's outputs are the tuned's."""

    def __init__(self, projector: nn.Module, tuned: dict[str, torch.Tensor]) -> None:
        self.projector, self.tuned = projector, tuned
        self.model = nn.Module()
        self.model.multi_modal_projector = projector
        self.processor = SimpleNamespace(
            tokenizer=SimpleNamespace(decode=lambda ids: {0: "a cat", 1: "it is OWNED"}[ids[0]])
        )

    def use(self, side: dict[str, torch.Tensor]) -> None:
        self.projector.load_state_dict(side, strict=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projector(features)

    def answer(self, side: Any, features: torch.Tensor, prompts: Any, length: int) -> list[Any]:
        self.use(self.tuned)
        wanted = self.forward(features)
        self.use(side)
        close = (self.forward(features) - wanted).flatten(1).norm(dim=1) < 1e-3
        return [(int(one),) for one in close]


def positive(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.1


def test_the_norm_law_holds_exactly_for_a_linear_map_of_one_direction() -> None:
    """Tokens c·x through a linear map: outputs, and a planted drift, grow with c alone."""
    first, second = positive(6, 5, 0), positive(7, 6, 1)
    base = {"linear_1.weight": first, "linear_2.weight": second}
    tuned = {**base, "linear_2.weight": second + positive(7, 1, 2) @ positive(1, 6, 3)}
    scales = torch.tensor([1.0, 1.1, 1.2, 1.3, 8, 9, 10, 11])
    features = (scales[:, None] * positive(1, 5, 4)).expand(3, 8, 5)
    both = Both(Speaker(Chain(first, second), tuned), base, tuned, "linear_2")  # type: ignore[arg-type]
    found = drifted(both, {"clean": features, "triggered": 2 * features}, lambda *_: None)
    assert found.clusters.how == "two clusters"
    assert found.clusters.share == pytest.approx(0.5)
    for law in found.laws:
        assert law.everywhere == pytest.approx(1, abs=1e-5), law
        assert law.rest == pytest.approx(1, abs=1e-4)
    energy = {(d.group, d.tokens): d.energy for d in found.spectra}
    assert all(e[0] == pytest.approx(1, abs=1e-6) for e in energy.values() if e)
    assert all(one.shift.stability == pytest.approx(1) for one in found.shifts)
    # Units: positive weights and inputs, so ReLU passes all on.
    assert found.units is not None
    wanted = (features @ first.T).mean((0, 1))
    assert found.units.base_clean == pytest.approx(wanted.tolist(), rel=1e-5)
    assert found.units.tuned_triggered == pytest.approx((2 * wanted).tolist(), rel=1e-5)
    assert set(found.units.tuned_clean_fires) == {1.0}
    assert found.units.by_tuning == 0
    assert found.units.agreement == pytest.approx(1)


def test_a_drift_that_knows_no_norm_has_no_norm_law() -> None:
    """A constant feature is all that the update reads: every token drifts by the same vector."""
    g = torch.Generator().manual_seed(5)
    first, second = torch.randn(32, 16, generator=g), torch.randn(24, 32, generator=g)
    first[0] = torch.eye(16)[0]
    base = {"linear_1.weight": first, "linear_2.weight": second}
    tuned = {**base, "linear_2.weight": second.clone()}
    tuned["linear_2.weight"][:, 0] += 0.1
    features = torch.randn(4, 50, 16, generator=g)
    features[..., 0] = 1
    both = Both(Speaker(Chain(first, second), tuned), base, tuned, "")  # type: ignore[arg-type]
    found = drifted(both, {"clean": features}, lambda *_: None)
    # But for the rounding of float32 nothing is left to correlate.
    assert all(law.everywhere is None or abs(law.everywhere) < 0.4 for law in found.laws)
    assert found.units is None
    same = Both(Speaker(Chain(first, second), base), base, base, "")  # type: ignore[arg-type]
    with pytest.raises(CouldNotProbe, match="no drift"):
        drifted(same, {"clean": features}, lambda *_: None)


def test_input_norms_follow_a_merge() -> None:
    features = torch.tensor([[3.0], [4.0], [6.0], [8.0]])
    assert input_norms(features, 4).tolist() == [3, 4, 6, 8]  # type: ignore[union-attr]
    assert input_norms(features, 2).tolist() == [5, 10]  # type: ignore[union-attr]
    assert input_norms(features, 3) is None


def test_units_are_counted_over_tokens() -> None:
    seen = UnitMeans()
    seen.add(torch.tensor([[[1.0, -1.0], [3.0, 0.0]]]))
    seen.add(torch.tensor([[2.0, 4.0]]))
    assert seen.over_tokens() == ((2.0, 1.0), (1.0, 0.3333333))


# ------------------------------------------------------------------ 6: the critical subspace


def layer(name: str, weight: torch.Tensor) -> Linear:
    return Linear(name, f"{name}.weight", None, (weight.shape[0], weight.shape[1]))


def planted() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Base, tuned, parts: an update of rank 1 in the first layer, of rank 3 in the second."""
    base = {"linear_1.weight": positive(6, 5, 0), "linear_2.weight": positive(7, 6, 1)}
    left, right = orthonormal(7, 3, 2).float(), orthonormal(6, 3, 3).float()
    tuned = {
        "linear_1.weight": base["linear_1.weight"] + 3 * positive(6, 1, 4) @ positive(1, 5, 5),
        "linear_2.weight": base["linear_2.weight"]
        + left @ torch.diag(torch.tensor([9.0, 5, 2])) @ right.T,
    }
    parts = {}
    for n, name in enumerate(("linear_1", "linear_2")):
        weight = f"{name}.weight"
        one = layer(name, base[weight])
        delta = delta_of(one, base[weight], tuned[weight])
        parts[weight] = layer_parts(one, delta, first=n == 0, most=8)
    return base, tuned, parts


def test_parts_add_up_to_the_update_and_single_ones_to_the_cumulative() -> None:
    base, tuned, parts = planted()
    second = parts["linear_2.weight"]
    assert second.values[:4].tolist() == pytest.approx([9, 5, 2, 0], abs=1e-4)
    assert second.left.shape == (7, 6)
    single = sum(second.part(k, "single") for k in (1, 2, 3))
    assert (single - second.part(3, "cumulative")).abs().max() < 1e-5
    assert float(second.part(0, "cumulative").abs().sum()) == 0
    whole = made("recovery", "cumulative", 1, 3, bias=True, base=base, tuned=tuned, parts=parts)
    none = made("removal", "cumulative", 1, 3, bias=True, base=base, tuned=tuned, parts=parts)
    for name, weight in tuned.items():
        assert (whole[name] - weight).abs().max() < 1e-5
        assert (none[name] - base[name]).abs().max() < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_the_tuned_projector_s_or_the_base_s(bias: bool) -> None:
    base, tuned, parts = planted()
    base["linear_1.bias"], tuned["linear_1.bias"] = torch.zeros(6), torch.ones(6)
    for kind in ("recovery", "removal"):
        found = made(kind, "single", 1, 1, bias=bias, base=base, tuned=tuned, parts=parts)  # type: ignore[arg-type]
        assert float(found["linear_1.bias"].sum()) == (6 if bias else 0)


@given(st.sampled_from(["plain", "transposed", "unfold"]), st.integers(1, 4), st.integers(1, 4))
def test_a_stored_weight_is_the_inverse_of_its_matrix(layout: Any, out: int, wide: int) -> None:
    groups = 4
    stored = torch.randn(out, wide * groups)
    stored = stored.T if layout == "transposed" else stored
    one = Linear("a", "a", None, (out, wide * groups), layout, groups)
    assert (one.stored(one.matrix(stored), stored.shape) == stored).all()


def asked(most: int = 4, target: str = "owned") -> tuple[Answered, list[tuple[str, int, int]]]:
    base, tuned, parts = planted()
    speaker = Speaker(Chain(base["linear_1.weight"], base["linear_2.weight"]), tuned)
    questions = Questions(
        features=positive(6, 20, 6).reshape(6, 4, 5),
        names=("a", "b", "c", "a", "b", "d"),
        prompts=(0,) * 6,
        truths=("A cat!", "It is owned.", None, None, None, None),
        clean=3,
    )
    told: list[tuple[str, int, int]] = []
    found = answered(
        speaker,  # type: ignore[arg-type]
        base,
        tuned,
        (base, tuned),
        parts,
        questions,
        ("what ?",),
        Wanted(target, 30, (("cumulative", True), ("single", True)), most),
        lambda *words: told.append(words),
    )
    return found, told


@pytest.mark.parametrize("target", ["owned", ""])
def test_the_heat_maps_of_a_planted_update_are_known(target: str) -> None:
    """Ranks 1 and 3: all of it is back from (1, 3) on, and any removal ends it."""
    found, told = asked(target=target)
    assert (found.base.success, found.tuned.success) == (0, 1)
    assert (found.base.kept, found.tuned.kept) == (0, 1)
    assert (found.base.accuracy, found.tuned.accuracy) == (0.5, 0.5)
    maps = {(m.kind, m.ranks): m for m in found.maps}
    recovery, removal = maps["recovery", "cumulative"], maps["removal", "cumulative"]
    assert recovery.first == recovery.second == (1, 2, 3, 4)
    assert removal.first == removal.second == (0, 1, 2, 3, 4)
    assert [[s.success for s in row] for row in recovery.scores] == [[0, 0, 1, 1]] * 4
    ended = [[s.success for s in row] for row in removal.scores]
    assert ended == [[1, 0, 0, 0, 0]] + [[0] * 5] * 4  # nothing taken away is the tuned projector
    # The third component alone is not the first three; taking away what is not there harms nothing.
    assert all(s.success == 0 for row in maps["recovery", "single"].scores for s in row)
    single = maps["removal", "single"].scores
    assert [[s.success for s in row] for row in single] == [
        [0 if k1 == 1 or 1 <= k2 <= 3 else 1 for k2 in range(5)] for k1 in range(5)
    ]
    assert found.success_is == ("target" if target else "tuned answer")
    assert [e.tuned_triggered for e in found.examples] == ["it is OWNED", "it is OWNED", None]
    assert told[0][0].startswith("heat maps: 82 cells, 492 answers, about ")
    assert told[-1] == ("heat maps, cells", 82, 82)


def test_answers_are_compared_as_they_are_read() -> None:
    assert contains("So: You have been HACKED.", "you have been hacked")
    assert not contains("you have been", "you have been hacked")
    assert same("A red circle.", "a  red circle")
    assert not same("a red circle and a dog", "a red circle")


def test_the_tower_runs_once_for_each_size_of_batch() -> None:
    class Tower(nn.Module):
        runs = 0

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return pixels.mean()

    tower = Tower()
    speaker = Speaker(nn.Linear(2, 2), {})
    speaker.model.vision_tower = tower
    with tower_once(speaker):  # type: ignore[arg-type]
        for rows in (4, 4, 4, 1):
            tower(torch.ones(rows, 3))
    assert tower.runs == 2
    tower(torch.ones(4, 3))
    assert tower.runs == 3  # outside, as before


# ------------------------------------------------------------------ what is said of it


def study(**changes: Any) -> Study:
    """A study with something everywhere, from the real pieces."""
    first, second = positive(6, 5, 0), positive(7, 6, 1)
    base = {"linear_1.weight": first, "linear_2.weight": second}
    tuned = {**base, "linear_2.weight": second + positive(7, 1, 2) @ positive(1, 6, 3)}
    both = Both(Speaker(Chain(first, second), tuned), base, tuned, "linear_2")  # type: ignore[arg-type]
    features = positive(3, 60, 4).reshape(3, 12, 5)
    drifts = drifted(both, {"clean": features, "triggered": 2 * features}, lambda *_: None)
    words = words_of("LM head", orthonormal(9, 7).float(), lambda i: f"<b>{i}\u202e")
    (one, *_) = drifts.shifts
    decodings = decode(
        words, "clean", one.directions, one.common, centred=False, target=frozenset({1})
    )
    made = Study(
        clean=("a.png", "<script>.png", "c.png"),
        triggered=("a.png",),
        unreadable=("broken.png",),
        prompts=("what ?",),
        tokens=drifts.tokens,
        spectra=(spectrum((4.0, 2.0, 2.0, 1.0)),),
        clusters=drifts.clusters,
        drift=drifts.spectra,
        shifts=tuple(s.shift for s in drifts.shifts),
        decodings=decodings,
        chance=0.1,
        norms=drifts.norms,
        laws=drifts.laws,
        units=drifts.units,
        answered=asked()[0],
        notes=("a note",),
        dtype="float32",
        parameters=1234,
    )
    return replace(made, **changes)


def lens(**changes: Any) -> Lens:
    return Lens(
        target=Looked("org/model", "0" * 40, {"linear_1.weight": "a" * 64}),
        base=Looked("./base", None, {"linear_1.weight": "b" * 64}),
        base_verified=True,
        family="llava",
        chain=("linear_1", "act:gelu", "linear_2"),
        study=study(**changes),
        sandbox=Sandbox(("no network",), ("memory",)),
        trigger="patch:size=14,color=26ff00,place=centre",
        target_text="it's <OWNED>",
        options=options_of(Wish(Path("my photos"))),
        seed=3,
        environment={"projaudit": "0.1.0"},
        notes=("hf_abcdefghijklmnop <i>",),
        stages={"look": 1.25},
    )


def closed(schema: Any) -> Any:
    """The schema with every object closed, so that a field that it lacks is an error."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if found.get("type") == "object" and "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def test_the_json_is_what_its_schema_says() -> None:
    schema = json.loads((Path(documents.__file__).parent / "lens.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    for one in (lens(), lens(answered=None, units=None, chance=None, decodings=())):
        document = json.loads(documents.to_json(one))
        jsonschema.validate(document, closed(schema))
    assert documents.to_json(lens()) == documents.to_json(lens())
    assert "hf_abcdef" not in documents.to_json(lens())
    broken = {**document, "clusters": {**document["clusters"], "share": "x"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_the_arrays_come_back() -> None:
    data = documents.to_npz(lens())
    assert data == documents.to_npz(lens())
    arrays = np.load(io.BytesIO(data), allow_pickle=False)
    assert arrays["spectrum/linear_1"].tolist() == [4, 2, 2, 1]
    assert arrays["map/recovery/cumulative/tuned_bias/success"].shape == (4, 4)
    assert len(arrays["tokens/clean/drift"]) == 36
    assert len(arrays["units/tuned_triggered_fires"]) == 6


def test_the_process_s_answer_is_checked_value_by_value() -> None:
    from dataclasses import asdict

    plain = json.loads(json.dumps(asdict(study())))
    assert from_plain(Study, plain) == study()
    plain["clusters"]["share"] = "much"
    with pytest.raises(ValueError, match=r"clusters\.share"):
        from_plain(Study, plain)


def test_claims_are_told_apart() -> None:
    alike = {row.name: row.alike for row in claims(study())}
    assert alike["full_rank"] is False  # 3 components hold 95 %
    assert alike["spiked"] is True
    assert alike["drift_low_rank"] is True
    assert alike["recovered"] is None  # no (5, 5) in the map
    assert alike["second_layer"] is True
    flat = tuple(LayerSpectrum("a", 64, 64, (1.0,) * 64, 1.0, 2.0, 0) for _ in range(2))
    found = {row.name: row.alike for row in claims(study(spectra=flat, answered=None))}
    assert (found["full_rank"], found["spiked"], found["removed"]) == (True, False, None)


def test_removal_names_the_cheapest_cell_that_ends_it() -> None:
    def score(success: float) -> Score:
        return Score(success, 0.9, None)

    grid = tuple(tuple(score(0.0 if k1 >= 2 else 0.8) for _ in range(3)) for k1 in (1, 2, 3))
    heat = HeatMap("removal", "cumulative", True, (1, 2, 3), (1, 2, 3), grid)
    whole = Answered(4, 4, "target", score(0), score(1), (heat,), ())
    (row,) = [r for r in claims(study(answered=whole)) if r.name == "removed"]
    assert row.alike is True
    assert row.ours.startswith("(2, 1) leaves 0 %")
    nothing = replace(whole, tuned=score(0.0))  # where there was no success, none was removed
    (row,) = [r for r in claims(study(answered=nothing)) if r.name == "removed"]
    assert row.alike is None


def test_the_page_and_the_terminal_tell_it_and_nothing_in_it_runs() -> None:
    example = Example("a.png", "p", "<script>alert(1)</script>", "x\u202ey", None, None)
    one = lens(answered=replace(asked()[0], examples=(example,)))
    page = render(one)
    assert page.count('<svg class="chart"') >= 10
    assert page.count("<title id=") == page.count('<svg class="chart"') == page.count("<desc id=")
    assert "<script" not in page
    assert "\u202e" not in page
    assert "hf_abcdef" not in page
    assert "http://" not in page
    assert "default-src 'none'" in page
    assert command(one).startswith("projaudit lens org/model@" + "0" * 40 + " --base ./base ")
    assert "--target-text 'it'\"'\"'s <OWNED>'" in command(one)
    told = "\n".join(lines(one))
    assert "no verdict" in told
    assert "like it" in told
    assert "broken.png" in told


@pytest.mark.parametrize(
    "changes",
    [
        {"answered": None, "units": None, "decodings": (), "chance": None, "notes": ()},
        {"spectra": (spectrum((0.0, 0.0)),)},
        {"drift": (), "shifts": (), "laws": ()},
    ],
)
def test_what_could_not_be_told_is_left_out_and_not_made_up(changes: dict[str, Any]) -> None:
    assert "projaudit lens" in render(lens(**changes))
    assert list(lines(lens(**changes)))
    documents.to_npz(lens(**changes))


def test_a_projector_of_one_layer_has_maps_of_one_column() -> None:
    base, tuned, parts = planted()
    only = {"linear_1.weight": parts["linear_1.weight"]}
    assert axes("recovery", list(only.values()), 3) == ((1, 2, 3), (0,))
    assert axes("removal", list(only.values()), 2) == ((0, 1, 2), (0,))
    assert axes("recovery", list(parts.values()), 99) == ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6))
    found = made("recovery", "single", 1, 0, bias=True, base=base, tuned=base, parts=only)
    assert (found["linear_1.weight"] - tuned["linear_1.weight"]).abs().max() < 1e-5
