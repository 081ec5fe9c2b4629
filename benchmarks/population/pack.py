"""The population as it is committed: a file of projectors a base, a table of runs; and rebuilt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.population.build import (
    COMMITTED,
    RUNS,
    base_folder,
    make_projector,
    notes,
    projector_file,
    require_logged_as_planned,
)
from benchmarks.population.recipes import Plan, Run
from benchmarks.testbed.build import in_parallel
from benchmarks.testbed.export import LOCAL_WORD, read_runs, sha256, write_tensors
from benchmarks.testbed.recipes import Arithmetic

PROJECTORS, TABLE = "projectors", "runs.parquet"


def pack(plans: Sequence[Plan], outs: Sequence[Path], to: Path) -> list[dict[str, Any]]:
    """The rows of all planned runs, packed from the folders `outs` into the folder `to`.

    Stops where a run is missing, or is not the one that was scored. The bytes depend on the runs
    alone, not on the order in which they were made.
    """
    logged = {run["name"]: (run, out) for out in outs for run in read_runs(out / RUNS)}
    require_logged_as_planned(plans, [run for run, _ in logged.values()])
    missing = [run.name for plan in plans for run in plan.runs if run.name not in logged]
    if missing:
        raise SystemExit(f"{len(missing)} runs are missing: {', '.join(missing[:5])} …")
    rows = []
    for plan in plans:
        tensors: dict[str, Tensor] = {}
        for name in sorted(run.name for run in plan.runs):
            row, out = logged[name]
            file = projector_file(out, plan.base.name, name)
            if sha256(file) != row["sha256"]:
                raise SystemExit(f"{file} is not the projector that was scored")
            packed = {n.removeprefix(LOCAL_WORD): t for n, t in load_file(file).items()}
            tensors |= {f"{name}/{local}": tensor for local, tensor in packed.items()}
            rows.append(row)
        file = to / PROJECTORS / f"{plan.base.name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors, {"format": "pt"})
    columns = [columns_of(row, rows) for row in rows]
    pq.write_table(pa.Table.from_pylist(columns), to / TABLE, compression="zstd")
    return columns


def logged_columns(outs: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of all runs that were made so far, by base and name, as in the table."""
    logged = [run for out in outs for run in read_runs(out / RUNS)]
    logged.sort(key=lambda run: (list(COMMITTED).index(run["base"]), run["name"]))
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


def read_table(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / TABLE).to_pylist()
    return rows


def unpack(folder: Path, base: str, name: str, out: Path) -> Path:
    """A run's projector file, byte by byte the one that was scored, out of the packed one."""
    with safe_open(folder / PROJECTORS / f"{base}.safetensors", "pt") as packed:
        of_run = [key for key in packed.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
        tensors = {LOCAL_WORD + key.partition("/")[2]: packed.get_tensor(key) for key in of_run}
    file = projector_file(out, base, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {"format": "pt", **notes(base, name)})
    return file


def rebuild(
    plans: Sequence[Plan], folder: Path, out: Path, k: int, seed: int, jobs: int = 1
) -> list[dict[str, Any]]:
    """Make k packed runs again, drawn at random: what `rebuilt` says of each."""
    chosen = np.random.default_rng(seed)
    made = {row["name"]: row["arithmetic"] for row in read_table(folder)}
    everything = [(plan, run) for plan in plans for run in plan.runs if run.name in made]
    drawn = [everything[i] for i in chosen.choice(len(everything), k, replace=False)]
    calls = [(base_folder(plan, out), run, made[run.name]) for plan, run in drawn]
    return list(in_parallel(partial(rebuilt, folder, out), calls, jobs))


def rebuilt(
    folder: Path, out: Path, base: Path, run: Run, arithmetic: Arithmetic
) -> dict[str, Any]:
    """Whether a run made again, from its packed parents, has the same bytes; else how far off."""
    for parent in run.parents:
        unpack(folder, run.base, parent, out)
    before = unpack(folder, run.base, run.name, out / "packed")
    file = projector_file(out, run.base, run.name)
    make_projector(base, out, run, file, arithmetic)
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
