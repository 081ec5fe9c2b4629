"""Adapters: which of their tensors change a projector, and the projector with them merged in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.peft_config import MAX_NAME, Adapter, texts, wrong
from projaudit.peft_methods import (
    METHOD_PARTS,
    METHODS,
    Factors,
    Part,
    factors_of,
    merged,
    merged_bias,
    not_merged,
    unfit,
    widened,
)
from projaudit.projector import Projector
from projaudit.readings import parameter
from projaudit.safetensors_header import TensorInfo
from projaudit.weights import Stored, Weight, load_tensors

_PEFT = "base_model.model."
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", _PEFT)
_TIED = ("lm_head", "embed_tokens")  # which the base's files may leave out


@dataclass(frozen=True)
class Fit:
    """What an adapter changes in the projectors of a base, and how much elsewhere."""

    adapter: Adapter
    parts: tuple[Part, ...]
    saved: Mapping[str, TensorInfo]
    """Tensor of the base -> the one of the adapter that takes its place (`modules_to_save`)."""
    elsewhere: tuple[str, ...]
    """Its other tensors."""

    @property
    def files(self) -> tuple[str, ...]:
        """Those that hold what it changes, peft's first."""
        infos = [*self.saved.values(), *(i for part in self.parts for i in part.leaves.values())]
        return tuple(sorted({info.file for info in infos}))

    def changes(self, names: Iterable[str]) -> bool:
        """Whether it changes a tensor of these names."""
        changed = {*self.saved, *(part.weight for part in self.parts)}
        return not changed.isdisjoint(names)


@dataclass(frozen=True)
class Applied:
    """A projector's tensors with an adapter merged into them."""

    weights: Mapping[str, Weight]
    """By name; what was merged is in float32 at least, its parts those of the bytes before."""
    read: Sequence[tuple[str, Stored]] = ()
    """(tensor of the base, a tensor of the adapter that changes it)."""
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """Weight -> factors of what was added to it, where the adapter is of that form."""


def fit(
    adapter: Adapter, projectors: Sequence[Projector], shapes: Mapping[str, tuple[int, ...]]
) -> Fit:
    """What an adapter changes in those projectors, of a base with those tensors.

    The modules are found through the names of every generation of transformers. Raises
    UnsupportedError (`unsupported.adapter`) where it changes a projector in a way that is not
    merged here, or may change one under a name that the base does not have; FormatError
    (`format.adapter`) where its tensors do not fit the base or its own config.
    """
    if adapter.method == "XLORA":
        raise not_merged(adapter, "xlora", "mixes other adapters")
    known = _known(shapes)
    ours = {_canonical(name): name for projector in projectors for name in projector.tensors}
    areas = _areas(projectors)
    leaves: dict[str, dict[str, str]] = defaultdict(dict)  # module -> leaf -> key
    paths: dict[str, str] = {}
    saved: dict[str, str] = {}
    based: set[str] = set()
    elsewhere: list[str] = []
    for key in adapter.tensors:
        if len(key) > MAX_NAME:
            raise FormatError(f"{len(key)} characters in a name", "adapter", file=adapter.file)
        bare, in_base_layer, idle = _stripped(key)
        module, path, leaf = _place(bare, known)
        if idle or not _touches(module, areas) or _is_shared(adapter, key, module, bare):
            elsewhere.append(key)
            continue
        if adapter.method not in METHODS:
            raise not_merged(adapter, key, f"is of a {clean(adapter.method, 40)} adapter")
        if leaf == "" and module in ours:
            name = ours[module]
            if name in saved:
                raise _twice(key, adapter.tensors[saved[name]])
            saved[name] = key
            based |= {name} if in_base_layer else set()
            continue
        leaf = leaf.replace(".default", "", 1)
        if leaf == "lora_magnitude_vector.weight":  # in memory, and where that was saved as it is
            leaf = "lora_magnitude_vector"
        if leaf not in METHODS[adapter.method] or in_base_layer:
            raise not_merged(adapter, key, "may change the projector")
        if leaf in leaves[module]:
            raise _twice(key, adapter.tensors[leaves[module][leaf]])
        leaves[module][leaf] = key
        paths[module] = path
    parts = tuple(
        _part(adapter, paths[module], module, found, ours, shapes)
        for module, found in leaves.items()
    )
    adapted = {name for part in parts for name in (part.weight, part.bias) if name}
    for name in adapted & (saved.keys() - based):
        raise not_merged(adapter, saved[name], "replaces what the adapter also adds to")
    for name, key in saved.items():
        if adapter.tensors[key].shape != shapes[name]:
            raise unfit(adapter.tensors[key], adapter.tensors[key].shape, shapes[name])
    return Fit(
        adapter, parts, {n: adapter.tensors[key] for n, key in saved.items()}, tuple(elsewhere)
    )


