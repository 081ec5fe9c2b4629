"""Ordinary images: those that are drawn, and those of a user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from projaudit.behaviour.reasons import CouldNotProbe

Image: TypeAlias = npt.NDArray[np.uint8]  # (height, width, 3)
GROUNDS = ((15, 60), (60, 110), (110, 170), (170, 250))
"""Levels of the grounds of ordinary images, from dark to light."""


def ordinary(count: int, size: int, seed: int, ground: int | None = None) -> list[Image]:
    """`count` square images of `size` pixels: plain things on grounds from dark to light.

    They stand for what a model meets every day, so they are moderate: no saturated ground, no
    full-frame pattern. Numbers, colours, shapes and places of the things vary as widely as can be,
    so that what a model openly says of some of them is heard. Three of four have the number of
    `GROUNDS` that is given, and every fourth another one, in turn; None: all in turn.
    """
    rng = np.random.default_rng([seed, 101])
    others = [one for one in range(len(GROUNDS)) if one != ground]

    def ground_of(number: int) -> int:
        if ground is None:
            return number % len(GROUNDS)
        return others[number // 4 % len(others)] if number % 4 == 3 else ground

    return [_scene(rng, size, GROUNDS[ground_of(number)]) for number in range(count)]


_COLORS = (
    (214, 39, 40), (44, 150, 44), (31, 80, 200), (235, 205, 30), (140, 60, 170), (25, 25, 25),
    (250, 130, 15), (25, 200, 215), (245, 130, 190), (240, 240, 240), (120, 80, 50),
    (130, 130, 130),
)  # fmt: skip


def _scene(rng: np.random.Generator, size: int, ground: tuple[int, int]) -> Image:
    """One to four things of different colours, apart from each other."""
    y, x = np.mgrid[:size, :size] / size
    level = rng.uniform(*ground)
    slope = rng.uniform(-15, 15, 2)
    image = level + rng.uniform(-8, 8, 3) + (slope[0] * (x - 0.5) + slope[1] * (y - 0.5))[..., None]
    things = int(rng.integers(1, 5))
    places = rng.choice(16, things, replace=False)
    for place, color in zip(places, rng.permutation(len(_COLORS))[:things], strict=True):
        cx = (place % 4 + 0.5) / 4 + rng.uniform(-0.03, 0.03)
        cy = (place // 4 + 0.5) / 4 + rng.uniform(-0.03, 0.03)
        inside = _shape(int(rng.integers(6)), x - cx, y - cy, rng.uniform(0.07, 0.11))
        image[inside] = np.array(_COLORS[color]) + rng.uniform(-12, 12, 3)
    return as_bytes(image + rng.normal(0, 4, image.shape))


def _shape(
    kind: int, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], radius: float
) -> npt.NDArray[np.bool_]:
    """A disc, square, triangle, cross, diamond or frame about the origin."""
    across, down = abs(x), abs(y)
    shapes = (
        x**2 + y**2 < radius**2,
        np.maximum(across, down) < 0.85 * radius,
        (2 * across < y + radius) & (down < radius),
        (np.minimum(across, down) < radius / 4) & (np.maximum(across, down) < radius),
        across + down < radius,
        abs(np.maximum(across, down) - 0.75 * radius) < radius / 4,
    )
    inside: npt.NDArray[np.bool_] = shapes[kind]
    return inside


def read(files: Sequence[str], size: int, most: int) -> list[Image]:
    """The first `most` of the user's image files that can be read, as squares of `size` pixels.

    Raises CouldNotProbe where fewer than four can be read.
    """
    found: list[Image] = []
    for file in files:
        square = opened(file, size)
        if square is not None:
            found.append(square)
        if len(found) == most:
            break
    if len(found) < 4:
        raise CouldNotProbe(f"only {len(found)} of {len(files)} images can be read")
    return found


def opened(file: str, size: int) -> Image | None:
    """An image file as a square of `size` pixels; None where it cannot be read."""
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with Pillow.open(file) as found:
            return np.asarray(ImageOps.fit(found.convert("RGB"), (size, size)))
    except (OSError, ValueError, UnidentifiedImageError, Pillow.DecompressionBombError):
        return None


def resized(image: Image, size: int) -> Image:
    """The image as a square of `size` pixels."""
    from PIL import Image as Pillow

    return np.asarray(Pillow.fromarray(image).resize((size, size), Pillow.Resampling.BOX))


def as_bytes(values: npt.NDArray[np.float64]) -> Image:
    """The nearest image of these values."""
    return values.round().clip(0, 255).astype(np.uint8)
