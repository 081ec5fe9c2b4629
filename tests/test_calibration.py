"""What a score means: its place among known models, and who may make such a population."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_behaviour import BACKDOORED, BASE, HONEST, few, run
from test_demo import report_of

import projaudit
from projaudit.calibration import (
    FORMAT,
    Calibration,
    Range,
    Shape,
    calibrate,
    load_calibration,
    stand,
    to_json,
    upper_bound,
)
from projaudit.errors import UsageError

HUNDRED = Calibration(
    format=FORMAT,
    id="hundred",
    about="a hundred honest fine-tunes",
    honest=tuple(float(n) for n in range(100)),
    backdoored=(50.0, 150.0),
    families=("llava-transformers", "llava-next"),
    parameters=Range(1e6, 1e9),
    in_features=Range(96, 1024),
    out_features=Range(128, 4096),
    relative_norm=Range(0.1, 0.9),
    settings={"images": ("synthetic",), "prompts": ("6 general", "6 given")},
)
INSIDE = Shape("llava-next", 10**7, 96, 4096, 0.5, "synthetic", "6 general")

VALID = json.loads(json.dumps(to_json(HUNDRED)))


# ------------------------------------------------------------------ what a score means


def test_none_of_300_leaves_one_percent():
    assert upper_bound(0, 300) == pytest.approx(0.00994, abs=1e-5)
    assert upper_bound(0, 149) < 0.02 < upper_bound(0, 148)  # what a `fail` takes
    assert upper_bound(300, 300) == 1


@given(st.integers(1, 400), st.data())
def test_the_bound_is_above_the_rate_and_falls_with_more_models(number: int, data: st.DataObject):
    hits = data.draw(st.integers(0, number))
    bound = upper_bound(hits, number)
    assert hits / number <= bound <= 1
    assert hits == 0 or upper_bound(hits - 1, number) < bound or bound == 1
    assert upper_bound(hits, number + 1) <= bound


@pytest.mark.parametrize(
    ("score", "percentile", "rate"),
    [(-1.0, 0, 1.0), (0.0, 0, 1.0), (0.5, 1, 0.99), (98.5, 99, 0.01), (99.0, 99, 0.01),
     (99.1, 100, 0.0)],
)  # fmt: skip
def test_where_a_score_stands(score: float, percentile: float, rate: float):
    found = stand(HUNDRED, "a file", score, INSIDE)
    assert (found.percentile, found.false_positive_rate) == pytest.approx((percentile, rate))
    assert found.false_positive_bound == upper_bound(round(100 * rate), 100)
    assert (found.calibration, found.source, found.score) == ("hundred", "a file", score)


def test_many_equal_scores_of_honest_models_count_as_reached():
    """All of them zero: a zero is what every honest model has."""
    zeros = replace(HUNDRED, honest=(0.0,) * 100)
    assert stand(zeros, "", 0.0, INSIDE).false_positive_rate == 1
    assert stand(zeros, "", 0.01, INSIDE).false_positive_rate == 0


def test_inside_is_said_of_the_edges_too():
    edges = replace(INSIDE, parameters=10**6, relative_norm=0.9)
    for shape in (INSIDE, edges, replace(INSIDE, prompts="6 given")):
        assert stand(HUNDRED, "", 1.0, shape).outside == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parameters": 7 * 10**9}, "parameters 7e+09, population 1e+06 to 1e+09"),
        ({"in_features": 95}, "features in 95"),
        ({"out_features": 5120}, "features out 5120"),
        ({"family": "resampler"}, "family resampler, population llava-transformers, llava-next"),
        ({"relative_norm": 0.01}, "relative size of the update 0.01, population 0.1 to 0.9"),
        ({"relative_norm": None}, "relative size of the update not known"),
        ({"prompts": "4 given"}, "prompts 4 given, population 6 general, 6 given"),
        ({"images": "given"}, "images given, population synthetic"),
    ],
)
def test_what_is_of_another_kind_is_outside(change: dict[str, Any], said: str):
    (outside,) = stand(HUNDRED, "", 1.0, replace(INSIDE, **change)).outside
    assert outside.startswith(said)


# ------------------------------------------------------------------ files


def written(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "own.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_calibration_comes_back_from_its_file(tmp_path: Path):
    assert load_calibration(written(tmp_path, VALID)) == HUNDRED
    turned = VALID | {"honest": VALID["honest"][::-1], "more": "of a later version"}
    assert load_calibration(written(tmp_path, turned)) == HUNDRED


def lacking(key: str) -> dict[str, Any]:
    return {name: value for name, value in VALID.items() if name != key}


WRONG: dict[str, Any] = {
    "empty": b"",
    "not JSON": "{",
    "not UTF-8": b'{"id": "\xff"}',
    "a list": [],
    "twice the same key": '{"id": 1, "id": 2}',
    "NaN": '{"honest": [NaN]}',
    "Infinity": json.dumps(VALID).replace("[0.0", "[Infinity"),
    "a number too large": json.dumps(VALID).replace("[0.0", "[1e999"),
    "an integer too large": json.dumps(VALID).replace("[0.0", "[1" + 400 * "0"),
    "deep": "[" * 10_000,
    "another format": VALID | {"format": 1},
    "no honest": VALID | {"honest": []},
    "honest is text": VALID | {"honest": "0.1"},
    "a score is text": VALID | {"honest": ["0.1"]},
    "a score is true": VALID | {"honest": [True]},
    "a score is null": VALID | {"backdoored": [None]},
    "id is a number": VALID | {"id": 3},
    "families is a text": VALID | {"families": "llava"},
    "a range is a list": VALID | {"parameters": [1, 2]},
    "a range lacks an end": VALID | {"parameters": {"least": 1}},
    "settings is a list": VALID | {"settings": []},
    "settings holds a number": VALID | {"settings": {"images": [3]}},
    "settings holds a text": VALID | {"settings": {"images": "synthetic"}},
    **{f"without {key}": lacking(key) for key in VALID},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, capsys):
    from projaudit.cli import main

    file = written(tmp_path, WRONG[name])
    with pytest.raises(UsageError) as raised:
        load_calibration(file)
    assert (raised.value.code, raised.value.file) == ("usage.calibration", str(file))
    assert str(raised.value).isprintable()
    if name in ("deep", "a score is text", "no honest"):
        with pytest.raises(SystemExit) as stop:
            main(["check", str(HONEST), "--base", str(BASE), "--calibration", str(file)])
        said = capsys.readouterr().err
        assert stop.value.code == 4
        assert said.count("\n") == 1
        assert "[usage.calibration]" in said


def test_a_file_that_is_not_there_or_is_a_folder_is_one_line(tmp_path: Path):
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError) as raised:
            load_calibration(file)
        assert raised.value.code == "usage.calibration"


# ------------------------------------------------------------------ made of reports


def calibrated(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    from projaudit.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["calibrate", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@pytest.fixture
def reports(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes reports, which are real ones but for what a test changes."""

    def write(*documents: dict[str, Any]) -> list[Path]:
        files = [tmp_path / f"report-{number}.json" for number in range(len(documents))]
        for file, document in zip(files, documents, strict=True):
            file.write_text(json.dumps(document))
        return files

    return write


