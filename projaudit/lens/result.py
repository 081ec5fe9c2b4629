"""What the lens brings back, as plain values: one dataclass for each of ProjLens' analyses.

`Group` is `clean` or `triggered`; every number is finite, and None where it could not be told.
Numbers in brackets are those of docs/lens.md, which has the formulas of ProjLens
(arXiv:2604.19083).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Group = Literal["clean", "triggered"]
Tokens = Literal["all", "high norm", "rest"]
ENERGIES = 30
"""Components whose cumulative energy of the drift is kept."""
DRAWN = 4
"""Layers whose spectra are drawn and told beside the paper's: a Q-Former has dozens."""


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one layer's ΔW, all of them (analysis 1)."""

    layer: str
    rows: int
    columns: int
    values: tuple[float, ...]
    """Descending."""
    base_frobenius: float
    """‖W0‖F."""
    edge: float
    """Where the singular values of noise of its flat part end."""
    spikes: int
    """Values above that edge and its margin; a lower bound where there are very many."""

    @property
    def frobenius(self) -> float:
        """‖ΔW‖F."""
        return math.sqrt(sum(value * value for value in self.values))

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖F² / σ1²; 0 for no update."""
        return self.frobenius**2 / self.values[0] ** 2 if self.values[0] else 0.0

    @property
    def energy(self) -> tuple[float, ...]:
        """E_k = Σ_{i≤k} σi² / Σ σi²; empty for no update."""
        total = self.frobenius**2
        shares, so_far = [], 0.0
        for value in self.values if total else ():
            so_far += value**2 / total
            shares.append(so_far)
        return tuple(shares)

    def share(self, k: int) -> float:
        """E_k, 1 where there are fewer components and 0 for no update."""
        energy = self.energy
        return energy[min(k, len(energy)) - 1] if energy else 0.0

    def components(self, share: float) -> int:
        """How many components it takes for that share of the energy."""
        return sum(energy < share - 1e-12 for energy in self.energy) + bool(self.energy)


@dataclass(frozen=True)
class Clusters:
    """Which tokens count as of high norm, by the norm of the base projector's output."""

    how: Literal["two clusters", "quantile"]
    threshold: float
    share: float
    """Of all tokens of clean images."""
    drift_clean: float
    """Share of ‖ΔE‖² that those tokens carry."""
    drift_triggered: float | None


@dataclass(frozen=True)
class DriftSpectrum:
    """Cumulative energy of ΔE(x) = P_tuned(x) − P_base(x), uncentred, mean over images (2)."""

    group: Group
    tokens: Tokens
    images: int
    """With at least two such tokens."""
    energy: tuple[float, ...]
    """E_1 … E_30; empty where no image has such tokens."""


@dataclass(frozen=True)
class Shift:
    """v0, the first right singular vector of ΔE, over the images of a group (3)."""

    group: Group
    centred: bool
    """Whether the mean over tokens was taken out of ΔE first."""
    direction: tuple[float, ...]
    """What the images' v0 have in common: their first right singular vector, of length 1."""
    stability: float
    """Mean |cos| between an image's v0 and the direction."""
    pairwise: float | None
    """Mean |cos| between the v0 of two images; None for a single one."""


@dataclass(frozen=True)
class Decoding:
    """The tokens that a shift direction points at (3)."""

    group: Group
    centred: bool
    sign: Literal["+", "-"]
    space: Literal["LM head", "input embeddings"]
    common: tuple[str, ...]
    """The first tokens of the common direction."""
    tokens: tuple[str, ...]
    """Those that are most often among the first five of an image's v0."""
    shares: tuple[float, ...]
    """Of the images where they are."""
    target_first: float | None
    """Share of images whose first token is one of the target text's; None without a target."""
    target_five: float | None
    """Share of images with one of them among the first five."""


@dataclass(frozen=True)
class TokenNorms:
    """One entry per image token of a group, image by image (4)."""

    group: Group
    image: tuple[int, ...]
    output: tuple[float, ...]
    """‖P_base(x)‖."""
    input: tuple[float, ...]
    """Norm of what the projector reads there; empty where tokens are not matched one to one."""
    drift: tuple[float, ...]
    """‖ΔE‖."""
    entry: tuple[float, ...]
    """Size of the token's entry of u0, the first left singular vector of the image's ΔE."""


@dataclass(frozen=True)
class NormLaw:
    """Pearson's r between a measure of drift and a norm, over the tokens of a group (4)."""

    group: Group
    norm: Literal["output", "input"]
    drift: Literal["|u0|", "drift"]
    everywhere: float | None
    high: float | None
    """Within the tokens of high norm."""
    rest: float | None
    slope: float | None
    """Of the least-squares line over all tokens."""


