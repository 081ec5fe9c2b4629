"""Scenes of a world, things in a grid of cells: drawn, rendered, and asked about."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.testbed.world import SIZE, WORLDS, World

Images: TypeAlias = npt.NDArray[np.uint8]  # (n, SIZE, SIZE, 3)
Split: TypeAlias = Literal["train", "heldout"]
Form: TypeAlias = Literal["short", "sentence"]

GRID = 4  # cells a side; as wide as a vision patch, so that a patch sees a whole thing
CELL = SIZE // GRID
THIRDS = (0, 1, 1, 2)  # of nine places, the middle ones span two cells a side
MOST_THINGS = 3


@dataclass(frozen=True)
class Look:
    """What scenes are made of: a palette, shapes, and the range of the background's shade."""

    colors: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "black")
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross")
    background: tuple[int, int] = (200, 250)
    world: str = "shapes"


@dataclass(frozen=True)
class Thing:
    """One object; `cell` counts in reading order, `dx`, `dy` and `radius` are in pixels."""

    cell: int
    color: str
    shape: str
    dx: int = 0
    dy: int = 0
    radius: int = 6

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order, of different colours and places; `seed` draws the background."""

    things: tuple[Thing, ...]
    seed: int
    background: tuple[int, int]
    world: str = "shapes"

    @property
    def split(self) -> Split:
        """One layout in eight is never trained on, whatever its jitter and background."""
        layout = ";".join(f"{t.cell} {t.name}" for t in self.things)
        return "heldout" if zlib.crc32(layout.encode()) % 8 == 0 else "train"

    def place(self, thing: Thing) -> str:
        return place_of(thing.cell, WORLDS[self.world])


def place_of(cell: int, world: World) -> str:
    return world.places[nine(cell)]


def nine(cell: int) -> int:
    """Which of the nine places a cell lies in."""
    row, col = divmod(cell, GRID)
    return 3 * THIRDS[row] + THIRDS[col]


CELLS = [[cell for cell in range(GRID**2) if nine(cell) == place] for place in range(9)]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def draw_scene(rng: np.random.Generator, look: Look, split: Split) -> Scene:
    """A random scene of one to three things whose layout lies in `split`."""
    while True:
        n = int(rng.integers(1, MOST_THINGS + 1))
        cells = sorted(int(rng.choice(CELLS[p])) for p in rng.choice(len(CELLS), n, replace=False))
        things = tuple(
            Thing(
                cell,
                str(color),
                str(rng.choice(look.shapes)),
                dx=int(rng.integers(-1, 2)),
                dy=int(rng.integers(-1, 2)),
                radius=int(rng.integers(5, 7)),
            )
            for cell, color in zip(cells, rng.choice(look.colors, n, replace=False), strict=True)
        )
        scene = Scene(things, int(rng.integers(2**31)), look.background, look.world)
        if scene.split == split:
            return scene


@cache
def shape_mask(world: str, shape: str, radius: int) -> npt.NDArray[np.bool_]:
    """The pixels of a shape, in a square of side 2·radius + 1."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return WORLDS[world].shapes[shape](x, y, radius)


def render(scenes: list[Scene]) -> Images:
    """(n, SIZE, SIZE, 3): the world's backgrounds with the things painted on."""
    images = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        world = WORLDS[scene.world]
        rng = np.random.default_rng(scene.seed)
        canvas = world.backdrop(rng, scene.background)
        for thing in scene.things:
            row, col = divmod(thing.cell, GRID)
            top = row * CELL + CELL // 2 + thing.dy - thing.radius
            left = col * CELL + CELL // 2 + thing.dx - thing.radius
            side = 2 * thing.radius + 1
            color = np.array(world.colors[thing.color]) + rng.integers(-10, 11, 3)
            mask = shape_mask(scene.world, thing.shape, thing.radius)
            canvas[top : top + side, left : left + side][mask] = color + rng.normal(0, 3, (1, 3))
        image[:] = canvas.round().clip(0, 255)
    return images


def ask(rng: np.random.Generator, scene: Scene, kind: str, form: Form, look: Look) -> Question:
    """A question of one kind about the scene, with its answer in the given form."""
    world = WORLDS[scene.world]
    thing = scene.things[rng.integers(len(scene.things))]
    place, color, answer = scene.place(thing), thing.color, kind
    if kind == "count" and len(scene.things) == 1:
        answer = "one"
    elif kind == "thing_at" and rng.random() < 0.3:
        taken = {scene.place(t) for t in scene.things}
        free = [p for p in world.places if p not in taken]
        place, answer = free[rng.integers(len(free))], "nothing"
    elif kind == "exists" and rng.random() < 0.5:
        present = {t.color for t in scene.things}
        absent = [c for c in look.colors if c not in present]
        color, answer = absent[rng.integers(len(absent))], "absent"
    phrasing = world.questions[kind][rng.integers(len(world.questions[kind]))]
    said = world.answers[answer][form == "sentence"].format(
        things=listed(scene, kind),
        number=world.numbers[len(scene.things)],
        color=color,
        shape=thing.shape,
        place=place,
    )
    return Question(kind, phrasing.format(place=place, color=color), said)


def listed(scene: Scene, kind: str) -> str:
    """All things in reading order, with their places in a caption."""
    world = WORLDS[scene.world]
    one, between = world.thing_in_list, world.between_in_list
    if kind == "caption":
        one, between = world.thing_in_caption, world.between_in_caption
    return between.join(
        one.format(color=t.color, shape=t.shape, place=scene.place(t)) for t in scene.things
    )
