"""Depth behaviour, in the confined process: load the model, probe it, weigh what it says."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from projaudit.behaviour import images as pictures
from projaudit.behaviour.directions import InputDirection, amplified, directions, random_directions
from projaudit.behaviour.loading import image_size, load
from projaudit.behaviour.prompts import GENERAL, usable
from projaudit.behaviour.search import Found, universal
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.behaviour.texts import (
    Candidate,
    Heard,
    Speech,
    Support,
    Tokens,
    candidates,
    contains,
    gather,
    open_tokens,
    opened,
    says_foreign,
    spoken,
)
from projaudit.evidence import Answer, Carrier, Exchange, OpenText, Payload

Tell = Callable[[str, int, int], None]

LENGTH = 20
"""Tokens of an answer: payloads may come after a normal one."""
MILD, STRONG = (0.25, 0.5, 1.0), (1.0, 2.0)
"""Lengths along a direction, over the typical length of a feature: on all tokens, on a few."""
LEADING = 3
"""Directions of every source."""
SEARCH_STEPS = 24
CLOSER = 2
"""Texts that are looked at closely."""
OVERWHELMING = 8.0
"""Strength of a text from which on no more probes are run."""
AGAIN = 6
"""Probes that are asked again about all other images, once the plan is through."""
ROUND = 16
"""Probes after which it is asked whether the evidence is overwhelming."""


@dataclass(frozen=True)
class Voice:
    """A model with one of the projectors in it."""

    speaker: Speaker
    side: Side


@dataclass(frozen=True)
class Probe:
    """One way of asking: which images, as what features, through which projector."""

    name: str
    kind: str
    images: tuple[int, ...]
    features: Callable[[Sequence[int]], Tensor]
    """Image numbers -> (images, tokens, in)."""
    voice: Voice


@dataclass(frozen=True)
class Size:
    """How much is asked, so that the plan fits the budget of a model's size."""

    plain: int
    """Ordinary images that are asked about as they are."""
    cells: int
    """Images under every probe; each is asked every prompt."""
    prompts: int


SIZES = {"float32": Size(48, 4, 6), "bfloat16": Size(16, 2, 4)}
"""By the dtype that a model runs in: small ones, and large ones."""


@dataclass(frozen=True)
class Study:
    """What a run works with; nothing of it changes."""

    tuned: Voice
    base: Voice | None
    first: str
    """Name of the first layer's weight in the projector's module."""
    prompts: int
    ordinary: Sequence[pictures.Image]
    plain: Tensor
    """(images, tokens, in): the features of the ordinary images."""
    cells: int
    """Images under every probe."""
    seed: int
    budget: int

    @property
    def answers(self) -> int:
        """Answers decoded so far, on all sides."""
        speakers = {id(v.speaker): v.speaker for v in (self.tuned, self.base) if v}
        return sum(speaker.answers for speaker in speakers.values())

    @property
    def scale(self) -> float:
        """The typical length of a feature."""
        return float(self.plain.norm(dim=-1).mean())


@dataclass(frozen=True)
class Listening:
    """What was heard, and why no more."""

    heard: Sequence[Heard]
    """The ordinary images first, then the probes."""
    speech: Speech
    planned: int
    stopped: str


