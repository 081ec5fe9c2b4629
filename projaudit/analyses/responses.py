"""The shifts of outputs on synthetic inputs: of the update, and of random ones of the same base.

Every probe stands beside random updates of the same base (`nulls`), so that its z-score needs no
calibration. Any training is far from random: an honest fine-tune has high scores, too.
Inputs are synthetic: what a projector does on a real model's features, or to a trigger that lies in
none of these directions, is not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from projaudit.analyses.nulls import (
    Change,
    gaussian,
    random_change,
    real_change,
    unit,
)
from projaudit.analyses.subspace import SUBSPACE_RANK
from projaudit.chain import activations, acts, carried, forward, parse
from projaudit.metrics import Skip

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from projaudit.update import ProjectorUpdate

NORMS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Input norms of the isotropic probes, in multiples of the typical one (see typical_norm)."""

AIMED_NORMS = (1.0, 16.0)
"""Those of the probes along ΔW1's own directions."""


@dataclass(frozen=True)
class ProbeBudget:
    """How much is probed; by default the work is (144 + 24) rows × 17 updates.

    With 8 draws the z-score of an ordinary update has Student's t with 7 degrees of freedom, times
    1.06: |z| > 2.5 in 5 % of cases, > 3.7 in 1 %.
    """

    directions: int = 24
    """Isotropic directions, each at all of NORMS."""
    singular: int = 2
    """Leading right singular vectors of ΔW1, each with both signs."""
    subspace: int = 8
    """Random vectors of the leading right singular subspace of ΔW1 (SUBSPACE_RANK dimensions)."""
    draws: int = 8
    """Random updates per null."""


BUDGET = ProbeBudget()


@dataclass(frozen=True)
class Response:
    """The shift s(x) = P_tuned(x) − P_base(x) of one group of inputs: its geometry, no vectors."""

    norms: tuple[float, ...]
    """Multiples of the typical norm."""
    names: tuple[str, ...]
    """Of the inputs."""
    gram: Tensor
    """⟨s, s'⟩ (norms · inputs)² fp64, all inputs at the first norm, then at the next."""
    size: Tensor
    """‖s(x)‖ (norms, inputs) fp64."""
    base: Tensor
    """‖P_base(x)‖ (norms, inputs) fp64."""

    def at(self, norm: float) -> int:
        """Index of that multiple of the typical norm."""
        return self.norms.index(norm)

    def between(self, norm: float, other: float) -> Tensor:
        """⟨s, s'⟩ (inputs²) between the shifts at two norms."""
        count = len(self.names)
        row, column = self.at(norm) * count, self.at(other) * count
        return self.gram[row : row + count, column : column + count]


@dataclass(frozen=True)
class Responses:
    """What one update, real or random, does to all groups of inputs."""

    groups: Mapping[str, Response]
    """`isotropic`; `singular` and `subspace` where ΔW1 has directions."""
    moved: Tensor
    """Leading directions of the shifts (≤ 5 × out), unit rows fp32 (see leading_shifts)."""
    written: Tensor
    """Leading left singular vectors of the last ΔW (≤ 5 × out), rows; none where it is zero."""


@dataclass(frozen=True)
class Probes:
    """The responses of the update and of random updates of the same base."""

    typical: float
    """Norm of the inputs that `norms` counts in."""
    norm_first: bool
    """The chain starts with a normalisation: an input's norm has no effect."""
    update: Responses
    nulls: Mapping[str, tuple[Responses, ...]]
    """Null kind -> draws."""


def typical_norm(update: ProjectorUpdate) -> float:
    """ρ = √(in·h) / ‖W1‖F of the base: isotropic inputs give first pre-activations of RMS 1.

    Data-free, as E‖W1x‖² = ρ²‖W1‖F²/in. There the activation leaves its linear part around zero;
    real features, whose directions are not isotropic, may be longer or shorter. Where a
    normalisation comes first the input's norm has no effect, and ρ = √in is what it puts out.
    """
    from projaudit.analyses.magnitude import frobenius

    weight = update.path[0].before
    if _norm_first(update):
        return math.sqrt(update.in_features)
    return math.sqrt(weight.numel()) / frobenius(weight)


def run_probes(update: ProjectorUpdate, budget: ProbeBudget = BUDGET) -> Probes:
    """Shifts of the update and of `2 × draws` random updates of the same base, on the same inputs.

    Nulls change every bias by the same norm in a random direction, and every layer by a ΔW of the
    same Frobenius norm: `equal_norm` Gaussian, `equal_spectrum` with the same leading singular
    values and a flat bulk. The probes along ΔW1 use each null's own directions.
    A norm's affine part is in the layer behind it (ProjectorUpdate folds it), or is changed by the
    same norm in a random direction, too.
    Shifts are propagated as differences, δ ← W0 δ + ΔW (h + δ), so that a small one does not drown
    in the rounding of two large outputs.
    Raises Skip where the projector's function is not known or differs by more than weights.
    """
    import torch

    _require(update)
    seed = int(torch.randint(2**62, (1,), generator=update.generator))
    generator = torch.Generator().manual_seed(seed)
    typical = typical_norm(update)
    changes = [real_change(update)]
    kinds = [kind for kind in ("equal_norm", "equal_spectrum") for _ in range(budget.draws)]
    changes += [random_change(update, kind, generator) for kind in kinds]
    like = update.path[0].before
    isotropic = unit(gaussian(budget.directions, update.in_features, like, generator))
    along = [aimed(change.read, budget, generator) for change in changes]
    inputs = [_grid(isotropic, NORMS)]
    inputs += [_grid(rows, AIMED_NORMS) for groups in along for rows in groups.values()]
    states = _states(update, torch.cat(inputs) * typical)
    common = len(inputs[0])
    found, start = [], common
    for change, groups in zip(changes, along, strict=True):
        stop = start + sum(len(rows) for rows in groups.values()) * len(AIMED_NORMS)
        own = [torch.cat([state[:common], state[start:stop]]) for state in states]
        found.append(_responses(update, change, own, {"isotropic": isotropic, **groups}))
        start = stop
    return Probes(
        typical=typical,
        norm_first=_norm_first(update),
        update=found[0],
        nulls={
            kind: tuple(r for r, k in zip(found[1:], kinds, strict=True) if k == kind)
            for kind in dict.fromkeys(kinds)
        },
    )