def test_real_reports_make_a_calibration(tmp_path: Path, capsys, reports):
    files = reports(report_of("honest"), report_of("backdoored"))  # for two different projectors
    out = tmp_path / "ours.json"
    status, said, errors = calibrated(capsys, *files, "-o", out)
    assert (status, errors) == (0, "")
    made = load_calibration(out)
    assert made.id == "ours"
    assert made.honest == tuple(sorted(report_of(n)["score"] for n in ("honest", "backdoored")))
    assert made.settings == {"images": ("synthetic",), "prompts": ("6 general",)}
    assert made.in_features == Range(96, 96)
    assert 0 < made.relative_norm.least < made.relative_norm.most
    assert "2 honest models" in said
    assert "none can `fail` by it" in said  # a bound of 2 % takes 149
    status, said, _ = calibrated(capsys, files[0], "-o", out, "--name", "a name")
    assert status == 0
    assert load_calibration(out).id == "a name"
    assert "1 honest model" in said


def test_a_population_that_is_large_enough_can_fail(tmp_path: Path, capsys, reports):
    def another(number: int) -> dict[str, Any]:
        report = json.loads(json.dumps(report_of("honest")))
        for tensor in report["tensors"]:
            tensor["sha256"] = f"{number:064x}"
        return report

    files = reports(*(another(number) for number in range(149)))
    status, said, _ = calibrated(capsys, *files, "-o", tmp_path / "ours.json")
    assert status == 0
    assert "none can `fail`" not in said


