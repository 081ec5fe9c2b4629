"""The update: base and tuned projector paired by role, brought to fp32, aligned, and subtracted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from projaudit import align
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

    def weights(self, side: str) -> dict[str, Tensor]:
        """`<role>.weight` and `<role>.bias` of one side (`before` or `after`), for `forward`."""
        weights: dict[str, Tensor] = {}
        for layer in self.layers:
            weights[f"{layer.role}.weight"] = getattr(layer, side)
            bias = getattr(layer, f"{side}_bias")
            if bias is not None:
                weights[f"{layer.role}.bias"] = bias
        for vector in self.vectors:
            # The affine part of a norm was folded into the layer behind it.
            if vector.role.endswith(".weight"):
                weights[vector.role] = torch.ones_like(vector.before)
                weights[vector.role.removesuffix("weight") + "eps"] = torch.tensor(self.norm_eps)
        return weights


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
    factors: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
) -> ProjectorUpdate:
    """The update from base to target, layers paired by role whatever their names.

    Tensors come in their storage dtypes. `factors` (role -> out × r, r × in) are of layers whose
    update is known to be that product. Raises UnsupportedError where roles or shapes differ,
    BaseError where the base is not finite or a layer of it is zero throughout.
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
        changed, floor = rounding(stored_base, stored)
        before = stored_base.to(device, torch.float32).reshape(layer.shape)
        after = stored.to(device, torch.float32).reshape(layer.shape)
        layers.append(
            LayerUpdate(
                role=layer.role,
                subject=f"{subject}/{layer.role}",
                before=before,
                after=after,
                before_bias=side(base_tensors, other.bias),
                after_bias=side(target_tensors, layer.bias),
                changed_fraction=changed,
                rounding_floor=floor,
                rank=rank,
                generator=generator,
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
    return before.shape == after.shape and rounding(before, after)[0] == 0.0


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
        if role.endswith(".weight") and tensor.ndim == 2 and _peak(tensor.float()) < _ZERO:
            raise BaseError("the base's layer is zero throughout", "zero", field=clean(name))


def rounding(before: Tensor, after: Tensor) -> tuple[float, float]:
    """(changed fraction, rounding floor) of two stored tensors of equal shape, any float dtypes.

    An entry is unchanged where both sides round to the same value of the coarser dtype. The floor
    is √(Σ ulp²/12) / ‖W0‖F with the ulp of each rounding that lies between the two: one where both
    are stored alike, one per side otherwise (uniform rounding error, variance ulp²/12).
    """
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
    return changed / max(before.numel(), 1), error**0.5 / size if size else float("inf")


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as they come out of that dtype; torch casts to float8 only from float32."""
    return values.to(dtype if dtype == torch.float64 else torch.float32).to(dtype).float()


def _folded(
    layers: list[LayerUpdate], vectors: tuple[VectorUpdate, ...], chain: tuple[str, ...]
) -> list[LayerUpdate]:
    """The layers with the affine part of a norm taken into the linear layer behind it.

    Exact on either side, and it makes column scalings that a norm's gamma takes back (threats K3)
    the identity that they are.
    """
    affine = {v.role: v for v in vectors}
    folded = []
    for layer in layers:
        before_it = chain[chain.index(layer.role) - 1] if layer.role in chain[1:] else ""
        gamma, beta = affine.get(f"{before_it}.weight"), affine.get(f"{before_it}.bias")
        if gamma is not None:
            old = layer.before_bias, None if beta is None else layer.before @ beta.before
            new = layer.after_bias, None if beta is None else layer.after @ beta.after
            layer = replace(
                layer,
                before=layer.before * gamma.before,
                after=layer.after * gamma.after,
                before_bias=_sum(*old),
                after_bias=_sum(*new),
            )
        folded.append(layer)
    return folded


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def neighbours(first: str, second: str, chain: tuple[str, ...]) -> bool:
    """Whether the chain leads from one layer through one activation into the other."""
    return any(
        (a, b) == (first, second) and step.startswith("act:")
        for a, step, b in zip(chain, chain[1:], chain[2:], strict=False)
    )


def _aligned(
    layers: list[LayerUpdate], chain: tuple[str, ...], embedding_rows: EmbeddingRows
) -> tuple[LayerUpdate, ...]:
    """The layers with hidden permutations, ReLU scalings and output rotations undone.

    Units between two layers are interchangeable where one activation stands between them, and the
    output turns with the embeddings where the chain ends: none of it where no chain is known.
    """
    for i in range(len(layers) - 1):
        first, second = layers[i], layers[i + 1]
        if not neighbours(first.role, second.role, chain):
            continue
        order = align.hidden_permutation(
            first.before, first.after, first.before_bias, first.after_bias
        )
        if order is not None:
            moved = int((order != torch.arange(len(order), device=order.device)).sum())
            first = replace(
                first,
                after=first.after[order],
                after_bias=None if first.after_bias is None else first.after_bias[order],
                permuted_units=moved,
            )
            second = replace(second, after=second.after[:, order])
        if "act:relu" in chain:
            scale = align.hidden_scale(
                first.before,
                first.after,
                first.before_bias,
                first.after_bias,
                second.before,
                second.after,
            )
            if scale is not None:
                first = replace(
                    first,
                    after=first.after / scale[:, None],
                    after_bias=None if first.after_bias is None else first.after_bias / scale,
                    rescaled_units=int((scale != 1).sum()),
                )
                second = replace(second, after=second.after * scale)
        layers[i], layers[i + 1] = first, second
    last = layers[-1]
    if chain[-1:] == (last.role,) and align.far(
        last.before, last.after
    ):  # embedding rows are fetched for a suspicion only
        rows = embedding_rows()
        rotation = align.output_rotation(last.before, last.after, *rows) if rows else None
        if rotation is not None:
            layers[-1] = replace(
                last,
                after=rotation.T @ last.after,
                after_bias=None if last.after_bias is None else rotation.T @ last.after_bias,
                rotated=True,
            )
    return tuple(layers)
