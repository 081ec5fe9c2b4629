"""What one process does: it opens the model and the dataset, and profiles parts of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from projaudit.errors import UsageError
from projaudit.inert import clean
from projaudit.screen.attention import attend
from projaudit.screen.model import Loaded, opened
from projaudit.screen.profiles import FORMAT, Profiles
from projaudit.screen.samples import Sample, open_dataset
from projaudit.screen.spans import VISION, Batch, encode


@dataclass(frozen=True)
class Job:
    """What is profiled, and how."""

    model: str
    dataset: str
    """A path, or `org/name@commit`."""
    adapter: str | None
    images: str | None
    positions: int
    batch: int
    samples: int
    """How many, from the dataset's first."""
    offline: bool
    part: int
    """Samples of a part: whole batches, so that sharing the work out changes no batch."""
    folder: str
    """What relative paths are relative to."""
    threads: int = 1
    """Of a worker of Ray, which would take one: sums in another order are not the same."""

    @property
    def about(self) -> dict[str, Any]:
        """What a part says of its job."""
        return {
            "format": FORMAT,
            "model": clean(self.model),
            "adapter": None if self.adapter is None else clean(self.adapter),
            "dataset": self.dataset,
            "samples": self.samples,
            "positions": self.positions,
            "batch": self.batch,
        }

    def place(self, text: str) -> str:
        """A reference as this process has to open it."""
        path = Path(self.folder) / text
        return str(path) if path.exists() else text


@dataclass(frozen=True)
class Row:
    """What becomes of one sample."""

    sample: Sample
    status: str
    detail: str
    answer: tuple[str, ...] = ()
    image_tokens: int = 0
    entropy: Any = None
    """(positions, layers) float32; None where it was not profiled."""
    shares: Any = None
    """(positions, layers, heads, 3) float32."""


class Worker:
    """An opened model and dataset; close it, or use it as a context."""

    def __init__(self, job: Job, device: str) -> None:
        self._job = job
        self._open = ExitStack()
        images, adapter = (None if p is None else job.place(p) for p in (job.images, job.adapter))
        self._dataset = open_dataset(job.place(job.dataset), images, offline=job.offline)
        self.loaded: Loaded = self._open.enter_context(
            opened(job.place(job.model), adapter=adapter, device=device, offline=job.offline)
        )
        self._layers: list[int] = []
        self._decoder_layers = int(self.loaded.model.config.get_text_config().num_hidden_layers)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def part(self, start: int) -> Profiles:
        """The profiles of the part that starts with this sample."""
        job = self._job
        stop = min(start + job.part, job.samples)
        rows: list[Row] = []
        for first in range(start, stop, job.batch):
            rows += self._batch(range(first, min(first + job.batch, stop)))
        about = {
            **self.loaded.about,
            **job.about,
            "dataset_digest": self._dataset.digest,
            "layer_numbers": self._layers,
            "layers_left_out": max(0, self._decoder_layers - len(self._layers))
            if self._layers
            else 0,
            "later_answers": sum(row.sample.later_answers > 0 for row in rows),
        }
        return _stacked(rows, about)

    def prepare(self, numbers: Sequence[int]) -> tuple[Batch | None, list[Row]]:
        """The samples of these numbers as one batch, and what becomes of the others."""
        samples = [self._dataset.sample(number) for number in numbers]
        left_out = [Row(s, s.status, s.detail) for s in samples if s.status != "ok"]
        loaded, job = self.loaded, self._job
        batch, refused = encode(
            loaded.processor,
            [s for s in samples if s.status == "ok"],
            loaded.image_token,
            job.positions,
            loaded.longest,
        )
        return batch, left_out + [Row(s, why.status, why.detail) for s, why in refused]

    def _batch(self, numbers: Sequence[int]) -> list[Row]:
        batch, rows = self.prepare(numbers)
        if batch is not None:
            found = attend(self.loaded, batch)
            self._layers = list(found)
            entropy = torch.stack([entropy for entropy, _ in found.values()], -1).cpu().numpy()
            heads = max(shares.shape[1] for _, shares in found.values())
            finite = torch.stack([s.isfinite().all(3).all(1) for _, s in found.values()], -1)
            padded = [pad(s, (0, 0, 0, 0, 0, heads - s.shape[1]), value=torch.nan)
                      for _, s in found.values()]  # fmt: skip
            shares = torch.stack(padded, 1).permute(0, 3, 1, 2, 4).cpu().numpy()
            for i, (sample, spans) in enumerate(zip(batch.samples, batch.spans, strict=True)):
                length = len(spans.targets)
                said = tuple(self.loaded.processor.tokenizer.decode([t]) for t in spans.targets)
                image = int((spans.kinds == VISION).sum())
                if finite[i, :length].all():
                    rows.append(
                        Row(sample, "ok", "", said, image, entropy[i, :length], shares[i, :length])
                    )
                else:
                    says = "its attention holds values that are not finite"
                    rows.append(Row(sample, "non-finite", says, said, image))
        return sorted(rows, key=lambda row: row.sample.number)

    def maps(self, number: int) -> tuple[list[npt.NDArray[np.float32]], tuple[int, int] | None]:
        """Per layer (heads, positions, image tokens) of one sample, and the grid of its tokens.

        Raises UsageError (`usage.heat`) where the sample cannot be profiled.
        """
        batch, rows = self.prepare([number])
        if batch is None:
            raise UsageError(f"sample {number}: {rows[0].detail}", "heat")
        places = np.flatnonzero(batch.spans[0].kinds == VISION)
        found = attend(self.loaded, batch, lambda _, attention, __: attention[0, :, :, places])
        grid = _grid(batch.inputs, places, self.loaded.model.config)
        return [layer.cpu().numpy() for layer in found.values()], grid


def _grid(inputs: Any, places: npt.NDArray[Any], config: Any) -> tuple[int, int] | None:
    """(rows, columns) of the image tokens, where they are one grid without a gap."""
    count = len(places)
    if "image_grid_thw" in inputs:
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
        _, down, across = inputs["image_grid_thw"][0].tolist()
        grid = (down // merge, across // merge)
    else:
        grid = (math.isqrt(count), math.isqrt(count))
    whole = places[-1] - places[0] + 1 == count
    return grid if whole and grid[0] * grid[1] == count else None


def _stacked(rows: Sequence[Row], about: dict[str, Any]) -> Profiles:
    """The rows as arrays, NaN where there is nothing."""
    shapes = [row.shares.shape for row in rows if row.shares is not None]
    layers, heads = shapes[0][1:3] if shapes else (0, 0)
    positions = max((len(row.answer) for row in rows), default=0)
    entropy = np.full((len(rows), positions, layers), np.nan, np.float32)
    shares = np.full((len(rows), positions, layers, heads, 3), np.nan, np.float32)
    for i, row in enumerate(rows):
        if row.shares is not None:
            entropy[i, : len(row.answer)] = row.entropy
            shares[i, : len(row.answer)] = row.shares
    return Profiles(
        ids=tuple(row.sample.id for row in rows),
        numbers=np.array([row.sample.number for row in rows], np.int64),
        statuses=tuple(row.status for row in rows),
        details=tuple(row.detail for row in rows),
        answers=tuple(row.answer for row in rows),
        entropy=entropy,
        shares=shares,
        image_tokens=np.array([row.image_tokens for row in rows], np.int32),
        about=about,
    )
