"""The weights of a source: which bytes they are, in every way that a loader may read them."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from projaudit.errors import LimitError, NothingError, UnsupportedError
from projaudit.gguf_header import MAGIC, architecture
from projaudit.inert import clean
from projaudit.readings import Reading, Readings
from projaudit.safetensors_header import Header
from projaudit.source import Source, refuse_lfs_pointer
from projaudit.weight_files import (
    MAX_SHARDS,
    Ambiguity,
    Way,
    is_adapter,
    is_pickle,
    read_config,
    ways_to_read,
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a source: where each tensor is, for every reading; nothing loaded yet."""

    source: Source
    config: Mapping[str, object] | None
    """config.json as a loader sees it; None where there is none."""
    readings: tuple[Reading, ...]
    """What transformers loads first, then what others may load instead."""
    ambiguities: tuple[Ambiguity, ...]
    headers: Mapping[str, Header] = field(repr=False)
    """By file, of every file whose header was read."""
    adapter: Source | None = None
    """The repository of an adapter alone, whose base all of the above is."""

    @property
    def origin(self) -> Source:
        """The repository that it is the checkpoint of: an adapter's, where it is one."""
        return self.adapter or self.source


def open_checkpoint(source: Source) -> Checkpoint:
    """The weights of a source, in every way that a loader may read them.

    Reads config.json, the index and the headers of the safetensors files and files of torch.save
    in the root, and those of the GGUF files there that are no text models. Raises FormatError
    (`format.config`, `format.index`, `format.safetensors`, `format.torch-zip`, `format.gguf`,
    `format.lfs-pointer`),
    NothingError (`nothing.weights`), UnsupportedError (`unsupported.format`,
    `unsupported.adapter`) where there are weights that projaudit does not read, and LimitError
    (`limit.shards`, `limit.tensors`, `limit.readings`).
    """
    path = source.ref.path
    if getattr(source, "one_file", path is not None and not path.is_dir()):
        return _open_file(source)
    config, redirect, hints, notes = read_config(source)
    root = [path for path in source.files if "/" not in path]
    weights = [p for p in root if p.endswith(".safetensors") and not is_adapter(p)]
    pickles = [p for p in root if is_pickle(p)]
    if len(weights) + len(pickles) > MAX_SHARDS:
        raise LimitError(f"{len(weights) + len(pickles)} files, above {MAX_SHARDS}", "shards")
    ways = ways_to_read(source, redirect, hints, weights, pickles)
    ggufs = _projector_ggufs(source, root)
    if not ways and not ggufs:
        raise _nothing_to_read(source, root)
    readings = Readings(source, config, notes)
    for way in ways:
        readings.add_way(way)
    used = {path for way in ways for path in way.files}
    if readings.found:
        readings.add_unread([*weights, *pickles], used)
    for gguf in ggufs:
        readings.add_gguf(gguf, beside=bool(ways))
    if not readings.found:
        raise NothingError("its weight files hold no tensors", "weights", file=clean(source.name))
    used.update(ggufs)
    if not ways:  # then no loader takes another format than GGUF
        used.update(path for path in root if path.endswith(".gguf"))
    readings.notes += _beside(source, root, used)
    return _checkpoint(source, config, readings)


def _projector_ggufs(source: Source, root: Sequence[str]) -> list[str]:
    """The GGUF files that may be projectors, the largest first, as it is the least rounded.

    What is named as one, or does not say that it is a text model: the headers of those are long.
    """
    found = [
        path
        for path in root
        if path.endswith(".gguf")
        and ("mmproj" in path.lower() or architecture(source, path) in (None, "clip"))
    ]
    return sorted(found, key=lambda path: (-source.files[path].size, path))


def _beside(source: Source, root: Sequence[str], used: set[str]) -> list[Ambiguity]:
    """The ambiguities of weights that are not read here."""
    subfolders = [
        path
        for path in source.files
        if "/" in path
        and path not in used
        and (
            path.endswith(".safetensors")
            or is_pickle(posixpath.basename(path))
            or (path.endswith(".gguf") and "mmproj" in path.lower())
        )
    ]
    found = {
        "gguf-beside": [p for p in root if p.endswith(".gguf") and p not in used],
        "adapter-beside": [p for p in root if is_adapter(p)],
        "unread-subfolder": subfolders,
    }
    says = {
        "gguf-beside": "GGUF weights of a text model, which llama.cpp takes; not read",
        "adapter-beside": "an adapter, which transformers applies where peft is installed "
        "(from a Hub: to the base that the adapter names); not read",
        "unread-subfolder": "weights in a subfolder, loaded if it is asked for; not read",
    }
    return [
        Ambiguity(kind, f"{clean(files[0], 80)}: {says[kind]}", tuple(files))
        for kind, files in found.items()
        if set(files) - used
    ]


def _nothing_to_read(source: Source, root: Sequence[str]) -> NothingError | UnsupportedError:
    ggufs = [path for path in root if path.endswith(".gguf")]
    if ggufs and all(architecture(source, path) for path in ggufs):
        return NothingError(
            "its GGUF files are text models, without a projector",
            "projector",
            file=clean(source.name),
            remedy="name a folder or file with the mmproj that goes with them",
        )
    if ggufs:
        return _not_read(source.name, ggufs[0])
    if any(is_adapter(path) for path in root):
        return UnsupportedError(
            "holds an adapter without the model",
            "adapter",
            file=clean(source.name),
            remedy="it is read as a target only; merge it into its base and name the result",
        )
    # Where peft saves adapters that have names.
    below = [
        path.rpartition("/")[0] for path in source.files if path.endswith("/adapter_config.json")
    ]
    return NothingError(
        "holds no model weights",
        "weights",
        file=clean(source.name),
        remedy=f"an adapter lies in its folder {clean(below[0], 80)}: name that" if below else "",
    )


def _not_read(where: str, path: str) -> UnsupportedError:
    says = f"{clean(path, 80)} holds GGUF weights, which are not read"
    remedy = "convert it to safetensors"
    return UnsupportedError(says, "format", file=clean(where), remedy=remedy)


def _open_file(source: Source) -> Checkpoint:
    """The one file that the user named."""
    path = next(iter(source.files))
    head = source.read(path, 0, min(source.files[path].size, 64))
    refuse_lfs_pointer(head, path)
    if path.endswith(".json"):
        raise UnsupportedError(
            "is no weight file", "format", file=clean(path), remedy="name its folder"
        )
    readings = Readings(source, None)
    if head.startswith(MAGIC) or path.endswith(".gguf"):
        readings.add_gguf(path, beside=False)
    else:
        readings.add_way(Way("main", "the file as named", (path,)))
    if not readings.found:
        raise NothingError("holds no tensors", "weights", file=clean(path))
    return _checkpoint(source, None, readings)


def _checkpoint(
    source: Source, config: Mapping[str, object] | None, readings: Readings
) -> Checkpoint:
    readings.note_odd_names()
    found, notes = tuple(readings.found), tuple(readings.notes)
    return Checkpoint(source, config, found, notes, readings.headers)
