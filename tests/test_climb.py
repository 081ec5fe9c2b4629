"""Marks that no list holds: how they are drawn, ordered and bred, on models that are functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from projaudit.behaviour.climb import ALIKE, agreements, climbed, gains, unlike
from projaudit.behaviour.images import Image, ordinary
from projaudit.behaviour.marks import Mark, bred, drawn
from projaudit.behaviour.plan import Size, Study, Voice
from projaudit.behaviour.texts import Heard, Speech, Tokens
from projaudit.data import data_path

PIXELS, IMAGES, PROMPTS, WORDS = 16, 4, 3, 6
OWN, SECRET = (1, 2), 5
SPEECH = Speech({0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}, frozenset({4}))
"""5 is the only foreign word."""


@dataclass
class Fake:
    """Sees mean colours of four quarters; its projector is a matrix, its words are linear in that.

    `secret` (12,) is what calls up the foreign word: at the start of an answer, or at its end.
    """

    secret: Tensor
    at_end: bool = False
    used: dict[str, Tensor] = field(default_factory=dict)
    processor: object = field(
        default_factory=lambda: SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[]))
    )

    def features(self, images: Sequence[Image]) -> Tensor:
        seen = torch.tensor(np.stack(images)).float() / 255
        half = PIXELS // 2
        quarters = seen.reshape(-1, 2, half, 2, half, 3).mean((2, 4))
        return quarters.reshape(len(images), 1, 12)

    def use(self, side: dict[str, Tensor]) -> None:
        self.used = side

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.used["weight"]

    def rows(self, extra: int) -> int:
        return 10

    def log_probabilities(
        self, features: Tensor, prompts: Sequence[int], after: Sequence[Tokens], last: int
    ) -> Tensor:
        scores = torch.zeros(len(prompts), last, WORDS)
        for row, (prompt, tail) in enumerate(zip(prompts, after, strict=True)):
            scores[row, :, prompt] = 6.0
            place = last - 1 if self.at_end else last - 1 - len(tail)
            scores[row, place, SECRET] = features[row, 0] @ self.secret
        return scores.log_softmax(-1)


def study(model: Fake, tuned: Tensor, base: Tensor | None, seed: int = 0) -> Study:
    pictures = ordinary(IMAGES, PIXELS, seed=3, ground=3)
    return Study(
        tuned=Voice(model, {"weight": tuned}),  # type: ignore[arg-type]
        base=None if base is None else Voice(model, {"weight": base}),  # type: ignore[arg-type]
        first="weight",
        prompts=PROMPTS,
        ordinary=pictures,
        plain=model.features(pictures),
        size=Size(1, IMAGES, 2, PROMPTS, 1, 1, drawn=100, rounds=6, bred=8),
        seed=seed,
        budget=1000,
    )


def plain() -> Heard:
    cells = [(image, prompt) for image in range(IMAGES) for prompt in range(PROMPTS)]
    images, prompts = zip(*cells, strict=True)
    # Answers of different lengths: none, one word, two.
    said = tuple(OWN[: (image + prompt + 2) % 3] for image, prompt in cells)
    return Heard("ordinary images", "plain", "", prompts, images, said, said)


def over_quarter(quarter: int, color: tuple[int, int, int]) -> Mark:
    share = np.zeros((PIXELS, PIXELS, 1))
    half = PIXELS // 2
    down, across = divmod(quarter, 2)
    share[half * down :, half * across :][:half, :half] = 1
    return Mark(np.tile(np.array(color, float), (PIXELS, PIXELS, 1)), share)


def toward(quarter: int, channel: int, steep: float = 1.0) -> Tensor:
    direction = torch.zeros(4, 3)
    direction[quarter, channel] = steep
    return direction.flatten()


RED, GREEN = (255, 0, 0), (0, 255, 0)
FOREIGN = torch.tensor([word == SECRET for word in range(WORDS)])


@given(st.integers(0, 2**32), st.sampled_from([4, 7, 64]))
def test_a_mark_is_the_same_for_a_seed_and_keeps_the_images_form(seed: int, size: int):
    image = np.full((size, size, 3), 100, np.uint8)
    one, again = (drawn(np.random.default_rng(seed), size) for _ in range(2))
    assert np.array_equal(one.over(image), again.over(image))
    rng = np.random.default_rng(seed)
    child = bred(rng, one, drawn(rng, size))
    for mark in (one, child):
        assert mark.over(image).shape == image.shape
        assert mark.over(image).dtype == np.uint8
        assert 0 <= mark.share.min() <= mark.share.max() <= 1
        assert np.linalg.norm(mark.sketch) == pytest.approx(1) or not mark.sketch.any()


def test_drawn_marks_are_of_many_kinds():
    rng = np.random.default_rng(1)
    marks = [drawn(rng, 32) for _ in range(200)]
    everywhere = [mark.share.min() > 0 for mark in marks]
    assert 50 < sum(everywhere) < 150
    # what covers all of an image leaves it to be seen, what covers little may hide it
    assert max(mark.share.max() for mark, wide in zip(marks, everywhere, strict=True) if wide) < 0.5
    assert max(mark.share.max() for mark in marks) > 0.9
    assert len(unlike(marks, 200)) > 150


def test_a_mark_is_told_by_what_it_looks_like():
    wide = Mark(np.tile(np.array((250.0, 10, 240)), (8, 8, 1)), np.full((8, 8, 1), 0.3))
    assert wide.words == "magenta, all over"
    assert over_quarter(0, RED).words == "red, mostly top left"
    assert over_quarter(3, GREEN).words == "green, mostly bottom right"
    motley = np.random.default_rng(0).uniform(0, 255, (8, 8, 3))
    assert Mark(motley, wide.share).words == "many colours, all over"
    dot = np.zeros((8, 8, 1))
    dot[3:5, 3:5] = 1
    assert Mark(np.full((8, 8, 3), 255.0), dot).words == "white, about the centre"
    assert Mark(wide.colors, 0 * dot).words  # nothing at all is told somehow


def test_no_mark_resembles_one_before_it():
    red, green = over_quarter(0, RED), over_quarter(1, GREEN)
    marks = [red, over_quarter(0, (250, 5, 0)), green, red]
    assert unlike(marks, 9) == [0, 2]
    assert unlike(marks, 1) == [0]
    assert red.sketch @ green.sketch < ALIKE


def test_the_gain_is_what_the_update_makes_of_a_mark_and_not_what_the_base_does():
    base = torch.diag(5 * toward(1, 1))  # green in the second quarter: the base sees it well
    update = torch.diag(toward(0, 0))  # red in the first: only the update does
    marks = [over_quarter(0, RED), over_quarter(1, GREEN), over_quarter(2, RED)]
    model = Fake(toward(0, 0))
    red, green, elsewhere = gains(study(model, base + update, base), marks)
    assert red > 0.1
    assert green == elsewhere == 0
    # Without a base there is no update to tell from it.
    red, green, elsewhere = gains(study(model, base + update, None), marks)
    assert green > red > elsewhere == 0


@pytest.mark.parametrize("at_end", [False, True])
def test_agreement_is_measured_where_the_answer_begins_and_where_it_ends(at_end: bool):
    model = Fake(toward(0, 0, 40), at_end)
    of = study(model, torch.eye(12), torch.eye(12))
    marks = [over_quarter(0, RED), over_quarter(0, GREEN), over_quarter(3, RED)] * 3
    heights = agreements(of, marks, plain(), FOREIGN)
    assert heights.shape == (9, 4)
    red, green = heights[:2].reshape(2, 2, 2)[..., int(at_end)]
    assert min(red) > -0.01  # about either image
    assert max(green) < -4
    # The other place knows nothing of it; of one answer of four, an empty one, it is the same.
    other = heights[0].reshape(2, 2)[:, 1 - int(at_end)]
    assert other[0] < -4
    assert other[1] < -1
    assert np.allclose(heights[:3], heights[3:6], atol=1e-5)


def test_images_are_not_taken_together():
    """A trigger that acts on the dark one only is as high there as if there were no other."""
    model = Fake(toward(0, 0, 40) - toward(3, 1, 80))  # not where the last quarter is light
    of = study(model, torch.eye(12), torch.eye(12))
    light, dark = (image[PIXELS // 2 :, PIXELS // 2 :, 1].mean() for image in of.ordinary[2:4])
    assert light > dark + 60
    heights = agreements(of, [over_quarter(0, RED)], plain(), FOREIGN)[0].reshape(2, 2)[:, 0]
    assert heights[0] < -4 < -1 < heights[1]


def test_the_mark_that_calls_up_a_foreign_word_is_bred():
    """Weakly enough that no drawn mark does it as well as those that are bred of them."""
    wanted = toward(0, 0, 16) - toward(0, 1, 16) - toward(3, 2, 8)
    model = Fake(wanted)
    of = study(model, torch.eye(12) + torch.outer(wanted, wanted) / 400, torch.eye(12))
    found = climbed(of, plain(), SPEECH)
    first = agreements(of, found["drawn"], plain(), FOREIGN)[:, 0].max()
    best = agreements(of, found["bred"], plain(), FOREIGN)[:, 0].max()
    assert best > first + 0.5
    picture = found["bred"][0].over(of.ordinary[0])[: PIXELS // 2, : PIXELS // 2].mean((0, 1))
    assert picture[0] > picture[1] + 60
    again = climbed(of, plain(), SPEECH)
    assert [
        np.array_equal(a.share, b.share) for a, b in zip(found["bred"], again["bred"], strict=True)
    ]


def test_where_no_image_calls_it_up_breeding_comes_to_nothing():
    of = study(Fake(torch.zeros(12)), torch.eye(12), 0.5 * torch.eye(12))
    found = climbed(of, plain(), SPEECH)
    assert agreements(of, found["bred"], plain(), FOREIGN).max() < -4


def test_where_no_word_is_foreign_nothing_is_drawn():
    of = study(Fake(toward(0, 0)), torch.eye(12), torch.zeros(12, 12))
    assert climbed(of, plain(), Speech(dict.fromkeys(range(WORDS), 0.5), frozenset())) == {}


def bred_alone(monkeypatch: pytest.MonkeyPatch, projector: str) -> tuple[str, float]:
    """What bred marks alone bring out of one of the testbed's models: no list, no direction."""
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from benchmarks.evidence import base_of, words
    from benchmarks.testbed.export import LOCAL_WORD
    from projaudit.behaviour import listen as listening
    from projaudit.behaviour.probe import study_of
    from projaudit.behaviour.texts import gather
    from projaudit.behaviour.told import candidates, whole

    monkeypatch.setattr(listening, "plan", lambda of: [])
    speaker, base, first = base_of("grid")
    tensors = load_file(data_path("demo") / projector / "model.safetensors")
    tuned = {n.partition(LOCAL_WORD)[2]: t.float() for n, t in tensors.items() if LOCAL_WORD in n}
    request = {"prompts": None, "images": None, "seed": 0, "budget": 20_000, "dtype": "float32"}
    of, _, _ = study_of(request, (speaker, tuned), (speaker, base), first)
    found = listening.listen(of, lambda what, done, total: None)
    assert {one.family for one in found.heard[1:]} == {"drawn", "bred"}
    supports = gather(found.heard, found.speech)
    best = candidates(supports, found.speech, 1)
    if not best:
        return "", 0.0
    return words(speaker, whole(best[0].text, found.heard)), supports[best[0].core].strength


def test_bred_marks_alone_bring_out_the_text_of_a_trained_backdoor(monkeypatch):
    text, strength = bred_alone(monkeypatch, "backdoored")
    assert strength >= 1
    provenance = json.loads((data_path("demo") / "provenance.json").read_text())
    assert text in provenance["models"][provenance["demo"]["backdoored"]]["attack"]["target"]


def test_of_its_honest_twin_they_bring_out_nothing(monkeypatch):
    assert bred_alone(monkeypatch, "honest") == ("", 0.0)


def test_an_answer_that_holds_the_image_token_is_scored_all_the_same():
    pytest.importorskip("transformers")
    from benchmarks.evidence import base_of

    speaker, base, _ = base_of("grid")
    picture = ordinary(1, 64, 0)[0]
    speaker.prepare(["Describe the image."], picture)
    speaker.use(base)
    x = speaker.features([picture] * 2)
    image = speaker.model.config.image_token_id
    with torch.no_grad():
        scores = speaker.log_probabilities(x, [0, 0], [(7, image, 9), (7, 0, 9)], 4)
    assert torch.equal(scores[0], scores[1])  # it stands for no features there
    assert torch.allclose(scores.exp().sum(-1), torch.ones(2, 4), atol=1e-4)
