"""What a projector computes: a chain of steps, run forward, and a difference carried along it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from projaudit.errors import UnsupportedError
from projaudit.inert import clean

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-5
"""Epsilon of a norm where neither config nor family says."""


@dataclass(frozen=True)
class Step:
    """One step of a chain, parsed."""

    kind: str
    """`linear`; `norm` (LayerNorm), `rms`, `rms1` (RMSNorm that multiplies by 1 + weight); `act`;
    `glu`: act(x Aᵀ + a) ⊙ (x Bᵀ + b); `halves`: x ↦ act(second half of x) ⊙ first half."""
    roles: tuple[str, ...] = ()
    """Of the linear layers or the norm that it takes; none for a norm without weights."""
    act: str = ""


@lru_cache(maxsize=1 << 10)
def parse(step: str) -> Step:
    """The step that a text means.

    `linear_1` is a linear layer, `norm:r`, `rms:r` and `rms1:r` a norm, `rms:` one without weights,
    `act:gelu` an activation, `glu:silu:gate,up` and `halves:silu` gated ones. A norm of a part of
    its input's width normalises each part: tokens that a merge has put side by side.
    """
    kind, colon, rest = step.partition(":")
    if not colon:
        return Step("linear", (step,))
    if kind in ("norm", "rms", "rms1"):
        return Step(kind, (rest,) if rest else ())
    if kind in ("act", "halves"):
        return Step(kind, act=rest)
    act, _, pair = rest.partition(":")
    return Step("glu", tuple(pair.split(",")), act)


def linear_roles(chain: Sequence[str]) -> tuple[str, ...]:
    """Roles of the linear layers on the way, in order."""
    steps = map(parse, chain)
    return tuple(role for s in steps if s.kind in ("linear", "glu") for role in s.roles)


def acts(chain: Sequence[str]) -> set[str]:
    """Names of the activations on the way."""
    return {step.act for step in map(parse, chain) if step.act}


def affine_norms(chain: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Role of each norm right before linear layers -> its kind, and the roles of those layers.

    Its affine part can be taken into them exactly.
    """
    steps = [parse(step) for step in chain]
    return {
        first.roles[0]: (first.kind, second.roles)
        for first, second in pairwise(steps)
        if first.kind in ("norm", "rms", "rms1")
        and first.roles
        and second.kind in ("linear", "glu")
    }


@dataclass(frozen=True)
class Hidden:
    """Units between two layers that may trade places with no effect on what is computed."""

    first: tuple[str, ...]
    """The layers that give them: one, or gate and up of a gated step."""
    halved: bool
    """Both halves of the one layer's rows give them."""
    second: str
    """The layer that takes them."""
    act: str
    """Activation between; empty where they pass through a norm, or through none."""


def hidden(chain: Sequence[str]) -> list[Hidden]:
    """The hidden units of the chain, where an elementwise step, a gate or a norm is between.

    Of a norm with weights the affine part has to be folded into the next layer first.
    """
    steps = [parse(step) for step in chain]
    found = []
    for i, step in enumerate(steps):
        after = steps[i + 1 :]
        if step.kind == "glu" and after and after[0].kind == "linear":
            found.append(Hidden(step.roles, False, after[0].roles[0], step.act))
        elif step.kind == "linear" and len(after) > 1 and after[1].kind == "linear":
            between, second = after[0], after[1].roles[0]
            if between.kind in ("act", "halves", "norm", "rms", "rms1"):
                halved = between.kind == "halves"
                found.append(Hidden(step.roles, halved, second, between.act))
    return found


