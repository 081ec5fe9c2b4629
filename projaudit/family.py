"""Families of projectors as data, and which classes of models they are of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from projaudit.chain import EPS, parse
from projaudit.errors import FormatError
from projaudit.projector import WRAPPERS, Layout, Projector
from projaudit.recipe import Recipe


@dataclass(frozen=True)
class Family:
    """One entry of families.yaml; the file's head says what each key means."""

    name: str
    architectures: tuple[str, ...]
    modules: tuple[str, ...]
    scattered: bool
    """Whether its modules hold other things too."""
    linears: Mapping[str, tuple[str, ...]]
    matrices: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, tuple[str, ...]]
    vectors: Mapping[str, tuple[str, ...]]
    layouts: Mapping[str, Layout]
    optional: frozenset[str]
    """Roles that may be absent."""
    any_depth: bool
    """Whether the last of its layers may be absent."""
    chain: tuple[str, ...]
    act_keys: tuple[str, ...]
    act_default: str
    eps_key: str
    eps_default: float
    width_key: str
    """Config key of the language model's width."""
    source: str
    recipe: Recipe | None = None
    """The class of transformers that it is, where no chain describes it."""

    @cached_property
    def places(self) -> tuple[re.Pattern[str], ...]:
        """What matches a module's path and the dot behind it."""
        return tuple(
            re.compile("".join(r"\d{1,4}" if part == "#" else re.escape(part) for part in parts))
            for parts in (re.split("(#)", f"{module}.") for module in self.modules)
        )

    @cached_property
    def words(self) -> frozenset[str]:
        """Of each module the longest part of its path: few other tensors hold it."""
        return frozenset(max(reversed(m.split(".")), key=len) for m in self.modules)


@cache
def families() -> tuple[Family, ...]:
    """The families of families.yaml, in file order (the first that matches wins)."""
    import yaml

    entries = yaml.safe_load((Path(__file__).parent / "families.yaml").read_text("utf-8"))
    return tuple(_family(entry) for entry in entries or ())


def _family(entry: dict[str, Any]) -> Family:
    def names(key: str) -> dict[str, tuple[str, ...]]:
        return {role: tuple(found) for role, found in entry.get(key, {}).items()}

    act, eps = entry.get("act", {}), entry.get("eps", {})
    recipe = _recipe(entry["module"]) if "module" in entry else None
    return Family(
        name=entry["name"],
        architectures=tuple(entry["architectures"]),
        modules=tuple(entry["modules"] if recipe is None else recipe.parts),
        scattered=entry.get("scattered", False),
        linears=names("linears"),
        matrices=names("matrices"),
        norms=names("norms"),
        vectors=names("vectors"),
        layouts=entry.get("layouts", {}),
        optional=frozenset(entry.get("optional", ())),
        any_depth=entry.get("depth") == "any",
        chain=tuple(entry.get("chain", ())),
        act_keys=tuple(act.get("keys", ())),
        act_default=act.get("default", "linear"),
        eps_key=eps.get("key", ""),
        eps_default=eps.get("default", EPS),
        width_key=entry.get("width", ""),
        source=entry["source"],
        recipe=recipe,
    )


def _recipe(entry: dict[str, Any]) -> Recipe:
    return Recipe(
        path=entry["class"],
        config=entry["config"],
        keys={part: tuple(keys) for part, keys in entry["keys"].items()},
        args=tuple(entry.get("args", (".",))),
        form=entry["form"],
        parts=entry["parts"],
        reads=entry["reads"],
        writes=entry["writes"],
        transposed=tuple(entry.get("transposed", ())),
    )


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config names, or stand for its model type; that type where it is unknown.

    Untrusted text. Empty where it names neither.
    """
    named = strings(config.get("architectures"))
    kind = config.get("model_type")
    if named or not isinstance(kind, str) or not kind:
        return named
    return list(_model_types().get(kind, (kind,)))


@cache
def _model_types() -> Mapping[str, tuple[str, ...]]:
    import yaml

    file = Path(__file__).parent / "model_types.yaml"
    return {kind: tuple(names) for kind, names in yaml.safe_load(file.read_text("utf-8")).items()}


def undeclared(projector: Projector, config: Mapping[str, Any]) -> str:
    """The class of the config that the projector's family does not list; empty where it lists one.

    Untrusted text. Empty, too, where the config names no class or the family is not known.
    """
    named = classes_of(config)
    family = next((f for f in families() if f.name == projector.family), None)
    return named[0] if family and named and set(named).isdisjoint(family.architectures) else ""


def likely(names: Iterable[str]) -> list[str]:
    """The names that hold a word of any family."""
    words = frozenset[str]().union(*(family.words for family in families()))
    return [name for name in names if not words.isdisjoint(name.split("."))]


def modules(family: Family, names: Iterable[str]) -> dict[str, list[str]]:
    """Module path -> tensors below it, for every place where the family's module may stand.

    `names` may be those that `likely` leaves.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if family.words.isdisjoint(name.split(".")):
            continue
        start = 0
        while True:
            place = next((m for p in family.places if (m := p.match(name, start))), None)
            if place is not None:
                found.setdefault(name[: place.end() - 1], []).append(name)
                break
            wrapper = next((w for w in WRAPPERS if name.startswith(w, start)), "")
            if not wrapper:
                break
            start += len(wrapper)
    return found


def fits(family: Family, projector: Projector, config: Mapping[str, Any]) -> bool:
    """Whether it gives the width of the config's language model, where the config says one."""
    width = _get(config, family.width_key) if family.width_key else None
    return not isinstance(width, int) or width == projector.out_features


def chain_of(family: Family, roles: Set[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The forward path of the layers that are there, with the config's activation."""
    act = family.act_default
    for key in family.act_keys:
        value = _get(config, key)
        if value is not None and not isinstance(value, str):
            raise FormatError("is no name of an activation", "config", field=key)
        act = value or act
    steps: list[str] = []
    for text in family.chain:
        step = parse(text)
        if all(role in roles for role in step.roles):
            steps.append(text.replace("$act", act))
        elif not family.optional.issuperset(step.roles):
            break  # the layer is absent, and so is the activation in front of it
    while steps and parse(steps[-1]).kind == "act" and not family.chain[-1].startswith("act:"):
        steps.pop()
    return tuple(steps)


def eps_of(family: Family, config: Mapping[str, Any]) -> float:
    """Epsilon of its norms by the config, else as the family has it."""
    value = _get(config, family.eps_key) if family.eps_key else None
    if value is None:
        return family.eps_default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise FormatError("is no epsilon of a norm", "config", field=family.eps_key)
    return float(value)


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def strings(value: object) -> list[str]:
    """The strings of a list; none where it is none."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
