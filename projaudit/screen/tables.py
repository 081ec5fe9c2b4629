"""The rows of a dataset, one at a time: JSON, JSON lines, parquet, `datasets` folders, the Hub."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from projaudit.errors import FormatError, LimitError, NotFoundError, UsageError
from projaudit.inert import clean
from projaudit.refs import parse_ref
from projaudit.screen.arrow import published, saved
from projaudit.strict import decode_json, load_json

JSON_LIMIT = 4 << 30
"""Bytes of a dataset in one JSON file, which is read as a whole; JSON lines have no limit."""
LINE_LIMIT = 64 << 20
"""Bytes of one line of JSON lines."""
Form = Literal["json", "jsonl", "parquet", "datasets"]


class Rows(Protocol):
    """What rows are read from, by their place."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, number: int, /) -> object:
        """The row, which is whatever the file says: mostly a dict. May raise FormatError."""


@dataclass(frozen=True)
class Table:
    """The rows of a dataset, and where they came from."""

    name: str
    """As typed, or `org/name@commit`."""
    form: Form
    rows: Rows
    folder: Path
    """What image paths are relative to where the user names no folder; of a Hub its cache."""
    digest: str
    """Of what the rows were read from, `sha256:…` of the files, or `datasets:…`."""


def open_table(text: str, *, offline: bool = False) -> Table:
    """The rows of a path or a Hub dataset id (`org/name`, `org/name@revision`: its train split).

    Raises NotFoundError, FormatError (`format.json`, `format.parquet`, `format.dataset`),
    UnsupportedError (`unsupported.extra`) without `datasets`, UsageError (`usage.dataset`) where a
    folder holds several datasets, and what the Hub raises.
    """
    ref = parse_ref(text)
    if ref.kind == "hub":
        name, rows, cached = published(ref.repo or "", ref.revision, offline=offline)
        return Table(name, "datasets", rows, cached, rows.digest)
    if ref.path is None:
        raise UsageError("a dataset is a path or a Hub id", "dataset", file=clean(text))
    path = ref.path
    if path.is_file():
        return _files(text, [path])
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        rows = saved(path, text)
        return Table(text, "datasets", rows, path, rows.digest)
    for suffix in ("*.parquet", "*.jsonl", "*.json"):
        found = sorted(f for f in path.glob(suffix) if f.is_file())
        if len(found) == 1 or (found and suffix == "*.parquet"):
            return _files(text, found)
        if found:
            raise UsageError(
                f"holds {len(found)} {suffix} files, {clean(found[0].name, 80)} for one",
                "dataset",
                file=clean(text),
                remedy="name the file",
            )
    raise NotFoundError(
        "holds neither parquet, JSON nor JSON lines, and nothing that `datasets` saved",
        "dataset",
        file=clean(text),
    )


def _files(text: str, files: Sequence[Path]) -> Table:
    first = files[0]
    reader: dict[str, tuple[Form, Callable[[], Rows]]] = {
        ".json": ("json", lambda: _json(first)),
        ".jsonl": ("jsonl", lambda: JsonLines(first)),
        ".parquet": ("parquet", lambda: Parquet(files)),
    }
    if first.suffix not in reader:
        raise UsageError(
            "a dataset is .json, .jsonl, .parquet, a folder or a Hub id",
            "dataset",
            file=clean(text),
        )
    form, read = reader[first.suffix]
    return Table(text, form, read(), first.parent, _digest(files))


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _json(file: Path) -> Rows:
    size = file.stat().st_size
    if size > JSON_LIMIT:
        raise LimitError(f"{size} bytes, above {JSON_LIMIT}", "json", file=clean(file))
    rows = load_json(file.read_bytes(), file=str(file), limit=JSON_LIMIT, constants="text")
    if not isinstance(rows, list):
        raise FormatError("is no list of samples", "json", file=clean(file))
    return rows


class JsonLines:
    """A file of one JSON value a line; only the places of the lines are held in memory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._starts: list[tuple[int, int]] = []
        start = 0
        with file.open("rb") as lines:
            while line := lines.readline(LINE_LIMIT + 1):
                if len(line) > LINE_LIMIT:
                    says = f"a line of more than {LINE_LIMIT} bytes"
                    raise LimitError(says, "json", file=clean(file))
                if line.strip():
                    self._starts.append((start, len(line)))
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> object:
        start, size = self._starts[number]
        with self._file.open("rb") as lines:
            lines.seek(start)
            return decode_json(lines.read(size), file=str(self._file), constants="text")


class Parquet:
    """Parquet files one after another; the row group in use is held in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._groups: list[tuple[Any, int]] = []
        sizes = []
        for file in files:
            try:
                opened = pq.ParquetFile(file)
            except (pa.ArrowException, OSError) as error:
                raise _not_parquet(file, error) from None
            for group in range(opened.num_row_groups):
                self._groups.append((opened, group))
                sizes.append(opened.metadata.row_group(group).num_rows)
        self._ends = list(itertools.accumulate(sizes))
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> object:
        import pyarrow as pa

        place = bisect_right(self._ends, number)
        if self._held is None or self._held[0] != place:
            opened, group = self._groups[place]
            try:
                self._held = place, opened.read_row_group(group)
            except (pa.ArrowException, OSError) as error:
                raise FormatError(f"cannot be read: {clean(error)}", "parquet") from None
        held = self._held[1]
        return held.slice(number - self._ends[place] + held.num_rows, 1).to_pylist()[0]

    def take(self, numbers: Sequence[int]) -> Any:
        """A table of those rows, in their order, with the columns of all files.

        Raises FormatError (`format.parquet`) where one column is of several types.
        """
        import pyarrow as pa

        starts = [0, *self._ends[:-1]]
        parts = [opened.schema_arrow.empty_table() for opened, _ in self._groups[:1]]
        for (opened, group), start, stop in zip(self._groups, starts, self._ends, strict=True):
            wanted = [n - start for n in numbers if start <= n < stop]
            if wanted:
                parts.append(opened.read_row_group(group).take(wanted))
        try:
            return pa.concat_tables(parts, promote_options="default")
        except pa.ArrowException as error:
            says = f"its files do not go into one: {clean(error, 120)}"
            raise FormatError(says, "parquet") from None


def _not_parquet(file: Path, error: Exception) -> FormatError:
    return FormatError(f"is no parquet: {clean(error, 120)}", "parquet", file=clean(file))
