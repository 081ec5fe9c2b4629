"""Quantised weights: their values are the official code's, and rounding hides nothing unsaid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, P, llava, save, tuned
from safetensors.torch import save_file

import projaudit
from projaudit.checkpoint import open_checkpoint
from projaudit.errors import FormatError, UnsupportedError
from projaudit.findings import Verdict
from projaudit.quantised import find
from projaudit.quantised_config import rewrites
from projaudit.quantised_values import unpack
from projaudit.refs import parse_ref
from projaudit.rounding import rounding
from projaudit.safetensors_header import DTYPE_BITS, TensorInfo
from projaudit.source import open_local
from projaudit.weights import Weight, load_weights

Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, dict[str, Any]]
"""Tensors below a layer, and the quantization_config."""


def matrix(out: int = 64, inputs: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5


def loaded(folder: Path, parts: Tensors, quantization: Mapping[str, Any] | None) -> Weight:
    """`L.weight` of a checkpoint that holds those parts of it."""
    folder.mkdir(exist_ok=True)
    config = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    named = {f"L.{leaf}": tensor.contiguous() for leaf, tensor in parts.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(open_local(parse_ref(str(folder))))
    (reading,) = checkpoint.readings
    if reading.unread:
        raise UnsupportedError(next(iter(reading.unread.values()))[1], "quantised")
    assert set(reading.shapes) == {"L.weight"}
    weight = load_weights(checkpoint.source, reading, ["L.weight"])["L.weight"]
    assert tuple(weight.tensor.shape) == reading.shapes["L.weight"]
    assert {info.name for info, _ in weight.parts} == set(named)
    return weight


# --- the official quantisers ----------------------------------------------------------------------


def bitsandbytes_4(weight: torch.Tensor, kind: str = "nf4", nested: bool = False) -> Made:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    return {"weight": packed, **parts}, {**method, "bnb_4bit_quant_type": kind}


def bitsandbytes_8(weight: torch.Tensor) -> Made:
    from bitsandbytes import functional

    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def compressed(weight: torch.Tensor, **arguments: Any) -> Made:
    """compressed-tensors' own compressor of that scheme."""
    parts, config, _ = _compressed(weight, **arguments)
    return parts, config


