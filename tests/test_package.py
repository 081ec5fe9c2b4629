"""The package as it is installed: wheel and sdist carry rules, templates and the demo's models."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


def wheel_of(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_an_installed_wheel_works_away_from_the_checkout(built: Path, tmp_path: Path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site,
        wheel_of(built), cwd=tmp_path)  # fmt: skip
    code = "import projaudit, projaudit.data as d; print(projaudit.__file__, d.data_path('rules'))"
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert all(path.startswith(str(site)) for path in said.split())
    test = (sys.executable, "-m", "projaudit", "rules", "test")
    said = run(*test, cwd=tmp_path, PYTHONPATH=str(site))
    assert "all behave as written" in said
    demo = site / "projaudit" / "_data" / "demo"
    said = run(
        sys.executable, "-m", "projaudit", "check", demo / "honest", "--base", demo / "base",
        "--format", "html", "-o", tmp_path / "r.html", cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert (tmp_path / "r.html").read_text().startswith("<!")


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    out = tmp_path / "out"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=source)
    names = [sorted(zipfile.ZipFile(wheel_of(place)).namelist()) for place in (built, out)]
    assert names[0] == names[1]
    assert not any("__pycache__" in name or "venv" in name for name in names[0])
