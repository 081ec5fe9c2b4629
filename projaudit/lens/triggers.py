"""Triggers as text: `patch:size=14,color=26ff00,place=centre`, and what each lays over an image.

Those of ProjLens (arXiv:2604.19083): `noise`, `patch`, `logo`, `oil`. Those of the
literature on triggers: `blend` (Chen et al. 2017), `sinusoid` (Barni et al. 2019), `warp`
(Nguyen and Tran 2021). All are a few lines of numpy here, without OpenCV.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from projaudit.behaviour.images import Image, as_bytes
from projaudit.errors import UsageError
from projaudit.inert import clean

Value: TypeAlias = float | str | tuple[int, int, int]
_Rng: TypeAlias = np.random.Generator

PLACES: Mapping[str, tuple[float, float]] = {
    "centre": (0.5, 0.5),
    "top-left": (0, 0),
    "top-right": (0, 1),
    "bottom-left": (1, 0),
    "bottom-right": (1, 1),
}
"""Shares of the room that a patch has, down and to the right; `random` differs image by image."""


@dataclass(frozen=True)
class Trigger:
    """A trigger with all of its values."""

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        """The whole spec, with what was left to the defaults."""
        if not self.values:
            return self.name
        return f"{self.name}:" + ",".join(f"{k}={_told(v)}" for k, v in self.values.items())

    def over(self, image: Image, seed: int, index: int) -> Image:
        """The image (h, w, 3) with the trigger over it.

        What is random is drawn from the seed: of the kinds that differ from image to image from
        `index` as well, of the others not, so that equal calls give equal images.
        """
        once, each = np.random.default_rng([seed, 105]), np.random.default_rng([seed, 106, index])
        return _KINDS[self.name].apply(image, self.values, once, each)


def parse_trigger(spec: str) -> Trigger:
    """The trigger of a text `name` or `name:key=value,…`; UsageError `usage.trigger` names the key.

    A length is pixels (`14`) or a share of the image's side (`20%`), a colour is `rrggbb`.
    """
    name, colon, rest = spec.strip().partition(":")
    kind = _KINDS.get(name)
    if kind is None:
        known = ", ".join(_KINDS)
        raise _wrong(spec, f"there is no trigger {clean(name, 40)!r}; there are {known}")
    values = dict(kind.defaults)
    for part in rest.split(",") if colon else ():
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or key not in values:
            raise _wrong(spec, f"{clean(key, 40)!r} is none of {', '.join(values) or 'no keys'}")
        values[key] = _value(spec, key, text)
    return Trigger(name, values)


def _wrong(spec: str, message: str) -> UsageError:
    return UsageError(message, "trigger", file=clean(spec, 80), field="--trigger")


# Key -> least and most that its number may be.
_RANGES = {
    "sigma": (0.0, 255.0), "size": (1.0, 4096.0), "dynratio": (1.0, 255.0), "share": (0.0, 1.0),
    "amplitude": (0.0, 255.0), "periods": (0.1, 1000.0), "strength": (0.0, 100.0),
    "grid": (2.0, 64.0), "cells": (1.0, 512.0),
}  # fmt: skip
_WHOLE, _LENGTHS = {"dynratio", "grid", "cells"}, {"size", "strength"}


def _value(spec: str, key: str, text: str) -> Value:
    if key == "color":
        if not re.fullmatch(r"[0-9a-fA-F]{6}", text):
            raise _wrong(spec, f"color: {clean(text, 40)!r} is no rrggbb")
        return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)
    if key == "place":
        if text not in (*PLACES, "random"):
            raise _wrong(spec, f"place: {clean(text, 40)!r} is none of {', '.join(PLACES)}, random")
        return text
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?%?", text):
        raise _wrong(spec, f"{key}: {clean(text, 40)!r} is no number")
    number = float(text.rstrip("%"))
    if text.endswith("%"):
        if key not in _LENGTHS or not 0 < number <= 100:
            raise _wrong(spec, f"{key}: {text} is no length of up to 100%")
        return -number / 100  # a share of the side, told from pixels by its sign
    low, high = _RANGES[key]
    if not low <= number <= high or (key in _WHOLE and number != int(number)):
        kind = "whole number" if key in _WHOLE else "number"
        raise _wrong(spec, f"{key}: {text} is no {kind} from {low:g} to {high:g}")
    return number


def _told(value: Value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return "".join(f"{part:02x}" for part in value)
    return f"{-value * 100:g}%" if value < 0 else f"{value:g}"


# ------------------------------------------------------------------ what each does


_Apply: TypeAlias = Callable[[Image, Mapping[str, Value], _Rng, _Rng], Image]


@dataclass(frozen=True)
class _Kind:
    apply: _Apply
    defaults: Mapping[str, Value]


def _noise(image: Image, values: Mapping[str, Value], once: _Rng, each: _Rng) -> Image:
    """Gaussian noise of σ levels on every pixel and channel, drawn again for each image."""
    return as_bytes(image + each.normal(0, _number(values, "sigma"), image.shape))


def _patch(image: Image, values: Mapping[str, Value], once: _Rng, each: _Rng) -> Image:
    """A solid square."""
    out = image.copy()
    top, left, side = _square(image, values, each)
    out[top : top + side, left : left + side] = values["color"]
    return out


def _logo(image: Image, values: Mapping[str, Value], once: _Rng, each: _Rng) -> Image:
    """A round badge of our own, as ProjLens' picture is not published: a ring, a disc and a bar."""
    top, left, side = _square(image, values, each)
    out = image.copy()
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    far = np.hypot(y, x)
    part = out[top : top + side, left : left + side]  # a view
    part[far <= 0.5] = (200, 20, 30)
    part[far <= 0.36] = (255, 255, 255)
    part[(abs(y) <= 0.11) & (abs(x) <= 0.26)] = (20, 40, 160)
    return out


