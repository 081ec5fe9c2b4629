"""Weights that transformers would have to unpickle or unpack, as safetensors files of our own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.checkpoint import Checkpoint
from projaudit.inert import clean
from projaudit.weight_files import INDEX, WEIGHTS
from projaudit.weights import load_weights

TOGETHER = 1 << 28
"""Values that are held at once, where no single tensor has more."""
_WHOLE = ("I", "U", "BOOL")


def require_floats(checkpoint: Checkpoint) -> None:
    """None, or CouldNotProbe where a quantised weight of the model cannot be read."""
    for weight, why in checkpoint.readings[0].unread.values():
        raise CouldNotProbe(f"{clean(weight, 80)} {why}")


def rewrite(checkpoint: Checkpoint, dtype: str, into: Path) -> None:
    """Writes what transformers loads first into a folder: every weight in float, and their index.

    What was quantised is dequantised as it was audited, in the dtype (of torch) that the model runs
    in; tensors of whole numbers, which transformers makes itself, are left out. Raises
    CouldNotProbe where a weight is not read or the disk is full, and what loading raises.
    """
    import torch
    from safetensors.torch import save_file

    require_floats(checkpoint)
    reading, to = checkpoint.readings[0], getattr(torch, dtype)
    shapes = {
        name: shape
        for name, shape in reading.shapes.items()
        if name in reading.packed or not reading.tensors[name].dtype.startswith(_WHOLE)
    }
    need = sum(map(math.prod, shapes.values())) * to.itemsize
    if need > shutil.disk_usage(into).free:
        raise CouldNotProbe(f"its weights take {need / 2**30:.1f} GiB of disk, unpacked")
    weight_map: dict[str, str] = {}
    parts = _parts(shapes)
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else WEIGHTS
        loaded = load_weights(checkpoint.source, reading, names)
        tensors = {name: weight.tensor.to(to).contiguous() for name, weight in loaded.items()}
        save_file(tensors, into / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        (into / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _parts(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The names in their order, in groups of tensors that are held together."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held and held + math.prod(shape) > TOGETHER:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += math.prod(shape)
    return parts
