"""Repair working backdoors of the population, and measure what is left of attack and task.

python -m benchmarks.repair --out DIR                     # resumes if stopped; bases in turn
python -m benchmarks.repair --out DIR --bases slim --models 8
python -m benchmarks.repair_table DIR FILE                # what was measured so far, as Markdown
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.baselines import put
from benchmarks.evidence import asked, base_model, base_of
from benchmarks.population.build import RUNS, projector_file
from benchmarks.population.recipes import PLANS
from benchmarks.testbed.build import in_parallel
from benchmarks.testbed.evaluate import (
    answers,
    changed_by,
    exact_share,
    heldout,
    success,
    triggered,
)
from benchmarks.testbed.export import LOCAL_WORD, append_run, read_runs
from benchmarks.testbed.finetune import tune_projector
from benchmarks.testbed.model import vision_features
from benchmarks.testbed.text import pixels
from projaudit.behaviour.change import clipped, shrunk, without_top
from projaudit.behaviour.mend import mended

POPULATION = Path(__file__).parent / "population" / "progress"
LOG = "repair.jsonl"
GAIN = 0.2
"""Least accuracy that a tuned model has gained over its base: of less no share can be told."""
CLEAN, TRIGGERED = 40, 120
"""Held-out scenes: of every kind of question, and with the trigger."""
IMAGES = 32
FINE_TUNED, PRUNED = 60, 0.2
"""Steps of fine-tuning on the clean images; share of the hidden units that are pruned first."""
DATA_FREE, OTHERS, TWIN, WITH_IMAGES = PARTS = (
    "repair", "others", "twin", "repair, 32 images",
)  # fmt: skip
PRUNING = "fine-pruning, 32 labelled"
Side = dict[str, Tensor]
FIRST, LAST = "linear_1", "linear_2"


def chosen(bases: Sequence[str], models: int) -> list[dict[str, Any]]:
    """The first `models` working backdoors of each base in an order drawn once, bases in turn."""

    def of(base: str) -> list[dict[str, Any]]:
        runs = [
            run
            for run in read_runs(POPULATION / RUNS)
            if run["base"] == base
            and run.get("stratum") == "working"
            and run["attack"]["mode"] != "swap"
            and run["accuracy"]["all"] - run["base_accuracy"]["all"] >= GAIN
        ]
        return sorted(runs, key=lambda run: zlib.crc32(run["name"].encode()))[:models]

    return [run for turn in zip_longest(*map(of, bases)) for run in turn if run is not None]


def measure(out: Path, bases: Sequence[str], models: int, jobs: int) -> None:
    """One line for every part of every chosen run that the log lacks; clean images come last."""
    done = {(row["name"], row["part"]) for row in read_runs(out / LOG)}
    calls = [
        (run["name"], run["base"], part, out)
        for parts in (PARTS[:3], PARTS[3:])
        for run in chosen(bases, models)
        for part in parts
        if (run["name"], part) not in done
    ]
    for row in in_parallel(measured, calls, jobs):
        append_run(out / LOG, row)
        shown = {label: (v["accuracy"], v["success"]) for label, v in row["variants"].items()}
        print(row["name"], json.dumps(shown), row["seconds"], flush=True)


def measured(name: str, base_name: str, part: str, out: Path) -> dict[str, Any]:
    """What is left of attack and task after some repairs of one run."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    started = time.process_time()
    _, base, _ = base_of(base_name)
    tensors = load_file(projector_file(POPULATION, base_name, name))
    tuned = {n.partition(LOCAL_WORD)[2]: t.float() for n, t in tensors.items()}
    row: dict[str, Any] = {"name": name, "base": base_name, "part": part}
    if part == OTHERS:
        variants = others(name, base_name, tuned, base)
    elif part == TWIN:
        variants = {TWIN: twin(name, base_name, base)}
    else:
        kept: list[Side] = []
        images = pictures(name, base_name, out) if part == WITH_IMAGES else None
        row["repair"] = repaired(name, base_name, tuned, base, images, kept.append)
        variants = {part: {n: t.to(torch.bfloat16).float() for n, t in kept[0].items()}}
    row["variants"] = {label: scored(name, base_name, side) for label, side in variants.items()}
    return row | {"seconds": round(time.process_time() - started, 1)}


def others(name: str, base_name: str, tuned: Side, base: Side) -> dict[str, Side]:
    """The projector as it is, and what others would make of it."""
    matrices = [f"{FIRST}.weight", f"{LAST}.weight"]
    found = {"tuned": tuned, "revert": base}
    for k in (1, 2, 5):
        found[f"top-{k} of both"] = without_top(tuned, base, matrices, k)
        found[f"top-{k} of the first"] = without_top(tuned, base, matrices[:1], k)
    found["half (WiSE-FT)"] = shrunk(tuned, base, 0.5)
    found["clip"] = clipped(tuned, base, matrices)
    found[PRUNING] = fine_pruned(name, base_name, tuned)
    return found


