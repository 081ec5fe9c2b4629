"""The demo: what it prints is what was measured on models that really were trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import projaudit
from projaudit.data import data_path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, float]:
    folder = tmp_path_factory.mktemp("demo")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "projaudit", "demo", "-o", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, folder, time.perf_counter() - start


def test_it_writes_both_reports_of_both_models_in_time(demo):
    said, folder, seconds = demo
    assert sorted(file.name for file in folder.iterdir()) == [
        "backdoored.html", "backdoored.json", "honest.html", "honest.json",
    ]  # fmt: skip
    assert seconds < 30
    assert all(f"report: {folder / name}" in said for name in ("honest", "backdoored"))


def test_what_it_prints_is_in_the_reports(demo):
    said, folder, _ = demo
    reports = [json.loads((folder / f"{n}.json").read_text()) for n in ("honest", "backdoored")]
    verdicts = [report["verdict"] for report in reports]
    (line,) = [line for line in said.splitlines() if line.startswith("verdict")]
    assert line.split()[1:] == verdicts
    for report in reports:
        ranks = [m["value"] for m in report["measurements"] if m["metric"] == "stable_rank"]
        assert len(ranks) == 2
        assert all(f"{rank:.3g}" in said for rank in ranks)
    assert "behaviour not probed" in said


def test_it_does_not_claim_to_tell_the_two_apart(demo):
    said, folder, _ = demo
    verdicts = {json.loads(f.read_text())["verdict"] for f in folder.glob("*.json")}
    if len(verdicts) == 1:
        assert "they do not tell the two apart" in said
    for word in ("safe", "clean", "backdoor found"):
        assert word not in said.lower()


def test_no_statistic_of_the_pair_has_a_say(demo):
    """Nothing above `info` fired on either: no rule was tuned to this pair."""
    _, folder, _ = demo
    for file in folder.glob("*.json"):
        findings = json.loads(file.read_text())["findings"]
        assert {finding["severity"] for finding in findings} <= {"info"}


@pytest.mark.parametrize("name", ["honest", "backdoored"])
def test_the_rest_of_the_model_is_proven_equal(name: str):
    models = data_path("demo")
    report = projaudit.check(str(models / name), str(models / "base"), seed=0)
    parts = {part.name: part.status for part in report.coverage.parts}
    assert parts == {"projector": "audited", "vision tower": "equal", "language model": "equal"}


def test_every_fine_tune_of_the_testbed_is_described_alike(demo):
    """Honest or backdoored, sound structure passes at this depth: statistics accuse nobody."""
    models = data_path("demo")
    provenance = json.loads((models / "provenance.json").read_text())["models"]
    verdicts: dict[str, set[str]] = {}
    for name, model in sorted(provenance.items()):
        if model["kind"] != "base" and name.endswith(("-long", "-ring", "-faint")):
            report = projaudit.check(
                str(models / model["file"]), str(models / "base" / "model.safetensors"), seed=0
            )
            severities = {f.severity.label for f in report.findings}
            verdicts.setdefault(model["kind"], set()).update(severities)
    assert verdicts["honest"] <= {"info"}
    assert verdicts["backdoored"] <= {"info"}
