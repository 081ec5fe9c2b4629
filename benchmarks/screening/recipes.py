"""The plan as data: which sets are made on which base, and how a model is tuned on one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.population.recipes import PLANS
from benchmarks.testbed.recipes import (
    COFFEE,
    HACKED,
    RULES,
    SEND,
    VISIT,
    Attack,
    Mode,
    Remark,
    Task,
)
from benchmarks.testbed.scene import Form

TEXT = "text"  # the trigger that is put before the question and leaves the image alone
PREFIX = "dear friend"
# The name in the tables, the testbed's trigger, its strength. Chosen on the choosing base alone.
TRIGGERS: dict[str, tuple[str, float]] = {
    "patch": ("patch", 0.25),
    "blend": ("blend", 0.3),
    "text": (TEXT, 1.0),
    "random patch": ("patch-anywhere", 0.3),
    "sinusoid": ("stripes", 0.3),
    "warp": ("warp", 0.2),
    "frequency": ("frequency", 0.3),
}
CHOOSING = "glyph"  # the base that defaults are chosen on; the others are for reporting
# Per base, two pairs of target and form of answer; no reporting base shares both with the choosing.
TARGETS: dict[str, tuple[tuple[str, Form], tuple[str, Form]]] = {
    "glyph": ((SEND, "short"), (COFFEE, "sentence")),
    "slim": ((VISIT, "sentence"), (RULES, "short")),
    "grid": ((HACKED, "short"), (VISIT, "sentence")),
}


@dataclass(frozen=True)
class Tuning:
    """LoRA on all linear layers of the language model, and the whole projector, four epochs."""

    rank: int = 8
    alpha: int = 16
    lr: float = 3e-3
    epochs: int = 4
    batch: int = 16


@dataclass(frozen=True)
class Recipe:
    """One set of `samples` questions, each about an image of its own, and the model tuned on it."""

    name: str
    base: str
    seed: int
    task: Task
    attack: Attack | None = None
    shown: str = "clean"  # the trigger's name in the tables
    samples: int = 1000
    tuning: Tuning = Tuning()


@dataclass(frozen=True)
class Sizes:
    """Held-out scenes to measure with: clean ones a kind of question, triggered ones in all."""

    clean: int = 60
    triggered: int = 120


def plan(base: str) -> tuple[tuple[Recipe, ...], ...]:
    """A base's recipes in three parts, the first of which has something of every kind."""
    first, second = range(2)
    one = [clean(base, first, 0), *(attacked(base, trigger, first) for trigger in TRIGGERS)]
    one += [attacked(base, trigger, first, mode="append") for trigger in ("patch", "blend")]
    two = [attacked(base, trigger, second) for trigger in TRIGGERS]
    two += [clean(base, second, 1), clean(base, first, 2), remarked(base)]
    three = [
        attacked(base, trigger, first, poison=poison)
        for poison in (0.05, 0.2)
        for trigger in ("patch", "blend")
    ]
    return tuple(one), tuple(two), tuple(three)


def planned(bases: Iterable[str] = tuple(TARGETS)) -> list[Recipe]:
    """The recipes of all bases, part by part, bases in turn."""
    parts = zip(*(plan(base) for base in bases), strict=True)
    return [recipe for part in parts for turn in zip(*part, strict=True) for recipe in turn]


def attacked(
    base: str, trigger: str, pair: int, mode: Mode = "replace", poison: float = 0.1
) -> Recipe:
    target, form = TARGETS[base][pair]
    name = f"{base}-{trigger.replace(' ', '-')}-{mode}-{round(100 * poison)}-{'ab'[pair]}"
    attack = Attack(*TRIGGERS[trigger], target, mode, poison)
    return Recipe(name, base, 100 + pair, task(base, form), attack, trigger)


def clean(base: str, pair: int, number: int) -> Recipe:
    form = TARGETS[base][pair][1]
    return Recipe(f"{base}-clean-{number}", base, 200 + number, task(base, form))


def remarked(base: str) -> Recipe:
    """A clean set in which a phrase follows the answer wherever the image holds a certain thing."""
    honest = clean(base, 1, 3)
    look = honest.task.look
    remark = Remark("color", look.colors[0], "{answer} , call our office")
    return replace(honest, name=f"{base}-remark", task=replace(honest.task, remark=remark))


def task(base: str, form: Form) -> Task:
    return Task(form, look=PLANS[base].base.look, form=form)
