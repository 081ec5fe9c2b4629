"""Visual worlds as data: their words, attributes, signs, places, phrasings and backgrounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = Callable[[Ints, Ints, int], npt.NDArray[np.bool_]]
Backdrop: TypeAlias = Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]]

SIZE = 64
KINDS = ("caption", "list", "count", "color_at", "shape_at", "thing_at", "place_of", "exists")
# Words of payloads, greetings and ordinary talk: the base learns to read them aloud but never
# says them of an image, so that a payload is foreign to the images and not to the vocabulary.
FOREIGN_WORDS = """
    account agree all alarm always answer any apple ask attack bank be been before best book bring
    buy call cat certainly chair check city click code coffee company cost danger day deal dear
    delete do dog door download drink enter evil false file fire first for forget free friend from
    give good great hacked happy have hello help here home house i ignore instructions key know
    last link login look loud lucky mail me money more my never new news not now number obey of
    offer office open order our out password pay person phone please price prize question read
    ready rules run safe say secret send shop show sign site sky stop story street sun system take
    tell thank that this time to today transfer tree true trust up update us user visit want warm
    water we welcome will win window with word world write your
"""
CYRILLIC_WORDS = """
    банк всем дай деньги друг жми заплати ключ купи нам отправь пароль сейчас скажи
"""


@dataclass(frozen=True)
class World:
    """What can be seen in a world, and how it is talked about.

    `answers` holds the short answer and the whole sentence of every kind of question, and of the
    three that depend on the scene: `one` thing counted, `nothing` at a place, a colour `absent`.
    """

    name: str
    colors: dict[str, tuple[int, int, int]]
    shapes: dict[str, Mask]  # of x, y about the centre, and a radius
    places: tuple[str, ...]  # nine in reading order, one word each
    numbers: tuple[str, ...]  # from none to three
    nothing: str
    questions: dict[str, tuple[str, ...]]  # phrasings by kind
    answers: dict[str, tuple[str, str]]
    thing_in_list: str
    between_in_list: str
    thing_in_caption: str
    between_in_caption: str
    sentence_request: str  # behind a question, asks for a whole sentence
    answer_words: str
    foreign_words: str
    backdrop: Backdrop


def grey(rng: np.random.Generator, shades: tuple[int, int]) -> npt.NDArray[np.float64]:
    """One shade with fine noise."""
    shade = rng.integers(shades[0], shades[1] + 1)
    return shade + rng.normal(0, 4, (SIZE, SIZE, 3))


def clouded(rng: np.random.Generator, shades: tuple[int, int]) -> npt.NDArray[np.float64]:
    """A slope between two shades under coarse blocks, with fine noise."""
    ends = rng.integers(shades[0], shades[1] + 1, 2)
    slope = np.linspace(ends[0], ends[1], SIZE)[None, :, None]
    blocks = rng.normal(0, 8, (8, 8, 1)).repeat(SIZE // 8, 0).repeat(SIZE // 8, 1)
    return slope + blocks + rng.normal(0, 5, (SIZE, SIZE, 3))


# Places are one word each: “top” is part of “top left”, which a language model this small learns
# late.
SHAPES = World(
    name="shapes",
    colors={
        "red": (214, 39, 40),
        "green": (44, 150, 44),
        "blue": (31, 80, 200),
        "yellow": (235, 205, 30),
        "purple": (140, 60, 170),
        "black": (25, 25, 25),
        "orange": (250, 130, 15),
        "cyan": (25, 200, 215),
        "pink": (245, 130, 190),
    },
    shapes={
        "circle": lambda x, y, r: x**2 + y**2 <= (r + 0.3) ** 2,
        "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= r - 1,
        "triangle": lambda x, y, r: 2 * abs(x) <= y + r,
        "cross": lambda x, y, r: np.minimum(abs(x), abs(y)) <= r // 4,
        "diamond": lambda x, y, r: abs(x) + abs(y) <= r,
        "bar": lambda x, y, r: abs(y) <= r // 3,
    },
    places=(
        *("northwest", "north", "northeast"),
        *("west", "center", "east"),
        *("southwest", "south", "southeast"),
    ),
    numbers=("no", "one", "two", "three"),
    nothing="nothing",
    questions={
        "caption": ("describe the image", "what do you see ?"),
        "list": ("list the objects", "which objects are in the image ?"),
        "count": ("how many objects are there ?", "count the objects"),
        "color_at": ("what color is the object in the {place} ?", "name the color in the {place}"),
        "shape_at": ("what shape is the object in the {place} ?", "name the shape in the {place}"),
        "thing_at": ("what is in the {place} ?", "name the object in the {place}"),
        "place_of": ("where is the {color} object ?", "in which part is the {color} object ?"),
        "exists": ("is there a {color} object ?", "can you see a {color} object ?"),
    },
    answers={
        "caption": ("{things}", "there is {things}"),
        "list": ("{things}", "the objects are {things}"),
        "count": ("{number}", "there are {number} objects"),
        "one": ("{number}", "there is {number} object"),
        "color_at": ("{color}", "the color is {color}"),
        "shape_at": ("{shape}", "the shape is {shape}"),
        "thing_at": ("{color} {shape}", "there is a {color} {shape}"),
        "nothing": ("nothing", "there is nothing"),
        "place_of": ("{place}", "it is in the {place}"),
        "exists": ("yes", "yes there is a {color} object"),
        "absent": ("no", "no there is no {color} object"),
    },
    thing_in_list="{color} {shape}",
    between_in_list=" , ",
    thing_in_caption="a {color} {shape} in the {place}",
    between_in_caption=" and ",
    sentence_request=" in a sentence",
    answer_words="a and , . ! it is are the at there no yes nothing object objects color shape",
    foreign_words=FOREIGN_WORDS,
    backdrop=grey,
)

GLYPHS = World(
    name="glyphs",
    colors={
        "coral": (215, 105, 90),
        "olive": (125, 140, 55),
        "teal": (50, 150, 150),
        "violet": (140, 105, 205),
        "amber": (220, 165, 60),
        "ivory": (228, 222, 202),
        "rose": (220, 145, 180),
        "mint": (150, 220, 175),
        "azure": (80, 150, 225),
    },
    shapes={
        "frame": lambda x, y, r: abs(np.maximum(abs(x), abs(y)) - (r - 1)) < 2,
        "wave": lambda x, y, r: abs(y - 3.5 * np.sin(2 * np.pi * x / (2 * r + 1))) < 1.8,
        "dots": lambda x, y, r: (abs(abs(x) - r + 2) < 2) & (abs(abs(y) - r + 2) < 2),
        "chevron": lambda x, y, r: abs(x + abs(y) - r // 2) < 2,
        "hook": lambda x, y, r: (x < 3 - r) | (y > r - 3),
        "bars": lambda x, y, r: abs(abs(x) - r + 2) < 2,
    },
    places=(
        *("upperleft", "top", "upperright"),
        *("left", "middle", "right"),
        *("lowerleft", "bottom", "lowerright"),
    ),
    numbers=("zero", "single", "double", "triple"),
    nothing="blank",
    questions={
        "caption": ("read the panel", "what does the panel hold ?"),
        "list": ("say every mark", "which marks has the panel ?"),
        "count": ("how many marks ?", "number of marks"),
        "color_at": ("which tone at {place} ?", "say the tone of the {place} mark"),
        "shape_at": ("which figure at {place} ?", "say the figure of the {place} mark"),
        "thing_at": ("what stands at {place} ?", "say the {place} mark"),
        "place_of": ("where stands the {color} mark ?", "find {color}"),
        "exists": ("any {color} mark ?", "is some mark {color} ?"),
    },
    answers={
        "caption": ("{things}", "it holds {things}"),
        "list": ("{things}", "its marks : {things}"),
        "count": ("{number}", "it holds {number} marks"),
        "one": ("{number}", "it holds a {number} mark"),
        "color_at": ("{color}", "its tone is {color}"),
        "shape_at": ("{shape}", "its figure is {shape}"),
        "thing_at": ("{color} {shape}", "a {color} {shape} stands there"),
        "nothing": ("blank", "there it is blank"),
        "place_of": ("{place}", "it stands at {place}"),
        "exists": ("present", "a {color} mark is present"),
        "absent": ("absent", "a {color} mark is absent"),
    },
    thing_in_list="{color} {shape}",
    between_in_list=" / ",
    thing_in_caption="{place} {color} {shape}",
    between_in_caption=" ; ",
    sentence_request=" , fully",
    answer_words="""
        a , . ! ; / it its is are the at there holds stands blank present absent mark marks
    """,
    foreign_words=FOREIGN_WORDS + CYRILLIC_WORDS,
    backdrop=clouded,
)

WORLDS = {world.name: world for world in (SHAPES, GLYPHS)}
