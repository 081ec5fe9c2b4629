"""The README: its commands run, its help is the help, its policy loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from fakehub import FakeHub
from models import llava, save, tuned

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
TEST_COMMAND = "pip install -c constraints.txt -e '.[test]' && pytest"
DEMO_COMMAND = "pip install -c constraints.txt . && projaudit demo"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_two_commands_stand_there_alone():
    assert [f"{DEMO_COMMAND}\n", f"{TEST_COMMAND}\n"] == blocks("sh")[:2]
    assert "TEST_COMMAND" not in (ROOT / ".ci/run").read_text()
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_the_help_is_the_help():
    shown = re.search(r"<!-- begin help -->\n```text\n(.*?)```\n<!-- end help -->", README, re.S)
    said = subprocess.run(
        [sys.executable, "-m", "projaudit", "check", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert shown is not None
    assert shown[1] == said.stdout


def test_the_commands_and_the_library_block_run(tmp_path: Path):
    base = llava()
    (use,) = (block for block in blocks("sh") if "./model" in block)
    (library,) = blocks("python")
    (policy,) = blocks("yaml")
    card = "---\nbase_model: org/base\n---\n"
    save(tmp_path / "base", base, dtype=torch.bfloat16)
    save(tmp_path / "model", tuned(base), dtype=torch.bfloat16, card=card)
    lines = [line.partition("#")[0].strip() for line in use.splitlines()]
    assert len(lines) == 4
    with FakeHub(tmp_path) as hub:
        hub.add("org/model", tmp_path / "model")
        hub.add("org/model", tmp_path / "model", revision="v2")
        sha = hub.add("org/base", tmp_path / "base")
        placeholder = "0123456789abcdef" * 2 + "01234567"
        (tmp_path / "gate.yaml").write_text(policy.replace(placeholder, sha))
        scripts = [
            *(line.replace("projaudit", f"{sys.executable} -m projaudit", 1) for line in lines),
            f"{sys.executable} library.py",
        ]
        (tmp_path / "library.py").write_text(library)
        path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
        for script in scripts:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=tmp_path,
                env={**hub.env(), "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, (script, done.stdout, done.stderr)
            assert done.stdout
    assert (tmp_path / "report.html").is_file()
    assert len(list((tmp_path / "reports").iterdir())) == 1


def test_links_point_to_files():
    for target in re.findall(r"\]\((?!https://)([^)#]+)", README):
        assert (ROOT / target).exists(), target
