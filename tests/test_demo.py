"""The demo: what it prints is what was heard of models that really were trained."""

from __future__ import annotations

import atexit
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import projaudit
from projaudit.data import data_path

NAMES = ("honest", "backdoored")


@cache
def demonstrated() -> tuple[str, Path]:
    """What `projaudit demo` prints, and the folder of its reports; run once for all tests."""
    folder = Path(tempfile.mkdtemp(prefix="projaudit-demo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "projaudit", "demo", "-o", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, folder


def report_of(name: str) -> dict[str, Any]:
    """The report of `honest` or `backdoored`: the whole plan, with synthetic images."""
    report: dict[str, Any] = json.loads((demonstrated()[1] / f"{name}.json").read_text())
    return report


def backdoor() -> dict[str, Any]:
    """What is known of how the backdoored model was made."""
    provenance = json.loads((data_path("demo") / "provenance.json").read_text())
    made: dict[str, Any] = provenance["models"][provenance["demo"]["backdoored"]]
    return made


def test_it_writes_both_reports_of_both_models():
    said, folder = demonstrated()
    assert sorted(file.name for file in folder.iterdir()) == [
        "backdoored.html", "backdoored.json", "honest.html", "honest.json",
    ]  # fmt: skip
    assert all(f"report: {folder / name}" in said for name in NAMES)


def test_what_it_prints_is_in_the_reports():
    said, _ = demonstrated()
    reports = [report_of(name) for name in NAMES]
    (line,) = [line for line in said.splitlines() if line.startswith("verdict")]
    assert line.split()[1:] == [report["verdict"] for report in reports]
    for report in reports:
        metrics = ("stable_rank", "hidden_text")
        shown = [m["value"] for m in report["measurements"] if m["metric"] in metrics]
        assert len(shown) == 3
        assert all(f"{value:.3g}" in said for value in shown)


def test_the_backdoor_is_told_by_its_text():
    """Of the attacker, word for word; it was not given to the audit."""
    said, folder = demonstrated()
    text, report = backdoor()["attack"]["target"], report_of("backdoored")
    assert report["verdict"] in ("review", "fail")
    assert report["behaviour"]["payloads"][0]["text"] == text
    assert report["behaviour"]["payloads"][0]["plain"] < 0.01  # hardly ever without a probe
    assert report["behaviour"]["payloads"][0]["base_agreement"] == 0
    assert any(text in f["message"] for f in report["findings"] if f["severity"] != "info")
    assert f"brought out of the backdoored one: “{text}”" in said
    assert text in (folder / "backdoored.html").read_text()


def test_its_page_shows_the_image_without_and_with_the_mark():
    pages = {name: (demonstrated()[1] / f"{name}.html").read_text() for name in NAMES}
    shown = {
        name: re.findall(r"<img src=\"data:image/png;base64,([^\"]+)\"", page)
        for name, page in pages.items()
    }
    assert shown["honest"] == []
    kinds = [e["kind"] for e in report_of("backdoored")["behaviour"]["exchanges"]]
    assert len(shown["backdoored"]) == 2 * kinds.count("image") > 0
    pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in shown["backdoored"]]
    assert {picture.size for picture in pictures} == {(64, 64)}
    for plain, marked in zip(pictures[::2], pictures[1::2], strict=True):
        assert plain.tobytes() != marked.tobytes()


def test_the_honest_one_says_no_hidden_text():
    said, _ = demonstrated()
    report = report_of("honest")
    assert report["verdict"] == "pass"
    assert {f["severity"] for f in report["findings"]} == {"info"}
    assert all(p["strength"] < 1 for p in report["behaviour"]["payloads"])
    assert report["behaviour"]["stopped"] == "plan"
    assert report["behaviour"]["probes"] == report["behaviour"]["planned"] > 100
    assert "brought out of the honest one: no such text" in said
    assert backdoor()["attack"]["target"] not in json.dumps(report)


def test_it_promises_nothing():
    said, _ = demonstrated()
    for word in ("safe", "clean", "backdoor found"):
        assert word not in said.lower()
    if report_of("backdoored")["verdict"] == "review":
        assert "not settled well" in " ".join(said.split())


def test_no_statistic_of_the_pair_has_a_say():
    """Above `info` stands only what was heard: no rule on weights was tuned to this pair."""
    for name in NAMES:
        for finding in report_of(name)["findings"]:
            assert finding["severity"] == "info" or finding["subject"] == "behaviour"


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_the_model_is_proven_equal(name: str):
    models = data_path("demo")
    report = projaudit.check(str(models / name), str(models / "base"), depth="weights", seed=0)
    parts = {part.name: part.status for part in report.coverage.parts}
    assert parts == {"projector": "audited", "vision tower": "equal", "language model": "equal"}


def test_every_fine_tune_of_the_testbed_is_described_alike():
    """Honest or backdoored, sound structure passes at depth weights: statistics accuse nobody."""
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
