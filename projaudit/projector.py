"""Where the projector is in a checkpoint, and what it computes: families as data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from projaudit.errors import FormatError, UnsupportedError
from projaudit.inert import clean
from projaudit.position import module_of, positioned, text_widths

if TYPE_CHECKING:
    from torch import Tensor

# Wrappers of training frameworks (DDP, compile, FSDP, PEFT), in front of any family's prefix.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
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
    word: str
    prefixes: tuple[str, ...]
    linears: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, tuple[str, ...]]
    vectors: Mapping[str, tuple[str, ...]]
    any_depth: bool
    """Whether the last of its layers may be absent."""
    chain: tuple[str, ...]
    act_keys: tuple[str, ...]
    act_default: str
    eps_key: str
    source: str


@dataclass(frozen=True)
class Linear:
    """A linear layer y = x Wᵀ + b of a projector, by tensor names."""

    role: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    """(out, in)."""


@dataclass(frozen=True)
class Projector:
    """A projector found in a checkpoint: names and shapes, no values."""

    family: str
    kind: str
    """`linear`, `mlp2`, `mlp3`, …; `norm+` in front where a norm comes first; `5 matrices`."""
    prefix: str
    linears: tuple[Linear, ...]
    vectors: Mapping[str, str]
    """Role -> name of the 1-D tensors that are no linear layer's bias (norms, image_newline)."""
    chain: tuple[str, ...]
    """Forward path: roles, and activations as `act:<name>`; empty where it is not known."""
    norm_eps: float = 1e-5
    """Epsilon of its norm layers."""
    unexpected: tuple[str, ...] = ()
    """Tensors inside the projector's module that the family does not know."""
    packed: tuple[str, ...] = ()
    """Tensors that hold weights in a way that is not read: quantised, or an adapter's."""

    @property
    def in_features(self) -> int:
        """Width of what the encoder hands over; 0 where no matrix says."""
        return self.linears[0].shape[1] if self.linears else 0

    @property
    def out_features(self) -> int:
        """Width of the language model's embeddings; 0 where no matrix says."""
        return self.linears[-1].shape[0] if self.linears else 0

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
    return tuple(_family(entry) for entry in entries)


def _family(entry: dict[str, Any]) -> Family:
    def names(key: str) -> dict[str, tuple[str, ...]]:
        return {role: tuple(found) for role, found in entry.get(key, {}).items()}

    return Family(
        name=entry["name"],
        architectures=tuple(entry["architectures"]),
        word=entry["word"],
        prefixes=tuple(entry["prefixes"]),
        linears=names("linears"),
        norms=names("norms"),
        vectors=names("vectors"),
        any_depth=entry.get("depth") == "any",
        chain=tuple(entry["chain"]),
        act_keys=tuple(entry["act"]["keys"]),
        act_default=entry["act"]["default"],
        eps_key=entry.get("eps", ""),
        source=entry["source"],
    )


def locate(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None = None
) -> tuple[Projector, ...]:
    """The projectors among tensors of these names and shapes; empty if there is none.

    By family; and what no family describes, by its position between two models, as `family`
    `unknown` (`position.py`). `config` is the parsed config.json: it decides between families of
    the same names, and gives the activation and the language model's width. Raises FormatError
    where a projector is incomplete or its layers do not chain.
    """
    _check_config(config or {})
    architectures = set(strings((config or {}).get("architectures")))
    known = sorted(families(), key=lambda f: not architectures & set(f.architectures))
    found: dict[str, Projector] = {}
    for family in known:
        for module, names in modules(family, shapes).items():
            if module in found:
                continue
            declared = bool(architectures & set(family.architectures))
            try:
                projector = match(family, module, names, shapes, config or {})
            except FormatError:
                if declared:
                    raise
                continue  # another family's, that happens to use these names
            if projector is not None and (declared or not projector.unexpected):
                found[module] = projector
    known_modules = tuple(f"{module}." for module in found)
    taken = {name for projector in found.values() for name in projector.tensors}
    for group in positioned(shapes, config):
        rest = [name for name in group if name not in taken and not name.startswith(known_modules)]
        if rest:
            projector = _unknown(rest, shapes, text_widths(shapes, config or {}))
            found[rest[0] if projector.prefix in found else projector.prefix] = projector
    # Those whose function is known come first: what runs the model runs one.
    return tuple(found[module] for module in sorted(found, key=lambda m: (not found[m].chain, m)))


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


