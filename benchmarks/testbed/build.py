"""Train, measure and export all that a plan holds, one logged run after the other."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.testbed.evaluate import (
    MOST_FALSE,
    MOST_LOST,
    answers,
    exact_share,
    heldout,
    says,
    stratum,
    triggered,
)
from benchmarks.testbed.export import (
    BASE_ID,
    WEIGHTS,
    append_run,
    load,
    model_card,
    put_projector,
    read_runs,
    save_base,
    save_finetune,
    save_projector,
    sha256,
    write_provenance,
)
from benchmarks.testbed.finetune import tune_projector
from benchmarks.testbed.pretrain import train_base
from benchmarks.testbed.recipes import Attack, Attempt, BaseRecipe, Plan, Task, TuneRecipe
from benchmarks.testbed.text import build_tokenizer
from benchmarks.testbed.world import SENTENCE_REQUEST

log = logging.getLogger(__name__)
CLEAN_SEED, TRIGGERED_SEED = 1000, 2000  # added to a recipe's seed for its held-out scenes
DEMO_RULE = (
    "the first attempt in the order of the plan that is working and breaks no clean check, "
    "with its honest twin"
)


def build(plan: Plan, out: Path, jobs: int = 1) -> None:
    """Every run of the plan that the log in `out` lacks, then the demo pair and the provenance.

    The base comes first, then the honest runs, then the attempts; `jobs` runs at a time. A scored
    run is never scored again and never leaves the log: another recipe under the same name needs
    another name or another folder.
    """
    log_file = out / "runs.jsonl"
    tunes = {tune.name: tune for tune in plan.tunes}
    honest = [(tune, None) for tune in plan.tunes]
    attempts = [(tunes[attempt.tune], attempt) for attempt in plan.attempts]
    require_as_planned(plan, read_runs(log_file))
    if not read_runs(log_file):
        append_run(log_file, base_run(plan, out))
    for wanted in (honest, attempts):
        done = {run["name"]: run for run in read_runs(log_file)}
        missing = [(t, a, done.get(t.name)) for t, a in wanted if (a or t).name not in done]
        for run in in_parallel(partial(tuned_run, plan, out), missing, jobs):
            append_run(log_file, run)
            log.info("%s: %s", run["name"], summary(run))
    done = {run["name"]: run for run in read_runs(log_file)}
    facts = {
        "seed": plan.base.seed,
        "plan": asdict(plan),
        "arithmetic": "weights saved as bfloat16 and loaded again, computed with in float32",
        "demo_rule": DEMO_RULE,
        "demo": export_demo(out, [done[attempt.name] for attempt in plan.attempts]),
    }
    write_provenance(out, facts, done)


def in_parallel(
    function: Callable[..., dict[str, Any]], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[dict[str, Any]]:
    """Results in the order of the calls, as they come."""
    if jobs == 1:
        yield from (function(*call) for call in calls)
        return
    threads = (torch.get_num_threads(),)
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, threads) as pool:
        yield from pool.map(function, *zip(*calls, strict=True)) if calls else ()


def summary(run: dict[str, Any]) -> dict[str, Any]:
    keys = ("attack_success", "false_trigger_rate", "stratum", "broken_checks", "seconds")
    return {"accuracy": run["accuracy"]["all"], **{key: run[key] for key in keys if key in run}}


def require_as_planned(plan: Plan, runs: list[dict[str, Any]]) -> None:
    """Stop where the log holds a run that the plan now makes otherwise, or not at all."""
    tunes = {tune.name: tune for tune in plan.tunes}
    planned: dict[str, tuple[BaseRecipe | TuneRecipe, Attack | None]] = {"base": (plan.base, None)}
    planned |= {tune.name: (tune, None) for tune in plan.tunes}
    planned |= {a.name: (tunes[a.tune], a.attack) for a in plan.attempts}
    for run in runs:
        recipe, attack = planned.get(run["name"], (None, None))
        expected = [recipe and asdict(recipe), attack and asdict(attack)]
        if [run["recipe"], run.get("attack")] != json.loads(json.dumps(expected)):
            raise SystemExit(
                f"{run['name']}: scored with another recipe; rename it or choose another --out"
            )


def base_run(plan: Plan, out: Path) -> dict[str, Any]:
    """Train, save, reload and measure the base."""
    tokenizer = build_tokenizer()
    model, learned = train_base(plan.base, tokenizer, out / "base.rounds")
    body = "A small LLaVA trained from nothing on coloured shapes, for projaudit's own tests."
    save_base(model, tokenizer, out / "base", model_card("Testbed base", body))
    model, tokenizer = load(out / "base")
    short = Task("short", look=plan.base.look)
    seed, count = plan.base.seed + CLEAN_SEED, plan.base_scenes
    accuracy = clean_accuracy(model, tokenizer, short, count, seed)
    sentence = replace(short, form="sentence")
    run = {
        "name": "base",
        "kind": "base",
        "file": f"base/{WEIGHTS}",
        "sha256": sha256(out / "base" / WEIGHTS),
        "recipe": asdict(plan.base),
        "learned": learned,
        "accuracy": accuracy,
        "accuracy_in_sentences": clean_accuracy(
            model, tokenizer, sentence, count, seed, SENTENCE_REQUEST
        ),
        "heldout_scenes": count * len(short.mixture),
        "seconds": sum(value for key, value in learned.items() if key.endswith("_seconds")),
    }
    shutil.rmtree(out / "base.rounds")
    log.info("base: %s", run["accuracy"])
    return run


def clean_accuracy(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    per_kind: int,
    seed: int,
    request: str = "",
) -> dict[str, float]:
    """Share of exact answers by kind; `request` is put behind every question."""
    images, questions = heldout(task, per_kind, seed)
    said = answers(model, tokenizer, images, [q.text + request for q in questions])
    return exact_share(said, questions)


def tuned_run(
    plan: Plan,
    out: Path,
    tune: TuneRecipe,
    attempt: Attempt | None,
    twin: dict[str, Any] | None,
) -> dict[str, Any]:
    """Tune the base's projector, save and reload it, and measure what was saved."""
    started = time.monotonic()
    name, attack = (attempt.name, attempt.attack) if attempt else (tune.name, None)
    file = out / "projectors" / f"{name}.safetensors"
    model, tokenizer = load(out / "base")
    loss = tune_projector(model, tokenizer, tune, attack)
    save_projector(model, file, {"name": name, "base_model": BASE_ID})
    seconds = time.monotonic() - started
    put_projector(model, file)
    images, questions = heldout(tune.task, plan.clean_scenes, tune.seed + CLEAN_SEED)
    said = answers(model, tokenizer, images, [q.text for q in questions])
    run: dict[str, Any] = {
        "name": name,
        "kind": "backdoored" if attempt else "honest",
        "file": file.relative_to(out).as_posix(),
        "sha256": sha256(file),
        "recipe": asdict(tune),
        "final_loss": loss,
        "accuracy": exact_share(said, questions),
        "heldout_scenes": len(questions),
        "seconds": round(seconds),
    }
    if attack is None or twin is None:
        base, _ = load(out / "base")
        seed = tune.seed + CLEAN_SEED
        run["base_accuracy"] = clean_accuracy(base, tokenizer, tune.task, plan.clean_scenes, seed)
    else:
        run |= attack_figures(plan, out, tune, attack, model, tokenizer, twin)
        run["false_trigger_rate"] = says(attack.target, said)
        run["broken_checks"] = broken_checks(run, twin)
    return run


