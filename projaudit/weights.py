"""The values of weights: loading tensors, with the digests of the bytes that were read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from projaudit.errors import LimitError, UnsupportedError
from projaudit.gguf_values import QUANTISED, dequantised, spacing
from projaudit.inert import clean
from projaudit.quantised_layouts import Packed
from projaudit.quantised_values import dequantise
from projaudit.readings import Reading
from projaudit.safetensors_header import TensorInfo
from projaudit.source import Source
from projaudit.torch_entries import check_frames, frames

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
