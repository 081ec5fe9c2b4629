"""In the confined process: the change of a projector that ends a hidden text and costs least else.

The model is probed as for an audit. The images that bring a text out, with their marks and
without, say what has to end; the tuned model's answers about ordinary images say what has to stay.
Every kind of change is tried at the mildest strength that silences the text, found by bisection;
the one that keeps most ordinary answers is chosen, and probed afresh.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

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
from projaudit.behaviour.listen import LENGTH, Listening, Tell, listen
from projaudit.behaviour.loading import load
from projaudit.behaviour.plan import Probe, Study
from projaudit.behaviour.probe import study_of
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.behaviour.texts import Heard, Tokens, candidates, gather, whole
from projaudit.evidence import Method, Tried
from projaudit.projector import Linear

WORTH = 1.0
"""Strength from which a text is ended: that of the rules."""
TEXTS = 2
SILENT = 0.05
"""Share of the telling answers that may still hold a text."""
ROUNDS = 3
"""Times that fresh probes are asked, whose findings join those of before."""
MOST = 48
"""Marked images that are kept of a round: those about which most prompts brought a text out."""
PROMPTS = 2
"""Prompts that each of them, and each ordinary image, is asked about a candidate."""
RANK, DAMPING = 64, 0.1
STRENGTHS = tuple(10 ** (step / 4) for step in range(-12, 7))
"""Of a correction, mildest first: 0.001 … 32."""
DIRECTIONS, TOPS, SHARES = (1, 2, 3, 4, 6, 8), (1, 2, 3, 5, 8), (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Marked:
    """Images about which a text was said, with the marks and without; features (n, tokens, in)."""

    marked: Tensor
    plain: Tensor
    prompts: tuple[tuple[int, ...], ...]
    """Of each image: some to which the text was said."""

    def __add__(self, other: Marked) -> Marked:
        return Marked(
            torch.cat([self.marked, other.marked]),
            torch.cat([self.plain, other.plain]),
            (*self.prompts, *other.prompts),
        )


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
        """Share of the telling answers that hold a piece of a text."""
        rows = [(i, prompt) for i, some in enumerate(self.marked.prompts) for prompt in some]
        features = self.marked.marked[[i for i, _ in rows]]
        said = self.study.tuned.speaker.answer(side, features, [p for _, p in rows], LENGTH)
        return sum(map(self.speaks, said)) / len(said)

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


def mend(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """`evidence.Mended`, but for its sandbox, as JSON values.

    `request` is that of `probe.probe`, with `last` and `last_bias` (the last layer's tensors on
    disk) and `matrices` (the weights of all layers). The base is needed. Raises CouldNotProbe with
    a reason.
    """
    tell("load model", 0, 0)
    return mended(request, *load(request), tell)


def mended(
    request: Mapping[str, Any],
    tuned: tuple[Speaker, Side],
    base: tuple[Speaker, Side] | None,
    first: Linear,
    tell: Tell,
    hand: Callable[[Side], None] | None = None,
) -> dict[str, Any]:
    """As `mend`, of models that are loaded; `hand` is given the changed projector's tensors."""
    speaker, side = tuned
    task: Task | None = None
    told: list[str] = []
    heard: list[float] = []
    tried: list[Tried] = []
    best: tuple[Side, Correction | None] | None = None
    for number in range(ROUNDS + 1):
        of = {**request, "seed": int(request["seed"]) + number}
        study, _, _ = study_of(of, (speaker, side), base, first)
        study = replace(study, budget=study.budget + study.answers)  # of each round
        asked: list[Probe] = []
        listening = listen(study, tell, asked)
        texts, strength = _texts(listening)
        heard.append(strength)
        if not texts or number == ROUNDS:
            break
        foreign = listening.speech.foreign
        pairs = frozenset(
            pair for text in texts for pair in pairwise(text) if any(map(foreign, pair))
        )
        found = _marked(study, asked, listening, pairs)
        if found is None:
            break
        told += [_words(speaker, whole(text, listening.heard)) for text in texts]
        if task is None:
            last, matrices = _layers(request)
            task = Task(study, last, matrices, found, pairs, listening.heard[0])
        else:
            task = replace(task, marked=task.marked + found, pairs=task.pairs | pairs)
        tell("choose", 0, 0)
        tried, best = choose(task)
        side = best[0]
    if hand is not None:
        hand(side)
    return {
        "texts": list(dict.fromkeys(told)),
        "strengths": heard,
        "tried": [asdict(one) for one in tried],
        "factors": None if best is None or best[1] is None else _plain(best[1]),
        "answers": study.answers,
        "notes": list(request["notes"]),
    }


def choose(task: Task) -> tuple[list[Tried], tuple[Side, Correction | None]]:
    """Every kind at its mildest silent strength, best first, and the best one's tensors.

    The whole update's removal is always silent, and the last resort.
    """
    found = []
    for order, kind in enumerate(kinds(task)):
        amount, share = mildest(kind, task)
        if share <= SILENT or kind.method == "revert":
            made = kind.make(amount)
            found.append((-task.kept(made[0]), order, Tried(kind.method, amount, share, 0.0), made))
    found.sort(key=lambda one: one[:2])
    return [replace(one, kept=-kept) for kept, _, one, _ in found], found[0][3]


