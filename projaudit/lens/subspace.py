"""The critical subspace (ProjLens; docs/lens.md 6): parts of the update, projectors of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from projaudit.behaviour.speaker import Side
from projaudit.projector import Linear

Kind = Literal["recovery", "removal"]
Ranks = Literal["cumulative", "single"]


@dataclass(frozen=True)
class LayerParts:
    """The leading components of one layer's update."""

    layer: Linear
    first: bool
    """Whether it reads the features: k1 counts its components, k2 those of all others."""
    values: Tensor
    """σ (all of them), fp32, descending."""
    left: Tensor
    """(out, K)."""
    right: Tensor
    """(K, in)."""

    def part(self, k: int, ranks: Ranks) -> Tensor:
        """Σ_{i≤k} σi ui viᵀ, or σk uk vkᵀ alone (out × in); k = 0 is nothing."""
        chosen = slice(0, k) if ranks == "cumulative" else slice(max(k - 1, 0), k)
        left, right = self.left[:, chosen], self.right[chosen]
        return left * self.values[chosen.start : chosen.stop][: left.shape[1]] @ right


def delta_of(layer: Linear, base: Tensor, tuned: Tensor) -> Tensor:
    """ΔW = W_tuned − W_base (out × in, fp32) of weights as they are stored, in any dtype."""
    return layer.matrix(tuned.float()) - layer.matrix(base.float())


def layer_parts(layer: Linear, delta: Tensor, *, first: bool, most: int) -> LayerParts:
    """The SVD of ΔW, dense and in fp32 as ProjLens' (docs/lens.md 1), with `most` components."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return LayerParts(layer, first, values, left[:, :most].clone(), right[:most].clone())


def made(
    kind: Kind,
    ranks: Ranks,
    k1: int,
    k2: int,
    *,
    bias: bool,
    base: Side,
    tuned: Side,
    parts: Mapping[str, LayerParts],
) -> dict[str, Tensor]:
    """The projector of one cell: W_base + part, or W_tuned − part, layer by layer.

    The weights in fp32, whatever `base` and `tuned` are in. `parts` by the weight's name in the
    module; what is no weight of theirs (biases, norms) is the tuned projector's with `bias`, the
    base's without.
    """
    found = dict(tuned if bias else base)
    start, sign = (base, 1.0) if kind == "recovery" else (tuned, -1.0)
    for name, one in parts.items():
        stored = start[name]
        part = one.layer.stored(sign * one.part(k1 if one.first else k2, ranks), stored.shape)
        found[name] = stored.float() + part
    return found


def axes(
    kind: Kind, parts: Sequence[LayerParts], most: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """k1 and k2 of a heat map: 1 … most, as far as the layers have components.

    Of removal from 0: ProjLens takes components from the first layer alone as well.
    """
    lowest, found = (1 if kind == "recovery" else 0), []
    for first in (True, False):
        sides = [min(one.layer.shape) for one in parts if one.first is first]
        found.append(tuple(range(lowest, min(most, max(sides)) + 1)) if sides else (0,))
    return found[0], found[1]


def cells(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[int, int]]:
    """All (k1, k2), row by row."""
    return ((k1, k2) for k1 in first for k2 in second)
