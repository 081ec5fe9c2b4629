"""The projector that a family makes of a module's tensors, checked layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from projaudit.chain import linear_roles, parse
from projaudit.errors import FormatError
from projaudit.family import Family, chain_of, eps_of
from projaudit.inert import clean
from projaudit.projector import WRAPPERS, Layout, Linear, Projector


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
            raise saved_empty(weight, shapes[weight])
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
                raise saved_empty(weight, shape)
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
    chain = chain_of(family, roles, config)
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
        norm_eps=eps_of(family, config),
        unexpected=() if family.scattered else tuple(sorted(rest)),
    )


def _wrapper(module: str) -> str:
    """What stands in front of a module and is none of its own."""
    start = 0
    while wrapper := next((w for w in WRAPPERS if module.startswith(w, start)), ""):
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


def saved_empty(name: str, shape: Sequence[int]) -> FormatError:
    """The error for a weight without elements."""
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