def mildest(kind: Kind, task: Task) -> tuple[float, float]:
    """The mildest silent amount, by bisection, and the share that still tells; else the last."""
    low, high = 0, len(kind.amounts) - 1
    share = task.told(kind.make(kind.amounts[high])[0])
    while low < high and share <= SILENT:
        middle = (low + high) // 2
        told = task.told(kind.make(kind.amounts[middle])[0])
        if told <= SILENT:
            high, share = middle, told
        else:
            low = middle + 1
    return kind.amounts[high], share


def kinds(task: Task) -> list[Kind]:
    """The kinds of change that are tried."""
    # In float32, whatever the model runs in: it rounds what it is given.
    tuned, base = ({n: t.float() for n, t in side.items()} for side in (task.tuned, task.base))
    study = task.study
    speaker, marked = study.tuned.speaker, task.marked
    weight, bias = task.last

    def inputs(name: str, features: Tensor) -> Tensor:
        return speaker.inputs(tuned, name, features)

    h, m, p = (inputs(weight, x) for x in (study.plain, marked.marked, marked.plain))
    first = study.first.weight
    moved = inputs(first, marked.marked) - inputs(first, marked.plain)
    along = torch.linalg.svd(moved, full_matrices=False)[2]

    def unlearned(strength: float) -> tuple[Side, Correction]:
        own = None if bias is None else tuned[bias]
        by = correction(tuned[weight], own, h, m, p, strength, DAMPING, RANK)
        return corrected(tuned, weight, bias, by), by

    def projected(k: float) -> tuple[Side, Correction]:
        v = along[: int(k)]
        by = Correction(-(tuned[first] - base[first]) @ v.T, v, None)
        return without_directions(tuned, base, first, v), by

    return [
        Kind("unlearn", STRENGTHS, unlearned),
        Kind("project", DIRECTIONS, projected),
        Kind("top-k", TOPS, lambda k: (without_top(tuned, base, [first], int(k)), None)),
        Kind("shrink", SHARES, lambda share: (shrunk(tuned, base, share), None)),
        Kind("clip", (1.0,), lambda _: (clipped(tuned, base, task.matrices), None)),
        Kind("revert", (0.0,), lambda _: (shrunk(tuned, base, 0.0), None)),
    ]


def _texts(listening: Listening) -> tuple[list[Tokens], float]:
    """The texts that are worth ending, as they are told, and the greatest strength."""
    found = gather(listening.heard, listening.speech)
    chosen = candidates(found, listening.speech, TEXTS)
    strengths = [found[c.core].strength for c in chosen]
    worth = [c.text for c, s in zip(chosen, strengths, strict=True) if s >= WORTH]
    return worth, max(strengths, default=0.0)


def _marked(
    study: Study,
    asked: Sequence[Probe],
    listening: Listening,
    pairs: frozenset[tuple[int, int]],
) -> Marked | None:
    """The images that told, those first about which most prompts did; None where none has a mark.

    Directions and amplified updates are left out, unless nothing else tells: no image has such
    features.
    """
    rows: list[tuple[bool, float, int, int, int, tuple[int, ...]]] = []
    for number, (item, heard) in enumerate(zip(asked, listening.heard[1:], strict=True)):
        if item.kind == "amplified":  # it is about another update
            continue
        for place, image in enumerate(item.images):
            cells = [i for i, other in enumerate(heard.images) if other == image]
            telling = [
                heard.prompts[i] for i in cells if not pairs.isdisjoint(pairwise(heard.tuned[i]))
            ]
            if telling:
                share = len(telling) / study.prompts
                some = tuple(telling[:PROMPTS])
                rows.append((item.kind != "image", -share, number, place, image, some))
    rows.sort()
    images = [row for row in rows if not row[0]] or rows
    if not images:
        return None
    images = images[:MOST]
    features = {n: asked[n].features(asked[n].images) for _, _, n, *_ in images}
    return Marked(
        torch.stack([features[n][place] for _, _, n, place, _, _ in images]),
        study.features_of([image for *_, image, _ in images]),
        tuple(prompts for *_, prompts in images),
    )


def _layers(request: Mapping[str, Any]) -> tuple[tuple[str, str | None], tuple[str, ...]]:
    """The last layer's weight and bias, and the weights of all, by their names in the module."""

    def inside(name: str) -> str:
        return name.removeprefix(request["prefix"]).lstrip(".")

    bias = request["last_bias"]
    last = inside(request["last"]), None if bias is None else inside(bias)
    return last, tuple(map(inside, request["matrices"]))


def _words(speaker: Speaker, text: Tokens) -> str:
    said: str = speaker.processor.tokenizer.decode(list(text))
    return said.strip()


def _plain(by: Correction) -> dict[str, Any]:
    """`evidence.Factors` as JSON values."""

    def packed(tensor: Tensor) -> str:
        return base64.b64encode(tensor.float().cpu().contiguous().numpy().tobytes()).decode()

    return {
        "rank": by.right.shape[0],
        "left": packed(by.left),
        "right": packed(by.right),
        "bias": None if by.bias is None else packed(by.bias),
    }
