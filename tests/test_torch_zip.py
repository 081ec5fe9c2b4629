"""Files of torch.save: read as torch reads them, by few bytes, and refused where in doubt."""

from __future__ import annotations

import io
import json
import pickle
import random
import stat
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIG, llava, save, tuned

import projaudit
from projaudit.checkpoint import open_checkpoint
from projaudit.cli import main
from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.findings import Verdict
from projaudit.refs import parse_ref
from projaudit.safetensors_header import Header
from projaudit.source import RepoFile, open_local
from projaudit.torch_zip import read_torch_zip
from projaudit.weights import load_tensors

Tensors = Mapping[str, torch.Tensor]


class Memory:
    """A source of one file, that counts what is read of it."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.files = {"x.bin": RepoFile("x.bin", len(raw))}
        self.count = 0

    def read(self, path: str, start: int, stop: int) -> bytes:
        return self.read_spans(path, [(start, stop)])[0]

    def read_spans(self, path: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        assert all(0 <= start <= stop <= len(self.raw) for start, stop in spans)
        self.count += sum(stop - start for start, stop in spans)
        return [self.raw[start:stop] for start, stop in spans]


def saved(content: object, **keys: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **keys)
    return out.getvalue()


def parse(raw: bytes) -> Header:
    return read_torch_zip(Memory(raw), "x.bin")  # type: ignore[arg-type]


def loaded(raw: bytes) -> dict[str, torch.Tensor]:
    """All tensors as projaudit loads them."""
    source = Memory(raw)
    header = read_torch_zip(source, "x.bin")  # type: ignore[arg-type]
    stored = load_tensors(source, header.tensors.values())  # type: ignore[arg-type]
    return {name: item.tensor for name, item in stored.items()}


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        raw = [
            t.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
            for t in (ours[name], tensor)
        ]
        if tensor.numel():
            assert torch.equal(*(t.view(torch.uint8) for t in raw)), name


# --- what torch writes ----------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
VIEWS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda t: t,
    "turned": lambda t: t.permute(list(range(t.dim()))[::-1]),
    "every second": lambda t: t[::2] if t.dim() else t,
    "inner columns": lambda t: t[..., 1:3] if t.dim() else t,
    "tail": lambda t: t[1:] if t.dim() else t,
    "with a dimension of one": lambda t: t.unsqueeze(-1),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}
tensors = st.tuples(
    st.sampled_from(FLOATS), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99)
)
dicts = st.tuples(
    st.lists(tensors, min_size=1, max_size=3),
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.integers(0, 2), st.sampled_from(sorted(VIEWS))),
        max_size=6,
    ),
)


@given(dicts, st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_torch_saves_is_read_to_the_byte(made, ordered: bool) -> None:
    """Shapes, dtypes, strides, offsets, parameters, and several names for one storage."""
    bases = []
    for dtype, shape, seed in made[0]:
        generator = torch.Generator().manual_seed(seed)
        bases.append(torch.randn(shape, generator=generator).to(dtype))
    kind = OrderedDict if ordered else dict
    content = kind((n, VIEWS[view](bases[i % len(bases)])) for n, (i, view) in made[1].items())
    if ordered:
        content._metadata = OrderedDict({"": {"version": 1}})
    raw = saved(content)
    theirs = torch.load(io.BytesIO(raw), weights_only=True)
    assert_same(loaded(raw), theirs)


def test_every_dtype_has_its_place() -> None:
    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
    )
    more = "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu complex64"
    content = {n: torch.ones(3).to(getattr(torch, n)) for n in f"{names} {more} complex128".split()}
    raw = saved(content)
    for name, info in parse(raw).tensors.items():
        assert raw[info.start : info.stop] == bytes(content[name].view(torch.uint8).tolist())
        assert info.shape == (3,)


def test_a_module_is_read_to_the_byte() -> None:
    """Tied weights included: two names, one storage."""
    module = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(50, 16),
            "layer": torch.nn.TransformerEncoderLayer(16, 2, 32),
            "head": torch.nn.Linear(16, 50, bias=False),
        }
    )
    module["head"].weight = module["embed"].weight
    raw = saved(module.state_dict())
    header = parse(raw)
    assert header.tensors["head.weight"].start == header.tensors["embed.weight"].start
    assert_same(loaded(raw), torch.load(io.BytesIO(raw), weights_only=True))


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_one_level_down(key: str) -> None:
    """As MiniGPT-4 and training loops save it, with what training leaves beside."""
    state = {"llama_proj.weight": torch.randn(3, 4), "llama_proj.bias": torch.randn(3)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    content = {key: state, "optimizer": optimizer, "epoch": 3, "config": {"run": {"amp": True}}}
    assert_same(loaded(saved(content)), state)
    assert_same(loaded(saved(state)), state)


def test_parts_one_level_down_keep_their_part_in_the_name() -> None:
    content = {"vision": {"w": torch.ones(1)}, "projector": {"0.weight": torch.zeros(2)}}
    assert parse(saved(content)).tensors.keys() == {"vision.w", "projector.0.weight"}


def test_values_that_are_no_tensors_are_none_of_ours() -> None:
    content = {"w": torch.ones(2), "step": 10**30, "t": (1.5, None, [True, b"".decode()]), "d": {}}
    assert parse(saved(content)).tensors.keys() == {"w"}
    assert parse(saved({"epoch": 1})).tensors == {}


def test_a_flipped_checksum_hides_nothing() -> None:
    """threats 1: scanners stop at it, torch does not."""
    content = {"w": torch.arange(50.0)}
    raw = saved(content)
    at = raw.index(content["w"].numpy().tobytes())
    changed = raw[:at] + bytes(200) + raw[at + 200 :]
    theirs = torch.load(io.BytesIO(changed), weights_only=True)
    assert not theirs["w"].any()
    assert_same(loaded(changed), theirs)


def test_zip64_is_read_as_torch_writes_it(tmp_path: Path) -> None:
    """A storage of more than 4 GiB, and another behind it; the file is nearly all hole."""
    size = (1 << 32) + 4096
    head, tail = zip64_parts(size)
    path = tmp_path / "big.bin"
    with path.open("wb") as out:
        out.write(head)
        out.seek(len(head) + size)
        out.write(tail)
    source = open_local(parse_ref(str(path)))
    opened = open_checkpoint(source)
    info = opened.readings[0].tensors["w"]
    assert opened.readings[0].tensors["big"].nbytes == size
    theirs = torch.load(path, mmap=True, weights_only=True)
    assert_same({"w": load_tensors(source, [info])["w"].tensor}, {"w": theirs["w"]})
    assert theirs["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def zip64_parts(size: int) -> tuple[bytes, bytes]:
    """What torch 2.13 writes around one storage of `size` bytes (its layout, byte by byte)."""
    small = saved({"big": torch.zeros(1, dtype=torch.uint8), "w": torch.arange(6.0).reshape(2, 3)})
    body = zipfile.ZipFile(io.BytesIO(small)).read("archive/data.pkl")
    body = body.replace(
        b"K\1tq\x07QK\0K\1\x85",
        b"\x8a\5%stq\7QK\0\x8a\5%s\x85" % ((size.to_bytes(5, "little"),) * 2),
    )
    parts: list[tuple[str, int, int, int, bool]] = []
    out = [b""]
    at = 0

    def add(name: str, data: bytes, count: int | None = None) -> None:
        nonlocal at
        length = len(data) if count is None else count
        wide = length >= 0xFFFFFFFF or at >= 0xFFFFFFFF
        offset = at
        extra = b""
        if wide:
            sizes = struct.pack("<2Q", length, 0) if length >= 0xFFFFFFFF else b""
            extra = sizes + (struct.pack("<Q", at) if at >= 0xFFFFFFFF else b"")
            extra = struct.pack("<2H", 1, len(extra)) + extra
        short = -(at + 30 + len(name) + len(extra) + 4) % 64
        extra += b"FB" + struct.pack("<H", short) + b"Z" * short
        out[-1] += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(name), len(extra)
        )
        out[-1] += name.encode() + extra + data
        if count is not None:
            out.append(b"")
        out[-1] += struct.pack("<4sL2Q" if wide else "<4s3L", b"PK\7\x08", 0, length, length)
        at += 30 + len(name) + len(extra) + length + (24 if wide else 16)
        parts.append((name, offset, length, at, wide))

    add("big/data.pkl", body)
    add("big/byteorder", b"little")
    add("big/data/0", b"", size)
    add("big/data/1", torch.arange(6.0).numpy().tobytes())
    add("big/version", b"3\n")
    directory = b""
    for name, offset, length, _, wide in parts:
        far, large = offset >= 0xFFFFFFFF, length >= 0xFFFFFFFF
        fields = [length, length] * large + [offset] * far
        extra = struct.pack(f"<2H{len(fields)}Q", 1, 8 * len(fields), *fields) if wide else b""
        said = [0xFFFFFFFF if large else length] * 2
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            0,
            0,
            0x0808,
            0,
            0,
            0,
            0,
            *said,
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            0xFFFFFFFF if far else offset,
        )
        directory += name.encode() + extra
    end = at + len(directory)
    out[-1] += directory
    out[-1] += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, 5, 5, len(directory), at)
    out[-1] += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    out[-1] += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 5, 5, len(directory), 0xFFFFFFFF, 0)
    return out[0], out[1]


def test_a_large_file_is_read_by_few_bytes() -> None:
    content = {f"layers.{i}.weight": torch.zeros(512, 512) for i in range(40)}
    content["mm_projector.0.weight"] = torch.randn(64, 64)
    source = Memory(saved(content))
    header = read_torch_zip(source, "x.bin")  # type: ignore[arg-type]
    assert len(source.raw) > 40_000_000
    assert source.count < 100_000
    info = header.tensors["mm_projector.0.weight"]
    source.count = 0
    stored = load_tensors(source, [info])[info.name]  # type: ignore[arg-type]
    assert torch.equal(stored.tensor, content[info.name])
    assert source.count < info.nbytes + 200


def test_many_tensors_take_seconds() -> None:
    raw = saved({f"layers.{i}.weight": torch.zeros(1) for i in range(5_000)})
    start = time.perf_counter()
    assert len(parse(raw).tensors) == 5_000
    assert time.perf_counter() - start < 5


# --- threats A1-A9: crafted files -----------------------------------------------------------------


def parts_of(content: object) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def scripted() -> bytes:
    """What torch.jit.save writes, some of it compressed."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(3, 3)), out)
    return out.getvalue()


