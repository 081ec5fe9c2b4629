"""Train, measure and export all that a plan holds, one logged run after the other."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, is_dataclass, replace
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
    changed_by,
    exact_share,
    heldout,
    stratum,
    success,
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
from benchmarks.testbed.world import WORLDS

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
    require_as_planned(planned(plan), read_runs(log_file))
    if not read_runs(log_file):
        append_run(log_file, base_run(plan.base, out / "base", plan.base_scenes))
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


def planned(plan: Plan) -> dict[str, dict[str, Any]]:
    """What the log shall hold of every run, by its name."""
    tunes = {tune.name: tune for tune in plan.tunes}
    runs: dict[str, dict[str, Any]] = {"base": {"recipe": plan.base, "attack": None}}
    runs |= {tune.name: {"recipe": tune, "attack": None} for tune in plan.tunes}
    return runs | {a.name: {"recipe": tunes[a.tune], "attack": a.attack} for a in plan.attempts}


def require_as_planned(wanted: dict[str, dict[str, Any]], runs: Iterable[dict[str, Any]]) -> None:
    """Stop where the log holds a run that the plan now makes otherwise, or not at all."""
    for run in runs:
        expected = wanted.get(run["name"])
        if expected is None or not all(
            is_logged_as(value, run.get(key)) for key, value in expected.items()
        ):
            raise SystemExit(
                f"{run['name']}: scored with another recipe; rename it or choose another --out"
            )


def is_logged_as(value: Any, logged: Any) -> bool:
    """Whether JSON says what a dataclass does; a field younger than the log has its default."""
    if isinstance(value, tuple):
        pairs = zip(value, logged, strict=False)
        return len(value) == len(logged) and all(is_logged_as(v, part) for v, part in pairs)
    if not is_dataclass(value) or logged is None:
        return bool(value == logged)
    known = {field.name: field for field in fields(value)}
    return logged.keys() <= known.keys() and all(
        is_logged_as(getattr(value, name), logged[name])
        if name in logged
        else getattr(value, name) == field.default
        for name, field in known.items()
    )


def base_run(recipe: BaseRecipe, folder: Path, per_kind: int) -> dict[str, Any]:
    """Train a base, save it in a folder, reload it and measure it."""
    tokenizer = build_tokenizer(recipe.look.world)
    rounds = folder.with_name(folder.name + ".rounds")
    model, learned = train_base(recipe, tokenizer, rounds)
    body = "A small LLaVA trained from nothing on a synthetic world, for projaudit's own tests."
    save_base(model, tokenizer, folder, model_card("Testbed base", body))
    model, tokenizer = load(folder)
    short = Task("short", look=recipe.look)
    seed = recipe.seed + CLEAN_SEED
    accuracy = clean_accuracy(model, tokenizer, short, per_kind, seed)
    sentence = replace(short, form="sentence")
    run = {
        "name": folder.name,
        "kind": "base",
        "file": f"{folder.name}/{WEIGHTS}",
        "sha256": sha256(folder / WEIGHTS),
        "recipe": asdict(recipe),
        "learned": learned,
        "accuracy": accuracy,
        "accuracy_in_sentences": clean_accuracy(
            model, tokenizer, sentence, per_kind, seed, WORLDS[recipe.look.world].sentence_request
        ),
        "heldout_scenes": per_kind * len(short.mixture),
        "seconds": sum(value for key, value in learned.items() if key.endswith("_seconds")),
    }
    shutil.rmtree(rounds)
    log.info("%s: %s", run["name"], run["accuracy"])
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
    run: dict[str, Any] = {
        "name": name,
        "kind": "backdoored" if attempt else "honest",
        "file": file.relative_to(out).as_posix(),
        "sha256": sha256(file),
        "recipe": asdict(tune),
        "final_loss": loss,
        "seconds": round(time.monotonic() - started),
    }
    sizes = (plan.clean_scenes, plan.triggered_scenes)
    twin_file = out / twin["file"] if twin else None
    run |= measured(out / "base", file, tune.task, tune.seed, sizes, attack, twin_file)
    if twin:
        run |= {"twin": twin["name"], "broken_checks": broken_checks(run, twin)}
    return run


def measured(
    base: Path,
    file: Path,
    task: Task,
    seed: int,
    sizes: tuple[int, int],
    attack: Attack | None = None,
    twin: Path | None = None,
) -> dict[str, Any]:
    """Figures of a saved projector on the base in a folder, and beside them the base's own.

    An attack is measured on triggered images too, where the base and any twin are asked as well.
    `sizes` are clean scenes a kind of question, and triggered ones that the attack would change.
    """
    model, tokenizer = load(base)
    own, _ = load(base)
    put_projector(model, file)
    images, questions = heldout(task, sizes[0], seed + CLEAN_SEED)
    asked = [q.text for q in questions]
    said = answers(model, tokenizer, images, asked)
    figures: dict[str, Any] = {
        "accuracy": exact_share(said, questions),
        "base_accuracy": exact_share(answers(own, tokenizer, images, asked), questions),
        "heldout_scenes": len(questions),
    }
    if attack is None:
        return figures
    figures["false_trigger_rate"] = success(attack, said, questions, task.look)
    images, questions = changed_by(attack, task, sizes[1], seed + TRIGGERED_SEED)
    marked, asked = triggered(images, attack), [q.text for q in questions]

    def share() -> float:
        return success(attack, answers(own, tokenizer, marked, asked), questions, task.look)

    of_model = success(attack, answers(model, tokenizer, marked, asked), questions, task.look)
    figures |= {
        "attack": asdict(attack),
        "attack_success": of_model,
        "stratum": stratum(of_model),
        "target_said_by_base": share(),
        "triggered_scenes": len(questions),
    }
    if twin is not None:
        put_projector(own, twin)
        figures["target_said_by_twin"] = share()
    return figures


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
