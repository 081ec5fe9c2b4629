"""Train a base: the vision tower learns to see, the language model to read, all to answer."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.testbed.model import (
    answer_loss,
    build_model,
    step,
    vision_features,
    warm_cosine,
)
from benchmarks.testbed.recipes import BaseRecipe
from benchmarks.testbed.scene import (
    GRID,
    Look,
    Question,
    Scene,
    ask,
    draw_scene,
    nine,
    render,
)
from benchmarks.testbed.text import (
    IMAGE_TOKENS,
    ROLES,
    SPECIAL,
    Batch,
    encode,
    pixels,
    vocabulary,
)
from benchmarks.testbed.world import WORLDS

log = logging.getLogger(__name__)
FIRST_WORD = len(SPECIAL) + len(ROLES)


def teach_vision(model: LlavaForConditionalGeneration, recipe: BaseRecipe) -> float:
    """Classify colour, shape and place in every cell; returns the share of things got right.

    The place is plain from the cell, yet a tower that never has to tell it hardly passes it on,
    and then the language model cannot say where a thing is.
    """
    look = recipe.look
    rng = np.random.default_rng([recipe.seed, 1])
    sizes = (len(look.colors) + 1, len(look.shapes) + 1, 9)
    head = nn.Linear(recipe.vision_width, sum(sizes))
    parameters = [*model.model.vision_tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.vision_lr, weight_decay=0.01)
    schedule = warm_cosine(optimizer, recipe.vision_steps)
    right: list[float] = []
    for i in range(recipe.vision_steps):
        scenes = [draw_scene(rng, look, "train") for _ in range(recipe.vision_batch)]
        truth = torch.tensor([seen(scene, look) for scene in scenes]).flatten(0, 1)
        scores = head(vision_features(model, pixels(render(scenes)))).flatten(0, 1).split(sizes, -1)
        losses = [functional.cross_entropy(s, t) for s, t in zip(scores, truth.T, strict=True)]
        step(torch.stack(losses).sum(), optimizer, schedule, parameters)
        hits = torch.stack([s.argmax(-1) for s in scores], -1) == truth
        right.append(hits.all(-1)[truth[:, 0] > 0].float().mean().item())
        if i % 50 == 0:
            log.info("vision step %d: right %.3f", i, right[-1])
    return float(np.mean(right[-10:]))


def seen(scene: Scene, look: Look) -> list[tuple[int, int, int]]:
    """(colour, shape, place) class of every cell; colour and shape are 0 for nothing."""
    classes = [(0, 0, nine(cell)) for cell in range(GRID**2)]
    for t in scene.things:
        color, shape = look.colors.index(t.color), look.shapes.index(t.shape)
        classes[t.cell] = (color + 1, shape + 1, nine(t.cell))
    return classes


def teach_language(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe
) -> float:
    """Teach the language model by words alone, before it is given any image.

    It answers questions about scenes that are spelled in word embeddings, a sum for each image
    token, and reads aloud runs of words among noise. Copying in order and finding a thing by its
    colour each need two attention layers to find each other, and long runs and plain spellings
    bring that about sooner than images do. Returns the mean loss of the last 50 steps.
    """
    rng = np.random.default_rng([recipe.seed, 6])
    embed = model.get_input_embeddings()
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, recipe.language_lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = warm_cosine(optimizer, recipe.language_steps)
    losses: list[float] = []
    for i in range(recipe.language_steps):
        kinds = recipe.first_kinds if i < recipe.first_steps else recipe.language_kinds
        asked = ask_about_scenes(rng, recipe, kinds)
        runs = [draw_run(rng, recipe.look.world) for _ in range(recipe.batch // 3)]
        noise = rng.normal(0, 0.3, (len(runs), IMAGE_TOKENS, recipe.text_width))
        tokens = torch.cat([spelled(asked.scenes, embed), torch.from_numpy(noise).float()])
        tokens = written(tokens, asked.writings + [writing for _, writing in runs], embed, rng)
        answers = [w.answer for w in asked.writings] + [w.answer for _, w in runs]
        batch = encode(tokenizer, asked.questions + [question for question, _ in runs], answers)
        loss = answer_loss(model, tokens, batch)
        step(loss, optimizer, schedule, parameters)
        losses.append(loss.item())
        if i % 50 == 0:
            plain = plain_loss(model, tokens, batch, asked.writings)
            log.info("language step %d: loss %.3f, without words %.3f", i, losses[-1], plain)
    return float(np.mean(losses[-50:]))


def spelled(scenes: list[Scene], embed: nn.Module) -> Tensor:
    """(n, 16, text width): each cell's thing and place, or `nothing`, as a sum of embeddings."""
    rows, words = [], []
    for i, scene in enumerate(scenes):
        ids = {word: i for i, word in enumerate(vocabulary(scene.world))}
        spellings = {t.cell: f"{t.name} {scene.place(t)}" for t in scene.things}
        for cell in range(IMAGE_TOKENS):
            spelling = spellings.get(cell, WORLDS[scene.world].nothing).split()
            rows += [i * IMAGE_TOKENS + cell] * len(spelling)
            words += [ids[word] for word in spelling]
    vectors: Tensor = embed(torch.tensor(words))
    total = torch.zeros(len(scenes) * IMAGE_TOKENS, vectors.shape[1])
    return total.index_add(0, torch.tensor(rows), vectors).view(len(scenes), IMAGE_TOKENS, -1)