def zipped(
    parts: Mapping[str, bytes] | Sequence[tuple[str, bytes]],
    prefix: str = "archive/",
    change: Callable[[zipfile.ZipInfo], None] = lambda info: None,
) -> bytes:
    """The entries in a zip file, as anyone could write it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in parts.items() if isinstance(parts, Mapping) else parts:
            info = zipfile.ZipInfo(prefix + name)
            change(info)
            archive.writestr(info, data)
    return out.getvalue()


GOOD = {"w": torch.arange(12.0).reshape(3, 4), "v": torch.ones(5)}
PARTS = parts_of(GOOD)
BODY = PARTS["data.pkl"]
RAW = saved(GOOD)


def with_body(body: bytes) -> bytes:
    return zipped({**PARTS, "data.pkl": body})


def edited(old: bytes, new: bytes) -> bytes:
    assert BODY.count(old) >= 1, old
    return with_body(BODY.replace(old, new, 1))


def started(code: bytes) -> bytes:
    """The same pickle with more code at its beginning."""
    return with_body(BODY[:2] + code + BODY[2:])


def patched(raw: bytes, place: int, form: str, *values: int) -> bytes:
    changed = bytearray(raw)
    struct.pack_into(form, changed, place, *values)
    return bytes(changed)


def record(name: str, raw: bytes = RAW) -> int:
    """Where the directory describes an entry."""
    return raw.rindex(f"archive/{name}".encode()) - 46


def header_of(name: str, raw: bytes = RAW) -> int:
    return raw.index(f"archive/{name}".encode()) - 30


class Evil:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def dumped(content: object) -> bytes:
    return with_body(pickle.dumps(content, 2))


def doubled() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate"):
        return zipped([*PARTS.items(), ("data.pkl", BODY)])


def deflated(info: zipfile.ZipInfo) -> None:
    info.compress_type = zipfile.ZIP_DEFLATED


def linked(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


def commented() -> bytes:
    out = io.BytesIO(zipped(PARTS))
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = b"hello"
    return out.getvalue()


def shifted_local() -> bytes:
    """The local header of a storage says that its bytes begin 4 later than they do."""
    at = header_of("data/0")
    (extra,) = struct.unpack_from("<H", RAW, at + 28)
    return patched(RAW, at + 28, "<H", extra - 4)


def overlapped() -> bytes:
    """Both storages point to the first one's place."""
    (first,) = struct.unpack_from("<L", RAW, record("data/0") + 42)
    return patched(RAW, record("data/1") + 42, "<L", first)


