"""The update: base and tuned projector paired by role, brought to fp32, aligned, and subtracted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from projaudit import align
from projaudit.chain import Hidden, affine_norms, hidden, linear_roles, parse
from projaudit.errors import BaseError, UnsupportedError
from projaudit.inert import clean
from projaudit.lanczos import frobenius
from projaudit.linalg import BLOCK, Spectrum, Triplets, leading, spectrum, spectrum_of_product
from projaudit.projector import Projector

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
_GREATEST = 3e38  # where differences begin to leave float32
_ZERO = 1e-20  # a layer whose greatest weight is below this computes nothing
_SLACK = 1.01  # of half a step: scales are rounded themselves
_EXPONENTS = 512  # binary exponents of float32, from −256 up

EmbeddingRows = Callable[[], tuple[Tensor, Tensor] | None]
"""Gives the same embedding rows (n × d, fp32) of base and target, None where they have none."""


@dataclass(frozen=True)
class Factors:
    """ΔW of one layer as a product (out × r, r × in), as an adapter of low rank gives it."""

    left: Tensor
    right: Tensor
    ends: tuple[Tensor, Tensor]
    """The very W0 and W1 whose difference it is: of no layer that was folded or aligned since."""


@dataclass(frozen=True)
class LayerUpdate:
    """One linear layer before and after: fp32 on the measuring device."""

    role: str
    subject: str
    before: Tensor
    """W0 (out × in)."""
    after: Tensor
    """W1 (out × in), aligned."""
    before_bias: Tensor | None
    after_bias: Tensor | None
    changed_fraction: float
    """Share of the weights that moved beyond the rounding of the coarser storage dtype."""
    rounding_floor: float
    """Relative Frobenius norm of an update that is storage rounding and nothing else."""
    rank: int
    """How many leading singular values are asked for."""
    generator: torch.Generator
    permuted_units: int = 0
    rescaled_units: int = 0
    rotated: bool = False
    quantised: bool = False
    """Whether either side was stored in codes: 8 bits or less to a weight."""
    rounding_edge: float = 0.0
    """Where the singular values of the rounding of quantised sides end, over ‖W0‖F."""
    calibrated: bool = False
    """Whether a side may hold other values than the nearest, so that its rounding is larger."""
    factors: Factors | None = None

    @cached_property
    def delta(self) -> Tensor:
        """ΔW = W1 − W0 (out × in)."""
        return self.after - self.before

    @cached_property
    def spectrum(self) -> Spectrum:
        """Leading singular triplets of ΔW, its noise edge and norms."""
        k, factors = min(self.rank, *self.before.shape), self.factors
        if factors is not None and factors.ends[0] is self.before and factors.ends[1] is self.after:
            return spectrum_of_product(factors.left, factors.right, k, generator=self.generator)
        return spectrum(self.delta, k, generator=self.generator)

    @cached_property
    def leading_base(self) -> Triplets:
        """Leading singular triplets of W0."""
        return leading(self.before, BLOCK, generator=self.generator)


@dataclass(frozen=True)
class VectorUpdate:
    """A 1-D tensor before and after (bias, norm, image_newline), fp32."""

    role: str
    subject: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class ProjectorUpdate:
    """A whole projector before and after."""

    subject: str
    layers: tuple[LayerUpdate, ...]
    vectors: tuple[VectorUpdate, ...]
    chain: tuple[str, ...]
    base_chain: tuple[str, ...]
    nonfinite: Mapping[str, int]
    """Role -> number of NaN and Inf entries in the target; not empty: nothing else is measured."""
    generator: torch.Generator
    in_features: int
    norm_eps: float = 1e-5
    """Of the target; a base of another one is a changed config."""
    unchanged: bool = False
    """Nothing differs beyond storage rounding, biases and other 1-D tensors included."""

    @property
    def path(self) -> tuple[LayerUpdate, ...]:
        """The layers of the forward path in its order; all of them where it is not known."""
        on_it = linear_roles(self.chain)
        return tuple(layer for layer in self.layers if not on_it or layer.role in on_it)

    def weights(self, side: str) -> dict[str, Tensor]:
        """What `forward` takes of one side (`before` or `after`): by role, and `eps`."""
        weights: dict[str, Tensor] = {"eps": torch.tensor(self.norm_eps)}
        folded = affine_norms(self.chain)
        for layer in self.layers:
            weights[f"{layer.role}.weight"] = getattr(layer, side)
            bias = getattr(layer, f"{side}_bias")
            if bias is not None:
                weights[f"{layer.role}.bias"] = bias
        for vector in self.vectors:
            role, _, leaf = vector.role.rpartition(".")
            if role not in folded:
                weights[vector.role] = getattr(vector, side)
            elif leaf == "weight":  # its affine part was folded into the layers behind it
                rest = torch.zeros_like if folded[role][0] == "rms1" else torch.ones_like
                weights[vector.role] = rest(vector.before)
        return weights

    def moved_vectors(self) -> dict[str, Tensor]:
        """Role -> after − before of the norms' weights and biases that were not folded."""
        folded = affine_norms(self.chain)
        norms = {
            role for step in map(parse, self.chain) if step.kind != "linear" for role in step.roles
        }
        return {
            vector.role: vector.after - vector.before
            for vector in self.vectors
            if (role := vector.role.rpartition(".")[0]) in norms and role not in folded
        }


