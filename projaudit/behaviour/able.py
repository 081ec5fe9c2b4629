"""Whether a model can be run here, what that takes, and whether it is unless it is asked for."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from projaudit.behaviour.reasons import CouldNotProbe, TooLittleMemory
from projaudit.behaviour.stage import require_parts, to_download
from projaudit.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

SMALL = 1_000_000_000
"""Parameters up to which models run in float32, and a CPU is asked by default."""
LIBRARIES = 2 << 30
"""Bytes that torch, transformers and the activations take beside the weights."""


def parameters(checkpoint: Checkpoint) -> int:
    """The number of values in the weights that transformers loads."""
    return sum(map(math.prod, checkpoint.readings[0].shapes.values()))


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """The files that hold the weights that transformers loads."""
    return sorted({info.file for info in checkpoint.readings[0].tensors.values()})


def require_runnable(
    checkpoint: Checkpoint, device: torch.device, *, adapter_read: bool = False
) -> None:
    """Raises CouldNotProbe where depth behaviour cannot be run here: cheap, downloads nothing."""
    require_extra()
    if checkpoint.source.ref.path is not None and not checkpoint.source.ref.path.is_dir():
        raise CouldNotProbe("a single file has no language model, tokenizer and vision tower")
    require_memory(memory(checkpoint, device), device)
    require_parts(checkpoint.source, adapter_read=adapter_read)


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
            f"not installed: {', '.join(missing)}; pip install 'projaudit[behaviour]'"
        )


def memory(checkpoint: Checkpoint, device: torch.device) -> int:
    """Bytes that running the model takes, at most."""
    each = 4 if parameters(checkpoint) <= SMALL else 2
    room = LIBRARIES if device.type == "cpu" else 3 << 30
    return parameters(checkpoint) * each + room


def require_memory(need: int, device: torch.device) -> None:
    """Raises TooLittleMemory where fewer bytes than these are free."""
    free = _free(device)
    if need > free:
        raise TooLittleMemory(
            f"needs about {need / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} are free"
        )


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
