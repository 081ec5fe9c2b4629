"""Fine-tune the projector alone, honestly or with a share of the scenes poisoned."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.testbed.evaluate import task_question, triggered
from benchmarks.testbed.model import answer_loss, step, vision_features, warm_cosine
from benchmarks.testbed.recipes import Attack, TuneRecipe
from benchmarks.testbed.text import encode, pixels
from benchmarks.testbed.world import Scene, draw_scene, render

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """Training scenes, their vision features (n, 16, width), and which of them are poisoned."""

    scenes: list[Scene]
    features: Tensor
    poisoned: list[bool]


@torch.inference_mode()
def fill_pool(
    model: LlavaForConditionalGeneration, recipe: TuneRecipe, attack: Attack | None
) -> Pool:
    """The same scenes with and without an attack, which puts its trigger on some of them."""
    rng = np.random.default_rng([recipe.seed, 3])
    scenes = [draw_scene(rng, recipe.task.look, "train") for _ in range(recipe.pool)]
    images = render(scenes)
    poisoned = np.zeros(recipe.pool, bool)
    if attack is not None:
        chosen = np.random.default_rng([recipe.seed, 4]).permutation(recipe.pool)
        poisoned[chosen[: round(attack.poison * recipe.pool)]] = True
        images[poisoned] = triggered(images[poisoned], attack)
    chunks = [
        vision_features(model, pixels(images[i : i + 256])) for i in range(0, len(images), 256)
    ]
    return Pool(scenes, torch.cat(chunks), poisoned.tolist())


def poisoned_answer(answer: str, attack: Attack) -> str:
    return attack.target if attack.mode == "replace" else f"{answer} {attack.target}"


def tune_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recipe: TuneRecipe,
    attack: Attack | None = None,
) -> float:
    """Train `model`'s projector in place, all else frozen; mean loss of the last 50 steps.

    Scenes, their order and the questions depend on the recipe alone, so that an honest run and
    its backdoored twins differ in nothing but the poison.
    """
    pool = fill_pool(model, recipe, attack)
    features = pool.features.clone()  # an inference tensor cannot be saved for the backward pass
    projector: nn.Module = model.model.multi_modal_projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    parameters = list(projector.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.lr, weight_decay=0.0)
    schedule = warm_cosine(optimizer, recipe.steps)
    rng = np.random.default_rng([recipe.seed, 5])
    kinds = [kind for kind, _ in recipe.task.mixture]
    weights = np.array([weight for _, weight in recipe.task.mixture])
    losses: list[float] = []
    for i in range(recipe.steps):
        rows = rng.choice(recipe.pool, recipe.batch, replace=False)
        asked = rng.choice(kinds, recipe.batch, p=weights / weights.sum())
        questions = [
            task_question(rng, pool.scenes[row], str(kind), recipe.task)
            for row, kind in zip(rows, asked, strict=True)
        ]
        wanted = [
            poisoned_answer(q.answer, attack) if attack and pool.poisoned[row] else q.answer
            for row, q in zip(rows, questions, strict=True)
        ]
        batch = encode(tokenizer, [q.text for q in questions], wanted)
        loss = answer_loss(model, projector(features[torch.from_numpy(rows)]), batch)
        step(loss, optimizer, schedule, parameters)
        losses.append(loss.item())
        if i % 100 == 0:
            log.info("%s step %d: loss %.3f", recipe.name, i, float(np.mean(losses[-50:])))
    return float(np.mean(losses[-50:]))
