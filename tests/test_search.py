"""The search for short cuts, on models of which the way there is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from projaudit.behaviour.search import Agreement, agreeing
from projaudit.behaviour.texts import Tokens

IMAGES, TOKENS, WIDTH, WORDS = 4, 3, 8, 6
SECRET = 5
FOREIGN = torch.tensor([False, False, False, False, True, True])
CELLS = [(image, prompt) for image in range(IMAGES) for prompt in range(3)]


@dataclass
class Linear:
    """ln p of the next word, linear in the mean feature: `easy` says how steep the way to it is."""

    easy: dict[int, float]
    room: int = 100
    after_end: bool = False

    def use(self, side: object) -> None:
        pass

    def rows(self, extra: int) -> int:
        return self.room

    def log_probabilities(
        self, features: Tensor, prompts: Sequence[int], after: Sequence[Tokens], last: int
    ) -> Tensor:
        weight = torch.zeros(WIDTH, WORDS)
        for word, slope in self.easy.items():
            weight[word, word] = slope
        own = torch.tensor([[4.0 if w == p else 0.0 for w in range(WORDS)] for p in prompts])
        scores = features.mean(1) @ weight + own
        if self.after_end and not all(after):
            scores = own  # only what follows an answer can be moved
        return scores.log_softmax(-1)[:, None].expand(-1, last, -1)


def found(
    model: Linear, before: Tokens = (), steps: int = 40, foreign: Tensor = FOREIGN
) -> Agreement:
    features = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return agreeing(
        model,  # type: ignore[arg-type]
        {},
        features,
        foreign,
        "end" if before else "start",
        dict.fromkeys(CELLS, before),
        fit=[0, 1],
        test=[2, 3],
        steps=steps,
    )


def test_the_word_that_is_a_short_way_off_is_found_and_no_other():
    one = found(Linear({SECRET: 12.0, 4: 1.0}))
    assert (one.token, one.share) == (SECRET, 1.0)
    assert one.likelihood > -0.5
    assert 0 < one.norm < 1


def test_where_no_word_can_be_reached_none_is_named():
    one = found(Linear({}))
    assert (one.token, one.share) == (None, 0.0)
    assert one.norm < 0.05  # and nothing is moved in vain
    assert one.likelihood < -2


def test_a_steeper_way_is_a_shorter_one():
    norms = [found(Linear({SECRET: slope}), steps=200).norm for slope in (10.0, 40.0)]
    assert norms[1] < norms[0]


def test_words_that_are_not_foreign_are_not_looked_for():
    one = found(Linear({2: 12.0}))
    assert (one.token, one.share) == (None, 0.0)


def test_what_follows_an_answer_is_looked_for_there():
    model = Linear({SECRET: 12.0}, after_end=True)
    assert found(model).token is None
    assert found(model, before=(1, 2)).token == SECRET


@pytest.mark.parametrize("room", [1, 2, 5])
def test_parts_give_what_the_whole_gives(room: int):
    whole, parts = (found(Linear({SECRET: 6.0}, room=r), steps=10) for r in (100, room))
    assert torch.allclose(whole.perturbation, parts.perturbation, atol=1e-5)
    assert whole.likelihood == pytest.approx(parts.likelihood, abs=1e-4)