def apply(fit: Fit, stored: Mapping[str, Weight]) -> Applied:
    """A projector's tensors, by name, with an adapter merged into those that it changes.

    Merged in float32 whatever the base is stored in: peft's merge rounds to the base's dtype,
    and an adapter that is not merged, as most are run, is not rounded.
    """
    parts = [part for part in fit.parts if part.weight in stored]
    saved = {name: info for name, info in fit.saved.items() if name in stored}
    infos = [*saved.values(), *(info for part in parts for info in part.leaves.values())]
    loaded = load_tensors(fit.adapter.source, infos)
    weights = {name: Weight(w.parts, widened(w.tensor)) for name, w in stored.items()}
    read = [(name, loaded[info.name]) for name, info in saved.items()]
    for name, info in saved.items():
        weights[name] = Weight(stored[name].parts, widened(loaded[info.name].tensor))
    factors: dict[str, Factors] = {}
    for part in parts:
        leaves = {leaf: loaded[info.name].tensor for leaf, info in part.leaves.items()}
        weight = weights[part.weight]
        weights[part.weight] = Weight(weight.parts, merged(weight.tensor, part, leaves))
        if part.bias is not None:
            bias = weights[part.bias]
            weights[part.bias] = Weight(bias.parts, merged_bias(bias.tensor, part, leaves))
        read += [(part.weight, loaded[info.name]) for info in part.leaves.values()]
        found = factors_of(part, leaves)
        if found is not None and part.weight not in saved:
            factors[part.weight] = found
    return Applied(weights, read, factors)


# --- one module -----------------------------------------------------------------------------------


def _part(
    adapter: Adapter,
    path: str,
    module: str,
    keys: Mapping[str, str],
    ours: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Part:
    """The part of one module, checked against the base's shapes and the adapter's config."""
    any_key = next(iter(keys.values()))
    targeted = _targeted(adapter, path, module, ours)
    weight = ours.get(f"{module}.weight", targeted)
    if weight is None:
        raise not_merged(adapter, any_key, "adapts a module without a weight of its own")
    bare = weight == targeted
    shape = shapes[weight]
    if len(shape) != 2:
        raise not_merged(adapter, any_key, f"adapts weights of shape {list(shape)}")
    leaves = {leaf: adapter.tensors[key] for leaf, key in keys.items()}
    method, scale = METHOD_PARTS[adapter.method](adapter, path, leaves, shape)
    bias = None if bare else ours.get(f"{module}.bias")
    if bare and (method != "lora" or "lora_B.bias" in leaves):
        raise not_merged(adapter, any_key, "adapts a bare parameter")
    if "lora_B.bias" in leaves and bias is None:
        raise not_merged(adapter, keys["lora_B.bias"], "has a bias, and the base has none there")
    return Part(method, weight, bias, leaves, scale, bare)


def _targeted(adapter: Adapter, path: str, module: str, ours: Mapping[str, str]) -> str | None:
    """The parameter of a module that `target_parameters` names, by peft's rule: a dotted tail."""
    found = {
        ours[f"{module}.{leaf}"]
        for name in texts(adapter.config, "target_parameters")
        for parent, _, leaf in [name.rpartition(".")]
        if f"{module}.{leaf}" in ours and _is_tail(_canonical(parent), _canonical(path))
    }
    return found.pop() if len(found) == 1 else None


def _is_tail(tail: str, path: str) -> bool:
    return path == tail or path.endswith(f".{tail}")


# --- names ----------------------------------------------------------------------------------------


def _canonical(path: str) -> str:
    """A path of a module or tensor, the same for all generations of transformers."""
    while wrapper := next((w for w in _WRAPPERS if path.startswith(w)), ""):
        path = path[len(wrapper) :]
    path = parameter(f"{path}.")  # whose renames want the dot behind a module
    for prefix in ("thinker.", "language_model."):
        path = path.removeprefix(prefix)
    return path.rstrip(".")


def _known(names: Iterable[str]) -> set[str]:
    """Every module and tensor of the base."""
    known = {""}
    for name in names:
        path = _canonical(name)
        while path not in known:
            known.add(path)
            path = path.rpartition(".")[0]
    return known


def _areas(projectors: Sequence[Projector]) -> set[str]:
    """The modules and tensors that are the projectors."""
    areas = {_canonical(p.prefix) for p in projectors if p.prefix}
    for projector in projectors:
        for name in (*projector.tensors, *projector.unexpected, *projector.packed):
            areas |= {_canonical(name), _canonical(name.removesuffix(".weight"))}
    return areas - {""}


def _touches(module: str, areas: Iterable[str]) -> bool:
    """Whether a module is in one of the areas, or holds one."""
    return not module or any(
        module == area or module.startswith(f"{area}.") or area.startswith(f"{module}.")
        for area in areas
    )


def _stripped(key: str) -> tuple[str, bool, bool]:
    """(key without what peft's wrappers put in, it is the base layer's own, it does nothing)."""
    parts = key.removeprefix(_PEFT).split(".")
    idle = "original_module" in parts  # peft's copy of the base, which `modules_to_save` replaces
    in_base_layer = "base_layer" in parts
    kept = [p for p in parts if p not in ("base_layer", "original_module")]
    if "modules_to_save" in kept:
        at = kept.index("modules_to_save")
        kept = kept[:at] + kept[at + (2 if kept[at + 1 : at + 2] == ["default"] else 1) :]
    return ".".join(kept), in_base_layer, idle


def _place(key: str, known: set[str]) -> tuple[str, str, str]:
    """(canonical module, its path in the key, rest): the deepest one that the base has."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        path = ".".join(parts[:end])
        module = _canonical(path)
        if module in known:
            return module, path, ".".join(parts[end:])
    return "", "", key


def _is_shared(adapter: Adapter, key: str, module: str, bare: str) -> bool:
    """Whether a tensor without a module in the base is one that cannot be a projector's."""
    if module:
        return False
    if _canonical(bare).split(".")[0] in _TIED:
        return True
    # Of methods that learn prompts, or share matrices between the modules that they adapt.
    return adapter.method not in METHODS and not key.startswith(_PEFT)


def _twice(key: str, other: TensorInfo) -> FormatError:
    return wrong(f"{clean(key)} and {clean(other.name)} are of one module", file=other.file)
