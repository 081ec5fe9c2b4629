"""Reparametrisations of a projector undone where that is exact: permuted, rescaled, rotated layers.

Each function returns what would have to be applied to the tuned layers so that they stand beside
the base's, or None where nothing of the kind is there. All of them leave the tuned function as it
is; what cannot be undone exactly is a change, and stays in the update.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# A unit that has moved less than this is in its place; a permuted one matches another this well.
_IN_PLACE = 0.9
_MATCH = 0.7
_SCALED = 0.02  # |log| of a row scale below this is a change, not a rescaling
_ABSORBED = 0.25  # share of that which the next layer may leave unabsorbed


def _rows(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[W | b], the parameters of each hidden unit as a row."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)


def _row_cosines(
    before: Tensor, after: Tensor, before_bias: Tensor | None, after_bias: Tensor | None
) -> Tensor:
    """Cosine of each row of [W | b] before and after, without copies of the matrices."""
    dot = torch.linalg.vecdot(before, after)
    squares = [torch.linalg.vecdot(w, w) for w in (before, after)]
    if before_bias is not None and after_bias is not None:
        dot = dot + before_bias * after_bias
        squares = [s + b.square() for s, b in zip(squares, (before_bias, after_bias), strict=True)]
    cosines: Tensor = dot / (squares[0] * squares[1]).sqrt().clamp_min(1e-30)
    return cosines


def _unit(rows: Tensor) -> Tensor:
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp_min(torch.finfo(rows.dtype).tiny)


def hidden_permutation(
    before: Tensor, after: Tensor, before_bias: Tensor | None, after_bias: Tensor | None
) -> Tensor | None:
    """Index `p` (h,) such that `after[p]` stands beside `before` (h × in), None for the identity.

    Exact for every elementwise activation, if the next layer's columns follow. Units that match
    themselves (cosine of [W | b] rows ≥ 0.9) are left alone; the others are assigned by greatest
    total cosine, and a cycle is accepted where its mean cosine is ≥ 0.7 (threats K1).
    """
    moved = (_row_cosines(before, after, before_bias, after_bias) < _IN_PLACE).nonzero().flatten()
    if len(moved) < 2:
        return None
    old, new = (
        _unit(_rows(weight[moved], None if bias is None else bias[moved]))
        for weight, bias in ((before, before_bias), (after, after_bias))
    )
    similarity = (old @ new.T).cpu()
    _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    match = torch.as_tensor(columns)
    cosine = similarity[torch.arange(len(moved)), match]
    order = torch.arange(len(before))
    places = moved.cpu()
    seen: set[int] = set()
    for start in range(len(match)):
        cycle = []
        at = start
        while at not in seen:
            seen.add(at)
            cycle.append(at)
            at = int(match[at])
        if len(cycle) > 1 and float(cosine[cycle].mean()) >= _MATCH:
            order[places[cycle]] = places[match[cycle]]
    identity = bool((order == torch.arange(len(order))).all())
    return None if identity else order.to(before.device)


def hidden_scale(
    before: Tensor,
    after: Tensor,
    before_bias: Tensor | None,
    after_bias: Tensor | None,
    next_before: Tensor,
    next_after: Tensor,
    *,
    signed: bool = False,
) -> Tensor | None:
    """Row scales `s` (h,) of the tuned layer that the next layer's columns take back, or None.

    Exact for what passes on linearly: relu(s·z) = s·relu(z) for s > 0, and the side of a gated
    step that has no activation for any s (`signed`). A unit counts as rescaled where its row norm
    changed by more than 2 % and the next layer's column norm changed by the inverse, to a quarter
    of that on the log scale, and where that is more than twice what either's direction changed, as
    it is not of norms that training moved; as flipped where both turned round (cosine ≤ −0.9). The
    others get 1 (threats K3).
    """
    tiny = torch.finfo(before.dtype).tiny
    was, now = _rows(before, before_bias), _rows(after, after_bias)
    row = (now.norm(dim=1).clamp_min(tiny) / was.norm(dim=1).clamp_min(tiny)).log()
    column = (
        next_after.norm(dim=0).clamp_min(tiny) / next_before.norm(dim=0).clamp_min(tiny)
    ).log()
    alike = torch.stack(
        [
            _row_cosines(before, after, before_bias, after_bias),
            _row_cosines(next_before.T, next_after.T, None, None),
        ]
    )
    # Between unit vectors; behind a gate one that turned round is as good.
    turn = (2 - 2 * (alike.abs() if signed else alike).amin(0)).clamp_min(0).sqrt()
    rescaled = (row.abs() > _SCALED) & ((row + column).abs() < _ABSORBED * row.abs())
    rescaled &= row.abs() > 2 * turn
    scale = torch.where(rescaled, row.exp(), torch.ones_like(row))
    if signed:
        turned = alike.amax(0) <= -_IN_PLACE
        scale = torch.where(turned, -scale, scale)
    return scale if bool((scale != 1).any()) else None


def far(before: Tensor, after: Tensor) -> bool:
    """Whether ‖after − before‖F exceeds 0.3 ‖before‖F, as any rotation worth hiding behind does."""
    return float((after - before).norm()) > 0.3 * float(before.norm())


def output_rotation(
    before: Tensor, after: Tensor, embed_before: Tensor, embed_after: Tensor
) -> Tensor | None:
    """Orthogonal `R` (d × d) with after ≈ R·before that the embeddings share, or None.

    `before`, `after` are the last layer's weights (d × h), `embed_*` the same rows (n × d) of both
    models' embedding matrices. Exact only if the language model was rotated with the projector;
    that is verified through E·W, which a shared rotation leaves as it is (threats K2).
    R is the orthogonal Procrustes solution (Schönemann 1966).
    """
    change = float((after - before).norm() / before.norm())
    joint = embed_before @ before
    if float((embed_after @ after - joint).norm() / joint.norm()) > 0.3 * change:
        return None
    embed_change = float((embed_after - embed_before).norm() / embed_before.norm())
    if not far(before, after) or embed_change < 0.3 * change:
        return None
    # Few hidden units leave R undetermined; the embedding rows, rotated alike, complete it.
    left, _, right = torch.linalg.svd(
        after @ before.T + embed_after.T @ embed_before, full_matrices=False
    )
    rotation: Tensor = left @ right
    return rotation
