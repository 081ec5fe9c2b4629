"""The population as it is committed: a table of its runs beside their projectors; and rebuilt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file

from benchmarks.population.build import (
    COMMITTED,
    RUNS,
    base_folder,
    make_projector,
    projector_file,
    require_logged_as_planned,
)
from benchmarks.population.recipes import Plan, Run
from benchmarks.testbed.build import in_parallel
from benchmarks.testbed.export import read_runs, sha256
from benchmarks.testbed.recipes import Arithmetic

TABLE = "runs.parquet"


def write_table(plans: Sequence[Plan], folder: Path) -> list[dict[str, Any]]:
    """The rows of all runs that were made so far, written into the folder.

    Stops where the plans make a run otherwise, or its projector is not the one that was scored.
    """
    logged = read_runs(folder / RUNS)
    require_logged_as_planned(plans, logged)
    for run in logged:
        file = projector_file(folder, run["base"], run["name"])
        if not file.exists() or sha256(file) != run["sha256"]:
            raise SystemExit(f"{file} is not the projector that was scored")
    rows = columns(folder)
    pq.write_table(pa.Table.from_pylist(rows), folder / TABLE, compression="zstd")
    return rows


def columns(folder: Path) -> list[dict[str, Any]]:
    """The rows of all runs that were made so far, by base and name."""
    bases, logged = list(COMMITTED), read_runs(folder / RUNS)
    rank = {base: place for place, base in enumerate(bases)}
    logged.sort(key=lambda run: (rank.get(run["base"], len(bases)), run["name"]))
    return [columns_of(run, logged) for run in logged]


def columns_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A logged run as a row of the table; shares are from 0 to 1, and null where none was taken."""
    attack = row["attack"] or {}
    return {
        "name": row["name"],
        "base": row["base"],
        "kind": row["kind"],
        "group": row["group"],
        "seed": row["seed"],
        "arithmetic": row["arithmetic"],
        "recipe": json.dumps(row["recipe"], sort_keys=True, ensure_ascii=False),
        "start": row["start"],
        **{key: attack.get(key) for key in ("trigger", "strength", "target", "mode", "poison")},
        "accuracy": row["accuracy"]["all"],
        "base_accuracy": row["base_accuracy"]["all"],
        "honest_accuracy": honest_accuracy(row, rows),
        "accuracy_by_kind": json.dumps(row["accuracy"], sort_keys=True),
        "heldout_scenes": row["heldout_scenes"],
        "attack_success": row.get("attack_success"),
        "stratum": row.get("stratum"),
        "false_trigger_rate": row.get("false_trigger_rate"),
        "target_said_by_base": row.get("target_said_by_base"),
        "triggered_scenes": row.get("triggered_scenes"),
        "final_loss": row.get("final_loss"),
        "seconds": row["seconds"],
        "sha256": row["sha256"],
    }


def honest_accuracy(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean accuracy of a base's ordinary runs of the same task, whatever the task is called."""

    def taught(of: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return of["base"], {**of["recipe"]["task"], "name": ""}

    same = [
        other["accuracy"]["all"]
        for other in rows
        if other["group"] == "ordinary" and taught(other) == taught(row)
    ]
    return float(np.mean(same)) if same else None


def rebuild(
    plans: Sequence[Plan], folder: Path, scratch: Path, k: int, seed: int, jobs: int = 1
) -> list[dict[str, Any]]:
    """Make k of the runs again, drawn at random: what `rebuilt` says of each."""
    chosen = np.random.default_rng(seed)
    made = {run["name"]: run["arithmetic"] for run in read_runs(folder / RUNS)}
    everything = [(plan, run) for plan in plans for run in plan.runs if run.name in made]
    drawn = [everything[i] for i in chosen.choice(len(everything), k, replace=False)]
    calls = [(base_folder(plan, scratch), run, made[run.name]) for plan, run in drawn]
    return list(in_parallel(partial(rebuilt, folder, scratch), calls, jobs))


def rebuilt(
    folder: Path, scratch: Path, base: Path, run: Run, arithmetic: Arithmetic
) -> dict[str, Any]:
    """Whether a run made again, from the parents as they are, has the same bytes; how far off."""
    for parent in run.parents:
        copy = projector_file(scratch, run.base, parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(projector_file(folder, run.base, parent), copy)
    before = projector_file(folder, run.base, run.name)
    file = projector_file(scratch, run.base, run.name)
    make_projector(base, scratch, run, file, arithmetic)
    old, new = load_file(before), load_file(file)
    return {
        "name": run.name,
        "recipe": asdict(run.recipe),
        "same_bytes": sha256(file) == sha256(before),
        "largest_difference": max(
            (old[n].float() - new[n].float()).abs().max().item() for n in old
        ),
        "largest_weight": max(tensor.float().abs().max().item() for tensor in old.values()),
    }