ZIP, NOT_READ = "format.torch-zip", "unsupported.format"
TENSOR = b"(QK\0K\3K\4\x86K\4K\1\x86\x89"
EVIL: Mapping[str, tuple[str, str, Callable[[], bytes]]] = {
    # A1: code on load
    "os.system": (
        NOT_READ,
        "posix.system",
        lambda: dumped({"w": Evil(__import__("os").system, "id")}),
    ),
    "resolve_name": (
        NOT_READ,
        "pkgutil.resolve_name",
        lambda: dumped(Evil(__import__("pkgutil").resolve_name, "os:system")),
    ),
    "eval of builtins": (NOT_READ, "eval", lambda: dumped(Evil(eval, "1"))),
    "a submodule of torch": (NOT_READ, "torch.hub.load", lambda: dumped(Evil(torch.hub.load, "x"))),
    "a name with a dot": (
        NOT_READ,
        "torch.serialization.os.system",
        lambda: started(b"ctorch.serialization\nos.system\n"),
    ),
    "INST": (ZIP, "opcode 0x69", lambda: started(b"(X\2\0\0\0idios\nsystem\n")),
    "OBJ": (ZIP, "opcode 0x6f", lambda: started(b"(ccollections\nOrderedDict\no")),
    "NEWOBJ": (ZIP, "opcode 0x81", lambda: started(b"ccollections\nOrderedDict\n)\x81")),
    "EXT1": (ZIP, "opcode 0x82", lambda: started(b"\x82\1")),
    "STACK_GLOBAL": (ZIP, "opcode 0x93", lambda: started(b"X\2\0\0\0osX\6\0\0\0system\x93")),
    "REDUCE of a text": (ZIP, "calls what is no function", lambda: started(b"X\2\0\0\0os)R")),
    "REDUCE by the memo": (ZIP, "calls what is no function", lambda: started(b"]q\xc8h\xc8)R")),
    "REDUCE of a storage type": (
        ZIP,
        "calls torch.FloatStorage",
        lambda: started(b"ctorch\nFloatStorage\nK\5\x85R"),
    ),
    "OrderedDict of pairs": (
        ZIP,
        "calls collections.OrderedDict",
        lambda: started(b"ccollections\nOrderedDict\n]\x85R"),
    ),
    "BUILD of a dict": (ZIP, "no OrderedDict", lambda: started(b"}}b")),
    "BUILD that hides methods": (
        ZIP,
        "other than _metadata",
        lambda: started(b"ccollections\nOrderedDict\n)R}X\5\0\0\0itemsNsb"),
    ),
    "SETITEM on a tensor": (ZIP, "no dict", lambda: with_body(BODY[:-2] + b"K\0K\1su.")),
    "SETITEM on a list": (ZIP, "no dict", lambda: started(b"]K\0K\1s")),
    "APPEND to a dict": (ZIP, "no list", lambda: started(b"}K\1a")),
    "a key twice": (ZIP, "'w' twice", lambda: edited(b"X\1\0\0\0v", b"X\1\0\0\0w")),
    # A2: a payload, then garbage; and what ends too early
    "bytes after STOP": (ZIP, "left at its end", lambda: with_body(BODY + b"\xff")),
    "a second pickle after STOP": (
        ZIP,
        "left at its end",
        lambda: with_body(BODY + pickle.dumps(1)),
    ),
    "unknown opcode": (ZIP, "opcode 0xff", lambda: with_body(BODY[:-1] + b"\xff")),
    "no STOP": (ZIP, "ends within", lambda: with_body(BODY[:-1])),
    "empty pickle": (ZIP, "is no pickle", lambda: with_body(b"")),
    "underflow": (ZIP, "empty stack", lambda: with_body(b"\x80\2.")),
    "tuple beyond a mark": (ZIP, "empty stack", lambda: started(b"K\1(\x85")),
    "a memo never stored": (ZIP, "never stored", lambda: started(b"h\xee")),
    "a text that is no UTF-8": (ZIP, "not UTF-8", lambda: started(b"X\1\0\0\0\xff")),
    "a text of 4 GB": (ZIP, "ends within", lambda: started(b"X\xff\xff\xff\xff")),
    # A3: two data.pkl, code, what nothing refers to
    "two data.pkl": (ZIP, "stands twice", doubled),
    "two data.pkl by case": (
        ZIP,
        "nothing that torch.save writes",
        lambda: zipped({**PARTS, "DATA.PKL": BODY}),
    ),
    "no data.pkl": (ZIP, "no data.pkl", lambda: zipped({"data/0": b""})),
    "a nested pickle": (
        ZIP,
        "nothing that torch.save writes",
        lambda: zipped({**PARTS, "evil.pkl": BODY}),
    ),
    "TorchScript": (NOT_READ, "TorchScript", lambda: zipped({**PARTS, "constants.pkl": BODY})),
    "TorchScript code": (
        NOT_READ,
        "TorchScript",
        lambda: zipped({**PARTS, "code/__torch__.py": b""}),
    ),
    "TorchScript as torch writes it": (NOT_READ, "TorchScript", lambda: scripted()),
    "a storage of no tensor": (
        ZIP,
        "storage of no tensor",
        lambda: zipped({**PARTS, "data/7": b"1234"}),
    ),
    # A4: two readers of the zip see two things
    "bytes before": (ZIP, "points elsewhere", lambda: b"PK\3\4" + RAW),
    "a script before": (ZIP, "is no zip file", lambda: b"#!/bin/sh\n" + RAW),
    "bytes after": (ZIP, "bytes after the end", lambda: RAW + b"\0"),
    "a zip after": (ZIP, "does not end where", lambda: RAW + zipped(PARTS)),
    "a comment": (ZIP, "after the end", commented),
    "truncated": (ZIP, "truncated", lambda: RAW[:-30]),
    "half": (ZIP, "truncated", lambda: RAW[: len(RAW) // 2]),
    "local name differs": (
        ZIP,
        "local header",
        lambda: patched(RAW, header_of("data.pkl") + 30, "<B", ord("b")),
    ),
    "local name is longer": (
        ZIP,
        "local header",
        lambda: patched(RAW, header_of("data.pkl") + 26, "<H", 99),
    ),
    "storage's local name is longer": (
        ZIP,
        "local header",
        lambda: patched(zipped(PARTS), header_of("data/1", zipped(PARTS)) + 26, "<H", 99),
    ),
    "local flags differ": (
        ZIP,
        "local header",
        lambda: patched(RAW, header_of("data.pkl") + 6, "<H", 0x0809),
    ),
    "local method differs": (
        ZIP,
        "local header",
        lambda: patched(RAW, header_of("data.pkl") + 8, "<H", 8),
    ),
    "local size differs": (
        ZIP,
        "local header",
        lambda: patched(RAW, header_of("data.pkl") + 22, "<L", 9),
    ),
    "storage's local name differs": (
        ZIP,
        "local header",
        lambda: patched(RAW, header_of("data/0") + 35, "<B", ord("x")),
    ),
    "storage begins elsewhere": (ZIP, "local header", shifted_local),
    "descriptor differs": (ZIP, "descriptor", lambda: RAW.replace(b"PK\7\x08", b"PK\7\x09")),
    "encrypted": (ZIP, "encrypted", lambda: patched(RAW, record("data/0") + 8, "<H", 0x0809)),
    "on another disk": (ZIP, "split", lambda: patched(RAW, record("data/0") + 34, "<H", 1)),
    "entries overlap": (ZIP, "overlaps", overlapped),
    "an entry is longer": (
        ZIP,
        "overlaps|another size",
        lambda: patched(RAW, record("data/0") + 20, "<2L", 4096, 4096),
    ),
    "an entry is shorter": (
        ZIP,
        "another size than the zip|local header",
        lambda: patched(RAW, record("data/0") + 20, "<2L", 44, 44),
    ),
    "packed and true size differ": (
        ZIP,
        "another size",
        lambda: patched(RAW, record("data/0") + 20, "<L", 44),
    ),
    "zip64 sizes that are not there": (
        ZIP,
        "lacks the zip64",
        lambda: patched(RAW, record("data/0") + 20, "<2L", 0xFFFFFFFF, 0xFFFFFFFF),
    ),
    "zip64 end record elsewhere": (
        ZIP,
        "points elsewhere",
        lambda: patched(RAW, len(RAW) - 34, "<Q", 0),
    ),
    "zip64 end record of another count": (
        ZIP,
        "malformed zip64|differ",
        lambda: patched(RAW, len(RAW) - 98 + 32, "<Q", 3),
    ),
    "end records that differ": (
        ZIP,
        "two end records",
        lambda: patched(RAW, len(RAW) - 14, "<2H", 3, 3),
    ),
    "fewer entries than counted": (
        ZIP,
        "malformed directory|differ",
        lambda: patched(zipped(PARTS), len(zipped(PARTS)) - 14, "<2H", 99, 99),
    ),
    "a byte order of big": (NOT_READ, "big-endian", lambda: zipped({**PARTS, "byteorder": b"big"})),
    "a byte order of nonsense": (
        ZIP,
        "byte order",
        lambda: zipped({**PARTS, "byteorder": b"middle"}),
    ),
    # A5: compressed
    "deflated": (
        ZIP,
        "compressed",
        lambda: zipped({**PARTS, "data.pkl": bytes(100_000)}, change=deflated),
    ),
    # A6: paths and links
    "zip slip": (
        ZIP,
        "outside of the archive",
        lambda: zipped([*((f"archive/{n}", d) for n, d in PARTS.items()), ("../../evil", b"")], ""),
    ),
    "everything outside": (ZIP, "outside of the archive", lambda: zipped(PARTS, "../")),
    "absolute": (ZIP, "outside of the archive", lambda: zipped(PARTS, "/")),
    "path in a key": (
        ZIP,
        "nothing that torch.save writes",
        lambda: zipped({**PARTS, "data/../../x": b""}),
    ),
    "a folder, which torch leaves unread": (
        ZIP,
        "no regular file",
        lambda: patched(RAW, record("data/0") + 38, "<L", 0x10),
    ),
    "a link": (ZIP, "a link", lambda: zipped(PARTS, change=linked)),
    # A7: views and storages
    "offset beyond": (ZIP, "beyond its storage", lambda: edited(b"QK\0K\3", b"QK\1K\3")),
    "stride beyond": (ZIP, "beyond its storage", lambda: edited(b"K\4K\1\x86", b"K\5K\1\x86")),
    "shape beyond": (ZIP, "beyond its storage", lambda: edited(b"K\3K\4\x86", b"K\3K\5\x86")),
    "a size that overflows": (
        ZIP,
        "larger than any file",
        lambda: edited(b"K\3K\4\x86", b"K\3\x8a\x0a" + b"\xff" * 9 + b"\0\x86"),
    ),
    "a size below zero": (
        ZIP,
        "no counts",
        lambda: edited(b"K\3K\4\x86", b"K\3J\xff\xff\xff\xff\x86"),
    ),
    "an offset below zero": (
        ZIP,
        "impossible shape",
        lambda: edited(b"QK\0K\3", b"QJ\xff\xff\xff\xffK\3"),
    ),
    "a size that is true": (ZIP, "no counts", lambda: edited(b"K\3K\4\x86", b"K\3\x88\x86")),
    "strides of another length": (
        ZIP,
        "impossible shape",
        lambda: edited(b"K\4K\1\x86", b"K\4\x85"),
    ),
    "storage is smaller": (ZIP, "another size than the zip", lambda: edited(b"K\x0ct", b"K\x0dt")),
    "storage is not there": (
        ZIP,
        "which is not there",
        lambda: edited(b"X\1\0\0\0000", b"X\1\0\0\0008"),
    ),
    "two types of one storage": (
        ZIP,
        "two types",
        lambda: dumped_twice("torch\nIntStorage"),
    ),
    "elements share memory": (
        NOT_READ,
        "same memory",
        lambda: saved({"w": torch.zeros(1).expand(1 << 40)}),
    ),
    "negated as it is read": (
        NOT_READ,
        "negated",
        lambda: saved({"w": torch.ones(3, dtype=torch.complex64).conj().imag}),
    ),
    # A8: other things by the name of .bin
    "7z": (NOT_READ, "7z", lambda: b"7z\xbc\xaf\x27\x1c" + bytes(50)),
    "tar": (NOT_READ, "tar", lambda: bytes(257) + b"ustar\0" + bytes(300)),
    "gzip": (NOT_READ, "gzip", lambda: b"\x1f\x8b" + bytes(50)),
    "legacy pickle": (
        NOT_READ,
        "legacy",
        lambda: saved(GOOD, _use_new_zipfile_serialization=False),
    ),
    "bare pickle": (NOT_READ, "legacy", lambda: pickle.dumps(Evil(print, 1))),
    "pickle of protocol 0": (ZIP, "no zip file", lambda: b"cos\nsystem\n(S'id'\ntR."),
    "later protocol": (NOT_READ, "protocol 4", lambda: saved(GOOD, pickle_protocol=4)),
    "an ordinary zip": (
        ZIP,
        "nothing that torch.save writes|outside",
        lambda: zipped({"a.txt": b"hello"}),
    ),
    "nothing": (ZIP, "no zip file", lambda: b""),
    "an empty zip": (ZIP, "no zip file", lambda: zipped({})),
    # no state dict
    "a tensor alone": (NOT_READ, "one tensor", lambda: saved(torch.ones(3))),
    "a list": (NOT_READ, "no dict", lambda: saved([torch.ones(3)])),
    "two levels down": (
        NOT_READ,
        "beside or below",
        lambda: saved({"model": {"a": {"w": torch.ones(3)}}}),
    ),
    "tensors beside the model": (
        NOT_READ,
        "beside or below",
        lambda: saved({"model": GOOD, "ema": GOOD}),
    ),
    "a dict beside tensors": (
        NOT_READ,
        "beside or below",
        lambda: saved({**GOOD, "projector": GOOD}),
    ),
    "tensors in a list beside": (
        NOT_READ,
        "beside or below",
        lambda: saved({**GOOD, "more": [torch.ones(2)]}),
    ),
    "numbers for names": (NOT_READ, "under numbers", lambda: saved({0: torch.ones(2)})),
    "a whole module": (NOT_READ, "no part of a state dict", lambda: saved(torch.nn.Linear(2, 2))),
    "quantised by torch": (
        NOT_READ,
        "_rebuild_qtensor",
        lambda: saved({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
    ),
}


def dumped_twice(kind: str) -> bytes:
    """A third tensor on the first storage, which it calls by another type."""
    again = (
        b"X\1\0\0\0zctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagec"
        + kind.encode()
        + b"\nX\1\0\0\x000X\3\0\0\0cpuK\x0ctQK\0K\3\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
    )
    return with_body(BODY[:-2] + again + b"u.")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", EVIL)
def test_crafted_files_are_refused_each_with_its_line(name: str) -> None:
    code, says, make = EVIL[name]
    with pytest.raises((FormatError, UnsupportedError), match=says) as caught:
        loaded(make())
    assert caught.value.code == code
    assert caught.value.file == "x.bin"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_the_same_files_without_their_fault_are_read() -> None:
    """The control: what the crafted ones are made with makes good files too."""
    assert_same(loaded(zipped(PARTS)), GOOD)
    assert_same(loaded(zipped(PARTS, "other name/")), GOOD)
    assert_same(loaded(with_body(BODY)), GOOD)
    more = b"X\1\0\0\0z(K\1]q\xc8h\xc8}X\5\0\0\0itemsNstu."
    assert_same(loaded(with_body(BODY[:-2] + more)), GOOD)
    again = loaded(dumped_twice("torch\nFloatStorage"))
    assert again["z"].tolist() == [0, 1, 2]


def test_limits_come_before_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projaudit.torch_zip.PICKLE_LIMIT", len(BODY) - 1)
    with pytest.raises(LimitError) as caught:
        parse(RAW)
    assert caught.value.code == "limit.pickle-size"
    monkeypatch.setattr("projaudit.torch_entries.MAX_TENSORS", 3)
    monkeypatch.setattr("projaudit.torch_zip.MAX_TENSORS", 3)
    with pytest.raises(LimitError) as caught:
        parse(RAW)
    assert caught.value.code == "limit.tensors"


def test_structures_that_grow_without_end_cost_nothing() -> None:
    """Tuples of tuples, 2^5000 leaves by the memo; lists in themselves; 100 000 lists deep."""
    doubling = b"K\1" + b"q\x64h\x64\x86" * 5000
    circle = b"]q\x65h\x65a"
    deep = b"]" * 100_000 + b"a" * 99_999
    start = time.perf_counter()
    for code in (doubling, circle, deep):
        body = BODY[:-2] + b"X\1\0\0\0z" + code + b"u."
        assert parse(with_body(body)).tensors.keys() == {"w", "v"}
    assert time.perf_counter() - start < 5


def mutated(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    start = raw.index(b"data.pkl") + 8
    stop = raw.index(b"PK\3\4", start)
    directory = raw.index(b"PK\1\2")
    for _ in range(rng.randint(1, 3)):
        low, high = rng.choice([(start, stop), (directory, len(out)), (0, len(out))])
        at = rng.randrange(min(low, len(out) - 1), min(high, len(out)))
        match rng.randrange(6):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at] = rng.choice(
                    b"\x80\x85\x86\x87\x88\x89\x8a)(.Q]Racehjqrstu}XKMJGNb\0\1\xff"
                )
            case 3:
                del out[at : at + rng.randint(1, 4)]
            case 4:
                other = rng.randrange(len(out))
                out[at : at + 8] = out[other : other + 8]
            case _:
                out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 4)))
    return bytes(out)


def flat(content: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The tensors of the seeds' kind of dict, after mutation."""
    found = {}
    for key, value in content.items():
        for name, tensor in value.items() if isinstance(value, dict) else ():
            found[name if key in ("model", "net", "module") else f"{key}.{name}"] = tensor
        if isinstance(value, torch.Tensor):
            found[key] = value
    return found


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_raise_nothing_else_and_never_divide_us_from_torch() -> None:
    rng = random.Random(41)
    content = OrderedDict(w=torch.randn(3, 4).t(), p=torch.nn.Parameter(torch.ones(2).half()))
    content._metadata = OrderedDict({"": {"version": 1}})
    nested = {"model": {"a.b": torch.ones(3).bfloat16()}, "epoch": 3, "x": [1, 2.5, None]}
    seeds = [
        RAW,
        zipped(PARTS),
        saved(content),
        saved(nested),
        saved({"f": torch.ones(2).to(torch.float8_e5m2)}),
    ]
    accepted = compared = 0
    lines: set[str] = set()
    for _ in range(30_000):
        raw = mutated(rng.choice(seeds), rng)
        try:
            mine = loaded(raw)
        except (FormatError, UnsupportedError, LimitError) as error:
            lines.add(str(error))
            continue
        accepted += 1
        try:
            theirs = torch.load(io.BytesIO(raw), weights_only=True)
        except Exception:  # torch raises what it likes, and refuses more
            continue
        compared += 1
        assert_same(mine, flat(theirs))
    assert accepted > 1000
    assert compared > 1000
    assert len(lines) > 500
    assert all(line.isprintable() for line in lines)


# --- audits ---------------------------------------------------------------------------------------

BASE = llava()
TUNED = tuned(BASE, 0.05)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "base", BASE, dtype=torch.bfloat16)


def pickled(folder: Path, content: object, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def half(content: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in content.items()}


def audit(target: Path, base: Path) -> projaudit.Report:
    return projaudit.check(str(target), str(base), seed=1, depth="weights")


def values(report: projaudit.Report) -> list[tuple[str, str, float]]:
    return [(m.metric, m.subject, m.value) for m in report.measurements]


def rules_of(report: projaudit.Report) -> set[str]:
    return {finding.rule for finding in report.findings}


def test_a_pickle_is_measured_as_its_safetensors_twin(tmp_path: Path, base: Path) -> None:
    twin = audit(save(tmp_path / "twin", TUNED, dtype=torch.bfloat16), base)
    report = audit(pickled(tmp_path / "bin", half(TUNED)), base)
    assert report.verdict is twin.verdict is Verdict.PASS
    assert values(report) == values(twin)
    assert {t.sha256 for t in report.tensors} == {t.sha256 for t in twin.tensors}
    assert [p.status for p in report.coverage.parts] == [p.status for p in twin.coverage.parts]


def test_transposed_matrices_are_measured_as_they_are(tmp_path: Path, base: Path) -> None:
    """threats A9."""
    twin = audit(save(tmp_path / "twin", TUNED, dtype=torch.bfloat16), base)
    turned = {
        name: tensor if "embed" in name or tensor.dim() < 2 else tensor.t().contiguous().t()
        for name, tensor in half(TUNED).items()
    }
    report = audit(pickled(tmp_path / "bin", turned), base)
    ours, theirs = (
        [value for value in values(r) if value[1].startswith("projector")] for r in (report, twin)
    )
    assert ours == theirs
    # The others' bytes stand in another order than the base's, so nothing is said of them.
    assert {p.name: p.status for p in report.coverage.parts}["vision tower"] == "not-looked-at"


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("mm_projector.bin", "model.mm_projector."),
        ("non_lora_trainables.bin", "base_model.model.model.mm_projector."),
        ("checkpoint_4.pth", "model.mm_projector."),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_a_projector_on_its_own(tmp_path: Path, base: Path, name: str, prefix: str, alone) -> None:
    leaves = {"linear_1.": "0.", "linear_2.": "2."}
    content = {}
    for full, tensor in half(TUNED).items():
        layer, _, leaf = full.removeprefix("multi_modal_projector.").partition(".")
        if f"{layer}." in leaves:
            content[prefix + leaves[f"{layer}."] + leaf] = tensor
    folder = pickled(tmp_path / "bin", content, name)
    (folder / "training_args.bin").write_bytes(pickle.dumps(Evil(print, 1)))
    (folder / "optimizer.pt").write_bytes(b"?")
    config = {**CONFIG, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
    (folder / "config.json").write_text(json.dumps(config))
    report = audit(folder / name if alone else folder, base)
    twin = audit(save(tmp_path / "twin", TUNED, dtype=torch.bfloat16), base)
    assert "ambiguous-sources" not in rules_of(report)
    ours, theirs = ([v for v in values(r) if v[1] == "projector/linear_1"] for r in (report, twin))
    assert ours == theirs
    assert ours


def test_the_same_projector_beside_is_named_and_no_finding(tmp_path: Path, base: Path) -> None:
    """threats J6: most repositories with a .bin have it twice for old loaders' sake."""
    folder = save(tmp_path / "both", TUNED, dtype=torch.bfloat16)
    pickled(folder, half(TUNED))
    report = audit(folder, base)
    assert report.verdict is Verdict.PASS
    assert "ambiguous-sources" not in rules_of(report)
    (said,) = [f for f in report.findings if f.rule == "projector-repeated"]
    assert "pytorch_model.bin" in said.message
    assert said.severity.label == "info"
    assert len(report.projectors) == 1


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin"])
def test_another_projector_beside_is_audited_too(tmp_path: Path, base: Path, name: str) -> None:
    """threats J6 and J15: the worse of both counts."""
    folder = save(tmp_path / "both", TUNED, dtype=torch.bfloat16)
    other = half(tuned(BASE, 0.5, seed=4))
    if name == "mm_projector.bin":
        other = {n: t for n, t in other.items() if n.startswith("multi_modal_projector.")}
    pickled(folder, other, name)
    report = audit(folder, base)
    assert "ambiguous-sources" in rules_of(report)
    assert report.exit_code == 3
    norms = [
        value
        for metric, subject, value in values(report)
        if metric == "relative_norm" and subject.endswith("linear_1")
    ]
    assert norms == pytest.approx([0.05, 0.5], rel=0.05)


def test_a_projector_of_another_form_beside_is_said(tmp_path: Path, base: Path) -> None:
    folder = save(tmp_path / "both", TUNED, dtype=torch.bfloat16)
    pickled(folder, half(llava(h=80)))
    report = audit(folder, base)
    assert report.exit_code == 3
    assert len(report.projectors) == 1
    (finding,) = [f for f in report.findings if f.rule == "ambiguous-sources"]
    assert "not compared" in finding.message


def test_a_pickle_beside_without_a_projector_is_never_called_the_same(tmp_path, base) -> None:
    folder = save(tmp_path / "both", TUNED, dtype=torch.bfloat16)
    pickled(folder, {"unheard.of": torch.ones(2)}, "other.pt")
    report = audit(folder, base)
    assert report.exit_code == 3
    assert "ambiguous-sources" in rules_of(report)


def test_two_matrices_on_one_storage_are_said(tmp_path: Path, base: Path) -> None:
    """threats A7: the same memory for two tensors of a projector is no honest checkpoint's."""
    content = half(llava(d=64))
    first = content["multi_modal_projector.linear_1.weight"]
    content["multi_modal_projector.linear_2.weight"] = first
    own = save(tmp_path / "own", llava(d=64), dtype=torch.bfloat16)
    report = audit(pickled(tmp_path / "bin", content), own)
    (finding,) = [f for f in report.findings if f.rule == "ambiguous-sources"]
    assert "shares memory" in finding.message
    assert report.exit_code == 3


def in_process(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


HOSTILE = [
    "os.system",
    "bytes after STOP",
    "two data.pkl",
    "local name differs",
    "deflated",
    "zip slip",
    "offset beyond",
    "7z",
    "legacy pickle",
    "storage begins elsewhere",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(tmp_path: Path, base: Path, capsys, name: str) -> None:
    code, _, make = EVIL[name]
    folder = pickled(tmp_path / "bad", {})
    content = half(TUNED)
    if name == "storage begins elsewhere":
        raw = saved(content)
        for number in range(len(content)):
            at = raw.index(f"archive/data/{number}".encode()) - 30
            (extra,) = struct.unpack_from("<H", raw, at + 28)
            raw = patched(raw, at + 28, "<H", extra - 2)
        (folder / "pytorch_model.bin").write_bytes(raw)
    else:
        (folder / "pytorch_model.bin").write_bytes(make())
    status = in_process("check", folder, "--base", base, "--format", "json", "--depth", "weights")
    said = capsys.readouterr()
    assert status == {"format.torch-zip": 2, "unsupported.format": 3}[code]
    assert json.loads(said.out)["error"]["code"] == code
    assert said.err.count("\n") == 1
    assert "pytorch_model.bin" in said.err


@pytest.mark.parametrize("name", HOSTILE[:-1])
def test_hostile_files_beside_a_sound_model_are_never_a_pass(tmp_path, base, name: str) -> None:
    folder = save(tmp_path / "both", TUNED, dtype=torch.bfloat16)
    (folder / "pytorch_model.bin").write_bytes(EVIL[name][2]())
    report = audit(folder, base)
    assert report.exit_code == 3
    (finding,) = [f for f in report.findings if f.rule == "ambiguous-sources"]
    assert "not read, as it" in finding.message
    assert len(report.projectors) == 1


def test_more_pickles_than_are_read_are_said(tmp_path: Path, base: Path) -> None:
    folder = save(tmp_path / "many", TUNED, dtype=torch.bfloat16)
    for number in range(20):
        torch.save(
            {"multi_modal_projector.linear_1.weight": torch.ones(64, 48)}, folder / f"{number}.pt"
        )
    opened = open_checkpoint(open_local(parse_ref(str(folder))))
    assert len(opened.readings) == 16
    assert len([a for a in opened.ambiguities if "too many" in a.message]) == 5
