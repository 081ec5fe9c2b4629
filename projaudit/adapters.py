"""Adapters: which of their tensors change a projector, and the weights that peft would merge."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from projaudit.checkpoint import Stored, Weight, load_tensors
from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.inert import clean
from projaudit.projector import Projector
from projaudit.readings import parameter
from projaudit.safetensors_header import TensorInfo, read_header
from projaudit.source import Source
from projaudit.strict import load_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 8192
"""Rank of one module's factors; no honest adapter has a tenth of it."""
MAX_PATTERNS = 20_000
"""Keys of a rank_pattern or alpha_pattern."""
_KEY = 200  # characters of a tensor's name or a pattern

Factors = tuple["Tensor", "Tensor"]
"""(out × r, r × in), fp32, whose product is ΔW."""

_METHODS: Mapping[str, frozenset[str]] = {
    "LORA": frozenset({"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"}),
    "ADALORA": frozenset({"lora_A", "lora_B", "lora_E"}),
    "LOHA": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "LOKR": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    "IA3": frozenset({"ia3_l"}),
}
"""What peft 0.21 calls the tensors of a linear layer, by the method of adapter_config.json."""

# Options of LoRA with which the merged weights are others than W + s·B·A, or there are none.
_OTHER_LORA = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config",
    "monteclora_config", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")  # the others rewrite the base's weights at load
