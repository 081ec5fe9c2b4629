"""The update: exact pairs, honest rounding, and reparametrisations undone only where exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, P, Tensors, llava, tuned
from torch import Tensor

from projaudit.align import hidden_scale
from projaudit.chain import forward
from projaudit.errors import BaseError, UnsupportedError
from projaudit.locating import locate
from projaudit.pair import pair
from projaudit.rounding import rounding
from projaudit.update import ProjectorUpdate

W1, W2 = f"{P}linear_1.weight", f"{P}linear_2.weight"
B1, B2 = f"{P}linear_1.bias", f"{P}linear_2.bias"


def paired(base: Tensors, target: Tensors, config: dict[str, object] | None = None, **kw: object):
    def found(tensors: Tensors):
        (projector,) = locate({n: tuple(t.shape) for n, t in tensors.items()}, config or CONFIG)
        return projector

    return pair(
        found(target),
        found(base),
        target,
        base,
        subject="projector",
        device=torch.device("cpu"),
        rank=32,
        generator=torch.Generator().manual_seed(0),
        **kw,
    )


def delta(update: ProjectorUpdate, role: str) -> torch.Tensor:
    return next(layer for layer in update.layers if layer.role == role).delta


def permuted(tensors: Tensors, order: torch.Tensor) -> Tensors:
    return tensors | {
        W1: tensors[W1][order],
        B1: tensors[B1][order],
        W2: tensors[W2][:, order],
    }


def test_an_update_is_the_difference():
    base = llava()
    target = tuned(base)
    update = paired(base, target)
    assert torch.equal(delta(update, "linear_1"), target[W1] - base[W1])
    assert torch.equal(delta(update, "linear_2"), target[W2] - base[W2])
    assert not update.unchanged
    assert [layer.changed_fraction for layer in update.layers] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("old", "new"),
    list(
        itertools.product(
            [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn],
            repeat=2,
        )
    ),
)
def test_storing_in_another_dtype_is_no_change(old: torch.dtype, new: torch.dtype):
    """Every floating dtype on either side: rounding is not a change, and the floor predicts it."""
    full = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)) * 0.2
    before = full.to(old)
    after = before.float().to(new) if old != torch.float64 else before.to(torch.float32).to(new)
    changed, floor, *_ = rounding(before, after)
    assert changed == 0.0
    measured = float((after.double() - before.double()).norm() / before.double().norm())
    assert measured <= 2 * floor


def test_one_ulp_is_a_change():
    before = torch.full((8, 8), 0.75, dtype=torch.bfloat16)
    after = before.clone()
    after[2, 3] = torch.nextafter(after[2, 3], torch.tensor(2.0, dtype=torch.bfloat16))
    assert rounding(before, after)[0] == 1 / 64


def test_bfloat16_floor_is_what_rounding_gives():
    """threats K10: about 0.17 % for a float32 matrix stored as bfloat16."""
    before = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    after = before.to(torch.bfloat16)
    floor = rounding(before, after).floor
    measured = float((after.float() - before).norm() / before.norm())
    assert floor == pytest.approx(measured, rel=0.05)
    assert 0.001 < floor < 0.002


def test_unchanged_looks_at_biases_too():
    base = llava()
    assert paired(base, dict(base)).unchanged
    assert paired(base, {n: t.to(torch.bfloat16) for n, t in base.items()}).unchanged
    moved = dict(base) | {B2: base[B2] + 0.5}
    assert not paired(base, moved).unchanged


@given(seed=st.integers(0, 2**31), moved=st.integers(2, 64))
@settings(max_examples=25, deadline=None)
def test_any_permutation_is_recovered(seed: int, moved: int):
    """threats K1: permuting hidden units hides an update; undone, the update is as it was."""
    base = llava()
    target = tuned(base, 0.1)
    g = torch.Generator().manual_seed(seed)
    which = torch.randperm(64, generator=g)[:moved]
    order = torch.arange(64)
    order[which] = which[torch.roll(torch.arange(moved), 1)]
    update = paired(base, permuted(target, order))
    assert torch.equal(delta(update, "linear_1"), target[W1] - base[W1])
    assert torch.equal(delta(update, "linear_2"), target[W2] - base[W2])
    assert update.layers[0].permuted_units == moved


def test_an_honest_update_is_not_permuted():
    base = llava()
    for size in (0.02, 0.3, 1.0, 3.0):
        update = paired(base, tuned(base, size))
        assert [layer.permuted_units for layer in update.layers] == [0, 0]


@pytest.mark.parametrize("lacking", ["base", "target"])
def test_units_are_matched_where_one_side_has_no_bias(lacking: str):
    """A bias that is missing is one of zeros."""
    base = llava()
    base = base | {B1: 0.01 * base[B1]}
    order = torch.randperm(64, generator=torch.Generator().manual_seed(9))
    target = permuted(tuned(base, 0.05), order)
    sides = {"base": base, "target": target}
    sides[lacking] = {name: tensor for name, tensor in sides[lacking].items() if name != B1}
    update = paired(sides["base"], sides["target"])
    assert update.layers[0].permuted_units == int((order != torch.arange(64)).sum())
    assert [layer.permuted_units for layer in paired(sides["base"], tuned(base, 3.0)).layers] == [
        0,
        0,
    ]  # the control: what differs in size is not moved


def test_alignment_leaves_the_tuned_function_alone():
    base = llava()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(9))
    target = permuted(tuned(base, 0.05), order)
    update = paired(base, target)
    x = torch.randn(10, 48, generator=torch.Generator().manual_seed(2))
    stored = {n.removeprefix(P): t for n, t in target.items() if n.startswith(P)}
    assert torch.allclose(
        forward(update.chain, update.weights("after"), x),
        forward(update.chain, stored, x),
        atol=1e-5,
    )


def test_relu_scaling_is_undone_and_gelu_scaling_is_a_change():
    """threats K3: s·relu(z/s) is the same function, s·gelu(z/s) is not."""
    base = llava()
    target = tuned(base, 0.01)
    scale = torch.linspace(0.5, 2.0, 64)
    scaled = target | {
        W1: target[W1] * scale[:, None],
        B1: target[B1] * scale,
        W2: target[W2] / scale,
    }
    relu = CONFIG | {"projector_hidden_act": "relu"}
    undone = paired(base, scaled, relu)
    assert undone.layers[0].rescaled_units > 50
    assert float(delta(undone, "linear_1").norm()) < 0.05 * float(base[W1].norm())
    kept = paired(base, scaled)
    assert kept.layers[0].rescaled_units == 0
    assert torch.equal(delta(kept, "linear_1"), scaled[W1] - base[W1])


@pytest.mark.parametrize("size", [0.1, 0.4, 0.8])
def test_norms_that_training_moved_are_no_rescaling_and_a_rescaling_of_them_is(size: float):
    """Among thousands of units some grow in one layer and shrink in the next by chance."""
    random = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    first, second, bias = drawn(4000, 24), drawn(24, 4000), drawn(4000)
    lengths = (1 + 0.2 * size * drawn(4000)).clamp_min(0.5)
    tuned = (first + size * drawn(4000, 24)) * lengths[:, None]
    biased = (bias + size * drawn(4000)) * lengths
    after = (second + size * drawn(24, 4000)) * (1 + 0.2 * size * drawn(4000)).clamp_min(0.5)
    assert hidden_scale(first, tuned, bias, biased, second, after) is None
    factor = torch.ones(4000, dtype=torch.float64)
    factor[:50] = 6.0
    scaled = hidden_scale(
        first, tuned * factor[:, None], bias, biased * factor, second, after / factor
    )
    assert scaled is not None
    assert set((scaled != 1).nonzero()[:, 0].tolist()) <= set(range(50))
    assert int((scaled != 1).sum()) >= 25


def test_norm_gamma_absorbs_column_scaling():
    """threats K3 at a norm: gamma/c and c·W are one function, so they are one update."""
    base = llava()
    base |= {
        f"{P}projector_layernorm.weight": torch.ones(48),
        f"{P}projector_layernorm.bias": torch.zeros(48),
    }
    config = CONFIG | {"architectures": ["VipLlavaForConditionalGeneration"]}
    scale = torch.linspace(0.5, 2.0, 48)
    gamma = f"{P}projector_layernorm.weight"
    target = base | {gamma: base[gamma] / scale, W1: base[W1] * scale}
    update = paired(base, target, config)
    assert update.chain[0] == "norm:projector_layernorm"
    assert float(delta(update, "linear_1").norm()) < 1e-5
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(4))
    stored = {n.removeprefix(P): t for n, t in target.items() if n.startswith(P)}
    assert torch.allclose(
        forward(update.chain, update.weights("after"), x),
        forward(update.chain, stored, x),
        atol=1e-5,
    )


def rotated(tensors: Tensors, rotation: torch.Tensor, *, embeddings: bool) -> Tensors:
    embed = "language_model.model.embed_tokens.weight"
    turned = tensors | {W2: rotation @ tensors[W2], B2: rotation @ tensors[B2]}
    return turned | ({embed: tensors[embed] @ rotation.T} if embeddings else {})


@pytest.mark.parametrize("embeddings", [True, False])
def test_rotation_counts_only_if_the_language_model_took_part(embeddings: bool):
    """threats K2: undone where the embeddings were rotated too; otherwise it is a change."""
    base = llava()
    target = tuned(base, 0.02)
    g = torch.Generator().manual_seed(8)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=g)).Q
    turned = rotated(target, rotation, embeddings=embeddings)
    embed = "language_model.model.embed_tokens.weight"
    update = paired(base, turned, embedding_rows=lambda: (base[embed], turned[embed]))
    last = update.layers[-1]
    assert last.rotated is embeddings
    size = float(last.delta.norm() / base[W2].norm())
    assert size < 0.1 if embeddings else size > 1.0


def test_shapes_that_differ_are_not_compared():
    base = llava()
    with pytest.raises(UnsupportedError, match="has shape") as raised:
        paired(base, llava(h=80))
    assert (raised.value.code, raised.value.exit_code) == ("unsupported.shape", 3)


def test_non_finite_weights_stop_the_measuring():
    base = llava()
    target = tuned(base)
    target[W1][3, 5] = float("nan")
    target[B2][0] = float("inf")
    update = paired(base, target)
    assert update.nonfinite == {"linear_1.weight": 1, "linear_2.bias": 1}
    assert update.layers == ()
    with pytest.raises(BaseError, match="NaN or Inf") as raised:
        paired(target, base)
    assert (raised.value.code, raised.value.exit_code) == ("base.non-finite", 3)


def test_a_zero_base_is_no_base():
    base = llava()
    base[W2] = torch.zeros_like(base[W2])
    with pytest.raises(BaseError, match="zero") as raised:
        paired(base, tuned(llava()))
    assert raised.value.code == "base.zero"


def test_a_convolution_of_zeros_in_the_base_is_no_base_either():
    """HunYuan-VL's merge is stored as one: (out, in, 2, 2)."""
    config = {"architectures": ["HunYuanVLForConditionalGeneration"]}
    g = torch.Generator().manual_seed(0)
    shapes = {
        "before_rms.weight": (8,), "proj.0.weight": (16, 8, 2, 2), "proj.0.bias": (16,),
        "proj.2.weight": (24, 16, 1, 1), "proj.2.bias": (24,), "mlp.weight": (32, 24),
        "mlp.bias": (32,), "after_rms.weight": (32,),
    }  # fmt: skip
    base = {f"vit.perceive.{n}": torch.randn(shape, generator=g) for n, shape in shapes.items()}
    target = tuned(base, prefix="vit.perceive.")
    assert len(paired(base, target, config).layers) == 3
    base["vit.perceive.proj.0.weight"].zero_()
    with pytest.raises(BaseError, match="zero") as raised:
        paired(base, target, config)
    assert raised.value.code == "base.zero"


