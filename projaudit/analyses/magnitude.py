"""How far the weights moved: norms, changed entries, biases and other 1-D tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from projaudit.metrics import Skip, Value, measures

if TYPE_CHECKING:
    from torch import Tensor

    from projaudit.analyses.context import ProjectorContext
    from projaudit.update import LayerUpdate, VectorUpdate


def frobenius(tensor: Tensor) -> float:
    """‖A‖F; the import waits, so that the names of metrics are known without torch."""
    from projaudit.lanczos import frobenius as norm

    return norm(tensor)


@measures("layer", unit="ratio")
def relative_norm(layer: LayerUpdate) -> float:
    """‖ΔW‖F / ‖W0‖F"""
    return frobenius(layer.delta) / frobenius(layer.before)


@measures("layer", kind="structure", unit="cosine")
def base_cosine(layer: LayerUpdate) -> float:
    """⟨W0, W1⟩ / (‖W0‖F ‖W1‖F): how much the tuned layer still is the base's."""
    before, after = frobenius(layer.before), frobenius(layer.after)
    if before == 0.0 or after == 0.0:
        return 0.0
    products = ((layer.before / before) * (layer.after / after)).sum(dim=1)
    return float(products.double().sum())


@measures("layer", kind="structure", unit="ratio")
def norm_ratio(layer: LayerUpdate) -> float:
    """‖W1‖F / ‖W0‖F"""
    return frobenius(layer.after) / frobenius(layer.before)


@measures("layer", kind="structure", unit="fraction")
def changed_fraction(layer: LayerUpdate) -> float:
    """Share of the weights that moved beyond the rounding of the coarser storage dtype."""
    return layer.changed_fraction


@measures("layer", kind="structure", unit="ratio")
def rounding_floor(layer: LayerUpdate) -> float:
    """Relative norm that storage rounding alone would give: √(Σ ulp²/12) / ‖W0‖F."""
    return layer.rounding_floor


# Times what rounding alone gives. Rounding to the nearest stays below 1.25. GPTQ, which makes up
# for its errors in later columns, gave 1.0 to 3.0 times the norm and 1 to 21 times the edge, by the
# correlations and outliers of what it was calibrated on; so its spectrum tells nothing.
_SEEN, _SEEN_CALIBRATED = 2.0, 3.0


@measures("layer", kind="structure")
def quantised(layer: LayerUpdate) -> float:
    """1 where base or target stores this layer in codes of 8 bits or less."""
    return float(layer.quantised)


@measures("layer", kind="structure", unit="ratio")
def detection_limit(layer: LayerUpdate) -> float:
    """Relative norm from which an update stands out of storage rounding: 2 or 3 times its floor.

    3 where the quantiser does not round to the nearest.
    """
    return _limit(layer)


@measures("layer", kind="structure")
def smallest_spike(layer: LayerUpdate) -> float:
    """σ from which one direction stands out of quantisation: twice where its rounding's σ end.

    That of the detection limit where the quantiser does not round to the nearest.
    """
    if not layer.quantised:
        raise Skip("neither side is quantised")
    return _spike(layer)


@measures("layer", kind="structure", unit="ratio")
def above_rounding(layer: LayerUpdate) -> Value:
    """The greater of norm / detection limit and σ1 / smallest spike; seen from 1 on.

    The norm alone where neither side is quantised.
    """
    limit = _limit(layer)
    found = frobenius(layer.delta) / frobenius(layer.before) / _floor(limit)
    if not layer.quantised:
        return Value(found)
    spike = _spike(layer)
    shown = f"{limit:.2%} of ‖W0‖", f"or σ {spike:.2g} in one direction"
    return Value(max(found, float(layer.spectrum.values[0]) / _floor(spike)), shown)


def _limit(layer: LayerUpdate) -> float:
    return (_SEEN_CALIBRATED if layer.calibrated else _SEEN) * layer.rounding_floor


def _spike(layer: LayerUpdate) -> float:
    limit = _limit(layer) if layer.calibrated else _SEEN * layer.rounding_edge
    return limit * frobenius(layer.before)


def _floor(limit: float) -> float:
    return max(limit, 1e-12)  # scales may be zero throughout


@measures("layer", unit="ratio")
def bias_shift(layer: LayerUpdate) -> float:
    """‖b1 − b0‖ / ‖b0‖, or / ‖W0‖F (outputs of unit-RMS inputs) where the base's bias is zero."""
    before, after = layer.before_bias, layer.after_bias
    if before is None and after is None:
        raise Skip("the layer has no bias")
    size = 0.0 if before is None else frobenius(before)
    if before is None or after is None:
        change = frobenius(after if before is None else before)  # type: ignore[arg-type]
    else:
        change = frobenius(after - before)
    return change / (size or frobenius(layer.before))


@measures("vector", unit="ratio")
def vector_shift(vector: VectorUpdate) -> float:
    """‖v1 − v0‖ / ‖v0‖ of a norm, newline or position embedding."""
    return _relative(vector.before, vector.after)


@measures("projector", kind="structure", unit="entries")
def nonfinite_count(context: ProjectorContext) -> Value:
    """Number of NaN and Inf entries in the target's projector."""
    found = context.update.nonfinite
    return Value(float(sum(found.values())), tuple(f"{role}: {n}" for role, n in found.items()))


@measures("projector", kind="structure")
def projector_unchanged(context: ProjectorContext) -> float:
    """1 where nothing differs beyond storage rounding, biases and 1-D tensors included."""
    return float(context.update.unchanged)


@measures("layer", kind="structure", unit="units")
def permuted_units(layer: LayerUpdate) -> float:
    """Hidden units that stand in another place than in the base (undone before measuring)."""
    return float(layer.permuted_units)


@measures("layer", kind="structure", unit="units")
def rescaled_units(layer: LayerUpdate) -> float:
    """Hidden units rescaled with the inverse in the next layer, ReLU only (undone)."""
    return float(layer.rescaled_units)


@measures("layer", kind="structure")
def rotated_output(layer: LayerUpdate) -> float:
    """1 where the output space was rotated together with the embeddings (undone)."""
    return float(layer.rotated)


def _relative(before: Tensor, after: Tensor) -> float:
    size, change = frobenius(before), frobenius(after - before)
    if size == 0.0 and change > 0.0:
        raise Skip("it is zero in the base, so that no ratio can be formed")
    return change / size if change else 0.0
