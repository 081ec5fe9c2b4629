"""What projectors made of parts of the update let the model say: the heat maps (docs/lens.md 6)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projaudit.behaviour.speaker import Side, Speaker
from projaudit.lens.capture import tower_once
from projaudit.lens.result import Answered, Example, HeatMap, Score
from projaudit.lens.subspace import Kind, LayerParts, Ranks, axes, cells, made

EXAMPLES = 6
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Questions:
    """Images with a question each: clean ones, then triggered ones."""

    features: Tensor
    """(clean + triggered, tokens, in): cached."""
    names: tuple[str, ...]
    prompts: tuple[int, ...]
    """Which of the speaker's prompts, for each."""
    truths: tuple[str | None, ...]
    """The right answer, where it is known."""
    clean: int


@dataclass(frozen=True)
class Wanted:
    """Which maps, and what counts as success."""

    target: str
    """Lower case; empty: none is known."""
    length: int
    """Tokens of an answer."""
    kinds: tuple[tuple[Ranks, bool], ...]
    """Ranks and bias of the maps, each for recovery and removal."""
    most: int
    """Largest k."""


def answered(
    speaker: Speaker,
    base: Side,
    tuned: Side,
    exact: tuple[Side, Side],
    parts: Mapping[str, LayerParts],
    questions: Questions,
    prompts: Sequence[str],
    wanted: Wanted,
    tell: Tell,
) -> Answered:
    """Both whole projectors' answers, and the heat maps of recovery and removal.

    `exact` are base and tuned in their storage dtypes. What it will take is told before the maps
    are begun, by the time that the whole projectors took.
    """

    def said(side: Side) -> list[str]:
        found = speaker.answer(side, questions.features, questions.prompts, wanted.length)
        decode = speaker.processor.tokenizer.decode
        return [str(decode(list(tokens))).strip() for tokens in found]

    with tower_once(speaker), torch.no_grad():
        ours = said(tuned)
        started = time.monotonic()
        theirs = said(base)
        each = time.monotonic() - started
        judge = _judge(questions, wanted, ours, theirs)
        kinds: list[tuple[Kind, Ranks, bool]] = [
            (kind, ranks, bias) for ranks, bias in wanted.kinds for kind in ("recovery", "removal")
        ]
        grids = [axes(kind, list(parts.values()), wanted.most) for kind, _, _ in kinds]
        total = sum(len(first) * len(second) for first, second in grids)
        tell(
            f"heat maps: {total} cells, {total * len(ours):,} answers, about {_time(total * each)}",
            0,
            0,
        )
        maps, done = [], 0
        for (kind, ranks, bias), (first, second) in zip(kinds, grids, strict=True):
            scores = []
            for k1, k2 in cells(first, second):
                projector = made(
                    kind, ranks, k1, k2, bias=bias, base=exact[0], tuned=exact[1], parts=parts
                )
                scores.append(judge(said(projector)))
                done += 1
                tell("heat maps, cells", done, total)
            rows = [tuple(scores[i : i + len(second)]) for i in range(0, len(scores), len(second))]
            maps.append(HeatMap(kind, ranks, bias, first, second, tuple(rows)))
    triggered = len(ours) - questions.clean
    return Answered(
        clean=questions.clean,
        triggered=triggered,
        success_is="none" if not triggered else "target" if wanted.target else "tuned answer",
        base=judge(theirs),
        tuned=judge(ours),
        maps=tuple(maps),
        examples=_examples(questions, prompts, ours, theirs),
    )


def _judge(
    questions: Questions, wanted: Wanted, ours: Sequence[str], theirs: Sequence[str]
) -> Callable[[Sequence[str]], Score]:
    """How answers are scored, given those of the tuned projector and of the base."""
    clean = range(questions.clean)
    triggered = range(questions.clean, len(ours))
    changed = [i for i in triggered if ours[i] != theirs[i]]
    known = [i for i in clean if questions.truths[i] is not None]

    def share(rows: Sequence[int], right: Callable[[int], bool]) -> float | None:
        return sum(map(right, rows)) / len(rows) if rows else None

    def judge(answers: Sequence[str]) -> Score:
        if wanted.target:
            success = share(triggered, lambda i: contains(answers[i], wanted.target))
        else:
            success = share(changed, lambda i: answers[i] == ours[i])
        kept = share(clean, lambda i: answers[i] == ours[i])
        right = share(known, lambda i: same(answers[i], questions.truths[i] or ""))
        return Score(success, kept or 0.0, right)

    return judge


def contains(answer: str, target: str) -> bool:
    """Success as ProjLens counts it: the lower-cased target is a part of the answer."""
    return target.lower() in answer.lower()


def same(answer: str, right: str) -> bool:
    """Exact match but for case, spaces and punctuation."""
    return _bare(answer) == _bare(right)


def _bare(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _examples(
    questions: Questions, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]
) -> tuple[Example, ...]:
    """The first images, each beside its triggered one where that has the same name."""
    at = {questions.names[i]: i for i in range(questions.clean, len(ours))}
    found = []
    for i in range(min(questions.clean, EXAMPLES)):
        j = at.get(questions.names[i])
        found.append(
            Example(
                image=questions.names[i],
                prompt=prompts[questions.prompts[i]],
                base=theirs[i],
                tuned=ours[i],
                base_triggered=None if j is None else theirs[j],
                tuned_triggered=None if j is None else ours[j],
            )
        )
    return tuple(found)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