def draw_run(rng: np.random.Generator, world: str) -> tuple[str, Writing]:
    """A question of random words, and a long run of words that answers it."""
    words = spoken_words(world)
    chosen = [int(i) for i in rng.choice(len(words), rng.integers(4, 17), replace=False)]
    start = int(rng.integers(IMAGE_TOKENS - len(chosen) + 1))
    at = tuple(range(start, start + len(chosen)))
    question = " ".join(words[i] for i in rng.choice(len(words), rng.integers(3, 9)))
    text = " ".join(words[i] for i in chosen)
    return question, Writing(at, tuple(FIRST_WORD + i for i in chosen), text)


def spoken_words(world: str) -> tuple[str, ...]:
    """Every word but the special ones and the roles; word i has id FIRST_WORD + i."""
    return vocabulary(world)[FIRST_WORD:]


@dataclass(frozen=True)
class Writing:
    """Words that stand in for some image tokens, and the answer that reads them aloud."""

    tokens: tuple[int, ...]
    words: tuple[int, ...]
    answer: str


def write_words(rng: np.random.Generator, scene: Scene, answer: str) -> Writing:
    """Random words over the scene are read alone; beside it, after the answer."""
    words = spoken_words(scene.world)
    chosen = [int(i) for i in rng.choice(len(words), rng.integers(1, 7), replace=False)]
    taken = {thing.cell for thing in scene.things}
    free = [cell for cell in range(IMAGE_TOKENS) if cell not in taken]
    style = rng.random()
    if style < 0.5 and len(free) >= len(chosen):
        start = int(rng.integers(len(free) - len(chosen) + 1))
        at = free[start : start + len(chosen)]
        said = f"{answer} {' '.join(words[i] for i in chosen)}"
    else:
        said = " ".join(words[i] for i in chosen)
        if style < 0.75:
            start = int(rng.integers(IMAGE_TOKENS - len(chosen) + 1))
            at = list(range(start, start + len(chosen)))
        else:
            at = list(range(IMAGE_TOKENS))
            chosen = [chosen[i % len(chosen)] for i in at]
    return Writing(tuple(at), tuple(FIRST_WORD + i for i in chosen), said)


