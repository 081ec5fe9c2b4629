"""The smallest universal perturbations of the projector's input that bring out a text, or any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from projaudit.behaviour.speaker import Side, Speaker
from projaudit.behaviour.texts import Tokens

Place: TypeAlias = Literal["start", "end"]

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
    tokens: int | None = None,
) -> Found:
    """The perturbation that makes `text` likely at the start of every answer.

    Minimises −mean ln p(text) + PULL · norm over all prompts and the images `fit`, by Adam from
    zero; the likelihood is that on the images `test`. It is BAIT's Q-score (S&P 2025) conditioned
    on the image tokens: exp(likelihood) is the mean probability of the text's tokens. Only the
    first `tokens` of an image are moved; None: all.
    """
    speaker.use(side)
    shift, adam, scale = _start(features[:, :tokens])
    for _ in range(steps):
        _likelihood(speaker, text, features, prompts, fit, shift, learn=True)
        (PULL * shift.norm(dim=-1).mean() / scale).backward()
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        value = _likelihood(speaker, text, features, prompts, test, shift, learn=False)
        return Found(shift.detach(), float(shift.norm(dim=-1).mean()) / scale, value)


def _start(features: Tensor) -> tuple[Tensor, torch.optim.Adam, float]:
    """A perturbation (tokens, in) of zero, its optimiser, and the typical length of a feature."""
    scale = float(features.norm(dim=-1).mean())
    shift = torch.zeros(features.shape[1:], device=features.device, requires_grad=True)
    rate = RATE * scale / features.shape[-1] ** 0.5
    return shift, torch.optim.Adam([shift], lr=rate, betas=(0.8, 0.95)), scale


def shifted(features: Tensor, shift: Tensor) -> Tensor:
    """Features (…, tokens, in) with a shift (some, in) added to the first tokens."""
    return features + pad(shift, (0, 0, 0, features.shape[-2] - shift.shape[0]))


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
        x = shifted(features[[image for image, _ in some]], shift)
        scores = speaker.log_likelihood(x, [p for _, p in some], [()] * len(some), text)
        share = scores.mean() * len(some) / len(cells)
        total += float(share.detach())
        if learn:
            (-share).backward()  # type: ignore[no-untyped-call]
    return total


@dataclass(frozen=True)
class Agreement:
    """A perturbation (tokens, in) under which answers to different prompts go on alike."""

    place: Place
    """`start` of the answer, or `end`, after the ordinary one."""
    perturbation: Tensor
    norm: float
    """Mean length over the tokens, over the typical norm of a feature."""
    token: int | None
    """The foreign token that most answers go on with; None where none does."""
    share: float
    """Of the answers, on images that it was not fitted to."""
    likelihood: float
    """ln Σ_t exp(mean ln p(t)) over the foreign tokens, on those images; −∞ … 0."""


def agreeing(
    speaker: Speaker,
    side: Side,
    features: Tensor,
    foreign: Tensor,
    place: Place,
    before: Mapping[tuple[int, int], Tokens],
    *,
    fit: Sequence[int],
    test: Sequence[int],
    steps: int,
    tokens: int | None = None,
) -> Agreement:
    """The perturbation by which all answers go on with one foreign token, whichever that is.

    Minimises −ln Σ_t exp(mean ln p(t)) + PULL · norm, the sum over the tokens t that the mask
    `foreign` (vocabulary) allows and the mean over the cells (image, prompt) of `before`, whose
    answers so far it holds; by Adam from zero. It knows neither trigger nor text: that a trigger is
    a short cut from every input alike is DECREE's idea (CVPR 2023), of encoders. `tokens` as in
    `universal`.
    """
    speaker.use(side)
    shift, adam, scale = _start(features[:, :tokens])

    def following(images: Sequence[int]) -> Tensor:
        """(cells, vocabulary): ln p of the next token."""
        cells = [cell for cell in before if cell[0] in images]
        tails = [before[cell] for cell in cells]
        rows = speaker.rows(max(map(len, tails)))

        def part(shift: Tensor, start: int) -> Tensor:
            some = cells[start : start + rows]
            x = shifted(features[[image for image, _ in some]], shift)
            prompts = [prompt for _, prompt in some]
            return speaker.log_probabilities(x, prompts, tails[start : start + rows], 1)[:, -1]

        if len(cells) <= rows:
            return part(shift, 0)
        # Computed again on the way back, so that there is never more than one part in memory.
        parts = range(0, len(cells), rows)
        return torch.cat([checkpoint(part, shift, i, use_reentrant=False) for i in parts])

    for _ in range(steps):
        alike = following(fit).mean(0)[foreign].logsumexp(0)
        (PULL * shift.norm(dim=-1).mean() / scale - alike).backward()
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        scores = following(test)
        said = scores.argmax(-1)
        counts = torch.bincount(said, minlength=len(foreign)) * foreign
        norm = float(shift.norm(dim=-1).mean()) / scale
        token = int(counts.argmax())
        share = float(counts[token]) / len(said)
        likelihood = float(scores.mean(0)[foreign].logsumexp(0))
        return Agreement(place, shift.detach(), norm, token if share else None, share, likelihood)
