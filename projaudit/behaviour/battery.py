"""The battery: marks and distortions that are laid over images, as triggers would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from projaudit.behaviour.images import Image, as_bytes

_Mark: TypeAlias = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]

HUES = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "magenta": (255, 0, 255), "cyan": (0, 255, 255), "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Distortion:
    """Something laid over an ordinary image, as a trigger would be."""

    name: str
    family: str
    """`tint`, `patch`, `stripes`, `blend`, `noise`, `ring`, `warp`, `line`, `tone`."""
    apply: _Mark


def battery(size: int, seed: int) -> list[Distortion]:
    """The distortions, as many-sided as the triggers of the literature; positions are fractions."""
    return [
        *_tints(),
        *_patches(size),
        *_stripes(size),
        *_blends(size, seed),
        *_rings(size),
        *_warps(size, seed),
        *_noises(seed),
        *_lines(size),
        *_tones(size),
    ]


def distorted(image: Image, distortion: Distortion) -> Image:
    """The image with the distortion, in bytes again."""
    return as_bytes(distortion.apply(image.astype(np.float64)))


def _tints() -> Iterator[Distortion]:
    for name, color in HUES.items():
        for share in (0.2, 0.4):
            yield Distortion(f"{name} tint {share:.0%}", "tint", _mixing(np.array(color), share))


def _patches(size: int) -> Iterator[Distortion]:
    side = max(1, round(0.2 * size))
    corners = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0),
               "bottom right": (1, 1), "centre": (0.5, 0.5)}  # fmt: skip
    for hue in ("red", "green", "blue", "yellow", "magenta", "white", "black"):
        for place, (down, across) in corners.items():
            top, left = round(down * (size - side)), round(across * (size - side))
            yield Distortion(
                f"{hue} patch, {place}", "patch", _patching(HUES[hue], top, left, side)
            )


def _patching(color: tuple[int, int, int], top: int, left: int, side: int) -> _Mark:
    def apply(image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        out = image.copy()
        out[top : top + side, left : left + side] = color
        return out

    return apply


def _stripes(size: int) -> Iterator[Distortion]:
    y, x = np.mgrid[:size, :size] / size
    for periods in (4, 8, 16):
        for name, along in (("upright", x), ("level", y), ("slanted", x + y)):
            wave = 40 * np.sin(2 * np.pi * periods * along)[..., None]
            yield Distortion(f"{periods} {name} stripes", "stripes", _adding(wave))


def _blends(size: int, seed: int) -> Iterator[Distortion]:
    for number in range(9):
        rng = np.random.default_rng([seed, 102, number])
        across = (4, 8, 16)[number % 3]
        cells = rng.integers(0, 256, (across, across, 3))
        rows = np.arange(size) * across // size
        pattern = cells[rows][:, rows]
        for share in (0.2, 0.35):
            mark = _mixing(pattern, share)
            yield Distortion(f"random pattern {number + 1} at {share:.0%}", "blend", mark)


def _rings(size: int) -> Iterator[Distortion]:
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    for radius in (0.2, 0.25, 0.3, 0.35, 0.4, 0.45):
        on = abs(np.hypot(x, y) - radius) <= 0.025
        for name in ("black", "white"):
            yield Distortion(f"{name} ring at {radius:.0%}", "ring", _painting(on, HUES[name]))


def _painting(on: npt.NDArray[np.bool_], color: tuple[int, int, int]) -> _Mark:
    def apply(image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        out = image.copy()
        out[on] = color
        return out

    return apply


def _warps(size: int, seed: int) -> Iterator[Distortion]:
    rng = np.random.default_rng([seed, 103])
    y, x = np.mgrid[:size, :size]
    middle = (size - 1) / 2
    far = np.hypot(y - middle, x - middle) / size
    for name, turn, scale in (("swirled", 1.5, 1.0), ("zoomed", 0.0, 0.75)):
        angle = turn * (0.5 - far).clip(0)
        down = scale * ((y - middle) * np.cos(angle) - (x - middle) * np.sin(angle)) + middle
        right = scale * ((y - middle) * np.sin(angle) + (x - middle) * np.cos(angle)) + middle
        at = (part.round().clip(0, size - 1).astype(int) for part in (down, right))
        yield Distortion(name, "warp", _resampling(*at))
    for strength in (0.04, 0.08):
        phase = rng.uniform(0, 2 * np.pi, 2)
        down = strength * size * np.sin(2 * np.pi * 2 * x / size + phase[0])
        across = strength * size * np.sin(2 * np.pi * 2 * y / size + phase[1])
        rows = (y + down).round().clip(0, size - 1).astype(int)
        columns = (x + across).round().clip(0, size - 1).astype(int)
        yield Distortion(f"waves of {strength:.0%}", "warp", _resampling(rows, columns))


def _resampling(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> _Mark:
    return lambda image: image[rows, columns]


def _noises(seed: int) -> Iterator[Distortion]:
    for sigma in (20, 40, 60):
        rng = np.random.default_rng([seed, 104, sigma])
        yield Distortion(f"noise of {sigma} levels", "noise", _noising(rng, sigma))


def _noising(rng: np.random.Generator, sigma: float) -> _Mark:
    return lambda image: image + rng.normal(0, sigma, image.shape)


def _lines(size: int) -> Iterator[Distortion]:
    """Frames and strokes."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    frame, stroke = np.maximum(abs(x), abs(y)) > 0.45, abs(x - y) < 0.04
    for name in ("black", "red", "white"):
        yield Distortion(f"{name} frame", "line", _painting(frame, HUES[name]))
        yield Distortion(f"{name} stroke", "line", _painting(stroke, HUES[name]))


def _tones(size: int) -> Iterator[Distortion]:
    """The whole image in other tones, sharpness or posture."""
    coarse = np.arange(size) // 4 * 4
    soft = _softening(max(1, size // 32))
    for name, apply in (
        ("inverted", lambda image: 255 - image),
        ("grey", lambda image: image.mean(-1, keepdims=True).repeat(3, -1)),
        ("darker", lambda image: 0.4 * image),
        ("lighter", lambda image: 255 - 0.4 * (255 - image)),
        ("flat", lambda image: 0.3 * image + 0.7 * image.mean()),
        ("channels in another order", lambda image: image[..., [2, 0, 1]]),
        ("four levels", lambda image: (image / 64).round() * 64),
        ("coarse", lambda image: image[coarse][:, coarse]),
        ("soft", soft),
        ("mirrored", lambda image: image[:, ::-1]),
        ("upside down", lambda image: image[::-1]),
    ):
        yield Distortion(name, "tone", apply)


def _softening(radius: int) -> _Mark:
    def apply(image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        from scipy.ndimage import uniform_filter

        found: npt.NDArray[np.float64] = uniform_filter(
            image, (2 * radius + 1, 2 * radius + 1, 1), mode="nearest"
        )
        return found

    return apply


def _mixing(other: npt.NDArray[np.int64], share: float) -> _Mark:
    return lambda image: (1 - share) * image + share * other


def _adding(other: npt.NDArray[np.float64]) -> _Mark:
    return lambda image: image + other
