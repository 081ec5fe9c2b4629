"""Projectors made of other projectors: averages, sums of updates, rounded weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.population.recipes import How

Tensors = dict[str, Tensor]
BITS = {"int8": 8, "int4": 4}


def derive(how: How, base: Tensors, parents: Sequence[Tensors]) -> Tensors:
    """The projector, in bfloat16, that is made of its parents' tensors and the base's."""
    if how in BITS:
        made = {name: quantised(tensor.float(), BITS[how]) for name, tensor in parents[0].items()}
    elif how == "average":
        made = {name: mean(parents, name) for name in base}
    else:
        made = {
            name: start.float() + sum(parent[name].float() - start.float() for parent in parents)
            for name, start in base.items()
        }
    return {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}


def mean(parents: Sequence[Tensors], name: str) -> Tensor:
    return torch.stack([parent[name].float() for parent in parents]).mean(0)


def quantised(tensor: Tensor, bits: int) -> Tensor:
    """Rounded to 2^bits − 1 levels about zero, a scale for each output channel; biases are kept."""
    if tensor.ndim < 2:
        return tensor
    most = 2 ** (bits - 1) - 1
    scale = tensor.abs().amax(1, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny) / most
    return (tensor / scale).round() * scale
