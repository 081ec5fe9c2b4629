"""One thread, as matrices are small here; and a small LLaVA, saved once for all."""

from __future__ import annotations

import os

# Read when torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it."""
    from repos import save_llava

    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


@pytest.fixture
def repo(saved_llava: Path, tmp_path: Path):
    """A copy of that folder to change."""
    from repos import Repo
    from safetensors.torch import load_file

    folder = tmp_path / "repo"
    shutil.copytree(saved_llava, folder)
    return Repo(folder, load_file(saved_llava / "model.safetensors"))
