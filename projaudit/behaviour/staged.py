"""A model that is made ready to be run in a process of its own: its folder, and what to swap."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from projaudit.behaviour.able import (
    LIBRARIES,
    SMALL,
    memory,
    parameters,
    require_memory,
    require_runnable,
    weight_files,
)
from projaudit.behaviour.reasons import CouldNotProbe, without_own_model
from projaudit.behaviour.rewrite import require_floats, rewrite
from projaudit.behaviour.stage import stage
from projaudit.checkpoint import Checkpoint
from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.position import SOUND
from projaudit.projector import Projector

if TYPE_CHECKING:
    import torch

SECONDS, SECONDS_LARGE = 3600.0, 86_400.0
"""Wall-clock that the process has which runs the model; the latter for a large one on a CPU."""


@dataclass(frozen=True)
class Part:
    """A projector with its tensors, as they were audited."""

    checkpoint: Checkpoint
    projector: Projector
    tensors: Mapping[str, torch.Tensor]
    """By name on disk, in their storage dtype."""
    held: Mapping[str, torch.Tensor] | None = None
    """What the checkpoint holds, where an adapter was merged into that; None: `tensors`."""
    adapter_read: bool = False
    """Whether an adapter beside the weights is what was merged, or changes no projector."""
    alone: bool = False
    """Whether its files hold no more of a model than a projector: it is run in its base's."""
    left: str = ""
    """What of the model that was audited is not in the one that is run."""
    others: tuple[Part, ...] = ()
    """The other projectors that were audited with it; the base's in the target's order."""
    ways: tuple[Projector, ...] = ()
    """All the projectors of its model, where there are others."""


def host(target: Part, base: Part | None) -> Part:
    """The side whose model is run: the target, but for a projector alone."""
    if not target.alone:
        return target
    if base is None:
        raise CouldNotProbe("a projector alone needs a base, whose model it is run in")
    return base


@dataclass(frozen=True)
class Staged:
    """A model that is ready to be run in a process of its own."""

    request: dict[str, Any]
    """What `loading.load` needs to know."""
    limits: dict[str, Any]
    """What `sandbox.run` gives the process: seconds, memory, gpu."""


@contextmanager
def staged(
    target: Part, base: Part | None, *, other_model: bool, device: torch.device, seed: int
) -> Iterator[Staged]:
    """The target's repository and both projectors in a folder, which lasts as long as the block.

    `other_model` asks for the base's own model beside the target's. Raises as `hear`.
    """
    from safetensors.torch import save_file

    ours = host(target, base)
    if not ours.projector.chain and ours.projector.recipe is None:
        raise CouldNotProbe("what its projector computes is not known")
    require_runnable(ours.checkpoint, device, adapter_read=ours.adapter_read)
    large = parameters(ours.checkpoint) > SMALL
    dtype, size = "bfloat16" if large else "float32", memory(ours.checkpoint, device)
    with tempfile.TemporaryDirectory(prefix="projaudit-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        model = _staged(ours, dtype, place / "target")
        notes, base_folder = [target.left] if target.left else [], None
        alone = ours is not target or target.checkpoint.adapter is not None
        if base is not None and other_model and not alone:
            try:
                require_memory(size * 2, device)
                base_folder = _staged(base, dtype, place / "base")
            except CouldNotProbe as why:
                notes.append(without_own_model(why.reason))
        files = {"tuned": _together(ours, target)}
        if base is not None:
            files["base"] = _together(ours, base)
        files["stored"] = {n: t for one in (ours, *ours.others) for n, t in _held(one).items()}
        for name, tensors in files.items():
            save_file(_contiguous(tensors), place / f"{name}.safetensors")
        yield Staged(
            {
                "folder": str(model),
                "base_folder": None if base_folder is None else str(base_folder),
                "base": None,
                **{name: str(place / f"{name}.safetensors") for name in files},
                **_where(ours.projector),
                "beside": [
                    {**_where(way), "tensors": way.tensors, "seen": not hears(way)}
                    for way in ours.ways
                    if way.tensors != ours.projector.tensors
                ],
                "device": str(device),
                "dtype": dtype,
                "seed": seed,
                "notes": notes,
            },
            {
                "seconds": SECONDS_LARGE if large and device.type == "cpu" else SECONDS,
                # Mapped files count, and so does what they are converted into.
                "memory": (2 if base_folder is None else 4) * size + LIBRARIES,
                "gpu": device.type == "cuda",
            },
        )


def _staged(of: Part, dtype: str, into: Path) -> Path:
    """The folder with the model of a part; its weights as they are, or made float."""
    checkpoint, files = of.checkpoint, weight_files(of.checkpoint)
    floats = all(file.endswith(".safetensors") for file in files)
    if floats and not checkpoint.readings[0].packed:
        return stage(checkpoint.source, files, into, adapter_read=of.adapter_read)
    require_floats(checkpoint)
    stage(checkpoint.source, None, into, adapter_read=of.adapter_read)
    try:
        rewrite(checkpoint, dtype, into)
    except (FormatError, LimitError, UnsupportedError) as error:
        raise CouldNotProbe(str(error)) from None
    return into


def _held(part: Part) -> Mapping[str, torch.Tensor]:
    return part.tensors if part.held is None else part.held


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def hears(projector: Projector) -> bool:
    """Whether it is one of sound, by its module's name."""
    return SOUND.search(projector.prefix) is not None


def _where(projector: Projector) -> dict[str, Any]:
    return {
        "prefix": projector.prefix,
        "entry": projector.entry,
        "first": asdict(projector.path[0]),
        "last": projector.path[-1].weight,
    }


def _together(ours: Part, other: Part) -> dict[str, torch.Tensor]:
    """The tensors of all projectors of the other part, by the names in our model."""
    found: dict[str, torch.Tensor] = {}
    for one, theirs in zip((ours, *ours.others), (other, *other.others), strict=True):
        found |= one.tensors if one is theirs else by_role(one.projector, theirs)
    return found


def by_role(projector: Projector, other: Part) -> dict[str, torch.Tensor]:
    """The tensors of another part under this projector's names of the same roles, laid as its own.

    A bias that the other lacks is zero there; what only the other has cannot be put in.
    """
    import torch

    theirs = {layer.role: layer for layer in other.projector.linears}
    found: dict[str, torch.Tensor] = {}
    for layer in projector.linears:
        of = theirs.get(layer.role)
        unlike = of is not None and of.layout != layer.layout
        if (
            of is None
            or of.shape != layer.shape
            or (unlike and "unfold" in (of.layout, layer.layout))
        ):
            raise CouldNotProbe(f"the base has no {layer.role} of the target's shape")
        tensor = other.tensors[of.weight]
        found[layer.weight] = tensor.T if unlike else tensor
        if layer.bias is not None:
            found[layer.bias] = other.tensors[of.bias] if of.bias else torch.zeros(layer.shape[0])
    for role, name in projector.vectors.items():
        if role in other.projector.vectors:
            found[name] = other.tensors[other.projector.vectors[role]]
    return _contiguous(found)
