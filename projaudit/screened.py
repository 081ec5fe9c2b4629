"""What a screening of a fine-tuning set brings back, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Fate = Literal["drop", "apart", "keep", "unread"]


@dataclass(frozen=True)
class ScreenedSample:
    """One sample, what becomes of it, and by what evidence; all texts are untrusted."""

    number: int
    """Its place in the dataset."""
    id: str
    fate: Fate
    """`drop`; `apart`: set apart, and kept; `keep`; `unread`: nothing is known of it."""
    status: str
    """`ok`, or the code of why it has no profile."""
    detail: str = ""
    bye: float | None = None
    """Posterior of the low mode of entropy; None where BYE found nothing or did not run."""
    tcap: float | None = None
    """Posterior over the heads' votes; None as above."""
    joint: float | None = None
    """Held-out score of the group that all heads together set it apart in; None where in none."""
    departure: float | None = None
    """Held-out score of the attention before the text; above 0 is like those that say it."""
    text: str = ""
    """The text for which it is dropped or set apart."""
    question: str = ""
    answer: str = ""

    @property
    def subject(self) -> str:
        return f"sample/{self.number}"


@dataclass(frozen=True)
class NamedWord:
    """A word in the rest of the answers that goes with a text both ways, nine times in ten."""

    word: str
    answers: int
    """Answers with that word before the text, or without the text."""
    holders: int
    """Of these, the ones that end with the text."""


@dataclass(frozen=True)
class SharedText:
    """A text that answers end with whatever was asked, and what the attention before it tells."""

    text: str
    samples: int
    explained: float
    """AUROC of the questions' words for it: ½ where they tell nothing."""
    markers: tuple[str, ...]
    """Words that nearly all its questions hold and nearly no other: a trigger in the text."""
    replaces: bool
    """It stands instead of the answer; else behind it."""
    auroc: float | None
    """Of the attention in the row before it; None where that cannot be told."""
    confirmed: bool
    """Its samples are dropped."""
    unknown: str = ""
    """Why the attention cannot be told."""
    named: NamedWord | None = None
    """What the answers name that end with it, and no others; None where there is no such word."""
    apart: bool = False
    """The attention tells that it comes, and so does what the answers name: set apart, and kept."""


@dataclass(frozen=True)
class SharedAttention:
    """Samples that all heads together set apart, and what becomes of them."""

    samples: int
    valley: float
    """p-value of the valley between them and the others."""
    fate: Literal["drop", "apart", "keep"]
    says: str
    """Why."""


@dataclass(frozen=True)
class Histogram:
    """Values that a detector split, with the mixture that it fitted to them."""

    kind: Literal["bye-layer", "bye-mean", "tcap-head", "joint", "departure"]
    subject: str
    """`layer 3`, `layer 3, head 2`, `100 samples`, or the text."""
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    """Samples by bin that the method leaves."""
    taken: tuple[int, ...]
    """Samples by bin that it sets apart."""
    curve: tuple[tuple[float, float, float], ...] = ()
    """(x, density of the group set apart, density of the rest), in samples a bin."""
    statistic: float | None = None
    """BSI of a layer, SS of a head, AUROC of a departure."""


@dataclass(frozen=True)
class HeatMap:
    """Attention of one row of a sample over its image."""

    number: int
    fate: Fate
    where: str
    """Which row, layer and head."""
    share: float
    """Of that row's attention that falls on the image."""
    picture: bytes
    """PNG: the image with the attention laid over it."""


@dataclass(frozen=True)
class Screened:
    """One screening of one set."""

    dataset: str
    method: Literal["bye", "tcap", "both"]
    samples: int
    fates: Mapping[Fate, int]
    statuses: Mapping[str, int]
    """Samples by status, `ok` among them."""
    layers: int
    """Layers whose attention was read."""
    layers_left_out: int
    """Layers of the language model that have no attention over the sequence."""
    later_answers: int
    """Samples with further answers, which were not looked at."""
    texts: tuple[SharedText, ...]
    groups: tuple[SharedAttention, ...]
    nothing: tuple[str, ...]
    """Why a method found nothing to remove."""
    common_text: str
    """What more than half of the answers end with; empty where there is no such text."""
    common_share: float
    shown: tuple[ScreenedSample, ...]
    """Those to drop, apart and unread, most certain first; at most `SHOWN` of each."""
    histograms: tuple[Histogram, ...] = ()
    heat: tuple[HeatMap, ...] = ()
    files: tuple[str, ...] = ()
    """Lists and datasets that were written."""


SHOWN = 200
"""Samples of each fate that a report names; the lists hold all."""
