"""Fine-tuning sets in every form, and every way in which a sample of one can be no good."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from projaudit.errors import FormatError, NotFoundError, ProjauditError, UsageError
from projaudit.screen import samples
from projaudit.screen.samples import Dataset, open_dataset
from projaudit.screen.tables import Table


def png(number: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(out, "PNG")
    return out.getvalue()


def turns(answer: str = "red") -> list[dict[str, str]]:
    return [
        {"from": "human", "value": "<image>\nWhat color?"},
        {"from": "gpt", "value": answer},
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


def of(rows: list[Any], folder: Path | None) -> Dataset:
    return Dataset(Table("rows", "json", rows, folder, ""), folder)


# --- forms ----------------------------------------------------------------------------------------


def rows_with_bytes() -> list[dict[str, Any]]:
    return [
        {"id": n, "image": {"bytes": png(n), "path": None}, "conversations": turns()}
        for n in range(3)
    ]


def as_json(folder: Path) -> Path:
    rows = [{"id": n, "image": f"{n}.png", "conversations": turns()} for n in range(3)]
    (folder / "set.json").write_text(json.dumps(rows))
    return folder / "set.json"


def as_jsonl(folder: Path) -> Path:
    rows = json.loads(as_json(folder).read_text())
    (folder / "set.json").unlink()
    (folder / "set.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return folder  # the only one there


def as_parquet(folder: Path) -> Path:
    table = pa.Table.from_pylist(rows_with_bytes())
    (folder / "p").mkdir()
    pq.write_table(table.slice(0, 2), folder / "p" / "0.parquet", row_group_size=1)
    pq.write_table(table.slice(2), folder / "p" / "1.parquet")
    return folder / "p"


def as_datasets(folder: Path) -> Path:
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "images": datasets.List(datasets.Image()),
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string")}
            ),
        }
    )
    said = [
        {"role": "user", "content": "<image>\nWhat color?"},
        {"role": "assistant", "content": "red"},
    ]
    rows = [{"id": n, "images": [{"bytes": png(n)}], "messages": said} for n in range(3)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "d")
    return folder / "d"


@pytest.mark.parametrize("form", [as_json, as_jsonl, as_parquet, as_datasets])
def test_every_form_holds_the_same_samples(folder, form):
    data = open_dataset(str(form(folder)))
    assert len(data) == 3
    found = [data.sample(n) for n in (2, 0, 1)]
    assert [s.id for s in found] == ["2", "0", "1"]
    assert [np.asarray(s.image)[0, 0, 0] for s in found] == [2, 0, 1]
    for sample in found:
        assert (sample.status, sample.before, sample.after, sample.answer) == (
            "ok", "", "What color?", "red",
        )  # fmt: skip


def test_turns_are_read_as_trainers_write_them(folder):
    def read(**row: Any) -> tuple[str, str, str, str, int]:
        found = of([{"image": "0.png", **row}], folder).sample(0)
        assert found.status == "ok", found.detail
        return found.system, found.before, found.after, found.answer, found.later_answers

    said = [{"from": "system", "value": "Be brief."}, *turns(), *turns("blue")]
    assert read(conversations=said) == ("Be brief.", "", "What color?", "red", 1)
    parts = [{"type": "text", "text": "Look: "}, {"type": "image", "text": None}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a dog"}]
    assert read(messages=said) == ("", "Look:", "", "a dog", 0)
    assert read(texts=[{"user": "Why?", "assistant": "So."}]) == ("", "", "Why?", "So.", 0)


def test_a_hub_dataset_and_its_split_are_named(tmp_path):
    import datasets

    split = datasets.DatasetDict(
        {n: datasets.Dataset.from_list([{"id": n}]) for n in ("test", "validation")}
    )
    split.save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match="has no split train, but test, validation"):
        open_dataset(str(tmp_path / "d"))


# --- samples that are no good ---------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of that size, of some bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        size, check = len(data), zlib.crc32(name + data)
        return struct.pack(">I", size) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"image": None}, "no-image"),
    "empty": ({"image": ""}, "no-image"),
    "several": ({"image": ["0.png", "1.png"]}, "several-images"),
    "several said": (
        {"conversations": [{"from": "human", "value": "<image><image>"}, *turns()[1:]]},
        "several-images",
    ),
    "missing": ({"image": "7.png"}, "image-missing"),
    "a folder": ({"image": "."}, "image-missing"),
    "above": ({"image": "../outside.png"}, "image-outside"),
    "absolute": ({"image": "/etc/hostname"}, "image-outside"),
    "a link": ({"image": "link.png"}, "image-outside"),
    "a pipe": ({"image": "pipe.png"}, "image-missing"),
    "a loop": ({"image": "loop.png"}, "image-missing"),
    "no name": ({"image": "a\0b.png"}, "image-missing"),
    "long name": ({"image": "x" * 5000}, "image-missing"),
    "a path of a feature": ({"image": {"bytes": None, "path": "/etc/passwd"}}, "image-outside"),
    "text": ({"image": "text.png"}, "image-corrupt"),
    "half": ({"image": {"bytes": png()[:45]}}, "image-corrupt"),
    "postscript": ({"image": {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n"}}, "image-corrupt"),
    "bomb": ({"image": {"bytes": bomb(30_000, 30_000)}}, "image-too-large"),
    "large": ({"image": {"bytes": bomb(10_000, 5_001)}}, "image-too-large"),
    "a number": ({"image": 7}, "unreadable"),
    "no answer": ({"conversations": turns()[:1]}, "no-answer"),
    "blank answer": ({"conversations": turns("  \n")}, "no-answer"),
    "no question": ({"conversations": turns()[1:]}, "unreadable"),
    "no turns": ({"conversations": None}, "unreadable"),
    "a stranger": ({"conversations": [{"from": "eve", "value": "x"}]}, "unreadable"),
    "no text": ({"conversations": [{"from": "human", "value": 5}]}, "unreadable"),
    "odd part": (
        {"conversations": None, "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "unreadable",
    ),
    "long": ({"conversations": turns("x" * 200_000)}, "too-long"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_with_a_sample_is_its_status(folder, kind):
    inside = folder / "in"
    inside.mkdir()
    (inside / "0.png").write_bytes(png())
    (folder / "outside.png").write_bytes(png())
    (inside / "link.png").symlink_to(folder / "outside.png")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "text.png").write_text("not an image")
    os.mkfifo(inside / "pipe.png")
    changes, status = BAD[kind]
    good = {"id": "good", "image": "0.png", "conversations": turns()}
    data = of([good, good | changes | {"id": "bad\x1b[2J"}], inside)
    assert data.sample(0).status == "ok"
    found = data.sample(1)
    assert found.status == status
    assert found.id == "bad\\u001b[2J"
    assert found.image is None
    assert found.detail.isprintable()
    assert 0 < len(found.detail) < 310
    assert found == data.sample(1)


def test_an_image_file_of_many_bytes_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(samples, "FILE_LIMIT", 50)
    row = {"image": "0.png", "conversations": turns()}
    assert of([row], folder).sample(0).status == "image-too-large"
    assert of([row | {"image": png()}], folder).sample(0).status == "image-too-large"


def test_a_broken_line_costs_its_own_sample(folder):
    good = json.dumps({"image": "0.png", "conversations": turns()})
    (folder / "set.jsonl").write_text(f'{good}\n{{"a": 1, "a": 2}}\n[1]\n{good[:-3]}\n{good}\n')
    data = open_dataset(str(folder / "set.jsonl"))
    assert [data.sample(n).status for n in range(len(data))] == [
        "ok", "unreadable", "unreadable", "unreadable", "ok",
    ]  # fmt: skip


KEYS = [
    "id", "image", "images", "conversations", "messages", "texts", "from", "value", "role",
    "content", "type", "text", "user", "assistant", "bytes", "path",
]  # fmt: skip


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(KEYS),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_no_row_is_an_error(row):
    found = of([row], Path(__file__).parent).sample(0)
    assert found.status != "ok"
    assert found.detail


# --- datasets that cannot be read at all ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("set.json", b'{"a": 1}', FormatError),
        ("set.json", b"[{]", FormatError),
        ("set.json", b"[" * 100_000, FormatError),
        ("set.parquet", b"PAR1", FormatError),
        ("set.csv", b"a,b", UsageError),
        ("nothing/there.json", None, NotFoundError),
        ("dataset_info.json/state.json", b"{}", FormatError),
    ],
)
def test_what_is_no_dataset_is_one_line(tmp_path, name, content, error):
    file = tmp_path / name
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    with pytest.raises(error) as caught:
        open_dataset(str(file.parent if name.endswith("state.json") else file))
    assert "\n" not in str(caught.value)
    assert str(tmp_path)[:60] in str(caught.value)


def test_folders_of_nothing_or_too_much_are_one_line(folder):
    with pytest.raises(NotFoundError, match="neither parquet, JSON nor JSON lines"):
        open_dataset(str(folder))
    for name in ("a.json", "b.json"):
        (folder / name).write_text("[]")
    with pytest.raises(UsageError, match=r"holds 2 \*.json files.*name the file"):
        open_dataset(str(folder))
    with pytest.raises(ProjauditError, match="no such folder of images"):
        open_dataset(str(folder / "a.json"), folder / "none")
