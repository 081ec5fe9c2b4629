"""Which class of transformers a projector is that no chain describes, and how it is built: data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from projaudit.errors import UnsupportedError
from projaudit.inert import clean

LARGEST = 1 << 17
"""Above every width, vocabulary and count that a projector's config holds."""

# Activations, ways to make visual words, model types; a rate like 4/8.
_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,63}|[0-9]{1,3}/[0-9]{1,3}")
_DEEP = re.compile(r"layers|depth")


@dataclass(frozen=True)
class Recipe:
    """One class of transformers, as families.yaml names it; the file's head says what is what."""

    path: str
    """`model.Class`: the class in transformers/models/<model>/modeling_<model>.py."""
    config: str
    """The model type whose config class it is built from."""
    keys: Mapping[str, tuple[str, ...]]
    """Part of the config (empty: the top) -> the keys of it that the class depends on."""
    args: tuple[str, ...]
    form: str
    """How it is given sets of tokens: a name in `module.FORMS`."""
    parts: Mapping[str, str]
    """Module of the checkpoint -> its place in the class, empty for all of it."""
    reads: str
    """The layer of the class that reads the tokens."""
    writes: str
    """The layer that gives the outputs."""
    transposed: tuple[str, ...]
    """Layers that give y = x W."""

    @property
    def name(self) -> str:
        """The class."""
        return self.path.rpartition(".")[2]

    @cached_property
    def places(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        """What matches each part, the longest first, and its place in the class."""
        return tuple(
            (re.compile(re.escape(part).replace(r"\#", r"\d{1,4}") + r"(?=\.|$)"), place)
            for part, place in sorted(self.parts.items(), key=lambda pair: -len(pair[0]))
        )


def assembled(
    recipe: Recipe, names: Iterable[str], wrappers: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Prefix of every projector of that class -> its tensors with their names in the class.

    Several parts make one projector, but a numbered module makes one for each number. The prefix
    is the module, or what stands in front of several.
    """
    found: dict[str, dict[str, str]] = {}
    root = next((part for part, place in recipe.parts.items() if not place), "")
    for name in names:
        start = 0
        while True:
            fits = ((p.match(name, start), place) for p, place in recipe.places)
            match, place = next(((m, place) for m, place in fits if m), (None, ""))
            if match is not None:
                prefix = name[:start] + (match[0] if "#" in root else root)
                pieces = (place, name[match.end() :].strip("."))
                local = ".".join(piece for piece in pieces if piece)
                found.setdefault(prefix.rstrip("."), {})[name] = local
                break
            wrapper = next((w for w in wrappers if name.startswith(w, start)), "")
            if not wrapper:
                break
            start += len(wrapper)
    return found


@dataclass(frozen=True)
class Blueprint:
    """All that a module is built from and checked against: plain values, nothing built yet."""

    recipe: Recipe
    config: Mapping[str, Any]
    prefix: str
    parameters: Mapping[str, str]
    """Role with its leaf (`linear.weight`) -> the parameter's name in the class."""
    shapes: Mapping[str, tuple[int, ...]]
    """Parameter -> shape, as the checkpoint has it."""

    @property
    def number(self) -> int:
        """The last number of the prefix, of a module that there are several of."""
        return int(([0, *re.findall(r"\d+", self.prefix)])[-1])


def settings(blueprint: Blueprint) -> dict[str, Any]:
    """The keys of the config that the class depends on, each a plain value within bounds.

    Nothing else of a config.json reaches transformers. Raises UnsupportedError
    (`unsupported.module`) for a value that is no number, name or short list of numbers, that is
    larger than any in use, or that asks for more layers than the checkpoint has tensors.
    """
    kept: dict[str, Any] = {}
    for part, keys in blueprint.recipe.keys.items():
        given = blueprint.config.get(part) if part else blueprint.config
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise refused(blueprint.recipe, f"{part} of its config is no object")
        into = kept.setdefault(part, {}) if part else kept
        for key in keys:
            if given.get(key) is not None:
                into[key] = _bounded(given[key], key, blueprint)
    return kept


def _bounded(value: object, key: str, blueprint: Blueprint) -> object:
    most = len(blueprint.shapes) if _DEEP.search(key) else LARGEST
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and 0 <= value <= most:
        return value
    if isinstance(value, float) and math.isfinite(value) and abs(value) <= LARGEST:
        return value
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    if isinstance(value, list) and len(value) <= 64:
        return [_bounded(item, key, blueprint) for item in value]
    counts = isinstance(value, dict) and all(re.fullmatch(r"\d{1,6}", k) for k in value)
    if isinstance(value, dict) and counts and len(value) <= 64:
        return {k: _bounded(item, key, blueprint) for k, item in value.items()}
    raise refused(blueprint.recipe, f"its config has no usable {key}: {clean(repr(value), 60)}")


def refused(recipe: Recipe, why: str) -> UnsupportedError:
    """The error of a module that is not run."""
    return UnsupportedError(f"transformers' {recipe.name} was not run: {why}", "module")
