"""The weights of a source: which bytes they are in every reading, and loading those bytes."""

from __future__ import annotations

import hashlib
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from projaudit.errors import LimitError, NothingError, UnsupportedError
from projaudit.gguf_header import MAGIC, architecture
from projaudit.gguf_values import QUANTISED, dequantised, spacing
from projaudit.inert import clean
from projaudit.quantised_layouts import Packed
from projaudit.quantised_values import dequantise
from projaudit.readings import Reading, Readings
from projaudit.safetensors_header import Header, TensorInfo
from projaudit.source import Source, refuse_lfs_pointer
from projaudit.torch_entries import check_frames, frames
from projaudit.weight_files import (
    MAX_SHARDS,
    Ambiguity,
    Way,
    is_adapter,
    is_pickle,
    read_config,
    ways_to_read,
)

if TYPE_CHECKING:
    import torch

TENSOR_LIMIT = 4 << 30
"""Bytes of one tensor that is loaded."""

_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# What parts of quantised weights are stored in; torch counts and shifts signed words only.
_CODE_DTYPES = {
    **_TORCH_DTYPES,
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "U32": "int32",
    "I64": "int64",
}


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


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in its file."""

    info: TensorInfo
    sha256: str
    """Of the bytes read, hex."""
    tensor: torch.Tensor
    """In its storage dtype, on the CPU; fp32 where ggml quantised it."""
    step: torch.Tensor | None = None
    """How far apart the values lie that an entry can have, in its shape; None: those of a dtype."""


@dataclass(frozen=True)
class Weight:
    """A weight as its loader has it: one stored tensor, or what several of them stand for."""

    parts: tuple[tuple[TensorInfo, str], ...]
    """What was read, each with the sha256 of its bytes."""
    tensor: torch.Tensor
    """In its storage dtype, on the CPU; fp32 where it was quantised."""
    step: torch.Tensor | None = None
    """How far apart the values lie that an entry can have, in its shape; None: those of a dtype."""
    calibrated: bool = False
    """Whether its values may be others than the nearest that it could have."""


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


def load_tensors(
    source: Source, infos: Iterable[TensorInfo], codes: Set[str] = frozenset()
) -> dict[str, Stored]:
    """The tensors of those infos by name, in storage dtype, with the sha256 of their bytes.

    `codes` are the names of those that may hold whole numbers. Raises UnsupportedError
    (`unsupported.dtype`) for any other that is neither floating point of 8 to 64 bits nor ggml's,
    LimitError (`limit.tensor-size`) above 4 GiB, both before anything is read; ValueError for two
    infos of one name; and what the source raises.
    """
    by_file: dict[str, list[TensorInfo]] = defaultdict(list)
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise ValueError(f"two tensors are called {info.name!r}")
        names.add(info.name)
        _check_loadable(info, _CODE_DTYPES if info.name in codes else _TORCH_DTYPES)
        by_file[info.file].append(info)
    stored: dict[str, Stored] = {}
    for path, wanted in by_file.items():
        wanted.sort(key=lambda info: info.start)
        places = [(info.start, info.stop) for info in wanted]
        spans = source.read_spans(path, [*places, *frames(wanted)])
        check_frames(wanted, spans[len(wanted) :], path)
        for info, data in zip(wanted, spans, strict=False):
            digest = hashlib.sha256(data).hexdigest()
            stored[info.name] = Stored(info, digest, *_as_tensor(info, data))
    return stored


def check_places(source: Source, infos: Iterable[TensorInfo]) -> None:
    """None, or FormatError where a torch zip puts a tensor elsewhere than its directory says."""
    by_file: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in infos:
        by_file[info.file].append(info)
    for path, wanted in by_file.items():
        if spans := frames(wanted):
            check_frames(wanted, source.read_spans(path, spans), path)


def load_weights(source: Source, reading: Reading, names: Iterable[str]) -> dict[str, Weight]:
    """The weights of those names, quantised ones dequantised.

    Raises what `load_tensors` raises, and FormatError (`format.quantised`) where the contents of a
    quantised weight's parts contradict each other.
    """
    names = list(names)
    infos = [info for name in names for info in reading.parts(name)]
    codes = {i.name for n in names if n in reading.packed for i in reading.parts(n)}
    for weight in (reading.packed[name] for name in names if name in reading.packed):
        _check_size(weight)
    stored = load_tensors(source, infos, codes)
    loaded: dict[str, Weight] = {}
    for name in names:
        parts = tuple((info, stored[info.name].sha256) for info in reading.parts(name))
        if name in reading.packed:
            packed = reading.packed[name]
            raw = {leaf: stored.pop(info.name).tensor for leaf, info in packed.parts.items()}
            loaded[name] = Weight(parts, *dequantise(packed, raw), packed.calibrated)
        else:
            one = stored[parts[0][0].name]  # which may stand under another name than in its file
            loaded[name] = Weight(parts, one.tensor, one.step)
    return loaded


def _check_size(weight: Packed) -> None:
    size = 4 * weight.shape[0] * weight.shape[1]
    if size > TENSOR_LIMIT:
        file = next(iter(weight.parts.values())).file
        raise LimitError(
            f"{size} bytes in float32, above {TENSOR_LIMIT}",
            "tensor-size",
            file=clean(file),
            field=clean(weight.name),
        )


def _check_loadable(info: TensorInfo, dtypes: Mapping[str, str]) -> None:
    where = {"file": clean(info.file), "field": clean(info.name)}
    if info.dtype not in dtypes and info.dtype not in QUANTISED:
        says = f"dtype {info.dtype} is not audited"
        if info.dtype[0] in "IU":
            says = f"holds whole numbers ({info.dtype}), and nothing beside it says their scale"
        raise UnsupportedError(
            says,
            "dtype",
            **where,
            remedy=f"save the projector as one of {', '.join(_TORCH_DTYPES)}",
        )
    values = 4 * info.numel if info.dtype in QUANTISED else 0
    if max(info.nbytes, values) > TENSOR_LIMIT:
        size = max(info.nbytes, values)
        raise LimitError(f"{size} bytes, above {TENSOR_LIMIT}", "tensor-size", **where)


def _as_tensor(info: TensorInfo, data: bytes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The values, and the step that they were rounded with where the dtype does not say it."""
    import torch

    step = None
    if info.dtype in QUANTISED:
        tensor, step = dequantised(data, info.dtype, info.shape)
    else:
        dtype: torch.dtype = getattr(torch, _CODE_DTYPES[info.dtype])
        # A copy, as torch wants memory that may be written to.
        raw = (
            torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        )
        if data and info.strides is not None:
            tensor = raw.as_strided(info.shape, info.strides).contiguous()
        else:
            tensor = raw.reshape(info.shape)
    if info.added:
        step = spacing(tensor) if step is None else step
        tensor = (tensor.double() - info.added).float()
    return tensor, step


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
