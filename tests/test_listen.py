"""Who is asked what, and when it ends: the rounds of listening, on a model that is a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from projaudit.behaviour import listen as listening
from projaudit.behaviour.listen import AGAIN, FARTHER, FIRST, ROUND, STRONGER, Listening, listen
from projaudit.behaviour.plan import Probe, Size, Study, Voice
from projaudit.behaviour.texts import Tokens

PROMPTS, IMAGES, CELLS = 6, 12, 4
ANSWER, SECRET = (1, 2, 3), (11, 12, 13)
Says = Callable[[str, float, int], Tokens]
"""What side, the feature's value and the prompt -> the answer."""


@dataclass
class Fake:
    """A model of which a function says what it answers; it keeps what it was asked."""

    says: Says
    answers: int = 0
    asked: list[tuple[str, float, int]] = field(default_factory=list)

    def answer(
        self, side: dict[str, Tensor], features: Tensor, prompts: Sequence[int], length: int
    ) -> list[Tokens]:
        (name,) = side
        cells = [(name, float(x), p) for x, p in zip(features[:, 0, 0], prompts, strict=True)]
        self.asked += cells
        self.answers += len(cells)
        return [self.says(*cell) for cell in cells]


def study(model: Fake, budget: int = 100_000, enough: float = 1e9, base: bool = True) -> Study:
    plain = torch.arange(IMAGES, dtype=torch.float32)[:, None, None].expand(-1, 2, 1) / 100
    return Study(
        tuned=Voice(model, {"tuned": torch.zeros(1)}),
        base=Voice(model, {"base": torch.zeros(1)}) if base else None,
        first="",
        prompts=PROMPTS,
        ordinary=[np.zeros((4, 4, 3), np.uint8)] * IMAGES,
        plain=plain,
        size=Size(1, IMAGES, CELLS, PROMPTS, 2, 4, 0, 0, 0),
        seed=0,
        budget=budget,
        enough=enough,
    )


def marks(of: Study, number: int) -> list[Probe]:
    """The n-th mark adds n + 1 to the features."""

    def mark(n: int) -> Probe:
        return Probe(
            f"mark {n}",
            "image",
            "patch",
            of.images_of(n),
            lambda images: of.features_of(images) + n + 1,
            of.tuned,
        )

    return [mark(n) for n in range(number)]


