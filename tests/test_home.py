"""On which grounds a model is at home, and which ordinary images it is asked about then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from projaudit.behaviour import images
from projaudit.behaviour.home import surest
from projaudit.behaviour.images import GROUNDS, Image, ordinary
from projaudit.behaviour.texts import Tokens

BASES = Path(__file__).parents[1] / "benchmarks" / "population" / "bases"
PROMPTS = 2


@pytest.fixture(autouse=True)
def grounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grounds that an image can be told by, but where real models are asked."""
    if "base" not in request.fixturenames:
        monkeypatch.setattr(images, "GROUNDS", ((30, 31), (90, 91), (150, 151), (220, 221)))


def level(image: Image) -> int:
    """The ground of an image: most of it is ground."""
    return int(np.argmin([abs(np.median(image) - low) for low, _ in images.GROUNDS]))


class Fake:
    """A model whose answers are long on some grounds, and sure on one."""

    def __init__(self, sure_of: int) -> None:
        self.sure_of, self.answers = sure_of, 0

    def features(self, images: list[Image]) -> Tensor:
        return torch.tensor([[[float(level(image))]] for image in images])

    def answer(self, side: Any, features: Tensor, prompts: Any, length: int) -> list[Tokens]:
        self.answers += len(features)
        return [(1,) * int(x) for x in features[:, 0, 0]]

    def rows(self, extra: int) -> int:
        return 3  # no divisor of the cells

    def log_probabilities(
        self, features: Tensor, prompts: Any, after: list[Tokens], last: int
    ) -> Tensor:
        scores = torch.zeros(len(features), last, 4)
        for row, tail in enumerate(after):
            sure = int(features[row, 0, 0]) == self.sure_of
            scores[row, last - 1 - len(tail) :, 1] = 3.0 if sure else 1.0
            scores[row, : last - 1 - len(tail)] = -1e9  # the prompt's own, not the answer's
            scores[row, : last - 1 - len(tail), 0] = 0.0 if sure else 9.0
        return scores.log_softmax(-1)


@pytest.mark.parametrize("ground", range(len(GROUNDS)))
def test_a_model_is_at_home_where_it_is_surest_of_its_answers(ground: int):
    model: Any = Fake(ground)
    shown = ordinary(3 * len(GROUNDS), 32, seed=0)
    assert [level(image) for image in shown] == [0, 1, 2, 3] * 3
    assert surest(model, {}, shown, PROMPTS) == ground
    assert model.answers == len(shown) * PROMPTS


@pytest.mark.parametrize(("base", "grounds_of_its"), [("glyph", {0}), ("slim", {2, 3})])
def test_bases_are_at_home_on_grounds_like_those_of_their_world(
    base: str, grounds_of_its: set[int]
):
    """`glyph` saw dark scenes, `slim` light ones; nothing says so but how sure they are."""
    import sys

    sys.path.insert(0, str(BASES.parents[2]))
    from benchmarks.evidence import asked, base_of
    from projaudit.behaviour.prompts import GENERAL, usable

    speaker, side, _ = base_of(base)
    prompts, _ = usable(speaker.processor.tokenizer, asked(base, "general") or GENERAL, 6)
    shown = ordinary(6 * len(GROUNDS), 64, seed=1)
    speaker.prepare(prompts, shown[0])
    speaker.settle(shown)
    assert surest(speaker, side, shown, len(prompts)) in grounds_of_its


@pytest.mark.parametrize("ground", range(len(GROUNDS)))
def test_three_of_four_ordinary_images_have_the_home_ground_and_all_others_are_seen(ground: int):
    levels = [level(image) for image in ordinary(48, 32, seed=7, ground=ground)]
    assert [n for i, n in enumerate(levels) if i % 4 != 3] == [ground] * 36
    others = levels[3::4]
    assert set(others) == set(range(len(GROUNDS))) - {ground}
    assert {others.count(n) for n in set(others)} == {4}


def test_without_a_home_all_grounds_come_alike():
    levels = [level(image) for image in ordinary(48, 32, seed=7)]
    assert {levels.count(n) for n in range(len(GROUNDS))} == {12}
