"""Why a checkpoint's projector is where it was found, and what was nearly taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from projaudit.errors import FormatError
from projaudit.family import Family, classes_of, families, modules, undeclared
from projaudit.inert import clean
from projaudit.locating import locate
from projaudit.matching import match
from projaudit.position import deciding_words, text_widths
from projaudit.projector import Projector


@dataclass(frozen=True)
class Explanation:
    """What was located, and why; untrusted names are made inert."""

    found: tuple[tuple[Projector, str], ...]
    """Every projector with the reason why it is one."""
    near: tuple[tuple[str, str], ...]
    """Modules and tensors that were not taken, with the reason."""
    base: str = ""
    """The base whose projectors they are, where the target is an adapter of it."""


def explain(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None = None
) -> Explanation:
    """The projectors that `locate` finds, with why, and what resembles one and was not taken.

    Raises what `locate` raises.
    """
    projectors = locate(shapes, config)
    return Explanation(
        tuple((projector, _why(projector, shapes, config or {})) for projector in projectors),
        tuple(_near(projectors, shapes, config or {})),
    )


def _why(
    projector: Projector, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
) -> str:
    family = next((f for f in families() if f.name == projector.family), None)
    if family is not None:
        named = [a for a in classes_of(config) if a in family.architectures]
        said = f"and {named[0]} is one of its architectures" if named else "and all of it is told"
        if other := undeclared(projector, config):
            said = f"but not the class, {clean(other, 80)}: what that computes is not known"
        return f"its names and shapes are those of the family, {said}"
    words = sorted(set(deciding_words(projector.tensors, shapes, projector=True).values()))
    if words:
        return f"the word {', '.join(clean(word) for word in words[:3])} in its names"
    widths = sorted(text_widths(shapes, config))
    if widths:
        width = projector.out_features if projector.out_features in widths else widths[0]
        return f"it leads into the language model's width, {width}, and is part of no stack"
    return "the file holds no other model"


def _near(
    projectors: Sequence[Projector],
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
) -> Iterator[tuple[str, str]]:
    taken = {name for projector in projectors for name in projector.tensors}
    settled = {projector.prefix for projector in projectors if projector.family != "unknown"}
    declared = set(classes_of(config))
    for family in families():
        if family.recipe is not None:
            continue  # of its class or not: its architecture says so
        if family.scattered and declared.isdisjoint(family.architectures):
            continue  # its modules hold other things, so that they are there says nothing
        for module, names in modules(family, shapes).items():
            if module not in settled:
                why = _mismatch(family, module, names, shapes, config)
                yield clean(module), f"is not of the family {family.name}: {why}"
    widths = text_widths(shapes, config)
    for name, word in deciding_words(shapes, shapes, projector=False).items():
        if name not in taken and len(shapes[name]) == 2 and shapes[name][0] in widths:
            yield clean(name), f"{clean(word)} in its name says that it is something else"


def _mismatch(
    family: Family,
    module: str,
    names: list[str],
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
) -> str:
    try:
        projector = match(family, module, names, shapes, config)
    except FormatError as error:
        return error.message
    if projector is None:
        return "its layers or norms are others, or packed"
    if projector.unexpected:
        return f"it holds {clean(projector.unexpected[0])} too"
    return "its architecture is another's"
