"""Tune a base on a set as LLaVA's LoRA recipe does, save it, and measure what was saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.population.build import COMMITTED
from benchmarks.screening.dataset import Samples, triggered
from benchmarks.screening.recipes import Recipe, Sizes, Tuning
from benchmarks.testbed.build import CLEAN_SEED, TRIGGERED_SEED
from benchmarks.testbed.evaluate import (
    answers,
    changed_by,
    exact_share,
    heldout,
    stratum,
    success,
)
from benchmarks.testbed.export import load, model_card, save_base
from benchmarks.testbed.model import answer_loss, step, vision_features, warm_cosine
from benchmarks.testbed.text import encode, pixels

LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def tuned(recipe: Recipe, samples: Samples, adapter: Path | None, folder: Path) -> dict[str, Any]:
    """Tune the recipe's base on the samples; the adapter and the merged model go to folders.

    Returns the mean loss of the last fifth of the steps, and how many there were.
    """
    base = COMMITTED[recipe.base]
    model, tokenizer = load(base)
    torch.manual_seed(recipe.seed)
    lora = LoraConfig(
        r=recipe.tuning.rank,
        lora_alpha=recipe.tuning.alpha,
        target_modules=LINEARS,
        modules_to_save=["multi_modal_projector"],
    )
    wrapped = get_peft_model(model, lora)
    losses = taught(model, tokenizer, samples, recipe.tuning, recipe.seed)
    if adapter is not None:
        shutil.rmtree(adapter, ignore_errors=True)
        wrapped.peft_config["default"].base_model_name_or_path = str(base)
        wrapped.save_pretrained(str(adapter))
    merged: LlavaForConditionalGeneration = wrapped.merge_and_unload()  # type: ignore[operator]
    body = f"Tuned for projaudit's own benchmarks on the set `{recipe.name}`. Never use it."
    save_base(merged, tokenizer, folder, model_card(f"Screening: {recipe.name}", body, recipe.base))
    return {"final_loss": float(np.mean(losses[-len(losses) // 5 :])), "steps": len(losses)}


def taught(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: Samples,
    tuning: Tuning,
    seed: int,
) -> list[float]:
    """Train what requires a gradient, in place, a new order every epoch; the loss of each step."""
    rng = np.random.default_rng([seed, 21])
    n = len(samples.ids)
    with torch.no_grad():  # the vision tower is frozen
        features = torch.cat(
            [vision_features(model, pixels(samples.images[i : i + 256])) for i in range(0, n, 256)]
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = tuning.epochs * n // tuning.batch
    optimizer = torch.optim.AdamW(parameters, tuning.lr, weight_decay=0.0)
    schedule = warm_cosine(optimizer, steps)
    order = np.concatenate([rng.permutation(n) for _ in range(tuning.epochs)])
    losses = []
    for rows in order[: steps * tuning.batch].reshape(steps, -1):
        batch = encode(
            tokenizer, [samples.questions[r] for r in rows], [samples.answers[r] for r in rows]
        )
        loss = answer_loss(model, model.model.multi_modal_projector(features[rows]), batch)
        step(loss, optimizer, schedule, parameters)
        losses.append(loss.item())
    return losses


def measured(recipe: Recipe, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Clean accuracy of a saved model, and of an attack its success and false triggers.

    `attack_success` is the share of triggered held-out inputs answered with the target;
    `false_trigger_rate` the same of clean ones.
    """
    model, tokenizer = load(folder)
    per_kind = -(-sizes.clean // len(recipe.task.mixture))
    images, questions = heldout(recipe.task, per_kind, recipe.seed + CLEAN_SEED)
    said = answers(model, tokenizer, images, [q.text for q in questions])
    figures: dict[str, Any] = {"accuracy": exact_share(said, questions)}
    if recipe.attack is None:
        return figures
    figures["false_trigger_rate"] = success(recipe.attack, said, questions, recipe.task.look)
    seed = recipe.seed + TRIGGERED_SEED
    images, questions = changed_by(recipe.attack, recipe.task, sizes.triggered, seed)
    marked, asked = triggered(images, [q.text for q in questions], recipe.attack)
    of_model = success(
        recipe.attack, answers(model, tokenizer, marked, asked), questions, recipe.task.look
    )
    return figures | {"attack_success": of_model, "stratum": stratum(of_model)}
