"""What can be done to an update: parts of it removed, shrunk or clipped, or one layer corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projaudit.linalg import spectrum

Tensors = Mapping[str, Tensor]
LEADING = 16
"""Singular values that are looked at for the noise edge; more lie above it in no case we saw."""


def shrunk(tuned: Tensors, base: Tensors, share: float) -> dict[str, Tensor]:
    """W₀ + share·ΔW of every tensor that both have, biases and norms included; 0 is the base.

    WiSE-FT (2109.01903) takes ½.
    """
    return {
        name: tensor if name not in base else base[name] + share * (tensor - base[name])
        for name, tensor in tuned.items()
    }


def without_top(tuned: Tensors, base: Tensors, names: Sequence[str], k: int) -> dict[str, Tensor]:
    """W₀ + ΔW − U_k S_k V_kᵀ of the matrices of those names, U S Vᵀ the SVD of ΔW (out × in)."""
    found = dict(tuned)
    for name in names:
        u, s, vt = torch.linalg.svd(tuned[name] - base[name], full_matrices=False)
        found[name] = tuned[name] - (u[:, :k] * s[:k]) @ vt[:k]
    return found


def clipped(tuned: Tensors, base: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
    """As `tuned`, with the singular values of ΔW above its noise brought down to the noise edge."""
    found = dict(tuned)
    for name in names:
        delta = tuned[name] - base[name]
        of = spectrum(delta, min(LEADING, *delta.shape), generator=torch.Generator().manual_seed(0))
        over = (of.values.to(delta) - of.noise_edge).clamp_min(0) * (of.values > of.threshold).to(
            delta
        )
        found[name] = tuned[name] - (of.left * over) @ of.right.T
    return found


def without_directions(
    tuned: Tensors, base: Tensors, name: str, directions: Tensor
) -> dict[str, Tensor]:
    """As `tuned`, with ΔW (I − V Vᵀ) in one matrix; `directions` are the rows of Vᵀ (k × in)."""
    delta = tuned[name] - base[name]
    return {**tuned, name: tuned[name] - (delta @ directions.T) @ directions}


@dataclass(frozen=True)
class Correction:
    """What is added to one linear layer: left · right to its weight, and to its bias."""

    left: Tensor
    """(out, r)"""
    right: Tensor
    """(r, in)"""
    bias: Tensor | None
    """(out,)"""


def corrected(tuned: Tensors, name: str, bias: str | None, by: Correction) -> dict[str, Tensor]:
    """As `tuned`, with a correction of one layer."""
    found = {**tuned, name: tuned[name] + by.left @ by.right}
    if bias is not None and by.bias is not None:
        found[bias] = tuned[bias] + by.bias
    return found


def correction(
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    marked: Tensor,
    plain: Tensor,
    strength: float,
    damping: float,
    rank: int,
    within: Tensor | None = None,
) -> Correction:
    """The least change E of a layer by which marked inputs give the outputs of unmarked ones.

    Rows are inputs of the layer: `kept` of ordinary images, `marked` and `plain` of the same images
    with and without marks. E minimises

        mean ‖E h_kept‖² + strength · mean ‖(W + E) h_marked − W h_plain‖² + damping · t · ‖E‖²

    t the mean square of a kept input's entries, a 1 for the bias among them: as MEMIT (2210.07229,
    eq. 14) writes facts into a layer. `rank` leading directions of it are kept, and what lies
    `within` some orthonormal directions of the outputs (out, k).
    """

    def with_one(rows: Tensor) -> Tensor:
        return rows if bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)

    h, m, p = (with_one(rows.double()) for rows in (kept, marked, plain))
    w = weight.double() if bias is None else torch.cat([weight, bias[:, None]], 1).double()
    gram = h.T @ h / len(h)
    ridge = damping * gram.trace() / len(gram) * torch.eye(len(gram)).to(h)
    missing = m.T @ ((p - m) @ w.T) / len(m)
    e = torch.linalg.solve(gram + strength * (m.T @ m) / len(m) + ridge, strength * missing).T
    if within is not None:
        e = within.double() @ (within.double().T @ e)
    inputs = weight.shape[1]
    u, s, vt = torch.linalg.svd(e[:, :inputs], full_matrices=False)
    r = min(rank, len(s) if within is None else within.shape[1])
    return Correction(
        (u[:, :r] * s[:r]).to(weight),
        vt[:r].to(weight),
        None if bias is None else e[:, inputs].to(weight),
    )
