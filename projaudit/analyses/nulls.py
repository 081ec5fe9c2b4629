"""What an update is measured against: random updates of the same base, a statistic over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from projaudit.analyses.subspace import SUBSPACE_RANK, rank_of
from projaudit.findings import Null

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from projaudit.update import LayerUpdate, ProjectorUpdate

_JITTER = 1e-10  # of the Gram matrix of unit rows: a relative error of 1e-5 where rows are parallel


@dataclass(frozen=True)
class Change:
    """An update as the probes apply it: no dense matrix unless it is the real one."""

    linear: Mapping[str, Callable[[Tensor], Tensor]]
    """Role -> x ↦ ΔW x + Δb (rows are inputs). A random one may be called only once."""
    vectors: Mapping[str, Tensor]
    """Role -> change of a norm's weight or bias that is no linear layer's."""
    read: Tensor
    """Leading right singular vectors of ΔW1 (in × r)."""
    written: Tensor
    """Leading left singular vectors of the last ΔW (out × r)."""


def real_change(update: ProjectorUpdate) -> Change:
    """The update as it is."""
    return Change(
        linear={
            layer.role: partial(_dense, layer.delta, _bias_delta(layer)) for layer in update.path
        },
        vectors=update.moved_vectors(),
        read=leading(update.path[0]),
        written=leading(update.path[-1], left=True),
    )


def random_change(update: ProjectorUpdate, kind: str, generator: Generator) -> Change:
    """A random one of the same base: `equal_norm` or `equal_spectrum` (see run_probes)."""
    linear: dict[str, Callable[[Tensor], Tensor]] = {}
    read, written = [], []
    for layer in update.path:
        left, values, right, spread = _drawn(layer, kind, generator)
        bias = _bias_delta(layer)
        if bias is not None:
            bias = _redirected(bias, generator)
        linear[layer.role] = partial(
            random_action, left, values, right, spread, bias, generator=generator
        )
        read.append(right[:, : leading(layer).shape[1]])
        written.append(left[:, : leading(layer, left=True).shape[1]])
    vectors = {
        role: _redirected(moved, generator) for role, moved in update.moved_vectors().items()
    }
    return Change(linear, vectors, read[0], written[-1])


@dataclass(frozen=True)
class Moved:
    """An update as a projector that is run as a whole takes it: all of its weights."""

    weights: Mapping[str, Tensor]
    """By role, as `ProjectorUpdate.weights` gives them."""
    read: Tensor
    """As of a Change."""
    written: Tensor


def real_weights(update: ProjectorUpdate) -> Moved:
    """The update as it is."""
    ends = update.path[0], update.path[-1]
    return Moved(update.weights("after"), leading(ends[0]), leading(ends[1], left=True))


def random_weights(update: ProjectorUpdate, kind: str, generator: Generator) -> Moved:
    """A random one of the same base, as `random_change`, every tensor moved and each ΔW dense."""
    read, written = [], []
    moved = {v.role: v.before + _redirected(v.after - v.before, generator) for v in update.vectors}
    for layer in update.layers:
        (m, n), (left, values, right, spread) = layer.before.shape, _drawn(layer, kind, generator)
        bulk = gaussian(m, n, layer.before, generator) * spread
        bulk = bulk - left @ (left.T @ bulk)
        bulk = bulk - (bulk @ right) @ right.T
        moved[f"{layer.role}.weight"] = layer.before + bulk + (left * values) @ right.T
        bias = _bias_delta(layer)
        if bias is not None:
            before = layer.before_bias if layer.before_bias is not None else 0.0
            moved[f"{layer.role}.bias"] = before + _redirected(bias, generator)
        read.append(right[:, : leading(layer).shape[1]])
        written.append(left[:, : leading(layer, left=True).shape[1]])
    return Moved(moved, read[0], written[-1])


def _drawn(
    layer: LayerUpdate, kind: str, generator: Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(left, values, right, spread) of a random ΔW of that layer, as `random_action` takes them."""
    from projaudit.linalg import random_orthonormal

    m, n = layer.before.shape
    values = (
        layer.spectrum.values
        if kind == "equal_spectrum"
        else gaussian_values(m, n, layer.spectrum.frobenius, SUBSPACE_RANK)
    ).to(layer.before)
    k = len(values)
    left = random_orthonormal(m, k, generator=generator).to(layer.before)
    right = random_orthonormal(n, k, generator=generator).to(layer.before)
    energy = layer.spectrum.frobenius**2 - float(values.double().square().sum())
    return left, values, right, math.sqrt(max(energy, 0.0) / max((m - k) * (n - k), 1))


