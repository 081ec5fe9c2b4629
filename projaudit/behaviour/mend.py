"""In the confined process: the change of a projector that ends a hidden text and costs least else.

The model is probed as for an audit. The images that bring a text out, with their marks and
without, say what has to end; the tuned model's answers about ordinary images say what has to stay.
What is chosen is probed afresh, and what that brings out joins what has to end.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from projaudit.behaviour.change import Correction
from projaudit.behaviour.choose import Task, choose
from projaudit.behaviour.listen import Listening, Tell, listen
from projaudit.behaviour.loading import load
from projaudit.behaviour.places import in_module
from projaudit.behaviour.probe import study_of, weigh
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.behaviour.telling import further, further_answers, marked_of, texts_of
from projaudit.behaviour.texts import Heard
from projaudit.behaviour.told import whole
from projaudit.evidence import Tried
from projaudit.projector import Linear

ROUNDS = 3
"""Times that fresh probes are asked, whose findings join those of before."""


def mend(request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    """`evidence` and `mended`: an Evidence and a Mended but for their sandbox, as JSON values.

    The audit of the projector, and what ends what it heard. `request` is that of `probe.probe`,
    with `last` and `last_bias` (the last layer's tensors on disk) and `matrices` (the weights of
    all layers). The base is needed. Raises CouldNotProbe with a reason.
    """
    tell("load model", 0, 0)
    loaded = load(request)
    kept: list[Listening] = []
    evidence = weigh(request, *study_of(request, *loaded), tell, kept.append)
    return {"evidence": evidence, "mended": mended(request, *loaded, tell, heard=kept[0])}


def mended(
    request: Mapping[str, Any],
    tuned: tuple[Speaker, Side],
    base: tuple[Speaker, Side] | None,
    first: Linear,
    tell: Tell,
    hand: Callable[[Side], None] | None = None,
    heard: Listening | None = None,
) -> dict[str, Any]:
    """`evidence.Mended` of models that are loaded, with what was heard of them, if it was.

    `hand` is given the changed projector's tensors.
    """
    speaker, side = tuned
    task: Task | None = None
    known: Heard | None = None
    told: list[str] = []
    strengths: list[float] = []
    tried: list[Tried] = []
    best: tuple[Side, Correction | None] | None = None
    for number in range(ROUNDS + 1):
        of = {**request, "seed": int(request["seed"]) + number}
        study, _, _ = study_of(of, (speaker, side), base, first)
        study = replace(study, budget=study.budget + study.answers)  # of each round
        listening = heard if number == 0 and heard is not None else listen(study, tell)
        texts, strength = texts_of(listening, known)
        if texts and known is None:
            more = further(study)
            known = further_answers(study, more)
            texts, strength = texts_of(listening, known)
        strengths.append(strength)
        if not texts or number == ROUNDS:
            break
        foreign = listening.speech.foreign
        pairs = frozenset(
            pair for text in texts for pair in pairwise(text) if any(map(foreign, pair))
        )
        found = marked_of(study, listening, pairs)
        if task is None:
            if found is None:
                break
            # What was given stands for the domain better than any synthetic image.
            ordinary = more[:0] if request["images"] else more
            task = Task(study, *_layers(request), found, pairs, listening.heard[0], ordinary)
        elif found is None:
            task = replace(task, pairs=task.pairs | pairs, enlarged=True)
        else:
            task = replace(task, marked=task.marked + found, pairs=task.pairs | pairs)
        told += [study.words(whole(text, listening.heard)) for text in texts]
        tell("choose", 0, 0)
        tried, best = choose(task)
        side = best[0]
    if hand is not None:
        hand(side)
    return {
        "texts": list(dict.fromkeys(told)),
        "strengths": strengths,
        "tried": [asdict(one) for one in tried],
        "factors": None if best is None or best[1] is None else _plain(best[1]),
        "answers": study.answers,
        "notes": list(request["notes"]),
    }


def _layers(request: Mapping[str, Any]) -> tuple[tuple[str, str | None], tuple[str, ...]]:
    """The last layer's weight and bias, and the weights of all, by their names in the module."""

    def inside(name: str) -> str:
        return in_module(name, request["prefix"])

    bias = request["last_bias"]
    last = inside(request["last"]), None if bias is None else inside(bias)
    return last, tuple(map(inside, request["matrices"]))


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