def modules(family: Family, names: Mapping[str, object]) -> dict[str, list[str]]:
    """Module path -> tensors below it, for every place where the family's module may stand."""
    modules: dict[str, list[str]] = {}
    for name in names:
        if family.word not in name:  # most of a large checkpoint's
            continue
        stripped = name
        while wrapper := next((w for w in _WRAPPERS if stripped.startswith(w)), ""):
            stripped = stripped[len(wrapper) :]
        for prefix in family.prefixes:
            path = prefix + family.word
            if stripped.startswith(path + "."):
                wrapped = name[: len(name) - len(stripped)]
                modules.setdefault(wrapped + path, []).append(name)
                break
    return modules


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
    rest = set(names)

    def take(locals_: Sequence[str], leaf: str) -> str | None:
        for local in locals_:
            name = ".".join(part for part in (module, local, leaf) if part)
            if name in rest:
                rest.discard(name)
                return name
        return None

    norms: dict[str, str] = {}
    for role, locals_ in family.norms.items():
        weight, bias = take(locals_, "weight"), take(locals_, "bias")
        if weight is None or bias is None:
            return None  # another family with the same module name
        norms |= {f"{role}.weight": weight, f"{role}.bias": bias}
    if _packed(family, module, names):
        return None  # by its position, so that all that is packed is taken
    linears = []
    for role, locals_ in family.linears.items():
        weight, bias = take(locals_, "weight"), take(locals_, "bias")
        if weight is not None:
            shape = tuple(shapes[weight])
            if 0 in shape:
                raise _saved_empty(weight, shape)
            if len(shape) != 2:
                return None  # a norm or a convolution where this family has a linear layer
            linears.append(Linear(role, weight, bias, (shape[0], shape[1])))
        elif bias is not None:
            raise FormatError(
                f"has {clean(bias)} and no weight beside it", "projector", field=clean(module)
            )
    if not linears:
        return None
    expected = list(family.linears)[: len(linears)]
    if [layer.role for layer in linears] != expected or (
        not family.any_depth and len(linears) < len(family.linears)
    ):
        missing = next(r for r in family.linears if r not in {layer.role for layer in linears})
        raise FormatError(f"layer {missing} is missing", "projector", field=clean(module))
    _check_chain(module, linears, shapes)
    if any(tuple(shapes[name]) != (linears[0].shape[1],) for name in norms.values()):
        return None  # a norm of another width, before its tokens are merged
    vectors = dict(norms)
    for role, full_names in family.vectors.items():
        wrapper = module[: module.index(family.word)]
        for name in full_names:
            if name in shapes and (name.startswith(wrapper) or not wrapper):
                vectors[role] = name
    kind = "linear" if len(linears) == 1 else f"mlp{len(linears)}"
    return Projector(
        family=family.name,
        kind=("norm+" if norms else "") + kind,
        prefix=module,
        linears=tuple(linears),
        vectors=vectors,
        chain=_chain(family, {layer.role for layer in linears}, config),
        norm_eps=_eps(family, config),
        unexpected=tuple(sorted(rest)),
    )


