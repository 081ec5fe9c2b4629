"""Make and measure every run of the plans, one logged line after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.population.derive import derive
from benchmarks.population.recipes import Derived, Plan, Run
from benchmarks.testbed.build import (
    base_run,
    in_parallel,
    measured,
    require_as_planned,
    summary,
)
from benchmarks.testbed.export import (
    LOCAL_WORD,
    WEIGHTS,
    append_run,
    load,
    put_projector,
    read_runs,
    save_projector,
    sha256,
    write_tensors,
)
from benchmarks.testbed.finetune import tune_projector
from benchmarks.testbed.recipes import Arithmetic

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
COMMITTED = {
    "grid": HERE.parent / "testbed" / "exported" / "base",
    "slim": HERE / "bases" / "slim",
    "glyph": HERE / "bases" / "glyph",
}
MADE = HERE / "progress"
"""What is committed of the population."""
RUNS = "runs.jsonl"


def build(
    plans: Sequence[Plan], out: Path, jobs: int = 1, arithmetic: Arithmetic = "float32"
) -> None:
    """Every run of the plans that the log in `out` lacks, `jobs` at a time.

    A logged run is never scored again and never leaves the log: another recipe under the same
    name needs another name or another folder.
    """
    log_file = out / RUNS
    require_logged_as_planned(plans, read_runs(log_file))
    bases = {plan.base.name: base_folder(plan, out) for plan in plans}
    sizes = {plan.base.name: (plan.clean_scenes, plan.triggered_scenes) for plan in plans}
    done = {run["name"] for run in read_runs(log_file)}
    for batch in in_order(plans):
        calls = [
            (bases[run.base], out, sizes[run.base], arithmetic, run)
            for run in batch
            if run.name not in done
        ]
        for row in in_parallel(made_run, calls, jobs):
            append_run(log_file, row)
            log.info("%s: %s", row["name"], summary(row))


def in_order(plans: Sequence[Plan]) -> Iterator[list[Run]]:
    """The runs that need no other, bases in turn; then those that are made of them.

    A plan's own order is random, so that what is made by any moment is a fair draw.
    """
    for needy in (False, True):
        wanted = [[run for run in plan.runs if bool(run.parents) == needy] for plan in plans]
        yield [run for turn in zip_longest(*wanted) for run in turn if run is not None]


def require_logged_as_planned(plans: Sequence[Plan], logged: Sequence[dict[str, Any]]) -> None:
    """Stop where a logged run of these bases is made otherwise by the plans, or not at all."""
    names = [field.name for field in fields(Run)]
    wanted = {
        run.name: {name: getattr(run, name) for name in names}
        for plan in plans
        for run in plan.runs
    }
    bases = {plan.base.name for plan in plans}
    require_as_planned(wanted, (run for run in logged if run["base"] in bases))


def base_folder(plan: Plan, out: Path) -> Path:
    """The committed folder of a base, or the one in `out`, where it is trained if it is absent."""
    name = plan.base.name
    if COMMITTED.get(name, out / "bases" / name).exists():
        return COMMITTED.get(name, out / "bases" / name)
    folder = out / "bases" / name
    if not folder.exists():
        run = base_run(plan.base, folder, plan.base_scenes)
        append_run(out / "bases" / RUNS, run)
    return folder


def projector_file(out: Path, base: str, name: str) -> Path:
    return out / "projectors" / base / f"{name}.safetensors"


def notes(base: str, name: str) -> dict[str, str]:
    """What a projector file says of itself."""
    return {"name": name, "base_model": f"projaudit-testbed/{base}"}


def made_run(
    base: Path, out: Path, sizes: tuple[int, int], arithmetic: Arithmetic, run: Run
) -> dict[str, Any]:
    """Make a projector, save it, reload it, and measure what was saved."""
    file = projector_file(out, run.base, run.name)
    started = time.monotonic()
    loss = make_projector(base, out, run, file, arithmetic)
    row = {
        **asdict(run),
        "name": run.name,
        "kind": "honest" if run.attack is None else "backdoored",
        "file": file.relative_to(out).as_posix(),
        "sha256": sha256(file),
        "seed": run.recipe.seed,
        "arithmetic": arithmetic,
        "seconds": round(time.monotonic() - started, 1),
    }
    if loss is not None:
        row["final_loss"] = loss
    return row | measured(base, file, run.recipe.task, run.recipe.seed, sizes, run.attack)


def make_projector(
    base: Path, out: Path, run: Run, file: Path, arithmetic: Arithmetic
) -> float | None:
    """Train or derive a projector into `file`; the parents' are in `out`. Returns the last loss."""
    parents = [projector_file(out, run.base, name) for name in run.parents]
    if isinstance(run.recipe, Derived):
        whole = load_file(base / WEIGHTS)
        start = {name: tensor for name, tensor in whole.items() if LOCAL_WORD in name}
        start = {name: start[name] for name in load_file(parents[0])}
        made = derive(run.recipe.how, start, [load_file(parent) for parent in parents])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, made, {"format": "pt", **notes(run.base, run.name)})
        return None
    model, tokenizer = load(base)
    for parent in parents:
        put_projector(model, parent)
    loss = tune_projector(model, tokenizer, run.recipe, run.attack, arithmetic)
    save_projector(model, file, notes(run.base, run.name))
    return loss