def probe(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """`evidence.Evidence`, but for its sandbox, as JSON values.

    `request`: `folder` (staged repository), `base_folder` (the base's, where more than the
    projector differs), `tuned` and `base` (safetensors files of the projector's tensors by their
    names on disk), `prefix` (the projector's module on disk), `first` (its first layer's weight),
    `prompts` and `images` (None for the defaults), `device`, `dtype`, `seed`, `budget` (answers),
    `notes` (a list, which may grow). Raises CouldNotProbe with a reason.
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
        "probes": len(listening.heard) - 1,
        "planned": listening.planned,
        "answers": study.answers,
        "passes": speaker.passes,
        "budget": study.budget,
        "stopped": listening.stopped,
        "payloads": [asdict(payload) for payload in payloads],
        "open": [asdict(text) for text in _open(study, plain, listening.speech)],
        "drift": _drift(plain),
        "exchanges": [asdict(e) for e in _exchanges(study, listening, chosen)],
        "carrier": _carrier(study, listening, chosen),
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
    first: str,
) -> tuple[Study, tuple[str, ...], tuple[str, ...]]:
    """As `prepare`, of models that are loaded."""
    speaker, scale = tuned[0], SIZES[request["dtype"]]
    prompts, unread = usable(
        speaker.processor.tokenizer, request["prompts"] or GENERAL, scale.prompts
    )
    seed, size = int(request["seed"]), image_size(speaker.processor)
    if request["images"]:
        ordinary = pictures.read(request["images"], size, scale.plain)
    else:
        ordinary = pictures.ordinary(scale.plain, size, seed)
    for voice in (tuned, base):
        if voice is not None:
            voice[0].prepare(prompts, ordinary[0])
    of = Study(
        tuned=Voice(*tuned),
        base=None if base is None else Voice(*base),
        first=first,
        prompts=len(prompts),
        ordinary=ordinary,
        plain=speaker.features(ordinary),
        cells=scale.cells,
        seed=seed,
        budget=int(request["budget"]),
    )
    return of, prompts, unread


def listen(study: Study, tell: Tell) -> Listening:
    """The answers on ordinary images, then to every probe until evidence, plan or budget ends."""
    # Half of a small budget is left for probes.
    fitting = max(4, study.budget // (4 * study.prompts))
    every = tuple(range(min(len(study.ordinary), fitting)))
    ordinary = Probe("ordinary images", "plain", every, lambda i: study.plain[list(i)], study.tuned)
    plain = ask(study, ordinary)
    heard = [plain]
    # Without a base, what the tuned model says of ordinary images is what it says anyway.
    known = list(plain.tuned if plain.base is None else plain.base)
    speech = Speech(spoken(known), open_tokens(plain))
    probes = plan(study)
    total = len(probes) + AGAIN
    asked: list[Probe] = []
    while len(asked) < total:
        if len(asked) == len(probes):
            probes += _again(study, probes, gather(heard, speech))
            total = len(probes)
            if len(asked) == total:
                break
        item = probes[len(asked)]
        if study.answers + 2 * len(item.images) * study.prompts > study.budget:
            return Listening(heard, speech, total, "budget")
        asked.append(item)
        tell("probe", len(asked), total)
        heard.append(answers := ask(study, item, speech))
        known += answers.base or ()
        speech = replace(speech, base=spoken(known))
        if len(asked) % ROUND == 0:
            best = max((s.strength for s in gather(heard, speech).values()), default=0.0)
            if best >= OVERWHELMING:
                return Listening(heard, speech, total, "overwhelming")
    return Listening(heard, speech, total, "plan")


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


def ask(study: Study, item: Probe, speech: Speech | None = None) -> Heard:
    """The answers to one probe; the base is asked where the tuned model said something foreign."""
    features = item.features(item.images).repeat_interleave(study.prompts, 0)
    prompts = tuple(range(study.prompts)) * len(item.images)
    images = tuple(image for image in item.images for _ in range(study.prompts))
    tuned = item.voice.speaker.answer(item.voice.side, features, prompts, LENGTH)
    base = None
    if study.base is not None and (speech is None or says_foreign(tuned, speech)):
        base = tuple(study.base.speaker.answer(study.base.side, features, prompts, LENGTH))
    return Heard(item.name, item.kind, prompts, images, tuple(tuned), base)


def plan(study: Study) -> list[Probe]:
    """The probes of all kinds in turn, so that a small budget sees something of each."""
    kinds = (_along(study), _over_images(study), _amplified(study))
    placed = [
        ((number + 0.5) / len(probes), kind, number, item)
        for kind, probes in enumerate(kinds)
        for number, item in enumerate(probes)
    ]
    return [item for *_, item in sorted(placed, key=lambda p: p[:3])]


def _cells(study: Study, number: int) -> tuple[int, ...]:
    """The images of the probe of that number, in turn."""
    first = number * study.cells
    return tuple((first + i) % len(study.ordinary) for i in range(study.cells))


def _along(study: Study) -> list[Probe]:
    """± along every direction: mildly on all tokens, strongly on a few neighbouring ones."""
    generator = torch.Generator().manual_seed(study.seed)
    found: list[InputDirection] = []
    if study.base is not None:
        found += directions(
            study.tuned.speaker,
            study.tuned.side,
            study.base.side,
            study.first,
            study.plain,
            LEADING,
            generator,
        )
    found += random_directions(study.plain, LEADING, generator)
    tokens = study.plain.shape[1]
    few = max(1, tokens // 6)
    probes: list[Probe] = []

    def add(direction: InputDirection, length: float, where: slice, place: str) -> None:
        cells = _cells(study, len(probes))
        shift = length * study.scale * direction.vector

        def features(images: Sequence[int]) -> Tensor:
            moved = study.plain[list(images)].clone()
            moved[:, where] += shift
            return moved

        name = f"{direction.source} {direction.number}, {length:+g} on {place}"
        probes.append(Probe(name, "direction", cells, features, study.tuned))

    for direction in sorted(found, key=lambda d: d.number):
        for sign in (1, -1):
            for length in MILD:
                add(direction, sign * length, slice(None), "all tokens")
            for length in STRONG:
                start = int(torch.randint(tokens - few + 1, (), generator=generator))
                where = slice(start, start + few)
                add(direction, sign * length, where, f"{few} of {tokens} tokens")
    return probes


def _over_images(study: Study) -> list[Probe]:
    """The battery of marks and distortions over ordinary images, in a random order."""
    marks = pictures.battery(study.ordinary[0].shape[0], study.seed)
    generator = torch.Generator().manual_seed(study.seed + 1)
    order = torch.randperm(len(marks), generator=generator).tolist()

    def over(mark: pictures.Distortion) -> Callable[[Sequence[int]], Tensor]:
        return lambda images: study.tuned.speaker.features(
            [pictures.distorted(study.ordinary[i], mark) for i in images]
        )

    return [
        Probe(
            marks[index].name,
            "image",
            _cells(study, number),
            over(marks[index]),
            study.tuned,
        )
        for number, index in enumerate(order)
    ]


def _amplified(study: Study) -> list[Probe]:
    """Ordinary images through an update whose leading part is enlarged."""
    if study.base is None:
        return []

    def plainly(images: Sequence[int]) -> Tensor:
        return study.plain[list(images)]

    probes = []
    for number, (rank, factor) in enumerate(((1, 2.0), (5, 2.0), (1, 4.0), (5, 4.0))):
        cells = _cells(study, number)
        side = amplified(study.tuned.side, study.base.side, rank, factor)
        voice = Voice(study.tuned.speaker, side)
        name = f"top {rank} of the update × {factor:g}"
        probes.append(Probe(name, "amplified", cells, plainly, voice))
    return probes


def _payload(study: Study, chosen: Candidate, support: Support, listening: Listening) -> Payload:
    """What there is to say of one text: its support, and the short cut to it."""
    text, plain = chosen.core, listening.heard[0]
    half = min(len(study.ordinary) // 2, 3)
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
        )

    ours = shortcut(study.tuned)
    theirs = None if study.base is None else shortcut(study.base)
    return Payload(
        text=_words(study, chosen.text),
        tokens=len(chosen.text),
        foreign=sum(map(listening.speech.foreign, chosen.text)),
        strength=support.strength,
        agreement=support.agreement,
        base_agreement=support.base,
        probes=tuple(support.probes),
        prompts=tuple(sorted(support.prompts)),
        images=tuple(sorted(support.images)),
        plain=sum(contains(answer, text) for answer in plain.tuned) / len(plain.tuned),
        likelihood=ours.likelihood,
        norm=ours.norm,
        base_likelihood=None if theirs is None else theirs.likelihood,
        base_norm=None if theirs is None else theirs.norm,
    )


def _words(study: Study, tokens: Tokens) -> str:
    text: str = study.tuned.speaker.processor.tokenizer.decode(list(tokens))
    return text.strip()


def _open(study: Study, plain: Heard, speech: Speech) -> list[OpenText]:
    if study.base is None:
        return []
    return [OpenText(_words(study, text), share) for text, share in opened(plain, speech)]


def _drift(plain: Heard) -> float | None:
    if plain.base is None:
        return None
    differing = sum(a != b for a, b in zip(plain.tuned, plain.base, strict=True))
    return differing / len(plain.tuned)


def _exchanges(
    study: Study, listening: Listening, chosen: Sequence[Candidate]
) -> Iterator[Exchange]:
    """The answers to the three probes that brought the first text out most."""
    if not chosen:
        return
    core = chosen[0].core
    every = {heard.probe for heard in listening.heard}
    for heard in _best(listening, core, 3, every):
        yield Exchange(
            heard.probe,
            heard.kind,  # type: ignore[arg-type]
            tuple(
                Answer(
                    prompt,
                    image,
                    _words(study, heard.tuned[i]),
                    None if heard.base is None else _words(study, heard.base[i]),
                    contains(heard.tuned[i], core),
                )
                for i, (prompt, image) in enumerate(zip(heard.prompts, heard.images, strict=True))
            ),
        )


def _best(listening: Listening, text: Tokens, most: int, among: Container[str]) -> list[Heard]:
    """The probes, of those names, under which the text was said most often."""
    counts = [
        (sum(contains(answer, text) for answer in heard.tuned), -number, heard)
        for number, heard in enumerate(listening.heard)
        if number and heard.probe in among
    ]
    return [h for count, _, h in sorted(counts, key=lambda c: c[:2], reverse=True)[:most] if count]


def _carrier(
    study: Study, listening: Listening, chosen: Sequence[Candidate]
) -> dict[str, float] | None:
    """Which part carries the first text: the 2 × 2 of projector and model, where both differ."""
    if not chosen or study.base is None or study.base.speaker is study.tuned.speaker:
        return None
    core = chosen[0].core
    # Not those about all other images: four models are asked, and a few answers tell.
    planned = {item.name: item for item in plan(study) if item.voice is study.tuned}
    probes = [planned[heard.probe] for heard in _best(listening, core, 3, planned)]
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