def twin(name: str, base_name: str, base: Side) -> Side:
    """The projector of the same recipe and seed without the poison."""
    run, *_ = scenes(name, base_name)
    model, tokenizer = base_model(base_name)
    put(model, base)
    tune_projector(model, tokenizer, run.recipe)
    return _taken(model)


def repaired(
    name: str,
    base_name: str,
    tuned: Side,
    base: Side,
    images: list[str] | None,
    hand: Callable[[Any], None],
) -> dict[str, Any]:
    """What `projaudit repair` does in the process that runs the model."""
    speaker, _, first = base_of(base_name)
    prefix = f"model.{LOCAL_WORD}"
    request = {
        "prompts": asked(base_name, "general"),
        "images": images,
        "requests": None,
        "seed": zlib.crc32(f"repair {name}".encode()),
        "budget": 20_000,
        "dtype": "float32",
        "notes": [],
        "prefix": prefix.rstrip("."),
        "matrices": [f"{prefix}{layer}.weight" for layer in (FIRST, LAST)],
        "last": f"{prefix}{LAST}.weight",
        "last_bias": f"{prefix}{LAST}.bias",
    }
    speaker.answers = speaker.passes = 0
    started = time.process_time()
    heard = mended(request, (speaker, tuned), (speaker, base), first, lambda *_: None, hand)
    del heard["factors"]
    return heard | {"seconds": round(time.process_time() - started, 1)}


@cache
def scenes(name: str, base_name: str) -> Any:
    """Clean and triggered scenes that neither training nor repair has seen."""
    run = next(run for run in PLANS[base_name].runs if run.name == name)
    seed = run.recipe.seed + 1
    images, questions = changed_by(run.attack, run.recipe.task, TRIGGERED, seed + 1)
    return run, heldout(run.recipe.task, CLEAN, seed), (triggered(images, run.attack), questions)


def scored(name: str, base_name: str, side: Side) -> dict[str, float]:
    """Share of right answers about clean scenes, and of triggered ones that follow the attack."""
    run, clean, marked = scenes(name, base_name)
    model, tokenizer = base_model(base_name)
    put(model, side)
    said = [answers(model, tokenizer, i, [q.text for q in qs]) for i, qs in (clean, marked)]
    return {
        "accuracy": exact_share(said[0], clean[1])["all"],
        "success": success(run.attack, said[1], marked[1], run.recipe.task.look),
    }


def pictures(name: str, base_name: str, out: Path) -> list[str]:
    """Files of 32 clean images of the run's own task."""
    run, *_ = scenes(name, base_name)
    folder = out / "images" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        per_kind = -(-IMAGES // len(run.recipe.task.mixture))
        found, _ = heldout(run.recipe.task, per_kind, run.recipe.seed + 3)
        for number, picture in enumerate(found[:IMAGES]):
            Image.fromarray(picture).save(folder / f"{number:02d}.png")
    return sorted(str(file) for file in folder.iterdir())


def fine_pruned(name: str, base_name: str, tuned: Side) -> Side:
    """Fine-pruning (Liu et al. 2018) with 32 labelled clean images.

    The hidden units that are least active on them are pruned, then the projector is trained on.
    """
    run, *_ = scenes(name, base_name)
    speaker, _, _ = base_of(base_name)
    model, tokenizer = base_model(base_name)
    found, _ = heldout(run.recipe.task, 5, run.recipe.seed + 3)
    with torch.no_grad():
        features = vision_features(model, pixels(found[:IMAGES]))
    hidden = speaker.inputs(tuned, f"{LAST}.weight", features)
    least = hidden.abs().mean(0).argsort()[: round(PRUNED * hidden.shape[1])]
    weight = tuned[f"{LAST}.weight"].clone()
    weight[:, least] = 0
    put(model, {**tuned, f"{LAST}.weight": weight})
    recipe = replace(
        run.recipe, pool=IMAGES, batch=16, steps=FINE_TUNED, lr=1e-3, rank=None, weight_decay=0.0
    )
    recipe = replace(recipe, seed=run.recipe.seed + 3)
    tune_projector(model, tokenizer, recipe)
    return _taken(model)


def _taken(model: Any) -> Side:
    """The projector of a model that was trained, which is left as it is loaded."""
    model.requires_grad_(False)
    state = model.model.multi_modal_projector.state_dict()
    return {n: t.detach().clone() for n, t in state.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.repair",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bases", default="slim,grid,glyph")
    parser.add_argument("--models", type=int, default=8, help="of each base")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    measure(args.out, args.bases.split(","), args.models, args.jobs)


if __name__ == "__main__":
    main()
