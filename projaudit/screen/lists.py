"""Files for whoever trains next: the samples by what becomes of them, and the set without some."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from projaudit.errors import UsageError
from projaudit.inert import clean
from projaudit.screen.arrow import Arrow
from projaudit.screen.samples import Dataset
from projaudit.screen.tables import Parquet
from projaudit.screened import Fate, ScreenedSample

LISTS: dict[str, tuple[Fate, ...]] = {
    "keep": ("keep", "apart"),
    "drop": ("drop",),
    "unread": ("unread",),
}
"""Which fates stand in which list."""


def write_lists(samples: Sequence[ScreenedSample], folder: Path) -> list[Path]:
    """`keep`, `drop` and `unread` as JSON lines and parquet: number, id and the evidence of each.

    An empty list is an empty file. Raises UsageError (`usage.output`).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    schema = pa.schema(
        {"number": pa.int64(), "id": text, "fate": text, "status": text, "detail": text}
        | {"bye": number, "tcap": number, "joint": number, "departure": number, "text": text}
    )
    written = []
    for name, fates in LISTS.items():
        rows = [_row(sample, schema.names) for sample in samples if sample.fate in fates]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")
        except OSError as error:
            raise _unwritable(folder, error) from None
        written += [folder / f"{name}.jsonl", folder / f"{name}.parquet"]
    return written


def _row(sample: ScreenedSample, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in names}


def write_clean(dataset: Dataset, samples: Sequence[ScreenedSample], folder: Path) -> Path:
    """The rows to keep, as they are stored and in their order, in a folder that is empty or absent.

    The form is the dataset's own (`data.json`, `data.jsonl`, `data.parquet`, a folder of
    `datasets`). Images that rows hold go with them; image files stay where they are. Rows beyond a
    limit were not screened and are left out. Raises UsageError (`usage.output`).
    """
    kept = [sample.number for sample in samples if sample.fate in LISTS["keep"]]
    check_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = dataset.table.rows
        if isinstance(rows, Arrow):
            rows.take(kept).save_to_disk(folder)
            return folder
        file = folder / f"data.{dataset.form}"
        if isinstance(rows, Parquet):
            import pyarrow.parquet as pq

            pq.write_table(rows.take(kept), file)
        else:
            lines = [json.dumps(dataset.row(n)) for n in kept]
            if dataset.form == "json":
                file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
            else:
                file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from None
    return file


def check_empty(folder: Path) -> None:
    """Refuses a folder that holds something: nothing of the user's is written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "is not an empty folder", "output", file=clean(folder), field="--write-clean"
        )


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot be written: {error.strerror}", "output", file=clean(folder))
