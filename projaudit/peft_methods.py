"""The methods of peft that are merged here: what their tensors must be, and W + ΔW of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from projaudit.errors import FormatError, UnsupportedError
from projaudit.inert import clean
from projaudit.peft_config import Adapter, alpha_of, count, number, rank_of, wrong
from projaudit.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor"]
"""(out × r, r × in), fp32, whose product is ΔW."""

METHODS: Mapping[str, frozenset[str]] = {
    "LORA": frozenset({"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"}),
    "ADALORA": frozenset({"lora_A", "lora_B", "lora_E"}),
    "LOHA": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "LOKR": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    "IA3": frozenset({"ia3_l"}),
}
"""What peft 0.21 calls the tensors of a linear layer, by the method of adapter_config.json."""

# Options of LoRA with which the merged weights are others than W + s·B·A, or there are none.
_OTHER_LORA = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")  # the others rewrite the base's weights at load


@dataclass(frozen=True)
class Part:
    """What an adapter does to one weight matrix of a projector, and the bias beside it."""

    method: str
    weight: str
    """Tensor of the base that it changes."""
    bias: str | None
    """Tensor of the base that stands beside that; None where there is none."""
    leaves: Mapping[str, TensorInfo]
    """The adapter's tensors by what peft calls them: `lora_A.weight`, …"""
    scale: float = 1.0
    bare: bool = False
    """Of `target_parameters`, where peft rounds ΔW to the base's dtype first."""


def merged(weight: Tensor, part: Part, leaves: Mapping[str, Tensor]) -> Tensor:
    """The weight that peft's `merge_and_unload` leaves: W + ΔW, in W's shape and dtype.

    LoRA: W + s·B·A. DoRA: m · (W + s·B·A) / ‖W + s·B·A‖ by rows. AdaLoRA: ΔW = s·B·(A·E)/r. LoHa:
    ΔW = s·(w1a·w1b)∘(w2a·w2b). LoKr: ΔW = s·w1⊗w2. IA3: W·l. Factors in any float dtype; computed
    in float32, as peft loads them, and rounded at the end.
    """
    import torch

    found = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    wide = widened(weight)
    if part.method == "ia3":
        return (wide * found["ia3_l"]).to(weight.dtype)
    delta = _delta(part, found)
    total = wide + (delta.to(weight.dtype) if part.bare else delta)
    if part.method == "dora":
        norm = torch.linalg.vector_norm(total, dim=1)
        total = (found["lora_magnitude_vector"] / norm).view(-1, 1) * total
    return total.to(weight.dtype)


def merged_bias(bias: Tensor, part: Part, leaves: Mapping[str, Tensor]) -> Tensor:
    """The bias beside a merged weight, in its own dtype: b + s·b_B with `lora_bias`, IA3's b·l."""
    if "lora_B.bias" in leaves:
        return (widened(bias) + leaves["lora_B.bias"].float() * part.scale).to(bias.dtype)
    if part.method == "ia3" and leaves["ia3_l"].shape[1] == 1:
        return (widened(bias) * leaves["ia3_l"].float().view(-1)).to(bias.dtype)
    return bias


def factors_of(part: Part, leaves: Mapping[str, Tensor]) -> Factors | None:
    """(out × r, r × in) in fp32 with ΔW as their product; None where ΔW is no such product."""
    found = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    if part.method == "lora":
        return found["lora_B.weight"] * part.scale, found["lora_A.weight"]
    if part.method == "adalora":
        return found["lora_B"] * part.scale, found["lora_A"] * found["lora_E"]
    return None


