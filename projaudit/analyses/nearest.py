"""The directions that an update moves outputs along, and the tokens nearest to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from projaudit.analyses.nulls import leading
from projaudit.analyses.responses import Responses
from projaudit.metrics import Skip

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from projaudit.analyses.context import EmbeddingMatrix, ProjectorContext

TOKEN_DIRECTIONS = 2
"""The same for the vocabulary; every one more costs as much again."""

TOKEN_FLOPS = 1.5e11
"""Multiplications and additions over the vocabulary; they decide the number of sign flips."""

FLIPS = (39, 199)
"""Fewest and most sign flips: the least p-value is 1/40 or better."""

_NEAREST = 5
_CHUNK = 512  # rows


@dataclass(frozen=True)
class Aim:
    """Directions in output space that the update moves outputs along."""

    names: tuple[str, ...]
    """`shift n` of the shifts, `written n` of the last ΔW."""
    rows: Tensor
    """(a × out) unit rows, fp32. + is where the mean shift goes; of `written` it is arbitrary."""


@dataclass(frozen=True)
class NearestTokens:
    """The vocabulary seen from the top directions. Cosines are those of centred embeddings."""

    names: tuple[str, ...]
    """Of the directions."""
    nearest: tuple[tuple[tuple[float, str], ...], ...]
    """Per direction (signed cosine, token), greatest |cosine| first."""
    flips: Tensor
    """(R × a) greatest |cosine| over the vocabulary under each joint sign flip."""
    random: dict[str, tuple[tuple[float, ...], ...]]
    """Null kind -> per draw the greatest |cosine| of each of its directions."""

    @property
    def value(self) -> float:
        """Greatest |cosine| over directions and tokens."""
        return max(abs(cosine) for found in self.nearest for cosine, _ in found)

    @property
    def p(self) -> float:
        """(1 + #{flips that reach the value}) / (1 + R)."""
        reached = int((self.flips.amax(1) >= self.value - 1e-6).sum())
        return (1 + reached) / (1 + len(self.flips))


def aim_of(ctx: ProjectorContext, count: int) -> Aim:
    """The update's leading directions, `count` of each sort; without probes those of ΔW alone."""
    if ctx.update.nonfinite:
        raise Skip("the target's projector has NaN or Inf entries")
    if ctx.update.path[-1].rotated:
        raise Skip("the output space was rotated, so directions are in other coordinates")
    try:
        responses = ctx.probes.update
    except Skip:
        written = leading(ctx.update.path[-1], left=True).T
        responses = Responses({}, written[:0], written)
    aim = directed(responses, count)
    if not aim.names:
        raise Skip("the update has no direction: it does not move the output")
    return aim


def drawn(ctx: ProjectorContext) -> dict[str, tuple[Responses, ...]]:
    """Null kind -> what each random update does; none without probes."""
    try:
        return dict(ctx.probes.nulls)
    except Skip:
        return {}


def directed(responses: Responses, count: int) -> Aim:
    """The leading directions of one update, real or random, `count` of each sort."""
    import torch

    moved, written = responses.moved[:count], responses.written[:count]
    names = [f"shift {n + 1}" for n in range(len(moved))]
    names += [f"written {n + 1}" for n in range(len(written))]
    return Aim(tuple(names), torch.cat([moved, written]))


def nearest_tokens(ctx: ProjectorContext) -> NearestTokens:
    """The nearest tokens of the update's top directions, with sign flips and random updates.

    Raises Skip without an embedding matrix.
    """
    if ctx.tokens is None:
        raise Skip("the embedding matrix is not at hand")
    aim = aim_of(ctx, TOKEN_DIRECTIONS)
    if ctx.tokens.shape[1] != aim.rows.shape[1]:
        raise Skip(
            f"embeddings are {ctx.tokens.shape[1]} wide, the projector writes {aim.rows.shape[1]}"
        )
    draws = {
        kind: [directed(draw, TOKEN_DIRECTIONS).rows for draw in found]
        for kind, found in drawn(ctx).items()
    }
    return scan(aim, ctx.tokens, draws, generator=ctx.update.generator)


def scan(
    aim: Aim,
    tokens: EmbeddingMatrix,
    draws: dict[str, list[Tensor]],
    *,
    generator: Generator,
) -> NearestTokens:
    """All cosines of `aim`, of its sign flips and of `draws` with the vocabulary, in two passes.

    The first pass takes the mean of the rows, the second the cosines, a block of rows at a time.
    Rows that are zero or not finite (padding, unused ids) are left out.
    """
    import torch

    vocabulary, width = tokens.shape
    if not vocabulary:
        raise Skip("the embedding matrix has no rows")
    a = len(aim.rows)
    random = [rows for found in draws.values() for rows in found]
    fewest, most = FLIPS
    affordable = TOKEN_FLOPS / (2 * vocabulary * width * a) - 1 - len(random)
    flips = int(min(max(affordable, fewest), most))
    signs = torch.randint(0, 2, (flips, 1, width), generator=generator).to(aim.rows) * 2 - 1
    columns = torch.cat([aim.rows, *random, (signs * aim.rows).flatten(0, 1)]).T
    mean = _mean(tokens, columns)
    largest = columns.new_zeros(columns.shape[1])
    best, ids = columns.new_zeros(0, a), torch.zeros(0, a, dtype=torch.int64)
    for first, rows in _chunks(tokens, columns):
        used = _used(rows)
        rows = rows - mean
        rows[~used] = 0
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        cosines = (rows @ columns) / length.clamp_min(torch.finfo(rows.dtype).tiny)
        largest = torch.maximum(largest, cosines.abs().amax(0))
        own = cosines[:, :a]
        place = own.abs().topk(min(_NEAREST, len(own)), dim=0).indices
        best = torch.cat([best, own.gather(0, place)])
        ids = torch.cat([ids, place.cpu() + first])
        place = best.abs().topk(min(_NEAREST, len(best)), dim=0).indices
        best, ids = best.gather(0, place), ids.gather(0, place.cpu())
    values = largest.cpu().double()
    starts = iter(accumulate((len(rows) for rows in random), initial=a))
    return NearestTokens(
        names=aim.names,
        nearest=tuple(
            tuple(
                (float(best[n, column]), tokens.name(int(ids[n, column]))) for n in range(len(best))
            )
            for column in range(a)
        ),
        flips=values[-flips * a :].reshape(flips, a),
        random={
            kind: tuple(tuple(values[next(starts) :][: len(rows)].tolist()) for rows in found)
            for kind, found in draws.items()
        },
    )


def _chunks(tokens: EmbeddingMatrix, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(id of the first row, rows) in pieces whose copies do not weigh."""
    for first, block in tokens.blocks():
        for start in range(0, len(block), _CHUNK):
            yield first + start, block[start : start + _CHUNK].to(like)


def _used(rows: Tensor) -> Tensor:
    """(b,) True for rows that are finite and not zero."""
    import torch

    size: Tensor = torch.linalg.vector_norm(rows, math.inf, dim=1)
    return (size > 0) & (size < math.inf)


def _mean(tokens: EmbeddingMatrix, like: Tensor) -> Tensor:
    """Mean of the used rows (width,)."""
    import torch

    total, count = torch.zeros(tokens.shape[1], dtype=torch.float64, device=like.device), 0
    for _, rows in _chunks(tokens, like):
        used = rows[_used(rows)]
        total += used.sum(0)
        count += len(used)
    return (total / max(count, 1)).to(like)