def random_action(
    left: Tensor,
    values: Tensor,
    right: Tensor,
    spread: float,
    bias: Tensor | None,
    x: Tensor,
    *,
    generator: Generator,
) -> Tensor:
    """ΔW x + Δb for ΔW = left·diag(values)·rightᵀ + (I − P) G (I − Q), Gᵢⱼ ~ N(0, spread²), unseen.

    On fixed inputs X (n × in) G acts as Z·chol(XXᵀ)ᵀ with Z (out × n) standard normal: equal in
    distribution to a dense draw, at n columns instead of `in`. P and Q project on left and right,
    so that these are singular vectors of ΔW. One call is one ΔW: all inputs have to come in it.
    """
    import torch

    along = x @ right
    if not bool(torch.isfinite(x).all()):
        return x.new_full((len(x), len(left)), math.nan)
    rest = x.double()
    rest = rest - (rest @ right.double()) @ right.double().T
    length = rest.square().sum(1, keepdim=True).sqrt()
    rest = rest / length.clamp_min(torch.finfo(torch.float64).tiny)
    gram = rest @ rest.T
    gram.diagonal().add_(_JITTER)
    mixing = torch.linalg.cholesky(gram) * (spread * length)
    bulk = mixing.to(x.dtype) @ gaussian(len(x), left.shape[0], x, generator)
    bulk = bulk - (bulk @ left) @ left.T
    moved: Tensor = bulk + (along * values) @ left.T
    return moved if bias is None else moved + bias


def gaussian_values(m: int, n: int, frobenius: float, k: int) -> Tensor:
    """(min(k, m, n),) leading singular values of an m × n Gaussian matrix of that Frobenius norm.

    Quantiles (i − ½)/min(m, n) of the Marchenko–Pastur law, from above; they fluctuate by the
    relative order min(m, n)^(−2/3), which is left out.
    """
    import torch

    from projaudit.linalg import marchenko_pastur_density, marchenko_pastur_edge

    least = min(m, n)
    sigma = frobenius / math.sqrt(m * n)
    if sigma == 0.0 or least == 1:
        return torch.full((1,), frobenius, dtype=torch.float64)
    low, high = sigma * abs(math.sqrt(m) - math.sqrt(n)), marchenko_pastur_edge(sigma, m, n)
    # x = high − (high − low)·t² turns the square root of the density at the edge into a smooth one
    t = torch.linspace(0, 1, 4097, dtype=torch.float64)
    x = high - (high - low) * t.square()
    density = marchenko_pastur_density(x, sigma, m, n) * t
    above = torch.cumulative_trapezoid(density, t)
    above = torch.cat([above.new_zeros(1), above / above[-1]])
    wanted = (torch.arange(min(k, least), dtype=torch.float64) + 0.5) / least
    values = x[torch.searchsorted(above, wanted).clamp_max(len(x) - 1)]
    return values * min(1.0, frobenius / float(values.square().sum().sqrt()))


def _dense(delta: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    moved = x @ delta.T
    return moved if bias is None else moved + bias


def _bias_delta(layer: LayerUpdate) -> Tensor | None:
    """b1 − b0; a bias that one side lacks counts as zero. None where both lack it."""
    if layer.before_bias is None:
        return layer.after_bias
    return -layer.before_bias if layer.after_bias is None else layer.after_bias - layer.before_bias


def leading(layer: LayerUpdate, *, left: bool = False) -> Tensor:
    """(in × r), (out × r) for `left`: at most 5 leading vectors of ΔW, values beyond rounding."""
    spectrum = layer.spectrum
    return (spectrum.left if left else spectrum.right)[:, : rank_of(spectrum)]


def gaussian(rows: int, columns: int, like: Tensor, generator: Generator) -> Tensor:
    """(rows, columns) standard normal, drawn on the CPU, like `like`."""
    import torch

    return torch.randn(rows, columns, generator=generator).to(like)


def _redirected(vector: Tensor, generator: Generator) -> Tensor:
    """A random vector (or tensor of any shape) of the same norm."""
    redirected: Tensor = unit(gaussian(1, vector.numel(), vector, generator))[0]
    return redirected.reshape(vector.shape) * vector.square().sum().sqrt()


def unit(rows: Tensor) -> Tensor:
    """The rows at norm 1."""
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def null_of(kind: str, values: Sequence[float]) -> Null | None:
    """Mean and standard deviation (n − 1) of a statistic over random updates; None below two."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return None
    mean = sum(finite) / len(finite)
    square = sum((value - mean) ** 2 for value in finite) / (len(finite) - 1)
    # where nothing varies but float32 rounding there is no z-score to be had
    sd = math.sqrt(square) if math.sqrt(square) > 1e-6 * abs(mean) else 0.0
    return Null(kind, mean, sd, len(finite))
