"""On which grounds a model is at home: where it is surest of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from projaudit.behaviour.images import GROUNDS, Image
from projaudit.behaviour.listen import LENGTH
from projaudit.behaviour.speaker import Side, Speaker


def surest(speaker: Speaker, side: Side, images: Sequence[Image], prompts: int) -> int:
    """The number of the ground about which a model is surest of what it says.

    By the mean, over all prompts and the places of its greedy answers, of ln p of the likeliest
    token; image i has ground i mod their number. A model is sure of what it was trained on, and a
    trigger works on pictures like those that it was trained with.
    """
    cells = list(product(range(len(images)), range(prompts)))
    features = speaker.features(images)[[image for image, _ in cells]]
    asked = [prompt for _, prompt in cells]
    said = speaker.answer(side, features, asked, LENGTH)
    last = max(map(len, said)) + 1
    sure = []
    rows = speaker.rows(last)
    with torch.no_grad():
        for start in range(0, len(cells), rows):
            part = slice(start, start + rows)
            scores = speaker.log_probabilities(features[part], asked[part], said[part], last)
            best = scores.amax(-1).double().cpu().numpy()
            sure += [
                row[-1 - len(answer) :].mean() for row, answer in zip(best, said[part], strict=True)
            ]
    grounds = [image % len(GROUNDS) for image, _ in cells]
    means = np.bincount(grounds, weights=sure) / np.bincount(grounds)
    return int(means.argmax())
