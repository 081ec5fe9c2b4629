"""`projaudit screen` on a dataset of a Hub: real clients, a local server, a process of its own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import vlms
from fakehub import FakeHub, on
from PIL import Image

# What a user does one after another; a line of JSON for each.
SCRIPT = """
import json, sys
from projaudit.cli import main
from projaudit.errors import ProjauditError
from projaudit.screen.samples import open_dataset

def tell(**told):
    print(json.dumps(told), flush=True)

for word, *words in json.loads(sys.argv[1]):
    if word == "screen":
        try:
            main([word, *words, "-q"])
        except SystemExit as stop:
            tell(status=stop.code)
        continue
    try:
        data = open_dataset(words[0], offline=word == "offline")
        samples = [data.sample(number) for number in range(len(data))]
        tell(name=data.name, digest=data.digest, statuses=[s.status for s in samples],
             red=[s.image.getpixel((0, 0))[0] for s in samples if s.image])
    except ProjauditError as error:
        tell(code=error.code, message=str(error))
"""


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def turns(number: int) -> dict[str, Any]:
    said = [("human", "<image>\nWhat color?"), ("gpt", "red")]
    return {"id": f"s{number}", "conversations": [{"from": f, "value": v} for f, v in said]}


def parquet(path: Path, reds: list[int]) -> Path:
    rows = [{**turns(n), "image": {"bytes": png(red), "path": None}} for n, red in enumerate(reds)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def lines(name: str, image: str) -> bytes:
    return "".join(f"{json.dumps({**turns(n), name: image.format(n)})}\n" for n in (0, 1)).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    stored = {f"train/{n}.png": png(n + 10) for n in (0, 1)}
    with FakeHub(root) as server:
        server.add("datasets/org/set", {"data/train.parquet": parquet(root / "a", [1, 2, 3])})
        server.add("datasets/org/pictures", {
            "train/metadata.jsonl": lines("file_name", "{}.png"), **stored,
        })  # fmt: skip
        server.add("datasets/org/paths", {"train.jsonl": lines("image", "images/{}.png")})
        server.add("datasets/org/code", {"code.py": b"print('ran')\n"})
        server.add("datasets/org/broken", {"train.parquet": b"no parquet"})
        server.add("datasets/org/gated", {"train.jsonl": b"{}\n"}, gated="auto")
        server.add(
            "datasets/org/halves",
            {"test.jsonl": lines("image", ""), "validation.jsonl": lines("image", "")},
        )
        yield server


def told(hub: FakeHub, *steps: tuple[object, ...]) -> list[dict[str, Any]]:
    """What the process says of each step; nothing else may appear on its terminal."""
    words = json.dumps([[str(word) for word in step] for step in steps])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, words], env=hub.env(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_rows_of_a_hub_are_pinned_and_what_is_wrong_is_one_line(hub: FakeHub):
    sha = hub.repos["datasets/org/set"].refs["main"]
    online = told(
        hub,
        *(("open", f"org/{name}") for name in ("set", "set@main", f"set@{sha}", "pictures")),
        *(("open", f"org/{name}") for name in ("paths", "code", "broken", "gated", "halves")),
        *(("open", f"org/{name}") for name in ("absent", "set@nowhere")),
    )
    first, branch, commit, pictures, paths = online[:5]
    assert first == branch == commit
    assert (first["name"], first["red"]) == (f"org/set@{sha}", [1, 2, 3])
    assert (pictures["statuses"], pictures["red"]) == (["ok", "ok"], [10, 11])
    assert paths["statuses"] == ["image-missing", "image-missing"]
    assert [one["code"] for one in online[5:]] == [
        *("format.dataset", "format.dataset", "auth.gated", "usage.dataset"),
        *("not-found.repo", "not-found.revision"),
    ]
    assert "has no split train, but " in online[8]["message"]
    assert all("\n" not in one["message"] for one in online[5:])
    asked = len(hub.log)
    offline = told(
        hub,
        *(("offline", f"org/{name}") for name in ("set", f"set@{sha}", "pictures")),
        *(("offline", f"org/{name}") for name in (f"set@{'0' * 40}", "absent")),
    )
    assert offline[:3] == [first, first, pictures]
    assert [one["code"] for one in offline[3:]] == ["offline.not-cached"] * 2
    assert len(hub.log) == asked  # nobody was asked anything


def test_an_older_commit_is_not_taken_for_one_that_cannot_be_fetched(hub: FakeHub, tmp_path: Path):
    hub.add("datasets/org/moved", {"data/train.parquet": parquet(tmp_path / "old", [4])})
    assert told(hub, ("open", "org/moved"))[0]["red"] == [4]
    hub.add("datasets/org/moved", {"data/train.parquet": parquet(tmp_path / "new", [5])})
    hub.faults.append(on("cdn", status=404))
    try:
        (found,) = told(hub, ("open", "org/moved"))
    finally:
        hub.faults.clear()
    assert found["code"] == "not-found.file"
    assert told(hub, ("open", "org/moved"))[0]["red"] == [5]


def test_a_set_of_a_hub_is_screened_and_goes_on_offline(hub: FakeHub, tmp_path: Path):
    sha = hub.repos["datasets/org/set"].refs["main"]
    model = vlms.save("llava", tmp_path / "model")
    out = tmp_path / "out"
    words = ("screen", model, "org/set", "-o", f"{out}/", "--format", "json")
    clean = tmp_path / "clean"
    # Three samples are too few to tell, which is said; they are all kept.
    assert told(hub, (*words, "--write-clean", clean), (*words, "--offline")) == [{"status": 3}] * 2
    (report,) = out.glob("*-screening.json")
    found = json.loads(report.read_text())
    assert found["screening"]["dataset"] == f"org/set@{sha}"
    assert found["screening"]["fates"] == {"keep": 3}
    assert len(told(hub, ("open", clean))[0]["red"]) == 3
