"""Depth behaviour from the outside: what would be run, whether it can be, and what was heard."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from projaudit.behaviour import sandbox
from projaudit.behaviour.reasons import CouldNotProbe, TooLittleMemory, without_own_model
from projaudit.behaviour.stage import require_parts, stage, to_download
from projaudit.checkpoint import Checkpoint
from projaudit.evidence import Evidence, from_plain
from projaudit.projector import Projector

if TYPE_CHECKING:
    import torch

SMALL = 1_000_000_000
"""Parameters up to which models run in float32, and a CPU is asked by default."""
BUDGET, BUDGET_LARGE = 16_500, 4_600
"""Answers of small and of large models where the user does not say: no plan takes more."""
SECONDS, SECONDS_LARGE = 3600.0, 86_400.0
"""Wall-clock that the process has which runs the model; the latter for a large one on a CPU."""
LIBRARIES = 2 << 30
"""Bytes that torch, transformers and the activations take beside the weights."""


@dataclass(frozen=True)
class Part:
    """A projector with its tensors, as they were audited."""

    checkpoint: Checkpoint
    projector: Projector
    tensors: Mapping[str, torch.Tensor]
    """By name on disk, in their storage dtype."""


@dataclass(frozen=True)
class Asked:
    """What a user may choose of depth behaviour."""

    prompts: tuple[str, ...] | None = None
    """None for the general ones."""
    images: tuple[str, ...] | None = None
    """Paths of image files; None for synthetic ones."""
    requests: tuple[str, ...] | None = None
    """What the model should refuse; None for the general ones."""
    budget: int | None = None
    """Answers that may be decoded; None for the default of the model's size."""


def parameters(checkpoint: Checkpoint) -> int:
    """The number of values in the weights that transformers loads."""
    return sum(math.prod(info.shape) for info in checkpoint.readings[0].tensors.values())


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """The files that hold the weights that transformers loads."""
    return sorted({info.file for info in checkpoint.readings[0].tensors.values()})


def budget_of(checkpoint: Checkpoint, asked: Asked) -> int:
    """The answers that may be decoded."""
    if asked.budget is not None:
        return asked.budget
    return BUDGET if parameters(checkpoint) <= SMALL else BUDGET_LARGE