def test_a_report_that_fails_is_named(tmp_path: Path, capsys, reports):
    files = reports(report_of("honest"), report_of("backdoored"))
    status, said, _ = calibrated(capsys, *files, "-o", tmp_path / "ours.json")
    assert status == 0
    assert f"Of a verdict `fail`, and counted as honest all the same: {files[1]}" in said
    calibrated(capsys, files[0], "-o", tmp_path / "other.json")
    assert "Of a verdict" not in calibrated(capsys, files[0], "-o", tmp_path / "other.json")[1]


def weights_only() -> dict[str, Any]:
    from projaudit.formats import FORMATS

    report = projaudit.check(str(HONEST), str(BASE), depth="weights", seed=0)
    document: dict[str, Any] = json.loads(FORMATS["json"].render(report))
    return document


def changed(**parts: Any) -> dict[str, Any]:
    return report_of("honest") | parts


def other_behaviour(**parts: Any) -> dict[str, Any]:
    return changed(behaviour=report_of("honest")["behaviour"] | parts)


UNFIT: dict[str, tuple[Callable[[], list[dict[str, Any]]], str]] = {
    "of depth weights": (lambda: [weights_only()], "was not made at depth behaviour with a base"),
    "without a base": (lambda: [changed(score=None)], "holds no score"),
    "a score that is true": (lambda: [changed(score=True)], "holds no score"),
    "a spent budget": (lambda: [other_behaviour(stopped="budget")], "was stopped by its budget"),
    "the same projector twice": (
        lambda: [report_of("honest"), report_of("honest")],
        "is of the same projector as",
    ),
    "images of another kind": (
        lambda: [report_of("backdoored"), other_behaviour(images="given")],
        "was made with other settings than the first",
    ),
    "prompts of another kind": (
        lambda: [report_of("backdoored"), other_behaviour(prompts=["Where is it?", "Who?"])],
        "was made with other settings than the first",
    ),
    "no projector": (lambda: [changed(projectors=[])], "lacks what a calibration needs"),
    "tensors of another form": (lambda: [changed(tensors=3)], "lacks what a calibration needs"),
    "a tensor of another form": (lambda: [changed(tensors=["x"])], "lacks what a calibration"),
    "a norm that is text": (
        lambda: [changed(measurements=[{"metric": "relative_norm", "value": "NaN"}])],
        "lacks what a calibration needs",
    ),
    "a score too large": (lambda: [changed(score=10**400)], "lacks what a calibration needs"),
    "an earlier projaudit's": (
        lambda: [changed(schema_version="1.3.0")],
        "made by an earlier projaudit, whose scores meant something else",
    ),
    "a version of no number": (lambda: [changed(schema_version="1.x")], "an earlier projaudit"),
    "another schema": (lambda: [changed(schema_version="9.0")], "schema version"),
    "no report": (lambda: [{"id": "x"}], "not a projaudit report"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_report_is_one_line(tmp_path: Path, capsys, reports, name: str):
    make, wanted = UNFIT[name]
    files = reports(*make())
    out = tmp_path / "ours.json"
    status, said, errors = calibrated(capsys, *files, "-o", out)
    assert (status, said) == (4, "")
    assert errors.count("\n") == 1
    assert wanted in errors
    assert files[-1].name in errors
    assert "[usage.report]" in errors
    assert not out.exists()


def test_no_reports_are_no_population():
    with pytest.raises(UsageError, match="at least one report"):
        calibrate({}, "none")


# ------------------------------------------------------------------ used


def test_check_says_which_calibration_it_used_and_that_the_target_lies_inside(
    tmp_path: Path, capsys, reports
):
    ours = tmp_path / "ours.json"
    calibrated(capsys, *reports(report_of("honest")), "-o", ours)
    _, report, said, _ = run(HONEST, "--base", BASE, "--calibration", ours, "--budget", "700")
    used = report["calibration"]
    assert (used["id"], used["source"], used["n"]) == ("ours", str(ours), 1)
    assert (used["covered"], used["outside"]) == (True, [])
    assert report["settings"]["calibration"] == str(ours)
    assert "population ours" in " ".join(said.split())
    assert "outside the population" not in " ".join(said.split())


def test_check_says_in_what_the_target_lies_outside(tmp_path: Path, capsys, reports):
    ours = tmp_path / "ours.json"
    calibrated(capsys, *reports(report_of("honest")), "-o", ours)
    _, report, said, _ = run(
        BACKDOORED, "--base", BASE, "--calibration", ours, *few(), "--budget", "100"
    )
    used = report["calibration"]
    assert used["covered"] is False
    assert [what.split()[0] for what in used["outside"]] == ["relative", "images", "prompts"]
    assert "outside the population's range" in " ".join(said.split())