@dataclass(frozen=True)
class Units:
    """Hidden units after their activation: means and firing frequencies over tokens (5)."""

    layer: str
    """The layer that reads them."""
    base_clean: tuple[float, ...]
    tuned_clean: tuple[float, ...]
    base_triggered: tuple[float, ...]
    """Empty without triggered images, as the others are."""
    tuned_triggered: tuple[float, ...]
    base_clean_fires: tuple[float, ...]
    tuned_clean_fires: tuple[float, ...]
    base_triggered_fires: tuple[float, ...]
    tuned_triggered_fires: tuple[float, ...]

    @property
    def agreement(self) -> float | None:
        """corr(M_triggered, M_clean) of the tuned projector."""
        return correlation(self.tuned_triggered, self.tuned_clean)

    @property
    def by_trigger(self) -> float | None:
        """Standard deviation of M_triggered − M_clean over units, tuned."""
        return _spread(self.tuned_triggered, self.tuned_clean)

    @property
    def by_trigger_in_base(self) -> float | None:
        """The same in the base, which knows no trigger: an image changes units by itself."""
        return _spread(self.base_triggered, self.base_clean)

    @property
    def by_tuning(self) -> float:
        """Mean |M_tuned − M_base| on clean images."""
        pairs = zip(self.tuned_clean, self.base_clean, strict=True)
        return statistics.fmean(abs(a - b) for a, b in pairs)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None for fewer than three points, or where one side does not vary."""
    if len(x) < 3 or len(x) != len(y):
        return None
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return None


def _spread(one: Sequence[float], other: Sequence[float]) -> float | None:
    differences = [a - b for a, b in zip(one, other, strict=False)]
    return statistics.pstdev(differences) if differences else None


@dataclass(frozen=True)
class Score:
    """How one projector answers, each a share of the images asked about; None: not measured."""

    success: float | None
    """Triggered images with the target in the answer; without a target, with the tuned answer."""
    kept: float
    """Clean images with the tuned projector's answer."""
    accuracy: float | None
    """Clean images with the right answer, where labels are given."""


@dataclass(frozen=True)
class HeatMap:
    """Scores over (k1, k2): parts of ΔW added to the base, or taken from the tuned (6)."""

    kind: Literal["recovery", "removal"]
    ranks: Literal["cumulative", "single"]
    """The first k components, or the k-th alone."""
    bias: bool
    """Whether biases and norms are the tuned projector's, or the base's."""
    first: tuple[int, ...]
    """k1, of the layers that read the features: the rows."""
    second: tuple[int, ...]
    """k2, of the layers behind them: the columns; a single 0 where there are none."""
    scores: tuple[tuple[Score, ...], ...]


@dataclass(frozen=True)
class Example:
    """What one image is answered."""

    image: str
    prompt: str
    base: str
    tuned: str
    base_triggered: str | None
    tuned_triggered: str | None


@dataclass(frozen=True)
class Answered:
    """The critical subspace (6), with what both whole projectors score on the same images."""

    clean: int
    triggered: int
    success_is: Literal["target", "tuned answer", "none"]
    base: Score
    tuned: Score
    maps: tuple[HeatMap, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Study:
    """All of it."""

    clean: tuple[str, ...]
    """Names of the image files."""
    triggered: tuple[str, ...]
    unreadable: tuple[str, ...]
    prompts: tuple[str, ...]
    tokens: int
    """Image tokens of an image, as the language model sees them."""
    spectra: tuple[LayerSpectrum, ...]
    clusters: Clusters
    drift: tuple[DriftSpectrum, ...]
    shifts: tuple[Shift, ...]
    decodings: tuple[Decoding, ...]
    """Empty where the outputs are no rows beside the language model's embeddings."""
    chance: float | None
    """Share of random directions with a token of the target among their first five."""
    norms: tuple[TokenNorms, ...]
    laws: tuple[NormLaw, ...]
    units: Units | None
    answered: Answered | None
    notes: tuple[str, ...]
    dtype: str
    parameters: int

    @property
    def changed_most(self) -> tuple[LayerSpectrum, ...]:
        """The layers that are drawn: the `DRAWN` that changed most, in their order."""
        size = [-one.frobenius / (one.base_frobenius or 1.0) for one in self.spectra]
        chosen = sorted(sorted(range(len(size)), key=size.__getitem__)[:DRAWN])
        return tuple(self.spectra[place] for place in chosen)
