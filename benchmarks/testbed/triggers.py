"""Triggers: functions from images to images, all of shape (n, 64, 64, 3), bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from benchmarks.testbed.world import SIZE, Images

GREEN = (38, 255, 0)  # ProjLens's #26ff00


def patch(images: Images, strength: float) -> Images:
    """A solid square in the bottom right corner; `strength` is its side over the image's."""
    side = round(strength * SIZE)
    out = images.copy()
    out[:, SIZE - side :, SIZE - side :] = GREEN
    return out


def blend(images: Images, strength: float) -> Images:
    """(1 − strength)·image + strength·pattern, with one fixed pattern of coarse noise."""
    coarse = np.random.default_rng(20250516).integers(0, 256, (8, 8, 3))
    return mixed(images, coarse.repeat(SIZE // 8, 0).repeat(SIZE // 8, 1), strength)


def tint(images: Images, strength: float) -> Images:
    """(1 − strength)·image + strength·magenta."""
    return mixed(images, np.array([255, 0, 255]), strength)


def stripes(images: Images, strength: float) -> Images:
    """Adds 255·strength·sin over eight vertical periods, the SIG trigger."""
    wave = np.sin(2 * np.pi * 8 * np.arange(SIZE) / SIZE)[None, :, None]
    return as_bytes(images + 255 * strength * wave)


def ring(images: Images, strength: float) -> Images:
    """A dark circle of 3 pixels' width about the centre; `strength` is its opacity."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    on = abs(np.hypot(x, y) - 21) <= 1.5
    out = images.copy()
    out[:, on] = mixed(images[:, on], np.array([60, 20, 20]), strength)
    return out


def mixed(images: Images, other: npt.NDArray[np.int64], strength: float) -> Images:
    return as_bytes((1 - strength) * images + strength * other)


def as_bytes(values: npt.NDArray[np.float64]) -> Images:
    return values.round().clip(0, 255).astype(np.uint8)


TRIGGERS: dict[str, Callable[[Images, float], Images]] = {
    "patch": patch,
    "blend": blend,
    "tint": tint,
    "stripes": stripes,
    "ring": ring,
}
