"""The weights of a source: which bytes they are in every reading, and loading those bytes."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from projaudit.errors import LimitError, NothingError, UnsupportedError
from projaudit.inert import clean
from projaudit.readings import Reading, Readings
from projaudit.safetensors_header import Header, TensorInfo
from projaudit.source import Source, refuse_lfs_pointer
from projaudit.weight_files import MAX_SHARDS, Ambiguity, Way, read_config, ways_to_read

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

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What a Trainer leaves beside the weights, and no loader takes for weights.
_TRAINER = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)")


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
    """In its storage dtype, on the CPU."""


def open_checkpoint(source: Source) -> Checkpoint:
    """The weights of a source, in every way that a loader may read them.

    Reads config.json, the index and the headers of the safetensors files in the root. Raises
    FormatError (`format.config`, `format.index`, `format.safetensors`, `format.lfs-pointer`),
    NothingError (`nothing.weights`), UnsupportedError (`unsupported.format`,
    `unsupported.adapter`) where there are weights that projaudit does not read, and LimitError
    (`limit.shards`, `limit.tensors`, `limit.readings`).
    """
    if source.ref.path is not None and not source.ref.path.is_dir():
        return _open_file(source)
    config, redirect, hints, notes = read_config(source)
    root = [path for path in source.files if "/" not in path]
    weights = [p for p in root if p.endswith(".safetensors") and not _is_adapter(p)]
    if len(weights) > MAX_SHARDS:
        raise LimitError(f"{len(weights)} safetensors files, above {MAX_SHARDS}", "shards")
    ways = ways_to_read(source, redirect, hints, weights)
    if not ways:
        raise _nothing_to_read(source, root)
    readings = Readings(source, config, notes)
    for way in ways:
        readings.add_way(way)
    if not readings.found:
        raise NothingError("its weight files hold no tensors", "weights", file=clean(source.name))
    used = {path for way in ways for path in way.files}
    readings.add_unread(weights, used)
    readings.notes += _beside(source, root, used)
    return _checkpoint(source, config, readings)


def load_tensors(source: Source, infos: Iterable[TensorInfo]) -> dict[str, Stored]:
    """The tensors of those infos by name, in storage dtype, with the sha256 of their bytes.

    Raises UnsupportedError (`unsupported.dtype`) for what is not floating point of 8 to 64 bits,
    LimitError (`limit.tensor-size`) above 4 GiB, both before anything is read; ValueError for two
    infos of one name; and what the source raises.
    """
    by_file: dict[str, list[TensorInfo]] = defaultdict(list)
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise ValueError(f"two tensors are called {info.name!r}")
        names.add(info.name)
        _check_loadable(info)
        by_file[info.file].append(info)
    stored: dict[str, Stored] = {}
    for path, wanted in by_file.items():
        wanted.sort(key=lambda info: info.start)
        spans = source.read_spans(path, [(info.start, info.stop) for info in wanted])
        for info, data in zip(wanted, spans, strict=True):
            digest = hashlib.sha256(data).hexdigest()
            stored[info.name] = Stored(info, digest, _as_tensor(info, data))
    return stored


def _check_loadable(info: TensorInfo) -> None:
    where = {"file": clean(info.file), "field": clean(info.name)}
    if info.dtype not in _TORCH_DTYPES:
        raise UnsupportedError(
            f"dtype {info.dtype} is not audited",
            "dtype",
            **where,
            remedy=f"save the projector as one of {', '.join(_TORCH_DTYPES)}",
        )
    if info.nbytes > TENSOR_LIMIT:
        raise LimitError(f"{info.nbytes} bytes, above {TENSOR_LIMIT}", "tensor-size", **where)


def _as_tensor(info: TensorInfo, data: bytes) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[info.dtype])
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    # A copy, as torch wants memory that may be written to.
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(info.shape)


def _beside(source: Source, root: Sequence[str], used: set[str]) -> list[Ambiguity]:
    """The ambiguities of weights that are not read here."""
    found = {
        "pickle-beside": [p for p in root if _is_pickle(p)],
        "gguf-beside": [p for p in root if p.endswith(".gguf")],
        "adapter-beside": [p for p in root if _is_adapter(p)],
        "unread-subfolder": [
            path
            for path in source.files
            if "/" in path and path.endswith(".safetensors") and path not in used
        ],
    }
    says = {
        "pickle-beside": "pickled weights, which older or other loaders may take; not read",
        "gguf-beside": "GGUF weights, which llama.cpp takes; not read",
        "adapter-beside": "an adapter, which transformers applies where peft is installed "
        "(from a Hub: to the base that the adapter names); not read",
        "unread-subfolder": "weights in a subfolder, loaded if it is asked for; not read",
    }
    return [
        Ambiguity(kind, f"{clean(files[0], 80)}: {says[kind]}", tuple(files))
        for kind, files in found.items()
        if set(files) - used
    ]


def _is_pickle(path: str) -> bool:
    return path.endswith(_PICKLES) and not _TRAINER.match(path) and not _is_adapter(path)


def _is_adapter(path: str) -> bool:
    return path.startswith(("adapter_config.json", "adapter_model.", "adapter_model-"))


def _nothing_to_read(source: Source, root: Sequence[str]) -> NothingError | UnsupportedError:
    pickles = [path for path in root if _is_pickle(path)]
    ggufs = [path for path in root if path.endswith(".gguf")]
    if pickles or ggufs:
        return _not_read(source.name, (pickles or ggufs)[0], bool(pickles))
    if any(_is_adapter(path) for path in root):
        return UnsupportedError(
            "holds an adapter without the model",
            "adapter",
            file=clean(source.name),
            remedy="it is read as a target only; merge it into its base and name the result",
        )
    return NothingError("holds no model weights", "weights", file=clean(source.name))


def _not_read(where: str, path: str, pickled: bool) -> UnsupportedError:
    remedy = "convert it to safetensors" + ("; projaudit never unpickles" if pickled else "")
    says = f"{clean(path, 80)} holds {'pickled' if pickled else 'GGUF'} weights, which are not read"
    return UnsupportedError(says, "format", file=clean(where), remedy=remedy)


def _open_file(source: Source) -> Checkpoint:
    """The one file that the user named."""
    path = next(iter(source.files))
    head = source.read(path, 0, min(source.files[path].size, 64))
    refuse_lfs_pointer(head, path)
    if head.startswith(b"GGUF") or path.endswith((".gguf", *_PICKLES)):
        raise _not_read(source.name, path, not head.startswith(b"GGUF"))
    if path.endswith(".json"):
        raise UnsupportedError(
            "is no weight file", "format", file=clean(path), remedy="name its folder"
        )
    readings = Readings(source, None)
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