def require_runnable(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raises CouldNotProbe where depth behaviour cannot be run here: cheap, downloads nothing."""
    require_extra()
    if checkpoint.adapter is not None:
        raise CouldNotProbe("it is an adapter, which may change more than the projector")
    if checkpoint.source.ref.path is not None and not checkpoint.source.ref.path.is_dir():
        raise CouldNotProbe("a single file has no language model, tokenizer and vision tower")
    _require_memory(memory(checkpoint, device), device)
    require_parts(checkpoint.source)


def _require_memory(need: int, device: torch.device) -> None:
    free = _free(device)
    if need > free:
        raise TooLittleMemory(
            f"needs about {need / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} are free"
        )


def require_unasked(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raises CouldNotProbe where depth behaviour is not run unless it is asked for."""
    require_runnable(checkpoint, device)
    if parameters(checkpoint) > SMALL and device.type == "cpu":
        raise CouldNotProbe("its language model takes hours on a CPU; --depth behaviour runs it")
    if download := to_download(checkpoint.source, weight_files(checkpoint)):
        raise CouldNotProbe(
            f"that would download {download / 1e9:.2g} GB more; --depth behaviour does"
        )


def require_extra() -> None:
    """Raises CouldNotProbe where the extra `behaviour` is not installed."""
    missing = [name for name in ("transformers", "accelerate", "PIL") if find_spec(name) is None]
    if missing:
        raise CouldNotProbe(
            f"{', '.join(missing)} is not installed; pip install 'projaudit[behaviour]'"
        )


def memory(checkpoint: Checkpoint, device: torch.device) -> int:
    """Bytes that running the model takes, at most."""
    each = 4 if parameters(checkpoint) <= SMALL else 2
    room = LIBRARIES if device.type == "cpu" else 3 << 30
    return parameters(checkpoint) * each + room


def _free(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def announce(checkpoint: Checkpoint, asked: Asked, device: torch.device) -> str:
    """One line on what depth behaviour will download and do."""
    download = to_download(checkpoint.source, weight_files(checkpoint))
    first = f"download {download / 1e9:.2g} GB, then " if download else ""
    answers = budget_of(checkpoint, asked)
    return (
        f"depth behaviour will {first}run the language model on {device} for up to {answers:,} "
        "answers (--depth weights does without)"
    )


def hear(
    target: Part,
    base: Part | None,
    asked: Asked,
    *,
    other_model: bool,
    device: torch.device,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> Evidence:
    """What the tuned projector makes the target's model say, and the base does not.

    `other_model` says that more than the projector differs: the base's own model then answers for
    the base. Raises CouldNotProbe with a reason, and what reading the sources raises.
    """
    with staged(target, base, other_model=other_model, device=device, seed=seed) as run:
        answer = sandbox.run(
            {
                **run.request,
                "prompts": None if asked.prompts is None else list(asked.prompts),
                "images": None if asked.images is None else list(asked.images),
                "requests": None if asked.requests is None else list(asked.requests),
                "budget": budget_of(target.checkpoint, asked),
            },
            **run.limits,
            progress=progress,
        )
    try:
        heard: Evidence = from_plain(Evidence, answer)
        if any(payload.strength < 0 for payload in heard.payloads):
            raise ValueError("a strength is negative")
    except (ValueError, OverflowError) as error:  # an integer that no float can hold
        raise CouldNotProbe(f"the process that ran it answered nonsense: {error}") from None
    return heard


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

    if target.projector.recipe is not None:
        raise CouldNotProbe("its projector is no chain of layers, which alone are swapped")
    if not target.projector.chain:
        raise CouldNotProbe("what its projector computes is not known")
    if target.projector.path[0].layout != "plain":
        raise CouldNotProbe("the weight of its projector's first layer is no linear layer's")
    require_runnable(target.checkpoint, device)
    with tempfile.TemporaryDirectory(prefix="projaudit-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        model = stage(target.checkpoint.source, weight_files(target.checkpoint), place / "target")
        notes, base_folder = [], None
        if base is not None and other_model:
            try:
                _require_memory(memory(target.checkpoint, device) * 2, device)
                source = base.checkpoint.source
                base_folder = stage(source, weight_files(base.checkpoint), place / "base")
            except CouldNotProbe as why:
                notes.append(without_own_model(why.reason))
        save_file(_contiguous(target.tensors), place / "tuned.safetensors")
        if base is not None:
            save_file(by_role(target.projector, base), place / "base.safetensors")
        large = parameters(target.checkpoint) > SMALL
        size = memory(target.checkpoint, device)
        yield Staged(
            {
                "folder": str(model),
                "base_folder": None if base_folder is None else str(base_folder),
                "tuned": str(place / "tuned.safetensors"),
                "base": None if base is None else str(place / "base.safetensors"),
                "prefix": target.projector.prefix,
                "first": target.projector.path[0].weight,
                "device": str(device),
                "dtype": "bfloat16" if large else "float32",
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


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def by_role(projector: Projector, base: Part) -> dict[str, torch.Tensor]:
    """The base's tensors under the target's names of the same roles.

    A bias that the base lacks is zero there; what only the base has cannot be put in.
    """
    import torch

    theirs = {layer.role: layer for layer in base.projector.linears}
    found: dict[str, torch.Tensor] = {}
    for layer in projector.linears:
        other = theirs.get(layer.role)
        if other is None or (other.shape, other.layout) != (layer.shape, layer.layout):
            raise CouldNotProbe(f"the base has no {layer.role} of the target's shape")
        found[layer.weight] = base.tensors[other.weight]
        if layer.bias is not None:
            found[layer.bias] = (
                base.tensors[other.bias] if other.bias else torch.zeros(layer.shape[0])
            )
    for role, name in projector.vectors.items():
        if role in base.projector.vectors:
            found[name] = base.tensors[base.projector.vectors[role]]
    return _contiguous(found)


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of a prompts file that are not empty; ValueError says what is wrong with it."""
    lines = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if not lines:
        raise ValueError("holds no prompt")
    if len(lines) > 64 or any(len(line) > 2000 for line in lines):
        raise ValueError("holds more than 64 prompts, or one of more than 2000 characters")
    return lines


def find_images(folder: Path, fewest: int = 4, most: int = 64) -> tuple[str, ...]:
    """The image files of a folder, by name; ValueError where there are fewer than `fewest`."""
    suffixes: Sequence[str] = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    found = sorted(f for f in folder.iterdir() if f.suffix.lower() in suffixes and f.is_file())
    if len(found) < fewest:
        raise ValueError(
            f"holds {len(found)} images ({', '.join(suffixes)}); at least {fewest} needed"
        )
    return tuple(str(file.absolute()) for file in found[:most])
