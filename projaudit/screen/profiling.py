"""Profiles of a fine-tuning set: a model reads each sample once, and its attention is summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from projaudit.errors import NothingError, UsageError
from projaudit.inert import clean
from projaudit.screen.model import identity
from projaudit.screen.profiles import (
    Profiles,
    about_part,
    parts_in,
    read_profiles,
    run_of,
    write_part,
)
from projaudit.screen.samples import open_dataset
from projaudit.screen.spread import spread
from projaudit.screen.work import Job, Worker

PART = 64
"""Samples of a file of the store, about: what an interruption costs at most."""


def profile(
    model: str,
    dataset: str,
    out: Path,
    *,
    adapter: str | None = None,
    images: str | None = None,
    positions: int = 16,
    batch: int = 8,
    device: str = "auto",
    devices: Sequence[str] | None = None,
    limit: int | None = None,
    offline: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Profiles:
    """The profiles of a dataset's samples, also written to the folder `out` as they come.

    A sample is its first question, its image and its answer, in the model's own chat template, and
    position p the row of attention that predicts the answer's token p: position 0 is the last of
    the prompt, the others stand in the answer under teacher forcing. At most `positions` of them.
    What cannot be profiled keeps its place, with a status. Parts that `out` holds of the same run
    are taken as they are; delete the folder where image files have changed in place.

    `devices` are those of processes that share the work (`cuda:0`, `cuda:1`); `ray` once or several
    times is as many workers of Ray Data, on the cluster that `RAY_ADDRESS` names or a local one.
    The result is the same. Raises UsageError (`usage.profiles`: `out` holds another run;
    `usage.option`, `usage.device`), NothingError (`nothing.samples`), and what opening the model
    and the dataset raises.
    """
    for name, value in (("positions", positions), ("batch", batch), ("limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{value} is not allowed", "option", field=f"--{name}")
    data = open_dataset(dataset, images, offline=offline)
    count = len(data) if limit is None else min(limit, len(data))
    if not count:
        raise NothingError("holds no samples", "samples", file=clean(data.name))
    job = Job(
        *(model, data.name, adapter, images, positions, batch, count, offline),
        part=max(1, PART // batch) * batch,
        folder=str(Path.cwd()),
        threads=torch.get_num_threads(),
    )
    out.mkdir(parents=True, exist_ok=True)
    there = parts_in(out)
    known = None
    if there:
        known = run_of(about_part(next(iter(there.values()))))
        asked = {**job.about, "dataset_digest": data.digest}
        if not asked.items() <= known.items():
            raise _another(out)
        if not identity(model, adapter, offline=offline).items() <= known.items():
            raise _another(out)
    starts = [start for start in range(0, count, job.part) if start not in there]
    done = count - sum(min(job.part, count - start) for start in starts)
    with closing(spread(job, starts, devices or [device])) as parts:
        for part in parts if starts else ():
            if known is not None and run_of(part.about) != known:
                raise _another(out)
            known = run_of(part.about)
            write_part(out, part)
            done += len(part.ids)
            if progress:
                progress("samples", done, count)
    return read_profiles(out)


def _another(out: Path) -> UsageError:
    return UsageError(
        "holds profiles of another model, dataset or setting",
        "profiles",
        file=clean(out),
        remedy="choose another folder, or delete it",
    )


@dataclass(frozen=True)
class Heat:
    """Attention on the image, of one row."""

    number: int
    """Of the sample."""
    position: int
    layer: int
    """On the profiles' axis of layers."""
    head: int | None
    """None for the mean of all."""
    weights: npt.NDArray[np.float32]
    """(image tokens,) in their order; their sum is the row's share of vision."""
    grid: tuple[int, int] | None
    """(rows, columns) where the tokens are one grid over the image, row by row; None where they are
    not known to be, as with tiles."""


def heat(
    model: str,
    dataset: str,
    wanted: Sequence[tuple[int, int, int, int | None]],
    *,
    adapter: str | None = None,
    images: str | None = None,
    device: str = "auto",
    offline: bool = False,
) -> list[Heat]:
    """The attention over the image for each (sample, position, layer, head or None).

    Raises UsageError (`usage.heat`) where a sample has no such row, and what `profile` raises.
    """
    data = open_dataset(dataset, images, offline=offline)
    most = max((position for _, position, _, _ in wanted), default=0) + 1
    if any(not 0 <= number < len(data) for number, *_ in wanted):
        raise UsageError("there is no such sample", "heat", file=clean(data.name))
    job = Job(
        *(model, data.name, adapter, images, most, 1, len(data), offline),
        part=1,
        folder=str(Path.cwd()),
    )
    found: dict[tuple[int, int, int, int | None], Heat] = {}
    with Worker(job, device) as worker:
        for number in sorted({number for number, *_ in wanted}):
            maps, grid = worker.maps(number)
            for one in (one for one in wanted if one[0] == number):
                _, position, layer, head = one
                try:
                    rows = maps[layer][:, position]
                    weights = rows.mean(0) if head is None else rows[head]
                except IndexError:
                    raise UsageError(f"there is no row {one}", "heat") from None
                found[one] = Heat(*one, weights=weights, grid=grid)
    return [found[one] for one in wanted]
