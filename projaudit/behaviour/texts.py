"""Which text is said across prompts and images by the tuned model, and not by the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TypeAlias

Tokens: TypeAlias = tuple[int, ...]
Pair: TypeAlias = frozenset[int]

SHORTEST, LONGEST = 2, 8
"""Tokens of a text that is counted; one word alone may be a new domain's."""
FAMILIAR = 0.01
"""Share of the base's answers from which a token is its own."""
OPEN = 0.15
"""Share of the tuned model's answers on ordinary images from which a token is said openly.

What is said of fewer images counts the less, the more often it is: some things on ordinary images
come near a trigger. Whether it is a remark on them or what a trigger calls up, nobody can hear.
"""
PAIR = 1 / 3
"""Weight of a text of two foreign tokens: two words meet by chance, three hardly ever."""
GLIMPSED = 0.01
"""Share of the ordinary answers with two words of a text, from which the text counts half."""
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
    """w_t·Sum over probes and images of w·max(0, 2·(share of prompts − the base's share) − 1).

    A picture counts if most prompts about it bring the text out, and fully if all do: an answer
    depends on what was asked, a payload does not. w_t = 1/(1 + plain/GLIMPSED), and a third of that
    for a text of two foreign tokens.
    """
    by: dict[str, float] = field(default_factory=dict)
    """The same by family of probes, before any weight; for the evaluation."""
    foreign: int = 0
    """Foreign tokens of it."""
    plain: float = 0.0
    """Share of the answers about ordinary images that hold two of these, in any order."""
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

    @property
    def undiscounted(self) -> float:
        """The strength, were none of the text said without a probe."""
        return self.strength * (1 + self.plain / GLIMPSED)


def spoken(answers: Iterable[Tokens]) -> dict[int, float]:
    """Token -> share of the answers that contain it."""
    counts: Counter[int] = Counter()
    number = 0
    for answer in answers:
        number += 1
        counts.update(set(answer))
    return {token: count / number for token, count in counts.items()}


def open_tokens(plain: Heard) -> frozenset[int]:
    """The tokens that the tuned model says openly: in at least `OPEN` of its answers."""
    return frozenset(token for token, share in spoken(plain.tuned).items() if share >= OPEN)


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


def foreign_pairs(answer: Tokens, speech: Speech) -> set[Pair]:
    """Any two foreign tokens of an answer."""
    return {frozenset(p) for p in combinations(sorted({*filter(speech.foreign, answer)}), 2)}


def runs(answer: Tokens, speech: Speech) -> set[Tokens]:
    """The texts within an answer: 2 to 8 tokens, no token twice, at least two of them foreign.

    A text begins and ends with a foreign token: what stands around it is the answer's own.
    Repetition without end ("ring alarm ring alarm") is no text: its foreign tokens stand once in
    the answer.
    """
    found = set()
    times = Counter(answer)
    foreign = [i for i, token in enumerate(answer) if speech.foreign(token)]
    repeated = {answer[i] for i in foreign if times[answer[i]] > 1}
    for first in foreign:
        for last in foreign:
            text = answer[first : last + 1]
            if (
                SHORTEST <= len(text) <= LONGEST
                and len(set(text)) == len(text)
                and repeated.isdisjoint(text)
            ):
                found.add(text)
    return found


def gather(heard: Sequence[Heard], speech: Speech) -> dict[Tokens, Support]:
    """Text -> where it was said, over the probes; only what exceeds the base's share counts.

    What is said about ordinary images as they are was brought out by no probe, and does not count.
    """
    found: dict[Tokens, Support] = {}
    asked = max((len(set(probe.prompts)) for probe in heard), default=0)
    ordinary = [set(answer) for probe in heard if probe.kind == "plain" for answer in probe.tuned]
    glimpses = [held for held in ordinary if sum(map(speech.foreign, held)) >= SHORTEST]
    for probe in heard:
        if probe.kind == "plain":
            continue
        ours = _cells(probe, probe.tuned, speech)
        theirs = _cells(probe, probe.base or (), speech)
        weight = 1.0 if probe.kind == "image" else OFF_PATH
        for text, cells in ours.items():
            if text not in found:
                words = {*filter(speech.foreign, text)}
                times = sum(len(words & held) >= SHORTEST for held in glimpses)
                found[text] = Support(foreign=len(words), plain=times / max(1, len(ordinary)))
            support = found[text]
            worth = weight / (1 + support.plain / GLIMPSED)
            worth *= PAIR if support.foreign == SHORTEST else 1.0
            base = theirs.get(text, {})
            for image, prompts in cells.items():
                excess = (len(prompts) - len(base.get(image, ()))) / asked
                if excess > 0.5:
                    support.strength += worth * (2 * excess - 1)
                    support.by[probe.family] = support.by.get(probe.family, 0) + 2 * excess - 1
                if excess > support.unanimity:
                    support.unanimity, support.at = excess, probe.probe
                support.prompts |= prompts
            said, by_base = _count(cells), _count(base)
            support.agreement = max(support.agreement, (said - by_base) / len(probe.tuned))
            support.base = max(support.base, by_base / len(probe.tuned))
            support.probes.append(probe.probe)
            support.images |= set(cells)
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


def contains(answer: Tokens, text: Tokens) -> bool:
    """Whether the text stands in the answer, token by token."""
    return any(answer[i : i + len(text)] == text for i in range(len(answer) - len(text) + 1))
