"""What a projector is: its tensors by role, the order in which they compute, what is unread."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from projaudit.chain import EPS, linear_roles
from projaudit.errors import UnsupportedError
from projaudit.inert import clean
from projaudit.recipe import Blueprint, Recipe, assembled

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["plain", "transposed", "unfold"]
"""How a linear layer's tensor lies: (out, in); (in, out); columns channel by channel."""

WRAPPERS = (
    "model.",
    "module.",
    "thinker.",
    "vlm.",
    "base_model.model.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
)
"""What stands in front of any family's module: base models of transformers' generations, models
within models, wrappers of training frameworks (DDP, compile, FSDP, PEFT)."""
# Leaves of adapters as peft writes them.
_ADAPTER = re.compile(
    r"\.lora_[A-Z]\b|\.lora_magnitude|\.(hada|lokr)_w|\.(ia3_l|hra_u|vera_lambda)"
)
PACKED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|qweight|qzeros|scales"
    r"|g_idx|weight_scale_inv|weight_scale|input_scale|output_scale|weight_packed|weight_shape"
    r"|weight_global_scale|input_global_scale|weight_zero_point|weight_g_idx|W_q|codes|codebooks"
    r"|_data|_scale|biases)$|\.quant_state\.|" + _ADAPTER.pattern
)
"""Leaves of adapters, and of packed weights as quantisers write them."""


@dataclass(frozen=True)
class Linear:
    """A linear layer y = x Wᵀ + b of a projector, by tensor names."""

    role: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    """(out, in), whatever the layout."""
    layout: Layout = "plain"
    groups: int = 1
    """Of an unfolded one: how many tokens its columns are of."""

    def matrix(self, stored: Tensor) -> Tensor:
        """W (out × in) of its tensor as stored; the columns token by token."""
        if self.layout == "transposed":
            return stored.T
        if self.layout == "unfold":
            parts = stored.reshape(self.shape[0], -1, self.groups)
            return parts.transpose(1, 2).reshape(self.shape)
        return stored.reshape(self.shape)

    def stored(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """W (out × in) as a tensor of `shape` holds it: the inverse of `matrix`."""
        if self.layout == "transposed":
            return matrix.T
        if self.layout == "unfold":
            matrix = matrix.reshape(self.shape[0], self.groups, -1).transpose(1, 2)
        return matrix.reshape(shape)


@dataclass(frozen=True)
class Projector:
    """A projector found in a checkpoint: names and shapes, no values."""

    family: str
    kind: str
    """`linear`, `mlp2`, `mlp3`, …, `gated mlp3`; `norm+` in front and `+norm` behind where a norm
    is there; a class of transformers; `5 matrices` where the forward path is not known."""
    prefix: str
    linears: tuple[Linear, ...]
    """Those of the forward path in its order, then other matrices."""
    vectors: Mapping[str, str]
    """Role -> name of the 1-D tensors that are no linear layer's bias (norms, image_newline)."""
    chain: tuple[str, ...]
    """Forward path (`chain.py` says what each step means); empty where it is not known."""
    norm_eps: float = EPS
    """Epsilon of its norm layers."""
    unexpected: tuple[str, ...] = ()
    """Tensors inside the projector's module that the family does not know."""
    packed: tuple[str, ...] = ()
    """Tensors that hold weights in a way that is not read: quantised, or an adapter's."""
    recipe: Recipe | None = None
    """The class of transformers that it is, where no chain describes it."""

    @property
    def path(self) -> tuple[Linear, ...]:
        """The linear layers of the forward path; all of them where it is not known."""
        on_it = linear_roles(self.chain)
        return tuple(layer for layer in self.linears if not on_it or layer.role in on_it)

    @property
    def entry(self) -> str:
        """The module that features are handed to, where the prefix holds other things, too."""
        if self.recipe is None:
            return self.prefix
        reads = f"{self.recipe.reads}."
        inner = [p for p, place in self.recipe.parts.items() if reads.startswith(f"{place}.")]
        return f"{self.prefix}.{inner[0]}".strip(".") if inner else self.prefix

    @property
    def in_features(self) -> int:
        """Width of what the encoder hands over; 0 where no matrix says."""
        return self.path[0].shape[1] if self.linears else 0

    @property
    def out_features(self) -> int:
        """Width of the language model's embeddings; 0 where no matrix says."""
        return self.path[-1].shape[0] if self.linears else 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that belong to the projector, in forward order."""
        names = [n for layer in self.linears for n in (layer.weight, layer.bias) if n]
        return (*names, *self.vectors.values())


def blueprint(
    projector: Projector, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Blueprint | None:
    """What transformers' class of a projector is built from; None where it is of none."""
    recipe = projector.recipe
    if recipe is None:
        return None
    places = {
        name: place
        for local in assembled(recipe, projector.tensors, WRAPPERS).values()
        for name, place in local.items()
    }
    roles = {f"{layer.role}.weight": layer.weight for layer in projector.linears}
    roles |= {f"{layer.role}.bias": layer.bias for layer in projector.linears if layer.bias}
    roles |= projector.vectors
    return Blueprint(
        recipe,
        config,
        projector.prefix,
        {role: places[name] for role, name in roles.items()},
        {places[name]: tuple(shapes[name]) for name in projector.tensors},
    )


def require_readable(
    projector: Projector, unread: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """Raises UnsupportedError where a projector has no matrix, or they are quantised, packed or an
    adapter's. `unread`: tensors -> (the weight that they are part of, why it is not read).
    """
    unread = unread or {}
    for name in (*projector.packed, *projector.tensors):
        if name in unread:
            weight, why = unread[name]
            raise UnsupportedError(
                why,
                "quantised",
                field=clean(weight),
                remedy="check the full-precision repository that it was made from",
            )
    if not projector.packed:
        if not projector.linears:
            raise UnsupportedError(
                "has the place of a projector and no matrix in it",
                "projector",
                field=clean(projector.prefix),
            )
        return
    name = projector.packed[0]
    if _ADAPTER.search(name):
        raise UnsupportedError(
            f"{clean(name)} is an adapter's, of which only peft's own files are merged",
            "adapter",
            field=clean(projector.prefix),
            remedy="merge it into its base and check the result",
        )
    raise UnsupportedError(
        f"{clean(name)} is quantised or packed in a way that is not read",
        "quantised",
        field=clean(projector.prefix),
        remedy="check the full-precision repository that it was made from",
    )
