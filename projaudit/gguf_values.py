"""The values of a quantised GGUF tensor, and the step that each was rounded with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from projaudit.gguf_header import GGML_TYPES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array: TypeAlias = np.ndarray[Any, Any]

_SIZES: Mapping[str, tuple[int, int]] = {name: (n, size) for name, n, size in GGML_TYPES.values()}
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_HALF = (0, 0, 0, 0, 255, 255, 255, 255)


class _Codes(NamedTuple):
    """Bytes of a block that hold codes."""

    start: int
    stop: int
    one: int = 0
    """The byte whose codes are 1; 0 where these bytes stay as they are for code 0."""
    kept: tuple[int, ...] = (0,)
    """Bits that hold something else, byte by byte, over and over."""


@dataclass(frozen=True)
class _Rounding:
    """How a type rounds: which bytes of a block are codes, and what a code is worth.

    With all codes put to 0, and to 1, the package that dequantises says what the scale of every
    entry is, whatever way that scale is packed.
    """

    codes: tuple[_Codes, ...]
    worth: float = 1.0
    """How many steps (scales, with levels) lie between code 0 and 1; or, where all stays at code 0,
    how many |value| is."""
    levels: tuple[int, ...] = ()
    """Code book in units of the scale, where its gaps differ."""


def _grid(span: float, points: int, entries: int, least: float) -> float:
    """What of its step |entry 0| is, for a grid of `points` vectors of `entries` numbers.

    The cells of the grid share the cube of side `span` (in units of the scale), so that an entry
    has points^(1/entries) levels on it; `least` is the entry at code 0.
    """
    return least * float(points ** (1 / entries)) / span


# Blocks as ggml-common.h lays them out. The span of a grid is that of its levels and half a gap on
# either side; its points are those of the table times the signs that are free.
_ROUNDINGS: Mapping[str, _Rounding] = {
    "Q4_0": _Rounding((_Codes(2, 18, 0x11),)),
    "Q4_1": _Rounding((_Codes(4, 20, 0x11),)),
    "Q5_0": _Rounding((_Codes(2, 6), _Codes(6, 22, 0x11))),
    "Q5_1": _Rounding((_Codes(4, 8), _Codes(8, 24, 0x11))),
    "Q8_0": _Rounding((_Codes(2, 34, 0x01),)),
    "Q2_K": _Rounding((_Codes(16, 80, 0x55),)),
    "Q3_K": _Rounding((_Codes(0, 32), _Codes(32, 96, 0x55))),
    "Q4_K": _Rounding((_Codes(16, 144, 0x11),)),
    "Q5_K": _Rounding((_Codes(16, 48), _Codes(48, 176, 0x11))),
    "Q6_K": _Rounding((_Codes(0, 128, 0x11), _Codes(128, 192))),
    "TQ1_0": _Rounding((_Codes(0, 52),)),
    "TQ2_0": _Rounding((_Codes(0, 64, 0x55),)),
    "MXFP4": _Rounding((_Codes(1, 17, 0x11),), levels=_E2M1),
    "NVFP4": _Rounding((_Codes(4, 36, 0x11),), levels=_E2M1),
    "IQ4_NL": _Rounding((_Codes(2, 18, 0x11),), 23.0, levels=_NL),
    "IQ4_XS": _Rounding((_Codes(8, 136, 0x11),), 23.0, levels=_NL),
    "IQ2_XXS": _Rounding((_Codes(2, 66, kept=_HALF),), _grid(103, 256 << 7, 8, 8)),
    "IQ2_XS": _Rounding((_Codes(2, 66),), _grid(103, 512 << 7, 8, 8)),
    "IQ2_S": _Rounding((_Codes(2, 34), _Codes(66, 74)), _grid(103, 1024 << 8, 8, 8)),
    "IQ3_XXS": _Rounding((_Codes(2, 66),), _grid(132, 256**2 << 7, 8, 4)),
    "IQ3_S": _Rounding((_Codes(2, 74),), _grid(32, 512**2 << 8, 8, 1)),
    "IQ1_S": _Rounding((_Codes(2, 34), _Codes(34, 50, kept=(0, 0x70))), _grid(3, 2048, 8, 0.875)),
    "IQ1_M": _Rounding((_Codes(0, 48),), _grid(3, 2048, 8, 0.875)),
}

# Their codes are chosen before the scale, and what is added to all of a block, are rounded to fp16
# (to 2^-24 where it is below the normal numbers), which moves every value once more.
_SHIFTED = {"Q4_1", "Q5_1"}
_SCALED_LATER = {"Q4_0", "Q5_0", "Q8_0", *_SHIFTED}

QUANTISED = frozenset(_ROUNDINGS)
"""The quantised types that are read."""


def dequantised(data: bytes, dtype: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(values, step) of a quantised tensor, both fp32 of `shape`.

    The values are llama.cpp's own, by its package `gguf`. Rounding has moved each by an error of
    variance step²/12: uniform over a step where the codes of a type are (`Q…`, `TQ…`); as wide as
    the cell of its level where they are not (`IQ4_…`, `MXFP4`, `NVFP4`); and over a cell of the
    grid on average where numbers are coded together (other `IQ…`). A step is 0 where a whole block
    is, and infinite where a scale is no number.
    """
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, dequantize

    block, size = _SIZES[dtype]
    blocks = np.frombuffer(data, np.uint8).reshape(-1, size)
    kind = GGMLQuantizationType[dtype]
    rows = math.prod(shape[:-1])  # the package goes through rows in groups, many blocks at once
    if not len(blocks):
        return torch.zeros(shape), torch.zeros(shape)

    def decoded(raw: Array) -> Array:
        # Infinite scales, and codes that a hostile file holds and no quantiser writes.
        with np.errstate(all="ignore"):
            return np.asarray(dequantize(raw.reshape(rows, -1), kind)).reshape(-1, block)

    values = decoded(blocks.copy())
    step = _step(_ROUNDINGS[dtype], blocks, values, decoded)
    if dtype in _SCALED_LATER:
        step = _widened(step, values, shifted=dtype in _SHIFTED)
    return torch.from_numpy(values.reshape(shape)), torch.from_numpy(step.reshape(shape))


