"""An adapter as its repository describes it: what its config says of a module, by peft's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.inert import clean
from projaudit.safetensors_header import TensorInfo, read_header
from projaudit.source import Source
from projaudit.strict import load_json
from projaudit.torch_zip import read_torch_zip

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
NON_LORA = "non_lora_trainables.bin"
"""What LLaVA's training writes beside an adapter: the projector, and all else trained in full."""
MAX_RANK = 8192
"""Rank of one module's factors; no honest adapter has a tenth of it."""
MAX_PATTERNS = 20_000
"""Keys of a rank_pattern or alpha_pattern."""
MAX_NAME = 200
"""Characters of a tensor's name or a pattern."""

# Keys of rank_pattern are regular expressions; these do not backtrack, with one star at most.
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_ATOM = r"(?:[\w-]|\.|\\[.dw]|\[[\w-]+\])[*+?]?|\((?:\?:)?[\w\\.|-]+\)|[\^$]"
_TAME = re.compile(rf"(?:{_ATOM})+", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its repository describes it; nothing loaded yet."""

    source: Source
    file: str
    """What peft loads of it."""
    method: str
    """`peft_type` of its config: `LORA`, `LOKR`, …"""
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo] = field(repr=False)


def read_adapter(source: Source) -> Adapter | None:
    """The adapter of a repository, None where it brings none.

    Reads adapter_config.json and the header of adapter_model.safetensors, which peft takes before
    adapter_model.bin; and that of non_lora_trainables.bin, which LLaVA's loader lays over the base
    first. Raises FormatError (`format.adapter`) for a config that contradicts itself or is none, or
    a tensor in both files, and what reading the headers raises.
    """
    stored = next((path for path in (WEIGHTS, TORCH_WEIGHTS) if path in source.files), None)
    if CONFIG not in source.files or stored is None:
        return None
    config = load_json(source.read_small(CONFIG, 10 << 20), file=CONFIG, kind="adapter")
    if not isinstance(config, dict):
        raise wrong("is no JSON object")
    method = config.get("peft_type")
    if not isinstance(method, str) or not method:
        raise wrong("names no method", "peft_type")
    _check_types(config)
    tensors = (read_header if stored == WEIGHTS else read_torch_zip)(source, stored).tensors
    if NON_LORA in source.files:
        more = read_torch_zip(source, NON_LORA).tensors
        if twice := sorted(tensors.keys() & more.keys()):
            raise wrong(f"holds {clean(twice[0])}, as {stored} does", file=NON_LORA)
        tensors = {**tensors, **more}
    return Adapter(source, stored, method.upper(), config, tensors)


def not_read(source: Source) -> UnsupportedError:
    """Why the adapter of a repository is not read."""
    stored = next((clean(p, 80) for p in source.files if p.startswith("adapter_model")), CONFIG)
    lacks = f"no {CONFIG}" if CONFIG not in source.files else f"no {WEIGHTS}"
    return UnsupportedError(
        f"holds {stored} and {lacks}",
        "adapter",
        file=clean(source.name),
        remedy="load it with peft and save it as safetensors; projaudit never unpickles",
    )


def _check_types(config: Mapping[str, object]) -> None:
    """Raises FormatError where a key that is read here has a value that peft would not take."""
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(key), (bool, type(None))):
            raise wrong("is neither true nor false", key)
    for key in ("lora_alpha", "alpha"):
        number(config, key, 8)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise wrong("is no object", key)
        if len(patterns) > MAX_PATTERNS:
            raise LimitError(f"more than {MAX_PATTERNS} keys", "patterns", file=CONFIG, field=key)
    texts(config, "target_parameters")
    if config.get("bias") not in (None, "none", "all", "lora_only", "boft_only"):
        raise wrong("is none of none, all and lora_only", "bias")


def texts(config: Mapping[str, object], key: str) -> list[str]:
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong("is no list of names", key)
    return value


def count(config: Mapping[str, object], key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else _as_count(value, key)


def number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key)
    return default if value is None else _as_number(value, key)


def rank_of(config: Mapping[str, object], path: str, key: str, default: int) -> int:
    found = _by_pattern(config, "rank_pattern", path)
    return _as_count(found[0], "rank_pattern") if found else count(config, key, default)


def alpha_of(config: Mapping[str, object], path: str, key: str, default: float) -> float:
    found = _by_pattern(config, "alpha_pattern", path)
    return _as_number(found[0], "alpha_pattern") if found else number(config, key, default)


def _as_count(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong("is no positive whole number", key)
    if value > MAX_RANK:
        raise LimitError(f"rank {value}, above {MAX_RANK}", "rank", file=CONFIG, field=key)
    return value


def _as_number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise wrong("is no number", key)
    return float(value)


def _by_pattern(config: Mapping[str, object], key: str, path: str) -> tuple[object, ...]:
    """What the first key of a pattern that matches a module's path says; () where none does.

    As `peft.utils.other.get_pattern_key`. The path is that of the adapter's transformers. One with
    `model.` in front is that of the model it is loaded into, too; one without may have it there,
    and then both have to give the same.
    """
    patterns = config.get(key) or {}
    assert isinstance(patterns, dict)
    if not patterns:
        return ()
    answers = []
    for spelled in (path,) if path.startswith("model.") else (path, f"model.{path}"):
        hit = next((p for p in patterns if _matches(p, spelled, key)), None)
        answers.append(() if hit is None else (patterns[hit],))
    if any(answer != answers[0] for answer in answers):
        raise UnsupportedError(
            f"says two things of {clean(path)}, by how it is spelled",
            "adapter",
            file=CONFIG,
            field=key,
        )
    return answers[0]


def _matches(pattern: str, path: str, key: str) -> bool:
    """`re.match(rf"(.*\\.)?({pattern})$", path)`, for patterns that cannot take long."""
    if _PLAIN.fullmatch(pattern):  # a dot is any character
        tail, rest = path[-len(pattern) :], path[: -len(pattern)]
        same = len(tail) == len(pattern) and all(
            p in (c, ".") for p, c in zip(pattern, tail, strict=True)
        )
        return same and (not rest or rest.endswith("."))
    stars = len(re.findall(r"[*+]", pattern)), pattern.count("?")
    if len(pattern) > MAX_NAME or stars[0] > 1 or stars[1] > 2 or not _TAME.fullmatch(pattern):
        raise UnsupportedError(
            f"has the key {clean(repr(pattern), 80)}, an expression that is not matched here",
            "adapter",
            file=CONFIG,
            field=key,
            remedy="name the modules in full",
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error:
        raise wrong(f"has the key {clean(repr(pattern), 80)}, which is no pattern", key) from None


def wrong(message: str, key: str | None = None, file: str = CONFIG) -> FormatError:
    return FormatError(message, "adapter", file=file, field=key)
