"""What is done to the update: as the user names it, or as the process that ran the model chose."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.errors import UnsupportedError, UsageError
from projaudit.evidence import Factors, Mended
from projaudit.inert import clean
from projaudit.projector import Linear, Projector
from projaudit.repair.outcome import Method

if TYPE_CHECKING:
    import torch

    from projaudit.behaviour.change import Correction

METHODS = "auto, top-k:K, top-k-all:K, shrink:SHARE, clip, revert"
_SPEC = re.compile(r"(?:(top-k|top-k-all):(\d{1,4})|(shrink):(0(?:\.\d{1,6})?|1)|(clip|revert))")


def parse_method(text: str) -> Method | None:
    """The method that a user names, None for `auto`; UsageError (`usage.option`) otherwise."""
    if text == "auto":
        return None
    match = _SPEC.fullmatch(text)
    name, _, amount = text.partition(":")
    if match is None or (name.startswith("top-k") and int(amount) < 1):
        raise UsageError(
            f"{clean(text, 40)!r} is none of {METHODS}",
            "option",
            field="--method",
        )
    return Method(name, float(amount or 0), asked=True)  # type: ignore[arg-type]


def best(mended: Mended) -> Method:
    """The method that came out best."""
    one = mended.tried[0]
    return Method(one.method, one.amount, asked=False)


def applied(
    method: Method,
    factors: Factors | None,
    projector: Projector,
    tuned: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The repaired tensors by name on disk, in the target's dtypes; `base` under the same names.

    Computed in float32 and rounded once. Raises CouldNotProbe where factors do not fit the layer.
    """
    from projaudit.behaviour import change

    wide = {name: tensor.float() for name, tensor in tuned.items()}
    theirs = {name: tensor.float() for name, tensor in base.items()}
    first, last = projector.path[0], projector.path[-1]
    every = [layer.weight for layer in projector.path]
    k = int(method.amount)
    match method.name:
        case "unlearn" | "project":
            layer = first if method.name == "project" else last
            by = correction_of(factors, layer, wide)
            found = change.corrected(wide, layer.weight, layer.bias, by)
        case "top-k":
            found = change.without_top(wide, theirs, [first.weight], k)
        case "top-k-all":
            found = change.without_top(wide, theirs, every, k)
        case "clip":
            found = change.clipped(wide, theirs, every)
        case "shrink":
            found = change.shrunk(wide, theirs, method.amount)
        case "revert":
            found = {**wide, **theirs}
    return {
        name: (tuned[name] if tensor is wide[name] else tensor.to(tuned[name].dtype)).contiguous()
        for name, tensor in found.items()
    }


def require_possible(
    method: Method, projector: Projector, tuned: Mapping[str, torch.Tensor]
) -> None:
    """None; UnsupportedError (`unsupported.repair`) where the method has nothing to work on."""
    if method.name == "revert":
        return
    broken = [name for name, tensor in tuned.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UnsupportedError(
            f"{clean(broken[0])} holds values that are not finite",
            "repair",
            remedy="revert takes the base's in their place",
        )
    if method.name == "shrink":
        return
    if method.name == "top-k" and not projector.chain:
        raise UnsupportedError(
            "what this projector computes is not known, so that no layer is known as the first",
            "repair",
            remedy="top-k-all:K takes every layer",
        )
    if any(tuned[layer.weight].ndim != 2 for layer in projector.path):
        raise UnsupportedError(
            "a layer of this projector is stored as no matrix",
            "repair",
            remedy="shrink:SHARE and revert need none",
        )


def correction_of(
    factors: Factors | None, layer: Linear, tuned: Mapping[str, torch.Tensor]
) -> Correction:
    """The correction that the confined process answered with, checked against its layer."""
    import torch

    from projaudit.behaviour.change import Correction

    def unpacked(text: str, *shape: int) -> torch.Tensor:
        data = base64.b64decode(text, validate=True)
        found = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
        if not bool(found.isfinite().all()):
            raise ValueError("it is not finite")
        return found

    out, inputs = layer.shape
    try:
        if factors is None or not 1 <= factors.rank <= min(layer.shape):
            raise ValueError("it has no rank of the layer's")
        bias = None if factors.bias is None else unpacked(factors.bias, out)
        return Correction(
            unpacked(factors.left, out, factors.rank),
            unpacked(factors.right, factors.rank, inputs),
            bias,
        )
    except (ValueError, RuntimeError) as error:
        raise CouldNotProbe(f"the change that was chosen does not fit: {error}") from None
