"""GGUF: the parser is total and strict, values and steps are right, projectors are paired."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import _type_traits
from ggufs import entry, file_of, mmproj, pair, text, write
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, P, llava, save, tuned

import projaudit
from projaudit.checkpoint import open_checkpoint
from projaudit.errors import BaseError, FormatError, LimitError, NothingError, UnsupportedError
from projaudit.findings import Verdict
from projaudit.gguf_header import GGML_TYPES, PROBE, read_gguf_header
from projaudit.gguf_values import QUANTISED, dequantised, spacing
from projaudit.locating import locate
from projaudit.mmproj import as_converted, converted_from, locate_mmproj, namings
from projaudit.refs import parse_ref
from projaudit.safetensors_header import Header
from projaudit.source import LocalSource, open_local
from projaudit.weights import load_tensors

KINDS = gguf.GGMLQuantizationType
WRITABLE = ["MXFP4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
"""What the package quantises to."""
BASE = llava(d=64)
DATA = struct.pack("<8f", *range(8))


class Counting(LocalSource):
    """A local source that counts what is read."""

    def read(self, path: str, start: int, stop: int) -> bytes:
        self.traffic.bytes += stop - start
        self.traffic.requests += 1
        return super().read(path, start, stop)


def opened(path: Path) -> Counting:
    source = open_local(parse_ref(str(path)))
    return Counting(source.ref, source.root, source.files, source._states)


def header(path: Path) -> Header:
    return read_gguf_header(opened(path), path.name)


def parse(folder: Path, raw: bytes) -> Header:
    (folder / "x.gguf").write_bytes(raw)
    return header(folder / "x.gguf")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


# --- the header -----------------------------------------------------------------------------------


def test_types_are_those_of_the_package():
    ours = {number: (name, block, size) for number, (name, block, size) in GGML_TYPES.items()}
    theirs = {int(k): (k.name, *gguf.GGML_QUANT_SIZES[k]) for k in KINDS}
    assert ours == theirs


def test_it_reads_what_the_package_reads(tmp_path: Path):
    keys = {
        "clip.projector_type": "mlp",
        "clip.vision.image_mean": [0.5, 0.25, 0.125],
        "clip.use_gelu": True,
        "clip.vision.attention.layer_norm_epsilon": 0.5,
        "clip.vision.image_size": 336,
        "tokenizer.ggml.model": "llama",
    }
    tensors = {**mmproj(BASE), "v.class_embd": torch.ones(3), "v.patch": torch.ones(4, 3, 2, 5)}
    path = write(tmp_path / "m.gguf", tensors, "F16", keys=keys)
    found = header(path)
    assert {key: value for key, value in found.metadata.items() if key.startswith("clip.")} == {
        "clip.projector_type": "mlp",
        "clip.vision.image_mean": "0.5,0.25,0.125",
        "clip.use_gelu": "true",
        "clip.vision.attention.layer_norm_epsilon": "0.5",
        "clip.vision.image_size": "336",
    }
    raw = path.read_bytes()
    reader = gguf.GGUFReader(path)
    assert found.tensors.keys() == {tensor.name for tensor in reader.tensors} == tensors.keys()
    for theirs in reader.tensors:
        ours = found.tensors[theirs.name]
        assert ours.shape == tuple(tensors[theirs.name].shape) == tuple(theirs.shape.tolist()[::-1])
        assert ours.dtype == theirs.tensor_type.name
        assert raw[ours.start : ours.stop] == theirs.data.tobytes()


U32, I32, BOOL, TEXT, ARRAY = 4, 5, 7, 8, 9
ALIGN = "general.alignment"
GOOD = {
    "no tensor": file_of([], []),
    "version 2": file_of([], [entry()], DATA, version=2),
    "two tensors": file_of([], [entry(), entry("b", offset=32)], DATA * 2),
    "padding at the end": file_of([], [entry(dims=(1,))], DATA),
    "no padding at the end": file_of([], [entry(dims=(1,))], DATA[:4]),
    "a scalar": file_of([], [entry(dims=())], DATA[:4]),
    "an empty tensor": file_of([], [entry(dims=(0,)), entry("b")], DATA),
    "alignment of 1": file_of(
        [pair(ALIGN, U32, struct.pack("<I", 1))], [entry()], DATA, alignment=1
    ),
    "a long key array": file_of(
        [pair("t", ARRAY, struct.pack("<IQ", 0, 300_000) + bytes(300_000))], [entry()], DATA
    ),
}
BAD = {
    "empty file": b"",
    "magic only": b"GGUF",
    "another format": b"PK\3\4" + bytes(64),
    "version 1": file_of([], [entry()], DATA, version=1),
    "version 4": file_of([], [entry()], DATA, version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^63 tensors": file_of([], [], counts=(1 << 63, 0)),
    "2^63 keys": file_of([], [], counts=(0, 1 << 63)),
    "fewer tensors than said": file_of([], [entry()], DATA, counts=(9, 0)),
    "fewer keys than said": file_of([], [entry()], DATA, counts=(1, 9)),
    "key of 2^63 bytes": file_of([struct.pack("<Q", 1 << 63)], [], counts=(0, 1)),
    "key of 2^64-1 bytes": file_of([struct.pack("<Q", (1 << 64) - 1)], [], counts=(0, 1)),
    "empty key": file_of([pair("", U32, bytes(4))], []),
    "key twice": file_of([pair("a", U32, bytes(4))] * 2, []),
    "key with NUL": file_of([pair("a\0", U32, bytes(4))], []),
    "key not UTF-8": file_of([pair(b"\xff", U32, bytes(4))], []),
    "text of 2^63 bytes": file_of([pair("a", TEXT, struct.pack("<Q", 1 << 63))], []),
    "text not UTF-8": file_of([pair("clip.a", TEXT, text(b"\xff"))], []),
    "unknown value type": file_of([pair("a", 13, bytes(8))], []),
    "bool of 2": file_of([pair("a", BOOL, b"\2")], []),
    "array of 2^63 bytes": file_of([pair("a", ARRAY, struct.pack("<IQ", 0, 1 << 63))], []),
    "array of 2^61 doubles": file_of([pair("a", ARRAY, struct.pack("<IQ", 12, 1 << 61))], []),
    "array of 2^60 texts": file_of([pair("a", ARRAY, struct.pack("<IQ", TEXT, 1 << 60))], []),
    "array of unknown type": file_of([pair("a", ARRAY, struct.pack("<IQ", 99, 0))], []),
    "array of arrays": file_of([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12))], []),
    "text in an array past the end": file_of(
        [pair("a", ARRAY, struct.pack("<IQQ", TEXT, 1, 1 << 62))], []
    ),
    "last text past the end": file_of(
        [pair("a", ARRAY, struct.pack("<IQQ", TEXT, 1, 77))], [], counts=(0, 1)
    ),
    "alignment of 0": file_of([pair(ALIGN, U32, bytes(4))], []),
    "alignment of 24": file_of([pair(ALIGN, U32, struct.pack("<I", 24))], []),
    "alignment of 2^31": file_of([pair(ALIGN, U32, struct.pack("<I", 1 << 31))], []),
    "alignment of another type": file_of([pair(ALIGN, I32, struct.pack("<I", 32))], []),
    "n_dims of 2^31": file_of(
        [], [text("a") + struct.pack("<I", 1 << 31)], DATA, counts=(1, 0)
    ),
    "5 dimensions": file_of([], [entry(dims=(1, 1, 1, 1, 8))], DATA),
    "dimension of 2^64-1": file_of([], [entry(dims=((1 << 64) - 1,))], DATA),
    "product overflows": file_of([], [entry(dims=(1 << 40, 1 << 40))], DATA),
    "product overflows beside 0": file_of([], [entry(dims=(1 << 40, 1 << 40, 0))], DATA),
    "more than the file": file_of([], [entry(dims=(9,))], DATA),
    "truncated data": file_of([], [entry()], DATA[:-1]),
    "bytes after the last tensor": file_of([], [entry()], DATA + b"PK\3\4"),
    "bytes and no tensor": file_of([], []) + b"PK\3\4" * 20,
    "name twice": file_of([], [entry(), entry(offset=32)], DATA * 2),
    "name with NUL": file_of([], [entry("a\0b")], DATA),
    "name of 4 GB": file_of([], [struct.pack("<Q", 1 << 32)], counts=(1, 0)),
    "overlap": file_of([], [entry(), entry("b")], DATA * 2),
    "hole": file_of([], [entry(), entry("b", offset=64)], DATA * 3),
    "wrong order": file_of([], [entry(offset=32), entry("b")], DATA * 2),
    "off the alignment": file_of([], [entry(dims=(1,)), entry("b", offset=4)], DATA * 2),
    "offset of 2^64-1": file_of([], [entry(offset=(1 << 64) - 1)], DATA),
    "unknown type": file_of([], [entry(kind=99)], DATA),
    "removed type": file_of([], [entry(kind=4)], DATA),
    "half a block": file_of([], [entry(dims=(16,), kind=8)], bytes(32)),
}  # fmt: skip


@pytest.mark.parametrize("raw", GOOD.values(), ids=GOOD.keys())
def test_what_llama_cpp_reads(tmp_path: Path, raw: bytes):
    parse(tmp_path, raw)


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD.keys())
def test_one_clear_line_for_what_is_malformed(tmp_path: Path, raw: bytes):
    with pytest.raises(FormatError) as caught:
        parse(tmp_path, raw)
    assert caught.value.code == "format.gguf"
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.gguf: ")


def test_removed_types_are_named(tmp_path: Path):
    with pytest.raises(FormatError, match=r"type 31 \(Q4_0_4_4\), which ggml removed"):
        parse(tmp_path, file_of([], [entry(dims=(32,), kind=31)], bytes(32)))


def test_names_that_are_hostile_come_out_inert(tmp_path: Path):
    name = "\x1b]0;pwn\x07\u202emm"
    with pytest.raises(FormatError) as caught:
        parse(tmp_path, file_of([], [entry(name, kind=99)], DATA))
    assert "\x1b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)


def test_lfs_pointer(tmp_path: Path):
    with pytest.raises(FormatError) as caught:
        parse(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert caught.value.code == "format.lfs-pointer"


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic(scratch: Path, raw: bytes):
    for start in (b"GGUF\3\0\0\0", b"GGUF" + struct.pack("<IQQ", 3, 1, 1)):
        try:
            parse(scratch, start + raw)
        except FormatError as error:
            assert error.code == "format.gguf"  # noqa: PT017


class Memory(LocalSource):
    """A file in memory, for thirty thousand of them."""

    raw = b""

    def read(self, path: str, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(self.raw)
        return self.raw[start:stop]


def test_thirty_thousand_mutations(tmp_path: Path):
    keys = {"clip.projector_type": "mlp", "t": ["a", "bc", "def"], "clip.vision.image_mean": [0.5]}
    seed = write(tmp_path / "m.gguf", {"mm.0.weight": torch.ones(2, 32)}, "Q8_0", keys=keys)
    whole = seed.read_bytes()
    source = open_local(parse_ref(str(seed)))
    memory = Memory(source.ref, source.root, dict(source.files), source._states)
    entry_of = type(source.files["m.gguf"])
    rng = random.Random(4)
    refused = 0
    for _ in range(30_000):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[at] = rng.randrange(256)
                case 1:
                    raw[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 1 << 31, (1 << 64) - 1)))
                case 2:
                    del raw[at : at + rng.randint(1, 9)]
                case _:
                    raw[at:at] = rng.randbytes(rng.randint(1, 9))
            if not raw:
                break
        memory.raw = bytes(raw)
        memory.files["m.gguf"] = entry_of("m.gguf", len(raw))  # type: ignore[index]
        try:
            read_gguf_header(memory, "m.gguf")
        except FormatError:
            refused += 1
    assert 20_000 < refused < 30_000


def test_a_tokenizer_of_200_000_tokens_is_passed_over(tmp_path: Path):
    tokens = b"".join(text(f"token{i}") for i in range(200_000))
    pairs = [
        pair("tokens", ARRAY, struct.pack("<IQ", TEXT, 200_000) + tokens),
        pair("scores", ARRAY, struct.pack("<IQ", 6, 20_000_000) + bytes(80_000_000)),
    ]
    (tmp_path / "m.gguf").write_bytes(file_of(pairs, [entry()], DATA))
    source = opened(tmp_path / "m.gguf")
    tracemalloc.start()
    found = read_gguf_header(source, "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(found.tensors) == ["a"]
    assert source.traffic.bytes < len(tokens) + (5 << 20)  # the numbers are never read
    assert peak < 16 << 20


def test_a_projector_costs_one_read(tmp_path: Path):
    path = write(tmp_path / "m.gguf", mmproj(BASE))
    source = opened(path)
    read_gguf_header(source, path.name)
    assert (source.traffic.requests, source.traffic.bytes) == (1, min(PROBE, path.stat().st_size))


# --- values and steps -----------------------------------------------------------------------------


def loaded(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    source = open_local(parse_ref(str(path)))
    reading = open_checkpoint(source).readings[0]
    stored = load_tensors(source, reading.tensors.values())
    return {name: (item.tensor, item.step) for name, item in stored.items()}


@pytest.mark.parametrize("dtype", WRITABLE)
@settings(max_examples=8)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 1 << 20),
)
def test_quantise_write_read(
    scratch: Path, dtype: str, rows: int, blocks: int, scale: float, seed: int
):
    g = torch.Generator().manual_seed(seed)
    size = gguf.GGML_QUANT_SIZES[KINDS[dtype]][0]
    x = torch.randn(rows, blocks * size, generator=g) * scale
    values, step = loaded(write(scratch / "q.gguf", {"mm.0.weight": x}, dtype))["mm.0.weight"]
    assert step is not None
    assert values.dtype == step.dtype == torch.float32
    assert values.shape == step.shape == x.shape
    expected = gguf.dequantize(gguf.quantize(x.numpy(), KINDS[dtype]), KINDS[dtype])
    assert np.array_equal(values.numpy(), expected)
    # Half a step, or a whole one where a block's other end is cut off (Q4_0, Q5_0, MXFP4).
    reach = 1.0 if dtype in ("Q4_0", "Q5_0", "MXFP4") else 0.51
    assert ((values - x).abs() <= reach * step + 1e-12).all()


@pytest.mark.parametrize("dtype", WRITABLE)
def test_the_error_has_the_variance_that_the_step_says(dtype: str):
    x = np.random.default_rng(1).standard_normal((128, 512)).astype(np.float32)
    raw = gguf.quantize(x, KINDS[dtype])
    values, step = dequantised(raw.tobytes(), dtype, x.shape)
    said = float((step.double().square() / 12).mean()) ** 0.5
    assert np.sqrt(((values.numpy() - x) ** 2).mean()) == pytest.approx(said, rel=0.1)


# Bytes of a block that are codes, and their codes 0, 1, …: all that the K-quants pack otherwise.
LADDERS = {
    "Q2_K": [(16, 80, [0x00, 0x55, 0xAA, 0xFF])],
    "Q3_K": [(32, 96, [0x00, 0x55, 0xAA, 0xFF])],
    "Q4_K": [(16, 144, [code * 0x11 for code in range(16)])],
    "Q5_K": [(48, 176, [code * 0x11 for code in range(16)])],
    "Q6_K": [(0, 128, [code * 0x11 for code in range(16)])],
    "IQ4_NL": [(2, 18, [code * 0x11 for code in range(16)])],
    "IQ4_XS": [(8, 136, [code * 0x11 for code in range(16)])],
    "NVFP4": [(4, 36, [code * 0x11 for code in range(8)])],
}


@pytest.mark.parametrize("dtype", LADDERS)
def test_the_step_is_how_far_the_codes_of_a_block_are_apart(dtype: str):
    rng = np.random.default_rng(2)
    block, size = gguf.GGML_QUANT_SIZES[KINDS[dtype]]
    blocks = rng.integers(0, 256, (20, size), dtype=np.uint8)
    ((start, stop, ladder),) = LADDERS[dtype]
    rungs = []
    for code in ladder:
        blocks[:, start:stop] = code
        with np.errstate(all="ignore"):
            rungs.append(gguf.dequantize(blocks, KINDS[dtype]))
    steps = [
        dequantised(code_blocks(blocks, start, stop, code), dtype, (20, block))[1].numpy()
        for code in ladder
    ]
    sane = np.isfinite(np.stack(rungs)).all(axis=(0, 2))
    gaps = np.abs(np.diff(np.stack(rungs)[:, sane].astype(np.float64), axis=0))
    assert sane.sum() > 10
    for i in range(1, len(ladder) - 1):
        left, right = gaps[i - 1], gaps[i]
        with np.errstate(all="ignore"):
            expected = np.nan_to_num(np.sqrt((left**3 + right**3) / (left + right)))
        size = np.abs(np.stack(rungs)[:, sane]).max()  # of numbers that cancel, in fp32
        np.testing.assert_allclose(steps[i][sane], expected, rtol=1e-3, atol=1e-6 * size)


def code_blocks(blocks: np.ndarray, start: int, stop: int, code: int) -> bytes:
    changed = blocks.copy()
    changed[:, start:stop] = code
    return changed.tobytes()


GRIDS = {
    "IQ2_XXS": (8, "even"),
    "IQ2_XS": (8, "even"),
    "IQ2_S": (8, "free"),
    "IQ3_XXS": (4, "even"),
    "IQ3_S": (1, "free"),
    "IQ1_S": (0.875, "none"),
    "IQ1_M": (0.875, "none"),
}


@pytest.mark.parametrize("dtype", GRIDS)
def test_the_step_of_a_grid_is_what_its_nearest_vector_leaves(dtype: str):
    # The package does not quantise to these: Gaussian numbers are put on the nearest vector.
    from projaudit.gguf_values import _ROUNDINGS

    least, signs = GRIDS[dtype]
    traits = _type_traits[KINDS[dtype]]
    traits.init_grid()
    assert traits.grid is not None
    grid = traits.grid[0, 0].astype(np.float32)
    x = np.random.default_rng(3).standard_normal((600, 8)).astype(np.float32)
    best = min(
        ((left(x, grid * scale, signs, scale), scale) for scale in scales(grid)),
        key=lambda pair: pair[0],
    )
    said = least * best[1] / _ROUNDINGS[dtype].worth / 12**0.5
    assert best[0] == pytest.approx(said, rel=0.12)


def scales(grid: np.ndarray) -> np.ndarray:
    return np.linspace(0.6, 1.4, 9) / np.sqrt((grid**2).mean())


def left(x: np.ndarray, grid: np.ndarray, signs: str, scale: float) -> float:
    """Root mean square of what the nearest vectors of a grid leave of x."""
    width = grid.shape[1]
    if signs == "none":  # a shift of 1/8 either way in their place
        return float(
            np.minimum(*(nearest(x, grid + d * scale)[0] for d in (0.125, -0.125))).mean() / 8
        ) ** 0.5  # fmt: skip
    pieces = [nearest(np.abs(x[:, k : k + width]), grid) for k in range(0, 8, width)]
    error = sum(piece[0] for piece in pieces)
    if signs == "even":  # the cheapest sign is wrong for half of them
        chosen = np.concatenate([piece[1] for piece in pieces], axis=1)
        error = error + 0.5 * (4 * np.abs(x) * chosen).min(axis=1)
    return float(np.mean(error) / 8) ** 0.5


def nearest(x: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    squared = (x**2).sum(1)[:, None] - 2 * x @ grid.T + (grid**2).sum(1)[None]
    return squared.min(1), grid[squared.argmin(1)]


@pytest.mark.parametrize("dtype", sorted(QUANTISED))
def test_any_block_of_any_type(dtype: str):
    block, size = gguf.GGML_QUANT_SIZES[KINDS[dtype]]
    raw = np.random.default_rng(5).integers(0, 256, (64, size), dtype=np.uint8)
    values, step = dequantised(raw.tobytes(), dtype, (64, block))
    with np.errstate(all="ignore"):
        assert np.array_equal(values.numpy(), gguf.dequantize(raw, KINDS[dtype]), equal_nan=True)
    assert not step.isnan().any()
    assert (step >= 0).all()
    nothing = dequantised(b"", dtype, (0, block))
    assert [part.shape for part in nothing] == [(0, block)] * 2


def test_what_ggml_stores_as_floats_has_no_step(tmp_path: Path):
    for dtype, wanted in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        path = write(tmp_path / f"{dtype}.gguf", mmproj(BASE), dtype)
        tensor, step = loaded(path)["mm.0.weight"]
        assert (tensor.dtype, step) == (wanted, None)
        assert torch.equal(tensor, BASE[f"{P}linear_1.weight"].to(wanted))


def test_spacing_is_the_distance_to_the_next_value():
    x = torch.tensor([1.0, 1.5, -3.0, 1000.0])
    assert torch.equal(spacing(x), (torch.nextafter(x.abs(), torch.tensor(1e9)) - x.abs()))


def test_a_type_that_is_not_decoded(tmp_path: Path):
    raw = file_of([], [entry("mm.0.weight", (32, 2), kind=9)], bytes(96))
    (tmp_path / "x.gguf").write_bytes(raw[: len(raw) - 16])
    with pytest.raises(UnsupportedError, match="Q8_1"):
        loaded(tmp_path / "x.gguf")


def test_a_tensor_that_is_large_when_decoded(tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of([], [entry("mm.0.weight", (1 << 15, 1 << 16), kind=35)]))
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + (1 << 31) // 256 * 66)
    with pytest.raises(LimitError, match="8589934592 bytes"):
        loaded(path)


# --- the projector under its names ----------------------------------------------------------------


def test_every_known_type_has_one_entry_for_pictures_and_sound():
    types = [kind for naming in namings() for kind in naming.types]
    assert len(types) == len(set(types)) == 52
    for naming in namings():
        assert naming.source
        assert naming.added.keys() <= {f"{name}.weight" for name in naming.names}


def at_home(kind: str) -> tuple[list[str], list[str]]:
    """The names of a type in its file, and in the checkpoint that it was made from."""
    (naming,) = (naming for naming in namings() if kind in naming.types)
    pairs = [
        (old.replace("{n}", str(n)), new.replace("{n}", str(n)).replace("{i}", str(n - 1)))
        for old, new in naming.names.items()
        for n in (1, 2)
    ]
    both = dict.fromkeys(
        (old if old.endswith("weight") else f"{old}.weight",
         new if new.endswith("weight") else f"{new}.weight")
        for old, new in pairs
    )  # fmt: skip
    return [old for old, _ in both], [new for _, new in both]


@pytest.mark.parametrize("kind", [k for n in namings() for k in n.types])
def test_a_file_is_named_back_and_found_as_its_base_is(kind: str):
    theirs, ours = at_home(kind)
    said = {"clip.projector_type": kind, "clip.vision.projection_dim": "40"}
    assert converted_from(theirs, said) == dict(zip(theirs, ours, strict=True))
    shapes = dict.fromkeys(theirs, (40, 40))
    config = {"text_config": {"hidden_size": 40}}
    found = locate_mmproj(shapes, said)
    base = locate(dict.fromkeys(sorted(ours), (40, 40)), config)
    assert [[layer.role for layer in p.linears] for p in found] == [
        [layer.role for layer in p.linears] for p in base
    ]
    assert {name for p in found for name in p.tensors} <= set(theirs)
    assert found


def test_deepstack_numbers_are_ranks():
    names = [f"v.deepstack.{n}.fc1.weight" for n in (24, 8, 16)]
    found = converted_from(names, {"clip.projector_type": "qwen3vl_merger"})
    assert [found[name].split(".")[3] for name in names] == ["2", "0", "1"]


def test_two_names_never_become_one():
    names = ["mm.0.weight", "model.mm_projector.0.weight"]
    assert converted_from(names, {"clip.projector_type": "mlp"}) == {}
    shapes, _ = as_converted(dict.fromkeys(names, (4, 4)), {"clip.projector_type": "mlp"})
    assert sorted(shapes) == names


def test_a_type_that_nobody_knows_is_found_by_position():
    found = locate_mmproj(
        {"mm.0.weight": (8, 4), "mm.2.weight": (8, 8), "v.blk.0.attn_q.weight": (4, 4)},
        {"clip.projector_type": "\x1b[2Jnew"},
    )
    assert [(p.family, p.tensors) for p in found] == [("unknown", ("mm.0.weight", "mm.2.weight"))]


# --- as its user runs it --------------------------------------------------------------------------


def values(report: projaudit.Report, metric: str) -> list[float]:
    return [m.value for m in report.measurements if m.metric == metric]


def floor(path: Path, name: str, base: torch.Tensor) -> float:
    """What the steps say of the relative norm of rounding alone."""
    _, step = loaded(path)[name]
    assert step is not None
    return float((step.double().square().sum() / 12) ** 0.5 / base.double().norm())


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
def test_an_unchanged_model_is_at_its_rounding_floor(tmp_path: Path, dtype: str):
    base = save(tmp_path / "base", BASE)
    path = write(tmp_path / "mmproj.gguf", mmproj(BASE), dtype)
    report = projaudit.check(str(path), str(base), seed=1)
    floors = [floor(path, f"mm.{n}.weight", BASE[f"{P}linear_{i}.weight"]) for n, i in ((0, 1), (2, 2))]  # fmt: skip # noqa: E501
    assert values(report, "relative_norm") == pytest.approx(floors, rel=0.08)
    assert [f.rule for f in report.findings if f.rule == "projector-tensors-added"] == []


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
def test_a_drowned_update_is_no_pass_and_the_limit_is_said(tmp_path: Path, dtype: str):
    base = save(tmp_path / "base", BASE)
    for number, tensors in enumerate((BASE, tuned(BASE, 1e-4))):
        path = write(tmp_path / f"mmproj-{number}.gguf", mmproj(tensors), dtype)
        report = projaudit.check(str(path), str(base), seed=1)
        assert report.verdict is Verdict.INCONCLUSIVE
        said = [f.message for f in report.findings if f.rule == "update-below-rounding"]
        assert said
        assert all("an update shows from" in message for message in said)


@pytest.mark.parametrize(("dtype", "size"), [("F16", 0.05), ("Q8_0", 0.05), ("Q4_0", 0.5)])
def test_an_honest_fine_tune_passes(tmp_path: Path, dtype: str, size: float):
    base = save(tmp_path / "base", BASE)
    path = write(tmp_path / "mmproj.gguf", mmproj(tuned(BASE, size)), dtype)
    report = projaudit.check(str(path), str(base), seed=1)
    assert report.verdict is Verdict.PASS
    assert values(report, "relative_norm") == pytest.approx([size] * 2, rel=0.1)
    (projector,) = report.projectors
    assert [layer.weight for layer in projector.layers] == ["mm.0.weight", "mm.2.weight"]
    assert projector.chain == ("linear_1", "act:gelu", "linear_2")
    assert [part.status for part in report.coverage.parts] == ["audited", "not-looked-at"]


def test_a_spike_in_a_quantised_file_is_seen_as_in_a_float_one(tmp_path: Path):
    name = f"{P}linear_2.weight"
    u, v = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    spiked = dict(BASE)
    spiked[name] = BASE[name] + 0.5 * torch.outer(u, v) / u.norm() / v.norm() * BASE[name].norm()
    base = save(tmp_path / "base", BASE)
    tops = []
    for dtype in ("F32", "Q8_0"):
        path = write(tmp_path / f"{dtype}.gguf", mmproj(spiked), dtype)
        report = projaudit.check(str(path), str(base), seed=1)
        tops.append(values(report, "leading_singular_value")[-1])
    assert tops[0] == pytest.approx(tops[1], rel=0.02)


def test_gguf_against_gguf(tmp_path: Path):
    base = write(tmp_path / "base.gguf", mmproj(BASE), "F16")
    path = write(tmp_path / "mmproj.gguf", mmproj(tuned(BASE, 0.05)), "Q8_0")
    report = projaudit.check(str(path), str(base), seed=1)
    assert report.verdict is Verdict.PASS
    parts = {part.name: part.status for part in report.coverage.parts}
    assert parts == {"projector": "audited", "vision tower": "not-looked-at"}


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({}, 0),
        ({"clip.vision.embedding_length": 48, "clip.vision.image_mean": [0.5, 0.5, 0.5]}, 0),
        ({"clip.vision.embedding_length": 64}, 1),
        ({"clip.vision.image_mean": [0.5, 0.5, 0.25]}, 1),
        ({"clip.vision.image_std": [0.5]}, 1),
        ({"clip.use_silu": True}, 1),
        ({"clip.use_gelu": True}, 0),
    ],
)
def test_what_the_file_says_of_its_input_is_compared(tmp_path: Path, keys: dict, changed: int):
    config = {**CONFIG, "vision_config": {"hidden_size": 48, "hidden_act": "gelu"}}
    base = save(tmp_path / "base", BASE, config=config)
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (base / "preprocessor_config.json").write_text(json.dumps(images))
    keys = {"clip.projector_type": "mlp", **keys}
    path = write(tmp_path / "mmproj.gguf", mmproj(tuned(BASE, 0.05)), keys=keys)
    report = projaudit.check(str(path), str(base), seed=1)
    assert values(report, "config_changes") == [changed]
    assert ("config-changed" in {f.rule for f in report.findings}) is bool(changed)


def test_gemma_3_is_compared_less_the_one_that_is_added(tmp_path: Path):
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(48, 64, generator=g) / 7
    norm = (torch.randn(48, generator=g) * 0.1).bfloat16().float()
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"hidden_size": 64},
    }
    names = {f"{P}mm_input_projection_weight": matrix, f"{P}mm_soft_emb_norm.weight": norm}
    rest = {name: tensor for name, tensor in BASE.items() if not name.startswith(P)}
    base = save(tmp_path / "base", {**rest, **names}, config=config)
    named = {"mm.input_projection.weight": matrix * 1.01, "mm.soft_emb_norm.weight": norm + 1}
    path = write(tmp_path / "m.gguf", named, keys={"clip.projector_type": "gemma3"})
    report = projaudit.check(str(path), str(base), seed=1)
    assert values(report, "relative_norm")[:1] == pytest.approx([0.01], rel=1e-3)
    assert "added 1 to mm.soft_emb_norm.weight, taken off here" in report.projectors[0].reading
    tensor, step = loaded(path)["mm.soft_emb_norm.weight"]
    assert step is not None
    assert ((tensor - norm).abs() <= step).all()
    assert torch.equal(tensor.bfloat16().float(), norm)


TEXT_MODEL = {
    "token_embd.weight": torch.ones(9, 64),
    "output_norm.weight": torch.ones(64),
    **{
        f"blk.{i}.{part}.weight": torch.ones(64, 64)
        for i in range(3)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
    },
}


def test_every_quantisation_is_a_reading_and_text_models_are_none(tmp_path: Path):
    base = save(tmp_path / "base", BASE)
    folder = tmp_path / "ggufs"
    folder.mkdir()
    honest, hidden = mmproj(tuned(BASE, 0.05)), mmproj(tuned(BASE, 3.0))
    write(folder / "mmproj-f16.gguf", honest, "F16")
    write(folder / "mmproj-q8_0.gguf", honest, "Q8_0")
    write(folder / "model-q4_0.gguf", TEXT_MODEL, architecture="llama", keys={"llama.x": 1})
    report = projaudit.check(str(folder), str(base), seed=1)
    assert [p.reading.split(",")[0] for p in report.projectors] == [
        "main: mmproj-f16.gguf",
        "gguf-2: mmproj-q8_0.gguf",
    ]
    assert report.verdict is Verdict.PASS
    assert "ambiguous-sources" not in {f.rule for f in report.findings}
    write(folder / "mmproj-q8_0.gguf", hidden, "Q8_0")
    assert max(values(projaudit.check(str(folder), str(base), seed=1), "relative_norm")) > 2


def test_a_text_model_alone_has_nothing_to_audit(tmp_path: Path):
    path = write(tmp_path / "m.gguf", TEXT_MODEL, architecture="llama", keys={"llama.x": 1})
    for named in (path, tmp_path):
        with pytest.raises(NothingError) as caught:
            projaudit.check(str(named), str(named), seed=1)
        assert caught.value.code == "nothing.projector"


def test_gguf_beside_safetensors_is_another_reading_and_an_ambiguity(tmp_path: Path):
    base = save(tmp_path / "base", BASE)
    folder = save(tmp_path / "tuned", tuned(BASE, 0.05))
    write(folder / "mmproj-q8_0.gguf", mmproj(tuned(BASE, 3.0)), "Q8_0")
    report = projaudit.check(str(folder), str(base), seed=1)
    assert [p.reading.split(":")[0] for p in report.projectors] == ["main", "gguf-2"]
    assert max(values(report, "relative_norm")) > 2
    assert "ambiguous-sources" in {f.rule for f in report.findings}
    assert report.verdict is not Verdict.PASS
    (note,) = open_checkpoint(open_local(parse_ref(str(folder)))).ambiguities
    assert (note.kind, note.files) == ("gguf-beside", ("mmproj-q8_0.gguf",))


def test_a_projector_in_a_gguf_beside_a_text_model_in_safetensors(tmp_path: Path):
    base = save(tmp_path / "base", BASE)
    text_model = {name: tensor for name, tensor in BASE.items() if name.startswith("language")}
    folder = save(tmp_path / "tuned", text_model, config={"model_type": "llama"})
    write(folder / "mmproj.gguf", mmproj(tuned(BASE, 0.05)), "Q8_0")
    report = projaudit.check(str(folder), str(base), seed=1)
    assert [p.reading.split(":")[0] for p in report.projectors] == ["gguf-2"]
    assert report.verdict is not Verdict.PASS


def test_a_base_whose_projector_is_in_a_gguf_beside_a_text_model(tmp_path: Path):
    text_model = {name: tensor for name, tensor in BASE.items() if name.startswith("language")}
    base = save(tmp_path / "base", text_model, config={"model_type": "llama"})
    target = write(tmp_path / "tuned.gguf", mmproj(tuned(BASE, 0.05)))
    with pytest.raises(BaseError, match="has no projector"):
        projaudit.check(str(target), str(base), seed=1)
    write(base / "mmproj.gguf", mmproj(BASE))
    report = projaudit.check(str(target), str(base), seed=1)
    assert values(report, "relative_norm")[:2] == pytest.approx([0.05, 0.05], rel=1e-3)
    assert {t.file for t in report.tensors if t.side == "base"} == {"mmproj.gguf"}
    assert report.verdict is Verdict.PASS, report.sentence


@pytest.mark.parametrize("dtype", ["F16", "Q8_0", "Q4_0"])
def test_a_second_gguf_that_is_no_rounding_of_the_first_is_said(tmp_path: Path, dtype: str):
    base = save(tmp_path / "base", BASE)
    folder = tmp_path / "ggufs"
    folder.mkdir()
    honest = tuned(BASE, 0.5)
    write(folder / "mmproj-a.gguf", mmproj(honest))
    for other, said in ((honest, False), (tuned(honest, 0.9, seed=5), True)):
        write(folder / "mmproj-b.gguf", mmproj(other), dtype)
        report = projaudit.check(str(folder), str(base), seed=1, depth="weights")
        told = " ".join(f.message for f in report.findings if f.rule == "ambiguous-sources")
        assert ("is no rounding of the first file's" in told) is said
        assert ("mmproj-b.gguf" in told) is said
        assert (report.verdict is Verdict.INCONCLUSIVE) is said


def test_an_lfs_pointer_in_place_of_a_projector(tmp_path: Path):
    folder = save(tmp_path / "tuned", BASE)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("mmproj-f16.gguf", "model.gguf"):
        (folder / name).write_text(pointer)
        with pytest.raises(FormatError, match="git lfs pull"):
            open_checkpoint(open_local(parse_ref(str(folder))))
        (folder / name).unlink()


def test_a_projector_in_a_subfolder_is_said(tmp_path: Path):
    folder = save(tmp_path / "tuned", BASE)
    (folder / "gguf").mkdir()
    write(folder / "gguf" / "mmproj.gguf", mmproj(BASE))
    (note,) = open_checkpoint(open_local(parse_ref(str(folder)))).ambiguities
    assert (note.kind, note.files) == ("unread-subfolder", ("gguf/mmproj.gguf",))


def test_other_names_than_its_base_are_no_pass(tmp_path: Path):
    base = save(tmp_path / "base", BASE)
    path = write(tmp_path / "mmproj.gguf", mmproj(BASE), keys={"clip.projector_type": "glm4v"})
    with pytest.raises(UnsupportedError) as caught:
        projaudit.check(str(path), str(base), seed=1)
    assert caught.value.exit_code == 3


def test_where_says_what_was_found_and_a_broken_file_is_one_line(tmp_path: Path):
    path = write(tmp_path / "mmproj.gguf", mmproj(BASE), "Q8_0")

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "projaudit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    path.write_bytes(path.read_bytes()[:-40])
    done = run("check", path, "--base", path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) + len(done.stdout.strip().splitlines()) < 4
    assert "truncated" in done.stderr + done.stdout
