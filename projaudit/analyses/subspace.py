"""Where in the base's own geometry the update lies: overlaps, new directions, coupled layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from projaudit.chain import hidden
from projaudit.findings import Null
from projaudit.metrics import Skip, Value, measures

if TYPE_CHECKING:
    from projaudit.analyses.context import ProjectorContext
    from projaudit.linalg import Spectrum, Triplets
    from projaudit.update import LayerUpdate

SUBSPACE_RANK = 5
"""Directions per layer that carry a projector-only backdoor (ProjLens, arXiv:2604.19083, §1.2)."""

INTRUDER_RANK = 10
INTRUDER_COSINE = 0.5
"""How many leading vectors are looked at, and what counts as resembling (PEFT's defaults)."""

_SETTLED = 0.1  # sine of the angle within which a vector of the sketch is the singular vector


@measures("layer", unit="fraction", reference="ProjLens, arXiv:2604.19083, §1.2")
def base_overlap_left(layer: LayerUpdate) -> Value:
    """‖UᵀU0‖²F / k, U and U0 the k = 5 leading left singular vectors of ΔW and of W0 (m × k).

    How far the update writes where the base's strongest directions write; an update of lower rank
    counts with as many as it has. Null by theory: a random k-subspace of R^m. W0's directions come
    from a sketch; where its spectrum is flat around the k-th value, the span is one of several
    equally good ones.
    """
    return _base_overlap(layer, "left")


@measures("layer", unit="fraction", reference="ProjLens, arXiv:2604.19083, §1.2")
def base_overlap_right(layer: LayerUpdate) -> Value:
    """‖VᵀV0‖²F / k, V and V0 the k = 5 leading right singular vectors of ΔW and of W0 (n × k).

    How far the update reads where the base's strongest directions read; see base_overlap_left.
    """
    return _base_overlap(layer, "right")


def rank_of(spectrum: Spectrum) -> int:
    """How many of the SUBSPACE_RANK leading vectors an update has; those of nothing are random."""
    values = spectrum.values[:SUBSPACE_RANK]
    return int((values > 1e-4 * values[0]).sum())


def _base_overlap(layer: LayerUpdate, side: str) -> Value:
    from projaudit.linalg import overlap

    spectrum = _changed(layer)
    k = rank_of(spectrum)
    ours = (spectrum.left if side == "left" else spectrum.right)[:, :k]
    base = layer.leading_base
    theirs = (base.left if side == "left" else base.right)[:, :k]
    return Value(overlap(ours, theirs), nulls=(_random_overlap(ours.shape[0], k),))


@measures("layer", unit="of 10", reference="arXiv:2410.21228, Algorithm 1")
def intruder_dimensions(layer: LayerUpdate) -> Value:
    """Number of the 10 leading left singular vectors of W1 that none of W0 resembles (|cos| < 0.5).

    Exact up to a smaller side of lanczos.EXACT_LIMIT. Beyond it the largest cosine is replaced by
    an upper bound (lanczos.resemblance), and vectors of W1 that the sketch did not settle (close
    singular values, of which it gives a mixture) are not counted: others may be missed. `detail`
    gives the bound of each, and how many were left out. LoRA makes intruders in honest fine-tunes
    as well.
    """
    from projaudit.lanczos import resemblance
    from projaudit.linalg import leading

    _changed(layer)
    tuned = leading(layer.after, INTRUDER_RANK + 1, generator=layer.generator)
    cosines, exact = resemblance(layer.before, tuned.left[:, :INTRUDER_RANK], side="left")
    settled = _settled(tuned)[: len(cosines)]
    if not any(settled):
        raise Skip("the sketch settled none of the leading vectors: their values lie too close")
    relation = "=" if exact else "≤"
    found = [
        f"singular vector {n}: |cos| {relation} {cosine:.3f}"
        for n, (cosine, sure) in enumerate(zip(cosines.tolist(), settled, strict=True), 1)
        if cosine < INTRUDER_COSINE and sure
    ]
    unsettled = settled.count(False)
    left_out = [f"{unsettled} of {len(settled)} vectors not settled"] if unsettled else []
    return Value(float(len(found)), (*found, *left_out))


@measures("projector", unit="fraction", reference="ProjLens, arXiv:2604.19083, §1.2")
def layer_coupling(ctx: ProjectorContext) -> Value:
    """‖U1ᵀV2‖²F / k: overlap of what ΔW1 writes (h × k) with what ΔW2 reads (h × k), k = 5.

    The greatest over neighbouring layers; `detail` names them. The units between pass through an
    elementwise activation, which scales each of them by its slope: for gates that are on or off
    at random, a direction keeps the cosine E[g]/√E[g²] with itself (about 0.7 for a ReLU), so the
    overlap of a coupled pair shrinks and does not vanish. Null by theory: random k-subspaces of
    R^h (for more than two layers, that of one pair). k is smaller for an update of lower rank.
    """
    from projaudit.linalg import overlap

    layers = {layer.role: layer for layer in ctx.update.layers}
    if ctx.update.nonfinite:
        raise Skip("the target's projector has NaN or Inf entries")
    if len(layers) < 2:
        raise Skip("the projector has one layer")
    if not ctx.update.chain:
        raise Skip("the projector's forward path is not known")
    pairs = [
        (layers[role], layers[units.second])
        for units in hidden(ctx.update.chain)
        if not units.halved
        for role in units.first
    ]
    found = []
    for first, second in pairs:
        if first.spectrum.frobenius == 0.0 or second.spectrum.frobenius == 0.0:
            continue
        k = min(rank_of(first.spectrum), rank_of(second.spectrum))
        written, read = first.spectrum.left[:, :k], second.spectrum.right[:, :k]
        null = _random_overlap(written.shape[0], k)
        found.append((overlap(written, read), f"{first.role} → {second.role}", null))
    if not found:
        raise Skip("no two neighbouring layers changed")
    value, name, null = max(found, key=lambda pair: pair[0])
    return Value(value, (name,), (null,))


def _settled(found: Triplets) -> list[bool]:
    """Whether each vector is its own: residual / gap to the next value bounds its angle's sine."""
    values, residuals = found.values.tolist(), found.residuals.tolist()
    gaps = (
        [
            min(abs(value - other) for j, other in enumerate(values) if j != i)
            for i, value in enumerate(values)
        ]
        if len(values) > 1
        else [values[0]]
    )
    return [r <= _SETTLED * gap for r, gap in zip(residuals, gaps, strict=True)]


def _changed(layer: LayerUpdate) -> Spectrum:
    if layer.spectrum.frobenius == 0.0:
        raise Skip("the update is zero")
    return layer.spectrum


def _random_overlap(n: int, k: int) -> Null:
    """Mean k/n, variance 2(n−k)² / (n²(n−1)(n+2)) of the overlap of random k-subspaces of Rⁿ.

    A random update of equal norm, or of equal spectrum, has Haar-distributed singular vectors.
    Second moments of ‖UᵀV‖²F / k; at k = 1 those of Beta(1/2, (n−1)/2).
    """
    variance = 2 * (n - k) ** 2 / (n**2 * (n - 1) * (n + 2)) if n > 1 else 0.0
    return Null("equal_norm", k / n, math.sqrt(variance), 0)
