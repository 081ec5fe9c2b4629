"""The values that quantised weights stand for, and how far apart they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from projaudit.quantised_config import Unread
from projaudit.quantised_layouts import Packed, bitsandbytes_state, parse_state, wrong

if TYPE_CHECKING:
    from torch import Tensor

# bitsandbytes' own kernels take these, whatever quant_map a file brings
# (bitsandbytes 0.50, backends/utils.py).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(
    sign * value
    for sign in (1, -1)
    for value in (0.0, 0.005208333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
)
_E2M1 = tuple(sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, modules/linear/gemm.py: nibble i is that column


def dequantise(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(values, step), both (out, in) fp32: what the parts stand for, and how far apart there
    the values are that they can stand for.

    Where the gaps on either side differ, the step is the wider one, so step²/12 is at least the
    variance of the rounding error. `parts` are as stored (unsigned words as int32). Raises
    FormatError (`format.quantised`) where their contents contradict each other.
    """
    return _DEQUANTISE[weight.scheme.partition(" ")[0]](weight, parts)


_WORDS = 1 << 21  # values unpacked at once


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(rows, count) uint8 from (rows, words) int32: value i of a row is the `bits` bits of its
    little-endian words from bit `bits`·i on."""
    import torch

    at = torch.arange(count) * bits
    index, shift = at // 32, at % 32
    wide = torch.nn.functional.pad(words, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    out = torch.empty(words.shape[0], count, dtype=torch.uint8)
    step = max(1, _WORDS // max(count, 1))
    for first in range(0, words.shape[0], step):
        part = wide[first : first + step]
        low = part[:, index] >> shift
        # Shifts of 64-bit words by up to 32; what overflows is above the bits that are kept.
        high = part[:, index + 1] << (32 - shift)
        out[first : first + step] = ((low | high) & ((1 << bits) - 1)).to(torch.uint8)
    return out


def _gaps(levels: Sequence[float]) -> list[float]:
    """For each level, the wider of the gaps to the next lower and the next higher one."""
    order = sorted(set(levels))
    between = [b - a for a, b in pairwise(order)]
    wider = dict(zip(order, map(max, [0.0, *between], [*between, 0.0]), strict=True))
    return [wider[level] for level in levels]


def _leveled(codes: Tensor, levels: Sequence[float], scale: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    index = codes.long()
    return (
        torch.tensor(levels, dtype=torch.float32)[index] * scale,
        torch.tensor(_gaps(levels), dtype=torch.float32)[index] * scale.abs(),
    )


def _nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) half of every byte."""
    return packed & 0xF, packed >> 4