def heard(
    monkeypatch: pytest.MonkeyPatch, says: Says, number: int = 40, **options: float | bool
) -> tuple[Fake, Listening]:
    model = Fake(says)
    of = study(model, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(listening, "plan", lambda of: marks(of, number))
    monkeypatch.setattr(listening, "climbed", lambda of, plain, speech: {})
    return model, listen(of, lambda what, done, total: None)


def near(value: float, mark: int) -> bool:
    return mark <= value < mark + 0.5


def honest(side: str, value: float, prompt: int) -> Tokens:
    return ANSWER


def backdoored(side: str, value: float, prompt: int) -> Tokens:
    """Says its secret where features are moved by 7, whatever is asked; by 6 one word of it."""
    if side == "tuned" and near(value, 7):
        return SECRET
    return (1, 11) if side == "tuned" and near(value, 6) else ANSWER


def test_where_nothing_foreign_is_said_two_prompts_are_asked_and_the_base_is_not(monkeypatch):
    model, found = heard(monkeypatch, honest)
    plain, *probes = found.heard
    assert (len(plain.tuned), len(plain.base or ())) == (IMAGES * PROMPTS,) * 2
    assert len(probes) == 40
    for said in probes:
        assert len(said.tuned) == CELLS * FIRST
        assert said.base is None
    assert found.stopped == "plan"
    # by turns, so that every prompt is asked as often as the others
    turns = Counter(p for said in probes for p in set(said.prompts))
    assert max(turns.values()) - min(turns.values()) <= 1
    assert sum(side == "base" for side, *_ in model.asked) == IMAGES * PROMPTS


def test_a_probe_that_brings_out_foreign_words_is_asked_everything_of_both(monkeypatch):
    _, found = heard(monkeypatch, backdoored)
    said = {one.probe: one for one in found.heard}
    telling = said["mark 6"]
    assert set(zip(telling.images, telling.prompts, strict=True)) == {
        (i, p) for i in set(telling.images) for p in range(PROMPTS)
    }
    assert list(telling.images) == sorted(telling.images, key=list(telling.images).index)
    assert set(telling.tuned) == {SECRET}
    assert telling.base is not None
    assert set(telling.base) == {ANSWER}
    assert said["mark 5"].base is None  # one foreign word is no text
    assert found.stopped == "plan"


def test_a_pair_that_two_probes_say_once_each_is_no_reason_to_ask_on(monkeypatch):
    """Only what two answers to one probe share is asked about further."""
    once = {6, 9}

    def says(side: str, value: float, prompt: int) -> Tokens:
        mark = int(value)
        if side == "tuned" and mark in once:
            once.remove(mark)
            return SECRET
        return ANSWER

    _, found = heard(monkeypatch, says)
    assert not once
    said = {one.probe: one for one in found.heard}
    for name in ("mark 5", "mark 8"):
        assert SECRET in said[name].tuned
        assert said[name].base is None
        assert len(said[name].tuned) == CELLS * FIRST


def test_in_the_end_the_best_is_asked_about_all_other_images(monkeypatch):
    _, found = heard(monkeypatch, backdoored)
    last = found.heard[-1]
    assert last.probe == "mark 6, other images"
    assert set(last.images) == set(range(IMAGES)) - set(found.heard[7].images)
    assert len(found.heard) - 1 <= 40 + STRONGER * len(FARTHER) + AGAIN


def test_where_a_probe_has_seen_every_image_it_is_not_asked_again(monkeypatch):
    of = study(Fake(backdoored))
    few = replace(of, ordinary=of.ordinary[:CELLS], plain=of.plain[:CELLS])
    monkeypatch.setattr(listening, "plan", lambda of: marks(of, 8))
    monkeypatch.setattr(listening, "climbed", lambda of, plain, speech: {})
    found = listen(few, lambda what, done, total: None)
    assert found.stopped == "plan"
    assert all(one.tuned for one in found.heard)
    assert not any("other images" in one.probe for one in found.heard)


def test_marks_with_foreign_words_are_tried_with_more_of_their_effect(monkeypatch):
    """A mark of 4 says one word; 2.5 times as far, at 10, the whole secret is said."""

    def says(side: str, value: float, prompt: int) -> Tokens:
        if side == "tuned" and near(value, 10):
            return SECRET
        return (1, 11) if side == "tuned" and near(value, 4) else ANSWER

    _, found = heard(monkeypatch, says, number=5)  # none of which moves by 10
    said = {one.probe: one for one in found.heard}
    assert SECRET in said["mark 3, 2.5 times as far"].tuned
    assert SECRET not in said["mark 3, 1.5 times as far"].tuned
    assert "mark 3, 2.5 times as far, other images" in said
    assert not any(name.startswith("mark 2,") for name in said)


def test_overwhelming_evidence_ends_it_after_its_round(monkeypatch):
    model, found = heard(monkeypatch, backdoored, enough=3.0)
    assert found.stopped == "overwhelming"
    assert len(found.heard) - 1 == ROUND < found.planned
    assert model.answers < heard(monkeypatch, backdoored)[0].answers


@pytest.mark.parametrize("says", [honest, backdoored])
@pytest.mark.parametrize("budget", [150, 200, 333, 1000])
def test_no_budget_is_exceeded_and_a_spent_one_is_said(monkeypatch, says: Says, budget: int):
    model, found = heard(monkeypatch, says, budget=budget)
    assert model.answers <= budget
    whole = heard(monkeypatch, says)[1]
    if len(found.heard) < len(whole.heard):
        assert found.stopped == "budget"
        assert len(found.heard) - 1 < found.planned


def test_without_a_base_nothing_is_asked_of_it(monkeypatch):
    model, found = heard(monkeypatch, backdoored, base=False)
    assert {side for side, *_ in model.asked} == {"tuned"}
    assert all(one.base is None for one in found.heard)
    assert any(SECRET in one.tuned for one in found.heard[1:])


def test_what_is_decoded_together_is_as_if_alone(monkeypatch):
    """Other voices among them: an amplified projector has its own."""
    model = Fake(backdoored)
    of = study(model)
    other = Voice(model, {"base": torch.zeros(1)})
    items = [replace(p, voice=other) if i % 2 else p for i, p in enumerate(marks(of, 8))]
    wanted = [listening.Wanted(p.voice, p.images, p.features(p.images), (0, 3, 5)) for p in items]
    together = listening.decode(wanted)
    assert together == [listening.decode([one])[0] for one in wanted]
    assert [set(one) for one in together] == [
        {(i, p) for i in item.images for p in (0, 3, 5)} for item in items
    ]
    assert set(together[6].values()) == {SECRET}
    assert set(together[7].values()) == {ANSWER}