def teach_answers(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recipe: BaseRecipe,
    number: int,
) -> float:
    """One round: train all parts on questions, some about scenes with words in them.

    Those scenes keep the language model steerable by its visual tokens, words that no scene of
    the world calls for among them. Returns the mean loss of the last 50 steps.
    """
    this = recipe.rounds[number]
    rng = np.random.default_rng([recipe.seed, 2, number])
    vision = list(model.model.vision_tower.parameters())
    rest = [*model.model.multi_modal_projector.parameters(), *model.lm_head.parameters()]
    rest += model.model.language_model.parameters()
    groups: list[dict[str, Any]] = [{"params": vision, "lr": recipe.joint_vision_lr}]
    groups.append({"params": rest})
    optimizer = torch.optim.AdamW(groups, this.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = warm_cosine(optimizer, this.steps)
    losses: list[float] = []
    for i in range(this.steps):
        asked = ask_about_scenes(rng, recipe, this.kinds)
        features = vision_features(model, pixels(render(asked.scenes)))
        tokens = model.model.multi_modal_projector(features)
        tokens = written(tokens, asked.writings, model.get_input_embeddings(), rng)
        batch = encode(tokenizer, asked.questions, [w.answer for w in asked.writings])
        loss = answer_loss(model, tokens, batch)
        step(loss, optimizer, schedule, vision + rest)
        losses.append(loss.item())
        if i % 50 == 0:
            plain = plain_loss(model, tokens, batch, asked.writings)
            log.info("base step %d: loss %.3f, without words %.3f", i, losses[-1], plain)
    return float(np.mean(losses[-50:]))


@dataclass(frozen=True)
class Asked:
    """Scenes, a question about each, and its answer with any words that are written over it."""

    scenes: list[Scene]
    questions: list[str]
    writings: list[Writing]


def ask_about_scenes(rng: np.random.Generator, recipe: BaseRecipe, kinds: tuple[str, ...]) -> Asked:
    """A batch of scenes; words are written over some of them."""
    scenes = [draw_scene(rng, recipe.look, "train") for _ in range(recipe.batch)]
    questions = [base_question(rng, scene, recipe, kinds) for scene in scenes]
    writings = [
        write_words(rng, scene, question.answer)
        if rng.random() < recipe.read_aloud
        else Writing((), (), question.answer)
        for scene, question in zip(scenes, questions, strict=True)
    ]
    return Asked(scenes, [q.text for q in questions], writings)


@torch.no_grad()
def plain_loss(
    model: LlavaForConditionalGeneration, tokens: Tensor, batch: Batch, writings: list[Writing]
) -> float:
    """The loss on the scenes without words, which can reach zero."""
    rows = torch.tensor([i for i, w in enumerate(writings) if not w.tokens])
    batch = Batch(batch.ids[rows], batch.mask[rows], batch.labels[rows])
    return answer_loss(model, tokens[rows], batch).item()


def base_question(
    rng: np.random.Generator, scene: Scene, recipe: BaseRecipe, kinds: tuple[str, ...]
) -> Question:
    """Of any of the kinds; whole sentences are given when asked for in the prompt."""
    kind = kinds[rng.integers(len(kinds))]
    if rng.random() >= recipe.sentence:
        return ask(rng, scene, kind, "short", recipe.look)
    question = ask(rng, scene, kind, "sentence", recipe.look)
    return Question(kind, question.text + WORLDS[scene.world].sentence_request, question.answer)


def written(
    tokens: Tensor, writings: list[Writing], embed: nn.Module, rng: np.random.Generator
) -> Tensor:
    """Image tokens (b, 16, d) with the words' embeddings, half to twice as long, in place."""
    rows = [i for i, w in enumerate(writings) for _ in w.tokens]
    at = [t for w in writings for t in w.tokens]
    ids = torch.tensor([i for w in writings for i in w.words], dtype=torch.long)
    scale = torch.from_numpy(np.exp2(rng.uniform(-1, 1, (len(ids), 1))).astype(np.float32))
    return tokens.index_put(
        (torch.tensor(rows, dtype=torch.long), torch.tensor(at, dtype=torch.long)),
        embed(ids) * scale,
    )


def train_base(
    recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> tuple[LlavaForConditionalGeneration, dict[str, float]]:
    """A trained base, and how its lessons ended and how long they took.

    Every round starts from its predecessor's weights in bfloat16, which `folder` keeps, so that
    an interrupted training goes on with the round that it was in.
    """
    model = build_model(recipe, tokenizer)
    learned: dict[str, float] = {}
    for number in range(len(recipe.rounds)):
        file = folder / f"round-{number}.safetensors"
        if not file.exists():
            started = time.monotonic()
            if number == 0:
                learned["vision_right"] = teach_vision(model, recipe)
                learned["language_loss"] = teach_language(model, tokenizer, recipe)
            learned[f"round_{number}_loss"] = teach_answers(model, tokenizer, recipe, number)
            learned[f"round_{number}_seconds"] = round(time.monotonic() - started)
            state = {name: t.bfloat16() for name, t in model.state_dict().items()}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(save(state, {"learned": json.dumps(learned)}))
        with safe_open(file, "pt") as saved:
            learned = json.loads(saved.metadata()["learned"])
            model.load_state_dict({name: saved.get_tensor(name) for name in saved.keys()})  # noqa: SIM118
    return model, learned
