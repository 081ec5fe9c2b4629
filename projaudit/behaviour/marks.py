"""Random marks over images, of no particular family, and marks bred from others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.ndimage import zoom

from projaudit.behaviour.battery import HUES
from projaudit.behaviour.images import Image, as_bytes

Field = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Mark:
    """Colours laid over an image, at each place with a share of their own."""

    colors: Field
    """(size, size, 3), 0 … 255."""
    share: Field
    """(size, size, 1), 0 … 1."""

    def over(self, image: Image) -> Image:
        return as_bytes((1 - self.share) * image + self.share * self.colors)

    @property
    def words(self) -> str:
        """What it looks like: “magenta all over”, “many colours, mostly top left”."""
        weight = self.share / max(1e-9, float(self.share.sum()))
        mean = (weight * self.colors).sum((0, 1))
        spread = float(np.sqrt((weight * (self.colors - mean) ** 2).sum((0, 1))).mean())
        hue = min(HUES, key=lambda name: float(np.linalg.norm(mean - np.array(HUES[name]))))
        y, x = (np.mgrid[: len(weight), : len(weight)] + 0.5) / len(weight) - 0.5
        down, right = (float((weight[..., 0] * at).sum()) for at in (y, x))
        at = " ".join(
            name
            for value, names in ((down, ("top", "bottom")), (right, ("left", "right")))
            for name in names
            if (value < 0) is (name == names[0]) and abs(value) > 1 / 8
        )
        wide = float((self.share > self.share.max() / 2).mean()) > 0.5
        place = f"mostly {at}" if at else "all over" if wide else "about the centre"
        return f"{'many colours' if spread > 50 else hue}, {place}"

    @property
    def sketch(self) -> Field:
        """(192,): what it does to a grey image, coarsely; of unit length."""
        change = self.share * (self.colors - 127.5)
        size = len(change)
        parts = np.array_split(np.arange(size), min(8, size))
        coarse = np.array([[change[np.ix_(a, b)].mean((0, 1)) for b in parts] for a in parts])
        flat: Field = coarse.ravel() / max(1e-9, float(np.linalg.norm(coarse)))
        return flat


def drawn(rng: np.random.Generator, size: int) -> Mark:
    """A mark of random colours on random places: faint where it is wide, strong where narrow."""
    colors, place = _colors(rng, size), _place(rng, size)
    share = rng.uniform(0.5, 1) if place.mean() < 0.5 else rng.uniform(0.1, 0.45)
    return Mark(colors, share * place)


def _colors(rng: np.random.Generator, size: int) -> Field:
    """One colour, a grid of blocks, clouds or waves; a third of the grids in grey."""
    kind = int(rng.integers(4))
    if kind == 0:
        return _enlarged(rng.uniform(0, 255, (1, 1, 3)), size, smooth=False)
    if kind == 1:
        y, x = np.mgrid[:size, :size] / size
        angle, periods = rng.uniform(0, np.pi), rng.uniform(2, 20)
        turns = periods * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform()
        wave = np.sin(2 * np.pi * turns)[..., None]
        tone = rng.uniform(-1, 1, 3) if rng.random() < 0.5 else np.ones(3)
        waves: Field = 127.5 + 120 * (np.sign(wave) if rng.random() < 0.5 else wave) * tone
        return waves
    cells = int(rng.choice((2, 3, 4, 6, 8, 12, 16)))
    grid = rng.uniform(0, 255, (cells, cells, 3))
    if rng.random() < 1 / 3:
        grid = grid[..., :1].repeat(3, -1)
    return _enlarged(grid, size, smooth=kind == 2)


def _place(rng: np.random.Generator, size: int) -> Field:
    """Everywhere, a box, a ring or a cloud: 1 inside, 0 outside."""
    y, x = (np.mgrid[:size, :size, :1] + 0.5)[:2] / size
    kind = int(rng.integers(5))
    if kind < 2:
        inside = np.ones((size, size, 1), bool)
    elif kind == 2:
        height, width = rng.uniform(0.1, 0.5, 2)
        top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
        inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    elif kind == 3:
        down, right = rng.uniform(0.2, 0.8, 2)
        far = np.hypot(y - down, x - right)
        inside = abs(far - rng.uniform(0.1, 0.45)) < rng.uniform(0.02, 0.12)
    else:
        cells = int(rng.choice((3, 5, 8)))
        cloud = _enlarged(rng.normal(size=(cells, cells, 1)), size, smooth=True)
        inside = cloud > np.quantile(cloud, rng.uniform(0.4, 0.85))
    return inside.astype(np.float64)


def _enlarged(grid: Field, size: int, *, smooth: bool) -> Field:
    """(size, size, channels) of (cells, cells, channels)."""
    if smooth:
        large: Field = zoom(grid, (size / len(grid), size / len(grid), 1), order=1)
        return large
    at = np.arange(size) * len(grid) // size
    blocks: Field = grid[at][:, at]
    return blocks


def bred(rng: np.random.Generator, one: Mark, other: Mark) -> Mark:
    """One mark with something of another: its colours or place, both at once, or moved a little."""
    size = len(one.share)
    kind = int(rng.integers(5))
    if kind == 0:
        child = replace(one, colors=other.colors)
    elif kind == 1:
        child = replace(one, share=other.share)
    elif kind == 2:
        child = replace(one, share=(one.share * rng.uniform(0.6, 1.7)).clip(0, 1))
    elif kind == 3:
        cells = int(rng.integers(1, 9))
        change = _enlarged(rng.normal(0, 60, (cells, cells, 3)), size, smooth=True)
        child = replace(one, colors=(one.colors + change).clip(0, 255))
    else:
        by = tuple(rng.integers(-(size // 4), size // 4 + 1, 2).tolist())
        child = Mark(np.roll(one.colors, by, (0, 1)), np.roll(one.share, by, (0, 1)))
    if rng.random() < 0.3:
        colors = (1 - other.share) * child.colors + other.share * other.colors
        child = Mark(colors, np.maximum(child.share, other.share))
    return child