def _require(update: ProjectorUpdate) -> None:
    if update.nonfinite:
        raise Skip("the target's projector has NaN or Inf entries")
    if not update.chain:
        raise Skip("the projector's forward path is not known")
    if update.chain != update.base_chain:
        raise Skip(
            f"base and target compute different functions: {' → '.join(update.base_chain)} "
            f"and {' → '.join(update.chain)}"
        )
    for name in sorted(acts(update.chain) - activations().keys()):
        raise Skip(f"activation {name} is not known")
    weights = update.weights("before")
    for role in (role for step in update.chain for role in parse(step).roles):
        if f"{role}.weight" not in weights:
            raise Skip(f"{role} is in only one of base and target, or in another shape")


def _norm_first(update: ProjectorUpdate) -> bool:
    return parse(update.chain[0]).kind in ("norm", "rms", "rms1")


def aimed(read: Tensor, budget: ProbeBudget, generator: Generator) -> dict[str, Tensor]:
    """± the leading columns of `read`, and random unit vectors of their span: name -> rows."""
    if read.shape[1] == 0:
        return {}
    singular = read[:, : budget.singular].T
    mixed = gaussian(budget.subspace, read.shape[1], read, generator) @ read.T
    both = singular.repeat_interleave(2, dim=0)
    both[1::2] *= -1  # +v1, −v1, +v2, …: the order of input_names
    return {"singular": both, "subspace": unit(mixed)}


def input_names(group: str, count: int) -> tuple[str, ...]:
    """What the inputs of a group are called."""
    if group == "singular":
        return tuple(f"{'+-'[n % 2]}v{n // 2 + 1}" for n in range(count))
    return tuple(f"{group} {n + 1}" for n in range(count))


def _grid(rows: Tensor, norms: Sequence[float]) -> Tensor:
    """(norms · inputs × in): all rows at the first norm, then at the next."""
    scales = rows.new_tensor(norms)
    return (scales[:, None, None] * rows).flatten(0, 1)


def _states(update: ProjectorUpdate, inputs: Tensor) -> list[Tensor]:
    """What the base hands from step to step: the inputs, then the output of every step."""
    states, weights = [inputs], update.weights("before")
    for step in update.chain:
        states.append(forward((step,), weights, states[-1]))
    return states


def _responses(
    update: ProjectorUpdate, change: Change, states: list[Tensor], inputs: Mapping[str, Tensor]
) -> Responses:
    shift, base = _shift(update, change, states), states[-1]
    groups, high, start = {}, [], 0
    for name, rows in inputs.items():
        norms = NORMS if name == "isotropic" else AIMED_NORMS
        shape, stop = (len(norms), len(rows)), start + len(norms) * len(rows)
        part = shift[start:stop].double()
        gram = part @ part.T
        groups[name] = Response(
            norms,
            input_names(name, len(rows)),
            gram,
            gram.diagonal().sqrt().reshape(shape),
            base[start:stop].double().square().sum(-1).sqrt().reshape(shape),
        )
        if name != "subspace":
            high.append(part[-len(rows) :])
        start = stop
    return Responses(groups, leading_shifts(high), change.written.T)


def leading_shifts(groups: Sequence[Tensor]) -> Tensor:
    """(≤ 5 × out) leading right singular vectors of the unit shifts, of the rows of all groups.

    Uncentred; a sign is chosen so that the unit shifts lie on the + side on average.
    """
    import torch

    rows = torch.cat(list(groups))
    size = rows.square().sum(1).sqrt()
    usable = (size > 0) & torch.isfinite(size)
    if not bool(usable.any()):
        return rows[:0].float()
    rows = rows[usable] / size[usable][:, None]
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0)[:SUBSPACE_RANK], vectors.flip(1)[:, :SUBSPACE_RANK]
    kept = values > 1e-8 * values[0]
    turned = vectors[:, kept] * torch.where(vectors[:, kept].sum(0) < 0, -1.0, 1.0)
    directions: Tensor = (turned / values[kept].sqrt()).T @ rows
    return directions.float()


def _shift(update: ProjectorUpdate, change: Change, states: list[Tensor]) -> Tensor:
    """P_tuned(x) − P_base(x) (n × out), given what the base computes on the way."""
    weights = update.weights("before")
    delta: Tensor | None = None
    for step, before, after in zip(update.chain, states, states[1:], strict=False):
        delta = carried(step, weights, change.linear, change.vectors, before, after, delta)
    assert delta is not None
    return delta
