"""Mutated JSON of a repository raises nothing but our own errors, each one inert line.

MUTATIONS=30000 in the environment is the full run (a minute or two). Headers of safetensors, GGUF
files and files of torch.save have theirs beside the tests of their parsers, always in full.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import CONFIG, llava
from safetensors.torch import save

from projaudit.adapters import fit
from projaudit.errors import FormatError, LimitError, NothingError, UnsupportedError
from projaudit.locating import locate
from projaudit.peft_config import read_adapter
from projaudit.quantised import find
from projaudit.quantised_config import rewrites
from projaudit.refs import Ref
from projaudit.safetensors_header import TensorInfo
from projaudit.source import RepoFile, Traffic
from projaudit.weight_files import read_config, ways_to_read

MUTATIONS = int(os.environ.get("MUTATIONS", "2000"))
Json = Any


@dataclass
class Memory:
    """A repository in memory."""

    held: dict[str, bytes]
    ref: Ref = field(default_factory=lambda: Ref("hf://a/b", "hub", repo="a/b"))
    name: str = "a/b"
    commit: str | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def files(self) -> dict[str, RepoFile]:
        return {path: RepoFile(path, len(data)) for path, data in self.held.items()}

    def read(self, path: str, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(self.held[path])
        return self.held[path][start:stop]

    def read_spans(self, path: str, spans: list[tuple[int, int]]) -> list[bytes]:
        return [self.read(path, *span) for span in spans]

    def read_small(self, path: str, limit: int) -> bytes:
        assert len(self.held[path]) <= limit
        return self.held[path]


ODD: list[Json] = [
    None, True, False, 0, -1, 1, 2, 8, 1 << 31, 1 << 63, 10**30, 0.5, 1e308, "", "a", "../x", "/",
    "re:(a*)*b", "re:[", "Linear", "\x1b[2J\n", "\u202e", "\u2002", "model.safetensors", "a" * 5000,
    [], {}, [[]], [1], ["a"], [None], {"a": {}}, {"": ""}, {"quant_method": "fp8"}, {"weights": []},
]  # fmt: skip
PIECES = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"NaN", b"Infinity", b"1e999", b"null",
    b"\\u0000", b"\\ud800", b"\xff", b"\0", b"9" * 5000, b"[" * 3000, b'"a":1,', b'"a":1,"a":2,',
]  # fmt: skip


def changed(node: Json, rng: random.Random) -> Json:
    """A document with one of its values, or the key of one, replaced, dropped or doubled."""
    if not isinstance(node, (dict, list)) or not node or rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(node, list):
        at = rng.randrange(len(node))
        return [*node[:at], changed(node[at], rng), *node[at + rng.randrange(2) :]]
    key = rng.choice(list(node))
    rest = dict(node)
    match rng.randrange(8):
        case 0:
            del rest[key]
        case 1:
            rest[rng.choice([*node, "", "a.b", "quantization_config", "auto_map"])] = rest.pop(key)
        case _:
            rest[key] = changed(node[key], rng)
    return rest


def mutated(document: Json, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(4)):
        document = changed(document, rng)
    raw = bytearray(json.dumps(document).encode())
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(4):
            case 0:
                raw[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                raw[at:at] = rng.choice(PIECES)
            case 2:
                del raw[at : at + rng.randint(1, 9)]
            case _:
                other = rng.randrange(len(raw) + 1)
                raw[at:at] = raw[other : other + rng.randint(1, 60)]
    return bytes(raw)


# --- the readers ----------------------------------------------------------------------------------

TENSORS = llava()
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
MODULE = "multi_modal_projector.linear_1"
F8 = {f"{MODULE}.weight": ("F8_E4M3", (64, 48)), f"{MODULE}.weight_scale": ("F32", (64, 1))}
INT4 = {
    f"{MODULE}.qweight": ("I32", (6, 64)),
    f"{MODULE}.qzeros": ("I32", (3, 8)),
    f"{MODULE}.scales": ("F16", (3, 64)),
}
STORED = [
    {name: TensorInfo(name, *what, "x", 0, 8) for name, what in parts.items()}
    for parts in (F8, INT4)
]


def index(raw: bytes) -> None:
    held = {"model.safetensors.index.json": raw, "a.safetensors": b"", "sub/b.safetensors": b""}
    ways_to_read(Memory(held), None, (), ["a.safetensors"], [])


def config(raw: bytes) -> None:
    held = {"config.json": raw, "config.5.0.0.json": b"{}", "model.safetensors": b""}
    found, redirect, hints, _ = read_config(Memory(held))
    ways_to_read(Memory(held), redirect, hints, ["model.safetensors"], [])
    locate(SHAPES, found)
    for tensors in STORED:
        weights = find(tensors, found, lambda info: b"\0" * info.nbytes)
        assert weights.packed or weights.unread
    rewrites(found, SHAPES)


NAME = f"base_model.model.model.{MODULE}"
FACTORS = {f"{NAME}.lora_A.weight": torch.ones(4, 48), f"{NAME}.lora_B.weight": torch.ones(64, 4)}
ADAPTER = save(FACTORS)
PROJECTORS = locate(SHAPES, CONFIG)


def adapter(raw: bytes) -> None:
    held = {"adapter_config.json": raw, "adapter_model.safetensors": ADAPTER}
    found = read_adapter(Memory(held))
    assert found is not None
    fit(found, PROJECTORS, SHAPES)


GROUPS = {"g": {"targets": ["Linear", "re:.*x"], "weights": {"num_bits": 8, "strategy": "group"}}}
SEEDS: dict[str, tuple[Callable[[bytes], None], list[Json]]] = {
    "index": (
        index,
        [{"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "sub/b.safetensors"}}],
    ),
    "config": (
        config,
        [
            CONFIG,
            CONFIG | {"transformers_weights": "model.safetensors", "attribute_map": {"a": "b"}},
            CONFIG | {"configuration_files": ["config.5.0.0.json"], "auto_map": {"A": "m.B"}},
            CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 2],
                                              "modules_to_not_convert": ["lm_head"]}},
            CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16,
                                              "desc_act": False}},
            CONFIG | {"text_config": {"quantization_config": {
                "quant_method": "compressed-tensors", "config_groups": GROUPS,
                "ignore": ["re:.*lm_head"]}}},
        ],
    ),
    "adapter": (
        adapter,
        [
            {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": False, "bias": "none",
             "rank_pattern": {"linear_2": 4}, "alpha_pattern": {"(linear_1|x)": 2.0},
             "target_modules": ["linear_1"], "target_parameters": []},
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEDS)
def test_mutations_raise_nothing_but_our_own_errors(name: str) -> None:
    read, seeds = SEEDS[name]
    for seed in seeds:
        read(json.dumps(seed).encode())
    rng = random.Random(5)
    lines: list[str] = []
    slowest = 0.0
    for _ in range(MUTATIONS):
        raw = mutated(rng.choice(seeds), rng)
        start = time.process_time()
        try:
            read(raw)
        except (FormatError, LimitError, NothingError, UnsupportedError) as error:
            lines.append(str(error))
        slowest = max(slowest, time.process_time() - start)
    assert MUTATIONS // 10 < len(lines) < MUTATIONS
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    assert slowest < 2
