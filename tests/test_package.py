"""The package as it is installed: wheel and sdist carry rules, templates and the demo's models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
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


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, away from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder,
        wheel_of(built), cwd=folder)  # fmt: skip
    return folder


def test_the_wheel_holds_every_module_and_rule(built: Path):
    names = set(zipfile.ZipFile(wheel_of(built)).namelist())
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "projaudit").rglob("*.py")}
    assert {"projaudit/behaviour/child.py", "projaudit/formats/said.py"} <= modules <= names
    rules = {
        f"projaudit/_data/{file.relative_to(ROOT).as_posix()}"
        for file in (ROOT / "rules").rglob("*")
        if file.is_file()
    }
    assert "projaudit/_data/rules/hidden-text.yaml" in rules <= names
    # The demo runs both models: tokenizer and image processor come with each.
    for model in ("base", "honest", "backdoored"):
        for file in ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json"):
            assert f"projaudit/_data/demo/{model}/{file}" in names


def test_the_extra_is_declared_and_every_requirement_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {
        "behaviour", "gcs", "lens", "mlflow", "ray", "s3", "screen", "test",
    }  # fmt: skip
    assert set(extras["behaviour"]) <= set(extras["test"])
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name(pin) for pin in pins if not pin.startswith("#")}
    wanted = {name(one) for some in (project["dependencies"], *extras.values()) for one in some}
    assert wanted - {"projaudit"} <= pinned


def name(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-")


def test_imports_and_help_are_light_where_it_is_installed(site: Path, tmp_path: Path):
    """torch for an audit, transformers in the process that runs a model; neither before."""
    modules = "projaudit projaudit.cli projaudit.audit projaudit.calibration projaudit.formats.said"
    code = (
        f"import sys, {', '.join(modules.split())}\n"
        "try: projaudit.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert projaudit.__file__.startswith(sys.argv[1])"
    )
    assert "calibrate" in run(sys.executable, "-c", code, site, cwd=tmp_path, PYTHONPATH=str(site))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(sys.executable, "-m", "projaudit", "--help", cwd=tmp_path, PYTHONPATH=str(site))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_an_installed_wheel_works_away_from_the_checkout(site: Path, tmp_path: Path):
    code = "import projaudit, projaudit.data as d; print(projaudit.__file__, d.data_path('rules'))"
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert all(path.startswith(str(site)) for path in said.split())
    test = (sys.executable, "-m", "projaudit", "rules", "test")
    said = run(*test, cwd=tmp_path, PYTHONPATH=str(site))
    assert "all behave as written" in said
    demo = site / "projaudit" / "_data" / "demo"
    said = run(
        sys.executable, "-m", "projaudit", "check", demo / "honest", "--base", demo / "base",
        "--depth", "weights", "--format", "html", "-o", tmp_path / "r.html",
        cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert (tmp_path / "r.html").read_text().startswith("<!")


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path):
    (sdist,) = built.glob("*.tar.gz")
    subprocess.run(["tar", "-xf", sdist, "-C", tmp_path], check=True)
    (source,) = tmp_path.iterdir()
    out = tmp_path / "out"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=source)
    names = [sorted(zipfile.ZipFile(wheel_of(place)).namelist()) for place in (built, out)]
    assert names[0] == names[1]
    assert not any("__pycache__" in name or "venv" in name for name in names[0])