def pair(
    target: Projector,
    base: Projector,
    target_tensors: Mapping[str, Tensor],
    base_tensors: Mapping[str, Tensor],
    *,
    subject: str,
    device: torch.device,
    rank: int,
    generator: torch.Generator,
    embedding_rows: EmbeddingRows = lambda: None,
    target_steps: Mapping[str, Tensor] | None = None,
    base_steps: Mapping[str, Tensor] | None = None,
    calibrated: bool = False,
    factors: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
) -> ProjectorUpdate:
    """The update from base to target, layers paired by role whatever their names.

    Tensors come in their storage dtypes; those that were quantised in fp32, with the distance of
    the values that each entry can have as their steps, and `calibrated` where a quantiser chose
    among them by more than their distance. `factors` (role -> out × r, r × in) are of layers whose
    update is known to be that product. Raises UnsupportedError where roles or
    shapes differ, BaseError where the base is not finite or a layer of it is zero throughout.
    """
    roles = [layer.role for layer in target.linears]
    base_layers = {layer.role: layer for layer in base.linears}
    if list(base_layers) != roles:
        raise UnsupportedError(
            f"the target has the layers {', '.join(roles)}, the base {', '.join(base_layers)}",
            "shape",
            field=clean(target.prefix),
        )
    for layer in target.linears:
        if layer.shape != base_layers[layer.role].shape:
            raise UnsupportedError(
                f"{clean(layer.weight)} has shape {list(layer.shape)}, "
                f"in the base it has {list(base_layers[layer.role].shape)}",
                "shape",
                field=layer.role,
                remedy="name the base that this model was really made from with --base",
            )
    _check_base(base, base_tensors)
    nonfinite = {
        role: count for role, name in _named(target) if (count := _nonfinite(target_tensors[name]))
    }
    empty = ProjectorUpdate(
        subject,
        (),
        (),
        target.chain,
        base.chain,
        nonfinite,
        generator,
        target.in_features,
        target.norm_eps,
    )
    if nonfinite:
        return empty

    def side(tensors: Mapping[str, Tensor], name: str | None) -> Tensor | None:
        return None if name is None else tensors[name].to(device, torch.float32)

    layers = []
    for layer in target.linears:
        other = base_layers[layer.role]
        stored, stored_base = target_tensors[layer.weight], base_tensors[other.weight]
        steps = [
            None if step is None else side.matrix(step)
            for side, step in (
                (other, (base_steps or {}).get(other.weight)),
                (layer, (target_steps or {}).get(layer.weight)),
            )
        ]
        rounded = rounding(other.matrix(stored_base), layer.matrix(stored), *steps)
        before = other.matrix(stored_base.to(device, torch.float32))
        after = layer.matrix(stored.to(device, torch.float32))
        layers.append(
            LayerUpdate(
                role=layer.role,
                subject=f"{subject}/{layer.role}",
                before=before,
                after=after,
                before_bias=side(base_tensors, other.bias),
                after_bias=side(target_tensors, layer.bias),
                changed_fraction=rounded.changed,
                rounding_floor=rounded.floor,
                rank=rank,
                generator=generator,
                quantised=rounded.quantised,
                rounding_edge=rounded.edge,
                calibrated=calibrated,
                factors=_factors(factors.get(layer.role), before, after),
            )
        )
    overflow = {
        f"{layer.role}.weight, base to target": count
        for layer in layers
        if _peak(layer.after) + _peak(layer.before) > _GREATEST
        and (count := _nonfinite(layer.after - layer.before))
    }
    if overflow:
        return replace(empty, nonfinite=overflow)
    for role in target.vectors.keys() & base.vectors.keys():
        new = list(target_tensors[target.vectors[role]].shape)
        old = list(base_tensors[base.vectors[role]].shape)
        if new != old:
            raise UnsupportedError(
                f"{clean(target.vectors[role])} has shape {new}, in the base it has {old}",
                "shape",
                field=role,
            )
    vectors = tuple(
        VectorUpdate(
            role,
            f"{subject}/{role}",
            base_tensors[base.vectors[role]].to(device, torch.float32),
            target_tensors[name].to(device, torch.float32),
        )
        for role, name in target.vectors.items()
        if role in base.vectors
    )
    there = dict(_named(base))
    here = dict(_named(target))
    unchanged = here.keys() == there.keys() and all(layer.changed_fraction == 0 for layer in layers)
    if unchanged:  # the 1-D tensors decide
        unchanged = all(
            _same(base_tensors[there[role]], target_tensors[name]) for role, name in here.items()
        )
    layers = _folded(layers, vectors, target.chain)
    for folded in layers:
        if _peak(folded.before) < _ZERO:
            raise BaseError("the base's layer is zero throughout", "zero", field=folded.role)
    return replace(
        empty,
        layers=_aligned(layers, target.chain, embedding_rows),
        vectors=vectors,
        unchanged=unchanged,
    )


