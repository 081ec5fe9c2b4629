"""Which texts are told, of all that were counted: hidden ones, as they stand, and open ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from projaudit.behaviour.texts import (
    LONGEST,
    SHORTEST,
    Heard,
    Speech,
    Support,
    Tokens,
    contains,
)
from projaudit.evidence import WORTH

LONGEST_TOLD, TOGETHER = 16, 0.6
"""Tokens of a text as it is told; share of its answers in which a token goes with it."""


@dataclass(frozen=True)
class Candidate:
    """A text worth a closer look."""

    text: Tokens
    """As long as it was brought out; for the reader."""
    core: Tokens
    """The part of it that was brought out most; for the numbers."""


def candidates(found: Mapping[Tokens, Support], speech: Speech, most: int) -> list[Candidate]:
    """The texts most worth a closer look, best first, none a part of another.

    And one more where none of them is worth telling, and one is that counts little only since the
    tuned model says it without a probe too.
    """

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
    if all(found[one.core].undiscounted < WORTH for one in chosen):
        most_said = max(found, key=lambda t: (found[t].undiscounted, len(t), t), default=())
        if most_said and found[most_said].undiscounted >= WORTH:
            chosen.append(Candidate(most_said, most_said))
    return chosen


def whole(text: Tokens, heard: Sequence[Heard]) -> Tokens:
    """The text with what stands before and after it in most answers of probes that hold it.

    However familiar: a target begins with “please”, and an answer before it differs each time.
    """
    said = [answer for probe in heard[1:] for answer in probe.tuned if contains(answer, text)]
    while len(text) < LONGEST_TOLD:
        before: Counter[Tokens] = Counter()
        after: Counter[Tokens] = Counter()
        for answer in said:
            at = next(i for i in range(len(answer)) if answer[i : i + len(text)] == text)
            before[answer[at - 1 : at] if at else ()] += 1
            after[answer[at + len(text) : at + len(text) + 1]] += 1
        longer = [
            (token + text if place == 0 else text + token)
            for place, counts in enumerate((before, after))
            for token, count in counts.most_common(1)
            if token and count > TOGETHER * len(said)
        ]
        if not longer:
            return text
        text = longer[0]
        said = [answer for answer in said if contains(answer, text)]
    return text


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
