"""What storage does to the difference of two tensors: dtypes, and the steps of quantisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from projaudit.lanczos import frobenius

# Explicit mantissa bits of each storage dtype, and the exponent below which its ulp is constant.
_MANTISSA: Mapping[torch.dtype, tuple[int, int]] = {
    torch.float64: (52, -1022),
    torch.float32: (23, -126),
    torch.float16: (10, -14),
    torch.bfloat16: (7, -126),
    torch.float8_e4m3fn: (3, -6),
    torch.float8_e5m2: (2, -14),
}
_BLOCK = 1 << 22  # entries handled at once, so that no whole matrix is copied
_SLACK = 1.01  # of half a step: scales are rounded themselves
_EXPONENTS = 512  # binary exponents of float32, from −256 up


class Rounding(NamedTuple):
    """What storage alone does to the difference of two tensors."""

    changed: float
    """Share of the entries that moved beyond it."""
    floor: float
    """Frobenius norm of a difference that is nothing else, over ‖W0‖F."""
    edge: float = 0.0
    """Bound of that difference's spectral norm, over ‖W0‖F; only of quantised tensors."""
    quantised: bool = False


def rounding(
    before: Tensor,
    after: Tensor,
    before_step: Tensor | None = None,
    after_step: Tensor | None = None,
) -> Rounding:
    """What storage does to the difference of two tensors of equal shape, of any float dtypes.

    An entry is unchanged where both sides round to the same value of the coarser dtype. The floor
    is √(Σ ulp²/12) / ‖W0‖F with the ulp of each rounding that lies between the two: one where both
    are stored alike, one per side otherwise (uniform rounding error, variance ulp²/12). The steps
    of a quantised side stand in place of its ulps.
    """
    if before_step is not None or after_step is not None or _is_f8(before) or _is_f8(after):
        return _quantised_rounding(before, after, before_step, after_step)
    coarse = min((before.dtype, after.dtype), key=lambda dtype: _MANTISSA[dtype][0])
    same = before.dtype == after.dtype
    changed = 0
    exponents = torch.zeros(_EXPONENTS, dtype=torch.int64)
    flat_before, flat_after = before.reshape(-1), after.reshape(-1)
    for start in range(0, flat_before.numel(), _BLOCK):
        old, new = flat_before[start : start + _BLOCK], flat_after[start : start + _BLOCK]
        moved = old != new if same else _round(old, coarse) != _round(new, coarse)
        changed += int(torch.count_nonzero(moved))
        binary = torch.frexp(new.float()).exponent + _EXPONENTS // 2
        exponents += torch.bincount(binary.clamp_min(0), minlength=_EXPONENTS)
    error = 0.0
    for dtype in {before.dtype, after.dtype}:
        bits, least = _MANTISSA[dtype]
        for exponent, count in enumerate(exponents.tolist()):
            if count:
                ulp = 2.0 ** (max(exponent - _EXPONENTS // 2 - 1, least) - bits)
                error += count * ulp * ulp / 12
    size = frobenius(before.float())
    floor = error**0.5 / size if size else float("inf")
    return Rounding(changed / max(before.numel(), 1), floor)


def _is_f8(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1


def _quantised_rounding(
    before: Tensor, after: Tensor, before_step: Tensor | None, after_step: Tensor | None
) -> Rounding:
    """`rounding` where a side was quantised: entry by entry, with the step of each.

    An entry is unchanged where both may be the rounding of one value: they lie no further apart
    than half the coarser step and, where the steps differ, half the finer one. The edge is that of
    independent errors of unequal variance, √(max row sum) + √(max column sum) (Latała 2005; equal
    variances give σ(√m + √n)).
    """
    rows = before.shape[0] if before.ndim else 1
    old, new = before.reshape(rows, -1), after.reshape(rows, -1)
    old_step, new_step = (
        None if step is None else step.reshape(rows, -1) for step in (before_step, after_step)
    )
    columns = torch.zeros(old.shape[1], dtype=torch.float64)
    highest, total, changed = 0.0, 0.0, 0
    block = max(1, _BLOCK // max(old.shape[1], 1))
    for start in range(0, rows, block):
        part = slice(start, start + block)
        one = _spacing(old[part], old_step, part)
        other = _spacing(new[part], new_step, part)
        alike = one == other
        coarse, fine = torch.maximum(one, other), torch.minimum(one, other)
        reach = (coarse + torch.where(alike, 0.0, fine)) / 2 * _SLACK
        changed += int(torch.count_nonzero((new[part].double() - old[part].double()).abs() > reach))
        variance = (coarse.square() + torch.where(alike, 0.0, fine.square())) / 12
        columns += variance.sum(dim=0)
        sums = variance.sum(dim=1)
        total += float(sums.sum())
        highest = max(highest, float(sums.max()) if len(sums) else 0.0)
    size = frobenius(before.float())
    widest = float(columns.max()) if len(columns) else 0.0
    norms = (total**0.5, highest**0.5 + widest**0.5)
    floor, edge = (norm / size if size else float("inf") for norm in norms)
    return Rounding(changed / max(before.numel(), 1), floor, edge, quantised=True)


def _spacing(values: Tensor, steps: Tensor | None, part: slice) -> Tensor:
    """The step of each value in float64: as given, else the ulp of its dtype."""
    if steps is not None:
        return steps[part].double()
    bits, least = _MANTISSA[values.dtype]
    exponent = (torch.frexp(values.double()).exponent - 1).clamp_min(least) - bits
    return exponent.double().exp2()


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as they come out of that dtype; torch casts to float8 only from float32."""
    return values.to(dtype if dtype == torch.float64 else torch.float32).to(dtype).float()