def test_huge_finite_weights_do_not_pass_for_small():
    """threats B8, K16: 3e38 entries overflow a naive norm."""
    from projaudit.analyses import run

    base = llava()
    target = tuned(base)
    target[W1] = target[W1].clone()
    target[W1][0, 0] = 3e38
    update = paired(base, target)
    measured, _ = run("layer", "projector/linear_1", update.layers[0])
    norm = next(m.value for m in measured if m.metric == "relative_norm")
    assert norm > 1e30


# Gated projectors

GATED = {
    "vision_backbone.image_projector.w1.weight": (80, 48),
    "vision_backbone.image_projector.w3.weight": (80, 48),
    "vision_backbone.image_projector.w2.weight": (64, 80),
}
HALVED = {
    "multi_modal_projector.linear_1.weight": (160, 48),
    "multi_modal_projector.linear_2.weight": (64, 80),
}


def gated(shapes: dict[str, tuple[int, int]], seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=g) / shape[1] ** 0.5 for n, shape in shapes.items()}


def reordered(tensors: Tensors, order: torch.Tensor) -> Tensors:
    """The same function, its hidden units in another order."""
    *first, last = tensors
    rows = order if len(first) == 2 else torch.cat([order, order + len(order)])
    return {n: tensors[n][rows] for n in first} | {last: tensors[last][:, order]}


