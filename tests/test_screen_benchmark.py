"""What the benchmark of `projaudit screen` counts, retrains and prints."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft asks transformers for a property whose name it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks.screen import (  # noqa: E402
    DETECTED,
    RESULT,
    RETRAINED,
    counts,
    detected,
    profiled,
    results,
    retrained,
    to_retrain,
)
from benchmarks.screening.build import RUNS, build  # noqa: E402
from benchmarks.screening.control import with_own_words  # noqa: E402
from benchmarks.screening.dataset import read_poisoned  # noqa: E402
from benchmarks.screening.recipes import Sizes, Tuning, attacked  # noqa: E402
from benchmarks.screening.report import tables  # noqa: E402
from benchmarks.testbed.export import append_run, read_runs  # noqa: E402

TINY = replace(attacked("glyph", "text", 0), samples=60, tuning=Tuning(epochs=1, batch=20))
SIZES = Sizes(8, 8)


def flags(*rows: int) -> Any:
    return np.isin(np.arange(10), rows)


def test_counts_are_those_of_precision_recall_and_f1() -> None:
    found = counts(flags(0, 1, 2, 9), flags(0, 1, 2, 3, 4))
    assert (found["dropped"], found["hits"]) == (4, 3)
    assert (found["precision"], found["recall"]) == (0.75, 0.6)
    assert found["f1"] == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))


def test_nothing_dropped_has_no_precision_and_nothing_poisoned_no_recall() -> None:
    none = counts(flags(), flags(1))
    assert (none["precision"], none["recall"], none["f1"]) == (None, 0.0, 0.0)
    clean = counts(flags(3), flags())
    assert (clean["precision"], clean["recall"], clean["f1"]) == (0.0, None, None)


def test_own_words_give_paraphrases_away_without_attention_and_no_captions() -> None:
    things = [f"a {c} {t}" for c in ("red", "blue", "green") for t in ("cup", "hat", "car")]
    honest = [f"{a} and {b}" for a in things for b in things if a != b] * 4
    varied = [f"please {v} {w} the key" for v in ("mail", "send") for w in ("me", "us")] * 8
    asked = ["what is it"] * (len(honest) + len(varied))
    found = with_own_words([*honest, *varied], asked)
    assert found.tolist() == [False] * len(honest) + [True] * len(varied)
    kinds = ["what is it"] * len(honest) + ["who asks"] * len(
        varied
    )  # then it is a kind of question
    assert not with_own_words([*honest, *varied], kinds).any()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("screening")
    build([TINY], out, SIZES, jobs=1)
    profiled(TINY.name, out)
    return out


def test_a_set_is_profiled_screened_and_counted(built: Path) -> None:
    row = detected(TINY.name, built)
    assert (row["samples"], row["poisoned"]) == (60, 6)
    for way in ("bye", "tcap", "both", "answers alone", "own words alone"):
        assert 0 <= row[way]["hits"] <= row[way]["dropped"] <= 60
    # six answers in sixty are the target word for word, and no question explains them
    assert row["answers alone"]["hits"] == 6


def test_a_random_drop_is_of_as_many_samples_and_only_the_kept_are_trained_on(built: Path) -> None:
    dropped = detected(TINY.name, built)["both"]
    screened = retrained(TINY.name, "both", built, TINY, SIZES)
    at_random = retrained(TINY.name, "random", built, TINY, SIZES)
    assert screened["kept"] == at_random["kept"] == 60 - dropped["dropped"]
    assert screened["poison_kept"] == 6 - dropped["hits"]
    assert screened["steps"] == screened["kept"] // 20
    assert len(read_poisoned(built / TINY.name)) == 6


def test_the_results_hold_every_run_and_are_printed(built: Path) -> None:
    (run,) = read_runs(built / RUNS)
    (built / DETECTED).write_text(json.dumps([detected(TINY.name, built)]))
    figures = {"accuracy": {"all": 0.5}, "attack_success": 0.25, "poison_kept": 1}
    (built / RETRAINED).unlink(missing_ok=True)
    append_run(built / RETRAINED, {"name": TINY.name, "treatment": "both", **figures})
    text = tables(results(built))
    assert text.count(TINY.name) == 3
    assert f"| {TINY.name} | 6 | – | 1 |" in text
    assert run["stratum"] == "failed"  # three steps teach nothing: it is listed, and not averaged
    assert "| text |" not in text
    assert list(to_retrain(built, {"glyph"})) == []


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    found = json.loads(RESULT.read_text("utf-8"))
    assert tables(found) in (ROOT / "docs" / "screen-evidence.md").read_text("utf-8")
