"""The answers under the probes that brought a text out most; and whose part carries it."""

from __future__ import annotations

import base64
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict

from projaudit.behaviour.images import Image, resized
from projaudit.behaviour.listen import LENGTH, Listening
from projaudit.behaviour.plan import Probe, Study, Voice, plan
from projaudit.behaviour.texts import Heard, Tokens, contains
from projaudit.behaviour.told import Candidate
from projaudit.evidence import PICTURE_SIDE, Answer, Carrier, Exchange, Picture

MOST = 3
"""Probes whose answers are told."""


def exchanges(
    study: Study, listening: Listening, chosen: Sequence[Candidate]
) -> Iterator[Exchange]:
    """The answers to the three probes that brought the first text out most."""
    if not chosen:
        return
    core = chosen[0].core
    probes = {item.name: item for item in listening.probes}
    for heard in _best(listening, core, MOST, probes):
        yield Exchange(
            heard.probe,
            heard.kind,  # type: ignore[arg-type]
            tuple(
                Answer(
                    prompt,
                    image,
                    study.words(heard.tuned[i]),
                    None if heard.base is None else study.words(heard.base[i]),
                    contains(heard.tuned[i], core),
                )
                for i, (prompt, image) in enumerate(zip(heard.prompts, heard.images, strict=True))
            ),
            _picture(study, probes[heard.probe], heard, core),
        )


def _picture(study: Study, item: Probe, heard: Heard, core: Tokens) -> Picture | None:
    """The image about which most prompts brought the text out, without the mark and with it."""
    if item.shown is None:
        return None
    said = [
        image
        for image, answer in zip(heard.images, heard.tuned, strict=True)
        if contains(answer, core)
    ]
    image = max(item.images, key=said.count)
    side = min(PICTURE_SIDE, len(study.ordinary[image]))

    def packed(shown: Image) -> str:
        return base64.b64encode(resized(shown, side).tobytes()).decode()

    return Picture(image, side, packed(study.ordinary[image]), packed(item.shown(image)))


def carrier(
    study: Study, listening: Listening, chosen: Sequence[Candidate]
) -> dict[str, float] | None:
    """Which part carries the first text: the 2 × 2 of projector and model, where both differ."""
    if not chosen or study.base is None or study.base.speaker is study.tuned.speaker:
        return None
    core = chosen[0].core
    # Not those about all other images: four models are asked, and a few answers tell.
    planned = {item.name: item for item in plan(study) if item.voice is study.tuned}
    probes = [planned[heard.probe] for heard in _best(listening, core, MOST, planned)]
    if not probes:
        return None
    ours, theirs = study.tuned, study.base
    voices = (
        ours,
        Voice(ours.speaker, theirs.side),
        Voice(theirs.speaker, ours.side),
        theirs,
    )
    shares = []
    for voice in voices:
        said: list[Tokens] = []
        for item in probes:
            features = item.features(item.images).repeat_interleave(study.prompts, 0)
            prompts = tuple(range(study.prompts)) * len(item.images)
            said += voice.speaker.answer(voice.side, features, prompts, LENGTH)
        shares.append(sum(contains(answer, core) for answer in said) / len(said))
    return asdict(Carrier(*shares))


def _best(listening: Listening, text: Tokens, most: int, among: Container[str]) -> list[Heard]:
    """The probes, of those names, under which the text was said most often."""
    counts = [
        (sum(contains(answer, text) for answer in heard.tuned), -number, heard)
        for number, heard in enumerate(listening.heard)
        if number and heard.probe in among
    ]
    return [h for count, _, h in sorted(counts, key=lambda c: c[:2], reverse=True)[:most] if count]