def activations() -> Mapping[str, Callable[[Tensor], Tensor]]:
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

    The epsilon of its norms is `eps`, 1e-5 where it is not given. Raises UnsupportedError for an
    activation that is not known.
    """
    for text in chain:
        step = parse(text)
        if step.kind == "linear":
            x = _linear(step.roles[0], weights, x)
        elif step.kind == "act":
            x = _act(step.act)(x)
        elif step.kind == "glu":
            gate, up = step.roles
            x = _act(step.act)(_linear(gate, weights, x)) * _linear(up, weights, x)
        elif step.kind == "halves":
            kept, gate_of = x.chunk(2, dim=-1)
            x = _act(step.act)(gate_of) * kept
        else:
            scale, shift = _affine(step, weights)
            x = _normalised(step, weights, x)
            x = x if scale is None else x * _tiled(scale, x)
            x = x if shift is None else x + _tiled(shift, x)
    return x


Moves = Mapping[str, "Callable[[Tensor], Tensor]"]
"""Role of a linear layer -> x ↦ ΔW x + Δb for inputs as rows."""


def carried(
    text: str,
    weights: Mapping[str, Tensor],
    moves: Moves,
    vectors: Mapping[str, Tensor],
    before: Tensor,
    after: Tensor,
    delta: Tensor | None,
) -> Tensor | None:
    """The difference behind one step, given the one before it (`delta`, None where there is none).

    `before` and `after` are what the base has on either side of the step, `vectors` the change of
    `<role>.weight` and `<role>.bias` of norms. Differences are carried as differences, so that a
    small one does not drown in the rounding of two large outputs.
    """
    step = parse(text)
    moved = before if delta is None else before + delta
    if step.kind == "linear":
        return _moved(step.roles[0], weights, moves, moved, delta)
    if step.kind == "glu":
        gate, up = step.roles
        act = _act(step.act)
        shut, opened = (_linear(role, weights, before) for role in (gate, up))
        gate_delta = _moved(gate, weights, moves, moved, delta)
        up_delta = _moved(up, weights, moves, moved, delta)
        return (act(shut + gate_delta) - act(shut)) * (opened + up_delta) + act(shut) * up_delta
    norm = step.kind in ("norm", "rms", "rms1")
    changed = [vectors.get(f"{role}.{leaf}") for role in step.roles for leaf in ("weight", "bias")]
    if norm and any(change is not None for change in changed):
        scale, _ = _affine(step, weights)
        new = _normalised(step, weights, moved)
        old = _normalised(step, weights, before)
        moved_by = new - old if scale is None else (new - old) * _tiled(scale, new)
        weight, bias = changed
        if weight is not None:
            moved_by = moved_by + new * _tiled(weight, new)
        return moved_by if bias is None else moved_by + _tiled(bias, new)
    return None if delta is None else forward((text,), weights, moved) - after


def _moved(
    role: str, weights: Mapping[str, Tensor], moves: Moves, moved: Tensor, delta: Tensor | None
) -> Tensor:
    own = moves[role](moved)
    return own if delta is None else own + delta @ weights[f"{role}.weight"].T


def _linear(role: str, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.linear(x, weights[f"{role}.weight"], weights.get(f"{role}.bias"))


def _act(name: str) -> Callable[[Tensor], Tensor]:
    known = activations()
    if name not in known:
        raise UnsupportedError(f"activation {clean(name)} is not known", "activation")
    return known[name]


def _affine(step: Step, weights: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What a norm multiplies by and what it adds."""
    if not step.roles:
        return None, None
    scale = weights[f"{step.roles[0]}.weight"]
    return (scale + 1 if step.kind == "rms1" else scale), weights.get(f"{step.roles[0]}.bias")


def _normalised(step: Step, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x before the affine part, each part of the norm's width on its own."""
    import torch
    from torch.nn import functional as F

    width = len(weights[f"{step.roles[0]}.weight"]) if step.roles else x.shape[-1]
    eps = float(weights.get("eps", torch.tensor(EPS)))
    parts = x.reshape(*x.shape[:-1], -1, width)
    if step.kind == "norm":
        parts = F.layer_norm(parts, (width,), eps=eps)
    else:
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    return parts.flatten(-2)


def _tiled(vector: Tensor, x: Tensor) -> Tensor:
    return vector.repeat(x.shape[-1] // len(vector))