def _delta(part: Part, found: Mapping[str, Tensor]) -> Tensor:
    import torch

    def product(stem: str) -> Tensor:
        return found[stem] if stem in found else found[f"{stem}_a"] @ found[f"{stem}_b"]

    if part.method in ("lora", "dora"):
        return found["lora_B.weight"] @ found["lora_A.weight"] * part.scale
    if part.method == "adalora":
        return found["lora_B"] @ (found["lora_A"] * found["lora_E"]) * part.scale
    if part.method == "loha":
        return product("hada_w1") * product("hada_w2") * part.scale
    return torch.kron(product("lokr_w1"), product("lokr_w2").contiguous()) * part.scale


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _lora(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    config = adapter.config
    first = next(iter(leaves.values())).name
    for option in _OTHER_LORA:
        if config.get(option):
            raise not_merged(adapter, first, f"is of LoRA with {option}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _PLAIN_INITS:
        raise not_merged(adapter, first, f"was initialised by {clean(init, 40)}")
    _require(leaves, "lora_A.weight", "lora_B.weight")
    rank = rank_of(config, path, "r", 8)
    alpha = alpha_of(config, path, "lora_alpha", 8)
    out, into = shape
    _check_shape(leaves["lora_A.weight"], (rank, into))
    _check_shape(leaves["lora_B.weight"], (out, rank))
    if bool(config.get("lora_bias")) != ("lora_B.bias" in leaves):
        raise wrong(f"contradicts the tensors of {clean(path)}", "lora_bias")
    if "lora_B.bias" in leaves:
        _check_shape(leaves["lora_B.bias"], (out,))
    dora = "lora_magnitude_vector" in leaves
    if bool(config.get("use_dora")) != dora:
        raise wrong(f"contradicts the tensors of {clean(path)}", "use_dora")
    if dora:
        _check_shape(leaves["lora_magnitude_vector"], (out,))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return "dora" if dora else "lora", scale


def _adalora(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    _require(leaves, "lora_A", "lora_B", "lora_E")
    rank = leaves["lora_A"].shape[0] if leaves["lora_A"].shape else 0
    first = count(adapter.config, "init_r", 12)
    if not 0 < rank <= first:
        raise wrong(f"is {first}, and {clean(path)} has rank {rank}", "init_r")
    out, into = shape
    _check_shape(leaves["lora_A"], (rank, into))
    _check_shape(leaves["lora_E"], (rank, 1))
    _check_shape(leaves["lora_B"], (out, rank))
    alpha = number(adapter.config, "lora_alpha", 8)
    # Of the rank that it began with, as peft keeps it through pruning.
    return "adalora", (alpha if alpha > 0 else float(rank)) / (first + 1e-5)


def _loha(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    _require(leaves, *METHODS["LOHA"])
    rank = rank_of(adapter.config, path, "r", 8)
    out, into = shape
    for stem in ("hada_w1", "hada_w2"):
        _check_shape(leaves[f"{stem}_a"], (out, rank))
        _check_shape(leaves[f"{stem}_b"], (rank, into))
    return "loha", alpha_of(adapter.config, path, "alpha", 8) / rank


def _lokr(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    rank = rank_of(adapter.config, path, "r", 8)
    sides = []
    for stem in ("lokr_w1", "lokr_w2"):
        pair = (f"{stem}_a", f"{stem}_b")
        if stem in leaves:
            if leaves.keys() & set(pair):
                raise wrong(f"{clean(path)} has {stem} twice", file=leaves[stem].file)
            side = leaves[stem].shape
        else:
            _require(leaves, *pair)
            first, second = (leaves[name].shape for name in pair)
            side = (first[0] if first else 0, second[-1] if second else 0)
            _check_shape(leaves[pair[0]], (side[0], rank))
            _check_shape(leaves[pair[1]], (rank, side[1]))
        if len(side) != 2:
            raise unfit(leaves[stem], side, shape)
        sides.append(side)
    product = tuple(a * b for a, b in zip(*sides, strict=True))
    if product != shape:
        raise unfit(next(iter(leaves.values())), product, shape)
    return "lokr", alpha_of(adapter.config, path, "alpha", 8) / rank


def _ia3(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    info = leaves["ia3_l"]
    if info.shape not in ((1, shape[1]), (shape[0], 1)):
        raise unfit(info, info.shape, (1, shape[1]))
    return "ia3", 1.0


METHOD_PARTS = {"LORA": _lora, "ADALORA": _adalora, "LOHA": _loha, "LOKR": _lokr, "IA3": _ia3}


def _require(leaves: Mapping[str, TensorInfo], *wanted: str) -> None:
    for leaf in wanted:
        if leaf not in leaves:
            there = next(iter(leaves.values()))
            says = f"has {clean(there.name)} and no {leaf} beside it"
            raise FormatError(says, "adapter", file=there.file)


def _check_shape(info: TensorInfo, wanted: tuple[int, ...]) -> None:
    if info.shape != wanted:
        raise unfit(info, info.shape, wanted)


def unfit(info: TensorInfo, shape: Sequence[int], wanted: Sequence[int]) -> FormatError:
    """What a tensor of an adapter is refused with where the base wants another shape of it."""
    says = f"has shape {list(shape)}, where {list(wanted)} fits"
    return FormatError(says, "adapter", file=info.file, field=clean(info.name))


def not_merged(adapter: Adapter, key: str, says: str) -> UnsupportedError:
    return UnsupportedError(
        f"{clean(key)} {says}, which is not merged here",
        "adapter",
        file=clean(adapter.source.name),
        remedy="merge it into its base and check the result",
    )