_PEFT = "base_model.model."
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", _PEFT)
_TIED = ("lm_head", "embed_tokens")  # which the base's files may leave out
# Keys of rank_pattern are regular expressions; these do not backtrack, with one star at most.
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_ATOM = r"(?:[\w-]|\.|\\[.dw]|\[[\w-]+\])[*+?]?|\((?:\?:)?[\w\\.|-]+\)|[\^$]"
_TAME = re.compile(rf"(?:{_ATOM})+", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its repository describes it; nothing loaded yet."""

    source: Source
    method: str
    """`peft_type` of its config: `LORA`, `LOKR`, …"""
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo] = field(repr=False)


@dataclass(frozen=True)
class Part:
    """What an adapter does to one weight matrix of a projector, and the bias beside it."""

    method: str
    weight: str
    """Tensor of the base that it changes."""
    bias: str | None
    """Tensor of the base that stands beside that; None where there is none."""
    leaves: Mapping[str, TensorInfo]
    """The adapter's tensors by what peft calls them: `lora_A.weight`, …"""
    scale: float = 1.0
    bare: bool = False
    """Of `target_parameters`, where peft rounds ΔW to the base's dtype first."""


@dataclass(frozen=True)
class Fit:
    """What an adapter changes in the projectors of a base, and how much elsewhere."""

    adapter: Adapter
    parts: tuple[Part, ...]
    saved: Mapping[str, TensorInfo]
    """Tensor of the base -> the one of the adapter that takes its place (`modules_to_save`)."""
    elsewhere: tuple[str, ...]
    """Its other tensors."""

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


def read_adapter(source: Source) -> Adapter | None:
    """The adapter of a repository, None where it brings none that is read here.

    Reads adapter_config.json and the header of adapter_model.safetensors, which peft takes before
    adapter_model.bin. Raises FormatError (`format.adapter`) for a config that contradicts itself or
    is none, and what reading the header raises.
    """
    if CONFIG not in source.files or WEIGHTS not in source.files:
        # The place for a reader of pickles: `tensors` of adapter_model.bin by name.
        return None
    config = load_json(source.read_small(CONFIG, 10 << 20), file=CONFIG, kind="adapter")
    if not isinstance(config, dict):
        raise _wrong("is no JSON object")
    method = config.get("peft_type")
    if not isinstance(method, str) or not method:
        raise _wrong("names no method", "peft_type")
    _check_types(config)
    return Adapter(source, method.upper(), config, read_header(source, WEIGHTS).tensors)


def not_read(source: Source) -> UnsupportedError:
    """Why the adapter of a repository is not read."""
    stored = [path for path in source.files if path.startswith("adapter_model")]
    config = "" if CONFIG in source.files else f" and no {CONFIG}"
    return UnsupportedError(
        f"holds {clean(stored[0], 80) if stored else CONFIG}, no {WEIGHTS}{config}"
        if WEIGHTS not in stored
        else f"holds {WEIGHTS}{config}",
        "adapter",
        file=clean(source.name),
        remedy="load it with peft and save it as safetensors; projaudit never unpickles",
    )


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
        raise _not_merged(adapter, "xlora", "mixes other adapters")
    known = _known(shapes)
    ours = {_canonical(name): name for projector in projectors for name in projector.tensors}
    areas = _areas(projectors)
    leaves: dict[str, dict[str, str]] = defaultdict(dict)  # module -> leaf -> key
    paths: dict[str, str] = {}
    saved: dict[str, str] = {}
    based: set[str] = set()
    elsewhere: list[str] = []
    for key in adapter.tensors:
        if len(key) > _KEY:
            raise FormatError(f"{len(key)} characters in a name", "adapter", file=WEIGHTS)
        bare, in_base_layer, idle = _stripped(key)
        module, path, leaf = _place(bare, known)
        if idle or not _touches(module, areas) or _is_shared(adapter, key, module, bare):
            elsewhere.append(key)
            continue
        if adapter.method not in _METHODS:
            raise _not_merged(adapter, key, f"is of a {clean(adapter.method, 40)} adapter")
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
        if leaf not in _METHODS[adapter.method] or in_base_layer:
            raise _not_merged(adapter, key, "may change the projector")
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
        raise _not_merged(adapter, saved[name], "replaces what the adapter also adds to")
    for name, key in saved.items():
        if adapter.tensors[key].shape != shapes[name]:
            raise _unfit(key, adapter.tensors[key].shape, shapes[name])
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


def merged(weight: Tensor, part: Part, leaves: Mapping[str, Tensor]) -> Tensor:
    """The weight that peft's `merge_and_unload` leaves: W + ΔW, in W's shape and dtype.

    LoRA: W + s·B·A. DoRA: m · (W + s·B·A) / ‖W + s·B·A‖ by rows. AdaLoRA: ΔW = s·B·(A·E)/r. LoHa:
    ΔW = s·(w1a·w1b)∘(w2a·w2b). LoKr: ΔW = s·w1⊗w2. IA3: W·l. Factors in any float dtype; computed
    in float32, as peft loads them, and rounded at the end.
    """
    import torch

    found = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    wide = widened(weight)
    if part.method == "ia3":
        return (wide * found["ia3_l"]).to(weight.dtype)
    delta = _delta(part, found)
    total = wide + (delta.to(weight.dtype) if part.bare else delta)
    if part.method == "dora":
        norm = torch.linalg.vector_norm(total, dim=1)
        total = (found["lora_magnitude_vector"] / norm).view(-1, 1) * total
    return total.to(weight.dtype)


def merged_bias(bias: Tensor, part: Part, leaves: Mapping[str, Tensor]) -> Tensor:
    """The bias beside a merged weight, in its own dtype: b + s·b_B with `lora_bias`, IA3's b·l."""
    if "lora_B.bias" in leaves:
        return (widened(bias) + leaves["lora_B.bias"].float() * part.scale).to(bias.dtype)
    if part.method == "ia3" and leaves["ia3_l"].shape[1] == 1:
        return (widened(bias) * leaves["ia3_l"].float().view(-1)).to(bias.dtype)
    return bias


def factors_of(part: Part, leaves: Mapping[str, Tensor]) -> Factors | None:
    """(out × r, r × in) in fp32 with ΔW as their product; None where ΔW is no such product."""
    found = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    if part.method == "lora":
        return found["lora_B.weight"] * part.scale, found["lora_A.weight"]
    if part.method == "adalora":
        return found["lora_B"] * part.scale, found["lora_A"] * found["lora_E"]
    return None


def _delta(part: Part, found: Mapping[str, Tensor]) -> Tensor:
    import torch

    def product(stem: str) -> Tensor:
        return found[stem] if stem in found else found[f"{stem}_a"] @ found[f"{stem}_b"]

    if part.method in ("lora", "dora"):
        return found["lora_B.weight"] @ found["lora_A.weight"] * part.scale
    if part.method == "adalora":
        return found["lora_B"] @ (found["lora_A"] * found["lora_E"]) * part.scale
    if part.method == "loha":
        return product("hada_w1") * product("hada_w2") * part.scale
    return torch.kron(product("lokr_w1"), product("lokr_w2").contiguous()) * part.scale


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


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
        raise _not_merged(adapter, any_key, "adapts a module without a weight of its own")
    bare = weight == targeted
    shape = shapes[weight]
    if len(shape) != 2:
        raise _not_merged(adapter, any_key, f"adapts weights of shape {list(shape)}")
    leaves = {leaf: adapter.tensors[key] for leaf, key in keys.items()}
    method, scale = _METHOD_PARTS[adapter.method](adapter, path, leaves, shape)
    bias = None if bare else ours.get(f"{module}.bias")
    if bare and (method != "lora" or "lora_B.bias" in leaves):
        raise _not_merged(adapter, any_key, "adapts a bare parameter")
    if "lora_B.bias" in leaves and bias is None:
        raise _not_merged(adapter, keys["lora_B.bias"], "has a bias, and the base has none there")
    return Part(method, weight, bias, leaves, scale, bare)


def _targeted(adapter: Adapter, path: str, module: str, ours: Mapping[str, str]) -> str | None:
    """The parameter of a module that `target_parameters` names, by peft's rule: a dotted tail."""
    found = {
        ours[f"{module}.{leaf}"]
        for name in _texts(adapter.config, "target_parameters")
        for parent, _, leaf in [name.rpartition(".")]
        if f"{module}.{leaf}" in ours and _is_tail(_canonical(parent), _canonical(path))
    }
    return found.pop() if len(found) == 1 else None


def _is_tail(tail: str, path: str) -> bool:
    return path == tail or path.endswith(f".{tail}")


def _lora(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    config = adapter.config
    first = next(iter(leaves.values())).name
    for option in _OTHER_LORA:
        if config.get(option):
            raise _not_merged(adapter, first, f"is of LoRA with {option}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _PLAIN_INITS:
        raise _not_merged(adapter, first, f"was initialised by {clean(init, 40)}")
    _require(leaves, "lora_A.weight", "lora_B.weight")
    rank = _rank(config, path, "r", 8)
    alpha = _alpha(config, path, "lora_alpha", 8)
    out, into = shape
    _check_shape(leaves["lora_A.weight"], (rank, into))
    _check_shape(leaves["lora_B.weight"], (out, rank))
    if bool(config.get("lora_bias")) != ("lora_B.bias" in leaves):
        raise _wrong(f"contradicts the tensors of {clean(path)}", "lora_bias")
    if "lora_B.bias" in leaves:
        _check_shape(leaves["lora_B.bias"], (out,))
    dora = "lora_magnitude_vector" in leaves
    if bool(config.get("use_dora")) != dora:
        raise _wrong(f"contradicts the tensors of {clean(path)}", "use_dora")
    if dora:
        _check_shape(leaves["lora_magnitude_vector"], (out,))
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return "dora" if dora else "lora", scale


def _adalora(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    _require(leaves, "lora_A", "lora_B", "lora_E")
    rank = leaves["lora_A"].shape[0] if leaves["lora_A"].shape else 0
    first = _count(adapter.config, "init_r", 12)
    if not 0 < rank <= first:
        raise _wrong(f"is {first}, and {clean(path)} has rank {rank}", "init_r")
    out, into = shape
    _check_shape(leaves["lora_A"], (rank, into))
    _check_shape(leaves["lora_E"], (rank, 1))
    _check_shape(leaves["lora_B"], (out, rank))
    alpha = _number(adapter.config, "lora_alpha", 8)
    # Of the rank that it began with, as peft keeps it through pruning.
    return "adalora", (alpha if alpha > 0 else float(rank)) / (first + 1e-5)


def _loha(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    _require(leaves, *_METHODS["LOHA"])
    rank = _rank(adapter.config, path, "r", 8)
    out, into = shape
    for number in (1, 2):
        _check_shape(leaves[f"hada_w{number}_a"], (out, rank))
        _check_shape(leaves[f"hada_w{number}_b"], (rank, into))
    return "loha", _alpha(adapter.config, path, "alpha", 8) / rank


def _lokr(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    rank = _rank(adapter.config, path, "r", 8)
    sides = []
    for stem in ("lokr_w1", "lokr_w2"):
        pair = (f"{stem}_a", f"{stem}_b")
        if stem in leaves:
            if leaves.keys() & set(pair):
                raise _wrong(f"{clean(path)} has {stem} twice", file=WEIGHTS)
            side = leaves[stem].shape
        else:
            _require(leaves, *pair)
            first, second = (leaves[name].shape for name in pair)
            side = (first[0] if first else 0, second[-1] if second else 0)
            _check_shape(leaves[pair[0]], (side[0], rank))
            _check_shape(leaves[pair[1]], (rank, side[1]))
        if len(side) != 2:
            raise _unfit(f"{path}.{stem}", side, shape)
        sides.append(side)
    product = tuple(a * b for a, b in zip(*sides, strict=True))
    if product != shape:
        raise _unfit(f"{path}.lokr_w1", product, shape)
    return "lokr", _alpha(adapter.config, path, "alpha", 8) / rank


def _ia3(
    adapter: Adapter, path: str, leaves: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> tuple[str, float]:
    info = leaves["ia3_l"]
    if info.shape not in ((1, shape[1]), (shape[0], 1)):
        raise _unfit(info.name, info.shape, (1, shape[1]))
    return "ia3", 1.0


_METHOD_PARTS = {"LORA": _lora, "ADALORA": _adalora, "LOHA": _loha, "LOKR": _lokr, "IA3": _ia3}


def _require(leaves: Mapping[str, TensorInfo], *wanted: str) -> None:
    for leaf in wanted:
        if leaf not in leaves:
            there = clean(next(iter(leaves.values())).name)
            raise FormatError(f"has {there} and no {leaf} beside it", "adapter", file=WEIGHTS)


def _check_shape(info: TensorInfo, wanted: tuple[int, ...]) -> None:
    if info.shape != wanted:
        raise _unfit(info.name, info.shape, wanted)


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
    return adapter.method not in _METHODS and not key.startswith(_PEFT)


# --- the config -----------------------------------------------------------------------------------


def _check_types(config: Mapping[str, object]) -> None:
    """Raises FormatError where a key that is read here has a value that peft would not take."""
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(key), (bool, type(None))):
            raise _wrong("is neither true nor false", key)
    for key in ("r", "init_r"):
        _count(config, key, 8)
    for key in ("lora_alpha", "alpha"):
        _number(config, key, 8)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise _wrong("is no object", key)
        if len(patterns) > MAX_PATTERNS:
            raise LimitError(f"more than {MAX_PATTERNS} keys", "patterns", file=CONFIG, field=key)
    _texts(config, "target_parameters")
    if config.get("bias") not in (None, "none", "all", "lora_only", "boft_only"):
        raise _wrong("is none of none, all and lora_only", "bias")


def _count(config: Mapping[str, object], key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else _as_count(value, key)


def _as_count(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong("is no positive whole number", key)
    if value > MAX_RANK:
        raise LimitError(f"rank {value}, above {MAX_RANK}", "rank", file=CONFIG, field=key)
    return value


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key)
    return default if value is None else _as_number(value, key)


def _as_number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _wrong("is no number", key)
    return float(value)


def _texts(config: Mapping[str, object], key: str) -> list[str]:
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong("is no list of names", key)
    return value


def _rank(config: Mapping[str, object], path: str, key: str, default: int) -> int:
    found = _by_pattern(config, "rank_pattern", path)
    return _as_count(found[0], "rank_pattern") if found else _count(config, key, default)


def _alpha(config: Mapping[str, object], path: str, key: str, default: float) -> float:
    found = _by_pattern(config, "alpha_pattern", path)
    return _as_number(found[0], "alpha_pattern") if found else _number(config, key, default)


def _by_pattern(config: Mapping[str, object], key: str, path: str) -> tuple[object, ...]:
    """What the first key of a pattern that matches a module's path says; () where none does.

    As `peft.utils.other.get_pattern_key`. The path is that of the adapter's transformers, which
    may or may not have had `model.` in front: both have to give the same.
    """
    patterns = config.get(key) or {}
    assert isinstance(patterns, dict)
    if not patterns:
        return ()
    short = path.removeprefix("model.")
    answers = []
    for spelled in dict.fromkeys((path, short, f"model.{short}")):
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
    if len(pattern) > _KEY or stars[0] > 1 or stars[1] > 2 or not _TAME.fullmatch(pattern):
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
        raise _wrong(f"has the key {clean(repr(pattern), 80)}, which is no pattern", key) from None


# --- errors ---------------------------------------------------------------------------------------


def _wrong(message: str, key: str | None = None, file: str = CONFIG) -> FormatError:
    return FormatError(message, "adapter", file=file, field=key)


def _twice(key: str, other: TensorInfo) -> FormatError:
    return _wrong(f"{clean(key)} and {clean(other.name)} are of one module", file=WEIGHTS)


def _unfit(name: str, shape: Sequence[int], wanted: Sequence[int]) -> FormatError:
    says = f"has shape {list(shape)}, where {list(wanted)} fits"
    return FormatError(says, "adapter", file=WEIGHTS, field=clean(name))


def _not_merged(adapter: Adapter, key: str, says: str) -> UnsupportedError:
    return UnsupportedError(
        f"{clean(key)} {says}, which is not merged here",
        "adapter",
        file=clean(adapter.source.name),
        remedy="merge it into its base and check the result",
    )
