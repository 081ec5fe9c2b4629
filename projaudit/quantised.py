"""The quantised weights of a checkpoint, and why others are not read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from projaudit.quantised_config import Declared, Unread
from projaudit.quantised_layouts import F8, Packed, ReadBytes, Shapes, understood
from projaudit.safetensors_header import TensorInfo

_BELOW_WEIGHT = {
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes__nf4",
    "bitsandbytes__fp4", "_data", "_scale",
}  # fmt: skip
_BESIDE = {
    "SCB", "weight_format", "qweight", "qzeros", "scales", "g_idx", "weight_scale_inv",
    "weight_scale", "weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx",
    "weight_global_scale", "biases", "input_scale", "output_scale", "activation_scale",
    "input_global_scale", "input_zero_point", "W_q", "codebooks",
}  # fmt: skip
# What transformers takes for weight_scale_inv too, under an FP8 config.
_RENAMED_SCALES = {"scale", "qscale_weight"}


@dataclass(frozen=True)
class Found:
    """The quantised weights of a checkpoint."""

    packed: Mapping[str, Packed]
    """By name of the weight."""
    unread: Mapping[str, tuple[str, str]]
    """Tensors that are a part of a weight that is not read -> (its name, why in one line)."""
    undeclared: bool = False
    """Whether there is a config and it declares no quantisation: transformers would load codes."""


def find(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None, read: ReadBytes
) -> Found:
    """The weights that several of those tensors make together, and what is not understood.

    `config` is the parsed config.json; what it says must agree with the tensors. `read` is asked
    for the few bytes that hold a shape (of bitsandbytes' and packed weights), once for each group
    of layers that differ only in the numbers of their names. Raises what it raises.
    """
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if (split := _split(name, tensors)) is not None:
            modules[split[0]][split[1]] = info
    declared = Declared(config)
    unread: dict[str, tuple[str, str]] = {}
    if declared.scales_f8:
        unread = {
            name: (name, "is stored in 8 bits, and the scale that the config promises is missing")
            for name, info in tensors.items()
            if name.endswith(".weight")
            and info.dtype in F8
            and name.removesuffix(".weight") not in modules
        }
    packed: dict[str, Packed] = {}
    shapes = Shapes(modules, read)
    for module, parts in modules.items():
        name = f"{module}.weight" if module else "weight"
        if name in tensors:
            parts["weight"] = tensors[name]
        try:
            packed[name] = understood(name, module, parts, declared, shapes)
        except Unread as why:
            unread |= {info.name: (name, str(why)) for info in parts.values()}
    return Found(packed, unread, config is not None and not declared.there)


def _split(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """(module, name below it) of a part of a quantised weight, None for any other tensor."""
    path, _, last = name.rpartition(".")
    if last in _BESIDE:
        return path, last
    if last in _RENAMED_SCALES:
        weight = tensors.get(f"{path}.weight")
        return (path, last) if weight is not None and weight.dtype in F8 else None
    if last in _BELOW_WEIGHT:
        below = f"quant_state.{last}" if last.startswith("bitsandbytes__") else last
        module = name.removesuffix(f"weight.{below}")
        if module != name and (not module or module.endswith(".")):
            return module.removesuffix("."), f"weight.{below}"
    return None
