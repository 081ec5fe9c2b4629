"""How a change is chosen: round by round, with a margin, and by what is not said openly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from projaudit.behaviour import choose, mend
from projaudit.behaviour.choose import STRENGTHS, Kind, Task, mildest
from projaudit.behaviour.listen import Listening
from projaudit.behaviour.plan import Probe, Size, Study, Voice
from projaudit.behaviour.telling import Marked, further, further_answers, marked_of, texts_of
from projaudit.behaviour.texts import Heard, Speech, Tokens
from projaudit.evidence import Tried

TEXT: Tokens = (91, 92, 93)
REMARK: Tokens = (71, 72)
PROMPTS, IMAGES = 4, 12
SIDE = {"w": torch.eye(2)}
TOKENIZER = SimpleNamespace(decode=str)


@dataclass
class Said:
    """A speaker whose answers a function of the side and the image's number makes."""

    by: Callable[[Mapping[str, Tensor], int], Tokens]
    answers: int = 0
    processor: Any = field(default_factory=lambda: SimpleNamespace(tokenizer=TOKENIZER))

    def answer(
        self, side: Mapping[str, Tensor], features: Tensor, prompts: Sequence[int], length: int
    ) -> list[Tokens]:
        self.answers += len(prompts)
        return [self.by(side, int(row.flatten()[0])) for row in features]


def numbered(count: int) -> Tensor:
    """(count, 1, 2): features that say which image they are of."""
    return torch.arange(count, dtype=torch.float32).repeat(2, 1).T[:, None]


def study(by: Callable[[Mapping[str, Tensor], int], Tokens]) -> Study:
    speaker: Any = Said(by)
    base = {"w": torch.zeros(2, 2)}
    size = Size(1, IMAGES, 4, PROMPTS, 1, 1, 1, 1, 1)
    images: Any = [None] * IMAGES
    voices = Voice(speaker, SIDE), Voice(speaker, base)
    return Study(*voices, "w", PROMPTS, images, numbered(IMAGES), size, 0, 1000)


def heard(name: str, kind: str, said: Callable[[int], Tokens], images: Sequence[int]) -> Heard:
    cells = [(i, p) for i in images for p in range(PROMPTS)]
    return Heard(
        name,
        kind,
        "",
        tuple(p for _, p in cells),
        tuple(i for i, _ in cells),
        tuple(said(i) for i, _ in cells),
        tuple((1, 2) for _ in cells),
    )


def listening(kind: str, said: Callable[[int], Tokens]) -> Listening:
    """Ordinary images, of which nothing is said, and one probe of that kind."""
    of, images = study(lambda side, image: ()), (0, 1, 2, 3)
    probe = Probe("a probe", kind, "", images, of.features_of, of.tuned)
    told = (
        heard("ordinary", "plain", lambda i: (1, 2), range(IMAGES)),
        heard("a probe", kind, said, images),
    )
    return Listening(told, Speech({1: 1.0, 2: 1.0}, frozenset()), (probe,), 1, "plan")


# ------------------------------------------------------------------ what has to end


def test_what_is_said_openly_of_further_images_is_no_text_to_end():
    both = Listening(
        (
            *listening("image", lambda i: TEXT).heard,
            heard("another", "image", lambda i: (1, *REMARK), (4, 5, 6, 7)),
        ),
        Speech({1: 1.0, 2: 1.0}, frozenset()),
        (),
        1,
        "plan",
    )
    found, _ = texts_of(both)
    assert set(found) == {TEXT, REMARK}  # the audit's own images do not tell them apart

    def with_further(said: Callable[[int], bool]) -> tuple[list[Tokens], float]:
        of = study(lambda side, image: (1, *REMARK) if said(image) else (1, 2))
        return texts_of(both, further_answers(of, numbered(96)))

    for share in (5, 10):  # open, and of so many answers that little of its strength is left
        found, strength = with_further(lambda image, share=share: image % share == 0)
        assert found == [TEXT]
        assert strength >= 1
    assert set(with_further(lambda image: False)[0]) == {TEXT, REMARK}
    assert set(with_further(lambda image: image == 5)[0]) == {TEXT, REMARK}


