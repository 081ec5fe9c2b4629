"""The update: what a projector's layers and vectors were before and after, as it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from projaudit.chain import affine_norms, linear_roles, parse
from projaudit.linalg import BLOCK, Spectrum, Triplets, leading, spectrum, spectrum_of_product


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
