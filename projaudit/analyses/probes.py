"""What the update does to outputs: base and tuned projector on the same synthetic inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from projaudit.analyses.nulls import null_of
from projaudit.analyses.responses import AIMED_NORMS, NORMS, Response, Responses
from projaudit.findings import Series
from projaudit.metrics import Skip, Value, measures

if TYPE_CHECKING:
    from torch import Tensor

    from projaudit.analyses.context import ProjectorContext

_PROJLENS = "ProjLens, arXiv:2604.19083, §1.3"


@measures("projector", unit="ratio", reference=_PROJLENS)
def shift_magnitude(ctx: ProjectorContext) -> Value:
    """median ‖s(x)‖ / ‖P_base(x)‖ over isotropic x of typical norm, s = P_tuned − P_base"""
    return _beside_nulls(ctx, "isotropic", partial(_relative, norm=1.0))


@measures("projector", unit="ratio", reference=_PROJLENS)
def shift_magnitude_high(ctx: ProjectorContext) -> Value:
    """median ‖s(x)‖ / ‖P_base(x)‖ over isotropic x of 16 times the typical norm"""
    _needs_norms(ctx)
    return _beside_nulls(ctx, "isotropic", partial(_relative, norm=NORMS[-1]))


@measures("projector", reference="ProjLens, arXiv:2604.19083, §1.5")
def shift_slope(ctx: ProjectorContext) -> Value:
    """Least-squares slope of ln ‖s(x)‖ against ln ‖x‖, isotropic x of ½ to 16 times typical norm.

    1: the shift is proportional to its input; 0: it is the same for every one, as a bias makes it.
    """
    _needs_norms(ctx)
    return _beside_nulls(ctx, "isotropic", _slope)


@measures("projector", reference="ProjLens, arXiv:2604.19083, §1.5")
def shift_slope_r2(ctx: ProjectorContext) -> Value:
    """r² of the line behind `shift_slope`, over all inputs and norms"""
    _needs_norms(ctx)
    return _beside_nulls(ctx, "isotropic", _fit)


@measures("projector", reference=_PROJLENS)
def shift_concentration(ctx: ProjectorContext) -> Value:
    """‖mean of s(x)/‖s(x)‖‖ over isotropic x of typical norm; 1: all are pushed the same way.

    A random update has one well above 1/√inputs, too, as activations have a positive mean.
    """
    return _beside_nulls(ctx, "isotropic", partial(_concentration, norm=1.0))


@measures("projector", unit="fraction", reference=_PROJLENS)
def shift_energy_top1(ctx: ProjectorContext) -> Value:
    """Σ_{i≤1} σi² / Σ σi² of the shifts at typical norm (24 isotropic inputs × out, uncentred)"""
    return _beside_nulls(ctx, "isotropic", partial(_energy, k=1))


@measures("projector", unit="fraction", reference=_PROJLENS)
def shift_energy_top2(ctx: ProjectorContext) -> Value:
    """Σ_{i≤2} σi² / Σ σi² of the shifts at typical norm (24 isotropic inputs × out, uncentred)"""
    return _beside_nulls(ctx, "isotropic", partial(_energy, k=2))


@measures("projector", unit="fraction", reference=_PROJLENS)
def shift_energy_top5(ctx: ProjectorContext) -> Value:
    """Σ_{i≤5} σi² / Σ σi² of the shifts at typical norm (24 isotropic inputs × out, uncentred)"""
    return _beside_nulls(ctx, "isotropic", partial(_energy, k=5))


@measures("projector", unit="1 − cosine", reference=_PROJLENS)
def shift_rotation(ctx: ProjectorContext) -> Value:
    """1 − cos(mean of s/‖s‖ at ½, mean of s/‖s‖ at 16 times the typical norm), isotropic x"""
    _needs_norms(ctx)
    return _beside_nulls(ctx, "isotropic", _rotation)


@measures("projector", unit="ratio")
def singular_shift_magnitude(ctx: ProjectorContext) -> Value:
    """max ‖s(x)‖ / ‖P_base(x)‖ over x = ± the 2 top right singular vectors of ΔW1, typical norm"""
    return _largest(ctx, 1.0)


@measures("projector", unit="ratio")
def singular_shift_magnitude_high(ctx: ProjectorContext) -> Value:
    """max ‖s(x)‖ / ‖P_base(x)‖ over x = ± the 2 top right singular vectors of ΔW1, 16 × typical"""
    _needs_norms(ctx)
    return _largest(ctx, AIMED_NORMS[-1])


@measures("projector", unit="ratio")
def subspace_shift_magnitude(ctx: ProjectorContext) -> Value:
    """median ‖s(x)‖ / ‖P_base(x)‖ over random x of ΔW1's top-5 right subspace, typical norm"""
    return _beside_nulls(ctx, "subspace", partial(_relative, norm=1.0))


@measures("projector", unit="fraction")
def subspace_shift_energy_top1(ctx: ProjectorContext) -> Value:
    """σ1² / Σ σi² of the shifts of 8 random x of ΔW1's top-5 right subspace, typical norm.

    Whatever the change reads in these directions, does it write one answer (of either sign)?
    """
    return _beside_nulls(ctx, "subspace", partial(_energy, k=1))


