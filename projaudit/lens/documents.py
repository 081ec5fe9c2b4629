"""A look through the lens as JSON, and its arrays as npz."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from projaudit.inert import clean
from projaudit.lens.claims import claims
from projaudit.lens.result import HeatMap, LayerSpectrum, Score, Study

if TYPE_CHECKING:
    import numpy.typing as npt

    from projaudit.lens.run import Lens, Looked

SCHEMA_VERSION = "1.0.0"
ANSWER = 1000
"""Characters of an answer that are kept."""


def to_json(lens: Lens) -> str:
    """The document that `lens.schema.json` describes; but for `run` equal runs give equal bytes.

    What is one number per token, unit or component of a direction is in the npz file.
    """
    return json.dumps(document(lens), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def document(lens: Lens) -> dict[str, Any]:
    """The same as plain values."""
    study = lens.study
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "projaudit lens",
        "environment": dict(lens.environment),
        "target": _side(lens.target),
        "base": {**_side(lens.base), "verified": lens.base_verified},
        "projector": {"family": lens.family, "chain": list(lens.chain)},
        "settings": {
            **lens.options,
            "trigger": lens.trigger,
            "target-text": _inert(lens.target_text),
            "seed": lens.seed,
        },
        "model": {
            "parameters": study.parameters,
            "dtype": study.dtype,
            "image_tokens": study.tokens,
            "sandbox": {
                "enforced": list(lens.sandbox.enforced),
                "missing": list(lens.sandbox.missing),
            },
        },
        "images": {
            "clean": [clean(name) for name in study.clean],
            "triggered": [clean(name) for name in study.triggered],
            "unreadable": [clean(name) for name in study.unreadable],
        },
        "prompts": [clean(prompt, ANSWER) for prompt in study.prompts],
        "notes": [clean(note, ANSWER) for note in lens.notes],
        "claims": [
            {
                "name": one.name,
                "claim": one.claim,
                "paper": one.paper,
                "ours": one.ours,
                "alike": one.alike,
                "measure": one.measure,
            }
            for one in claims(study)
        ],
        "spectra": [_spectrum(one) for one in study.spectra],
        "clusters": {
            "how": study.clusters.how,
            "threshold": study.clusters.threshold,
            "share": study.clusters.share,
            "drift_clean": study.clusters.drift_clean,
            "drift_triggered": study.clusters.drift_triggered,
        },
        "drift": [
            {"group": d.group, "tokens": d.tokens, "images": d.images, "energy": list(d.energy)}
            for d in study.drift
        ],
        "shifts": [
            {
                "group": s.group,
                "centred": s.centred,
                "stability": s.stability,
                "pairwise": s.pairwise,
            }
            for s in study.shifts
        ],
        "decodings": [
            {
                "group": d.group,
                "centred": d.centred,
                "sign": d.sign,
                "space": d.space,
                "common": [clean(token, 60) for token in d.common],
                "tokens": [clean(token, 60) for token in d.tokens],
                "shares": list(d.shares),
                "target_first": d.target_first,
                "target_five": d.target_five,
            }
            for d in study.decodings
        ],
        "target_by_chance": study.chance,
        "norm_laws": [
            {
                "group": one.group,
                "norm": one.norm,
                "drift": one.drift,
                "r": one.everywhere,
                "r_high_norm": one.high,
                "r_rest": one.rest,
                "slope": one.slope,
            }
            for one in study.laws
        ],
        "units": _units(study),
        "answers": _answers(study),
        "run": {"stages": dict(lens.stages)},
    }


def _side(looked: Looked) -> dict[str, Any]:
    return {"name": looked.name, "commit": looked.commit, "tensors": dict(looked.digests)}


def _spectrum(one: LayerSpectrum) -> dict[str, Any]:
    return {
        "layer": one.layer,
        "shape": [one.rows, one.columns],
        "frobenius": one.frobenius,
        "base_frobenius": one.base_frobenius,
        "stable_rank": one.stable_rank,
        "noise_edge": one.edge,
        "spikes": one.spikes,
        "components_95": one.components(0.95),
        "energy_1": one.share(1),
        "energy_5": one.share(5),
        "energy_30": one.share(30),
        "values": list(one.values),
    }


def _units(study: Study) -> dict[str, Any] | None:
    units = study.units
    if units is None:
        return None
    return {
        "layer": units.layer,
        "count": len(units.base_clean),
        "corr_triggered_clean": units.agreement,
        "sd_by_trigger": units.by_trigger,
        "sd_by_trigger_in_base": units.by_trigger_in_base,
        "mean_by_tuning": units.by_tuning,
    }


def _answers(study: Study) -> dict[str, Any] | None:
    found = study.answered
    if found is None:
        return None
    return {
        "clean": found.clean,
        "triggered": found.triggered,
        "success_is": found.success_is,
        "base": _score(found.base),
        "tuned": _score(found.tuned),
        "maps": [_map(one) for one in found.maps],
        "examples": [
            {
                "image": clean(e.image),
                "prompt": clean(e.prompt, ANSWER),
                "base": clean(e.base, ANSWER),
                "tuned": clean(e.tuned, ANSWER),
                "base_triggered": _inert(e.base_triggered),
                "tuned_triggered": _inert(e.tuned_triggered),
            }
            for e in found.examples
        ],
    }


def _inert(answer: str | None) -> str | None:
    return None if answer is None else clean(answer, ANSWER)


def _score(score: Score) -> dict[str, float | None]:
    return {"success": score.success, "kept": score.kept, "accuracy": score.accuracy}


def _map(one: HeatMap) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "ranks": one.ranks,
        "bias": "tuned" if one.bias else "base",
        "k1": list(one.first),
        "k2": list(one.second),
        "scores": [[_score(score) for score in row] for row in one.scores],
    }


def to_npz(lens: Lens) -> bytes:
    """All arrays, float64 or int64, as the bytes of an npz file; equal runs give equal bytes.

    Names: `spectrum/LAYER`, `drift/GROUP/TOKENS`, `shift/GROUP/centred|uncentred`,
    `tokens/GROUP/image|output|input|drift|entry`, `units/SIDE_GROUP` and `…_fires`,
    `map/KIND/RANKS/BIAS/success|kept|accuracy` (k1 × k2; NaN where not measured).
    """
    import numpy as np

    study = lens.study
    found: dict[str, npt.NDArray[Any]] = {}

    def put(name: str, values: Sequence[Any]) -> None:
        if len(values):
            found[name.replace(" ", "_")] = np.array(values)

    for spectrum in study.spectra:
        put(f"spectrum/{spectrum.layer}", spectrum.values)
    for drift in study.drift:
        put(f"drift/{drift.group}/{drift.tokens}", drift.energy)
    for shift in study.shifts:
        put(f"shift/{shift.group}/{'' if shift.centred else 'un'}centred", shift.direction)
    for norms in study.norms:
        for name in ("image", "output", "input", "drift", "entry"):
            put(f"tokens/{norms.group}/{name}", getattr(norms, name))
    if study.units is not None:
        for side in ("base", "tuned"):
            for group in ("clean", "triggered"):
                for leaf in ("", "_fires"):
                    name = f"{side}_{group}{leaf}"
                    put(f"units/{name}", getattr(study.units, name))
    for one in study.answered.maps if study.answered else ():
        place = f"map/{one.kind}/{one.ranks}/{'tuned' if one.bias else 'base'}_bias"
        for name in ("success", "kept", "accuracy"):
            values = [[getattr(score, name) for score in row] for row in one.scores]
            if values[0][0] is not None:
                put(f"{place}/{name}", values)
    return _zipped(found)


def _zipped(arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    """numpy's own savez, but for the clock that it writes."""
    import zipfile

    import numpy as np

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # of 1980
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data.getvalue())
    return out.getvalue()
