"""The smallest universal perturbation of the projector's input that brings a text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projaudit.behaviour.speaker import Side, Speaker
from projaudit.behaviour.texts import Tokens

RATE = 0.05
"""Step of Adam, times the typical norm of a feature over the root of its width."""
PULL = 0.3
"""Nats that a perturbation as long as the features themselves has to be worth."""


@dataclass(frozen=True)
class Found:
    """A perturbation (tokens, in), added to the features of every image alike."""

    perturbation: Tensor
    norm: float
    """Mean length over the tokens, over the typical norm of a feature."""
    likelihood: float
    """Mean ln p of a token of the text, under the perturbation, on images that it was not
    fitted to; −∞ … 0."""


def universal(
    speaker: Speaker,
    side: Side,
    text: Tokens,
    features: Tensor,
    prompts: int,
    *,
    fit: Sequence[int],
    test: Sequence[int],
    steps: int,
) -> Found:
    """The perturbation that makes `text` likely at the start of every answer.

    Minimises −mean ln p(text) + PULL · norm over all prompts and the images `fit`, by Adam from
    zero; the likelihood is that on the images `test`. It is BAIT's Q-score (S&P 2025) conditioned
    on the image tokens: exp(likelihood) is the mean probability of the text's tokens.
    """
    speaker.use(side)
    scale = float(features.norm(dim=-1).mean())
    shift = torch.zeros(features.shape[1:], device=features.device, requires_grad=True)
    adam = torch.optim.Adam([shift], lr=RATE * scale / features.shape[-1] ** 0.5, betas=(0.8, 0.95))
    for _ in range(steps):
        _likelihood(speaker, text, features, prompts, fit, shift, learn=True)
        (PULL * shift.norm(dim=-1).mean() / scale).backward()
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        value = _likelihood(speaker, text, features, prompts, test, shift, learn=False)
        return Found(shift.detach(), float(shift.norm(dim=-1).mean()) / scale, value)


def _likelihood(
    speaker: Speaker,
    text: Tokens,
    features: Tensor,
    prompts: int,
    images: Sequence[int],
    shift: Tensor,
    *,
    learn: bool,
) -> float:
    """Mean ln p of a token; leaves its gradient (of the negative) in `shift` where asked to."""
    cells = [(image, prompt) for image in images for prompt in range(prompts)]
    total, rows = 0.0, speaker.rows(len(text))
    for start in range(0, len(cells), rows):
        some = cells[start : start + rows]
        x = features[[image for image, _ in some]] + shift
        scores = speaker.log_likelihood(x, [p for _, p in some], [()] * len(some), text)
        share = scores.mean() * len(some) / len(cells)
        total += float(share)
        if learn:
            (-share).backward()  # type: ignore[no-untyped-call]
    return total