def _compressed(weight: torch.Tensor, *, format: str, **arguments: Any) -> tuple[Any, Any, Any]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
    )

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    out, inputs = weight.shape
    state = {"weight": weight}
    strategy = str(args.strategy)
    if strategy == "tensor":
        grouped = weight.reshape(1, -1)
    elif strategy == "channel":
        grouped = weight
    elif strategy == "block":
        rows, columns = args.block_structure
        grouped = weight.reshape(out // rows, rows, inputs // columns, columns).transpose(1, 2)
        grouped = grouped.reshape(out // rows, inputs // columns, -1)
    else:
        grouped = weight.reshape(out, -1, args.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    extra = {}
    if strategy == "tensor_group":
        extra["global_scale"] = generate_gparam(weight.min(), weight.max())
        state["weight_global_scale"] = extra["global_scale"]
    scale, zero = calculate_qparams(low, high, args, **extra)
    if strategy in ("channel", "tensor"):
        scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
        if strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
    state["weight_scale"] = scale
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(format)
    parts = compressor.compress(state, scheme)
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["lm_head"],
    }
    return parts, config, compressor.decompress(dict(parts), scheme)["weight"]


def f8_blocks(weight: torch.Tensor, block: int = 128) -> Made:
    """As DeepSeek-V3's inference/kernel.py stores it: one scale for a block, edges cut off."""
    out, inputs = weight.shape
    rows, columns = -(-out // block), -(-inputs // block)
    scale = torch.empty(rows, columns)
    codes = torch.empty(out, inputs, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    config = {"quant_method": "fp8", "weight_block_size": [block, block], "fmt": "e4m3"}
    return {"weight": codes, "weight_scale_inv": scale}, config


# The packing loops of AutoGPTQ (auto_gptq/nn_modules/qlinear/qlinear_cuda.py, `pack`) and AutoAWQ
# (awq/modules/linear/gemm.py, `from_linear`), word by word, with the values they stand for.


def _gptq_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, out) codes -> (n·bits/32, out) int32."""
    codes = codes.to(torch.int64)
    words = torch.zeros(codes.shape[0] * bits // 32, codes.shape[1], dtype=torch.int64)
    i = row = 0
    while row < words.shape[0]:
        if bits in (2, 4, 8):
            for j in range(i, i + 32 // bits):
                words[row] |= codes[j] << (bits * (j - i))
            i += 32 // bits
            row += 1
        else:  # 3: two values straddle words
            for j in range(i, i + 10):
                words[row] |= codes[j] << (3 * (j - i))
            i += 10
            words[row] |= codes[i] << 30
            row += 1
            words[row] |= (codes[i] >> 2) & 1
            i += 1
            for j in range(i, i + 10):
                words[row] |= codes[j] << (3 * (j - i) + 1)
            i += 10
            words[row] |= codes[i] << 31
            row += 1
            words[row] |= (codes[i] >> 1) & 0x3
            i += 1
            for j in range(i, i + 10):
                words[row] |= codes[j] << (3 * (j - i) + 2)
            i += 10
            row += 1
    return _int32(words)


def _int32(words: torch.Tensor) -> torch.Tensor:
    words = words & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _grouped(weight: torch.Tensor, order: torch.Tensor, bits: int, symmetric: bool) -> Any:
    """(codes (in, out), zeros and scales (groups, out)), each group to the nearest."""
    top, inputs = (1 << bits) - 1, weight.T
    count = int(order.max()) + 1
    scales = torch.empty(count, weight.shape[0])
    zeros = torch.empty(count, weight.shape[0])
    for group in range(count):
        part = inputs[order == group]
        if symmetric:
            scales[group] = 2 * part.abs().amax(0) / top
            zeros[group] = (top + 1) // 2
        else:
            low, high = part.amin(0).clamp_max(0), part.amax(0).clamp_min(0)
            scales[group] = (high - low) / top
            zeros[group] = (-low / scales[group]).round().clamp(0, top)
    scales = scales.half()
    codes = (inputs / scales.float()[order] + zeros[order]).round().clamp(0, top)
    return codes.int(), zeros.int(), scales


def gptq(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    layout: str = "gptq",
    act_order: bool = False,
) -> Made:
    parts, config, _ = _gptq(weight, bits, group, symmetric, layout, act_order)
    return parts, config


def _gptq(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, layout: str, act_order: bool
) -> Any:
    inputs = weight.shape[1]
    order = torch.arange(inputs) // group
    if act_order:
        order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(5))]
    codes, zeros, scales = _grouped(weight, order, bits, symmetric)
    offset = 1 if layout == "gptq" else 0
    parts = {
        "qweight": _gptq_words(codes, bits),
        "qzeros": _gptq_words(((zeros - offset) & ((1 << bits) - 1)).T, bits).T,
        "scales": scales,
        "g_idx": order.int(),
    }
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order,
        "sym": symmetric, "checkpoint_format": layout,
    }  # fmt: skip
    values = ((codes - zeros[order]).float() * scales.float()[order]).T
    return parts, config, values


def awq(weight: torch.Tensor, group: int = 32) -> Made:
    parts, config, _ = _awq(weight, group)
    return parts, config


def _awq(weight: torch.Tensor, group: int) -> Any:
    order = torch.arange(weight.shape[1]) // group
    codes, zeros, scales = _grouped(weight, order, 4, False)

    def words(values: torch.Tensor) -> torch.Tensor:
        packed = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
        for column in range(packed.shape[1]):
            for i, at in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, column] |= values[:, column * 8 + at].long() << (i * 4)
        return _int32(packed)

    parts = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
        "version": "gemm",
    }  # fmt: skip
    return parts, config, ((codes - zeros[order]).float() * scales.float()[order]).T


def mlx(weight: torch.Tensor, bits: int = 4, group: int = 64) -> Made:
    parts, config, _ = _mlx(weight, bits, group)
    return parts, config


def _mlx(weight: torch.Tensor, bits: int, group: int) -> Any:
    """mlx.core.quantize as documented: w ≈ scale·q + bias, q packed from the lowest bits up."""
    out, inputs = weight.shape
    parts = weight.reshape(out, -1, group)
    low, high = parts.amin(-1), parts.amax(-1)
    scale, top = ((high - low) / ((1 << bits) - 1)).half(), (1 << bits) - 1
    bias = low.half()
    codes = ((parts - bias.float()[..., None]) / scale.float()[..., None]).round().clamp(0, top)
    values = codes * scale.float()[..., None] + bias.float()[..., None]
    text = codes.reshape(out, inputs).int()
    packed = torch.zeros(out, inputs * bits // 32, dtype=torch.int64)
    for i in range(inputs):
        for b in range(bits):
            at = i * bits + b
            packed[:, at // 32] |= ((text[:, i].long() >> b) & 1) << (at % 32)
    words = _int32(packed).view(torch.uint32)
    named = {"weight": words, "scales": scale, "biases": bias}
    return (
        named,
        {"bits": bits, "group_size": group, "quant_method": "mlx"},
        values.reshape_as(weight),
    )


# --- equal to the official code -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (33, 50), (300, 257)])
def test_bitsandbytes_4_bits(tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int]):
    from bitsandbytes import functional

    full = matrix(*shape)
    parts, config = bitsandbytes_4(full, kind, nested)
    weight = loaded(tmp_path / "m", parts, config)
    below = {k.removeprefix("weight."): v for k, v in parts.items() if k != "weight"}
    state = functional.QuantState.from_dict(dict(below), torch.device("cpu"))
    official = functional.dequantize_4bit(parts["weight"], state)
    # Their tables for CPUs have four digits of fp4, those for GPUs all of them.
    assert torch.allclose(weight.tensor, official, rtol=2e-4 if kind == "fp4" else 1e-6, atol=1e-5)
    assert_rounded(full, weight)


def test_bitsandbytes_8_bits(tmp_path: Path):
    from bitsandbytes import functional

    full = matrix().half().float()
    parts, config = bitsandbytes_8(full)
    weight = loaded(tmp_path / "m", parts, config)
    official = functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    assert torch.allclose(weight.tensor, official, rtol=1e-6, atol=0)
    assert_rounded(full, weight)


COMPRESSED = {
    "w4 groups": {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32},
    "w4 groups, zero points": {
        "format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32,
        "symmetric": False,
    },
    "w8 channels": {"format": "pack-quantized", "num_bits": 8, "strategy": "channel"},
    "w8 channels, zero points": {
        "format": "pack-quantized", "num_bits": 8, "strategy": "channel", "symmetric": False,
    },
    "w2 groups": {"format": "pack-quantized", "num_bits": 2, "strategy": "group", "group_size": 64},
    "int8 channels": {"format": "int-quantized", "num_bits": 8, "strategy": "channel"},
    "int8 groups": {
        "format": "naive-quantized", "num_bits": 8, "strategy": "group", "group_size": 32,
    },
    "int8 zero points": {
        "format": "naive-quantized", "num_bits": 8, "strategy": "channel", "symmetric": False,
    },
    "fp8 tensor": {
        "format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "tensor",
    },
    "fp8 channels": {
        "format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "channel",
    },
    "fp8 blocks": {
        "format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "block",
        "block_structure": [32, 64],
    },
    "nvfp4": {
        "format": "nvfp4-pack-quantized", "num_bits": 4, "type": "float",
        "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4": {
        "format": "mxfp4-pack-quantized", "num_bits": 4, "type": "float", "strategy": "group",
        "group_size": 32, "scale_dtype": "torch.uint8",
    },
    "mxfp8": {
        "format": "mxfp8-quantized", "num_bits": 8, "type": "float", "strategy": "group",
        "group_size": 32, "scale_dtype": "torch.uint8",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(tmp_path: Path, name: str):
    full = matrix()
    parts, config, official = _compressed(full, **COMPRESSED[name])
    weight = loaded(tmp_path / "m", parts, config)
    # Theirs of nvfp4 comes out in bfloat16.
    close = 2**-8 if name == "nvfp4" else 1e-6
    assert torch.allclose(weight.tensor, official.float(), rtol=close, atol=1e-7)
    if name not in ("mxfp4", "mxfp8"):  # their scales, rounded down, cut off the largest values
        assert_rounded(full, weight)


def test_f8_blocks_as_transformers_reads_them(tmp_path: Path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    full = matrix(256, 384)
    parts, config = f8_blocks(full)
    weight = loaded(tmp_path / "m", parts, config)
    official = Fp8Dequantize(None)._dequantize_one(
        parts["weight"], parts["weight_scale_inv"], torch.float32
    )
    assert torch.equal(weight.tensor, official.float())
    assert_rounded(full, weight)


def test_blocks_that_the_edge_cuts_off(tmp_path: Path):
    full = matrix(200, 130)
    assert_rounded(full, loaded(tmp_path / "m", *f8_blocks(full)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq(tmp_path: Path, bits: int, symmetric: bool, layout: str):
    full = matrix()
    for act_order in (False, True):
        parts, config, values = _gptq(full, bits, 32, symmetric, layout, act_order)
        weight = loaded(tmp_path / "m", parts, config)
        assert torch.allclose(weight.tensor, values, rtol=1e-6, atol=0)
    if not symmetric:
        assert_rounded(full, weight)


def test_gptq_without_an_order(tmp_path: Path):
    parts, config, values = _gptq(matrix(), 4, 32, False, "gptq", False)
    del parts["g_idx"]
    assert torch.equal(loaded(tmp_path / "m", parts, config).tensor, values)


def test_awq(tmp_path: Path):
    full = matrix()
    parts, config, values = _awq(full, 32)
    weight = loaded(tmp_path / "m", parts, config)
    assert torch.equal(weight.tensor, values)
    assert_rounded(full, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx(tmp_path: Path, bits: int):
    full = matrix()
    parts, config, values = _mlx(full, bits, 64)
    weight = loaded(tmp_path / "m", parts, config)
    assert torch.allclose(weight.tensor, values, rtol=1e-6, atol=1e-7)


def test_quanto(tmp_path: Path):
    full = matrix()
    scale = full.abs().amax(1, keepdim=True) / 127
    codes = (full / scale).round().to(torch.int8)
    parts = {"weight._data": codes, "weight._scale": scale, "input_scale": torch.ones(())}
    weight = loaded(tmp_path / "m", parts, {"quant_method": "quanto", "weights": "int8"})
    assert torch.equal(weight.tensor, codes.float() * scale)


def assert_rounded(full: torch.Tensor, weight: Weight) -> None:
    """The steps tell how far the weight may be from what was quantised, and are no wider."""
    assert weight.step is not None
    error = (weight.tensor.double() - full.double()).abs()
    assert (error <= 0.55 * weight.step.double() + 1e-6).float().mean() > 0.99
    found = rounding(full, weight.tensor, None, weight.step)
    measured = float(error.norm() / full.double().norm())
    assert found.quantised
    assert found.changed < 0.02
    assert 0.6 * found.floor < measured < 1.25 * found.floor
    assert float(torch.linalg.matrix_norm(error, 2)) >= 0  # finite
    noise = (weight.tensor - full).double()
    assert float(torch.linalg.matrix_norm(noise, 2) / full.norm()) < 1.25 * found.edge


@settings(max_examples=50, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    count=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_words_give_back_what_was_packed(bits: int, rows: int, count: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, count), generator=g)
    total = [sum(int(v) << (i * bits) for i, v in enumerate(row)) for row in codes]
    words = -(-count * bits // 32)
    raw = b"".join(number.to_bytes(4 * words, "little") for number in total)
    packed = torch.frombuffer(bytearray(raw), dtype=torch.int32).reshape(rows, words)
    assert torch.equal(unpack(packed, bits, count).long(), codes)


# --- a check of a quantised model -----------------------------------------------------------------

BASE = llava(d=64, h=128, out=128)
SMALL = {
    **CONFIG,
    "vision_config": {"hidden_size": 64, "model_type": "clip_vision_model"},
    "text_config": {"hidden_size": 128, "model_type": "llama"},
}
Quantise = Callable[[torch.Tensor], Made]
SCHEMES: dict[str, Quantise] = {
    "nf4": bitsandbytes_4,
    "nested nf4": lambda w: bitsandbytes_4(w, nested=True),
    "fp4": lambda w: bitsandbytes_4(w, "fp4"),
    "int8": bitsandbytes_8,
    "gptq": lambda w: gptq(w, symmetric=False),
    "awq": awq,
    "fp8 blocks": f8_blocks,
    "w4 groups": lambda w: compressed(w, **COMPRESSED["w4 groups"]),
    "fp8 channels": lambda w: compressed(w, **COMPRESSED["fp8 channels"]),
    "nvfp4": lambda w: compressed(w, **COMPRESSED["nvfp4"]),
    "mlx": mlx,
}


def quantised(folder: Path, tensors: Tensors, scheme: Quantise) -> Path:
    """A checkpoint with the matrices of its projector quantised, and one of its language model."""
    stored: Tensors = {}
    config: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and (name.startswith(P) or "up_proj" in name):
            parts, config = scheme(tensor)
            module = name.removesuffix("weight")
            stored |= {f"{module}{leaf}": part.clone() for leaf, part in parts.items()}
        else:
            stored[name] = tensor
    key = "quantization" if config.get("quant_method") == "mlx" else "quantization_config"
    if key == "quantization":
        del config["quant_method"]
    return save(folder, stored, config={**SMALL, key: config})


def spiked(size: float) -> Tensors:
    """The base with one direction of that size, relative to each matrix, added to it."""
    changed = dict(BASE)
    for name, tensor in BASE.items():
        if name.startswith(P) and tensor.ndim == 2:
            g = torch.Generator().manual_seed(7)
            u, v = (torch.randn(n, generator=g) for n in tensor.shape)
            changed[name] = tensor + size * tensor.norm() * torch.outer(u / u.norm(), v / v.norm())
    return changed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "base", BASE, config=SMALL)


def values(report: projaudit.Report, metric: str) -> list[float]:
    return [m.value for m in report.measurements if m.metric == metric]


def rules(report: projaudit.Report) -> set[str]:
    return {finding.rule for finding in report.findings}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_unchanged_model_quantised_is_no_pass(tmp_path: Path, base: Path, scheme: str):
    target = quantised(tmp_path / "t", BASE, SCHEMES[scheme])
    report = projaudit.check(str(target), str(base), seed=1)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.exit_code == 3
    assert "update-below-rounding" in rules(report)
    assert "ambiguous-sources" not in rules(report)
    assert report.projectors[0].family == "llava"
    (finding, *_) = (f for f in report.findings if f.rule == "update-below-rounding")
    assert "% of ‖W0‖" in finding.message
    assert "σ" in finding.message
    assert finding.locations
    for measured, floor in zip(
        values(report, "relative_norm"), values(report, "rounding_floor"), strict=True
    ):
        assert 0.5 * floor < measured < 1.5 * floor


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fine_tune_quantised_is_audited(tmp_path: Path, base: Path, scheme: str):
    target = quantised(tmp_path / "t", tuned(BASE, 0.4), SCHEMES[scheme])
    report = projaudit.check(str(target), str(base), seed=1)
    assert report.verdict is Verdict.PASS, report.sentence
    assert all(value > 1 for value in values(report, "above_rounding"))
    assert values(report, "relative_norm") == pytest.approx([0.4, 0.4], rel=0.15)
    read = {read.name for read in report.tensors if read.side == "target"}
    assert len(read) >= 6  # every part of both matrices, and both biases
    assert all(len(read.sha256) == 64 for read in report.tensors)


@pytest.mark.parametrize("scheme", ["nf4", "gptq", "w4 groups"])
def test_what_the_limits_say_is_what_is_seen(tmp_path: Path, base: Path, scheme: str):
    unchanged = projaudit.check(
        str(quantised(tmp_path / "same", BASE, SCHEMES[scheme])), str(base), seed=1
    )
    limit = max(values(unchanged, "detection_limit"))
    sizes = [BASE[f"{P}linear_{i}.weight"].norm() for i in (1, 2)]
    spikes = zip(values(unchanged, "smallest_spike"), sizes, strict=True)
    spike = max(float(found / size) for found, size in spikes)
    drowned = "update-below-rounding"
    for name, tensors, seen in (
        ("small", tuned(BASE, limit / 4), False),
        ("large", tuned(BASE, limit), True),
        ("small spike", spiked(spike / 4), False),
        ("spike", spiked(1.1 * spike), True),
    ):
        target = quantised(tmp_path / name, tensors, SCHEMES[scheme])
        report = projaudit.check(str(target), str(base), seed=1)
        assert (drowned not in rules(report)) is seen, name
        assert (report.verdict is Verdict.PASS) is seen, name


def test_a_quantised_base_is_read_too(tmp_path: Path):
    theirs = quantised(tmp_path / "base", BASE, bitsandbytes_4)
    same = quantised(tmp_path / "same", BASE, lambda w: gptq(w, symmetric=False))
    report = projaudit.check(str(same), str(theirs), seed=1)
    assert "update-below-rounding" in rules(report)
    assert max(values(report, "changed_fraction")) < 0.01
    ours = save(tmp_path / "tuned", tuned(BASE, 0.4), config=SMALL)
    assert projaudit.check(str(ours), str(theirs), seed=1).verdict is Verdict.PASS
    alike = quantised(tmp_path / "alike", BASE, bitsandbytes_4)
    report = projaudit.check(str(alike), str(theirs), seed=1)
    assert {"projector-unchanged", "update-below-rounding"} <= rules(report)
    assert values(report, "changed_fraction") == [0.0, 0.0]


@pytest.mark.parametrize("scheme", ["nf4", "gptq", "awq", "mlx"])
def test_an_adapter_on_a_quantised_base_is_what_it_adds_to_it(tmp_path: Path, scheme: str):
    """QLoRA: the base keeps its codes, and the update is the adapter's, with no rounding in it."""
    base = quantised(tmp_path / "base", BASE, SCHEMES[scheme])
    g = torch.Generator().manual_seed(0)
    factors = {"A": torch.randn(4, 64, generator=g), "B": 0.01 * torch.randn(128, 4, generator=g)}
    folder = tmp_path / "qlora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "a/b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = f"base_model.model.model.{P}linear_1.lora_"
    named = {f"{stem}{leaf}.weight": factor for leaf, factor in factors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    report = projaudit.check(str(folder), str(base), seed=1)
    reading = open_checkpoint(open_local(parse_ref(str(base)))).readings[0]
    name = f"{P}linear_1.weight"
    before = load_weights(open_local(parse_ref(str(base))), reading, [name])[name].tensor
    assert name in reading.packed
    added = 2 * factors["B"] @ factors["A"]
    expected = float(added.norm() / before.norm())
    assert values(report, "relative_norm") == pytest.approx([expected, 0.0], rel=1e-4)
    assert values(report, "leading_singular_value")[0] == pytest.approx(
        float(torch.linalg.matrix_norm(added, 2)), rel=1e-4
    )
    assert "update-below-rounding" not in rules(report)
    assert {t.file for t in report.tensors if t.side == "target"} == {"adapter_model.safetensors"}


def test_f8_without_scales_has_a_limit_too(tmp_path: Path, base: Path):
    for size, seen in ((0.0, False), (0.005, False), (0.3, True)):
        target = save(
            tmp_path / f"t{size}", tuned(BASE, size), dtype=torch.float8_e4m3fn, config=SMALL
        )
        report = projaudit.check(str(target), str(base), seed=1)
        assert ("update-below-rounding" not in rules(report)) is seen
        assert (report.verdict is Verdict.PASS) is seen


def test_full_precision_that_a_loader_quantises_is_said(tmp_path: Path, base: Path):
    """threats J11: what runs is not what was read, unless the config leaves the projector out."""
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for skipped, said in (
        (None, True), (["lm_head"], True), (["multi_modal_projector"], False), (["linear_1"], True),
        (["linear_1", "model.multi_modal_projector.linear_2"], False), (["projector"], True),
    ):  # fmt: skip
        config = {**SMALL, "quantization_config": {**method, "llm_int8_skip_modules": skipped}}
        target = save(tmp_path / f"{skipped}", tuned(BASE, 0.1), config=config)
        report = projaudit.check(str(target), str(base), seed=1)
        assert ("ambiguous-sources" in rules(report)) is said, skipped
    for method in (
        {"quant_method": "quanto"},
        {"quant_method": "torchao"},
        {"bits": 4},
        {"quant_method": 3},
    ):
        config = {**SMALL, "quantization_config": method}
        target = save(tmp_path / f"{method}", tuned(BASE, 0.1), config=config)
        assert "ambiguous-sources" in rules(projaudit.check(str(target), str(base), seed=1))


# --- what is wrong, hostile or not read -----------------------------------------------------------

Change = Callable[[Tensors, dict[str, Any]], object]


def state(change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes what bitsandbytes' quant_state says."""

    def apply(parts: Tensors, _: dict[str, Any]) -> None:
        key = next(k for k in parts if "quant_state" in k)
        said = json.loads(bytes(parts[key].tolist()))
        change(said)
        parts[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return apply


def put(name: str, value: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(parts: Tensors, _: dict[str, Any]) -> None:
        parts[name] = value(parts[name]) if callable(value) else value

    return apply


def say(**keys: Any) -> Change:
    return lambda _, config: config.update(keys)


def without(name: str) -> Change:
    return lambda parts, config: (parts.pop(name, None), config.pop(name, None))


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return apply


W4 = SCHEMES["w4 groups"]
WRONG: dict[str, tuple[Quantise, Change]] = {
    "absmax missing": (bitsandbytes_4, without("weight.absmax")),
    "absmax too short": (bitsandbytes_4, put("weight.absmax", lambda t: t[:-1])),
    "absmax of another dtype": (bitsandbytes_4, put("weight.absmax", lambda t: t.byte())),
    "map missing": (bitsandbytes_4, without("weight.quant_map")),
    "another map": (bitsandbytes_4, put("weight.quant_map", lambda t: t * 2)),
    "half nested": (SCHEMES["nested nf4"], without("weight.nested_absmax")),
    "nested map not finite": (
        SCHEMES["nested nf4"], put("weight.nested_quant_map", first(float("nan"))),
    ),
    "block size 0": (bitsandbytes_4, state(lambda s: s.update(blocksize=0))),
    "block size a float": (bitsandbytes_4, state(lambda s: s.update(blocksize=64.0))),
    "shape of others": (bitsandbytes_4, state(lambda s: s.update(shape=[64, 256]))),
    "shape negative": (bitsandbytes_4, state(lambda s: s.update(shape=[-64, -128]))),
    "shape beyond all": (bitsandbytes_4, state(lambda s: s.update(shape=[1 << 62, 1 << 62]))),
    "shape of a row": (bitsandbytes_4, state(lambda s: s.update(shape=[8192]))),
    "another type": (bitsandbytes_4, state(lambda s: s.update(quant_type="fp4"))),
    "state no JSON": (
        bitsandbytes_4, put("weight.quant_state.bitsandbytes__nf4", torch.zeros(9).byte()),
    ),
    "state of megabytes": (
        bitsandbytes_4, put("weight.quant_state.bitsandbytes__nf4", torch.zeros(1 << 20).byte()),
    ),
    "two states": (
        bitsandbytes_4, put("weight.quant_state.bitsandbytes__fp4", torch.zeros(9).byte()),
    ),
    "4 bits, config 8": (bitsandbytes_4, say(load_in_8bit=True)),
    "config of another": (bitsandbytes_4, say(quant_method="gptq")),
    "config of a wrong type": (bitsandbytes_4, say(quant_method=["bitsandbytes"])),
    "SCB missing": (bitsandbytes_8, without("SCB")),
    "SCB of another length": (bitsandbytes_8, put("SCB", torch.ones(3))),
    "another format": (bitsandbytes_8, put("weight_format", torch.tensor(2).byte())),
    "group size 0": (gptq, say(group_size=0)),
    "group size of another": (gptq, say(group_size=64)),
    "group size a text": (gptq, say(group_size="32")),
    "bits true": (gptq, say(bits=True)),
    "bits 5": (gptq, say(bits=5)),
    "bits of another": (gptq, say(bits=8)),
    "g_idx beyond": (gptq, put("g_idx", first(4))),
    "g_idx negative": (gptq, put("g_idx", first(-1))),
    "g_idx too short": (gptq, put("g_idx", lambda t: t[:-1])),
    "g_idx missing": (
        lambda w: gptq(w, act_order=True), without("g_idx"),
    ),
    "zeros missing": (gptq, without("qzeros")),
    "zeros of another shape": (gptq, put("qzeros", lambda t: t[:, :-1])),
    "marlin": (gptq, say(checkpoint_format="marlin")),
    "weight beside": (gptq, put("weight", torch.zeros(64, 128))),
    "gemv": (awq, say(version="gemv")),
    "awq of 8 bits": (awq, say(bits=8)),
    "blocks of 0": (f8_blocks, say(weight_block_size=[0, 128])),
    "blocks of one side": (f8_blocks, say(weight_block_size=[128])),
    "blocks of others": (f8_blocks, say(weight_block_size=[16, 16])),
    "scale missing": (f8_blocks, without("weight_scale_inv")),
    "shape lies": (W4, put("weight_shape", torch.tensor([64, 64]))),
    "shape not there": (W4, put("weight_shape", torch.tensor([0, -1]))),
    "bits not said": (W4, say(config_groups={})),
    "groups a list": (W4, say(config_groups=[])),
    "group no object": (W4, say(config_groups={"group_0": 4})),
    "transformed": (W4, say(transform_config={"config_groups": {"u": {}}})),
    "sparse": (W4, say(sparsity_config={"format": "sparse-24-bitmask"})),
    "mlx's other mode": (mlx, say(mode="mxfp4")),
    "mlx of 7 bits": (mlx, say(bits=7)),
    "mlx without biases": (mlx, without("biases")),
    "hqq": (lambda w: ({"W_q": w.byte(), "scale": w, "zero": w}, {"quant_method": "hqq"}), say()),
    "aqlm": (
        lambda w: ({"codes": w.byte(), "codebooks": w, "scales": w}, {"quant_method": "aqlm"}),
        say(),
    ),
    "int8 and no scale": (lambda w: ({"weight": w.char()}, {"quant_method": "x"}), say()),
    "scale beside full precision": (
        lambda w: ({"weight": w, "weight_scale": w[:, :1]}, {"quant_method": "fp8"}), say(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, base: Path, capsys, name: str):
    from projaudit.cli import main

    scheme, change = WRONG[name]

    def changed(weight: torch.Tensor) -> Made:
        parts, method = scheme(weight)
        change(parts, method)
        return {leaf: part.contiguous() for leaf, part in parts.items()}, method

    target = quantised(tmp_path / "t", BASE, changed)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(target), "--base", str(base)])
    said = capsys.readouterr()
    assert stop.value.code in (2, 3)
    assert not said.out
    assert len(said.err.strip().splitlines()) == 1
    assert "Traceback" not in said.err


LEAVES = [
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight._data",
    "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "SCB", "weight_format",
    "qweight", "qzeros", "scales", "g_idx", "weight_scale_inv", "weight_scale", "weight_packed",
    "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "biases",
    "weight._scale", "input_scale", "W_q",
]  # fmt: skip
METHODS = [
    "bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mlx", "quanto", "hqq", "", 3, None,
]  # fmt: skip
ANYTHING = [
    None, True, False, 0, -1, 1, 3, 4, 8, 16, 32, 64, 10**30, 1.5, math.nan, "", "gptq", "int32",
    [], ["L"], [3], [128, 128], [0, 1], [True, 1], {}, {"bits": 4},
    {"a": {"weights": {"num_bits": 4}}},
    {"a": {"weights": 4}}, {"a": 3}, {"format": 3},
]  # fmt: skip
KEYS = [
    "bits", "group_size", "desc_act", "checkpoint_format", "format", "version", "pack_dtype",
    "weight_block_size", "config_groups", "transform_config", "sparsity_config", "load_in_4bit",
    "load_in_8bit", "mode", "L", "llm_int8_skip_modules",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_anything_is_a_weight_or_has_a_reason(data: st.DataObject):
    any_value = st.sampled_from(ANYTHING)
    said = data.draw(any_value | st.dictionaries(st.sampled_from(KEYS), any_value, max_size=4))
    if isinstance(said, dict):
        said = {**said, "quant_method": data.draw(st.sampled_from(METHODS))}
    config = {data.draw(st.sampled_from(["quantization_config", "quantization"])): said}
    if data.draw(st.booleans()):
        config["text_config"] = {"quantization_config": data.draw(any_value)}
    leaves = data.draw(st.sets(st.sampled_from(LEAVES), min_size=1, max_size=6))
    size = st.sampled_from([0, 1, 2, 4, 8, 16, 64, 256])
    tensors = {}
    for leaf in leaves:
        dtype = data.draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = tuple(data.draw(st.lists(size, max_size=3)))
        length = -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)
        tensors[f"L.{leaf}"] = TensorInfo(f"L.{leaf}", dtype, shape, "f", 0, length)
    try:
        found = find(tensors, config, lambda info: b"1" * info.nbytes)
    except FormatError:  # what should hold a shape holds none
        return
    parts = {i.name for packed in found.packed.values() for i in packed.parts.values()}
    assert parts | found.unread.keys() | {"L.weight"} >= tensors.keys()
    assert not parts & found.unread.keys()
    assert isinstance(rewrites(config, ["L.weight"]), str)


def test_layers_that_are_alike_are_asked_once_and_held_to_it(tmp_path: Path):
    parts, config = bitsandbytes_4(matrix(32, 64))
    other, _ = bitsandbytes_4(matrix(64, 32))
    named = {
        f"layers.{i}.{leaf}": tensor.clone()
        for i in range(20)
        for leaf, tensor in (other if i == 19 else parts).items()
    }
    folder = save(tmp_path / "m", named, config={"quantization_config": config})
    checkpoint = open_checkpoint(open_local(parse_ref(str(folder))))
    (reading,) = checkpoint.readings
    assert set(reading.shapes.values()) == {(32, 64)}
    assert load_weights(checkpoint.source, reading, ["layers.3.weight"])
    with pytest.raises(FormatError, match="another shape"):
        load_weights(checkpoint.source, reading, ["layers.19.weight"])