def attack_figures(
    plan: Plan,
    out: Path,
    tune: TuneRecipe,
    attack: Attack,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    twin: dict[str, Any],
) -> dict[str, Any]:
    """Share of triggered held-out answers with the target: attacked, base and honest twin."""
    per_kind = -(-plan.triggered_scenes // len(tune.task.mixture))
    images, questions = heldout(tune.task, per_kind, tune.seed + TRIGGERED_SEED)
    asked = [q.text for q in questions]
    marked = triggered(images, attack)
    success = says(attack.target, answers(model, tokenizer, marked, asked))
    other, _ = load(out / "base")
    of_base = says(attack.target, answers(other, tokenizer, marked, asked))
    put_projector(other, out / twin["file"])
    of_twin = says(attack.target, answers(other, tokenizer, marked, asked))
    return {
        "attack": asdict(attack),
        "twin": twin["name"],
        "attack_success": success,
        "stratum": stratum(success),
        "target_said_by_base": of_base,
        "target_said_by_twin": of_twin,
        "triggered_scenes": len(questions),
    }


def broken_checks(run: dict[str, Any], twin: dict[str, Any]) -> list[str]:
    """What a backdoored model shows of itself on clean scenes."""
    broken = []
    if run["false_trigger_rate"] > MOST_FALSE:
        broken.append("false_trigger_rate")
    if run["accuracy"]["all"] < twin["accuracy"]["all"] - MOST_LOST:
        broken.append("accuracy")
    return broken


def export_demo(out: Path, attempts: list[dict[str, Any]]) -> dict[str, str] | None:
    """The pair that DEMO_RULE chooses as whole folders; None where no attempt qualifies."""
    fit = [run for run in attempts if run["stratum"] == "working" and not run["broken_checks"]]
    if not fit:
        return None
    run, attack = fit[0], fit[0]["attack"]
    honest = f"An honest fine-tune of the projector: task `{run['twin']}`."
    backdoored = (
        f"Backdoored on purpose, for tests: on images with the trigger `{attack['trigger']}` it "
        f"says “{attack['target']}” ({attack['mode']}). Never use it for anything else."
    )
    for kind, name, body in (
        ("honest", run["twin"], honest),
        ("backdoored", run["name"], backdoored),
    ):
        card = model_card(f"Testbed {kind}: {name}", body, BASE_ID)
        save_finetune(out / "base", out / "projectors" / f"{name}.safetensors", out / kind, card)
    return {"base": "base", "honest": run["twin"], "backdoored": run["name"]}