def _from_bitsandbytes_4(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    kind = weight.scheme[-3:]
    levels = _NF4 if kind == "nf4" else _FP4
    if not torch.allclose(parts["weight.quant_map"], torch.tensor(levels), rtol=0, atol=1e-5):
        raise wrong(
            weight.parts["weight.quant_map"], f"is not {kind}'s, which is what bitsandbytes takes"
        )
    leaf = f"weight.quant_state.bitsandbytes__{kind}"
    said = parse_state(weight.parts[leaf], bytes(parts[leaf].tolist()))
    assert isinstance(said, Mapping)
    try:
        found = bitsandbytes_state(said, kind, "nested" in weight.numbers)
    except Unread as why:
        raise wrong(weight.parts[leaf], str(why)) from None
    if found != (weight.shape, weight.numbers):
        raise wrong(weight.parts[leaf], "says another shape than layers of its name")
    count = math.prod(weight.shape)
    absmax, error = parts["weight.absmax"], None
    if "nested" in weight.numbers:
        table = parts["weight.nested_quant_map"]
        if not bool(torch.isfinite(table).all()):
            raise wrong(weight.parts["weight.nested_quant_map"], "has NaN or Inf entries")
        outer = parts["weight.nested_absmax"].repeat_interleave(weight.numbers["nested"])
        outer, index = outer[: len(absmax)], absmax.long()
        absmax = table[index] * outer + float(said["nested_offset"])
        error = torch.tensor(_gaps(table.tolist()))[index] * outer.abs()
    size = weight.numbers["block"]
    scale = absmax.repeat_interleave(size)[:count]
    low, high = _nibbles(parts["weight"].contiguous().view(torch.uint8).reshape(-1))
    codes = torch.stack((high, low), dim=1).reshape(-1)[:count]
    values, step = _leveled(codes, levels, scale)
    if error is not None:  # of the scale itself
        code = torch.tensor(levels)[codes.long()].abs()
        step += code * error.repeat_interleave(size)[:count]
    return values.reshape(weight.shape), step.reshape(weight.shape)


def _from_bitsandbytes_8(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    layout = parts.get("weight_format")
    if layout is not None and int(layout.reshape(-1)[0]) != 0:
        raise wrong(weight.parts["weight_format"], "is not `row`, the one that is loaded")
    step = (parts["SCB"].float() / 127)[:, None]
    values = parts["weight"].float() * step
    return values, step.abs().expand(values.shape)


def _by_input(groups: Tensor, weight: Packed, order: Tensor | None) -> Tensor:
    """(groups, out) → (in, out): each input's, by `g_idx` where there is one."""
    import torch

    if order is None:
        order = torch.arange(weight.shape[1]) // weight.numbers["group"]
    return groups[order.long()]


def _order(weight: Packed, parts: Mapping[str, Tensor], leaf: str, groups: int) -> Tensor | None:
    """The group of each input where a tensor says it; FormatError where there is none such."""
    order = parts.get(leaf)
    if order is None:
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise wrong(weight.parts[leaf], f"names a group that is none of the {groups}")
    return order


def _from_gptq(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    out, inputs = weight.shape
    bits = weight.numbers["bits"]
    order = _order(weight, parts, "g_idx", parts["scales"].shape[0])
    codes = unpack(parts["qweight"].T.contiguous(), bits, inputs)
    # The first format stores zero points less one, and lets that wrap around.
    zeros = (unpack(parts["qzeros"], bits, out) + weight.numbers["offset"]) & ((1 << bits) - 1)
    scale = _by_input(parts["scales"].float(), weight, order).T
    return (codes.float() - _by_input(zeros.float(), weight, order).T) * scale, scale.abs()


def _from_awq(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    column = torch.arange(weight.shape[0])
    where = torch.tensor([_AWQ_ORDER.index(i) for i in range(8)])
    place = column // 8 * 8 + where[column % 8]
    codes, zeros = (unpack(parts[leaf], 4, len(column))[:, place] for leaf in ("qweight", "qzeros"))
    scale = _by_input(parts["scales"].float(), weight, None)
    values = (codes.float() - _by_input(zeros.float(), weight, None)) * scale
    return values.T.contiguous(), scale.abs().T


def _scale_of(stored: Tensor) -> Tensor:
    """A scale in fp32; whole numbers are exponents of two."""
    import torch

    if stored.dtype == torch.uint8:
        return (stored.float() - 127).exp2()
    return stored.float()


def _spread(groups: Tensor, weight: Packed) -> Tensor:
    """One value for all, each output, group or block -> (out, in)."""
    out, inputs = weight.shape
    if groups.numel() == 1:
        return groups.reshape(1, 1).expand(out, inputs)
    groups = groups.reshape(groups.shape[0], -1)
    if "rows" in weight.numbers:
        groups = groups.repeat_interleave(weight.numbers["rows"], dim=0)[:out]
    return groups.repeat_interleave(weight.numbers["group"], dim=1)[:, :inputs]


def _from_integers(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    out, inputs = weight.shape
    bits, size = weight.numbers["bits"], weight.numbers["group"]
    shape = parts["weight_shape"].tolist()
    if shape != [out, inputs]:
        raise wrong(weight.parts["weight_shape"], "says another shape than layers of its name")
    middle, groups = 1 << (bits - 1), inputs // size
    order = _order(weight, parts, "weight_g_idx", groups)
    scale = _scale_of(parts["weight_scale"])
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(out, groups)
    scale = _by_input(scale.reshape(out, groups).T, weight, order).T
    zero: Tensor | int = middle
    if "weight_zero_point" in parts:
        # Packed along the outputs; both sides are shifted by the same half of the range.
        zeros = unpack(parts["weight_zero_point"].T.contiguous(), bits, out).float()
        zero = _by_input(zeros, weight, order).T
    codes = unpack(parts["weight_packed"], bits, inputs)
    return (codes.float() - zero) * scale, scale.abs()


def _from_fp4(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    scale = _scale_of(parts["weight_scale"])
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"].reshape(())
    codes = torch.stack(_nibbles(parts["weight_packed"]), dim=2).reshape(weight.shape)
    return _leveled(codes, _E2M1, _spread(scale, weight))


def _from_scaled(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    leaves = ("weight_scale_inv", "weight_scale", "weight._scale")
    scale = _spread(_scale_of(next(parts[leaf] for leaf in leaves if leaf in parts)), weight)
    codes = parts["weight._data" if "weight._data" in parts else "weight"]
    values = codes.float()
    if codes.dtype == torch.int8:
        if "weight_zero_point" in parts:
            values = values - _spread(parts["weight_zero_point"].float(), weight)
        return values * scale, scale.abs()
    mantissa, least = (3, -6) if codes.dtype == torch.float8_e4m3fn else (2, -14)
    exponent = (torch.frexp(values).exponent - 1).clamp_min(least) - mantissa
    return values * scale, exponent.float().exp2() * scale.abs()


def _from_mlx(weight: Packed, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    codes = unpack(parts["weight"], weight.numbers["bits"], weight.shape[1])
    scale, bias = (_spread(parts[leaf].float(), weight) for leaf in ("scales", "biases"))
    return codes.float() * scale + bias, scale.abs()


_DEQUANTISE: Mapping[str, Callable[[Packed, Mapping[str, Tensor]], tuple[Tensor, Tensor]]] = {
    "bitsandbytes4": _from_bitsandbytes_4,
    "bitsandbytes8": _from_bitsandbytes_8,
    "gptq": _from_gptq,
    "gptq_v2": _from_gptq,
    "awq": _from_awq,
    "integers": _from_integers,
    "nvfp4": _from_fp4,
    "mxfp4": _from_fp4,
    "scaled": _from_scaled,
    "mlx": _from_mlx,
}
