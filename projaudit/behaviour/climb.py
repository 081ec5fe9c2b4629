"""Marks that no list holds: those that the update answers most, bred until answers turn foreign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from projaudit.behaviour.marks import Mark, bred, drawn
from projaudit.behaviour.plan import Study
from projaudit.behaviour.texts import Heard, Speech

Origin: TypeAlias = Literal["drawn", "bred"]
Values: TypeAlias = npt.NDArray[np.float64]

ALIKE = 0.8
"""Cosine of two marks' sketches from which one of them is enough."""
PARENTS = 6
"""Marks that are bred from, for each image and end of an answer."""
CHILDREN = 2.5
"""Marks bred of each parent and round."""
IMAGES = (2, 3)
"""Ordinary images that marks are laid over while they are bred. Where a model is at home on a
ground the first has it, and the other another one."""
TOGETHER = 32
"""Marks whose features are held at once."""


def climbed(study: Study, plain: Heard, speech: Speech) -> dict[Origin, list[Mark]]:
    """The marks that are worth asking about: those the update answers most, and those bred of them.

    Drawn at random and ordered by `gains`; the leading ones are bred for some rounds by
    `agreements`: until answers to different prompts agree on a foreign word. Nothing of it knows a
    trigger or a text: a trigger is what little an image has to change for the update to change the
    answer to every prompt.
    """
    size, rng = study.size, np.random.default_rng([study.seed, 105])
    foreign = study.foreign(speech, study.tuned.speaker)
    if not foreign.any():
        return {}
    pixels = study.ordinary[0].shape[0]
    marks = [drawn(rng, pixels) for _ in range(size.drawn)]
    order = np.argsort(-gains(study, marks), kind="stable")
    marks = [marks[i] for i in order]
    marks = [marks[i] for i in unlike(marks, size.drawn // 5)]
    leading = marks[: size.bred // 2]
    heights = agreements(study, marks, plain, foreign)
    for _ in range(size.rounds):
        parents = _best(marks, heights, PARENTS)
        marks, heights = [marks[i] for i in parents], heights[parents]
        pairs = rng.integers(0, len(marks), (round(CHILDREN * len(marks)), 2))
        children = [bred(rng, marks[a], marks[b]) for a, b in pairs]
        marks += children
        heights = np.concatenate([heights, agreements(study, children, plain, foreign)])
    best = _best(marks, heights, size.bred // heights.shape[1])
    return {"drawn": leading, "bred": [marks[i] for i in best]}


def gains(study: Study, marks: Sequence[Mark]) -> Values:
    """(marks,): by how much the update's output changes, over the change of its input.

    ‖Δ(x′) − Δ(x)‖ / ‖x′ − x‖, Δ = P_tuned − P_base, x the features of an image and x′ those with
    the mark over it; both norms are means over tokens and images. Without a base Δ is P_tuned.
    """
    speaker = study.tuned.speaker
    plain = study.features_of(IMAGES)

    def update(x: Tensor) -> Tensor:
        speaker.use(study.tuned.side)
        after = speaker.forward(x)
        if study.base is None:
            return after
        speaker.use(study.base.side)
        return after - speaker.forward(x)

    found = []
    with torch.no_grad():
        before = update(plain)
        for x in _features(study, marks):
            change = (update(x) - before).norm(dim=-1).mean((1, 2))
            found.append(change / (x - plain).norm(dim=-1).mean((1, 2)).clamp_min(1e-12))
    return torch.cat(found).double().cpu().numpy()


def agreements(study: Study, marks: Sequence[Mark], plain: Heard, foreign: Tensor) -> Values:
    """(marks, 2·images): ln Σ_t exp(mean ln p(t)) over the foreign tokens t, the mean over prompts.

    For each of the images under the mark, at the start of the answer and at the end of what the
    tuned model says without the mark. 0 is one word for certain, whatever was asked. Images are not
    taken together: a trigger may act on dark ones only.
    """
    speaker = study.tuned.speaker
    ordinary = dict(zip(zip(plain.images, plain.prompts, strict=True), plain.tuned, strict=True))
    prompts = sorted({0, study.prompts // 2})
    cells = [(image, prompt) for image in IMAGES for prompt in prompts]
    asked = [prompt for _, prompt in cells]
    tails = [ordinary[cell] for cell in cells]
    last = max(map(len, tails)) + 1
    at = torch.tensor([[last - 1 - len(tail), last - 1] for tail in tails])
    together = max(1, speaker.rows(last) // len(cells))
    speaker.use(study.tuned.side)
    found = []
    with torch.no_grad():
        for x in _features(study, marks):
            for start in range(0, len(x), together):
                rows = x[start : start + together].repeat_interleave(len(prompts), 1).flatten(0, 1)
                n = len(rows) // len(cells)
                scores = speaker.log_probabilities(rows, asked * n, tails * n, last)
                each = scores[torch.arange(len(rows))[:, None], at.repeat(n, 1)][..., foreign]
                by_image = each.reshape(n, len(IMAGES), len(prompts), *each.shape[1:]).mean(2)
                found.append(by_image.logsumexp(-1).flatten(1))
    return torch.cat(found).double().cpu().numpy()


def unlike(marks: Sequence[Mark], most: int) -> list[int]:
    """The numbers of the first `most` marks that do not resemble an earlier one of them."""
    found: list[int] = []
    sketches: list[Values] = []
    for number, mark in enumerate(marks):
        if len(found) == most:
            break
        sketch = mark.sketch
        if all(sketch @ other < ALIKE for other in sketches):
            found.append(number)
            sketches.append(sketch)
    return found


def _best(marks: Sequence[Mark], heights: Values, most: int) -> list[int]:
    """The numbers of the highest marks of every column, in turn, `most` of each."""
    turns = []
    for height in heights.T:
        order = np.argsort(-height, kind="stable").tolist()
        turns.append([order[i] for i in unlike([marks[i] for i in order], most)])
    return list(dict.fromkeys(i for turn in zip_longest(*turns) for i in turn if i is not None))


def _features(study: Study, marks: Sequence[Mark]) -> Iterator[Tensor]:
    """(marks, images, tokens, in) of some marks at a time."""
    for start in range(0, len(marks), TOGETHER):
        some = marks[start : start + TOGETHER]
        pictures = [mark.over(study.ordinary[i]) for mark in some for i in IMAGES]
        x = study.tuned.speaker.features(pictures)
        yield x.reshape(len(some), len(IMAGES), *x.shape[1:])
