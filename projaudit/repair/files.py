"""What a repair writes: the projector alone, or a whole folder; never where the target lies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from projaudit.behaviour.able import weight_files
from projaudit.behaviour.stage import stage
from projaudit.errors import UnsupportedError, UsageError
from projaudit.inert import clean
from projaudit.safetensors_header import TensorInfo
from projaudit.sides import Side

if TYPE_CHECKING:
    import torch

PROJECTOR, MODEL = "projector.safetensors", "model"
_PLAIN = ("F64", "F32", "F16", "BF16")
_SAFETENSORS = ".safetensors"


def require_new(output: Path, target: Path | None) -> None:
    """None; UsageError (`usage.output`) where the output holds something, or lies in the target."""

    def wrong(message: str) -> UsageError:
        return UsageError(message, "output", file=clean(output) or None, field="-o")

    if not str(output).strip() or output == Path():
        raise wrong("names no folder of its own")
    if any(unicodedata.category(character) == "Cc" for character in str(output)):
        raise wrong("holds control characters")
    place = output.resolve()
    if target is not None:
        taken = target.resolve()
        folder = taken if taken.is_dir() else taken.parent
        if place == taken or (place.is_relative_to(folder) and taken.is_dir()):
            raise wrong("lies in the target, and a repair is never made in place")
        if folder.is_relative_to(place):
            raise wrong("holds the target, and a repair is never made in place")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise wrong("is there and no folder")
    try:
        if output.exists() and any(output.iterdir()):
            raise wrong("is not empty")
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrong(f"cannot be written: {error.strerror}") from None


def require_repairable(side: Side, full: bool) -> None:
    """None; UnsupportedError (`unsupported.repair`) where there is no place for a repair."""

    def refused(message: str, remedy: str) -> UnsupportedError:
        return UnsupportedError(
            message, "repair", file=clean(side.checkpoint.origin.name), remedy=remedy
        )

    if side.fit is not None:
        raise refused(
            "is an adapter, and a repaired projector is none",
            "merge it into its base and repair what comes out",
        )
    if side.reading.metadata is not None:
        raise refused(
            "is a GGUF file, which is not written",
            "repair the checkpoint that it was converted from, and convert again",
        )
    infos = [info for name in side.projector.tensors for info in side.reading.parts(name)]
    packed = [name for name in side.projector.tensors if name in side.reading.packed]
    if packed or any(info.dtype not in _PLAIN for info in infos):
        raise refused(
            "has a quantised projector, which is not written",
            "repair the weights that it was quantised from, and quantise again",
        )
    if full and side.alone:
        raise refused("holds a projector alone, and no whole folder", "leave --full out")
    if full and not all(info.file.endswith(_SAFETENSORS) for info in infos):
        raise refused("is no safetensors, so that no whole folder is made", "leave --full out")


def write_projector(
    file: Path, tensors: Mapping[str, torch.Tensor], provenance: Mapping[str, str]
) -> None:
    """A safetensors file whose bytes depend on its content alone."""
    from safetensors.torch import save

    content = save(dict(tensors), {"format": "pt", **provenance})
    start = 8 + int.from_bytes(content[:8], "little")
    # The library writes the metadata in random order.
    header = json.dumps(json.loads(content[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


def write_model(
    side: Side, tensors: Mapping[str, torch.Tensor], into: Path, *, linked: bool
) -> None:
    """A folder that transformers loads: the target's, with these tensors in the bytes of its own.

    `linked` weight files that hold nothing of the projector share their bytes with the target's
    where the file system can: for a folder that is not kept. Raises CouldNotProbe where the target
    is no folder that can be run.
    """
    checkpoint = side.checkpoint
    stage(checkpoint.source, weight_files(checkpoint), into)
    places: dict[str, list[tuple[str, TensorInfo]]] = {}
    for name in side.projector.tensors:
        for info in side.reading.parts(name):
            places.setdefault(info.file, []).append((name, info))
    for link in sorted(path for path in into.iterdir() if path.is_symlink()):
        source = link.resolve()
        link.unlink()
        ours = places.get(link.name, [])
        if linked and not ours and _hard_linked(source, link):
            continue
        shutil.copyfile(source, link)
        with link.open("r+b") as out:
            for name, info in ours:
                out.seek(info.start)
                out.write(_bytes_of(tensors[name]))


def _hard_linked(source: Path, link: Path) -> bool:
    try:
        os.link(source, link)
    except OSError:
        return False
    return True


def _bytes_of(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(file: Path) -> str:
    """The sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
