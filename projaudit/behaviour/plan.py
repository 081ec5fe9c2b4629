"""What a model is asked: ordinary images, marks over them, features moved, updates amplified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from projaudit.behaviour import images as pictures
from projaudit.behaviour.battery import battery, distorted
from projaudit.behaviour.directions import InputDirection, amplified, directions, random_directions
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.behaviour.texts import Speech, Tokens
from projaudit.projector import Linear

MILD, STRONG = (0.5, 1.0), (2.0,)
"""Lengths along a direction, over the typical length of a feature: on all tokens, on a few."""
OVERWHELMING = 40.0
"""Strength of a text that needs no more probes: four times what any honest model came to."""
LEADING = 2
"""Directions of every source."""
ENLARGED = ((1, 2.0), (5, 2.0), (1, 4.0), (5, 4.0))
"""Leading directions of the update that are enlarged, and how many times."""


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
    """`plain`, `image`, `direction` or `amplified`."""
    family: str
    """Of the marks; or where the direction is from."""
    images: tuple[int, ...]
    features: Callable[[Sequence[int]], Tensor]
    """Image numbers -> (images, tokens, in)."""
    voice: Voice
    shown: Callable[[int], pictures.Image] | None = None
    """Image number -> what is shown in its place; None where no image has the features."""


@dataclass(frozen=True)
class Size:
    """How much is asked, so that the plan fits the budget of a model's size."""

    pilot: int
    """Images of every ground by which it is found on which a model is at home."""
    plain: int
    """Ordinary images that are asked about as they are."""
    cells: int
    """Images under every probe; each is asked every prompt."""
    prompts: int
    fitted: int
    """Images that a short cut is fitted to; as many others say whether it is one."""
    steps: int
    """Of the search for a short cut."""
    drawn: int
    """Random marks, of which a fifth is kept to breed from."""
    rounds: int
    """Of breeding."""
    bred: int
    """Bred marks that are asked about, and half as many as they were drawn."""


SIZES = {
    "float32": Size(6, 48, 4, 6, 2, 16, 400, 6, 32),
    "bfloat16": Size(6, 16, 2, 4, 1, 8, 100, 2, 16),
}
"""By the dtype that a model runs in: small ones, and large ones."""


@dataclass(frozen=True)
class Study:
    """What a run works with; nothing of it changes."""

    tuned: Voice
    base: Voice | None
    first: Linear
    """The layer that reads the features, by its names in the projector's module."""
    prompts: int
    ordinary: Sequence[pictures.Image]
    plain: Tensor
    """(images, tokens, in): the features of the ordinary images."""
    size: Size
    seed: int
    budget: int
    tokens: int | None = None
    """Of an image's features, the first that are tokens of the projector; None: all."""
    enough: float = OVERWHELMING
    """Strength of a text from which on no more probes are run."""
    ground: int | None = None
    """On which most ordinary images are, of `images.GROUNDS`; None where they were given, or the
    budget is too small to ask."""

    @property
    def answers(self) -> int:
        """Answers decoded so far, on all sides."""
        speakers = {id(v.speaker): v.speaker for v in (self.tuned, self.base) if v}
        return sum(speaker.answers for speaker in speakers.values())

    @property
    def scale(self) -> float:
        """The typical length of a feature."""
        return float(self.plain[:, : self.tokens].norm(dim=-1).mean())

    def words(self, tokens: Tokens) -> str:
        """The text of some tokens."""
        text: str = self.tuned.speaker.processor.tokenizer.decode(list(tokens))
        return text.strip()

    def features_of(self, images: Sequence[int]) -> Tensor:
        """(images, tokens, in): those of ordinary images."""
        return self.plain[list(images)]

    def images_of(self, number: int) -> tuple[int, ...]:
        """The images of the probe of that number, in turn."""
        first = number * self.size.cells
        return tuple((first + i) % len(self.ordinary) for i in range(self.size.cells))

    def foreign(self, speech: Speech, speaker: Speaker) -> Tensor:
        """(vocabulary,): which tokens are foreign words, of all that a model can answer with.

        A base of its own may know fewer than the target: its width is what its answers have.
        """
        with torch.no_grad():
            vocabulary = speaker.log_probabilities(self.plain[:1], [0], [()], 1).shape[-1]
        special = set(speaker.processor.tokenizer.all_special_ids)
        words = [t not in special and speech.foreign(t) for t in range(vocabulary)]
        return torch.tensor(words, device=self.plain.device)


def plan(study: Study) -> list[Probe]:
    """The probes of all kinds in turn, so that a small budget sees something of each."""
    kinds = (_along(study), _over_images(study), _amplified(study))
    placed = [
        ((number + 0.5) / len(probes), kind, number, item)
        for kind, probes in enumerate(kinds)
        for number, item in enumerate(probes)
    ]
    return [item for *_, item in sorted(placed, key=lambda p: p[:3])]


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
    tokens = study.plain[:, : study.tokens].shape[1]
    few = max(1, tokens // 6)
    probes: list[Probe] = []

    def add(direction: InputDirection, length: float, where: slice, place: str) -> None:
        cells = study.images_of(len(probes))
        shift = length * study.scale * direction.vector

        def features(images: Sequence[int]) -> Tensor:
            moved = study.plain[list(images)].clone()
            moved[:, :tokens][:, where] += shift if shift.ndim == 1 else shift[:tokens][where]
            return moved

        name = f"{direction.source} {direction.number}, {length:+g} on {place}"
        probes.append(Probe(name, "direction", direction.source, cells, features, study.tuned))

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
    marks = battery(study.ordinary[0].shape[0], study.seed)
    generator = torch.Generator().manual_seed(study.seed + 1)
    order = torch.randperm(len(marks), generator=generator).tolist()

    return [
        over_images(
            study,
            number,
            marks[index].name,
            marks[index].family,
            partial(distorted, distortion=marks[index]),
        )
        for number, index in enumerate(order)
    ]


def over_images(
    study: Study,
    number: int,
    name: str,
    family: str,
    marked: Callable[[pictures.Image], pictures.Image],
) -> Probe:
    """Ordinary images with a mark over them; the images are those of that number."""

    def shown(image: int) -> pictures.Image:
        return marked(study.ordinary[image])

    def features(images: Sequence[int]) -> Tensor:
        return study.tuned.speaker.features(list(map(shown, images)))

    return Probe(name, "image", family, study.images_of(number), features, study.tuned, shown)


def _amplified(study: Study) -> list[Probe]:
    """Ordinary images through an update whose leading part is enlarged."""
    if study.base is None:
        return []

    probes = []
    for number, (rank, factor) in enumerate(ENLARGED):
        cells = study.images_of(number)
        side = amplified(study.tuned.side, study.base.side, rank, factor)
        voice = Voice(study.tuned.speaker, side)
        name = f"top {rank} of the update × {factor:g}"
        probes.append(Probe(name, "amplified", "update", cells, study.features_of, voice))
    return probes
