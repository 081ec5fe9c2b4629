"""Where the projectors are in a checkpoint: by family, by class, by position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import takewhile
from typing import Any

from projaudit.errors import FormatError
from projaudit.family import Family, classes_of, families, fits, likely, modules
from projaudit.matching import match, saved_empty
from projaudit.position import module_of, positioned, text_widths
from projaudit.projector import PACKED, WRAPPERS, Linear, Projector
from projaudit.recipe import Recipe, assembled


def locate(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None = None
) -> tuple[Projector, ...]:
    """The projectors among tensors of these names and shapes; empty if there is none.

    By family; and what no family describes, by its position between two models, as `family`
    `unknown` (`position.py`). `config` is the parsed config.json: it decides between families of
    the same names, and gives the activation and the language model's width. Where its classes
    (`classes_of`) are none that the family lists, the forward path is not known. Raises FormatError
    where a projector is incomplete or its layers do not chain.
    """
    _check_config(config or {})
    architectures = set(classes_of(config or {}))
    known = sorted(families(), key=lambda f: not architectures & set(f.architectures))
    found: dict[str, Projector] = {}
    candidates = likely(shapes)
    taken: set[str] = set()
    for family in known:
        if family.recipe is not None:
            if architectures & set(family.architectures):
                for built in _of_class(family, family.recipe, candidates, shapes):
                    found[_key(found, built)] = built
                    taken |= set(built.tensors)
            continue
        for module, names in modules(family, candidates).items():
            declared = bool(architectures & set(family.architectures))
            try:
                projector = match(family, module, names, shapes, config or {})
            except FormatError:
                if declared:
                    raise
                continue  # another family's, that happens to use these names
            if projector is None or (
                not declared and (projector.unexpected or not fits(family, projector, config or {}))
            ):
                continue
            if not declared and architectures:
                projector = replace(projector, chain=())  # what that class computes is not known
            if taken.isdisjoint(projector.tensors):
                found[_key(found, projector)] = projector
                taken |= {*projector.tensors, *projector.unexpected}
    for group in positioned(shapes, config):
        rest = [name for name in group if name not in taken]
        if rest:
            projector = _unknown(rest, shapes, text_widths(shapes, config or {}))
            found[_key(found, projector)] = projector
    # Those whose function is known come first: what runs the model runs one.
    kinds = {m: (not p.chain, p.recipe is None, m) for m, p in found.items()}
    return tuple(found[module] for module in sorted(found, key=lambda m: kinds[m]))


def _of_class(
    family: Family, recipe: Recipe, names: Iterable[str], shapes: Mapping[str, Sequence[int]]
) -> Iterator[Projector]:
    """Every projector that is of the family's class; what is packed is left to its position."""
    for prefix, local in assembled(recipe, names, WRAPPERS).items():
        if any(map(PACKED.search, local)):
            continue
        roles = {name: (module_of(place), place) for name, place in local.items()}
        linears, vectors = _layers(roles, shapes)
        linears = [
            replace(layer, shape=layer.shape[::-1], layout="transposed")
            if layer.role in recipe.transposed
            else layer
            for layer in linears
        ]
        ends = {recipe.reads: -1, recipe.writes: 1}
        ordered = sorted(linears, key=lambda layer: ends.get(layer.role, 0))
        if linears:
            yield Projector(
                family=family.name,
                kind=recipe.name,
                prefix=prefix,
                linears=tuple(ordered),
                vectors=vectors,
                chain=(),
                recipe=recipe,
            )


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises FormatError where a key that is read here has a type that no loader accepts."""
    wanted: dict[str, type] = {
        "architectures": list,
        "model_type": str,
        "vision_config": dict,
        "text_config": dict,
    }
    for key, kind in wanted.items():
        if not isinstance(config.get(key), (kind, type(None))):
            raise FormatError("has a value of the wrong type", "config", field=key)


def _key(found: Mapping[str, Projector], projector: Projector) -> str:
    return projector.linears[0].weight if projector.prefix in found else projector.prefix


def _unknown(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], widths: Set[int]
) -> Projector:
    """A projector of no family: every matrix a layer, its forward path not known.

    First comes a matrix that takes what none of the others gives, last one that gives a width of
    the language model.
    """
    packed = tuple(name for name in names if PACKED.search(name))
    prefix = _common([module_of(name) for name in names])
    roles = {name: (_local(module_of(name), prefix), _local(name, prefix)) for name in names}
    linears, vectors = _layers(roles, shapes, empty=bool(packed))
    given = {layer.shape[0] for layer in linears}
    first = [layer for layer in linears if layer.shape[1] not in given][:1]
    last = [layer for layer in linears if layer.shape[0] in widths and layer not in first][-1:]
    ordered = [*first, *(layer for layer in linears if layer not in first + last), *last]
    return Projector(
        family="unknown",
        kind="linear" if len(linears) == 1 else f"{len(linears)} matrices",
        prefix=prefix,
        linears=tuple(ordered),
        vectors=vectors,
        chain=(),
        packed=packed,
    )


def _layers(
    roles: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, Sequence[int]],
    *,
    empty: bool = False,
) -> tuple[list[Linear], dict[str, str]]:
    """Every matrix of these tensors as a layer, and the others by role: name -> as which of both.

    A convolution (out, in, …) is the matrix (out, in·…), and queries (1, n, d) are (n, d). Raises
    FormatError where a tensor is saved empty, unless they may be.
    """
    linears, taken = [], set()
    for name, (role, _) in roles.items():
        rows = [size for i, size in enumerate(shapes[name]) if size != 1 or i == 1]
        if 0 in rows and not empty:
            raise saved_empty(name, shapes[name])
        if len(rows) < 2:
            continue
        bias = f"{module_of(name)}.bias"
        fits = bias in roles and name != bias and tuple(shapes[bias]) == (rows[0],)
        linears.append(Linear(role, name, bias if fits else None, (rows[0], math.prod(rows[1:]))))
        taken |= {name, bias} if fits else {name}
    return linears, {role: name for name, (_, role) in roles.items() if name not in taken}


def _common(paths: Sequence[str]) -> str:
    """The module that holds all of these; empty where they stand in several."""
    parts = [path.split(".") for path in paths]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return ".".join(column[0] for column in shared)


def _local(path: str, prefix: str) -> str:
    """A path within its projector; the last word of the projector's own where it is that."""
    return path.removeprefix(prefix).strip(".") or prefix.rpartition(".")[2]
