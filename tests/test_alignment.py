"""Alignment of the shift with given directions and with a vocabulary, and its false positives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from scipy import stats
from test_probes import draw, noise, projector, spike, unit
from torch import Tensor

from projaudit.analyses import alignment, nearest
from projaudit.analyses.context import Direction, ProjectorContext
from projaudit.analyses.nearest import Aim, aim_of, scan
from projaudit.linalg import random_orthonormal
from projaudit.metrics import Skip, Value

OUT = 64


@dataclass(frozen=True)
class Vocabulary:
    """An embedding matrix in memory, handed out in small blocks."""

    rows: Tensor
    step: int = 37

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.rows.shape[1]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self.rows), self.step):
            yield first, self.rows[first : first + self.step]

    def name(self, token: int) -> str:
        return f"token{token}"


def anisotropic(tokens: int = 300, width: int = OUT) -> Tensor:
    """Rows with a strong common mean and three outlier dimensions, as real embeddings have."""
    rows = draw(tokens, width, seed=1)
    rows[:, :3] *= 12
    return rows + 3 * draw(width, seed=2)


def written(target: Tensor, relative: float = 0.3) -> ProjectorContext:
    """An update whose last layer writes `target`, whatever it reads."""
    last = torch.outer(target / target.norm(), unit(96, 4))
    return ProjectorContext(projector(torch.zeros(96, 48), last, relative=relative))


def measure(name: str, ctx: ProjectorContext) -> Value:
    result = getattr(alignment, name)(ctx)
    assert isinstance(result, Value)
    return result


def null(result: Value, kind: str) -> float:
    """z-score against that null."""
    score = next(n for n in result.nulls if n.kind == kind).z(result.value)
    assert score is not None
    return score


# --- given directions -----------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_direction_is_found_with_its_sign(sign: int) -> None:
    target = draw(OUT, seed=3)
    directions = (
        Direction("other", draw(OUT, seed=8).bfloat16()),
        Direction("payload", sign * 100 * target),
    )
    ctx = replace(written(target), directions=directions)
    result = measure("direction_alignment", ctx)
    assert result.value > 0.98
    assert result.detail[0].startswith("payload: ")
    assert {n.kind for n in result.nulls} == {"random_direction", "equal_norm", "equal_spectrum"}
    for kind in ("random_direction", "equal_norm", "equal_spectrum"):
        assert null(result, kind) > 4
    flipped = replace(written(-target), directions=directions)
    cosine = float(result.detail[0].split()[1])
    assert float(measure("direction_alignment", flipped).detail[0].split()[1]) * cosine < 0 or (
        "written" in result.detail[0]  # whose sign is arbitrary
    )


def test_unrelated_directions_have_ordinary_scores() -> None:
    scores = []
    for seed in range(30):
        update = projector(noise(96, 48, seed), noise(OUT, 96, seed), seed=100 * seed)
        directions = tuple(Direction(f"d{n}", draw(OUT, seed=900 + seed + n)) for n in range(3))
        result = measure("direction_alignment", ProjectorContext(update, directions))
        scores.append(null(result, "random_direction"))
    assert abs(sum(scores) / len(scores)) < 0.8
    assert max(map(abs, scores)) < 5


def test_one_pair_has_the_beta_law_of_random_directions() -> None:
    rows, targets = unit(OUT, 1)[None], unit(OUT, 2)[None]
    found = alignment._frames(rows, targets, torch.Generator().manual_seed(0))
    assert found is not None
    mean = math.gamma(OUT / 2) / (math.pi**0.5 * math.gamma((OUT + 1) / 2))
    assert found.mean == pytest.approx(mean, rel=0.25)
    assert found.sd == pytest.approx((1 / OUT - mean**2) ** 0.5, rel=0.3)


def test_the_null_turns_dependent_directions_together() -> None:
    """The same direction five times is one direction."""
    row, targets = unit(OUT, 1)[None], draw(4, OUT, seed=2)
    targets = targets / targets.norm(dim=1, keepdim=True)
    one = alignment._frames(row, targets, torch.Generator().manual_seed(0))
    five = alignment._frames(row.repeat(5, 1), targets, torch.Generator().manual_seed(0))
    assert one is not None
    assert five is not None
    assert five.mean == pytest.approx(one.mean, rel=1e-4)


def test_a_bias_alone_has_its_own_direction() -> None:  # K6
    shift = draw(OUT, seed=3)
    zero = torch.zeros(96, 48), torch.zeros(OUT, 96)
    ctx = ProjectorContext(projector(*zero, bias_delta=shift), (Direction("payload", shift),))
    result = measure("direction_alignment", ctx)
    assert result.value == pytest.approx(1, abs=1e-4)
    assert result.detail == ("payload: +1.000 with shift 1",)


def test_without_a_known_function_the_weights_still_have_directions() -> None:
    target = draw(OUT, seed=3)
    ctx = written(target)
    update = replace(ctx.update, chain=(), base_chain=())
    ctx = ProjectorContext(update, (Direction("payload", target),))
    result = measure("direction_alignment", ctx)
    assert result.value > 0.99
    assert [n.kind for n in result.nulls] == ["random_direction"]


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (torch.zeros(OUT), "zero or not finite"),
        (torch.full((OUT,), float("nan")), "zero or not finite"),
        (torch.ones(OUT + 1), "65 entries, the projector writes 64"),
    ],
)
def test_a_bad_direction_is_named(vector: Tensor, reason: str) -> None:
    ctx = replace(written(draw(OUT, seed=3)), directions=(Direction("bad", vector),))
    with pytest.raises(Skip, match=f"bad .*{reason}"):
        alignment.direction_alignment(ctx)


def test_what_cannot_be_told_is_skipped() -> None:
    ctx = written(draw(OUT, seed=3))
    with pytest.raises(Skip, match="no direction"):
        alignment.direction_alignment(ctx)
    with pytest.raises(Skip, match="embedding matrix"):
        alignment.nearest_token_p(ctx)
    first, last = ctx.update.layers
    asked = (Direction("payload", draw(OUT, seed=3)),)
    rotated = replace(ctx.update, layers=(first, replace(last, rotated=True)))
    with pytest.raises(Skip, match="rotated"):
        alignment.direction_alignment(ProjectorContext(rotated, asked))
    nan = replace(ctx.update, layers=(), nonfinite={"linear_1.weight": 1})
    with pytest.raises(Skip, match="NaN"):
        alignment.direction_alignment(ProjectorContext(nan, asked))
    zero = projector(torch.zeros(96, 48), torch.zeros(OUT, 96))
    with pytest.raises(Skip, match="does not move"):
        alignment.direction_alignment(ProjectorContext(zero, asked))
    with pytest.raises(Skip, match="63 wide"):
        alignment.nearest_token_p(replace(ctx, tokens=Vocabulary(anisotropic(40, 63))))
    assert alignment.series(ctx) == ()


# --- the vocabulary -------------------------------------------------------------------------------


def test_a_planted_token_is_the_nearest_and_significant() -> None:
    rows = anisotropic()
    target = rows[123] - rows.mean(0)
    ctx = replace(written(target), tokens=Vocabulary(rows))
    result = measure("nearest_token_alignment", ctx)
    assert result.value > 0.95
    assert any("token123" in line.split(",")[0] for line in result.detail)
    p = measure("nearest_token_p", ctx)
    assert p.value == 1 / (1 + nearest.FLIPS[1])
    for kind in ("sign_flip", "equal_norm", "equal_spectrum"):
        assert null(result, kind) > 3


def test_p_values_of_random_directions_are_uniform() -> None:
    tokens = Vocabulary(anisotropic(), step=300)
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(200):
        rows = random_orthonormal(OUT, 2, generator=generator).T
        values.append(scan(Aim(("shift 1", "shift 2"), rows), tokens, {}, generator=generator).p)
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert sum(p <= 0.05 for p in values) / len(values) < 0.11


def test_p_values_of_random_updates_are_uniform() -> None:
    tokens, values = Vocabulary(anisotropic(), step=300), []
    for seed in range(60):
        update = projector(noise(96, 48, seed), noise(OUT, 96, seed), seed=100 * seed)
        values.append(measure("nearest_token_p", ProjectorContext(update, (), tokens)).value)
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert sum(p <= 0.05 for p in values) / len(values) < 0.15


def test_common_mean_and_outlier_dimensions_are_not_significant() -> None:
    rows = anisotropic()
    generator = torch.Generator().manual_seed(0)
    mean = rows.mean(0) / rows.mean(0).norm()
    outlier = torch.eye(OUT)[0]
    tokens = Vocabulary(rows)
    raw = (rows @ mean / rows.norm(dim=1)).abs().max()
    along_mean = scan(Aim(("shift 1",), mean[None]), tokens, {}, generator=generator)
    assert raw > 0.8  # the naive cosine: every token lies along the mean
    assert along_mean.p > 0.05
    found = scan(Aim(("shift 1",), outlier[None]), tokens, {}, generator=generator)
    assert found.value > 0.9  # some token is nearly all in that dimension
    assert found.p == 1


def test_unused_rows_are_left_out() -> None:
    rows = anisotropic()
    generator = torch.Generator().manual_seed(0)
    aim = Aim(("shift 1",), (rows[5] - rows.mean(0))[None] / (rows[5] - rows.mean(0)).norm())
    clean = scan(aim, Vocabulary(rows), {}, generator=generator)
    padding = torch.zeros(80, OUT)
    padding[0, 0] = float("nan")
    padding[1, 1] = float("inf")
    padded = scan(
        aim,
        Vocabulary(torch.cat([rows, padding])),
        {},
        generator=torch.Generator().manual_seed(0),
    )
    assert padded.value == pytest.approx(clean.value, rel=1e-5)
    assert [t for _, t in padded.nearest[0]] == [t for _, t in clean.nearest[0]]
    with pytest.raises(Skip, match="no rows"):
        scan(aim, Vocabulary(rows[:0]), {}, generator=generator)


def test_blocks_give_what_the_whole_gives() -> None:
    rows, update = anisotropic(), written(draw(OUT, seed=3)).update
    found = []
    for step in (1, 37, 300):
        fresh = replace(update, generator=torch.Generator().manual_seed(4))
        found.append(ProjectorContext(fresh, (), Vocabulary(rows, step)).nearest)
    for other in found[1:]:
        assert other.p == found[0].p
        for one, same in zip(found[0].nearest, other.nearest, strict=True):
            assert [token for _, token in one] == [token for _, token in same]
            assert [c for c, _ in one] == pytest.approx([c for c, _ in same], abs=1e-6)


def test_a_large_vocabulary_gets_fewer_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = anisotropic()
    monkeypatch.setattr(nearest, "TOKEN_FLOPS", 2.0 * 300 * OUT * 100)
    aim = Aim(("shift 1",), unit(OUT, 1)[None])
    found = scan(aim, Vocabulary(rows), {}, generator=torch.Generator().manual_seed(0))
    assert len(found.flips) == 99
    monkeypatch.setattr(nearest, "TOKEN_FLOPS", 1.0)
    found = scan(aim, Vocabulary(rows), {}, generator=torch.Generator().manual_seed(0))
    assert len(found.flips) == nearest.FLIPS[0]


def test_the_chart_names_tokens_and_targets() -> None:
    rows = anisotropic()
    target = rows[7] - rows.mean(0)
    ctx = replace(
        written(target), tokens=Vocabulary(rows), directions=(Direction("asked", target),)
    )
    found = {series.label: series for series in alignment.series(ctx)}
    assert list(found) == [
        "update",
        "null: sign flips",
        "null: equal norm",
        "null: equal spectrum",
        "target",
    ]
    assert "token7" in found["update"].names
    assert set(found["update"].x) <= {1.0, 2.0, 6.0, 7.0}
    assert found["null: sign flips"].x == tuple(dict.fromkeys(found["update"].x))
    assert found["target"].names == ("asked",)
    assert all(series.chart == "alignment" for series in found.values())


def test_directions_of_the_shift_point_where_the_mean_goes() -> None:
    shift = draw(OUT, seed=3)
    zero = torch.zeros(96, 48), torch.zeros(OUT, 96)
    aim = aim_of(ProjectorContext(projector(*zero, bias_delta=shift)), 5)
    assert aim.names == ("shift 1",)
    assert float(aim.rows[0] @ shift / shift.norm()) == pytest.approx(1, abs=1e-5)
    aim = aim_of(ProjectorContext(projector(spike(96, 48), spike(OUT, 96))), 2)
    assert aim.names == ("shift 1", "shift 2", "written 1")
    assert torch.allclose(aim.rows.norm(dim=1), torch.ones(3), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_sees_what_the_cpu_sees() -> None:
    found = []
    for device in ("cpu", "cuda"):
        update = projector(noise(96, 48), spike(OUT, 96), device=device)
        asked = (Direction("asked", draw(OUT, seed=3)),)
        ctx = ProjectorContext(update, asked, Vocabulary(anisotropic()))
        names = ("direction_alignment", "nearest_token_alignment", "nearest_token_p")
        found.append([measure(name, ctx).value for name in names])
    assert found[1] == pytest.approx(found[0], abs=1e-3)
