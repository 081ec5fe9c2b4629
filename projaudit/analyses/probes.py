"""What the update does to outputs: base and tuned projector on the same synthetic inputs.

Every probe stands beside random updates of the same base (`nulls`), so that its z-score needs no
calibration. Any training is far from random: an honest fine-tune has high scores, too.
Inputs are synthetic: what a projector does on a real model's features, or to a trigger that lies in
none of these directions, is not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from projaudit.analyses.subspace import SUBSPACE_RANK
from projaudit.findings import Null, Series
from projaudit.metrics import Skip, Value, measures
from projaudit.projector import activations, forward

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from projaudit.analyses.context import ProjectorContext
    from projaudit.update import LayerUpdate, ProjectorUpdate

NORMS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Input norms of the isotropic probes, in multiples of the typical one (see typical_norm)."""

AIMED_NORMS = (1.0, 16.0)
"""Those of the probes along ΔW1's own directions."""

_JITTER = 1e-10  # of the Gram matrix of unit rows: a relative error of 1e-5 where rows are parallel
_PROJLENS = "ProjLens, arXiv:2604.19083, §1.3"


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


@dataclass(frozen=True)
class _Change:
    """An update as the probes apply it: no dense matrix unless it is the real one."""

    linear: Mapping[str, Callable[[Tensor], Tensor]]
    """Role -> x ↦ ΔW x + Δb (rows are inputs). A random one may be called only once."""
    read: Tensor
    """Leading right singular vectors of ΔW1 (in × r)."""
    written: Tensor


# --- the probes -----------------------------------------------------------------------------------


def typical_norm(update: ProjectorUpdate) -> float:
    """ρ = √(in·h) / ‖W1‖F of the base: isotropic inputs give first pre-activations of RMS 1.

    Data-free, as E‖W1x‖² = ρ²‖W1‖F²/in. There the activation leaves its linear part around zero;
    real features, whose directions are not isotropic, may be longer or shorter. Where a
    normalisation comes first the input's norm has no effect, and ρ = √in is what it puts out.
    """
    from projaudit.analyses.magnitude import frobenius

    weight = update.layers[0].before
    if _norm_first(update):
        return math.sqrt(update.in_features)
    return math.sqrt(weight.numel()) / frobenius(weight)


def run_probes(update: ProjectorUpdate, budget: ProbeBudget = BUDGET) -> Probes:
    """Shifts of the update and of `2 × draws` random updates of the same base, on the same inputs.

    Nulls change every bias by the same norm in a random direction, and every layer by a ΔW of the
    same Frobenius norm: `equal_norm` Gaussian, `equal_spectrum` with the same leading singular
    values and a flat bulk. The probes along ΔW1 use each null's own directions.
    Steps other than linear layers are the same on both sides (ProjectorUpdate folds a norm's
    affine part into the layer behind it).
    Shifts are propagated as differences, δ ← W0 δ + ΔW (h + δ), so that a small one does not drown
    in the rounding of two large outputs.
    Raises Skip where the projector's function is not known or differs by more than weights.
    """
    import torch

    _require(update)
    seed = int(torch.randint(2**62, (1,), generator=update.generator))
    generator = torch.Generator().manual_seed(seed)
    typical = typical_norm(update)
    changes = [_real(update)]
    kinds = [kind for kind in ("equal_norm", "equal_spectrum") for _ in range(budget.draws)]
    changes += [_random(update, kind, generator) for kind in kinds]
    like = update.layers[0].before
    isotropic = _unit(_gaussian(budget.directions, update.in_features, like, generator))
    aimed = [_aimed(change.read, budget, generator) for change in changes]
    inputs = [_grid(isotropic, NORMS)]
    inputs += [_grid(rows, AIMED_NORMS) for groups in aimed for rows in groups.values()]
    states = _states(update, torch.cat(inputs) * typical)
    common = len(inputs[0])
    found, start = [], common
    for change, groups in zip(changes, aimed, strict=True):
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
    known = activations()
    for step in update.chain:
        if step.startswith("act:") and step[4:] not in known:
            raise Skip(f"activation {step[4:]} is not known")
    weights = update.weights("before")
    for step in update.chain:
        if not step.startswith("act:") and f"{step}.weight" not in weights:
            raise Skip(f"{step} is in only one of base and target, or in another shape")


