"""The projector of a GGUF file: its tensors under the names that they were converted from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from projaudit.locating import locate
from projaudit.projector import Projector

_TYPE_KEYS = ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type")
_TOWERS = {"v.": "vision_tower.v.", "a.": "audio_tower.a."}
_WIDTH_KEYS = ("clip.vision.projection_dim", "clip.audio.projection_dim")


@dataclass(frozen=True)
class Naming:
    """One entry of mmproj.yaml; the file's head says what each key means."""

    types: tuple[str, ...]
    names: Mapping[str, str]
    added: Mapping[str, float]
    source: str


@cache
def namings() -> tuple[Naming, ...]:
    """The entries of mmproj.yaml, in file order."""
    import yaml

    entries = yaml.safe_load((Path(__file__).parent / "mmproj.yaml").read_text("utf-8"))
    return tuple(
        Naming(
            tuple(entry["types"]),
            entry["names"],
            {name: float(number) for name, number in entry.get("added", {}).items()},
            entry["source"],
        )
        for entry in entries
    )


def projector_types(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What a file says that its projectors are: of pictures, of sound; `mlp` where it says nothing,
    as clip.cpp takes it."""
    said = [metadata[key] for key in _TYPE_KEYS if metadata.get(key)]
    return tuple(dict.fromkeys(said)) or ("mlp",)


def converted_from(names: Sequence[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Name in the file -> name in the checkpoint that was converted, for those that are known.

    No two names are given the same: where a file would make them so, both keep their own.
    """
    rules = {rule: new for naming in _of(metadata) for rule, new in naming.names.items()}
    starts = {rule: rule.partition("{")[0] for rule in rules}
    matches: dict[str, list[re.Match[str]]] = {rule: [] for rule in rules}
    fits: dict[str, tuple[str, re.Match[str]]] = {}
    for name in names:
        for rule in rules:
            match = _pattern(rule).match(name) if name.startswith(starts[rule]) else None
            if match is not None:
                matches[rule].append(match)
                if name not in fits or match.end() > fits[name][1].end():
                    fits[name] = rule, match
    ranks = {rule: _ranks(found) for rule, found in matches.items() if "{i}" in rules[rule]}
    new: dict[str, str] = {}
    for name, (rule, match) in fits.items():
        number = match.groupdict().get("n", "")
        rank = ranks[rule][int(number)] if rule in ranks else ""
        start = rules[rule].replace("{n}", number).replace("{i}", str(rank))
        new[name] = start + name[match.end() :]
    taken = Counter(new.get(name, name) for name in names)
    return {name: other for name, other in new.items() if taken[other] == 1}


def added(metadata: Mapping[str, str]) -> dict[str, float]:
    """Tensor -> the number that the converter added to all of its values."""
    return {name: number for naming in _of(metadata) for name, number in naming.added.items()}


def as_converted(
    shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> tuple[dict[str, Sequence[int]], dict[str, Any]]:
    """The shapes under the names that were converted, in the order of a checkpoint, and what a
    config would say of the language model's width."""
    new = converted_from(list(shapes), metadata)
    renamed = {new.get(name) or _tower(name): shape for name, shape in shapes.items()}
    said = [metadata[key] for key in _WIDTH_KEYS if key in metadata]
    widths = [int(text) for text in said if text.isascii() and text.isdigit()]
    config = {"text_config": {"hidden_size": widths[0]}} if widths else {}
    return {name: renamed[name] for name in sorted(renamed)}, config


def as_stored(projector: Projector, names: Sequence[str], metadata: Mapping[str, str]) -> Projector:
    """A projector that was located under the names of `as_converted`, under those of its file."""
    converted = converted_from(names, metadata)
    old = {converted.get(name) or _tower(name): name for name in names}

    def back(name: str) -> str:
        return old.get(name, name)

    return replace(
        projector,
        linears=tuple(
            replace(layer, weight=back(layer.weight), bias=layer.bias and back(layer.bias))
            for layer in projector.linears
        ),
        vectors={role: back(name) for role, name in projector.vectors.items()},
        unexpected=tuple(map(back, projector.unexpected)),
        packed=tuple(map(back, projector.packed)),
    )


def locate_mmproj(
    shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> tuple[Projector, ...]:
    """The projectors of a GGUF file, with the roles that they have in the checkpoint that it was
    converted from and the names of the file; raises as `locate` does."""
    found = locate(*as_converted(shapes, metadata))
    return tuple(as_stored(projector, list(shapes), metadata) for projector in found)


def _of(metadata: Mapping[str, str]) -> list[Naming]:
    types = set(projector_types(metadata))
    return [naming for naming in namings() if types & set(naming.types)]


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{n\}", r"(?P<n>[0-9]{1,9})") + r"(?=\.|$)")


def _tower(name: str) -> str:
    """The name of a tensor that is no projector's, so that its tower is known for one."""
    tower = next((long for short, long in _TOWERS.items() if name.startswith(short)), "")
    return tower + name[2:] if tower else name


def _ranks(matches: Sequence[re.Match[str]]) -> dict[int, int]:
    """Number in a name -> where it stands among all of them, from 0."""
    return {number: i for i, number in enumerate(sorted({int(m["n"]) for m in matches}))}
