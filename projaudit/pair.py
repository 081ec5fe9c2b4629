"""Base and tuned projector paired by role, brought to fp32, and aligned: their update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from projaudit.errors import BaseError, UnsupportedError
from projaudit.inert import clean
from projaudit.projector import Projector
from projaudit.rounding import rounding
from projaudit.undo import EmbeddingRows, aligned, folded
from projaudit.update import Factors, LayerUpdate, ProjectorUpdate, VectorUpdate

_GREATEST = 3e38  # where differences begin to leave float32
_ZERO = 1e-20  # a layer whose greatest weight is below this computes nothing


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
    layers = folded(layers, vectors, target.chain)
    for one in layers:
        if _peak(one.before) < _ZERO:
            raise BaseError("the base's layer is zero throughout", "zero", field=one.role)
    return replace(
        empty,
        layers=aligned(layers, target.chain, embedding_rows),
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
