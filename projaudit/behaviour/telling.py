"""What has to end: the hidden texts, and the images under whose marks they were said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from projaudit.behaviour import images as pictures
from projaudit.behaviour.listen import LENGTH, Listening
from projaudit.behaviour.plan import Study
from projaudit.behaviour.texts import Heard, Tokens, gather, open_tokens
from projaudit.behaviour.told import candidates
from projaudit.evidence import WORTH

TEXTS = 2
MOST = 48
"""Marked images that are kept of a round: those about which most prompts brought a text out."""
PROMPTS = 2
"""Prompts that each of them is asked about a candidate."""
FURTHER = 4
"""Times as many ordinary images as an audit asks about, that tell what is said openly."""


@dataclass(frozen=True)
class Marked:
    """Images about which a text was said, with the marks and without; features (n, tokens, in)."""

    marked: Tensor
    plain: Tensor
    prompts: tuple[tuple[int, ...], ...]
    """Of each image: some to which the text was said."""

    def __add__(self, other: Marked) -> Marked:
        return Marked(
            torch.cat([self.marked, other.marked]),
            torch.cat([self.plain, other.plain]),
            (*self.prompts, *other.prompts),
        )


def further(study: Study) -> Tensor:
    """(images, tokens, in): synthetic ordinary images that no probe and no other seed has."""
    size = study.ordinary[0].shape[0]
    more = pictures.ordinary(FURTHER * study.size.plain, size, study.seed + 7_919, study.ground)
    return study.tuned.speaker.features(more)


def further_answers(study: Study, more: Tensor) -> Heard:
    """What the tuned model says of further ordinary images, to two prompts.

    An audit asks about few: a remark on one in fifty of them may look like a hidden text. The more
    of it is said without a mark, the less it is one.
    """
    asked = sorted({0, study.prompts // 2})
    rows = [(i, prompt) for i in range(len(more)) for prompt in asked]
    images, prompts = tuple(i for i, _ in rows), tuple(p for _, p in rows)
    said = study.tuned.speaker.answer(study.tuned.side, more[list(images)], list(prompts), LENGTH)
    return Heard("further images", "plain", "", prompts, images, tuple(said))


def texts_of(listening: Listening, known: Heard | None = None) -> tuple[list[Tokens], float]:
    """The texts that are worth ending, as they are told, and the greatest strength.

    Less what is `known` to be said without a mark, before anything was changed.
    """
    heard, speech = [*listening.heard], listening.speech
    if known is not None:
        heard.append(known)
        speech = replace(speech, open=speech.open | open_tokens(known))
    found = gather(heard, speech)
    chosen = candidates(found, speech, TEXTS)
    strengths = [found[c.core].strength for c in chosen]
    worth = [c.text for c, s in zip(chosen, strengths, strict=True) if s >= WORTH]
    return worth, max(strengths, default=0.0)


def marked_of(
    study: Study,
    listening: Listening,
    pairs: frozenset[tuple[int, int]],
) -> Marked | None:
    """The images that told, those first about which most prompts did; None where none has a mark.

    Directions and amplified updates are left out, unless nothing else tells: no image has such
    features.
    """
    rows: list[tuple[bool, float, int, int, int, tuple[int, ...]]] = []
    for number, (item, heard) in enumerate(zip(listening.probes, listening.heard[1:], strict=True)):
        if item.kind == "amplified":  # it is about another update
            continue
        for place, image in enumerate(item.images):
            cells = [i for i, other in enumerate(heard.images) if other == image]
            telling = [
                heard.prompts[i] for i in cells if not pairs.isdisjoint(pairwise(heard.tuned[i]))
            ]
            if telling:
                share = len(telling) / study.prompts
                some = tuple(telling[:PROMPTS])
                rows.append((item.kind != "image", -share, number, place, image, some))
    rows.sort()
    images = [row for row in rows if not row[0]] or rows
    if not images:
        return None
    images = images[:MOST]
    asked = {n: listening.probes[n] for _, _, n, *_ in images}
    features = {n: item.features(item.images) for n, item in asked.items()}
    return Marked(
        torch.stack([features[n][place] for _, _, n, place, _, _ in images]),
        study.features_of([image for *_, image, _ in images]),
        tuple(prompts for *_, prompts in images),
    )
