"""Where the projector is in a checkpoint, and what it computes: families as data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from projaudit.chain import EPS, linear_roles, parse
from projaudit.errors import FormatError, UnsupportedError
from projaudit.inert import clean
from projaudit.position import module_of, positioned, text_widths
from projaudit.recipe import Blueprint, Recipe, assembled

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["plain", "transposed", "unfold"]
"""How a linear layer's tensor lies: (out, in); (in, out); columns channel by channel."""

# What stands in front of any family's module: base models of transformers' generations, models
# within models, wrappers of training frameworks (DDP, compile, FSDP, PEFT).
_WRAPPERS = (
    "model.",
    "module.",
    "thinker.",
    "vlm.",
    "base_model.model.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
)
# Leaves of adapters as peft writes them, and of packed weights as quantisers do.
_ADAPTER = re.compile(
    r"\.lora_[A-Z]\b|\.lora_magnitude|\.(hada|lokr)_w|\.(ia3_l|hra_u|vera_lambda)"
)
_PACKED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|qweight|qzeros|scales"
    r"|g_idx|weight_scale_inv|weight_scale|input_scale|output_scale|weight_packed|weight_shape"
    r"|weight_global_scale|input_global_scale|weight_zero_point|weight_g_idx|W_q|codes|codebooks"
    r"|_data|_scale|biases)$|\.quant_state\.|" + _ADAPTER.pattern
)


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


