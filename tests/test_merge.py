"""A merge has several bases: it is compared with each, and with all of them at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Tensors, llava, save, tuned

import projaudit
from projaudit.analyses.merge import Parents, merge_nearest, merge_residual
from projaudit.cli import main
from projaudit.findings import Verdict
from projaudit.report import Report

BASE = llava()
ONE, TWO = tuned(BASE, 0.05, seed=1), tuned(BASE, 0.05, seed=2)


def mean(share: float) -> Tensors:
    """The weighted mean of ONE and TWO, projector and all."""
    return {n: share * ONE[n] + (1 - share) * TWO[n] for n in BASE}


def value(report: Report, metric: str) -> float:
    (found,) = [m for m in report.measurements if m.metric == metric]
    return found.value


@pytest.fixture
def bases(tmp_path: Path) -> list[str]:
    return [str(save(tmp_path / name, of)) for name, of in (("one", ONE), ("two", TWO))]


def test_a_merge_is_compared_with_each_base_and_lies_in_their_span(
    tmp_path: Path, bases: list[str]
):
    target = save(tmp_path / "merged", mean(0.7), dtype=torch.bfloat16)
    report = projaudit.check(str(target), bases, seed=1, depth="weights")
    assert [p.base for p in report.projectors] == bases
    assert {m.subject for m in report.measurements} >= {"projector", "projector@2", "merge"}
    (nearest,) = [m for m in report.measurements if m.metric == "merge_nearest"]
    assert nearest.detail[0].startswith(bases[0])
    assert value(report, "merge_residual") < 0.003
    assert "merge-unexplained" not in {finding.rule for finding in report.findings}
    assert report.verdict is Verdict.PASS, report.sentence


def test_the_nearest_base_is_told_first(tmp_path: Path, bases: list[str], capsys, monkeypatch):
    save(tmp_path / "merged", mean(0.3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["check", "merged", "--base", "one", "--base", "two", "--depth", "weights"])
    lines = capsys.readouterr().out.splitlines()
    (first,) = [n for n, line in enumerate(lines) if line.startswith("merge")]
    assert [line.split()[-1] for line in lines[first : first + 2]] == ["two", "one"]
    assert "outside what its bases span" in lines[first + 2]


def test_a_vector_of_zeros_has_no_rounding_of_its_own(tmp_path: Path, bases: list[str]):
    bias = "multi_modal_projector.linear_1.bias"
    merged = mean(0.7) | {bias: torch.zeros(64)}
    target = save(tmp_path / "merged", merged, dtype=torch.bfloat16)
    report = projaudit.check(str(target), bases, seed=1, depth="weights")
    (residual,) = [m for m in report.measurements if m.metric == "merge_residual"]
    name, share = residual.detail[-1].split(": ")
    assert name == "rounding"
    assert 0 < float(share.removesuffix("%")) < 1


def test_what_no_base_explains_is_said(tmp_path: Path, bases: list[str]):
    trained_on = tuned(mean(0.5), 0.1, seed=7)
    report = projaudit.check(
        str(save(tmp_path / "merged", trained_on)), bases, seed=1, depth="weights"
    )
    assert value(report, "merge_residual") == pytest.approx(0.1, rel=0.1)
    assert "merge-unexplained" in {finding.rule for finding in report.findings}


def test_the_worst_base_decides(tmp_path: Path, bases: list[str]):
    """Equal to one base and far from the other: neither a pass nor an error."""
    target = str(save(tmp_path / "merged", ONE))
    with_one = projaudit.check(target, bases[1], seed=1, depth="weights")
    assert with_one.verdict is Verdict.PASS
    both = projaudit.check(target, bases, seed=1, depth="weights")
    assert both.verdict is Verdict.INCONCLUSIVE
    assert "projector-unchanged" in {f.rule for f in both.findings}
    assert value(both, "merge_nearest") == 0


def test_with_one_base_there_is_no_merge_to_speak_of(tmp_path: Path, bases: list[str]):
    report = projaudit.check(str(save(tmp_path / "t", mean(0.5))), bases[:1], seed=1)
    assert not [m for m in report.measurements if m.metric.startswith("merge_")]
    assert not [s for s in report.skipped if s.metric.startswith("merge_")]


@given(share=st.floats(-1, 2), other=st.floats(-1, 2), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_combination_of_the_bases_leaves_nothing(share: float, other: float, seed: int):
    g = torch.Generator().manual_seed(seed)
    one, two = ({"l.weight": torch.randn(12, 8, generator=g)} for _ in range(2))
    made = {"l.weight": share * one["l.weight"] + other * two["l.weight"]}
    if float(made["l.weight"].norm()) > 1e-3:
        parents = Parents(made, (("one", one), ("two", two)), 0.0)
        assert merge_residual(parents).value < 1e-3
    alien = {"l.weight": torch.randn(12, 8, generator=g)}
    assert merge_residual(Parents(alien, (("one", one), ("two", two)), 0.0)).value > 0.5


def test_the_same_base_twice_is_no_division_by_zero():
    one = {"l.weight": torch.randn(6, 5)}
    parents = Parents({"l.weight": 2 * one["l.weight"]}, (("a", one), ("b", one)), 0.0)
    assert merge_residual(parents).value < 1e-6
    assert merge_nearest(parents).value == pytest.approx(1.0)


def test_bases_are_named_one_after_the_other(tmp_path: Path, bases: list[str], capsys):
    target = str(save(tmp_path / "merged", mean(0.5)))
    asked = ["check", target, "--base", bases[0], "--base", bases[1], "--format", "json"]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--depth", "weights", "--seed", "1"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert [p["base"] for p in told["projectors"]] == bases


@pytest.mark.parametrize(
    ("options", "field"),
    [(["--base-revision", "main"], "--base-revision"), (["--base", "x/y"] * 3, "--base")],
)
def test_a_revision_is_of_one_base_and_bases_are_few(
    tmp_path: Path, bases: list[str], capsys, options: list[str], field: str
):
    target = str(save(tmp_path / "merged", mean(0.5)))
    with pytest.raises(SystemExit) as ended:
        main(["check", target, "--base", bases[0], "--base", bases[1], *options])
    assert ended.value.code == 4
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert field in lines[0]


def test_a_base_of_another_shape_is_not_comparable(tmp_path: Path, bases: list[str]):
    other = str(save(tmp_path / "wide", llava(h=80)))
    target = str(save(tmp_path / "merged", mean(0.5)))
    with pytest.raises(projaudit.ProjauditError) as caught:
        projaudit.check(target, [bases[0], other], seed=1)
    assert caught.value.code == "unsupported.shape"
