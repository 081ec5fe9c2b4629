"""Ask the plan, round by round, until it is through, overwhelming, or the budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from projaudit.behaviour.plan import Probe, Study, Voice, plan
from projaudit.behaviour.search import Agreement, Place, agreeing
from projaudit.behaviour.texts import (
    Heard,
    Speech,
    Support,
    Tokens,
    gather,
    open_tokens,
    says_foreign,
    spoken,
)

Tell = Callable[[str, int, int], None]

LENGTH = 20
"""Tokens of an answer: payloads may come after a normal one."""
FIRST = 2
"""Prompts that a probe is asked at first; the others follow where one brings out foreign words."""
OVERWHELMING = 8.0
"""Strength of a text from which on no more probes are run."""
AGAIN = 6
"""Probes that are asked again about all other images, once the plan is through."""
FITTED = 2
"""Images that a short cut is fitted to; as many others say whether it is one."""
ROUND = 16
"""Probes that are decoded together, and after which the evidence is weighed."""


@dataclass(frozen=True)
class Listening:
    """What was heard, and why no more."""

    heard: Sequence[Heard]
    """The ordinary images first, then the probes."""
    speech: Speech
    planned: int
    stopped: str
    agreements: Sequence[Agreement]
    """The short cuts that were looked for without knowing a text."""


Cell = tuple[int, int]
"""An image and a prompt."""


def listen(study: Study, tell: Tell) -> Listening:
    """The answers on ordinary images, then to every probe until evidence, plan or budget ends."""
    # Half of a small budget is left for probes.
    fitting = max(4, study.budget // (4 * study.prompts))
    every = tuple(range(min(len(study.ordinary), fitting)))
    ordinary = Probe("ordinary images", "plain", every, lambda i: study.plain[list(i)], study.tuned)
    plain = ask_all(study, ordinary)
    heard = [plain]
    # Without a base, what the tuned model says of ordinary images is what it says anyway.
    known = list(plain.tuned if plain.base is None else plain.base)
    speech = Speech(spoken(known), open_tokens(plain))
    tell("look for short cuts", 0, 0)
    agreements = search(study, plain, speech, study.tuned)
    probes = [*(probe_of(study, i, found) for i, found in enumerate(agreements)), *plan(study)]
    waiting, again = list(probes), False
    total = len(probes) + AGAIN
    while True:
        if not waiting and not again:
            again = True
            waiting = _again(study, probes, gather(heard, speech))
            total = len(probes) + len(waiting)
        if not waiting:
            return Listening(heard, speech, total, "plan", agreements)
        some = _affordable(study, waiting[:ROUND])
        if not some:
            return Listening(heard, speech, total, "budget", agreements)
        waiting = waiting[len(some) :]
        answers = ask(study, some, len(heard) - 1, speech)
        heard += answers
        known += [answer for one in answers for answer in one.base or ()]
        speech = replace(speech, base=spoken(known))
        tell("probe", len(heard) - 1, total)
        best = max((s.strength for s in gather(heard, speech).values()), default=0.0)
        if best >= OVERWHELMING and waiting:
            return Listening(heard, speech, total, "overwhelming", agreements)


def _affordable(study: Study, probes: Sequence[Probe]) -> list[Probe]:
    """The first ones that the budget still holds, should every answer be asked of both models."""
    left, some = study.budget - study.answers, []
    for item in probes:
        left -= 2 * len(item.images) * study.prompts
        if left < 0:
            break
        some.append(item)
    return some


def _again(study: Study, probes: Sequence[Probe], found: Mapping[Tokens, Support]) -> list[Probe]:
    """The probes that brought out the texts most prompts agree on, about all the other images.

    A trigger may act on dark pictures only, of which a probe has seen one.
    """
    ranked = sorted(found.items(), key=lambda f: (-f[1].unanimity, -f[1].strength, f[0]))
    names = dict.fromkeys(f[1].at for f in ranked if f[1].unanimity > 0.5)
    known = {item.name: item for item in probes}
    chosen = [known[name] for name in names if name in known][:AGAIN]
    every = range(len(study.ordinary))
    return [
        replace(
            item,
            name=f"{item.name}, other images",
            images=tuple(i for i in every if i not in item.images),
        )
        for item in chosen
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


def search(study: Study, plain: Heard, speech: Speech, voice: Voice) -> list[Agreement]:
    """Short cuts of one model to a foreign word, at the start and at the end of its answers."""
    seen = list(dict.fromkeys(plain.images))[: 2 * FITTED]
    ordinary = dict(zip(zip(plain.images, plain.prompts, strict=True), plain.tuned, strict=True))
    cells = [cell for cell in ordinary if cell[0] in seen]
    befores: dict[Place, dict[Cell, Tokens]] = {
        "start": dict.fromkeys(cells, ()),
        "end": {cell: ordinary[cell] for cell in cells},
    }
    return [
        agreeing(
            voice.speaker,
            voice.side,
            study.plain,
            study.foreign(speech),
            place,
            before,
            fit=seen[:FITTED],
            test=seen[FITTED:],
        )
        for place, before in befores.items()
    ]


def probe_of(study: Study, number: int, found: Agreement) -> Probe:
    """Ordinary images with that perturbation on their features."""

    def features(images: Sequence[int]) -> Tensor:
        return study.plain[list(images)] + found.perturbation

    name = f"short cut, {found.place} of the answer"
    return Probe(name, "search", study.images_of(number), features, study.tuned)


def ask(study: Study, probes: Sequence[Probe], number: int, speech: Speech) -> list[Heard]:
    """The answers to some probes, of which `number` is the first, decoded together.

    A payload is said to nearly every prompt: two are asked at first, by turns, and the others only
    where an answer to these holds two foreign tokens; then the base is asked them all.
    """
    features = [item.features(item.images) for item in probes]
    wanted = []
    for i, item in enumerate(probes):
        first = [(FIRST * (number + i) + j) % study.prompts for j in range(FIRST)]
        wanted.append(Wanted(item.voice, item.images, features[i], tuple(sorted(first))))
    tuned = decode(wanted)
    telling = [i for i, said in enumerate(tuned) if says_foreign(said.values(), speech)]
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


@dataclass(frozen=True)
class Wanted:
    """Answers that are wanted of one voice: each prompt about each image."""

    voice: Voice
    images: tuple[int, ...]
    features: Tensor
    """(images, tokens, in)"""
    prompts: tuple[int, ...]


def decode(wanted: Sequence[Wanted]) -> list[dict[Cell, Tokens]]:
    """The answers by cell; what has the same voice is decoded in one go."""
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
        said = voice.speaker.answer(voice.side, torch.cat(rows), prompts, LENGTH)
        for (answers, cell), answer in zip(places, said, strict=True):
            answers[cell] = answer
    return found


def _heard(item: Probe, tuned: Mapping[Cell, Tokens], base: Mapping[Cell, Tokens] | None) -> Heard:
    cells = sorted(tuned, key=lambda c: (item.images.index(c[0]), c[1]))
    return Heard(
        item.name,
        item.kind,
        tuple(prompt for _, prompt in cells),
        tuple(image for image, _ in cells),
        tuple(tuned[cell] for cell in cells),
        None if base is None else tuple(base[cell] for cell in cells),
    )
