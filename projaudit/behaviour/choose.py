"""Which change of a projector ends a text and costs least else: each kind at its mildest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from projaudit.behaviour.change import (
    Correction,
    clipped,
    corrected,
    correction,
    shrunk,
    without_directions,
    without_top,
)
from projaudit.behaviour.directions import amplified
from projaudit.behaviour.listen import LENGTH
from projaudit.behaviour.plan import ENLARGED, Study
from projaudit.behaviour.speaker import Side
from projaudit.behaviour.telling import Marked
from projaudit.behaviour.texts import Heard, Tokens
from projaudit.evidence import COSTLY, Method, Tried

SILENT = 0.05
"""Share of the telling answers that may still hold a text."""
MARGIN = 1
"""Amounts from the mildest silent one to the one that is taken, of a correction."""
PROMPTS = 2
"""Prompts that each ordinary image is asked about a candidate."""
RANK, DAMPING = 64, 0.1
OUTPUTS = (2, 4, 8)
"""Directions of the last layer's outputs to which a correction is kept where in all of them it
costs the task: the leading ones of what marks do in the tuned projector and not in the base's."""
STRENGTHS = tuple(10 ** (step / 4) for step in range(-12, 7))
"""Of a correction, mildest first: 0.001 … 32."""
DIRECTIONS, TOPS, SHARES = (1, 2, 3, 4, 6, 8), (1, 2, 3, 5, 8), (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Task:
    """What a candidate is weighed by."""

    study: Study
    last: tuple[str, str | None]
    """Weight and bias of the last layer, in the projector's module."""
    matrices: tuple[str, ...]
    marked: Marked
    pairs: frozenset[tuple[int, int]]
    """Neighbouring tokens of the texts."""
    plain: Heard
    """The tuned model's answers about ordinary images."""
    more: Tensor
    """(images, tokens, in): features of ordinary images that are asked nothing."""
    enlarged: bool = False
    """Whether an enlarged update has to be silent too."""

    @property
    def tuned(self) -> Side:
        return self.study.tuned.side

    @property
    def base(self) -> Side:
        assert self.study.base is not None
        return self.study.base.side

    def speaks(self, answer: Tokens) -> bool:
        """Whether an answer holds a piece of a text."""
        return not self.pairs.isdisjoint(pairwise(answer))

    def told(self, side: Side) -> float:
        """Share of the telling answers that hold a piece of a text.

        Where enlarged updates have to be silent, that of theirs if it is more.
        """
        rows = [(i, prompt) for i, some in enumerate(self.marked.prompts) for prompt in some]
        features = self.marked.marked[[i for i, _ in rows]]
        said = self.study.tuned.speaker.answer(side, features, [p for _, p in rows], LENGTH)
        share = sum(map(self.speaks, said)) / len(said)
        return max(share, self._told_enlarged(side)) if self.enlarged else share

    def _told_enlarged(self, side: Side) -> float:
        """The greatest share, over enlarged updates, of answers about ordinary images."""
        images = range(min(self.study.size.plain // 4, len(self.study.ordinary)))
        rows = [(i, (i + turn) % self.study.prompts) for i in images for turn in range(PROMPTS)]
        features = self.study.features_of([i for i, _ in rows])
        shares = []
        for rank, factor in ENLARGED:
            far = amplified(side, self.base, rank, factor)
            said = self.study.tuned.speaker.answer(far, features, [p for _, p in rows], LENGTH)
            shares.append(sum(map(self.speaks, said)) / len(said))
        return max(shares)

    def kept(self, side: Side) -> float:
        """Share of the tuned model's answers about ordinary images that stay word for word.

        Of those that do not hold a piece of a text themselves.
        """
        rows = [
            i
            for i, (image, prompt) in enumerate(
                zip(self.plain.images, self.plain.prompts, strict=True)
            )
            if (prompt - image) % self.study.prompts < PROMPTS
            and not self.speaks(self.plain.tuned[i])
        ]
        features = self.study.plain[[self.plain.images[i] for i in rows]]
        prompts = [self.plain.prompts[i] for i in rows]
        said = self.study.tuned.speaker.answer(side, features, prompts, LENGTH)
        same = sum(a == self.plain.tuned[i] for a, i in zip(said, rows, strict=True))
        return same / max(1, len(rows))


@dataclass(frozen=True)
class Kind:
    """One kind of change, from mild to strong."""

    method: Method
    amounts: Sequence[float]
    make: Callable[[float], tuple[Side, Correction | None]]
    margin: int = 0
    """Amounts that it goes beyond the mildest silent one."""


def choose(task: Task) -> tuple[list[Tried], tuple[Side, Correction | None]]:
    """Every kind a margin beyond its mildest silent amount, best first, and the best's tensors.

    Of a method that comes in several kinds the best. Corrections in few directions leave more of
    some attacks, and are tried where all else costs the task. The whole update's removal is always
    silent, and the last resort.
    """
    found: list[tuple[float, int, Tried, tuple[Side, Correction | None]]] = []
    for some in kinds(task):
        if found and min(one[0] for one in found) <= -COSTLY:
            break
        for kind in some:
            amount, share = mildest(kind, task)
            if share <= SILENT or kind.method == "revert":
                made = kind.make(amount)
                one = Tried(kind.method, amount, share, 0.0)
                found.append((-task.kept(made[0]), len(found), one, made))
    found.sort(key=lambda one: one[:2])
    tried: dict[Method, Tried] = {}
    for kept, _, one, _ in found:
        tried.setdefault(one.method, replace(one, kept=-kept))
    return list(tried.values()), found[0][3]


def mildest(kind: Kind, task: Task) -> tuple[float, float]:
    """The mildest silent amount, by bisection, with the margin, and the share that still tells.

    The last amount where none is silent.
    """

    def told(at: int) -> float:
        return task.told(kind.make(kind.amounts[at])[0])

    low, high = 0, len(kind.amounts) - 1
    share = told(high)
    while low < high and share <= SILENT:
        middle = (low + high) // 2
        now = told(middle)
        if now <= SILENT:
            high, share = middle, now
        else:
            low = middle + 1
    beyond = min(high + kind.margin, len(kind.amounts) - 1)
    if beyond == high or share > SILENT:
        return kind.amounts[high], share
    farther = told(beyond)
    return (kind.amounts[beyond], farther) if farther <= SILENT else (kind.amounts[high], share)


def kinds(task: Task) -> tuple[list[Kind], list[Kind]]:
    """The kinds of change that are tried, and those that are tried where these cost the task."""
    # In float32, whatever the model runs in: it rounds what it is given.
    tuned, base = ({n: t.float() for n, t in side.items()} for side in (task.tuned, task.base))
    study = task.study
    speaker, marked = study.tuned.speaker, task.marked
    weight, bias = task.last

    def moved(side: Side, name: str) -> Tensor:
        """(rows, in): what the marks do to what a layer is handed."""
        return speaker.inputs(side, name, marked.marked) - speaker.inputs(side, name, marked.plain)

    ordinary = torch.cat([study.plain, task.more])
    h, m, p = (speaker.inputs(tuned, weight, x) for x in (ordinary, marked.marked, marked.plain))
    first = study.first.weight
    along = torch.linalg.svd(moved(tuned, first), full_matrices=False)[2]
    gained = (m - p) @ tuned[weight].T - moved(base, weight) @ base[weight].T
    leading = torch.linalg.svd(gained, full_matrices=False)[2]

    def unlearned(strength: float, outputs: int | None) -> tuple[Side, Correction]:
        own = None if bias is None else tuned[bias]
        within = None if outputs is None else leading[:outputs].T
        by = correction(tuned[weight], own, h, m, p, strength, DAMPING, RANK, within)
        return corrected(tuned, weight, bias, by), by

    def projected(k: float) -> tuple[Side, Correction]:
        v = along[: int(k)]
        by = Correction(-(tuned[first] - base[first]) @ v.T, v, None)
        return without_directions(tuned, base, first, v), by

    def corrections(outputs: int | None) -> Kind:
        return Kind("unlearn", STRENGTHS, partial(unlearned, outputs=outputs), MARGIN)

    return [
        corrections(None),
        Kind("project", DIRECTIONS, projected),
        Kind("top-k", TOPS, lambda k: (without_top(tuned, base, [first], int(k)), None)),
        Kind("shrink", SHARES, lambda share: (shrunk(tuned, base, share), None)),
        Kind("clip", (1.0,), lambda _: (clipped(tuned, base, task.matrices), None)),
        Kind("revert", (0.0,), lambda _: (shrunk(tuned, base, 0.0), None)),
    ], [corrections(k) for k in OUTPUTS]
