"""GGUF files for tests: as the package writes them, and byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from models import P, Tensors

TOWER = {
    f"v.blk.{i}.{part}.weight": torch.ones(32, 32)
    for i in range(2)
    for part in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
}


def mmproj(tensors: Tensors) -> Tensors:
    """A LLaVA checkpoint's projector as llama.cpp's converter names it, and a bit of a tower."""
    new = {"linear_1": "mm.0", "linear_2": "mm.2"}
    found = {
        name.removeprefix(P).replace(old, short): tensor
        for name, tensor in tensors.items()
        for old, short in new.items()
        if name.startswith(P + old)
    }
    return {**TOWER, **found}


def write(
    path: Path,
    tensors: Tensors,
    dtype: str = "F32",
    *,
    architecture: str = "clip",
    keys: Mapping[str, object] | None = None,
) -> Path:
    """Writes a GGUF file with the package; matrices as `dtype`, vectors as fp32."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in (keys or {"clip.projector_type": "mlp"}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)
    kind = gguf.GGMLQuantizationType[dtype]
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim < 2 or dtype == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str | bytes) -> bytes:
    """A text as the format stores it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A key with its value."""
    return text(key) + struct.pack("<I", kind) + value


def entry(
    name: str | bytes = "a", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0
) -> bytes:
    """What a file says of one tensor; dims in ggml's order."""
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


def file_of(
    pairs: list[bytes],
    entries: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """The bytes of a file."""
    tensors, keys = counts or (len(entries), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys)
    head += b"".join((*pairs, *entries))
    return head + b"\0" * (-len(head) % alignment) + data
