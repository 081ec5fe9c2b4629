"""A merge against all that it was made of: the nearest base, and what none of them explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from projaudit.metrics import Skip, Value, measures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Parents:
    """The tensors of one projector by role, fp32, and those of every base under the same roles."""

    target: Mapping[str, Tensor]
    bases: Sequence[tuple[str, Mapping[str, Tensor]]]
    """(name, tensors); two or more."""
    floor: float
    """Relative Frobenius norm of what storing the target has rounded off."""


@measures("merge", unit="ratio")
def merge_nearest(parents: Parents) -> Value:
    """min over the bases of ‖W − Wi‖F / ‖Wi‖F, all tensors of the projector together.

    `detail` names the bases, the nearest first.
    """
    target = _shared(parents)
    found = sorted((_distance(target, base), name) for name, base in parents.bases)
    return Value(found[0][0], tuple(f"{name}: {distance:.2%}" for distance, name in found))


@measures("merge", unit="ratio")
def merge_residual(parents: Parents) -> Value:
    """√Σ min_c ‖W − Σ ci Wi‖F² / √Σ ‖W‖F²: the part outside the span of the bases.

    The sum is over the tensors of the projector, each with coefficients of its own (least squares),
    as merges weigh layers differently. A linear merge leaves what storing it rounded off, which
    `detail` gives; methods that drop entries (TIES, DARE) leave more.
    """
    import torch

    outside = whole = 0.0
    weights: list[Tensor] = []
    for role, tensor in _shared(parents).items():
        columns = torch.stack([base[role].flatten().double() for _, base in parents.bases], dim=1)
        wanted = tensor.flatten().double()
        # By the Gram matrix's pseudo-inverse: bases may be alike, and columns are long.
        gram = torch.linalg.pinv(columns.T @ columns, rcond=1e-10, hermitian=True)
        coefficients = gram @ (columns.T @ wanted)
        outside += float((wanted - columns @ coefficients).square().sum())
        whole += float(wanted.square().sum())
        if tensor.ndim == 2:
            weights.append(coefficients)
    if not whole:
        raise Skip("the projector is zero throughout")
    mean = torch.stack(weights).mean(0).tolist() if weights else []
    shares = [f"{name}: {c:.3f}" for (name, _), c in zip(parents.bases, mean, strict=False)]
    return Value((outside / whole) ** 0.5, (*shares, f"rounding: {parents.floor:.2%}"))


def _shared(parents: Parents) -> dict[str, Tensor]:
    """What the target and every base have; what one of them lacks is a finding of its own."""
    return {
        role: tensor
        for role, tensor in parents.target.items()
        if all(role in base for _, base in parents.bases)
    }


def _distance(target: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    apart = sum(float((t.double() - base[role]).square().sum()) for role, t in target.items())
    size = sum(float(base[role].double().square().sum()) for role in target)
    return (apart / size) ** 0.5 if size else float("inf")
