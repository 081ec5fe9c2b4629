"""The README: its commands run, its help is the help, its policy loads; links of all documents."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sample_reports
import torch
from fakehub import FakeHub
from models import llava, save, tuned

from projaudit.cli import cli
from projaudit.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TEST_COMMAND = "pip install -c constraints.txt -e '.[test]' && pytest"
DEMO_COMMAND = "pip install -c constraints.txt '.[behaviour]' && projaudit demo"
DOCUMENTS = ("README.md", "SECURITY.md", *(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md")))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_two_commands_stand_there_alone():
    assert [f"{DEMO_COMMAND}\n", f"{TEST_COMMAND}\n"] == blocks("sh")[:2]
    assert "TEST_COMMAND" not in (ROOT / ".ci/run").read_text()
    assert "README.md" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(
    ("document", "command"), [("README.md", "check"), ("docs/lens.md", "lens")]
)
def test_the_help_is_the_help(document: str, command: str):
    text = (ROOT / document).read_text("utf-8")
    shown = re.search(r"<!-- begin help -->\n```text\n(.*?)```\n<!-- end help -->", text, re.S)
    said = subprocess.run(
        [sys.executable, "-m", "projaudit", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert shown is not None
    assert shown[1] == said.stdout


def run(script: str, cwd: Path, **env: str) -> None:
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        ["bash", "-c", script.replace("projaudit", f"{sys.executable} -m projaudit", 1)],
        cwd=cwd,
        env={**os.environ, **env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    assert done.stdout


def commands(block: str) -> list[str]:
    return [line.partition("#")[0].strip() for line in block.splitlines()]


def test_the_commands_and_the_library_block_run(tmp_path: Path):
    base = llava()
    (use,) = (block for block in blocks("sh") if "./model" in block)
    (library,) = blocks("python")
    (policy,) = blocks("yaml")
    card = "---\nbase_model: org/base\n---\n"
    save(tmp_path / "base", base, dtype=torch.bfloat16)
    save(tmp_path / "model", tuned(base), dtype=torch.bfloat16, card=card)
    assert len(commands(use)) == 4
    with FakeHub(tmp_path) as hub:
        hub.add("org/model", tmp_path / "model")
        hub.add("org/model", tmp_path / "model", revision="v2")
        sha = hub.add("org/base", tmp_path / "base")
        placeholder = "0123456789abcdef" * 2 + "01234567"
        (tmp_path / "gate.yaml").write_text(policy.replace(placeholder, sha))
        (tmp_path / "library.py").write_text(library)
        for script in (*commands(use), f"{sys.executable} library.py"):
            run(script, tmp_path, **hub.env())
    assert (tmp_path / "report.html").is_file()
    assert len(list((tmp_path / "reports").iterdir())) == 1


def test_a_calibration_is_made_as_its_block_says(tmp_path: Path):
    """All but its first line, which runs a language model: reports stand for what it writes."""
    (block,) = (block for block in blocks("sh") if "calibrate" in block)
    _, *lines = commands(block)
    said = subprocess.run(
        [sys.executable, "-m", "projaudit", "calibrate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert block.strip() in re.sub("^  ", "", said.stdout, flags=re.M)
    base = llava()
    save(tmp_path / "base", base)
    save(tmp_path / "org/model", tuned(base))
    (tmp_path / "reports").mkdir()
    report = sample_reports.silent()
    for digit in "ab":
        tensors = tuple(replace(tensor, sha256=digit * 64) for tensor in report.tensors)
        text = FORMATS["json"].render(replace(report, tensors=tensors))
        (tmp_path / f"reports/ours-{digit}.json").write_text(text)
    for line in lines:
        run(line, tmp_path)
    assert (tmp_path / "ours.json").is_file()


@pytest.mark.parametrize(
    "command",
    [
        part.strip()
        for block in blocks("sh")
        for line in commands(block)
        for part in line.split("&&")
        if part.strip().startswith("projaudit ")
    ],
)
def test_every_command_is_one(command: str):
    _, name, *words = shlex.split(command)
    with cli.commands[name].make_context(name, words) as context:
        assert context.params


def anchors(file: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_point_to_files_and_headings(document: str):
    text = (ROOT / document).read_text("utf-8")
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