def spacing(tensor: Tensor) -> Tensor:
    """The distance of a float dtype's neighbouring values at each entry, fp32."""
    import torch

    exponent = torch.frexp(tensor.float()).exponent.float() - 1
    return torch.exp2(exponent) * torch.finfo(tensor.dtype).eps


def _step(
    rounding: _Rounding, blocks: Array, values: Array, decoded: Callable[[Array], Array]
) -> Array:
    import numpy as np

    zero, one = blocks.copy(), blocks.copy()
    for codes in rounding.codes:
        part = slice(codes.start, codes.stop)
        kept = np.resize(np.array(codes.kept, np.uint8), codes.stop - codes.start)
        zero[:, part] &= kept
        one[:, part] = zero[:, part] | codes.one
    scale = decoded(zero)
    if any(codes.one for codes in rounding.codes):
        with np.errstate(all="ignore"):
            scale = decoded(one) - scale
    scale = scale / np.float32(rounding.worth)
    scale[~np.isfinite(scale)] = math.inf
    return _cells(rounding.levels, values, scale) if rounding.levels else np.abs(scale)


def _widened(step: Array, values: Array, *, shifted: bool) -> Array:
    """The step and, besides, what rounding its scale to fp16 moves a value by, either way."""
    import numpy as np

    size = np.abs(values)
    if shifted:  # a code's part of a value is what is left when the part of the block is taken off
        size = size + 2 * size.max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        relative = np.maximum(np.float32(2**-10), np.float32(2**-24) / step)
        moved = size * np.where(step > 0, relative, 0)
        return np.asarray(np.nan_to_num(step + moved, nan=math.inf))


def _cells(levels: tuple[int, ...], values: Array, scale: Array) -> Array:
    """The step of entries of a code book: √((l³ + r³) / (l + r)) for the gaps l, r beside a level.

    An error uniform over the cell from half of l below to half of r above has that, squared and
    over 12, for its mean square. Beside the outermost levels the one gap counts twice.
    """
    import numpy as np

    book = np.array(levels if levels[0] < 0 else [-v for v in levels[:0:-1]] + list(levels))
    gaps = np.diff(book).astype(np.float32)
    left, right = np.r_[gaps[:1], gaps], np.r_[gaps, gaps[-1:]]
    steps = np.sqrt((left**3 + right**3) / (left + right))
    with np.errstate(all="ignore"):
        code = np.nan_to_num(values / scale)
    return np.asarray(np.abs(scale) * steps[np.searchsorted((book[1:] + book[:-1]) / 2, code)])
