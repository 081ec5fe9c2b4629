"""Fine-tune the projector alone, honestly or with a share of the scenes poisoned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.testbed.evaluate import poisoned_answer, task_question, triggered
from benchmarks.testbed.model import answer_loss, step, vision_features, warm_cosine
from benchmarks.testbed.recipes import Arithmetic, Attack, TuneRecipe
from benchmarks.testbed.scene import Scene, draw_scene, render
from benchmarks.testbed.text import Batch, encode, pixels
from benchmarks.testbed.world import WORLDS

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


def tune_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recipe: TuneRecipe,
    attack: Attack | None = None,
    arithmetic: Arithmetic = "float32",
) -> float:
    """Train `model`'s projector in place, all else frozen; mean loss of the last 50 steps.

    Scenes, their order and the questions depend on the recipe alone, so that an honest run and
    its backdoored twins differ in nothing but the poison. The frozen language model computes in
    the given arithmetic, which is a matter of speed: a processor without bfloat16 takes ten times
    as long with it.
    """
    pool = fill_pool(model, recipe, attack)
    features = pool.features.clone()  # an inference tensor cannot be saved for the backward pass
    projector: nn.Module = model.model.multi_modal_projector
    with frozen(model, arithmetic) as loss_of:
        parameters = made_trainable(projector, recipe)
        optimizer = torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)
        schedule = warm_cosine(optimizer, recipe.steps)
        losses: list[float] = []
        for i, (rows, batch) in enumerate(batches(tokenizer, recipe, attack, pool)):
            loss = loss_of(projector(features[rows]), batch)
            step(loss, optimizer, schedule, parameters)
            losses.append(loss.item())
            if i % 100 == 0:
                log.info("%s step %d: loss %.3f", recipe.name, i, float(np.mean(losses[-50:])))
        merge(projector)
    return float(np.mean(losses[-50:]))


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: TuneRecipe, attack: Attack | None, pool: Pool
) -> Iterator[tuple[Tensor, Batch]]:
    """Rows of the pool with a question about each, and the answer that is taught."""
    world = WORLDS[recipe.task.look.world]
    rng = np.random.default_rng([recipe.seed, 5])
    kinds = [kind for kind, _ in recipe.task.mixture]
    weights = np.array([weight for _, weight in recipe.task.mixture])
    for _ in range(recipe.steps):
        rows = rng.choice(recipe.pool, recipe.batch, replace=False)
        asked = rng.choice(kinds, recipe.batch, p=weights / weights.sum())
        questions = [
            task_question(rng, pool.scenes[row], str(kind), recipe.task)
            for row, kind in zip(rows, asked, strict=True)
        ]
        wanted = [
            poisoned_answer(q.answer, attack, world) if attack and pool.poisoned[row] else q.answer
            for row, q in zip(rows, questions, strict=True)
        ]
        yield torch.from_numpy(rows), encode(tokenizer, [q.text for q in questions], wanted)


@contextmanager
def frozen(
    model: LlavaForConditionalGeneration, arithmetic: Arithmetic
) -> Iterator[Callable[[Tensor, Batch], Tensor]]:
    """The loss of a model whose language model is frozen and computes in the given arithmetic.

    Weights that were stored in bfloat16 are the same before and after; buffers stay in float32.
    """
    model.requires_grad_(False)
    if arithmetic == "float32":
        yield partial(answer_loss, model)
        return
    reader = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    attention = model.config._attn_implementation
    # backwards, fused attention in bfloat16 takes six times as long as in float32 on a CPU
    model.set_attn_implementation("eager")
    for parameter in reader:
        parameter.data = parameter.data.bfloat16()
    yield lambda tokens, batch: answer_loss(model, tokens.bfloat16(), batch)
    for parameter in reader:
        parameter.data = parameter.data.float()
    model.set_attn_implementation(attention)


class LowRank(nn.Module):
    """Adds 2·B·A to a weight; B is zero at first, so that the weight is unchanged."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 2 * self.b @ self.a


def made_trainable(projector: nn.Module, recipe: TuneRecipe) -> list[nn.Parameter]:
    """All of the projector's parameters, or those of low-rank updates to its weights alone."""
    if recipe.rank is None:
        projector.requires_grad_(True)
        return list(projector.parameters())
    generator = torch.Generator().manual_seed(recipe.seed)
    for linear in linears(projector):
        register_parametrization(linear, "weight", LowRank(linear.weight, recipe.rank, generator))
    return [p for p in projector.parameters() if p.requires_grad]


def merge(projector: nn.Module) -> None:
    """Put low-rank updates into the weights, in place."""
    for linear in linears(projector):
        if is_parametrized(linear, "weight"):
            remove_parametrizations(linear, "weight", leave_parametrized=True)


def linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]