def _factors(given: tuple[Tensor, Tensor] | None, before: Tensor, after: Tensor) -> Factors | None:
    """Factors on the device of the layer; None where dense is as good, or all that works."""
    if given is None or given[0].shape[1] > min(before.shape) or not (before != after).any():
        return None
    left, right = (factor.to(before.device, torch.float32) for factor in given)
    peaks = _peak(left), _peak(right)
    if not all(0 < peak < _GREATEST**0.25 for peak in peaks):
        return None
    return Factors(left, right, (before, after))


def _same(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and rounding(before, after).changed == 0.0


def _named(projector: Projector) -> list[tuple[str, str]]:
    """(role, tensor name) of everything that the projector has."""
    linears = [
        (f"{layer.role}.{leaf}", name)
        for layer in projector.linears
        for leaf, name in (("weight", layer.weight), ("bias", layer.bias))
        if name
    ]
    return [*linears, *projector.vectors.items()]


def _nonfinite(tensor: Tensor) -> int:
    """Entries that are NaN or Inf in float32, in which everything is measured."""
    wide = tensor.float()
    # The extremes carry every NaN and Inf, and are ten times cheaper than asking each entry.
    if not wide.numel() or math.isfinite(_peak(wide)):
        return 0
    return wide.numel() - int(torch.isfinite(wide).sum())


def _peak(tensor: Tensor) -> float:
    """Greatest |entry|; NaN or Inf where an entry is."""
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(-low, high))


def _check_base(base: Projector, tensors: Mapping[str, Tensor]) -> None:
    for role, name in _named(base):
        tensor = tensors[name]
        if _nonfinite(tensor):
            raise BaseError("the base has NaN or Inf weights", "non-finite", field=clean(name))
        if role.endswith(".weight") and tensor.ndim > 1 and _peak(tensor.float()) < _ZERO:
            raise BaseError("the base's layer is zero throughout", "zero", field=clean(name))


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


def _folded(
    layers: list[LayerUpdate], vectors: tuple[VectorUpdate, ...], chain: tuple[str, ...]
) -> list[LayerUpdate]:
    """The layers with the affine part of a norm taken into the linear layers behind it.

    Exact on either side, and it makes column scalings that a norm's gamma takes back (threats K3)
    the identity that they are.
    """
    affine = {v.role: v for v in vectors}
    norm_of = {
        role: (norm, kind) for norm, (kind, roles) in affine_norms(chain).items() for role in roles
    }
    folded = []
    for layer in layers:
        norm, kind = norm_of.get(layer.role, ("", ""))
        gamma, beta = affine.get(f"{norm}.weight"), affine.get(f"{norm}.bias")
        if gamma is not None:
            scales = [_tiled(g + (kind == "rms1"), layer) for g in (gamma.before, gamma.after)]
            old = new = None
            if beta is not None:
                old = layer.before @ _tiled(beta.before, layer)
                new = layer.after @ _tiled(beta.after, layer)
            layer = replace(
                layer,
                before=layer.before * scales[0],
                after=layer.after * scales[1],
                before_bias=_sum(layer.before_bias, old),
                after_bias=_sum(layer.after_bias, new),
            )
        folded.append(layer)
    return folded


