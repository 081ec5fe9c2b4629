"""Where a projector is in a model that transformers built: its tensors, its way in and out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from projaudit.behaviour.reasons import CouldNotProbe


@dataclass(frozen=True)
class Place:
    """The modules of a projector."""

    home: nn.Module
    """The smallest that holds all of its tensors: the projector itself, or the whole model."""
    names: Mapping[str, str]
    """Name on disk -> name in `home`."""
    entry: nn.Module
    """What is handed the features of an image."""
    exit: nn.Module
    """What gives the tokens of the language model."""
    path: str
    """Of `home` in the model."""
    beside: tuple[nn.Module, ...] = ()
    """What is handed the features of the other projectors in `home`."""


def together(model: Any, main: Place, others: Sequence[tuple[Place, bool]]) -> Place:
    """One place of several projectors, in the model as a whole; its way in and out are the main's.

    Of each other one, whether features of images go into it.
    """
    if not others:
        return main
    names = {
        disk: f"{place.path}.{name}".strip(".")
        for place in (main, *(place for place, _ in others))
        for disk, name in place.names.items()
    }
    beside = tuple(place.entry for place, seen in others if seen)
    return Place(model, names, main.entry, main.exit, "", beside)


def find_place(
    model: Any, tensors: Iterable[str], prefix: str, entry: str, first: str, last: str
) -> Place:
    """Where the tensors of those names on disk are, of those that stand under `prefix`.

    `entry` is the module on disk that the features go into, where the projector's own holds other
    things; `first` and `last` are the weights of the layers that read features and give outputs.
    Raises CouldNotProbe where transformers builds no module with such tensors.
    """
    inside = [name for name in tensors if not in_module(name, prefix).startswith("..")]
    memory = names_in(model, inside)
    state: Mapping[str, Tensor] = model.state_dict()
    for disk, name in memory.items():
        if name not in state:
            word = prefix.rpartition(".")[2] or "projector"
            raise CouldNotProbe(f"transformers builds no module {word} with a tensor {disk}")
    home = _home(memory, prefix)
    whole = {name for name in state if name.startswith(f"{home}.")} if home else {*state}
    start = end = home
    if whole != {*memory.values()}:
        inner = {disk: n for disk, n in memory.items() if disk.startswith(f"{entry}.")}
        start = _home(inner, entry) if inner else home
        start = _parent(memory[first]) if start == home else start
        end = _parent(memory[last])
    cut = len(home) + 1 if home else 0
    return Place(
        model.get_submodule(home),
        {disk: name[cut:] for disk, name in memory.items()},
        model.get_submodule(start),
        model.get_submodule(end),
        home,
    )


def in_module(name: str, prefix: str) -> str:
    """A tensor's name in the projector's module, of its name on disk; `..` first where it is in
    none."""
    if not prefix:
        return name
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else f"..{name}"


def names_in(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Name on disk -> the name that transformers loads it into, by the renames of its classes.

    Raises CouldNotProbe where it makes that of several tensors, or turns it into another.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renames = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    state, base = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for name in names:
        found[name], converted = rename_source_key(name, renames, converters, base, state)
        if converted is not None:
            raise CouldNotProbe(f"transformers makes another tensor of {name}")
    return found


def _home(memory: Mapping[str, str], path: str) -> str:
    """The module in memory of that path on disk, by the tensors below it."""
    starts: set[str | None] = set()
    for disk, name in memory.items():
        inside = in_module(disk, path)
        ends = f".{name}".endswith(f".{inside}")
        starts.add(name[: len(name) - len(inside)].rstrip(".") if ends else None)
    if len(starts) == 1 and (start := starts.pop()) is not None:
        return start
    parts = [_parent(name).split(".") for name in memory.values()]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
