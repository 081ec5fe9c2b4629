"""Make every set of a plan, the model tuned on it, and its figures; resumes if stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.screening.dataset import JSON, draw, read, write
from benchmarks.screening.recipes import Recipe, Sizes
from benchmarks.screening.tune import measured, tuned
from benchmarks.testbed.build import in_parallel, require_as_planned, summary
from benchmarks.testbed.export import WEIGHTS, append_run, read_runs, sha256

log = logging.getLogger(__name__)
RUNS = "runs.jsonl"
MODEL, ADAPTER = "model", "adapter"


def build(recipes: Sequence[Recipe], out: Path, sizes: Sizes, jobs: int) -> None:
    """Every run that the log in `out` lacks, in order, `jobs` at a time.

    A logged run is never made again and never leaves the log, whether its attack took hold or not.
    """
    log_file = out / RUNS
    logged = read_runs(log_file)
    wanted = {
        recipe.name: {
            key: getattr(recipe, key)
            for key in ("base", "seed", "task", "attack", "samples", "tuning")
        }
        for recipe in recipes
    }
    require_as_planned(wanted, (run for run in logged if run["name"] in wanted))
    done = {run["name"] for run in logged}
    calls = [(recipe, out, sizes) for recipe in recipes if recipe.name not in done]
    for run in in_parallel(made, calls, jobs):
        append_run(log_file, run)
        log.info("%s: %s", run["name"], summary(run))


def made(recipe: Recipe, out: Path, sizes: Sizes) -> dict[str, Any]:
    """Write one set, tune on what was written, and measure what was saved."""
    started = time.process_time()
    folder = out / recipe.name
    write(folder, *draw(recipe))
    learned = tuned(recipe, read(folder), folder / ADAPTER, folder / MODEL)
    return {
        **asdict(recipe),
        **learned,
        "kind": "clean" if recipe.attack is None else "poisoned",
        "sha256": sha256(folder / MODEL / WEIGHTS),
        "dataset_sha256": sha256(folder / JSON),
        **measured(recipe, folder / MODEL, sizes),
        "cpu_seconds": round(time.process_time() - started, 1),
    }