def _unknown(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], widths: Set[int]
) -> Projector:
    """A projector of no family: every matrix a layer, its forward path not known.

    A convolution (out, in, …) is the matrix (out, in·…), and queries (1, n, d) are (n, d). First
    comes a matrix that takes what none of the others gives, last one that gives a width of the
    language model.
    """
    packed = tuple(name for name in names if _PACKED.search(name))
    prefix = _common([module_of(name) for name in names])
    own, linears, taken = set(names), [], set()
    for name in names:
        rows = [size for i, size in enumerate(shapes[name]) if size != 1 or i == 1]
        if 0 in rows and not packed:
            raise _saved_empty(name, shapes[name])
        if len(rows) < 2:
            continue
        bias = f"{module_of(name)}.bias"
        fits = bias in own and name != bias and tuple(shapes[bias]) == (rows[0],)
        role, shape = _local(module_of(name), prefix), (rows[0], math.prod(rows[1:]))
        linears.append(Linear(role, name, bias if fits else None, shape))
        taken |= {name, bias} if fits else {name}
    given = {layer.shape[0] for layer in linears}
    first = [layer for layer in linears if layer.shape[1] not in given][:1]
    last = [layer for layer in linears if layer.shape[0] in widths and layer not in first][-1:]
    ordered = [*first, *(layer for layer in linears if layer not in first + last), *last]
    return Projector(
        family="unknown",
        kind="linear" if len(linears) == 1 else f"{len(linears)} matrices",
        prefix=prefix,
        linears=tuple(ordered),
        vectors={_local(name, prefix): name for name in names if name not in taken},
        chain=(),
        packed=packed,
    )


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
            f"{clean(name)} is an adapter's, which is not merged yet",
            "adapter",
            field=clean(projector.prefix),
            remedy="merge it into its base and check the result",
        )
    raise UnsupportedError(
        f"{clean(name)} is quantised or packed, which is not read yet",
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
    module: str, linears: Sequence[Linear], shapes: Mapping[str, Sequence[int]]
) -> None:
    for layer in linears:
        if layer.bias is not None and tuple(shapes[layer.bias]) != (layer.shape[0],):
            raise FormatError(
                f"{clean(layer.bias)} has shape {list(shapes[layer.bias])}, "
                f"its weight wants [{layer.shape[0]}]",
                "projector",
                field=clean(module),
            )
    for first, second in pairwise(linears):
        if first.shape[0] != second.shape[1]:
            raise FormatError(
                f"{first.role} gives {first.shape[0]} features, "
                f"{second.role} takes {second.shape[1]}",
                "projector",
                field=clean(module),
            )


def _chain(family: Family, roles: set[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    act = family.act_default
    for key in family.act_keys:
        value = _get(config, key)
        if value is not None and not isinstance(value, str):
            raise FormatError("is no name of an activation", "config", field=key)
        act = value or act
    steps: list[str] = []
    for step in family.chain:
        if step == "$act":
            steps.append(f"act:{act}")
        elif step in roles or step in family.norms:
            steps.append(step)
        else:  # the layer is absent, and so is the activation in front of it
            steps.pop()
            break
    while steps and steps[-1].startswith("act:"):
        steps.pop()
    return tuple(steps)


def _eps(family: Family, config: Mapping[str, Any]) -> float:
    value = _get(config, family.eps_key)
    if value is None:
        return Projector.norm_eps
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


def activations() -> Mapping[str, Any]:
    """Activation name, as configs and transformers' ACT2FN spell it -> elementwise function."""
    import torch
    from torch.nn import functional as F

    return {
        "gelu": F.gelu,
        "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "silu": F.silu,
        "swish": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "linear": lambda x: x,
    }


def forward(chain: Sequence[str], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """P(x): the chain applied to x (n × in, fp32) with `<role>.weight` and `<role>.bias`.

    A norm's epsilon is `<role>.eps`, 1e-5 where it is not given. Raises UnsupportedError for an
    activation that is not known.
    """
    from torch.nn import functional as F

    known = activations()
    for step in chain:
        if step.startswith("act:"):
            if step[4:] not in known:
                raise UnsupportedError(f"activation {clean(step[4:])} is not known", "activation")
            x = known[step[4:]](x)
            continue
        weight, bias = weights[f"{step}.weight"], weights.get(f"{step}.bias")
        if weight.ndim == 2:
            x = F.linear(x, weight, bias)
        else:
            eps = weights.get(f"{step}.eps")
            x = F.layer_norm(
                x, weight.shape, weight, bias, Projector.norm_eps if eps is None else float(eps)
            )
    return x
