"""The spectrum of the update: where its energy is, and what stands out of the noise."""

from __future__ import annotations

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
def leading_singular_value(layer: LayerUpdate) -> float:
    """σ1 of ΔW"""
    return float(_spectrum(layer).values[0])


def _energy(layer: LayerUpdate, k: int) -> float:
    """Σ_{i≤k} σi² / ‖ΔW‖F²"""
    spectrum = _spectrum(layer)
    if k > len(spectrum.values) and len(spectrum.values) < min(layer.delta.shape):
        raise Skip(f"only {len(spectrum.values)} singular values were asked for")
    return min(float((spectrum.values[:k].double() / spectrum.frobenius).square().sum()), 1.0)


@measures("layer", unit="fraction", reference=_PROJLENS)
def top1_energy(layer: LayerUpdate) -> float:
    """σ1² / ‖ΔW‖F²"""
    return _energy(layer, 1)


@measures("layer", unit="fraction", reference=_PROJLENS)
def top5_energy(layer: LayerUpdate) -> float:
    """Σ_{i≤5} σi² / ‖ΔW‖F²"""
    return _energy(layer, 5)


@measures("layer", unit="fraction", reference=_PROJLENS)
def top30_energy(layer: LayerUpdate) -> float:
    """Σ_{i≤30} σi² / ‖ΔW‖F²"""
    return _energy(layer, 30)


@measures("layer", reference="Rudelson & Vershynin 2007")
def stable_rank(layer: LayerUpdate) -> float:
    """‖ΔW‖F² / σ1²"""
    return 1.0 / _energy(layer, 1)


@measures("layer", reference="Roy & Vetterli 2007")
def effective_rank(layer: LayerUpdate) -> float:
    """exp(−Σ pi ln pi), pi = σi / Σσ"""
    return float(_spectrum(layer).effective_rank)


@measures("layer", unit="ratio")
def spectral_gap(layer: LayerUpdate) -> float:
    """σ1 / σ2"""
    values = _spectrum(layer).values
    if len(values) < 2:
        raise Skip("the layer has one singular value")
    if float(values[1]) <= 1e-7 * float(values[0]):
        raise Skip("the update has rank one")
    return float(values[0] / values[1])


@measures("layer", unit="values", reference="Marchenko & Pastur 1967")
def values_above_edge(layer: LayerUpdate) -> Value:
    """Number of singular values above the Marchenko–Pastur edge σ(√m + √n) of the bulk."""
    spectrum = _spectrum(layer)
    return Value(float(spectrum.above_edge), (f"noise edge {spectrum.noise_edge:.6g}",))


@measures("layer", unit="fraction", reference="Marchenko & Pastur 1967; threats K5")
def excess_energy(layer: LayerUpdate) -> float:
    """Σ_{σi > edge} (σi² − edge²) / ‖ΔW‖F²"""
    spectrum = _spectrum(layer)
    values = spectrum.values.double()
    above = values[values > spectrum.noise_edge]
    excess = above.square() - spectrum.noise_edge**2
    return float(excess.sum()) / spectrum.frobenius**2


@measures("layer", unit="index", reference=_PROJLENS)
def knee(layer: LayerUpdate) -> float:
    """Index after which the leading values are flat: farthest point below the chord σ1 … σk."""
    values = _spectrum(layer).values.double()
    if len(values) < 3 or float(values[0] - values[-1]) <= 0:
        raise Skip("too few distinct singular values")
    height = ((values - values[-1]) / (values[0] - values[-1])).tolist()
    last = len(height) - 1
    return float(max(range(len(height)), key=lambda i: 1 - i / last - height[i]))


def series(layer: LayerUpdate) -> tuple[Series, ...]:
    """Spectrum and cumulative energy of a layer's update, with its noise edge."""
    spectrum = layer.spectrum
    if spectrum.frobenius == 0.0:
        return ()
    values = tuple(float(v) for v in spectrum.values)
    index = tuple(float(i + 1) for i in range(len(values)))
    energy = [0.0]
    for value in values:
        energy.append(energy[-1] + (value / spectrum.frobenius) ** 2)
    return (
        Series("spectrum", layer.subject, "update", index, values),
        Series(
            "spectrum",
            layer.subject,
            "noise edge",
            (index[0], index[-1]),
            (spectrum.noise_edge, spectrum.noise_edge),
        ),
        Series("energy", layer.subject, "update", (0.0, *index), tuple(energy)),
    )
