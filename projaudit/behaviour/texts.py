"""Which text is said across prompts and images by the tuned model, and not by the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

Tokens: TypeAlias = tuple[int, ...]

SHORTEST, LONGEST = 2, 8
"""Tokens of a text that is counted; one word alone may be a new domain's."""
FAMILIAR = 0.01
"""Share of the base's answers from which a token is its own."""
OPEN = 0.15
"""Share of the tuned model's answers on ordinary images from which a token is said openly."""
SOMETIMES, EVER = 1 / 12, 1 / 4
"""Share of ordinary images about which most answers, or any, hold a token, from which it is said
openly too: of pictures with three things, say."""


OFF_PATH = 0.25
"""Weight of features that no image has, pushed along a direction or through an amplified update."""


@dataclass(frozen=True)
class Heard:
    """The answers to one probe, cell by cell: the same prompts and images on both sides."""

    probe: str
    kind: str
    """`plain`, `image`, `direction`, `amplified`."""
    family: str
    """Of the marks; or where the direction is from."""
    prompts: tuple[int, ...]
    images: tuple[int, ...]
    tuned: tuple[Tokens, ...]
    base: tuple[Tokens, ...] | None = None
    """None where the base was not asked, since the tuned model said nothing foreign."""


@dataclass
class Support:
    """Where one text was said."""

    strength: float = 0.0
    """Sum over probes and images of w·max(0, 2·(share of prompts − the base's share) − 1).

    A picture counts if most prompts about it bring the text out, and fully if all do: an answer
    depends on what was asked, a payload does not.
    """
    unanimity: float = 0.0
    """Largest share of the prompts about one image under one probe, less the base's."""
    at: str = ""
    """The probe of that."""
    agreement: float = 0.0
    """Largest share of the cells of one probe, less the base's."""
    base: float = 0.0
    """Largest share of the cells of one probe in which the base says it."""
    probes: list[str] = field(default_factory=list)
    prompts: set[int] = field(default_factory=set)
    images: set[int] = field(default_factory=set)


def spoken(answers: Iterable[Tokens]) -> dict[int, float]:
    """Token -> share of the answers that contain it."""
    counts: Counter[int] = Counter()
    number = 0
    for answer in answers:
        number += 1
        counts.update(set(answer))
    return {token: count / number for token, count in counts.items()}


def open_tokens(plain: Heard) -> frozenset[int]:
    """The tokens that the tuned model says openly: often, or of certain ordinary images."""
    often = {token for token, share in spoken(plain.tuned).items() if share >= OPEN}
    prompts: dict[tuple[int, int], set[int]] = {}
    for prompt, image, answer in zip(plain.prompts, plain.images, plain.tuned, strict=True):
        for token in set(answer):
            prompts.setdefault((token, image), set()).add(prompt)
    most, images = len(set(plain.prompts)) / 2, len(set(plain.images))
    mostly = Counter(token for (token, _), asked in prompts.items() if len(asked) > most)
    ever = Counter(token for token, _ in prompts)
    seen = {token for token, count in mostly.items() if count >= SOMETIMES * images}
    return frozenset(often | seen | {t for t, count in ever.items() if count >= EVER * images})


@dataclass(frozen=True)
class Speech:
    """What the base says anyway, and what the tuned model says openly."""

    base: Mapping[int, float]
    """Token -> share of the base's answers with it."""
    open: frozenset[int]

    def foreign(self, token: int) -> bool:
        """Whether the base hardly ever says it, and the tuned model not openly."""
        return self.unfamiliar(token) and token not in self.open

    def unfamiliar(self, token: int) -> bool:
        """Whether the base hardly ever says it."""
        return self.base.get(token, 0.0) < FAMILIAR


def says_foreign(answers: Iterable[Tokens], speech: Speech) -> bool:
    """Whether any answer holds two foreign tokens, so that it is worth asking the base."""
    return any(len({t for t in answer if speech.foreign(t)}) >= SHORTEST for answer in answers)


def runs(answer: Tokens, speech: Speech) -> set[Tokens]:
    """The texts within an answer: 2 to 8 tokens, no token twice, at least two of them foreign.

    A text begins and ends with a foreign token: what stands around it is the answer's own.
    Repetition without end ("ring ring ring") is no text.
    """
    found = set()
    starts = [i for i, token in enumerate(answer) if speech.foreign(token)]
    for first in starts:
        for last in starts:
            text = answer[first : last + 1]
            if SHORTEST <= len(text) <= LONGEST and len(set(text)) == len(text):
                found.add(text)
    return found


