"""The header parser: total, stricter than the reference, and never of another opinion."""

from __future__ import annotations

import json
import math
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save, save_file

from projaudit.errors import FormatError
from projaudit.refs import parse_ref
from projaudit.safetensors_header import DTYPE_BITS, PROBE, Header, parse_header, read_header
from projaudit.source import open_local


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(
    dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def parse(raw: bytes) -> Header:
    return parse_header(raw, file="x.safetensors", size=len(raw))


def reference(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the Rust parser makes of it; None where it refuses."""
    try:
        return {
            name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
            for name, info in deserialize(raw)
        }
    except SafetensorError:
        return None


def ours(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The same of ours."""
    try:
        header = parse(raw)
    except FormatError:
        return None
    return {
        name: (info.dtype, info.shape, raw[info.start : info.stop])
        for name, info in header.tensors.items()
    }


DATA = b"1234"
BAD = {
    "empty file": b"",
    "shorter than its length field": b"\0" * 7,
    "no header": struct.pack("<Q", 0),
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length of 20 MB in 10 bytes": struct.pack("<Q", 20_000_000) + b"{}",
    "truncated JSON": file_of(b'{"a":'),
    "no object": file_of([]),
    "null": file_of(b"null"),
    "trailing JSON": file_of(b"{}{}"),
    "zeros after JSON": file_of(b"{}\0\0"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "UTF-8 signature": file_of(b"\xef\xbb\xbf{}"),
    "lone surrogate": file_of(
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', DATA
    ),
    "raw newline in a name": file_of(
        b'{"a\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', DATA
    ),
    "NaN": file_of(b'{"a":NaN}'),
    "5000 digits": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "100 000 brackets": file_of(b"[" * 100_000),
    "entry is text": file_of({"a": "b"}),
    "missing key": file_of({"a": {"dtype": "F32", "shape": [1]}}, DATA),
    "unknown dtype": file_of({"a": entry("Q9")}, DATA),
    "dtype is a list": file_of({"a": entry(["F32"])}, DATA),
    "shape is text": file_of({"a": entry(shape="1")}, DATA),
    "negative dimension": file_of({"a": entry(shape=[-1])}, DATA),
    "dimension is true": file_of({"a": entry(shape=[True])}, DATA),
    "dimension is a float": file_of({"a": entry(shape=[1.0])}, DATA),
    "dimension is -0": file_of(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "product overflows": file_of({"a": entry(shape=[1 << 40, 1 << 40])}, DATA),
    "three offsets": file_of({"a": entry(offsets=[0, 4, 4])}, DATA),
    "falling offsets": file_of({"a": entry(offsets=[4, 0])}, DATA),
    "span is not shape": file_of({"a": entry(shape=[2])}, DATA),
    "half a byte": file_of({"a": entry("F4", [3], [0, 2])}, b"12"),
    "past the end": file_of({"a": entry()}, b"12"),
    "bytes after the last tensor": file_of({"a": entry()}, DATA + b"PK"),
    "bytes and no tensor": file_of({}, b"PK"),
    "hole": file_of({"a": entry(), "b": entry(offsets=[5, 9])}, DATA * 2 + b"."),
    "hole at the start": file_of({"a": entry(offsets=[4, 8])}, DATA * 2),
    "overlap": file_of({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"),
    "same span": file_of({"a": entry(), "b": entry()}, DATA),
    "empty tensor inside another": file_of(
        {"a": entry(), "b": entry(shape=[0], offsets=[2, 2])}, DATA
    ),
    "metadata is a number": file_of({"__metadata__": 1}),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
}

STRICTER = {
    "twice": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                     b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', DATA),
    "twice, escaped": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                              b'"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', DATA),
    "metadata key twice": file_of(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "unknown key": file_of({"a": entry(more=1)}, DATA),
    "array for an object": file_of({"a": ["F32", [1], [0, 4]]}, DATA),
    "17 dimensions": file_of({"a": entry(shape=[1] * 17)}, DATA),
    "0 times 2^63": file_of({"a": entry(shape=[0, 1 << 63], offsets=[0, 0])}),
    "0 times 2^40 times 2^40": file_of({"a": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])}),
}  # fmt: skip

ODD = {
    "no tensors": file_of({}),
    "null metadata": file_of({"__metadata__": None}),
    "space around": file_of(b' \n{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\t ', DATA),
    "scalar": file_of({"a": entry(shape=[])}, DATA),
    "empty tensor": file_of({"a": entry(shape=[0, 3], offsets=[0, 0])}),
    "odd names": file_of({"": entry(), "\0\n\u202e": entry(offsets=[4, 8])}, DATA * 2),
    "any order": file_of({"a": entry(offsets=[4, 8]), "b": entry()}, DATA * 2),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_as_the_reference_does(name: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(BAD[name])
    assert caught.value.code == "format.safetensors"
    assert caught.value.file == "x.safetensors"
    assert str(caught.value).isprintable()
    assert reference(BAD[name]) is None


@pytest.mark.parametrize("name", STRICTER)
def test_refused_though_the_reference_accepts(name: str) -> None:
    assert reference(STRICTER[name]) is not None or "twice" in name
    with pytest.raises(FormatError) as caught:
        parse(STRICTER[name])
    assert caught.value.code == "format.safetensors"


@pytest.mark.parametrize("name", ODD)
def test_odd_and_right(name: str) -> None:
    assert ours(ODD[name]) == reference(ODD[name])
    assert ours(ODD[name]) is not None


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_reference(dtype: str) -> None:
    size = 4 * DTYPE_BITS[dtype] // 8
    raw = file_of({"a": entry(dtype, [4], [0, size])}, b"\0" * size)
    assert ours(raw) == reference(raw)
    assert ours(raw) is not None


def test_claimed_sizes_cost_nothing() -> None:
    raw = file_of({"a": entry(shape=[1 << 38], offsets=[0, 1 << 40])})
    header = parse_header(raw, file="x", size=len(raw) + (1 << 40))
    assert header.tensors["a"].nbytes == 1 << 40


def test_too_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projaudit.safetensors_header.MAX_TENSORS", 2)
    many = {str(i): entry(shape=[0], offsets=[0, 0]) for i in range(3)}
    with pytest.raises(FormatError, match="3 tensors"):
        parse(file_of(many))


def test_hundred_thousand_tensors_take_seconds_at_most() -> None:
    names = {f"layers.{i}.w": entry(offsets=(4 * i, 4 * i + 4)) for i in range(100_000)}
    raw = file_of(names)
    start = time.perf_counter()
    header = parse_header(raw, file="x", size=len(raw) + 400_000)
    assert time.perf_counter() - start < 10
    assert len(header.tensors) == 100_000


arrays = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(["float32", "float16", "float64", "int8", "bool", "uint16"]),
        st.lists(st.integers(0, 3), max_size=4),
    ),
    min_size=1,  # the reference writes no JSON for none
    max_size=6,
)


@given(arrays, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
@settings(max_examples=100, deadline=None)
def test_what_the_reference_writes_is_read_back(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    written = {
        name: np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
        for name, (dtype, shape) in tensors.items()
    }
    raw = save(written, metadata=metadata)
    header = parse(raw)
    assert header.metadata == metadata
    assert header.tensors.keys() == written.keys()
    for name, array in written.items():
        info = header.tensors[name]
        assert (info.name, info.file, info.shape) == (name, "x.safetensors", array.shape)
        assert info.numel == array.size
        assert raw[info.start : info.stop] == array.tobytes()
        assert info.nbytes == array.nbytes


def allowed_difference(raw: bytes) -> bool:
    """Whether one of the documented reasons to be stricter applies to what the reference read."""
    length = struct.unpack("<Q", raw[:8])[0]
    doubled = False

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal doubled
        doubled |= len({key for key, _ in items}) < len(items)
        return dict(items)

    header = json.loads(raw[8 : 8 + length], object_pairs_hook=pairs)
    entries = [value for key, value in header.items() if key != "__metadata__"]
    return doubled or any(
        not isinstance(value, dict)
        or set(value) != {"dtype", "shape", "data_offsets"}
        or len(value["shape"]) > 16
        or any(dim > 1 << 53 for dim in value["shape"])
        or (0 in value["shape"] and math.prod(d for d in value["shape"] if d) >= 1 << 57)
        for value in entries
    )


PIECES = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e3", b"null", b"true", b" ", b"\n",
    b"\\u0061", b"\\ud800", b"\xff", b"\0", b"F32", b"F16", b"BF16", b"__metadata__", b'"a"',
    b"18446744073709551616", b"9007199254740993", b"dtype", b'"shape":[1],', b"[0,4]", b"4", b"8",
]  # fmt: skip


def mutated(raw: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = bytearray(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(header) + 1)
        match rng.randrange(6):
            case 0:
                header[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                header[at:at] = rng.choice(PIECES)
            case 2:
                del header[at : at + rng.randint(1, 8)]
            case 3:
                other = rng.randrange(len(header) + 1)
                header[at:at] = header[other : other + rng.randint(1, 60)]
            case 4:
                digits = [i for i, c in enumerate(header) if chr(c).isdigit()]
                if digits:
                    header[rng.choice(digits)] = ord(rng.choice("0123456789"))
            case _:
                del data[rng.randint(0, len(data)) :]
                data += bytes(rng.randrange(3))
    lie = rng.choice([0] * 8 + [1, -1])
    return struct.pack("<Q", max(len(header) + lie, 0)) + bytes(header) + bytes(data)


def test_mutated_files_never_divide_us_from_the_reference() -> None:
    rng = random.Random(20)
    seeds = [*STRICTER.values(), *ODD.values()]
    seeds.append(file_of({"b": entry("BF16", [2, 1]), "__metadata__": {"f": "pt"}}, DATA))
    seeds.append(file_of({"a": entry(), "b": entry(offsets=[4, 8]), "c": entry("U8", [0], [8, 8])},
                         DATA * 2))  # fmt: skip
    until = time.perf_counter() + 4
    tried = accepted = stricter = 0
    while time.perf_counter() < until and tried < 60_000:
        raw = mutated(rng.choice(seeds), rng)
        mine, theirs = ours(raw), reference(raw)
        tried += 1
        accepted += mine is not None
        if mine is not None:
            assert mine == theirs, raw
        elif theirs is not None:
            stricter += 1
            assert allowed_difference(raw), raw
    assert accepted > 100
    assert stricter > 10


def test_reading_a_file_takes_one_read_or_two(tmp_path: Path) -> None:
    for name, count in (("short", 3), ("long", 2000)):
        path = tmp_path / f"{name}.safetensors"
        save_file({f"tensor.{i}": np.full(2, i, np.float32) for i in range(count)}, path)
        source = open_local(parse_ref(str(path)))
        header = read_header(source, path.name)
        assert len(header.tensors) == count
        assert (header.data_start > PROBE) == (name == "long")
        info = header.tensors["tensor.2"]
        assert np.frombuffer(source.read(path.name, info.start, info.stop), np.float32)[0] == 2


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(FormatError, match="git lfs pull") as caught:
        read_header(open_local(parse_ref(str(path))), path.name)
    assert caught.value.code == "format.lfs-pointer"


def test_hostile_names_are_inert_in_messages() -> None:
    name = "\x1b]0;pwn\x07\nRESULT: PASS\u202e" + "x" * 500
    with pytest.raises(FormatError) as caught:
        parse(file_of({name: entry("Q9")}, DATA))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
