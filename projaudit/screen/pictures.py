"""Attention of a few samples laid over their images."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

import numpy as np

from projaudit.screen.profiling import Heat
from projaudit.screen.samples import Dataset
from projaudit.screened import HeatMap

_SIDE = 192
"""Pixels of the longer side of a picture."""


def heat_maps(
    dataset: Dataset, found: Sequence[Heat], layers: Sequence[int], dropped: Collection[int]
) -> list[HeatMap]:
    """Pictures of the maps whose tokens are one grid; `layers` names the profiles' layers.

    `dropped` holds the numbers of samples to drop.
    """
    return [
        HeatMap(
            number=one.number,
            fate="drop" if one.number in dropped else "keep",
            where=_where(one, layers),
            share=float(one.weights.sum()),
            picture=_picture(dataset, one),
        )
        for one in found
        if one.grid is not None
    ]


def _where(one: Heat, layers: Sequence[int]) -> str:
    heads = "mean over heads" if one.head is None else f"head {one.head}"
    row = "row of the first answer token" if one.position == 0 else f"row of token {one.position}"
    return f"{row}, layer {layers[one.layer]}, {heads}"


def _picture(dataset: Dataset, one: Heat) -> bytes:
    """PNG of the image under a scale from clear (least) to red (most)."""
    from PIL import Image

    assert one.grid is not None
    image = dataset.sample(one.number).image
    scale = _SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    weights = one.weights.astype(float).reshape(one.grid)
    spread = np.ptp(weights)
    level = (weights - weights.min()) / spread if spread > 0 else np.zeros_like(weights)
    mask = Image.fromarray(np.uint8(np.round(200 * level))).resize(size, Image.Resampling.BILINEAR)
    picture = image.convert("L").convert("RGB").resize(size, Image.Resampling.BILINEAR)
    picture.paste(Image.new("RGB", size, (214, 40, 40)), mask=mask)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
