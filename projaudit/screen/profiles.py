"""The store of profiles: parts of parquet as they come, read again as arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from projaudit.errors import FormatError, NotFoundError
from projaudit.inert import clean
from projaudit.strict import load_json

FORMAT = 1
"""Of the store; another one is not read."""


@dataclass(frozen=True)
class Profiles:
    """What the attention of a model says of the samples of a dataset."""

    ids: tuple[str, ...]
    """The dataset's own id, else the number."""
    numbers: npt.NDArray[np.int64]
    """(samples,): place in the dataset."""
    statuses: tuple[str, ...]
    """`ok`, or the code of why a sample was not profiled: `no-image`, `image-corrupt`, …"""
    details: tuple[str, ...]
    """One line for a reader; empty where ok."""
    answers: tuple[tuple[str, ...], ...]
    """The token that each position predicts, decoded."""
    entropy: npt.NDArray[np.float32]
    """(samples, positions, layers): BYE's entropy in nats; NaN where a sample has no such position,
    or no attention of the layer falls on the image."""
    shares: npt.NDArray[np.float32]
    """(samples, positions, layers, heads, 3): attention on system, vision and text; the rest is on
    the answer so far. NaN as above, and for heads that a layer does not have."""
    image_tokens: npt.NDArray[np.int32]
    """(samples,)."""
    about: dict[str, Any]
    """Model, dataset, device, dtype, versions, counts of layers and heads, and `later_answers`: how
    many samples hold answers after their first, which are not looked at."""


def parts_in(folder: Path) -> dict[int, Path]:
    """The parts of a store by the number of their first sample."""
    found = {}
    for file in sorted(folder.glob("part-*.parquet")):
        number = file.stem.removeprefix("part-")
        if number.isdecimal():
            found[int(number)] = file
    return found


def write_part(folder: Path, part: Profiles) -> Path:
    """Writes profiles of consecutive samples as one file, which appears whole or not at all.

    A sample takes the positions that it has; its lists are null where it was not profiled.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ok = [status == "ok" for status in part.statuses]
    lengths = [len(answer) for answer in part.answers]

    def lists(array: npt.NDArray[np.float32]) -> Any:
        rows = [a[:n].ravel() if k else None for a, n, k in zip(array, lengths, ok, strict=True)]
        return pa.array(rows, pa.list_(pa.float32()))

    table = pa.table(
        {
            "number": pa.array(part.numbers, pa.int64()),
            "id": pa.array(part.ids, pa.string()),
            "status": pa.array(part.statuses, pa.string()),
            "detail": pa.array(part.details, pa.string()),
            "answer": pa.array([list(a) for a in part.answers], pa.list_(pa.string())),
            "image_tokens": pa.array(part.image_tokens, pa.int32()),
            "entropy": lists(part.entropy),
            "shares": lists(part.shares),
        }
    )
    table = table.replace_schema_metadata({"projaudit": json.dumps(part.about, sort_keys=True)})
    file = folder / f"part-{int(part.numbers[0]):09}.parquet"
    partial = file.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(file)
    return file


def about_part(file: Path) -> dict[str, Any]:
    """What a part says about itself; raises FormatError (`format.profiles`)."""
    return _Part(file).about


def read_profiles(folder: Path) -> Profiles:
    """The profiles of a store, all parts that are there.

    All of it lies in memory: 4 bytes × samples × positions × layers × (1 + 3 × heads). Raises
    NotFoundError (`not-found.profiles`), FormatError (`format.profiles`) where a part is broken or
    belongs to another model or dataset than the others.
    """
    files = parts_in(folder)
    if not files:
        raise NotFoundError("holds no profiles", "profiles", file=clean(folder))
    parts = [_Part(file) for file in files.values()]
    about = run_of(parts[0].about)
    numbers: list[int] = []
    for part in parts:
        if run_of(part.about) != about:
            raise _wrong(part.file, "is of another model, dataset or setting than the first part")
        numbers = numbers or part.about["layer_numbers"]
        if part.about["layer_numbers"] not in ([], numbers):
            raise _wrong(part.file, "is of other layers than the first part")
    count = sum(len(part) for part in parts)
    positions = max((part.positions for part in parts), default=0)
    layers = len(numbers)
    heads = max(part.heads(layers) for part in parts)
    entropy = np.full((count, positions, layers), np.nan, np.float32)
    shares = np.full((count, positions, layers, heads, 3), np.nan, np.float32)
    start = 0
    for part in parts:
        part.fill(entropy[start : start + len(part)], shares[start : start + len(part)])
        start += len(part)
    places = np.array([v for p in parts for v in p.column("number")], np.int64)
    if (np.diff(places) <= 0).any():
        raise FormatError("holds a sample twice", "profiles", file=clean(folder))
    texts = {name: [v for part in parts for v in part.column(name)] for name in _TEXTS}
    return Profiles(
        ids=tuple(texts["id"]),
        numbers=places,
        statuses=tuple(texts["status"]),
        details=tuple(texts["detail"]),
        answers=tuple(tuple(a) for a in texts["answer"]),
        entropy=entropy,
        shares=shares,
        image_tokens=np.array([v for p in parts for v in p.column("image_tokens")], np.int32),
        about={
            **about,
            "later_answers": sum(part.about["later_answers"] for part in parts),
            "layer_numbers": numbers,
            "layers": layers,
            "heads": heads,
        },
    )


def run_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What all parts of one run have in common, of what one says about itself."""
    return {k: v for k, v in about.items() if k not in ("layer_numbers", "later_answers")}


_TEXTS = ("id", "status", "detail", "answer")


class _Part:
    """One file of a store."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.file = file
        try:
            self._table = pq.read_table(file)
            about = (self._table.schema.metadata or {})[b"projaudit"]
            names = (*_TEXTS, "number", "image_tokens")
            self._columns: dict[str, list[Any]] = {n: self._table[n].to_pylist() for n in names}
            self._lists = {
                name: [None if v is None else np.asarray(v) for v in _values(self._table[name])]
                for name in ("entropy", "shares")
            }
        except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
            raise _wrong(file, f"is no part of profiles: {clean(error, 120)}") from None
        content = load_json(about, file=str(file), kind="profiles")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise _wrong(file, f"is of another format than {FORMAT}")
        self.about = content

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def positions(self) -> int:
        return max((len(answer) for answer in self._columns["answer"]), default=0)

    def column(self, name: str) -> list[Any]:
        return self._columns[name]

    def heads(self, layers: int) -> int:
        """Of the layer that has most, by the size of a sample's shares."""
        for answer, shares in zip(self._columns["answer"], self._lists["shares"], strict=True):
            if shares is not None:
                each = len(answer) * layers * 3
                if not each or len(shares) % each:
                    raise _wrong(self.file, "holds shares that fit no number of heads")
                return len(shares) // each
        return 0

    def fill(self, entropy: npt.NDArray[Any], shares: npt.NDArray[Any]) -> None:
        """Puts the samples' positions into arrays of NaN."""
        for i, answer in enumerate(self._columns["answer"]):
            for name, into in (("entropy", entropy), ("shares", shares)):
                if (found := self._lists[name][i]) is None:
                    continue
                try:
                    into[i, : len(answer)] = found.reshape(len(answer), *into.shape[2:])
                except ValueError:
                    raise _wrong(self.file, f"holds {name} of another shape") from None


def _values(column: Any) -> list[Any]:
    return [scalar.values for scalar in column]


def _wrong(file: Path, says: str) -> FormatError:
    return FormatError(says, "profiles", file=clean(file))
