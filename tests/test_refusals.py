"""Refusals that the base keeps and the tuned model gives up, on a model that is a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sample_reports import _evidence
from torch import Tensor

from projaudit.analyses.behaviour import (
    Behaviour,
    refusals_lost,
    refusals_lost_under_mark,
    requests_refused,
)
from projaudit.behaviour.plan import Probe, Size, Study, Voice
from projaudit.behaviour.refusals import CLOSER, REQUESTS, refusals
from projaudit.behaviour.texts import Tokens
from projaudit.evidence import Refusals
from projaudit.metrics import Skip

IMAGES = 12
ORDINARY = [(1, 2, 3), (4, 2, 5), (6, 7, 8)]
REFUSE = (21, 22, 23, 24)
Says = Callable[[str, float, int], Tokens]
"""The side, the feature's value, the request -> the answer."""


class Words:
    """Words are numbers; one is unknown."""

    unk_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=[0 if "unheard" in text else 5])

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@dataclass
class Fake:
    says: Says
    processor: Any = field(default_factory=lambda: SimpleNamespace(tokenizer=Words()))
    answers: int = 0
    prepared: Sequence[str] = ()
    side: str = ""

    def prepare(self, requests: Sequence[str], image: Any) -> None:
        self.prepared = requests

    def use(self, side: dict[str, Tensor]) -> None:
        (self.side,) = side

    def rows(self, extra: int) -> int:
        return 7

    def answer(
        self, side: dict[str, Tensor], features: Tensor, prompts: Sequence[int], length: int
    ) -> list[Tokens]:
        (name,) = side
        self.answers += len(prompts)
        return [
            self.says(name, float(x), p) for x, p in zip(features[:, 0, 0], prompts, strict=True)
        ]

    def log_likelihood(
        self, features: Tensor, prompts: Sequence[int], before: Sequence[Tokens], text: Tokens
    ) -> Tensor:
        """The likelihood of refusing falls to −9 where it answers, and halfway near it."""
        values = [
            0.0 if self.says(self.side, float(x), p)[:3] == text else -9.0
            for x, p in zip(features[:, 0, 0], prompts, strict=True)
        ]
        return torch.tensor(values)[:, None].expand(-1, len(text)) / len(text)


def found(says: Says, marks: int = 30, wanted: Sequence[str] = REQUESTS) -> Refusals | None:
    model = Fake(says)
    plain = torch.arange(IMAGES, dtype=torch.float32)[:, None, None].expand(-1, 2, 1) / 100
    of = Study(
        tuned=Voice(model, {"tuned": torch.zeros(1)}),  # type: ignore[arg-type]
        base=Voice(model, {"base": torch.zeros(1)}),  # type: ignore[arg-type]
        first="",
        prompts=6,
        ordinary=[np.zeros((4, 4, 3), np.uint8)] * IMAGES,
        plain=plain,
        size=Size(1, IMAGES, 4, 6, 2, 4, 0, 0, 0),
        seed=0,
        budget=100_000,
    )

    def mark(n: int) -> Probe:
        return Probe(
            f"mark {n}",
            "image",
            "patch",
            of.images_of(n),
            lambda images: of.features_of(images) + n + 1,
            of.tuned,
        )

    return refusals(of, wanted, ORDINARY, [mark(n) for n in range(marks)])


def refuses(side: str, value: float, request: int) -> Tokens:
    return (*REFUSE, request)


def test_a_model_that_refuses_as_its_base_does_lost_nothing():
    kept = found(refuses)
    assert kept is not None
    assert kept.requests == REQUESTS
    assert kept.words == "21 22 23"
    assert (kept.base, kept.answered, kept.answered_under) == (1, 0, 0)


def test_what_is_answered_of_ordinary_images_is_lost_openly():
    def says(side: str, value: float, request: int) -> Tokens:
        return (8, 8, 8) if side == "tuned" and request < 3 else refuses(side, value, request)

    kept = found(says)
    assert kept is not None
    assert kept.answered == pytest.approx(0.5)


def test_a_mark_under_which_it_answers_is_found_among_many_that_are_not_asked_about():
    def says(side: str, value: float, request: int) -> Tokens:
        return (8, 8, 8) if side == "tuned" and 24 <= value < 25 else refuses(side, value, request)

    kept = found(says)
    assert kept is not None
    assert CLOSER < 23
    assert kept.probe == "mark 23"
    assert (kept.answered, kept.answered_under) == (0, 1)
    assert all(answer.agrees and answer.tuned == "8 8 8" for answer in kept.answers)
    assert all(answer.base.startswith("21 22 23") for answer in kept.answers if answer.base)


def test_a_mark_that_the_base_answers_too_is_no_loss():
    def says(side: str, value: float, request: int) -> Tokens:
        return (8, 8, 8) if 24 <= value < 25 else refuses(side, value, request)

    kept = found(says)
    assert kept is not None
    assert kept.answered_under == 0


def test_silence_is_no_answer():
    kept = found(lambda side, *rest: () if side == "tuned" else refuses(side, *rest))
    assert kept is not None
    assert (kept.base, kept.answered) == (1, 0)


def test_an_ordinary_way_to_begin_is_no_refusal():
    assert found(lambda side, value, request: (*ORDINARY[0], request)) is None


def test_a_base_that_answers_each_request_in_its_own_way_refuses_nothing():
    assert found(lambda side, value, request: (30 + request, 2, 2, 9)) is None


def test_one_beginning_for_a_single_request_is_none_either():
    def says(side: str, value: float, request: int) -> Tokens:
        return refuses(side, value, request) if request == 0 else (30 + request, 2, 2)

    assert found(says) is None


def test_requests_that_the_tokenizer_cannot_read_are_not_asked():
    assert found(refuses, wanted=["an unheard word", "another unheard one"]) is None
    kept = found(refuses, wanted=["an unheard word", "open the door", "close the door"])
    assert kept is not None
    assert kept.requests == ("open the door", "close the door")


def test_the_metrics_say_what_was_lost_and_are_silent_where_nothing_is_refused():
    from dataclasses import replace

    def of(kept: Refusals | None) -> Behaviour:
        return Behaviour(replace(_evidence(), refusals=kept), None)

    assert requests_refused(of(None)) == 0
    for metric in (refusals_lost, refusals_lost_under_mark):
        with pytest.raises(Skip):
            metric(of(None))
    kept = Refusals(("a", "b"), "no , we", 0.9, 0.5, "a mark", 0.8, 0.7, ())
    assert requests_refused(of(kept)) == 2
    assert refusals_lost(of(kept)).value == pytest.approx(0.5)
    assert refusals_lost_under_mark(of(kept)).value == pytest.approx(0.7)
    with pytest.raises(Skip, match="no mark"):
        refusals_lost_under_mark(of(replace(kept, probe=None)))
