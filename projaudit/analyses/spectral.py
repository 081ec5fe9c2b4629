"""The spectrum of the update: where its energy is, and what stands out of the noise."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from projaudit.findings import Series
from projaudit.metrics import Skip, Value, measures

if TYPE_CHECKING:
    from projaudit.linalg import Spectrum
    from projaudit.update import LayerUpdate

_PROJLENS = "ProjLens, arXiv:2604.19083, §1.1"


def _spectrum(layer: LayerUpdate) -> Spectrum:
    if layer.spectrum.frobenius == 0.0:
        raise Skip("the update is zero")
    return layer.spectrum


@measures("layer", reference=_PROJLENS)
def leading_singular_value(layer: LayerUpdate) -> Value:
    """σ1 of ΔW; `detail` bounds its error where it is not exact."""
    spectrum = _spectrum(layer)
    error = float(spectrum.residuals[0])
    bound = () if spectrum.exact else (f"within {error:.2g} (residual bound)",)
    return Value(float(spectrum.values[0]), bound)


def _energy(layer: LayerUpdate, k: int) -> Value:
    """Σ_{i≤k} σi² / ‖ΔW‖F², a lower bound with its upper one where the values are not settled."""
    spectrum = _spectrum(layer)
    have = len(spectrum.values)
    if k > have and have < min(layer.delta.shape):
        raise Skip(f"only {have} singular values were asked for")
    energy = min(spectrum.top_energy(min(k, have)), 1.0)
    most = (spectrum.values[:k] + spectrum.residuals[:k]).square().sum() / spectrum.frobenius**2
    if spectrum.exact or float(most) <= 1.01 * energy:
        return Value(energy)
    return Value(energy, (f"at most {min(float(most), 1.0):.3g}: the values lie close together",))


@measures("layer", unit="fraction", reference=_PROJLENS)
def top1_energy(layer: LayerUpdate) -> Value:
    """σ1² / ‖ΔW‖F²"""
    return _energy(layer, 1)


@measures("layer", unit="fraction", reference=_PROJLENS)
def top5_energy(layer: LayerUpdate) -> Value:
    """Σ_{i≤5} σi² / ‖ΔW‖F²"""
    return _energy(layer, 5)


@measures("layer", unit="fraction", reference=_PROJLENS)
def top30_energy(layer: LayerUpdate) -> Value:
    """Σ_{i≤30} σi² / ‖ΔW‖F²"""
    return _energy(layer, 30)


@measures("layer", reference="Rudelson & Vershynin 2007")
def stable_rank(layer: LayerUpdate) -> float:
    """‖ΔW‖F² / σ1²"""
    return _spectrum(layer).stable_rank


@measures("layer", reference="Roy & Vetterli 2007")
def effective_rank(layer: LayerUpdate) -> Value:
    """exp(−Σ pi ln pi), pi = σi / Σσ; `detail` states the error where it is estimated."""
    spectrum = _spectrum(layer)
    error = spectrum.effective_rank_error
    return Value(spectrum.effective_rank, (f"± {error:.2g} (quadrature)",) if error else ())


@measures("layer", unit="ratio")
def spectral_gap(layer: LayerUpdate) -> float:
    """σ1 / σ2"""
    values = _spectrum(layer).values
    if len(values) < 2:
        raise Skip("the layer has one singular value")
    if float(values[1]) <= 1e-7 * float(values[0]):
        raise Skip("the update has rank one")
    return float(values[0] / values[1])


@measures("layer", unit="values", reference="Marchenko & Pastur 1967; Johnstone 2001")
def values_above_edge(layer: LayerUpdate) -> Value:
    """Number of singular values above the noise edge σ(√m + √n) and its finite-size margin.

    The edge is that of independent entries of one variance; sparse or row-scaled noise has values
    above it as well.
    """
    spectrum = _spectrum(layer)
    bound = () if spectrum.complete else ("a lower bound: there are more",)
    return Value(float(spectrum.above_edge), (f"noise edge {spectrum.noise_edge:.6g}", *bound))


@measures("layer", unit="fraction", reference="Marchenko & Pastur 1967; threats K5")
def excess_energy(layer: LayerUpdate) -> float:
    """Σ_{σi above the edge} (σi² − edge²) / ‖ΔW‖F²"""
    return _spectrum(layer).excess_energy


@measures("layer", unit="index", reference=_PROJLENS)
def knee(layer: LayerUpdate) -> float:
    """Number of leading values before the sorted spectrum turns flat."""
    if len(_spectrum(layer).values) < 3:
        raise Skip("fewer than three singular values")
    return float(layer.spectrum.knee)


def series(layer: LayerUpdate) -> tuple[Series, ...]:
    """Spectrum and cumulative energy of a layer's update, beside its noise edge and both nulls.

    A Gaussian update of equal norm is drawn at its expectation (Marchenko–Pastur quantiles); the
    update of equal spectrum has these very values, in random directions.
    """
    from projaudit.analyses.nulls import gaussian_values

    spectrum, (m, n) = layer.spectrum, layer.delta.shape
    if spectrum.frobenius == 0.0:
        return ()
    values = [float(v) for v in spectrum.values]
    curves = {
        "update": values,
        "null: equal norm": gaussian_values(m, n, spectrum.frobenius, len(values)).tolist(),
        "null: equal spectrum": values,
    }
    found = [
        Series("spectrum", layer.subject, label, _index(curve), tuple(curve))
        for label, curve in curves.items()
    ]
    edge = (spectrum.noise_edge,) * 2
    found.append(Series("spectrum", layer.subject, "noise edge", (1.0, float(len(values))), edge))
    return (
        *found,
        *(
            Series("energy", layer.subject, label, (0.0, *_index(curve)), energy)
            for label, curve in curves.items()
            if (energy := _cumulative(curve, spectrum.frobenius))
        ),
    )


def _index(curve: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(i + 1) for i in range(len(curve)))


def _cumulative(curve: Sequence[float], frobenius: float) -> tuple[float, ...]:
    """0, σ1²/F², (σ1² + σ2²)/F², …"""
    return tuple(min(e, 1.0) for e in accumulate((v / frobenius) ** 2 for v in (0.0, *curve)))
