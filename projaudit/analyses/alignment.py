"""What the shift points at: cosines with given directions and with the vocabulary's tokens.

Honest fine-tunes point at tokens as well (they teach answers), so alignment describes and does not
accuse. What it is worth shows beside its nulls only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from projaudit.analyses.nearest import aim_of, directed, drawn
from projaudit.analyses.nulls import null_of
from projaudit.analyses.subspace import SUBSPACE_RANK
from projaudit.findings import Null, Series
from projaudit.metrics import Skip, Value, measures

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from projaudit.analyses.context import Direction, ProjectorContext

DIRECTIONS = SUBSPACE_RANK
"""Leading directions of the shift and of ΔW each, against given ones (ProjLens: 2 to 5 matter)."""

FRAMES = 100
"""Random frames behind the null of `direction_alignment`."""

_SHOWN = 8


@measures("projector", unit="|cosine|", reference="ProjLens, arXiv:2604.19083, §1.4")
def direction_alignment(ctx: ProjectorContext) -> Value:
    """max |cos(u, t)| over given directions t and directions u of the shift, both signs.

    u: 5 leading directions of the shifts at high input norm (uncentred SVD of unit shifts,
    isotropic and singular probes) and 5 leading left singular vectors of the last ΔW. Nulls: the
    same for random updates of the base, and `random_direction`, the u turned by random rotations.
    An update made of what the base writes anyway beats the last one without meaning anything.
    """
    if not ctx.directions:
        raise Skip("no direction or target text was given")
    cosines = _target_cosines(ctx)
    best = sorted(cosines, key=lambda found: -abs(found[0]))[:_SHOWN]
    detail = tuple(f"{target}: {cosine:+.3f} with {name}" for cosine, name, target in best)
    targets = _targets(ctx.directions, aim_of(ctx, DIRECTIONS).rows)
    nulls = [_frames(aim_of(ctx, DIRECTIONS).rows, targets, ctx.update.generator)]
    for kind, draws in drawn(ctx).items():
        largest = [
            float((directed(draw, DIRECTIONS).rows @ targets.T).abs().max()) for draw in draws
        ]
        nulls.append(null_of(kind, largest))
    return Value(abs(best[0][0]), detail, tuple(null for null in nulls if null is not None))


@measures("projector", unit="|cosine|", reference="ProjLens, arXiv:2604.19083, §1.4")
def nearest_token_alignment(ctx: ProjectorContext) -> Value:
    """max |cos(u, e − ē)| over the vocabulary's embeddings e (mean ē) and the top directions u.

    u: 2 leading directions of the shifts and 2 of the last ΔW, as in direction_alignment. `detail`
    has each one's nearest tokens. Nulls: `sign_flip` (see nearest_token_p) and random updates of
    the base, which know how far the base itself writes towards its vocabulary.
    """
    found = ctx.nearest
    detail = tuple(
        f"{name}: " + ", ".join(f"{token} {cosine:+.3f}" for cosine, token in tokens)
        for name, tokens in zip(found.names, found.nearest, strict=True)
    )
    nulls = [null_of("sign_flip", found.flips.amax(1).tolist())]
    nulls += [
        null_of(k, [max(draw) for draw in draws if draw]) for k, draws in found.random.items()
    ]
    return Value(found.value, detail, tuple(null for null in nulls if null is not None))


@measures("projector", unit="p-value")
def nearest_token_p(ctx: ProjectorContext) -> Value:
    """(1 + #{sign flips whose max |cos| reaches the observed one}) / (1 + R)

    Randomisation test over the same vocabulary: each flip turns the sign of output coordinates at
    random, the same for all directions. It keeps every |coordinate|, so that outlier dimensions of
    the embeddings count for the null as well, and their common mean is taken off before; it is
    exact for directions whose law does not change under sign flips (a random ΔW's are). It does not
    know of principal directions of the embeddings across coordinates: a small p says that the
    direction has to do with the vocabulary, not that it is an attacker's.
    """
    found = ctx.nearest
    return Value(found.p, (f"{len(found.flips)} sign flips",))


def series(ctx: ProjectorContext) -> tuple[Series, ...]:
    """Chart `alignment`: x = number of the direction, y = signed cosine, names = its other side."""
    subject, found = ctx.update.subject, []
    try:
        nearest = ctx.nearest
    except Skip:
        pass
    else:
        numbers = [_number(name) for name in nearest.names]
        points = [
            (number, cosine, token)
            for number, tokens in zip(numbers, nearest.nearest, strict=True)
            for cosine, token in tokens[:2]
        ]
        found.append(_bars(subject, "update", points))
        found.append(_level(subject, "null: sign flips", numbers, nearest.flips.tolist()))
        found += [
            _level(subject, f"null: {kind.replace('_', ' ')}", numbers, draws)
            for kind, draws in nearest.random.items()
        ]
    if ctx.directions:
        try:
            cosines = sorted(_target_cosines(ctx), key=lambda item: -abs(item[0]))[:_SHOWN]
        except Skip:
            return tuple(found)
        found.append(_bars(subject, "target", [(_number(n), c, t) for c, n, t in cosines]))
    return tuple(found)


def _bars(subject: str, label: str, points: Sequence[tuple[float, float, str]]) -> Series:
    x, y, names = zip(*points, strict=True)
    return Series("alignment", subject, label, x, y, names)


def _level(
    subject: str, label: str, numbers: Sequence[float], draws: Sequence[Sequence[float]]
) -> Series:
    """What one direction of a null reaches on average, drawn at each number."""
    cosines = [cosine for draw in draws for cosine in draw]
    level = sum(cosines) / max(len(cosines), 1)
    return Series("alignment", subject, label, tuple(numbers), (level,) * len(numbers))


def _number(name: str) -> float:
    """1–5 for `shift n`, 6–10 for `written n`."""
    kind, n = name.split()
    return float(n) + (DIRECTIONS if kind == "written" else 0)


def _target_cosines(ctx: ProjectorContext) -> list[tuple[float, str, str]]:
    """(signed cosine, direction of the shift, target) of each target's closest direction."""
    aim = aim_of(ctx, DIRECTIONS)
    cosines = _targets(ctx.directions, aim.rows) @ aim.rows.T
    places = cosines.abs().argmax(1).tolist()
    return [
        (float(cosines[row, place]), aim.names[place], target.name)
        for row, (place, target) in enumerate(zip(places, ctx.directions, strict=True))
    ]


def _targets(directions: Sequence[Direction], like: Tensor) -> Tensor:
    """(b × out) unit rows."""
    import torch

    for direction in directions:
        if direction.vector.numel() != like.shape[1]:
            raise Skip(
                f"{direction.name} has {direction.vector.numel()} entries, "
                f"the projector writes {like.shape[1]}"
            )
    rows = torch.stack([d.vector.reshape(-1).double().cpu() for d in directions])
    rows = rows / rows.abs().amax(1, keepdim=True)
    rows = rows / rows.square().sum(1, keepdim=True).sqrt()
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows).all(1)).nonzero()[0])
        raise Skip(f"{directions[bad].name} is zero or not finite")
    return rows.to(like)


def _frames(rows: Tensor, targets: Tensor, generator: Generator) -> Null | None:
    """Null `random_direction`: max |cos| after the rows were rotated at random, all together.

    rows = L E with E a frame of orthonormal rows; each draw replaces E by a Haar frame, G with
    GGᵀ whitened, so that the angles between the rows stay as they are. One pair alone has
    cos² ~ Beta(1/2, (d − 1)/2).
    """
    import torch

    values, vectors = torch.linalg.eigh(rows.double().cpu() @ rows.double().cpu().T)
    kept = values > 1e-8 * values[-1]
    mixing = vectors[:, kept] * values[kept].sqrt()  # L (a × r)
    towards, largest = targets.cpu().T, []
    for _ in range(FRAMES):
        drawn = torch.randn(mixing.shape[1], rows.shape[1], generator=generator)
        factor = torch.linalg.cholesky((drawn @ drawn.T).double())
        inner = torch.linalg.solve_triangular(factor, (drawn @ towards).double(), upper=False)
        largest.append(float((mixing @ inner).abs().max()))
    return null_of("random_direction", largest)
