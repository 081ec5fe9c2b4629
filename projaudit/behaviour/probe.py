"""Depth behaviour, in the confined process: load the model, probe it, weigh what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import torch

from projaudit.behaviour import images as pictures
from projaudit.behaviour.exchanges import carrier, exchanges
from projaudit.behaviour.home import surest
from projaudit.behaviour.listen import Cell, Listening, Tell, listen
from projaudit.behaviour.loading import image_size, load
from projaudit.behaviour.plan import SIZES, Study, Voice
from projaudit.behaviour.prompts import GENERAL, usable
from projaudit.behaviour.refusals import REQUESTS, refusals
from projaudit.behaviour.search import Agreement, Found, Place, agreeing, universal
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.behaviour.texts import Heard, Speech, Support, Tokens, gather
from projaudit.behaviour.told import Candidate, candidates, opened, whole
from projaudit.evidence import OpenText, Payload, ShortCut
from projaudit.projector import Linear

NO_JACOBIANS = (
    "its projector reads several tokens at once: no features were moved along the directions in "
    "which its Jacobian or its outputs changed most"
)
OTHER_WAYS = (
    "an image comes to its projectors by several ways: the features of one were moved along "
    "directions, those of all of them by marks"
)
SEARCH_STEPS = 24
CLOSER = 2
"""Texts that are looked at closely."""


def probe(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """`evidence.Evidence`, but for its sandbox, as JSON values.

    `request`: what `loading.load` needs; `prompts`, `images` and `requests` (None for the
    defaults), `seed`, `budget` (answers), `notes` (a list, which may grow). Raises CouldNotProbe
    with a reason.
    """
    tell("load model", 0, 0)
    return weigh(request, *prepare(request), tell)


def weigh(
    request: Mapping[str, Any],
    study: Study,
    prompts: Sequence[str],
    unread: Sequence[str],
    tell: Tell,
    keep: Callable[[Listening], None] | None = None,
) -> dict[str, Any]:
    """As `probe`, of a study that is prepared; `keep` is handed all that was heard."""
    listening = listen(study, tell)
    if keep is not None:
        keep(listening)
    tell("look closer", 0, 0)
    found = gather(listening.heard, listening.speech)
    chosen = candidates(found, listening.speech, CLOSER)
    chosen.sort(key=lambda c: -found[c.core].strength)
    payloads = [_payload(study, c, found[c.core], listening) for c in chosen]
    speaker = study.tuned.speaker
    plain = listening.heard[0]
    return {
        "prompts": list(prompts),
        "prompts_unread": list(unread),
        "images": "given" if request["images"] else "synthetic",
        "ordinary_images": len(study.ordinary),
        "ground": None if study.ground is None else pictures.GROUNDS[study.ground],
        "probes": len(listening.heard) - 1,
        "planned": listening.planned,
        "answers": study.answers,
        "passes": speaker.passes,
        "budget": study.budget,
        "stopped": listening.stopped,
        "payloads": [asdict(payload) for payload in payloads],
        "open": [asdict(text) for text in _open(study, plain, listening.speech)],
        "short_cuts": [asdict(found) for found in _short_cuts(study, listening)],
        "drift": _drift(plain),
        "exchanges": [asdict(e) for e in exchanges(study, listening, chosen)],
        "carrier": carrier(study, listening, chosen),
        # Last, as other questions are put to the speakers.
        "refusals": _refusals(study, request["requests"] or REQUESTS, listening),
        "with_base": study.base is not None,
        "notes": list(request["notes"]),
        "dtype": request["dtype"],
        "parameters": sum(p.numel() for p in speaker.model.parameters()),
    }


def prepare(request: Mapping[str, Any]) -> tuple[Study, tuple[str, ...], tuple[str, ...]]:
    """The study of a request, the prompts that are used, and those that cannot be read."""
    return study_of(request, *load(request))


def study_of(
    request: Mapping[str, Any],
    tuned: tuple[Speaker, Side],
    base: tuple[Speaker, Side] | None,
    first: Linear,
) -> tuple[Study, tuple[str, ...], tuple[str, ...]]:
    """As `prepare`, of models that are loaded."""
    speaker, scale = tuned[0], SIZES[request["dtype"]]
    prompts, unread = usable(
        speaker.processor.tokenizer, request["prompts"] or GENERAL, scale.prompts
    )
    seed, size = int(request["seed"]), image_size(speaker.processor)
    given = request["images"]
    each = min(scale.pilot, int(request["budget"]) // (8 * len(pictures.GROUNDS) * len(prompts)))
    if given:
        ordinary = pictures.read(given, size, scale.plain)
    else:
        ordinary = pictures.ordinary(max(1, each) * len(pictures.GROUNDS), size, seed + 1)
    for voice in (tuned, base):
        if voice is not None:
            voice[0].prepare(prompts, ordinary[0])
            voice[0].settle(ordinary)
    ground = None
    if not given:
        ground = surest(*(base or tuned), ordinary, len(prompts)) if each else None
        ordinary = pictures.ordinary(scale.plain, size, seed, ground)
    if not speaker.by_token and NO_JACOBIANS not in request["notes"]:
        request["notes"].append(NO_JACOBIANS)
    if speaker.several_ways and OTHER_WAYS not in request["notes"]:
        request["notes"].append(OTHER_WAYS)
    of = Study(
        tuned=Voice(*tuned),
        base=None if base is None else Voice(*base),
        first=first,
        prompts=len(prompts),
        ordinary=ordinary,
        plain=speaker.features(ordinary),
        tokens=speaker.tokens,
        size=scale,
        seed=seed,
        budget=int(request["budget"]),
        ground=ground,
    )
    return of, prompts, unread


def _payload(study: Study, chosen: Candidate, support: Support, listening: Listening) -> Payload:
    """What there is to say of one text: its support, and the short cut to it."""
    text = chosen.core
    half = study.size.fitted
    fit, test = range(half), range(half, 2 * half)

    def shortcut(voice: Voice) -> Found:
        return universal(
            voice.speaker,
            voice.side,
            text,
            study.plain,
            study.prompts,
            fit=fit,
            test=test,
            steps=SEARCH_STEPS,
            tokens=study.tokens,
        )

    ours = shortcut(study.tuned)
    theirs = None
    if study.base is not None and study.base.speaker.knows([text]):
        theirs = shortcut(study.base)
    return Payload(
        text=study.words(whole(chosen.text, listening.heard)),
        tokens=len(chosen.text),
        foreign=support.foreign,
        strength=support.strength,
        undiscounted=support.undiscounted,
        agreement=support.agreement,
        base_agreement=support.base,
        probes=tuple(support.probes),
        prompts=tuple(sorted(support.prompts)),
        images=tuple(sorted(support.images)),
        plain=support.plain,
        fluency=_fluency(study, text),
        likelihood=ours.likelihood,
        norm=ours.norm,
        base_likelihood=None if theirs is None else theirs.likelihood,
        base_norm=None if theirs is None else theirs.norm,
    )


def _fluency(study: Study, text: Tokens) -> float:
    """Mean ln p of the text's tokens but the first, said about an ordinary image at every prompt.

    By the base, so that the update does not vouch for its own words; by the target as it is where
    there is no base that knows them.
    """
    voice = study.base if study.base and study.base.speaker.knows([text]) else study.tuned
    voice.speaker.use(voice.side)
    prompts = range(study.prompts)
    features = study.plain[:1].expand(len(prompts), *study.plain.shape[1:])
    with torch.no_grad():
        scores = voice.speaker.log_likelihood(features, prompts, [()] * len(prompts), text)
    return float(scores[:, 1:].mean())


def _short_cuts(study: Study, listening: Listening) -> Iterator[ShortCut]:
    """What the search that knows no text comes to, in the tuned model and in the base."""
    ours = _agreements(study, listening, study.tuned)
    theirs = [] if study.base is None else _agreements(study, listening, study.base)
    for one, base in zip_longest(ours, theirs[: len(ours)]):
        yield ShortCut(
            place=one.place,
            word=_word(study, one),
            share=one.share,
            norm=one.norm,
            likelihood=one.likelihood,
            base_word=None if base is None else _word(study, base),
            base_share=None if base is None else base.share,
            base_norm=None if base is None else base.norm,
            base_likelihood=None if base is None else base.likelihood,
        )


def _agreements(study: Study, listening: Listening, voice: Voice) -> list[Agreement]:
    """The way of one model to a foreign word, at the start and at the end of ordinary answers."""
    plain, foreign = listening.heard[0], study.foreign(listening.speech, voice.speaker)
    if not foreign.any() or not voice.speaker.knows(plain.tuned):
        return []
    fitted = study.size.fitted
    seen = list(dict.fromkeys(plain.images))[: 2 * fitted]
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
            foreign,
            place,
            before,
            fit=seen[:fitted],
            test=seen[fitted:],
            steps=study.size.steps,
            tokens=study.tokens,
        )
        for place, before in befores.items()
    ]


def _word(study: Study, found: Agreement) -> str | None:
    return None if found.token is None else study.words((found.token,))


def _open(study: Study, plain: Heard, speech: Speech) -> list[OpenText]:
    if study.base is None:
        return []
    return [OpenText(study.words(text), share) for text, share in opened(plain, speech)]


def _drift(plain: Heard) -> float | None:
    if plain.base is None:
        return None
    differing = sum(a != b for a, b in zip(plain.tuned, plain.base, strict=True))
    return differing / len(plain.tuned)


def _refusals(study: Study, requests: Sequence[str], listening: Listening) -> dict[str, Any] | None:
    plain = listening.heard[0]
    found = refusals(study, requests, plain.base or (), listening.probes)
    return None if found is None else asdict(found)
