"""Depth behaviour from the outside: what would be run, whether it can be, and what was heard."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from projaudit.behaviour import sandbox
from projaudit.behaviour.asked import Asked
from projaudit.behaviour.reasons import CouldNotProbe, TooLittleMemory, without_own_model
from projaudit.behaviour.rewrite import require_floats, rewrite
from projaudit.behaviour.stage import require_parts, stage, to_download
from projaudit.checkpoint import Checkpoint
from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.evidence import Evidence, from_plain
from projaudit.position import SOUND
from projaudit.projector import Projector

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
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


def parameters(checkpoint: Checkpoint) -> int:
    """The number of values in the weights that transformers loads."""
    return sum(map(math.prod, checkpoint.readings[0].shapes.values()))


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """The files that hold the weights that transformers loads."""
    return sorted({info.file for info in checkpoint.readings[0].tensors.values()})


def budget_of(checkpoint: Checkpoint, asked: Asked) -> int:
    """The answers that may be decoded."""
    if asked.budget is not None:
        return asked.budget
    return BUDGET if parameters(checkpoint) <= SMALL else BUDGET_LARGE


def host(target: Part, base: Part | None) -> Part:
    """The side whose model is run: the target, but for a projector alone."""
    if not target.alone:
        return target
    if base is None:
        raise CouldNotProbe("a projector alone needs a base, whose model it is run in")
    return base


def require_runnable(
    checkpoint: Checkpoint, device: torch.device, *, adapter_read: bool = False
) -> None:
    """Raises CouldNotProbe where depth behaviour cannot be run here: cheap, downloads nothing."""
    require_extra()
    if checkpoint.source.ref.path is not None and not checkpoint.source.ref.path.is_dir():
        raise CouldNotProbe("a single file has no language model, tokenizer and vision tower")
    _require_memory(memory(checkpoint, device), device)
    require_parts(checkpoint.source, adapter_read=adapter_read)


def _require_memory(need: int, device: torch.device) -> None:
    free = _free(device)
    if need > free:
        raise TooLittleMemory(
            f"needs about {need / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} are free"
        )


def require_unasked(checkpoint: Checkpoint, device: torch.device) -> None:
    """Raises CouldNotProbe where depth behaviour is not run unless it is asked for."""
    if checkpoint.adapter is not None:
        raise CouldNotProbe("it is an adapter; --depth behaviour runs it in the model it is for")
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
            run.request | questions(host(target, base), asked), **run.limits, progress=progress
        )
    return told(Evidence, answer)


def questions(part: Part, asked: Asked) -> dict[str, Any]:
    """What the process is asked, beside the model: prompts, images, requests, most answers."""
    return {
        "prompts": None if asked.prompts is None else list(asked.prompts),
        "images": None if asked.images is None else list(asked.images),
        "requests": None if asked.requests is None else list(asked.requests),
        "budget": budget_of(part.checkpoint, asked),
    }


def told(kind: type[T], answer: object) -> T:
    """What the process answered, as a value of that type; CouldNotProbe where it is none."""
    try:
        found: T = from_plain(kind, answer)
        if isinstance(found, Evidence) and any(p.strength < 0 for p in found.payloads):
            raise ValueError("a strength is negative")
    except (ValueError, OverflowError) as error:  # an integer that no float can hold
        raise CouldNotProbe(f"the process that ran it answered nonsense: {error}") from None
    return found


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
                _require_memory(size * 2, device)
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