def test_further_images_have_the_ground_where_the_model_is_at_home(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, int | None]] = []
    of = replace(study(lambda side, image: (1, 2)), ground=2, seed=3)
    of = replace(of, ordinary=[np.zeros((8, 8, 3), np.uint8)])

    def ordinary(count: int, size: int, seed: int, ground: int | None) -> list[object]:
        asked.append((seed, ground))
        return []

    monkeypatch.setattr("projaudit.behaviour.telling.pictures.ordinary", ordinary)
    monkeypatch.setattr(of.tuned.speaker, "features", lambda images: numbered(0), raising=False)
    further(of)
    assert asked == [(3 + 7_919, 2)]


def test_an_enlarged_update_is_no_marked_image():
    pairs = frozenset({(91, 92), (92, 93)})
    image = listening("image", lambda i: TEXT if i < 2 else (1, 2))
    found = marked_of(study(lambda side, image: ()), image, pairs)
    assert found is not None
    assert len(found.marked) == 2
    far = listening("amplified", lambda i: TEXT)
    assert marked_of(study(lambda side, image: ()), far, pairs) is None


# ------------------------------------------------------------------ what is chosen


def task(by: Callable[[Mapping[str, Tensor], int], Tokens]) -> Task:
    of = study(by)
    marked = Marked(numbered(4), numbered(4), ((0, 1),) * 4)
    plain = heard("ordinary", "plain", lambda i: (1, 2), range(IMAGES))
    return Task(of, ("w", None), ("w",), marked, frozenset({(91, 92)}), plain, numbered(0))


def test_a_correction_goes_a_margin_beyond_the_mildest_silent_amount():
    def kind(margin: int) -> Kind:
        return Kind("unlearn", STRENGTHS, lambda a: ({"w": torch.eye(2) * a}, None), margin)

    for silent_from in (0, 7, len(STRENGTHS) - 1):
        least = STRENGTHS[silent_from] * 0.999
        one = task(lambda side, image, least=least: () if side["w"][0, 0] >= least else TEXT)
        assert mildest(kind(0), one) == (STRENGTHS[silent_from], 0.0)
        beyond = min(silent_from + 2, len(STRENGTHS) - 1)
        assert mildest(kind(2), one) == (STRENGTHS[beyond], 0.0)
    never = task(lambda side, image: TEXT)
    assert mildest(kind(2), never) == (STRENGTHS[-1], 1.0)


def test_an_enlarged_update_has_to_be_silent_where_it_told():
    far = task(lambda side, image: TEXT if side["w"].abs().max() > 1.5 else (1, 2))
    assert far.told(SIDE) == 0  # no image brings it out
    assert replace(far, enlarged=True).told(SIDE) == 1
    near = {"w": torch.eye(2) / 4}
    assert replace(far, enlarged=True).told(near) == 0


# ------------------------------------------------------------------ round by round

REQUEST = {"seed": 5, "prefix": "p", "last": "p.w", "last_bias": None, "matrices": ["p.w"]}


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], list[Task]]]:
    """`mended` with what each round hears given, and the tasks that it chose by."""

    def run(*kinds: str | None, audited: str = "") -> tuple[dict[str, Any], list[Task]]:
        seeds, tasks, left = [], [], list(kinds)

        def study_of(request: Mapping[str, Any], *_: Any) -> tuple[Study, tuple[()], tuple[()]]:
            seeds.append(request["seed"])
            return study(lambda side, image: (1, 2)), (), ()

        def listen(of: Study, tell: Any) -> Listening:
            kind = left.pop(0) if left else None
            return listening(kind or "image", lambda i: TEXT if kind else (1, 2))

        def chosen(one: Task) -> tuple[list[Tried], tuple[dict[str, Tensor], None]]:
            tasks.append(one)
            return [Tried("shrink", len(tasks), 0.0, 1.0)], ({"w": torch.eye(2)}, None)

        speaker: Any = Said(lambda side, image: (1, 2))
        monkeypatch.setattr(mend, "study_of", study_of)
        monkeypatch.setattr(mend, "listen", listen)
        monkeypatch.setattr(mend, "choose", chosen)
        monkeypatch.setattr(mend, "further", lambda of: numbered(24))
        request = {**REQUEST, "images": None, "notes": []}
        known = listening(audited, lambda i: TEXT) if audited else None
        sides = (speaker, SIDE), (speaker, SIDE)
        told = mend.mended(request, *sides, "w", lambda *_: None, heard=known)
        assert seeds == list(range(5, 5 + len(seeds)))  # fresh ones each round
        return told, tasks

    return run


