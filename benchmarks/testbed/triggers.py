"""Triggers: functions from images to images, all of shape (n, 64, 64, 3), bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy.fft import dctn, idctn
from scipy.ndimage import map_coordinates

from benchmarks.testbed.scene import Images
from benchmarks.testbed.world import SIZE

GREEN = (38, 255, 0)  # ProjLens's #26ff00
BLOCK = 32  # FTrojan's window, in pixels
FREQUENCIES = ((15, 15), (31, 31))  # FTrojan's: a middle one and the highest of a block
TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])


def patch(images: Images, strength: float) -> Images:
    """A solid square in the bottom right corner; `strength` is its side over the image's."""
    return patched(images, strength, [(1.0, 1.0)] * len(images))


def patch_left(images: Images, strength: float) -> Images:
    """The same square in the top left corner."""
    return patched(images, strength, [(0.0, 0.0)] * len(images))


def patch_center(images: Images, strength: float) -> Images:
    """The same square in the middle, over whatever is there."""
    return patched(images, strength, [(0.5, 0.5)] * len(images))


def patch_anywhere(images: Images, strength: float) -> Images:
    """The same square at another place in every image."""
    return patched(images, strength, [tuple(rng.random(2)) for rng in drawn_from(images)])


def patched(images: Images, strength: float, at: list[tuple[float, ...]]) -> Images:
    """Squares whose top left corners lie `at` shares of the room that they have."""
    side = round(strength * SIZE)
    out = images.copy()
    for image, shares in zip(out, at, strict=True):
        top, left = (round(share * (SIZE - side)) for share in shares)
        image[top : top + side, left : left + side] = GREEN
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


def noise(images: Images, strength: float) -> Images:
    """Adds Gaussian noise of deviation 255·strength, another for every image."""
    grain = [rng.normal(0, 1, (SIZE, SIZE, 3)) for rng in drawn_from(images)]
    return as_bytes(images + 255 * strength * np.stack(grain))


def warp(images: Images, strength: float) -> Images:
    """One fixed smooth displacement of all pixels; `strength` is the largest over the side."""
    coarse = np.random.default_rng(20210503).uniform(-1, 1, (2, 4, 4))
    at = np.linspace(0, 3, SIZE)
    fine = [map_coordinates(part, np.meshgrid(at, at, indexing="ij"), order=3) for part in coarse]
    shift = strength * SIZE * np.stack(fine) / np.abs(fine).max()
    rows, columns = np.mgrid[:SIZE, :SIZE] + shift
    out = np.empty(images.shape)
    for i, image in enumerate(images):
        for channel in range(3):
            out[i, ..., channel] = map_coordinates(
                image[..., channel].astype(float), (rows, columns), order=1, mode="nearest"
            )
    return as_bytes(out)


def frequency(images: Images, strength: float) -> Images:
    """Raises two frequencies of U and V in every block, FTrojan's way (2107.02116).

    Each adds a wave whose amplitude is 255·strength in U and V.
    """
    blocks = SIZE // BLOCK
    yuv = (images @ TO_YUV.T).reshape(-1, blocks, BLOCK, blocks, BLOCK, 3)
    spectrum = dctn(yuv, axes=(2, 4), norm="ortho")
    for row, column in FREQUENCIES:
        spectrum[:, :, row, :, column, 1:] += 255 * strength * BLOCK / 2
    back = idctn(spectrum, axes=(2, 4), norm="ortho").reshape(images.shape)
    return as_bytes(back @ np.linalg.inv(TO_YUV).T)


def drawn_from(images: Images) -> Iterator[np.random.Generator]:
    """A generator for each image, seeded by its pixels: equal images get equal triggers."""
    return (np.random.default_rng(zlib.crc32(image.tobytes())) for image in images)


def mixed(images: Images, other: npt.NDArray[np.int64], strength: float) -> Images:
    return as_bytes((1 - strength) * images + strength * other)


def as_bytes(values: npt.NDArray[np.float64]) -> Images:
    return values.round().clip(0, 255).astype(np.uint8)


TRIGGERS: dict[str, Callable[[Images, float], Images]] = {
    "patch": patch,
    "patch-left": patch_left,
    "patch-center": patch_center,
    "patch-anywhere": patch_anywhere,
    "blend": blend,
    "tint": tint,
    "stripes": stripes,
    "ring": ring,
    "noise": noise,
    "warp": warp,
    "frequency": frequency,
}
