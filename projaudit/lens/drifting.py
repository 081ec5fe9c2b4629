"""Both projectors' outputs, image by image, and what is drawn from them: analyses 2 to 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.lens.capture import Both, UnitMeans, input_norms, plain
from projaudit.lens.drift import (
    Direction,
    common_direction,
    drift_energy,
    high_norm,
    pearson,
    shift_direction,
)
from projaudit.lens.result import (
    Clusters,
    DriftSpectrum,
    Group,
    NormLaw,
    Shift,
    TokenNorms,
    Tokens,
    Units,
)


@dataclass(frozen=True)
class Shifted:
    """A shift with the directions of the single images."""

    shift: Shift
    directions: Tensor
    """(images, d)."""
    common: Tensor


@dataclass(frozen=True)
class Drifts:
    """Analyses 2 to 5."""

    tokens: int
    clusters: Clusters
    spectra: tuple[DriftSpectrum, ...]
    shifts: tuple[Shifted, ...]
    norms: tuple[TokenNorms, ...]
    laws: tuple[NormLaw, ...]
    units: Units | None


@dataclass(frozen=True)
class _Image:
    """What is kept of one image."""

    output: Tensor
    read: Tensor | None
    drift: Tensor
    entry: Tensor
    energies: Mapping[Tokens, Tensor | None]
    directions: Mapping[bool, Direction | None]


def drifted(
    both: Both, features: Mapping[str, Tensor], tell: Callable[[str, int, int], None]
) -> Drifts:
    """What both projectors make of the features (images, tokens, in) of each group.

    Raises CouldNotProbe where the outputs do not differ anywhere.
    """
    norms = [base.norm(dim=-1) for base, _ in both.outputs(features["clean"])]
    threshold, how = high_norm(torch.cat(norms))
    images: dict[Group, list[_Image]] = {}
    units: dict[Group, tuple[UnitMeans, UnitMeans]] = {}
    groups: Sequence[Group] = ("clean", "triggered")
    for group in groups:
        if group not in features:
            continue
        images[group], units[group] = [], (UnitMeans(), UnitMeans())
        for base, tuned in both.outputs(features[group], units[group]):
            place = len(images[group])
            images[group].append(_one(base, tuned, features[group][place], threshold))
            tell(f"drift of {group} images", place + 1, len(features[group]))
    if not any(float(one.drift.max()) > 0 for found in images.values() for one in found):
        raise CouldNotProbe("both projectors give the same outputs: there is no drift to look at")
    return Drifts(
        tokens=len(norms[0]),
        clusters=_clusters(threshold, how, images),
        spectra=tuple(
            _energies(group, which, found)
            for group, found in images.items()
            for which in ("all", "high norm", "rest")
        ),
        shifts=tuple(
            shifted
            for group, found in images.items()
            for centred in (False, True)
            if (shifted := _shifted(group, centred, found)) is not None
        ),
        norms=tuple(_norms(group, found) for group, found in images.items()),
        laws=tuple(
            law for group, found in images.items() for law in _laws(group, found, threshold)
        ),
        units=_units(both.reader, units),
    )


def _one(base: Tensor, tuned: Tensor, features: Tensor, threshold: float) -> _Image:
    delta, norms = tuned - base, base.norm(dim=-1)
    high = norms >= threshold
    plainly = shift_direction(delta, norms, centred=False)
    parts: Mapping[Tokens, Tensor] = {"all": delta, "high norm": delta[high], "rest": delta[~high]}
    return _Image(
        output=norms.cpu(),
        read=input_norms(features, len(norms)),
        drift=delta.norm(dim=-1).cpu(),
        entry=(plainly.entries.abs() if plainly else torch.zeros(len(norms))).cpu(),
        energies={n: drift_energy(rows) if len(rows) > 1 else None for n, rows in parts.items()},
        directions={False: plainly, True: shift_direction(delta, norms, centred=True)},
    )


def _clusters(threshold: float, how: Any, images: Mapping[Group, Sequence[_Image]]) -> Clusters:
    def carried(found: Sequence[_Image]) -> float:
        every = sum(float(one.drift.double().square().sum()) for one in found)
        high = sum(
            float(one.drift.double()[one.output >= threshold].square().sum()) for one in found
        )
        return high / every if every else 0.0

    tokens = torch.cat([one.output for one in images["clean"]])
    return Clusters(
        how=how,
        threshold=threshold,
        share=float((tokens >= threshold).double().mean()),
        drift_clean=carried(images["clean"]),
        drift_triggered=carried(images["triggered"]) if "triggered" in images else None,
    )


def _energies(group: Group, which: Tokens, found: Sequence[_Image]) -> DriftSpectrum:
    rows = [e for one in found if (e := one.energies[which]) is not None and float(e[-1]) > 0]
    mean = plain(torch.stack(rows).mean(0)) if rows else ()
    return DriftSpectrum(group, which, len(rows), mean)


def _shifted(group: Group, centred: bool, found: Sequence[_Image]) -> Shifted | None:
    rows = [d.direction for one in found if (d := one.directions[centred]) is not None]
    if not rows:
        return None
    directions = torch.stack(rows)
    common, stability, pairwise = common_direction(directions)
    shift = Shift(group, centred, plain(common), stability, pairwise)
    return Shifted(shift, directions, common)


def _norms(group: Group, found: Sequence[_Image]) -> TokenNorms:
    read = [one.read for one in found if one.read is not None]
    return TokenNorms(
        group=group,
        image=tuple(i for i, one in enumerate(found) for _ in range(len(one.output))),
        output=plain(torch.cat([one.output for one in found])),
        input=plain(torch.cat(read)) if len(read) == len(found) else (),
        drift=plain(torch.cat([one.drift for one in found])),
        entry=plain(torch.cat([one.entry for one in found])),
    )


def _laws(group: Group, found: Sequence[_Image], threshold: float) -> list[NormLaw]:
    output = torch.cat([one.output for one in found])
    reads = [one.read.cpu() for one in found if one.read is not None]
    norms = {"output": output, **({"input": torch.cat(reads)} if len(reads) == len(found) else {})}
    drifts = {
        "|u0|": torch.cat([one.entry for one in found]),
        "drift": torch.cat([one.drift for one in found]),
    }
    high = output >= threshold
    laws = []
    for norm, x in norms.items():
        for drift, y in drifts.items():
            everywhere, slope = pearson(x, y)
            inside, rest = (pearson(x[rows], y[rows])[0] for rows in (high, ~high))
            laws.append(NormLaw(group, norm, drift, everywhere, inside, rest, slope))  # type: ignore[arg-type]
    return laws


def _units(reader: str, units: Mapping[Group, tuple[UnitMeans, UnitMeans]]) -> Units | None:
    if not reader or units["clean"][0].tokens == 0:
        return None
    nothing = (UnitMeans(), UnitMeans())
    base_clean, tuned_clean = (one.over_tokens() for one in units["clean"])
    base_marked, tuned_marked = (one.over_tokens() for one in units.get("triggered", nothing))
    return Units(
        layer=reader,
        base_clean=base_clean[0],
        tuned_clean=tuned_clean[0],
        base_triggered=base_marked[0],
        tuned_triggered=tuned_marked[0],
        base_clean_fires=base_clean[1],
        tuned_clean_fires=tuned_clean[1],
        base_triggered_fires=base_marked[1],
        tuned_triggered_fires=tuned_marked[1],
    )