def _norm_first(update: ProjectorUpdate) -> bool:
    return update.chain[0] not in {layer.role for layer in update.layers}


def _aimed(read: Tensor, budget: ProbeBudget, generator: Generator) -> dict[str, Tensor]:
    """± the leading columns of `read`, and random unit vectors of their span: name -> rows."""
    if read.shape[1] == 0:
        return {}
    singular = read[:, : budget.singular].T
    mixed = _gaussian(budget.subspace, read.shape[1], read, generator) @ read.T
    both = singular.repeat_interleave(2, dim=0)
    both[1::2] *= -1  # +v1, −v1, +v2, …: the order of _names
    return {"singular": both, "subspace": _unit(mixed)}


def _names(group: str, count: int) -> tuple[str, ...]:
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
    update: ProjectorUpdate, change: _Change, states: list[Tensor], inputs: Mapping[str, Tensor]
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
            _names(name, len(rows)),
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


def _shift(update: ProjectorUpdate, change: _Change, states: list[Tensor]) -> Tensor:
    """P_tuned(x) − P_base(x) (n × out), given what the base computes on the way."""
    weights, delta = update.weights("before"), None
    for step, before, after in zip(update.chain, states, states[1:], strict=False):
        moved = before if delta is None else before + delta
        if step in change.linear:
            own = change.linear[step](moved)
            delta = own if delta is None else own + delta @ weights[f"{step}.weight"].T
        else:
            delta = forward((step,), weights, moved) - after
    assert delta is not None
    return delta


# --- updates --------------------------------------------------------------------------------------


def _real(update: ProjectorUpdate) -> _Change:
    return _Change(
        linear={
            layer.role: partial(_dense, layer.delta, _bias_delta(layer)) for layer in update.layers
        },
        read=leading(update.layers[0]),
        written=leading(update.layers[-1], left=True),
    )


def _random(update: ProjectorUpdate, kind: str, generator: Generator) -> _Change:
    from projaudit.linalg import random_orthonormal

    linear: dict[str, Callable[[Tensor], Tensor]] = {}
    read, written = [], []
    for layer in update.layers:
        m, n = layer.before.shape
        values = (
            layer.spectrum.values
            if kind == "equal_spectrum"
            else gaussian_values(m, n, layer.spectrum.frobenius, SUBSPACE_RANK)
        ).to(layer.before)
        k = len(values)
        left = random_orthonormal(m, k, generator=generator).to(layer.before)
        right = random_orthonormal(n, k, generator=generator).to(layer.before)
        energy = layer.spectrum.frobenius**2 - float(values.double().square().sum())
        spread = math.sqrt(max(energy, 0.0) / max((m - k) * (n - k), 1))
        bias = _bias_delta(layer)
        if bias is not None:
            bias = _redirected(bias, generator)
        linear[layer.role] = partial(
            random_action, left, values, right, spread, bias, generator=generator
        )
        read.append(right[:, : leading(layer).shape[1]])
        written.append(left[:, : leading(layer, left=True).shape[1]])
    return _Change(linear, read[0], written[-1])


def random_action(
    left: Tensor,
    values: Tensor,
    right: Tensor,
    spread: float,
    bias: Tensor | None,
    x: Tensor,
    *,
    generator: Generator,
) -> Tensor:
    """ΔW x + Δb for ΔW = left·diag(values)·rightᵀ + (I − P) G (I − Q), Gᵢⱼ ~ N(0, spread²), unseen.

    On fixed inputs X (n × in) G acts as Z·chol(XXᵀ)ᵀ with Z (out × n) standard normal: equal in
    distribution to a dense draw, at n columns instead of `in`. P and Q project on left and right,
    so that these are singular vectors of ΔW. One call is one ΔW: all inputs have to come in it.
    """
    import torch

    along = x @ right
    if not bool(torch.isfinite(x).all()):
        return x.new_full((len(x), len(left)), math.nan)
    rest = x.double()
    rest = rest - (rest @ right.double()) @ right.double().T
    length = rest.square().sum(1, keepdim=True).sqrt()
    rest = rest / length.clamp_min(torch.finfo(torch.float64).tiny)
    gram = rest @ rest.T
    gram.diagonal().add_(_JITTER)
    mixing = torch.linalg.cholesky(gram) * (spread * length)
    bulk = mixing.to(x.dtype) @ _gaussian(len(x), left.shape[0], x, generator)
    bulk = bulk - (bulk @ left) @ left.T
    moved: Tensor = bulk + (along * values) @ left.T
    return moved if bias is None else moved + bias