def _tiled(vector: Tensor, layer: LayerUpdate) -> Tensor:
    """A norm's weight or bias for each of the tokens that the layer merges."""
    return vector.repeat(layer.before.shape[1] // len(vector))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _aligned(
    layers: list[LayerUpdate], chain: tuple[str, ...], embedding_rows: EmbeddingRows
) -> tuple[LayerUpdate, ...]:
    """The layers with hidden permutations, scalings and output rotations undone.

    Units between two layers are interchangeable where a step that treats each alike stands between
    them, and the output turns with the embeddings where a layer ends the chain: none of it where no
    chain is known.
    """
    by_role = {layer.role: layer for layer in layers}
    for units in hidden(chain):
        if {*units.first, units.second} <= by_role.keys():
            by_role |= _settled(units, by_role)
    last = by_role[chain[-1]] if chain and chain[-1] in by_role else None
    if last is not None and align.far(last.before, last.after):
        # embedding rows are fetched for a suspicion only
        rows = embedding_rows()
        rotation = align.output_rotation(last.before, last.after, *rows) if rows else None
        if rotation is not None:
            by_role[last.role] = replace(
                last,
                after=rotation.T @ last.after,
                after_bias=None if last.after_bias is None else rotation.T @ last.after_bias,
                rotated=True,
            )
    return tuple(by_role[layer.role] for layer in layers)


def _settled(units: Hidden, layers: Mapping[str, LayerUpdate]) -> dict[str, LayerUpdate]:
    """The layers on either side of these units, permutation and scaling of the units undone."""
    first, second = [layers[role] for role in units.first], layers[units.second]
    before, after, before_bias, after_bias = _units(first, units.halved)
    order = align.hidden_permutation(before, after, before_bias, after_bias)
    if order is not None:
        moved = int((order != torch.arange(len(order), device=order.device)).sum())
        rows = torch.cat([order, order + len(order)]) if units.halved else order
        first = [
            replace(
                layer,
                after=layer.after[rows],
                after_bias=None if layer.after_bias is None else layer.after_bias[rows],
                permuted_units=moved,
            )
            for layer in first
        ]
        second = replace(second, after=second.after[:, order])
    # What passes on linearly may be scaled: by s > 0 through a ReLU, by any s beside a gate.
    gated = units.halved or len(first) > 1
    if gated or units.act == "relu":
        layer = first[-1]
        kept = slice(0, len(layer.after) // 2) if units.halved else slice(None)
        scale = align.hidden_scale(
            layer.before[kept],
            layer.after[kept],
            None if layer.before_bias is None else layer.before_bias[kept],
            None if layer.after_bias is None else layer.after_bias[kept],
            second.before,
            second.after,
            signed=gated,
        )
        if scale is not None:
            rows = torch.ones_like(layer.after[:, 0])
            rows[kept] = scale
            first[-1] = replace(
                layer,
                after=layer.after / rows[:, None],
                after_bias=None if layer.after_bias is None else layer.after_bias / rows,
                rescaled_units=int((scale != 1).sum()),
            )
            second = replace(second, after=second.after * scale)
    return {layer.role: layer for layer in (*first, second)}


def _units(
    layers: list[LayerUpdate], halved: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(before, after, their biases) with one row for each hidden unit, of all that gives it.

    A bias that one side lacks is zero there.
    """

    def side(name: str) -> tuple[Tensor, Tensor | None]:
        weights = [getattr(layer, name) for layer in layers]
        biases = [_bias(layer, name) for layer in layers]
        if not halved and len(layers) == 1:
            return weights[0], biases[0]
        parts: list[Tensor] = []
        for weight, bias in zip(weights, biases, strict=True):
            whole = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
            parts += whole.chunk(2) if halved else [whole]
        return torch.cat(parts, dim=1), None

    (before, before_bias), (after, after_bias) = side("before"), side("after")
    return before, after, before_bias, after_bias


def _bias(layer: LayerUpdate, side: str) -> Tensor | None:
    bias: Tensor | None = getattr(layer, f"{side}_bias")
    other = layer.after_bias if side == "before" else layer.before_bias
    return torch.zeros_like(other) if bias is None and other is not None else bias