@dataclass(frozen=True)
class Linear:
    """A linear layer y = x Wᵀ + b of a projector, by tensor names."""

    role: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    """(out, in), whatever the layout."""
    layout: Layout = "plain"
    groups: int = 1
    """Of an unfolded one: how many tokens its columns are of."""

    def matrix(self, stored: Tensor) -> Tensor:
        """W (out × in) of its tensor as stored; the columns token by token."""
        if self.layout == "transposed":
            return stored.T
        if self.layout == "unfold":
            parts = stored.reshape(self.shape[0], -1, self.groups)
            return parts.transpose(1, 2).reshape(self.shape)
        return stored.reshape(self.shape)

    def stored(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """W (out × in) as a tensor of `shape` holds it: the inverse of `matrix`."""
        if self.layout == "transposed":
            return matrix.T
        if self.layout == "unfold":
            matrix = matrix.reshape(self.shape[0], self.groups, -1).transpose(1, 2)
        return matrix.reshape(shape)


@dataclass(frozen=True)
class Projector:
    """A projector found in a checkpoint: names and shapes, no values."""

    family: str
    kind: str
    """`linear`, `mlp2`, `mlp3`, …, `gated mlp3`; `norm+` in front and `+norm` behind where a norm
    is there; a class of transformers; `5 matrices` where the forward path is not known."""
    prefix: str
    linears: tuple[Linear, ...]
    """Those of the forward path in its order, then other matrices."""
    vectors: Mapping[str, str]
    """Role -> name of the 1-D tensors that are no linear layer's bias (norms, image_newline)."""
    chain: tuple[str, ...]
    """Forward path (`chain.py` says what each step means); empty where it is not known."""
    norm_eps: float = EPS
    """Epsilon of its norm layers."""
    unexpected: tuple[str, ...] = ()
    """Tensors inside the projector's module that the family does not know."""
    packed: tuple[str, ...] = ()
    """Tensors that hold weights in a way that is not read: quantised, or an adapter's."""
    recipe: Recipe | None = None
    """The class of transformers that it is, where no chain describes it."""

    @property
    def path(self) -> tuple[Linear, ...]:
        """The linear layers of the forward path; all of them where it is not known."""
        on_it = linear_roles(self.chain)
        return tuple(layer for layer in self.linears if not on_it or layer.role in on_it)

    @property
    def entry(self) -> str:
        """The module that features are handed to, where the prefix holds other things, too."""
        if self.recipe is None:
            return self.prefix
        reads = f"{self.recipe.reads}."
        inner = [p for p, place in self.recipe.parts.items() if reads.startswith(f"{place}.")]
        return f"{self.prefix}.{inner[0]}".strip(".") if inner else self.prefix

    @property
    def in_features(self) -> int:
        """Width of what the encoder hands over; 0 where no matrix says."""
        return self.path[0].shape[1] if self.linears else 0

    @property
    def out_features(self) -> int:
        """Width of the language model's embeddings; 0 where no matrix says."""
        return self.path[-1].shape[0] if self.linears else 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that belong to the projector, in forward order."""
        names = [n for layer in self.linears for n in (layer.weight, layer.bias) if n]
        return (*names, *self.vectors.values())


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
                not declared
                and (projector.unexpected or not _fits(family, projector, config or {}))
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
    for prefix, local in assembled(recipe, names, _WRAPPERS).items():
        if any(map(_PACKED.search, local)):
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
            wrapper = next((w for w in _WRAPPERS if name.startswith(w, start)), "")
            if not wrapper:
                break
            start += len(wrapper)
    return found


def match(
    family: Family,
    module: str,
    names: list[str],
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
) -> Projector | None:
    """The projector that a family makes of a module's tensors; None where they are of another.

    Raises FormatError where layers are missing or do not chain.
    """
    rest, wrapper = set(names), _wrapper(module)

    def take(locals_: Sequence[str], leaf: str) -> str | None:
        for local in locals_:
            if local.startswith("="):
                name = f"{module}.{local[1:]}" if leaf == "weight" else ""
            elif local.startswith("^"):
                name = f"{wrapper}{local[1:]}.{leaf}"
            else:
                name = ".".join(part for part in (module, local, leaf) if part)
            if name in rest or (name in shapes and local.startswith("^")):
                rest.discard(name)
                return name
        return None

    norms: dict[str, str] = {}
    steps = [step for step in map(parse, family.chain) if step.kind in ("norm", "rms", "rms1")]
    biased = {role: step.kind == "norm" for step in steps for role in step.roles}
    for role, locals_ in family.norms.items():
        weight, bias = take(locals_, "weight"), take(locals_, "bias")
        if weight is None and bias is None and role in family.optional:
            continue
        if weight is not None and 0 in shapes[weight]:
            raise _saved_empty(weight, shapes[weight])
        if weight is None or len(shapes[weight]) != 1:
            return None
        if biased.get(role, bias is not None) is (bias is None):
            return None  # another family with the same module name
        norms[f"{role}.weight"] = weight
        if bias is not None:
            norms[f"{role}.bias"] = bias
    if _packed(family, module, names):
        return None  # by its position, so that all that is packed is taken
    linears: list[Linear] = []
    matrices: list[Linear] = []
    for role, locals_ in (*family.linears.items(), *family.matrices.items()):
        weight, bias = take(locals_, "weight"), take(locals_, "bias")
        if weight is not None:
            layout = family.layouts.get(role, "plain")
            shape = tuple(shapes[weight])
            if 0 in shape:
                raise _saved_empty(weight, shape)
            if len(shape) != 2 and not (layout == "unfold" and len(shape) == 4):
                return None  # a norm or a convolution where this family has a linear layer
            layer = _laid_out(role, weight, bias, shape, layout, norms, shapes)
            (linears if role in family.linears else matrices).append(layer)
        elif bias is not None:
            raise FormatError(
                f"has {clean(bias)} and no weight beside it", "projector", field=clean(module)
            )
    if not linears:
        return None
    wanted = [role for role in family.linears if role not in family.optional]
    there = [layer.role for layer in linears if layer.role not in family.optional]
    if there != wanted[: len(there)] or (not family.any_depth and len(there) < len(wanted)):
        missing = next(role for role in wanted if role not in there)
        if family.scattered:
            return None
        raise FormatError(f"layer {missing} is missing", "projector", field=clean(module))
    roles = {layer.role for layer in linears} | {n.rpartition(".")[0] for n in norms}
    chain = _chain(family, roles, config)
    if not _check_chain(module, chain, linears, norms, shapes):
        return None  # a norm of another width
    vectors = dict(norms)
    for role, full_names in family.vectors.items():
        for name in full_names:
            if name.startswith("=") and f"{module}.{name[1:]}" in rest:
                vectors[role] = f"{module}.{name[1:]}"
                rest.discard(vectors[role])
            elif name in shapes and (name.startswith(wrapper) or not wrapper):
                vectors[role] = name
    order = {role: n for n, role in enumerate(linear_roles(chain))}
    return Projector(
        family=family.name,
        kind=_kind(chain, len(linears) + len(matrices)),
        prefix=module,
        linears=(*sorted(linears, key=lambda layer: order.get(layer.role, 0)), *matrices),
        vectors=vectors,
        chain=chain,
        norm_eps=_eps(family, config),
        unexpected=() if family.scattered else tuple(sorted(rest)),
    )


def _wrapper(module: str) -> str:
    """What stands in front of a module and is none of its own."""
    start = 0
    while wrapper := next((w for w in _WRAPPERS if module.startswith(w, start)), ""):
        start += len(wrapper)
    return module[:start]


def _laid_out(
    role: str,
    weight: str,
    bias: str | None,
    shape: tuple[int, ...],
    layout: Layout,
    norms: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
) -> Linear:
    """A linear layer as its tensor lies; of an unfolded one the tokens that it merges."""
    if layout == "transposed":
        return Linear(role, weight, bias, (shape[1], shape[0]), layout)
    columns = math.prod(shape[1:])
    width = shape[1] if len(shape) == 4 else columns
    if layout == "unfold" and len(shape) == 2:
        # torch's unfold puts channel by channel what a norm in front of it saw token by token.
        widths = [shapes[name][0] for name in norms.values() if columns % shapes[name][0] == 0]
        width = widths[0] if widths else columns
    return Linear(role, weight, bias, (shape[0], columns), layout, columns // width)


def _kind(chain: Sequence[str], matrices: int) -> str:
    if not chain:
        return f"{matrices} matrices"
    steps = [parse(step) for step in chain]
    norms = ("norm", "rms", "rms1")
    gated = any(step.kind in ("glu", "halves") for step in steps)
    count = len(linear_roles(chain))
    middle = "linear" if count == 1 else f"{'gated ' if gated else ''}mlp{count}"
    before = "norm+" if steps[0].kind in norms else ""
    return before + middle + ("+norm" if steps[-1].kind in norms else "")


def _unknown(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], widths: Set[int]
) -> Projector:
    """A projector of no family: every matrix a layer, its forward path not known.

    First comes a matrix that takes what none of the others gives, last one that gives a width of
    the language model.
    """
    packed = tuple(name for name in names if _PACKED.search(name))
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
            raise _saved_empty(name, shapes[name])
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


def _packed(family: Family, module: str, names: Sequence[str]) -> str | None:
    """A tensor of a linear layer that is neither its weight nor its bias: scales, codes, zeros."""
    layers = {f"{module}.{local}." for found in family.linears.values() for local in found if local}
    leaves = ("weight", "bias")
    return next(
        (
            name
            for name in sorted(names)
            for layer in layers
            if name.startswith(layer) and name[len(layer) :] not in leaves
        ),
        None,
    )


def blueprint(
    projector: Projector, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Blueprint | None:
    """What transformers' class of a projector is built from; None where it is of none."""
    recipe = projector.recipe
    if recipe is None:
        return None
    places = {
        name: place
        for local in assembled(recipe, projector.tensors, _WRAPPERS).values()
        for name, place in local.items()
    }
    roles = {f"{layer.role}.weight": layer.weight for layer in projector.linears}
    roles |= {f"{layer.role}.bias": layer.bias for layer in projector.linears if layer.bias}
    roles |= projector.vectors
    return Blueprint(
        recipe,
        config,
        projector.prefix,
        {role: places[name] for role, name in roles.items()},
        {places[name]: tuple(shapes[name]) for name in projector.tensors},
    )


def require_readable(
    projector: Projector, unread: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """Raises UnsupportedError where a projector has no matrix, or they are quantised, packed or an
    adapter's. `unread`: tensors -> (the weight that they are part of, why it is not read).
    """
    unread = unread or {}
    for name in (*projector.packed, *projector.tensors):
        if name in unread:
            weight, why = unread[name]
            raise UnsupportedError(
                why,
                "quantised",
                field=clean(weight),
                remedy="check the full-precision repository that it was made from",
            )
    if not projector.packed:
        if not projector.linears:
            raise UnsupportedError(
                "has the place of a projector and no matrix in it",
                "projector",
                field=clean(projector.prefix),
            )
        return
    name = projector.packed[0]
    if _ADAPTER.search(name):
        raise UnsupportedError(
            f"{clean(name)} is an adapter's, of which only peft's own files are merged",
            "adapter",
            field=clean(projector.prefix),
            remedy="merge it into its base and check the result",
        )
    raise UnsupportedError(
        f"{clean(name)} is quantised or packed in a way that is not read",
        "quantised",
        field=clean(projector.prefix),
        remedy="check the full-precision repository that it was made from",
    )


def _saved_empty(name: str, shape: Sequence[int]) -> FormatError:
    return FormatError(
        f"is saved empty, with shape {list(shape)}",
        "projector",
        field=clean(name),
        remedy="gather the weights before saving (ZeRO-3 leaves empty tensors)",
    )


def _check_chain(
    module: str,
    chain: Sequence[str],
    linears: Sequence[Linear],
    norms: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
) -> bool:
    """Whether the norms have the width of what they are given.

    Raises FormatError where a bias is not its weight's, or one layer does not take what another
    gives.
    """
    for layer in linears:
        if layer.bias is not None and tuple(shapes[layer.bias]) != (layer.shape[0],):
            raise FormatError(
                f"{clean(layer.bias)} has shape {list(shapes[layer.bias])}, "
                f"its weight wants [{layer.shape[0]}]",
                "projector",
                field=clean(module),
            )
    layers = {layer.role: layer for layer in linears}
    width, giver, narrow = 0, "", []
    for step in map(parse, chain):
        if step.kind in ("norm", "rms", "rms1") and step.roles:
            sizes = [
                tuple(shapes[n]) for r, n in norms.items() if r.startswith(f"{step.roles[0]}.")
            ]
            if any(size != sizes[0] for size in sizes):
                return False
            if width and width % sizes[0][0]:
                return False
            narrow += [] if width else [sizes[0][0]]  # before its tokens are merged, it may be
        elif step.kind == "halves":
            if width % 2:
                return False
            width //= 2
        for role in step.roles if step.kind in ("linear", "glu") else ():
            layer = layers[role]
            if width and layer.shape[1] != width:
                raise FormatError(
                    f"{giver} gives {width} features, {role} takes {layer.shape[1]}",
                    "projector",
                    field=clean(module),
                )
            if not width and any(layer.shape[1] % size for size in narrow):
                return False
        if step.kind in ("linear", "glu"):
            outs = {layers[role].shape[0] for role in step.roles}
            if len(outs) > 1:
                raise FormatError(
                    f"{' and '.join(step.roles)} differ in width", "projector", field=clean(module)
                )
            width, giver = outs.pop(), step.roles[-1]
    return True


def _fits(family: Family, projector: Projector, config: Mapping[str, Any]) -> bool:
    """Whether it gives the width of the config's language model, where the config says one."""
    width = _get(config, family.width_key) if family.width_key else None
    return not isinstance(width, int) or width == projector.out_features


def _chain(family: Family, roles: Set[str], config: Mapping[str, Any]) -> tuple[str, ...]:
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


def _eps(family: Family, config: Mapping[str, Any]) -> float:
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