def series(ctx: ProjectorContext) -> tuple[Series, ...]:
    """Chart `response`: median relative shift of isotropic inputs against their norm, and nulls."""

    def curve(responses: Responses) -> list[float]:
        response = responses.groups["isotropic"]
        medians: list[float] = (response.size / response.base).median(dim=1).values.tolist()
        return medians

    try:
        probes = ctx.probes
    except Skip:
        return ()
    curves = {"update": curve(probes.update)}
    for kind, draws in probes.nulls.items():
        found = [curve(draw) for draw in draws]
        label = f"null: {kind.replace('_', ' ')}"
        curves[label] = [sum(at) / len(found) for at in zip(*found, strict=True)]
    return tuple(
        Series("response", ctx.update.subject, label, NORMS, tuple(y))
        for label, y in curves.items()
        if all(math.isfinite(value) for value in y)
    )


# --- statistics of one response -------------------------------------------------------------------


def _needs_norms(ctx: ProjectorContext) -> None:
    if ctx.probes.norm_first:
        raise Skip("the projector normalises its input, so the input's norm has no effect")


def _beside_nulls(
    ctx: ProjectorContext, group: str, statistic: Callable[[Response], float]
) -> Value:
    """The statistic of the update and what it is for the random updates."""
    probes = ctx.probes
    if group not in probes.update.groups:
        raise Skip(
            "what reads the inputs did not change, or is a convolution: it has no directions"
        )
    value = statistic(probes.update.groups[group])
    if not math.isfinite(value):
        raise Skip("an output overflows float32, or the base's output is zero")
    nulls = (
        null_of(kind, _each(statistic, (draw.groups[group] for draw in draws)))
        for kind, draws in probes.nulls.items()
    )
    return Value(value, nulls=tuple(null for null in nulls if null is not None))


def _each(statistic: Callable[[Response], float], responses: Iterable[Response]) -> list[float]:
    found = []
    for response in responses:
        try:
            found.append(statistic(response))
        except Skip:  # what the update does and this draw does not: a shift
            continue
    return found


def _relative(response: Response, norm: float) -> float:
    at = response.at(norm)
    return float((response.size[at] / response.base[at]).median())


def _largest(ctx: ProjectorContext, norm: float) -> Value:
    def largest(response: Response) -> float:
        at = response.at(norm)
        return float((response.size[at] / response.base[at]).max())

    value = _beside_nulls(ctx, "singular", largest)
    response = ctx.probes.update.groups["singular"]
    at = response.at(norm)
    place = int((response.size[at] / response.base[at]).argmax())
    return Value(value.value, (response.names[place],), value.nulls)


def _logs(response: Response) -> tuple[Tensor, Tensor]:
    """(ln of the input norm, ln ‖s‖), centred, over all inputs that are moved at all."""
    norms = response.size.new_tensor(response.norms).log()[:, None].expand_as(response.size)
    moved = ~(response.size == 0)  # NaN stays, and shows as overflow
    x, y = norms[moved], response.size[moved].log()
    if len(x) < 2 or float(x.max()) == float(x.min()):
        raise Skip("the update does not move the output")
    return x - x.mean(), y - y.mean()


def _slope(response: Response) -> float:
    x, y = _logs(response)
    return _rounded(float((x * y).sum() / x.square().sum()))


def _fit(response: Response) -> float:
    x, y = _logs(response)
    total = float(y.square().sum())
    if total < 1e-10 * len(y):
        raise Skip("the shift is the same for every input")
    slope = float((x * y).sum() / x.square().sum())
    return _rounded(1 - float((y - slope * x).square().sum()) / total)


def _cosines(response: Response, norm: float, other: float) -> Tensor:
    """⟨s/‖s‖, s'/‖s'‖⟩ (inputs²) between two norms, of the inputs that are moved at all."""
    sizes = response.size[response.at(norm)], response.size[response.at(other)]
    moved = ~((sizes[0] == 0) | (sizes[1] == 0))  # NaN stays, and shows as overflow
    if int(moved.sum()) < 2:
        raise Skip("the update does not move the output")
    inner = response.between(norm, other)[moved][:, moved]
    return inner / (sizes[0][moved][:, None] * sizes[1][moved])


def _concentration(response: Response, norm: float) -> float:
    return _rounded(float(_cosines(response, norm, norm).mean().clamp_min(0).sqrt()))


def _energy(response: Response, k: int) -> float:
    import torch

    gram = response.between(1.0, 1.0)
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    if not bool(gram.any()):
        raise Skip("the update does not move the output")
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return _rounded(float(energies[:k].sum() / energies.sum()))


def _rotation(response: Response) -> float:
    low, high = NORMS[0], NORMS[-1]
    means = _cosines(response, low, low).mean() * _cosines(response, high, high).mean()
    return _rounded(1 - float(_cosines(response, low, high).mean() / means.sqrt()))


def _rounded(value: float) -> float:
    """To 6 decimals: below that, cosines and fractions of float32 shifts are rounding noise."""
    return round(value, 6) + 0.0 if math.isfinite(value) else value
