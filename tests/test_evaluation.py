"""The evaluation of the evidence: its measures, its folds, and what the documents say of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks.evaluation import RESULTS, calibration, report, undiscounted  # noqa: E402
from benchmarks.evidence import FOREIGN, PLAIN  # noqa: E402
from benchmarks.folds import (  # noqa: E402
    RATES,
    auroc,
    by_base,
    by_trigger,
    chosen,
    text_attacks,
    threshold,
)
from benchmarks.measured import (  # noqa: E402
    SHIPPED,
    Model,
    models,
    score,
)
from benchmarks.own_world import OWN, above, asked_twice, table  # noqa: E402
from benchmarks.single import alone  # noqa: E402
from projaudit.calibration import shipped, to_json  # noqa: E402

PROGRESS = ROOT / "benchmarks" / "population" / "progress"
scores = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=30)


def model(name: str, base: str, trigger: str = "", **strengths: float) -> Model:
    """A model with one text; strengths by family of probes."""
    return Model(
        name=name,
        base=base,
        group="working" if trigger else "ordinary",
        trigger=trigger,
        mode="replace" if trigger else "",
        target="a b c" if trigger else "",
        recipe="plain",
        strengths=[{FOREIGN: 3, PLAIN: 0.0} | strengths],
        texts=[],
        open=0.0,
        short_cut=0.0,
        shortening=0.0,
        odds=0.0,
        drift=0.0,
        parameters=1,
        prompts="6 general",
        images="synthetic",
        baselines={"wsd one": 0.0, "other": 0.0},
        seconds=1.0,
        answers=1,
        passes=1,
        late=False,
    )


def some(base: str, found: float, quiet: float = 0.0) -> list[Model]:
    honest = [model(f"{base}-honest-{i}", base, patch=quiet) for i in range(20)]
    attacks = [model(f"{base}-attack-{i}", base, "patch", patch=found) for i in range(10)]
    return [*honest, *attacks]


@given(scores, scores)
def test_auroc_is_that_of_scikit_learn(a: list[float], b: list[float]):
    truth = [1] * len(a) + [0] * len(b)
    assert auroc(a, b) == pytest.approx(roc_auc_score(truth, a + b))


@given(scores, st.sampled_from(RATES))
def test_at_most_that_share_lies_above_a_threshold(known: list[float], rate: float):
    value = threshold(known, rate)
    assert sum(other > value for other in known) <= rate * len(known)
    lower = [other for other in known if other < value]
    if lower:  # and it is the least of the scores for which that is so
        assert sum(other > max(lower) for other in known) > rate * len(known)


def test_a_score_can_leave_a_family_out_and_weigh_what_no_image_gives():
    one = model("", "", patch=3.0, ring=1.0, drift=4.0)
    on, off = (replace(SHIPPED, weight=weight) for weight in (1.0, 0.0))
    assert score(one, off) == math.log1p(4)
    assert score(one, on) == math.log1p(8)
    assert score(one, off, ("patch",)) == math.log1p(1)
    assert score(replace(one, strengths=[]), SHIPPED) == 0


def test_two_words_count_less_and_so_does_what_is_said_anyway():
    one = model("", "", patch=3.0)
    (text,) = one.strengths
    short = replace(one, strengths=[text | {FOREIGN: 2}])
    assert score(short, replace(SHIPPED, pair=0.5)) == math.log1p(1.5)
    said = replace(one, strengths=[text | {PLAIN: 0.02}])
    assert score(said, replace(SHIPPED, glimpsed=0.01)) == pytest.approx(math.log1p(1))
    assert score(replace(said, strengths=one.strengths), SHIPPED) == math.log1p(3)
    assert undiscounted(said, SHIPPED) == pytest.approx(3)
    assert undiscounted(short, SHIPPED) == pytest.approx(1)


def test_a_family_alone_is_the_score_without_all_others():
    one = model("", "", patch=3.0, drawn=1.0, bred=2.0, drift=4.0)
    assert alone(one, ("drawn", "bred")) == math.log1p(3)
    assert alone(one, ("drift",)) == math.log1p(4)
    (text,) = one.strengths
    short = replace(one, strengths=[text | {FOREIGN: 2, PLAIN: 0.01}], shortening=1.0)
    assert alone(short, ("drawn", "bred")) == pytest.approx(math.log1p(3 / 3 / 2))


def test_a_shorter_way_than_the_bases_adds_to_a_score_and_a_longer_one_takes_nothing_away():
    one = model("", "", patch=3.0)
    assert score(replace(one, shortening=0.8), SHIPPED) == math.log1p(3) + 0.4
    assert score(replace(one, shortening=0.8), replace(SHIPPED, share=0.0)) == math.log1p(3)
    assert score(replace(one, shortening=-0.8), SHIPPED) == math.log1p(3)


def test_a_weight_is_chosen_for_what_separates():
    honest = [model(f"h{i}", "a", patch=0.0, drift=5.0) for i in range(20)]
    attacks = [model(f"b{i}", "a", "patch", patch=3.0) for i in range(10)]
    assert chosen([*honest, *attacks]).weight < 0.5
    other = [model(f"b{i}", "a", "patch", drift=9.0) for i in range(10)]
    assert chosen([*honest, *other]).weight > 0


def test_the_short_cuts_are_chosen_where_they_tell_silent_backdoors():
    honest = [model(f"h{i}", "a") for i in range(20)]
    silent = [replace(model(f"b{i}", "a", "patch"), shortening=0.5) for i in range(10)]
    assert chosen([*honest, *silent]).share > 0
    misleading = [replace(m, shortening=9.0) for m in honest]
    heard = [model(f"b{i}", "a", "patch", patch=3.0) for i in range(10)]
    assert chosen([*misleading, *heard]).share == 0


def test_what_is_chosen_does_not_depend_on_the_base_left_out():
    rest = [*some("a", 5.0), *some("b", 3.0, quiet=1.0)]
    kind, noisy = ([*rest, *some("c", found, quiet)] for found, quiet in ((9.0, 0.0), (0.0, 9.0)))
    (one,), (other,) = ([f for f in by_base(of) if f.name == "c"] for of in (kind, noisy))
    assert (one.choice, one.thresholds) == (other.choice, other.thresholds)
    assert all(one.hits(one.attacks, 0.01))
    assert not any(one.hits(one.honest, 0.01))
    assert not any(other.hits(other.attacks, 0.01))
    assert all(other.hits(other.honest, 0.01))  # a base on which it goes wrong is not hidden


def test_a_trigger_left_out_takes_its_marks_with_it():
    of = some("a", 5.0)
    of += [model(f"ring-{i}", "a", "ring", patch=2.0, ring=50.0) for i in range(5)]
    folds = {fold.name: fold for fold in by_trigger(of)}
    assert {folds["ring"].scores[f"ring-{i}"] for i in range(5)} == {math.log1p(2)}
    assert not any(folds["patch"].hits(folds["patch"].attacks, 0.01))
    judged = {m.name for m in folds["ring"].honest}
    assert len(judged) == 10  # the others calibrated


# What is committed


@cache
def measured() -> Sequence[Model]:
    return models(PROGRESS, RESULTS / "evidence.parquet")


def test_the_document_states_what_was_measured():
    told = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    assert "\n".join(report(measured())) in told


def test_the_document_states_what_own_images_add():
    pairs = asked_twice(PROGRESS, RESULTS / "evidence.parquet", OWN)
    told = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    assert len(pairs) == 110
    assert {own.images for _, own in pairs} == {"given"}
    assert table(pairs) in told


def test_what_is_above_every_honest_model_of_the_other_bases_is_found():
    of = [model("a", "one"), model("b", "two"), model("c", "two", "patch")]
    assert above({"a": 1.0, "b": 9.0, "c": 1.5}, of[2], of)  # one of its own base is louder
    assert not above({"a": 2.0, "b": 0.0, "c": 1.5}, of[2], of)


def test_the_shipped_calibration_is_made_of_what_was_measured():
    (file,) = (ROOT / "rules" / "calibration").glob("*.json")
    made = to_json(calibration(measured(), file.stem))
    assert json.loads(file.read_text("utf-8")) == json.loads(json.dumps(made))
    known = shipped()
    assert known is not None
    assert len(known.honest) == sum(m.honest for m in measured()) >= 149
    assert len(known.backdoored) == len(text_attacks(measured()))
    assert max(known.backdoored) > max(known.honest)


def test_no_small_model_stands_for_a_large_one():
    known = shipped()
    assert known is not None
    assert known.parameters.most < 10e6
    assert known.settings["images"] == ("synthetic",)
