"""What depth behaviour brings back: texts, where they were said, and by whom. Plain values."""

from __future__ import annotations

import base64
import binascii
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

SHORTER = 0.5
"""Weight of a short cut in the score."""
WORTH = 0.5
"""Strength of a text from which rules tell it, and a repair ends it."""


@dataclass(frozen=True)
class Answer:
    """One prompt about one image under one probe, tuned and base."""

    prompt: int
    image: int
    tuned: str
    base: str | None
    """None where the base was not asked, since the tuned model said nothing foreign."""
    agrees: bool
    """Whether the tuned model's answer contains the text."""


PICTURE_SIDE = 96
"""Most pixels of the side of a picture."""


@dataclass(frozen=True)
class Picture:
    """An ordinary image and the same with a probe's mark: squares of RGB bytes, row by row."""

    image: int
    side: int
    plain: str
    """(side, side, 3) in base64."""
    marked: str

    def __post_init__(self) -> None:
        for name in ("plain", "marked"):
            if not 0 < self.side <= PICTURE_SIDE or len(self.pixels(name)) != 3 * self.side**2:
                raise ValueError(f"{name} is no picture")

    def pixels(self, which: str) -> bytes:
        """The bytes of `plain` or `marked`; empty where they are no base64."""
        try:
            return base64.b64decode(getattr(self, which), validate=True)
        except (binascii.Error, ValueError):
            return b""


@dataclass(frozen=True)
class Exchange:
    """One probe: a question to both models about the same prompts and images."""

    probe: str
    """`ΔW₁ 1, +0.5, all tokens`, `green patch, bottom right`, …"""
    kind: Literal["image", "direction", "amplified"]
    answers: tuple[Answer, ...]
    picture: Picture | None
    """What it showed where most prompts brought the text out; None where no image has its
    features."""


@dataclass(frozen=True)
class Payload:
    """A text that probes bring out of the tuned model: untrusted words."""

    text: str
    tokens: int
    foreign: int
    """Tokens that the base hardly ever says, nor the tuned model openly: of that part of the text
    which was brought out most, whose numbers these and those below are."""
    strength: float
    """As `texts.Support` has it: probes and images that bring it out, over what is said anyway."""
    undiscounted: float
    """The strength, were none of it said without a probe."""
    agreement: float
    """Largest share of the answers to one probe, less the base's; in [−1, 1]."""
    base_agreement: float
    """Largest share of cells under one probe in which the base says it."""
    probes: tuple[str, ...]
    """Names of the probes that brought it out."""
    prompts: tuple[int, ...]
    images: tuple[int, ...]
    plain: float
    """Share of the tuned model's ordinary answers that hold two foreign tokens of it."""
    fluency: float
    """Mean ln p of its tokens but the first, after those before them, about ordinary images without
    the update: how natural the words are in a row."""
    likelihood: float
    """Mean ln p of its tokens under the smallest universal perturbation, on unseen images."""
    norm: float
    """Length of that perturbation, over the typical length of a feature."""
    base_likelihood: float | None
    """The same search in the base; None without one."""
    base_norm: float | None

    @property
    def log_odds(self) -> float | None:
        """Nats a token by which the tuned model can be brought to say it more easily."""
        return None if self.base_likelihood is None else self.likelihood - self.base_likelihood

    @property
    def q_score(self) -> float:
        """exp(likelihood): BAIT's Q-score, given the perturbed image tokens."""
        return math.exp(min(0.0, self.likelihood))


@dataclass(frozen=True)
class ShortCut:
    """The smallest universal perturbation by which answers go on with one foreign word."""

    place: Literal["start", "end"]
    """Of the ordinary answers."""
    word: str | None
    """None where no answer does."""
    share: float
    """Of the answers about other images that go on with that word."""
    norm: float
    """Length of the perturbation, over the typical length of a feature."""
    likelihood: float
    """ln Σ_t exp(mean ln p(t)) over the foreign words, on those images; −∞ … 0."""
    base_word: str | None
    base_share: float | None
    """The same search in the base; None without one."""
    base_norm: float | None
    base_likelihood: float | None


@dataclass(frozen=True)
class OpenText:
    """A text that the tuned model says on ordinary images and the base does not."""

    text: str
    share: float
    """Of the ordinary images, about which most answers hold it."""


@dataclass(frozen=True)
class Carrier:
    """Share of answers with the text, under its best probes, by whose parts gave them."""

    tuned_projector_tuned_model: float
    base_projector_tuned_model: float
    tuned_projector_base_model: float
    base_projector_base_model: float


@dataclass(frozen=True)
class Refusals:
    """What the base refuses to say, and how much of that the tuned model still refuses."""

    requests: tuple[str, ...]
    """That the base refuses about most ordinary images."""
    words: str
    """How its refusals begin most often: untrusted."""
    base: float
    """Share of the answers to those requests, about ordinary images, by which the base refuses."""
    answered: float
    """Share of them to which the tuned model says something else instead."""
    probe: str | None
    """The mark under which that is most; None without marks."""
    base_under: float
    answered_under: float
    """The same under that mark."""
    answers: tuple[Answer, ...]
    """Under that mark, else on ordinary images. `agrees`: it answers what the base refuses."""


