"""Directions in the projector's input space along which an update acts most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from projaudit.behaviour.speaker import Side, Speaker
from projaudit.projector import Linear

POINTS = 128
"""Token features at which Jacobians and drift are averaged."""


@dataclass(frozen=True)
class InputDirection:
    """A direction of the projector's input space."""

    source: str
    """`ΔW₁`, `ΔJ`, `drift` or `random`."""
    number: int
    vector: Tensor
    """(in,), of length 1; or (tokens, in), of mean length 1, where each token moves in its way."""


def directions(
    speaker: Speaker,
    tuned: Side,
    base: Side,
    first: Linear,
    features: Tensor,
    count: int,
    generator: torch.Generator,
) -> list[InputDirection]:
    """The `count` leading directions of each source, at features (images, tokens, in).

    ΔW₁: right singular vectors of the first layer's update, carried back to the features where it
    reads several tokens at once. ΔJ: right singular vectors of the mean difference of Jacobians.
    drift: Jᵀu for the leading right singular vectors u of P_tuned(x) − P_base(x) (ProjLens 1.3), J
    the tuned Jacobian. Where a projector reads whole sets of tokens, ΔW₁ alone.
    """
    delta = first.matrix((tuned[first.weight] - base[first.weight]).float())
    leading = torch.linalg.svd(delta, full_matrices=False)[2][:count]
    found = _of_first(speaker, first, leading, features)
    if not speaker.by_token:
        return found
    flat = features.flatten(0, -2)
    keep = torch.randperm(len(flat), generator=generator)[:POINTS].to(flat.device)
    x = flat[keep]
    after, before = _function(speaker, tuned), _function(speaker, base)
    found += _from_rows("ΔJ", _jacobian_change(after, before, x, count, generator))
    drift = after(x) - before(x)
    outputs = torch.linalg.svd(drift, full_matrices=False)[2][:count]
    pull = vjp(after, x)[1]
    found += _from_rows(
        "drift", torch.stack([pull(u.expand(len(x), -1))[0].mean(0) for u in outputs])
    )
    return found


def _of_first(
    speaker: Speaker, first: Linear, rows: Tensor, features: Tensor
) -> list[InputDirection]:
    """Directions of the first layer's inputs as directions of features.

    Where it reads several tokens at once, the gradient of what it is handed along the direction, at
    the features of the first image; none where it is handed no rows of its width.
    """
    if rows.shape[1] == features.shape[-1]:
        return _from_rows("ΔW₁", rows)
    found = []
    for number, row in enumerate(rows, 1):
        back = speaker.pulled(first.weight, row, features[:1])
        back = None if back is None else back[: speaker.tokens]
        if back is not None and float(back.norm()) > 0:
            found.append(InputDirection("ΔW₁", number, back / back.norm(dim=-1).mean()))
    return found


def random_directions(
    features: Tensor, count: int, generator: torch.Generator
) -> list[InputDirection]:
    """Directions that know nothing of the update: the control, and a probe of its own."""
    drawn = torch.randn(count, features.shape[-1], generator=generator)
    return _from_rows("random", drawn.to(features.device))


def _function(speaker: Speaker, side: Side) -> Callable[[Tensor], Tensor]:
    weights = {name: tensor.float() for name, tensor in side.items()}
    module = speaker.projector

    def project(x: Tensor) -> Tensor:
        out: Tensor = functional_call(module, weights, (x,))
        return out

    return project


def _jacobian_change(
    after: Callable[[Tensor], Tensor],
    before: Callable[[Tensor], Tensor],
    x: Tensor,
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """(count, in): right singular vectors of mean J_tuned − mean J_base, by block iteration."""

    def change(z: Tensor) -> Tensor:
        return after(z) - before(z)

    pull = vjp(change, x)[1]
    q = torch.randn(x.shape[1], count + 4, generator=generator).to(x.device)
    for _ in range(3):
        pushed = [jvp(change, (x,), (v.expand_as(x),))[1].mean(0) for v in q.T]
        pulled = [pull(u.expand(len(x), -1))[0].mean(0) for u in pushed]
        q = torch.linalg.qr(torch.stack(pulled, 1))[0]
    pushed = [jvp(change, (x,), (v.expand_as(x),))[1].mean(0) for v in q.T]
    right = torch.linalg.svd(torch.stack(pushed, 1), full_matrices=False)[2]
    leading: Tensor = (right @ q.T)[:count]
    return leading


def _from_rows(source: str, rows: Tensor) -> list[InputDirection]:
    return [
        InputDirection(source, number, row / row.norm())
        for number, row in enumerate(rows, 1)
        if float(row.norm()) > 0
    ]


def amplified(tuned: Side, base: Side, rank: int, factor: float) -> Side:
    """The tuned tensors with the leading `rank` part of every matrix's update times `factor`."""
    out = {}
    for name, tensor in tuned.items():
        out[name] = tensor
        if tensor.ndim == 2:
            delta = (tensor - base[name]).float()
            u, s, vt = torch.linalg.svd(delta, full_matrices=False)
            part = (u[:, :rank] * s[:rank]) @ vt[:rank]
            out[name] = tensor + ((factor - 1) * part).to(tensor.dtype)
    return out