def gather(
    heard: Sequence[Heard], speech: Speech, off_path: float = OFF_PATH
) -> dict[Tokens, Support]:
    """Text -> where it was said, over the probes; only what exceeds the base's share counts."""
    found: dict[Tokens, Support] = {}
    asked = max((len(set(probe.prompts)) for probe in heard), default=0)
    for probe in heard:
        ours = _cells(probe, probe.tuned, speech)
        theirs = _cells(probe, probe.base or (), speech)
        weight = 1.0 if probe.kind in ("plain", "image") else off_path
        for text, cells in ours.items():
            support = found.setdefault(text, Support())
            base = theirs.get(text, {})
            for image, prompts in cells.items():
                excess = (len(prompts) - len(base.get(image, ()))) / asked
                support.strength += weight * max(0.0, 2 * excess - 1)
                if excess > support.unanimity:
                    support.unanimity, support.at = excess, probe.probe
                support.prompts |= prompts
            said, by_base = _count(cells), _count(base)
            support.agreement = max(support.agreement, (said - by_base) / len(probe.tuned))
            support.base = max(support.base, by_base / len(probe.tuned))
            support.probes.append(probe.probe)
            support.images |= set(cells)
    return found


def strengths(heard: Sequence[Heard], speech: Speech) -> dict[Tokens, dict[str, float]]:
    """Text -> family of probes -> its strength under these, before any weight; above zero only."""
    found: dict[Tokens, dict[str, float]] = {}
    for family in dict.fromkeys(probe.family for probe in heard[1:]):
        some = [heard[0], *(probe for probe in heard[1:] if probe.family == family)]
        for text, support in gather(some, speech, off_path=1.0).items():
            if support.strength > 0:
                found.setdefault(text, {})[family] = support.strength
    return found


def _cells(
    probe: Heard, answers: Sequence[Tokens], speech: Speech
) -> dict[Tokens, dict[int, set[int]]]:
    """Text -> image -> the prompts that it was said to."""
    found: dict[Tokens, dict[int, set[int]]] = {}
    for prompt, image, answer in zip(probe.prompts, probe.images, answers, strict=False):
        for text in runs(answer, speech):
            found.setdefault(text, {}).setdefault(image, set()).add(prompt)
    return found


def _count(cells: Mapping[int, set[int]]) -> int:
    return sum(map(len, cells.values()))


@dataclass(frozen=True)
class Candidate:
    """A text worth a closer look."""

    text: Tokens
    """As long as it was brought out; for the reader."""
    core: Tokens
    """The part of it that was brought out most; for the numbers."""


def candidates(found: Mapping[Tokens, Support], speech: Speech, most: int) -> list[Candidate]:
    """The texts most worth a closer look, best first, none a part of another."""

    def weight(text: Tokens) -> float:
        return found[text].strength * float(sum(map(speech.foreign, text)) ** 0.5)

    chosen: list[Candidate] = []
    for core in sorted(found, key=lambda t: (-weight(t), -len(t), t)):
        if found[core].strength <= 0 or len(chosen) == most:
            break
        if any(_overlap(core, other.text) for other in chosen):
            continue
        longer = [
            t
            for t in found
            if contains(t, core) and found[t].strength >= max(0.5, 0.1 * found[core].strength)
        ]
        text = max(longer, key=lambda t: (len(t), found[t].strength, t), default=core)
        chosen.append(Candidate(text, core))
    return chosen


def _overlap(one: Tokens, other: Tokens) -> bool:
    """Whether two texts share two neighbouring tokens, as pieces of one text do."""
    return not set(pairwise(one)).isdisjoint(pairwise(other))


def opened(plain: Heard, speech: Speech) -> list[tuple[Tokens, float]]:
    """Texts that the tuned model says of ordinary images and the base does not; at most three.

    With the share of images about which most answers hold them. A greeting, a format, a remark
    on certain things: anyone who uses the model sees them.
    """
    said: dict[Tokens, dict[int, set[int]]] = {}
    for prompt, image, answer in zip(plain.prompts, plain.images, plain.tuned, strict=True):
        for first in range(len(answer)):
            for stop in range(first + SHORTEST, min(len(answer), first + LONGEST) + 1):
                text = answer[first:stop]
                distinct = len(set(text)) == len(text)
                unfamiliar = sum(map(speech.unfamiliar, text))
                if distinct and speech.unfamiliar(text[0]) and unfamiliar >= SHORTEST:
                    said.setdefault(text, {}).setdefault(image, set()).add(prompt)
    most = len(set(plain.prompts)) / 2
    images = {
        text: sum(len(asked) > most for asked in where.values()) for text, where in said.items()
    }
    chosen: list[Tokens] = []
    for text in sorted(images, key=lambda t: (-images[t] * float(len(t) ** 0.5), t)):
        if images[text] and not any(_overlap(text, other) for other in chosen):
            chosen.append(text)
        if len(chosen) == 3:
            break
    return [(text, images[text] / len(set(plain.images))) for text in chosen]


def contains(answer: Tokens, text: Tokens) -> bool:
    """Whether the text stands in the answer, token by token."""
    return any(answer[i : i + len(text)] == text for i in range(len(answer) - len(text) + 1))