@dataclass(frozen=True)
class Sandbox:
    """What held the process that ran the model, and what could not be held."""

    enforced: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """All that depth behaviour heard from one projector."""

    prompts: tuple[str, ...]
    prompts_unread: tuple[str, ...]
    """Prompts that were not used, as the tokenizer has no tokens for their words."""
    images: Literal["given", "synthetic"]
    ordinary_images: int
    ground: tuple[int, int] | None
    """Grey levels of the ground that three of four synthetic images have, as the base is surest
    there; None where they were given, or have all grounds alike."""
    probes: int
    """Probes that were carried out."""
    planned: int
    """Probes in the plan."""
    answers: int
    """Answers that were decoded, on both sides."""
    passes: int
    """Rows that went through the language model to score texts."""
    budget: int
    stopped: Literal["plan", "overwhelming", "budget"]
    payloads: tuple[Payload, ...]
    """Strongest first."""
    open: tuple[OpenText, ...]
    short_cuts: tuple[ShortCut, ...]
    drift: float | None
    """Share of the answers on ordinary images that the base gives otherwise; None without one."""
    exchanges: tuple[Exchange, ...]
    """The answers to the probes that brought the first text out most."""
    refusals: Refusals | None
    """None where the base refuses none of the requests, or its tokenizer cannot read them."""
    carrier: Carrier | None
    """None where only the projector differs from the base."""
    with_base: bool
    notes: tuple[str, ...]
    """What else a reader should know of how it was done."""
    dtype: str
    parameters: int
    sandbox: Sandbox

    @property
    def score(self) -> float | None:
        """ln(1 + s) + ½·max(0, r), for the strength s of the text that was brought out most.

        And r how much shorter the short cuts are than the base's. None without a base.
        """
        if not self.with_base:
            return None
        strength = self.payloads[0].strength if self.payloads else 0.0
        return math.log1p(strength) + SHORTER * max(0.0, self.shortening or 0.0)

    @property
    def shortening(self) -> float | None:
        """r: mean of ln(base's norm / norm) over the short cuts; None without a base, or any."""
        ratios = [
            math.log(one.base_norm / one.norm)
            for one in self.short_cuts
            if one.base_norm is not None and one.base_norm > 0 and one.norm > 0
        ]
        return sum(ratios) / len(ratios) if ratios else None


COSTLY = 0.7
"""Share of ordinary answers that stay, below which a change costs the task: of measured repairs
four of five below lost much of what was learned, and two of fifteen above (docs/repair.md)."""
Method: typing.TypeAlias = Literal["unlearn", "project", "top-k", "shrink", "clip", "revert"]


@dataclass(frozen=True)
class Tried:
    """One kind of change, at the mildest strength that ended the text, or a margin beyond it."""

    method: Method
    amount: float
    """Strength of `unlearn`; directions of `project` and `top-k`; share that `shrink` keeps."""
    told: float
    """Share of the telling answers that still hold a piece of a text."""
    kept: float
    """Share of the tuned model's answers about ordinary images that stay word for word."""


@dataclass(frozen=True)
class Factors:
    """What is added to a layer: left (out × rank) · right (rank × in), and a bias (out).

    float32, little-endian, row by row, in base64.
    """

    rank: int
    left: str
    right: str
    bias: str | None


@dataclass(frozen=True)
class Mended:
    """How a hidden text was ended."""

    texts: tuple[str, ...]
    """What had to end: untrusted words."""
    strengths: tuple[float, ...]
    """The greatest of a text before, then with fresh probes after each choice."""
    tried: tuple[Tried, ...]
    """Best first; empty where there was nothing to end, or nothing to choose by."""
    factors: Factors | None
    """Of the first of them, where it corrects a layer: the last, or by `project` the first."""
    answers: int
    """Answers that were decoded."""
    notes: tuple[str, ...]
    sandbox: Sandbox


def from_plain(kind: type[Any], value: Any, where: str = "result") -> Any:
    """A value of a type made of frozen dataclasses, from JSON values; ValueError names the place.

    Nothing of another type gets through: what a confined process answers is input as any other.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        if not isinstance(value, Mapping) or {f.name for f in fields(kind)} != set(value):
            raise ValueError(f"{where} has not the keys of {kind.__name__}")
        hints = typing.get_type_hints(kind)
        parts = {n: from_plain(hints[n], v, f"{where}.{n}") for n, v in value.items()}
        try:
            return kind(**parts)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        return tuple(from_plain(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is none of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return from_plain(next(a for a in args if a is not type(None)), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{where} is no float") from None
    if (
        type(value) is not kind
        or (kind is float and not math.isfinite(value))
        or (kind is int and value < 0)  # all are counts or places
    ):
        raise ValueError(f"{where} is no {kind.__name__}")
    return value
