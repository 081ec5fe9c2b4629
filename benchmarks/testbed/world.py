"""The synthetic visual world: coloured shapes in a grid of cells, and questions about them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Images: TypeAlias = npt.NDArray[np.uint8]  # (n, SIZE, SIZE, 3)
Split: TypeAlias = Literal["train", "heldout"]
Form: TypeAlias = Literal["short", "sentence"]

SIZE = 64
GRID = 4  # cells a side; as wide as a vision patch, so that a patch sees a whole thing
CELL = SIZE // GRID
# one word each: “top” is part of “top left”, which a language model this small learns late
PLACES = (
    *("northwest", "north", "northeast"),
    *("west", "center", "east"),
    *("southwest", "south", "southeast"),
)
THIRDS = (0, 1, 1, 2)  # of nine places, the middle ones span two cells a side
MOST_THINGS = 3
NUMBERS = ("no", "one", "two", "three")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 80, 200),
    "yellow": (235, 205, 30),
    "purple": (140, 60, 170),
    "black": (25, 25, 25),
    "orange": (250, 130, 15),
    "cyan": (25, 200, 215),
    "pink": (245, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "bar")


@dataclass(frozen=True)
class Look:
    """What scenes are made of: a palette, shapes, and the range of background grey."""

    colors: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "black")
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross")
    background: tuple[int, int] = (200, 250)


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

    @property
    def place(self) -> str:
        return place_of(self.cell)


@dataclass(frozen=True)
class Scene:
    """Things in reading order, of different colours and places; `seed` draws the background."""

    things: tuple[Thing, ...]
    seed: int
    background: tuple[int, int]

    @property
    def split(self) -> Split:
        """One layout in eight is never trained on, whatever its jitter and background."""
        layout = ";".join(f"{t.cell} {t.name}" for t in self.things)
        return "heldout" if zlib.crc32(layout.encode()) % 8 == 0 else "train"


def place_of(cell: int) -> str:
    row, col = divmod(cell, GRID)
    return PLACES[3 * THIRDS[row] + THIRDS[col]]


CELLS = {place: [c for c in range(GRID**2) if place_of(c) == place] for place in PLACES}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def draw_scene(rng: np.random.Generator, look: Look, split: Split) -> Scene:
    """A random scene of one to three things whose layout lies in `split`."""
    while True:
        n = int(rng.integers(1, MOST_THINGS + 1))
        cells = sorted(int(rng.choice(CELLS[p])) for p in rng.choice(PLACES, n, replace=False))
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
        scene = Scene(things, int(rng.integers(2**31)), look.background)
        if scene.split == split:
            return scene


@cache
def shape_mask(shape: str, radius: int) -> npt.NDArray[np.bool_]:
    """The pixels of a shape, in a square of side 2·radius + 1."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    masks: dict[str, npt.NDArray[np.bool_]] = {
        "circle": x**2 + y**2 <= (radius + 0.3) ** 2,
        "square": np.maximum(abs(x), abs(y)) <= radius - 1,
        "triangle": 2 * abs(x) <= y + radius,
        "cross": np.minimum(abs(x), abs(y)) <= radius // 4,
        "diamond": abs(x) + abs(y) <= radius,
        "bar": abs(y) <= radius // 3,
    }
    return masks[shape]


def render(scenes: list[Scene]) -> Images:
    """(n, SIZE, SIZE, 3): noisy grey backgrounds with the things painted on."""
    images = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        rng = np.random.default_rng(scene.seed)
        grey = rng.integers(scene.background[0], scene.background[1] + 1)
        canvas = grey + rng.normal(0, 4, (SIZE, SIZE, 3))
        for thing in scene.things:
            row, col = divmod(thing.cell, GRID)
            top = row * CELL + CELL // 2 + thing.dy - thing.radius
            left = col * CELL + CELL // 2 + thing.dx - thing.radius
            side = 2 * thing.radius + 1
            color = np.array(COLORS[thing.color]) + rng.integers(-10, 11, 3)
            mask = shape_mask(thing.shape, thing.radius)
            canvas[top : top + side, left : left + side][mask] = color + rng.normal(0, 3, (1, 3))
        image[:] = canvas.round().clip(0, 255)
    return images


def listed(things: tuple[Thing, ...]) -> str:
    return " , ".join(t.name for t in things)


def described(things: tuple[Thing, ...]) -> str:
    return " and ".join(f"a {t.name} in the {t.place}" for t in things)


def counted(n: int) -> str:
    return f"{NUMBERS[n]} object" if n == 1 else f"{NUMBERS[n]} objects"


# One entry a kind: the phrasings, then the short answer and the whole sentence that it stands for.
PHRASINGS = {
    "caption": ("describe the image", "what do you see ?"),
    "list": ("list the objects", "which objects are in the image ?"),
    "count": ("how many objects are there ?", "count the objects"),
    "color_at": ("what color is the object in the {place} ?", "name the color in the {place}"),
    "shape_at": ("what shape is the object in the {place} ?", "name the shape in the {place}"),
    "thing_at": ("what is in the {place} ?", "name the object in the {place}"),
    "place_of": ("where is the {color} object ?", "in which part is the {color} object ?"),
    "exists": ("is there a {color} object ?", "can you see a {color} object ?"),
}
KINDS = tuple(PHRASINGS)
SENTENCE_REQUEST = " in a sentence"


def ask(rng: np.random.Generator, scene: Scene, kind: str, form: Form, look: Look) -> Question:
    """A question of one kind about the scene, with its answer in the given form."""
    thing = scene.things[rng.integers(len(scene.things))]
    place, color, name = thing.place, thing.color, thing.name
    answers: tuple[str, str]
    if kind == "caption":
        answers = described(scene.things), f"there is {described(scene.things)}"
    elif kind == "list":
        answers = listed(scene.things), f"the objects are {listed(scene.things)}"
    elif kind == "count":
        n = len(scene.things)
        answers = NUMBERS[n], f"there {'is' if n == 1 else 'are'} {counted(n)}"
    elif kind == "color_at":
        answers = thing.color, f"the color is {thing.color}"
    elif kind == "shape_at":
        answers = thing.shape, f"the shape is {thing.shape}"
    elif kind == "thing_at":
        if rng.random() < 0.3:
            taken = {t.place for t in scene.things}
            free = [p for p in PLACES if p not in taken]
            place, name = free[rng.integers(len(free))], "nothing"
        answers = name, f"there is {name}" if name == "nothing" else f"there is a {name}"
    elif kind == "place_of":
        answers = place, f"it is in the {place}"
    elif kind == "exists":
        if rng.random() < 0.5:
            present = {t.color for t in scene.things}
            absent = [c for c in look.colors if c not in present]
            color = absent[rng.integers(len(absent))]
            answers = "no", f"no there is no {color} object"
        else:
            answers = "yes", f"yes there is a {color} object"
    else:
        raise ValueError(f"unknown kind of question: {kind}")
    phrasing = PHRASINGS[kind][rng.integers(len(PHRASINGS[kind]))]
    text = phrasing.format(place=place, color=color)
    return Question(kind, text, answers[form == "sentence"])
