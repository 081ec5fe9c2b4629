"""The probes of a projector that mixes tokens: transformers' own module, given sets of them.

As `probes`, with a set of tokens for an input: all of one norm, and all outputs of a set are one
shift. Base and tuned are run in float64 and subtracted, since no chain says how to carry a
difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from projaudit.analyses.nulls import Moved, gaussian, random_weights, real_weights, unit
from projaudit.analyses.responses import (
    AIMED_NORMS,
    NORMS,
    ProbeBudget,
    Probes,
    Response,
    Responses,
    aimed,
    input_names,
    leading_shifts,
)
from projaudit.errors import UnsupportedError
from projaudit.metrics import Skip

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Generator, Tensor

    from projaudit.analyses.context import ProjectorContext
    from projaudit.module import Module
    from projaudit.update import ProjectorUpdate

BUDGET = ProbeBudget(directions=6, singular=2, subspace=4, draws=4)
"""52 sets × 9 updates: a set costs what a picture costs. With 4 draws a z-score has Student's t
with 3 degrees of freedom, times 1.12: |z| > 3.6 in 5 % of ordinary updates."""

_AT_ONCE = 2048
"""Tokens and outputs that are run at once."""
_STILL = 1e-3
"""Relative change of the base's outputs from which the norm of its inputs has an effect."""


def run_set_probes(ctx: ProjectorContext, budget: ProbeBudget = BUDGET) -> Probes:
    """Shifts of the update and of `2 × draws` random updates of the same base, on sets of tokens.

    The tokens of an isotropic set are independent; those of an aimed one are all ± the same leading
    right singular vector of the layer that reads them, or random vectors of their span. Nulls move
    every tensor by the same norm, queries and norms too. Raises Skip where the module cannot be
    run, or the two configs make different functions of the same weights.
    """
    import torch

    update = ctx.update
    if update.nonfinite:
        raise Skip("the target's projector has NaN or Inf entries")
    tuned, base = ctx.modules
    seed = int(torch.randint(2**62, (1,), generator=update.generator))
    generator = torch.Generator().manual_seed(seed)
    typical = _typical(update, tuned)
    like, width = update.path[0].before, tuned.width
    before = update.weights("before")
    count = budget.directions
    rows = unit(gaussian(count * tuned.tokens, width, like, generator))
    groups = {"isotropic": rows.reshape(count, -1, width)}
    try:
        sample = base(before, groups["isotropic"] * typical)
        if not torch.equal(sample, tuned(before, groups["isotropic"] * typical)):
            raise Skip("base and target compute different functions of the same weights")
        chunk = max(1, _AT_ONCE // (tuned.tokens + sample.shape[1]))
        kinds = [kind for kind in ("equal_norm", "equal_spectrum") for _ in range(budget.draws)]
        run = _Run(tuned, before, typical, chunk, {})
        found = []
        for kind in ["", *kinds]:
            moved = random_weights(update, kind, generator) if kind else real_weights(update)
            inputs = groups | _aimed(moved.read, tuned, budget, generator)
            found.append(_responses(run, moved, inputs))
    except UnsupportedError as error:
        raise Skip(error.message) from None
    low, high = run.common["isotropic"][:count], run.common["isotropic"][-count:]
    return Probes(
        typical=typical,
        norm_first=float((high - low).norm()) < _STILL * float(high.norm()),
        update=found[0],
        nulls={
            kind: tuple(r for r, k in zip(found[1:], kinds, strict=True) if k == kind)
            for kind in dict.fromkeys(kinds)
        },
    )


def _typical(update: ProjectorUpdate, module: Module) -> float:
    """ρ = √(in·h) / ‖W1‖F: isotropic tokens give pre-activations of RMS 1 in what reads them."""
    from projaudit.analyses.magnitude import frobenius

    first = update.path[0].before
    return math.sqrt(module.width * first.shape[0]) / frobenius(first)


def _aimed(
    read: Tensor, module: Module, budget: ProbeBudget, generator: Generator
) -> dict[str, Tensor]:
    """The aimed sets (sets × tokens × width); none where that layer does not read single tokens."""
    import torch

    if read.shape[0] > module.width:
        return {}
    read = torch.nn.functional.pad(read, (0, 0, 0, module.width - read.shape[0]))
    return {
        name: rows[:, None].expand(-1, module.tokens, -1)
        for name, rows in aimed(read, budget, generator).items()
    }


@dataclass(frozen=True)
class _Run:
    """What all updates have in common."""

    module: Module
    before: Mapping[str, Tensor]
    typical: float
    chunk: int
    """Sets that are run at once."""
    common: dict[str, Tensor]
    """The base's outputs of the isotropic sets, once they are known."""


def _responses(run: _Run, moved: Moved, inputs: Mapping[str, Tensor]) -> Responses:
    """What an update does to all sets."""
    import torch

    groups, high = {}, []
    for name, sets in inputs.items():
        norms = NORMS if name == "isotropic" else AIMED_NORMS
        x = torch.cat([sets * (run.typical * norm) for norm in norms])
        parts = torch.split(x, run.chunk)
        old = run.common.get(name)
        if old is None:
            old = torch.cat([run.module(run.before, part) for part in parts])
        new = torch.cat([run.module(moved.weights, part) for part in parts])
        if name == "isotropic":
            run.common[name] = old
        shift = new - old
        flat = shift.flatten(1)
        gram = flat @ flat.T
        shape = (len(norms), len(sets))
        groups[name] = Response(
            norms,
            input_names(name, len(sets)),
            gram,
            gram.diagonal().sqrt().reshape(shape),
            old.flatten(1).square().sum(-1).sqrt().reshape(shape),
        )
        if name != "subspace":
            high.append(shift[-len(sets) :].mean(1))
    return Responses(groups, leading_shifts(high), moved.written.T)