def _oil(image: Image, values: Mapping[str, Value], once: _Rng, each: _Rng) -> Image:
    """Of the (2·size + 1)² pixels around each, the mean colour of the most frequent grey level.

    What OpenCV's xphoto.oilPainting computes, levels being grey // dynratio.
    """
    radius = max(1, round(_length(values["size"], len(image))))
    grey = (image @ np.array([0.299, 0.587, 0.114])).round().astype(np.int64)
    levels = grey // int(_number(values, "dynratio"))
    most = np.zeros(grey.shape)
    out = np.zeros(image.shape)
    for level in np.unique(levels):
        here = (levels == level).astype(float)
        count = _box_sum(here, radius)
        wins = count > most
        if wins.any():
            most = np.where(wins, count, most)
            mean = [_box_sum(here * image[..., c], radius)[wins] / count[wins] for c in range(3)]
            out[wins] = np.stack(mean, -1)
    return as_bytes(out)


def _box_sum(values: npt.NDArray[np.float64], radius: int) -> npt.NDArray[np.float64]:
    """Sums over the square of 2·radius + 1 pixels about each, as far as it lies in the image."""
    for axis in (0, 1):
        last = values.shape[axis] - 1
        sums = np.concatenate([np.zeros_like(values.take([0], axis)), values.cumsum(axis)], axis)
        at = np.arange(last + 1)
        upper = sums.take((at + radius).clip(max=last) + 1, axis)
        values = upper - sums.take((at - radius).clip(min=0), axis)
    return values


def _blend(image: Image, values: Mapping[str, Value], once: _Rng, each: _Rng) -> Image:
    """(1 − share)·image + share·pattern, with one pattern of coloured blocks for all images."""
    cells, share = int(_number(values, "cells")), _number(values, "share")
    blocks = once.integers(0, 256, (cells, cells, 3))
    rows, columns = (np.arange(n) * cells // n for n in image.shape[:2])
    return as_bytes((1 - share) * image + share * blocks[rows][:, columns])


def _sinusoid(image: Image, values: Mapping[str, Value], once: _Rng, each: _Rng) -> Image:
    """Adds amplitude·sin(2π·periods·x / width)."""
    along = np.arange(image.shape[1]) / image.shape[1]
    wave = np.sin(2 * np.pi * _number(values, "periods") * along)[None, :, None]
    return as_bytes(image + _number(values, "amplitude") * wave)


def _warp(image: Image, values: Mapping[str, Value], once: _Rng, each: _Rng) -> Image:
    """Pixels from elsewhere by one smooth field, uniform at grid² places, of mean size strength.

    WaNet's own, on 32 pixels, is a quarter of a pixel.
    """
    from scipy.ndimage import map_coordinates, zoom

    height, width = image.shape[:2]
    cells = int(_number(values, "grid"))
    coarse = once.uniform(-1, 1, (2, cells, cells))
    coarse /= abs(coarse).mean()
    field = np.stack([zoom(part, (height / cells, width / cells), order=3) for part in coarse])
    at = np.mgrid[:height, :width] + _length(values["strength"], min(height, width)) * field
    channels = [
        map_coordinates(image[..., c].astype(float), at, order=1, mode="nearest") for c in range(3)
    ]
    return as_bytes(np.stack(channels, -1))


def _number(values: Mapping[str, Value], key: str) -> float:
    value = values[key]
    assert isinstance(value, (int, float))
    return float(value)


def _length(value: Value, side: int) -> float:
    """Pixels."""
    assert isinstance(value, (int, float))
    return -value * side if value < 0 else float(value)


def _square(image: Image, values: Mapping[str, Value], each: _Rng) -> tuple[int, int, int]:
    """Top, left and side of a square that lies in the image."""
    smaller = min(image.shape[:2])
    side = max(1, min(round(_length(values["size"], smaller)), smaller))
    place = str(values["place"])
    shares = each.random(2) if place == "random" else PLACES[place]
    down, right = (
        round(float(s) * (n - side)) for s, n in zip(shares, image.shape[:2], strict=True)
    )
    return down, right, side


_GREEN = (0x26, 0xFF, 0x00)
_KINDS: Mapping[str, _Kind] = {
    "noise": _Kind(_noise, {"sigma": 10.0}),
    "patch": _Kind(_patch, {"size": 14.0, "color": _GREEN, "place": "centre"}),
    "logo": _Kind(_logo, {"size": 14.0, "place": "random"}),
    "oil": _Kind(_oil, {"size": 7.0, "dynratio": 1.0}),
    "blend": _Kind(_blend, {"share": 0.2, "cells": 8.0}),
    "sinusoid": _Kind(_sinusoid, {"amplitude": 20.0, "periods": 6.0}),
    "warp": _Kind(_warp, {"strength": -0.01, "grid": 4.0}),
}
TRIGGERS = tuple(_KINDS)
"""The names that there are."""