def scaled(tensors: Tensors, scale: torch.Tensor) -> Tensors:
    """The same function: what a gate lets pass is larger, and the next layer takes less of it."""
    *first, last = tensors
    linear = first[-1]  # w3, or the first half of linear_1
    rows = torch.ones(len(tensors[linear]))
    rows[: len(scale)] = scale
    return tensors | {linear: tensors[linear] * rows[:, None], last: tensors[last] / scale}


def pair_of(base: Tensors, target: Tensors) -> ProjectorUpdate:
    projector = locate({n: tuple(t.shape) for n, t in base.items()})[0]
    return pair(
        projector,
        projector,
        target,
        base,
        subject="projector",
        device=torch.device("cpu"),
        rank=8,
        generator=torch.Generator().manual_seed(1),
    )


@pytest.mark.parametrize("shapes", [GATED, HALVED], ids=["gate and up", "halves"])
def test_permuting_and_scaling_the_units_of_a_gate_is_undone(shapes: dict[str, tuple[int, int]]):
    """threats K1 and K3 for gates: nothing is left of it but the update itself."""
    base = gated(shapes)
    g = torch.Generator().manual_seed(5)
    target = {n: t + 0.002 * torch.randn(t.shape, generator=g) for n, t in base.items()}
    honest = pair_of(base, target)
    assert [layer.permuted_units + layer.rescaled_units for layer in honest.layers] == [
        0 for _ in honest.layers
    ]
    scale = torch.linspace(0.5, 2.0, 80)
    hidden = reordered(scaled(target, scale), torch.randperm(80, generator=g))
    update = pair_of(base, hidden)
    assert max(layer.permuted_units for layer in update.layers) > 70
    assert max(layer.rescaled_units for layer in update.layers) > 60
    for layer, plain in zip(update.layers, honest.layers, strict=True):
        naive = float((hidden[layer_name(base, layer.role)] - layer.before).norm())
        assert float(layer.delta.norm()) < 0.1 * naive
        assert float(layer.delta.norm()) < 2 * float(plain.delta.norm())
    x = torch.randn(7, 48, generator=g)
    stored = {
        f"{layer.role}.weight": hidden[layer_name(base, layer.role)] for layer in update.layers
    }
    assert torch.allclose(
        forward(update.chain, update.weights("after"), x),
        forward(update.chain, stored, x),
        atol=1e-4,
    )


def layer_name(tensors: Tensors, role: str) -> str:
    projector = locate({n: tuple(t.shape) for n, t in tensors.items()})[0]
    return next(layer.weight for layer in projector.linears if layer.role == role)


def test_a_unit_turned_round_behind_a_gate_is_no_change():
    base = gated(GATED)
    signs = torch.where(torch.arange(80) % 9 == 0, -1.0, 1.0)
    update = pair_of(base, scaled(base, signs))
    assert max(layer.rescaled_units for layer in update.layers) == 9
    assert all(float(layer.delta.norm()) == 0 for layer in update.layers)
