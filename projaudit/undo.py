"""Layers with all undone that leaves their function as it is: norms folded, units in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from projaudit import align
from projaudit.chain import Hidden, affine_norms, hidden
from projaudit.update import LayerUpdate, VectorUpdate

EmbeddingRows = Callable[[], tuple[Tensor, Tensor] | None]
"""Gives the same embedding rows (n × d, fp32) of base and target, None where they have none."""


def folded(
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
    found = []
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
        found.append(layer)
    return found


def _tiled(vector: Tensor, layer: LayerUpdate) -> Tensor:
    """A norm's weight or bias for each of the tokens that the layer merges."""
    return vector.repeat(layer.before.shape[1] // len(vector))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def aligned(
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
