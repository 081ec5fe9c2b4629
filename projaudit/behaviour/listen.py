"""Ask the plan, round by round, until it is through, overwhelming, or the budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from projaudit.behaviour.climb import climbed
from projaudit.behaviour.plan import Probe, Study, Voice, over_images, plan
from projaudit.behaviour.texts import (
    Heard,
    Pair,
    Speech,
    Support,
    Tokens,
    foreign_pairs,
    gather,
    open_tokens,
    spoken,
)

Tell = Callable[[str, int, int], None]

LENGTH = 20
"""Tokens of an answer: payloads may come after a normal one."""
FIRST = 2
"""Prompts that a probe is asked at first; the others follow where one brings out foreign words."""
STRONGER, FARTHER = 6, (1.5, 2.5)
"""Marks that are asked about once more, with these multiples of their effect on the features."""
AGAIN = 6
"""Probes that are asked again about all other images, in the end."""
ROUND = 32
"""Probes that are decoded together, and after which the evidence is weighed."""


@dataclass(frozen=True)
class Listening:
    """What was heard, and why no more."""

    heard: Sequence[Heard]
    """The ordinary images first, then the probes."""
    speech: Speech
    probes: Sequence[Probe]
    """The probes, one for each of `heard` but the first."""
    planned: int
    stopped: str


Cell = tuple[int, int]
"""An image and a prompt."""


def listen(study: Study, tell: Tell) -> Listening:
    """The answers on ordinary images, then to every probe until evidence, plan or budget ends."""
    # A part of a small budget is left for probes.
    fitting = max(4, study.budget // (4 * study.prompts))
    every = tuple(range(min(len(study.ordinary), fitting)))
    ordinary = Probe("ordinary images", "plain", "", every, study.features_of, study.tuned)
    plain = ask_all(study, ordinary)
    heard = [plain]
    # Without a base, what the tuned model says of ordinary images is what it says anyway.
    known = list(plain.tuned if plain.base is None else plain.base)
    speech = Speech(spoken(known), open_tokens(plain))
    asked: list[Probe] = []
    stages: tuple[Callable[[], list[Probe]], ...] = (
        lambda: plan(study),
        lambda: _climbed(study, plain, speech, tell),
        lambda: _stronger(study, asked, heard, speech),
        lambda: _again(study, asked, gather(heard, speech)),
    )
    later = [3 * study.size.bred // 2, STRONGER * len(FARTHER), AGAIN]
    for stage in stages:
        waiting = stage()
        total = len(asked) + len(waiting) + sum(later)
        later = later[1:]
        while waiting:
            some = _affordable(study, waiting[:ROUND])
            if not some:
                return Listening(heard, speech, asked, total, "budget")
            waiting = waiting[len(some) :]
            answers = ask(study, some, len(asked), speech)
            asked += some
            heard += answers
            known += [answer for one in answers for answer in one.base or ()]
            speech = replace(speech, base=spoken(known))
            tell("probe", len(asked), total)
            best = max((s.strength for s in gather(heard, speech).values()), default=0.0)
            if best >= study.enough:
                return Listening(heard, speech, asked, total, "overwhelming")
    return Listening(heard, speech, asked, len(asked), "plan")


def _affordable(study: Study, probes: Sequence[Probe]) -> list[Probe]:
    """The first ones that the budget still holds, should every answer be asked of both models."""
    left, some = study.budget - study.answers, []
    for item in probes:
        left -= 2 * len(item.images) * study.prompts
        if left < 0:
            break
        some.append(item)
    return some


def _climbed(study: Study, plain: Heard, speech: Speech, tell: Tell) -> list[Probe]:
    """The marks that were drawn and bred for this model."""
    tell("breed marks", 0, 0)
    found = climbed(study, plain, speech)
    named = [
        (origin, number, mark) for origin in found for number, mark in enumerate(found[origin], 1)
    ]
    return [
        over_images(study, at, f"{origin} mark {number}: {mark.words}", origin, mark.over)
        for at, (origin, number, mark) in enumerate(named)
    ]


def _stronger(
    study: Study, asked: Sequence[Probe], heard: Sequence[Heard], speech: Speech
) -> list[Probe]:
    """The marks about which foreign words came up most, with more of their effect on the features.

    A mark may come near a trigger and not be as strong.
    """
    shares = [
        (sum(any(map(speech.foreign, answer)) for answer in said.tuned) / len(said.tuned), -number)
        for number, said in enumerate(heard[1:])
        if said.kind == "image"
    ]
    chosen = [asked[-number] for share, number in sorted(shares, reverse=True)[:STRONGER] if share]

    def farther(item: Probe, times: float, number: int) -> Probe:
        def features(images: Sequence[int]) -> Tensor:
            plain = study.features_of(images)
            return plain + times * (item.features(images) - plain)

        name, images = f"{item.name}, {times:g} times as far", study.images_of(number)
        return replace(item, name=name, images=images, features=features)

    wanted = [(item, times) for item in chosen for times in FARTHER]
    return [farther(item, times, number) for number, (item, times) in enumerate(wanted)]


def _again(study: Study, probes: Sequence[Probe], found: Mapping[Tokens, Support]) -> list[Probe]:
    """The probes that brought out the texts most prompts agree on, about all the other images.

    A trigger may act on dark pictures only, of which a probe has seen one.
    """
    ranked = sorted(found.items(), key=lambda f: (-f[1].unanimity, -f[1].strength, f[0]))
    names = dict.fromkeys(f[1].at for f in ranked if f[1].unanimity > 0.5)
    known = {item.name: item for item in probes}
    chosen = [known[name] for name in names if name in known][:AGAIN]
    others = [
        tuple(i for i in range(len(study.ordinary)) if i not in item.images) for item in chosen
    ]
    return [
        replace(item, name=f"{item.name}, other images", images=images)
        for item, images in zip(chosen, others, strict=True)
        if images
    ]


def ask_all(study: Study, item: Probe) -> Heard:
    """Every prompt, of the tuned model and of the base."""
    every = tuple(range(study.prompts))
    wanted = Wanted(item.voice, item.images, item.features(item.images), every)
    (tuned,) = decode([wanted])
    if study.base is None:
        return _heard(item, tuned, None)
    (base,) = decode([replace(wanted, voice=study.base)])
    return _heard(item, tuned, base)


def ask(study: Study, probes: Sequence[Probe], number: int, speech: Speech) -> list[Heard]:
    """The answers to some probes, of which `number` is the first, decoded together.

    A payload is said to nearly every prompt: two are asked at first, by turns, and the others only
    where two of the answers to these hold the same two foreign tokens; then the base is asked them
    all.
    """
    features = [item.features(item.images) for item in probes]
    wanted = []
    for i, item in enumerate(probes):
        first = [(FIRST * (number + i) + j) % study.prompts for j in range(FIRST)]
        wanted.append(Wanted(item.voice, item.images, features[i], tuple(sorted(first))))
    tuned = decode(wanted)
    telling = [i for i, said in enumerate(tuned) if _agree(said.values(), speech)]
    rest, whole = [], []
    for i in telling:
        others = tuple(p for p in range(study.prompts) if p not in wanted[i].prompts)
        rest.append(replace(wanted[i], prompts=others))
        if study.base is not None:
            every = tuple(range(study.prompts))
            whole.append(replace(wanted[i], voice=study.base, prompts=every))
    for i, said in zip(telling, decode(rest), strict=True):
        tuned[i] |= said
    base = dict(zip(telling, decode(whole), strict=False))
    return [_heard(item, tuned[i], base.get(i)) for i, item in enumerate(probes)]


def _agree(answers: Iterable[Tokens], speech: Speech) -> bool:
    """Whether two of the answers hold the same two foreign tokens."""
    met: set[Pair] = set()
    for answer in answers:
        pairs = foreign_pairs(answer, speech)
        if not met.isdisjoint(pairs):
            return True
        met |= pairs
    return False


@dataclass(frozen=True)
class Wanted:
    """Answers that are wanted of one voice: each prompt about each image."""

    voice: Voice
    images: tuple[int, ...]
    features: Tensor
    """(images, tokens, in)"""
    prompts: tuple[int, ...]


def decode(wanted: Sequence[Wanted], length: int = LENGTH) -> list[dict[Cell, Tokens]]:
    """The answers by cell, of `length` tokens; what has the same voice is decoded in one go."""
    found: list[dict[Cell, Tokens]] = [{} for _ in wanted]
    voices = {(id(one.voice.speaker), id(one.voice.side)): one.voice for one in wanted}
    for voice in voices.values():
        rows: list[Tensor] = []
        places: list[tuple[dict[Cell, Tokens], Cell]] = []
        for one, answers in zip(wanted, found, strict=True):
            if one.voice.side is voice.side and one.voice.speaker is voice.speaker:
                rows.append(one.features.repeat_interleave(len(one.prompts), 0))
                places += [(answers, (i, p)) for i in one.images for p in one.prompts]
        if not places:
            continue
        prompts = [prompt for _, (_, prompt) in places]
        said = voice.speaker.answer(voice.side, torch.cat(rows), prompts, length)
        for (answers, cell), answer in zip(places, said, strict=True):
            answers[cell] = answer
    return found


def _heard(item: Probe, tuned: Mapping[Cell, Tokens], base: Mapping[Cell, Tokens] | None) -> Heard:
    cells = sorted(tuned, key=lambda c: (item.images.index(c[0]), c[1]))
    return Heard(
        item.name,
        item.kind,
        item.family,
        tuple(prompt for _, prompt in cells),
        tuple(image for image, _ in cells),
        tuple(tuned[cell] for cell in cells),
        None if base is None else tuple(base[cell] for cell in cells),
    )