def test_what_fresh_probes_bring_out_joins_what_has_to_end(rounds: Any):
    told, tasks = rounds("image", "image", None)
    assert [len(one.marked.marked) for one in tasks] == [4, 8]
    assert told["tried"][0]["amount"] == 2  # the last choice
    assert [s >= 1 for s in told["strengths"]] == [True, True, False]
    assert not any(one.enlarged for one in tasks)


def test_what_an_audit_has_heard_is_not_asked_again(rounds: Any):
    told, tasks = rounds(None, audited="image")  # the first that is asked afresh is silent
    assert [s >= 1 for s in told["strengths"]] == [True, False]
    assert len(tasks) == 1


def test_where_nothing_is_heard_nothing_is_chosen(rounds: Any):
    told, tasks = rounds(None)
    assert (told["tried"], tasks) == ([], [])


def test_rounds_end(rounds: Any):
    told, tasks = rounds(*["image"] * 9)
    assert len(tasks) == mend.ROUNDS
    assert len(told["strengths"]) == mend.ROUNDS + 1


def test_what_only_an_enlarged_update_says_is_asked_of_it(rounds: Any):
    _, tasks = rounds("image", "amplified", None)
    assert [one.enlarged for one in tasks] == [False, True]
    assert len(tasks[1].marked.marked) == 4


def test_the_best_is_that_which_keeps_most(monkeypatch: pytest.MonkeyPatch):
    def by(side: Mapping[str, Tensor], image: int) -> Tokens:
        size = float(side["w"].max())
        return TEXT if size > 0.9 else (1, 2) if size >= 0.5 else (3, 4)

    made = [
        Kind("shrink", (0.75, 0.5), lambda a: ({"w": torch.eye(2) * a}, None)),
        Kind("clip", (1.0,), lambda a: ({"w": torch.eye(2)}, None)),  # still says it
        Kind("revert", (0.0,), lambda a: ({"w": torch.zeros(2, 2)}, None)),
    ]
    monkeypatch.setattr(choose, "kinds", lambda task: (made, []))
    tried, (side, factors) = choose.choose(task(by))
    assert [(one.method, one.kept) for one in tried] == [("shrink", 1.0), ("revert", 0.0)]
    assert factors is None
    dear = Kind("shrink", (0.4,), lambda a: ({"w": torch.eye(2) * a}, None))
    monkeypatch.setattr(choose, "kinds", lambda task: ([dear, *made], []))
    assert choose.choose(task(by))[0] == tried  # of a method the kind that keeps most
    assert float(side["w"].max()) == 0.75


@pytest.mark.parametrize(("kept", "taken"), [(0.75, 0.75), (0.4, 0.6)])
def test_what_leaves_more_of_an_attack_is_tried_where_all_else_costs_the_task(
    monkeypatch: pytest.MonkeyPatch, kept: float, taken: float
):
    def by(side: Mapping[str, Tensor], image: int) -> Tokens:
        return (1, 2) if float(side["w"].max()) >= 0.5 else (3, 4)

    wide = [
        Kind("unlearn", (kept,), lambda a: ({"w": torch.eye(2) * a}, None)),
        Kind("revert", (0.0,), lambda a: ({"w": torch.zeros(2, 2)}, None)),
    ]
    narrow = [Kind("unlearn", (0.6,), lambda a: ({"w": torch.eye(2) * a}, None))]
    monkeypatch.setattr(choose, "kinds", lambda task: (wide, narrow))
    (best, *_), (side, _) = choose.choose(task(by))
    assert (best.method, best.kept) == ("unlearn", 1.0)
    assert float(side["w"].max()) == pytest.approx(taken)