def gaussian_values(m: int, n: int, frobenius: float, k: int) -> Tensor:
    """(min(k, m, n),) leading singular values of an m × n Gaussian matrix of that Frobenius norm.

    Quantiles (i − ½)/min(m, n) of the Marchenko–Pastur law, from above; they fluctuate by the
    relative order min(m, n)^(−2/3), which is left out.
    """
    import torch

    from projaudit.linalg import marchenko_pastur_density, marchenko_pastur_edge

    least = min(m, n)
    sigma = frobenius / math.sqrt(m * n)
    if sigma == 0.0 or least == 1:
        return torch.full((1,), frobenius, dtype=torch.float64)
    low, high = sigma * abs(math.sqrt(m) - math.sqrt(n)), marchenko_pastur_edge(sigma, m, n)
    # x = high − (high − low)·t² turns the square root of the density at the edge into a smooth one
    t = torch.linspace(0, 1, 4097, dtype=torch.float64)
    x = high - (high - low) * t.square()
    density = marchenko_pastur_density(x, sigma, m, n) * t
    above = torch.cumulative_trapezoid(density, t)
    above = torch.cat([above.new_zeros(1), above / above[-1]])
    wanted = (torch.arange(min(k, least), dtype=torch.float64) + 0.5) / least
    values = x[torch.searchsorted(above, wanted).clamp_max(len(x) - 1)]
    return values * min(1.0, frobenius / float(values.square().sum().sqrt()))


def _dense(delta: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    moved = x @ delta.T
    return moved if bias is None else moved + bias


def _bias_delta(layer: LayerUpdate) -> Tensor | None:
    """b1 − b0; a bias that one side lacks counts as zero. None where both lack it."""
    if layer.before_bias is None:
        return layer.after_bias
    return -layer.before_bias if layer.after_bias is None else layer.after_bias - layer.before_bias


def leading(layer: LayerUpdate, *, left: bool = False) -> Tensor:
    """(in × r), (out × r) for `left`: at most 5 leading vectors of ΔW, values beyond rounding."""
    spectrum = layer.spectrum
    top = float(spectrum.values[0])
    count = int((spectrum.values[:SUBSPACE_RANK] > 1e-4 * top).sum()) if top > 0 else 0
    return (spectrum.left if left else spectrum.right)[:, :count]


def _gaussian(rows: int, columns: int, like: Tensor, generator: Generator) -> Tensor:
    import torch

    return torch.randn(rows, columns, generator=generator).to(like)


def _redirected(vector: Tensor, generator: Generator) -> Tensor:
    """A random vector of the same norm."""
    redirected: Tensor = _unit(_gaussian(1, len(vector), vector, generator))[0]
    return redirected * vector.square().sum().sqrt()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(1, keepdim=True).sqrt()


# --- metrics --------------------------------------------------------------------------------------


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
        raise Skip("the first layer's weight did not change, so it has no directions")
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


def null_of(kind: str, values: Sequence[float]) -> Null | None:
    """Mean and standard deviation (n − 1) of a statistic over random updates; None below two."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return None
    mean = sum(finite) / len(finite)
    square = sum((value - mean) ** 2 for value in finite) / (len(finite) - 1)
    # where nothing varies but float32 rounding there is no z-score to be had
    sd = math.sqrt(square) if math.sqrt(square) > 1e-6 * abs(mean) else 0.0
    return Null(kind, mean, sd, len(finite))


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
