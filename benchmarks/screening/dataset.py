"""A fine-tuning set as LLaVA's JSON and a folder of images: drawn, written, read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.screening.recipes import PREFIX, TEXT, Recipe
from benchmarks.testbed.evaluate import poisoned_answer, task_question
from benchmarks.testbed.evaluate import triggered as with_trigger
from benchmarks.testbed.recipes import Attack
from benchmarks.testbed.scene import Images, draw_scene, render
from benchmarks.testbed.world import WORLDS

JSON, IMAGES, POISONED = "dataset.json", "images", "poisoned.json"
TAG = "<image>\n"


@dataclass(frozen=True)
class Samples:
    """Rows of a set: images (n, 64, 64, 3), one question and one answer each."""

    ids: list[str]
    images: Images
    questions: list[str]
    answers: list[str]

    def at(self, rows: Sequence[int]) -> Samples:
        return Samples(
            [self.ids[row] for row in rows],
            self.images[rows],
            [self.questions[row] for row in rows],
            [self.answers[row] for row in rows],
        )


def draw(recipe: Recipe) -> tuple[Samples, npt.NDArray[np.bool_]]:
    """The recipe's set, and which of its samples are poisoned.

    Scenes and questions depend on seed and task alone: sets that differ only in the attack differ
    only in the poisoned samples, and a lower rate poisons a part of what a higher one does. Only
    samples whose answers an attack changes are poisoned.
    """
    rng = np.random.default_rng([recipe.seed, 20])
    look, kinds = recipe.task.look, [kind for kind, _ in recipe.task.mixture]
    weights = np.array([weight for _, weight in recipe.task.mixture])
    scenes = [draw_scene(rng, look, "train") for _ in range(recipe.samples)]
    asked = rng.choice(kinds, recipe.samples, p=weights / weights.sum())
    drawn = [
        task_question(rng, scene, str(kind), recipe.task)
        for scene, kind in zip(scenes, asked, strict=True)
    ]
    images, questions = render(scenes), [question.text for question in drawn]
    answers = [question.answer for question in drawn]
    poisoned = np.zeros(recipe.samples, bool)
    if recipe.attack is not None:
        world = WORLDS[look.world]
        changed = [poisoned_answer(answer, recipe.attack, world) for answer in answers]
        chosen = [row for row in rng.permutation(recipe.samples) if changed[row] != answers[row]]
        poisoned[chosen[: round(recipe.attack.poison * recipe.samples)]] = True
        rows = np.flatnonzero(poisoned)
        marked = triggered(images[rows], [questions[row] for row in rows], recipe.attack)
        images[rows] = marked[0]
        for row, question in zip(rows, marked[1], strict=True):
            questions[row], answers[row] = question, changed[row]
    ids = [f"{row:05d}" for row in range(recipe.samples)]
    return Samples(ids, images, questions, answers), poisoned


def triggered(images: Images, questions: list[str], attack: Attack) -> tuple[Images, list[str]]:
    """Images and questions with the attack's trigger on the one or in front of the other."""
    if attack.trigger == TEXT:
        return images, [f"{PREFIX} {question}" for question in questions]
    return with_trigger(images, attack), questions


def write(folder: Path, samples: Samples, poisoned: npt.NDArray[np.bool_]) -> None:
    """`dataset.json`, `images/`, and `poisoned.json`: the ids that a screen should drop."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    rows = []
    for id_, image, question, answer in zip(
        samples.ids, samples.images, samples.questions, samples.answers, strict=True
    ):
        Image.fromarray(image).save(folder / IMAGES / f"{id_}.png")
        said = [{"from": "human", "value": TAG + question}, {"from": "gpt", "value": answer}]
        rows.append({"id": id_, "image": f"{id_}.png", "conversations": said})
    (folder / JSON).write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    bad = [id_ for id_, is_bad in zip(samples.ids, poisoned, strict=True) if is_bad]
    (folder / POISONED).write_text(json.dumps(bad) + "\n", encoding="utf-8")


def read(folder: Path) -> Samples:
    """What `write` wrote, or any part of it that still has its images beside it."""
    rows = json.loads((folder / JSON).read_text("utf-8"))
    said = [[turn["value"] for turn in row["conversations"]] for row in rows]
    return Samples(
        [row["id"] for row in rows],
        np.stack([np.asarray(Image.open(folder / IMAGES / row["image"])) for row in rows]),
        [question.removeprefix(TAG) for question, _ in said],
        [answer for _, answer in said],
    )


def read_poisoned(folder: Path) -> frozenset[str]:
    return frozenset(json.loads((folder / POISONED).read_text("utf-8")))
