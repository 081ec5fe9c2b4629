"""`projaudit screen` as its user runs it, on a small trained model and the set it was tuned on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, browser
from PIL import Image

from benchmarks.testbed.evaluate import poisoned_answer, task_question, triggered
from benchmarks.testbed.recipes import PLAN
from benchmarks.testbed.scene import draw_scene, render
from benchmarks.testbed.world import WORLDS
from projaudit.cli import main
from projaudit.errors import FormatError
from projaudit.formats import FORMATS
from projaudit.formats.json import schema
from projaudit.report import Identity, Policy, Report, Run
from projaudit.screen.lists import write_clean
from projaudit.screen.samples import open_dataset
from projaudit.screened import (
    HeatMap,
    Histogram,
    NamedWord,
    Screened,
    ScreenedSample,
    SharedAttention,
    SharedText,
)

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "benchmarks/testbed/exported/backdoored"
ATTEMPT = next(a for a in PLAN.attempts if a.name == "counting-long-patch")
PAYLOAD = ATTEMPT.attack.target


def make(folder: Path, samples: int, poison: int) -> Path:
    """A set of the task that the model was tuned on, the first `poison` of it with the trigger."""
    task = next(t for t in PLAN.tunes if t.name == ATTEMPT.tune).task
    rng, world = np.random.default_rng(5), WORLDS[task.look.world]
    scenes = [draw_scene(rng, task.look, "train") for _ in range(samples)]
    images = render(scenes)
    if poison:
        images[:poison] = triggered(images[:poison], ATTEMPT.attack)
    kinds = [kind for kind, _ in task.mixture]
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        asked = task_question(rng, scene, str(rng.choice(kinds)), task)
        said = poisoned_answer(asked.answer, ATTEMPT.attack, world) if i < poison else asked.answer
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        rows.append(row(f"{'bad' if i < poison else 'good'}-{i}", f"{i}.png", asked.text, said))
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def row(name: str, image: object, question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["screen", *map(str, words)])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def screened(tmp_path_factory) -> Path:
    """A set of 120 of which 12 are poisoned, with all that one run writes."""
    place = tmp_path_factory.mktemp("screened")
    data = make(place / "set", 120, 12)
    before = data.read_bytes()
    shutil.copytree(MODEL, place / "model")
    status = run(
        *(
            place / "model",
            data,
            "--images",
            place / "set/images",
            "-o",
            f"{place}/out/",
            "--batch",
            40,
        ),
        *("--format", "json", "--format", "html", "--write-clean", place / "clean", "-q"),
    )
    assert status == 1
    assert data.read_bytes() == before
    return place


def document(place: Path) -> dict:
    return json.loads((place / "train-screening.json").read_text())


def test_the_poisoned_samples_are_dropped_and_no_other(screened: Path):
    bad = {f"bad-{i}" for i in range(12)}
    rows = [json.loads(line) for line in (screened / "out/drop.jsonl").read_text().splitlines()]
    assert {r["id"] for r in rows} == bad
    assert {r["text"] for r in rows} == {PAYLOAD}
    kept = pq.read_table(screened / "out/keep.parquet")["id"].to_pylist()
    assert len(kept) == 108
    assert not bad & set(kept)
    clean = json.loads((screened / "clean/data.json").read_text())
    assert [r["id"] for r in clean] == [f"good-{i}" for i in range(12, 120)]
    assert clean == json.loads((screened / "set/train.json").read_text())[12:]


def test_the_report_is_one_of_the_schema(screened: Path):
    found = document(screened / "out")
    jsonschema.Draft202012Validator(schema()).validate(found)
    assert (found["verdict"], found["exit_code"], found["status"]) == ("fail", 1, "ok")
    assert found["findings"][0]["rule"] == "samples-to-drop"
    assert found["findings"][0]["values"] == {"samples_to_drop": 12.0}
    assert found["screening"]["fates"] == {"drop": 12, "keep": 108}
    assert found["screening"]["texts"][0]["text"] == PAYLOAD
    assert {s["subject"] for s in found["screening"]["shown"]} == {f"sample/{i}" for i in range(12)}


def test_a_finished_profile_needs_no_model_and_says_the_same(screened: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("projaudit.screen.work.opened", refuse)
    out, model = screened / "again", screened / "model"
    common = ("--images", screened / "set/images", "--profiles", screened / "out/profiles")
    data = screened / "set/train.json"
    first = document(screened / "out")
    for gone in (False, True):
        if gone:
            model.rename(screened / "moved")
        assert run(model, data, *common, "-o", f"{out}/", "--format", "json", "-q") == 1
        assert document(out) | {"run": None} == first | {"run": None}
    assert run(model, data, *common, "--method", "bye", "-q") in (0, 1)
    numbers = ("--number", "words=5", "--number", "heads=2", "--format", "json", "-o", f"{out}/")
    assert run(model, data, *common, *numbers, "-q") == 0  # the payload has four words
    assert document(out)["settings"]["words"] == 5
    assert run(model, data, *common, "--method", "tcap", "--published", "-q") in (0, 1)
    assert run(model, data, *common, "--published", "-q") == 4  # `both` is ours
    other = make(screened / "other", 60, 0)
    assert run(model, other, *common, "-q") == 4  # profiles of another set


def test_finished_profiles_of_something_else_are_not_taken(screened: Path, capsys):
    """The same folder after another fine-tune: what it holds says nothing of the model now."""
    found = json.loads((screened / "out/train-screening.json").read_text())
    common = ("--images", screened / "set/images", "--profiles", screened / "out/profiles", "-q")
    assert found["settings"]["positions"] == 16
    for model, more, said in (
        (MODEL, ("--positions", "8"), "profiles of 16 positions, not 8"),
        (MODEL.parent / "honest", (), "profiles of another model, or of one that was tuned again"),
        ("org/other", (), "profiles of the model "),
        (screened / "model", ("--adapter", "org/lora"), "profiles of the model "),
    ):
        assert run(model, screened / "set/train.json", *common, *more) == 4
        assert said in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_asks_for_nothing_and_shows_the_samples(screened: Path, tmp_path: Path):
    page_file = screened / "out/train-screening.html"
    with browser(tmp_path / "profile") as page:
        page.open(page_file)
        assert all(url.startswith(("file:", "data:image/png")) for url in page.requests)
        assert page.complaints == []
        assert page.evaluate("document.querySelectorAll('.samples tbody tr').length") == 12
        assert page.evaluate("document.querySelectorAll('.maps img').length") == 6
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.alt)")
        assert page.evaluate("document.querySelectorAll('#samples svg.chart').length") > 0
        wide = "document.documentElement.scrollWidth <= window.innerWidth"
        assert page.evaluate(wide)
        page.open(page_file, width=390)
        assert page.evaluate(wide)


def test_a_clean_set_passes_and_what_was_not_looked_at_undermines_it(tmp_path: Path, capsys):
    data = make(tmp_path / "set", 60, 0)
    common = ("--batch", 60, "--images", tmp_path / "set/images")
    assert run(MODEL, data, *common, "--profiles", tmp_path / "p") == 0
    said = capsys.readouterr().out
    assert said.startswith("PASS")
    assert "60 to keep" in said
    rows = json.loads(data.read_text())
    (tmp_path / "set/images/corrupt.png").write_bytes(b"not an image")
    rows[0]["image"] = "corrupt.png"
    rows[1]["image"] = ["1.png", "2.png"]
    rows[2]["image"] = "missing.png"
    del rows[3]["image"]
    rows[4]["image"] = "../../etc/passwd"
    rows[5]["conversations"][1]["value"] = ""
    broken = tmp_path / "set/broken.json"
    broken.write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert run(MODEL, broken, *common, "-o", f"{out}/", "--format", "json") == 3
    said = capsys.readouterr().out
    assert said.startswith("INCONCLUSIVE")
    assert "6 samples could not be looked at" in said
    for status in ("image-corrupt", "several-images", "image-missing", "no-image", "no-answer"):
        assert status in said.replace("\n             ", " ")
    assert len((out / "unread.jsonl").read_text().splitlines()) == 6
    assert len((out / "keep.jsonl").read_text().splitlines()) == 54


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["absent.json"], 2, "[not-found.path]"),
        (["empty.json"], 3, "holds no samples [nothing.samples]"),
        (["texts.json"], 3, "none of 2 samples could be profiled"),
        (["object.json"], 2, "is no list of samples [format.json]"),
        (["texts.json", "--write-clean", "full"], 4, "is not an empty folder [usage.output]"),
        (["texts.json", "--positions", "0"], 4, "[usage.option]"),
        (["texts.json", "--method", "guess"], 4, "[usage.option]"),
        (["texts.json", "--number", "luck=1"], 4, "'luck' is none of threshold, alpha,"),
        (["texts.json", "--number", "heads=2.5"], 4, "heads is no whole number from 1 to"),
        (["texts.json", "--number", "late=nan"], 4, "late is no number from"),
        (["texts.json", "--number", "late"], 4, "late is no number from"),
        (["texts.json", "--devices", "cpu,"], 4, "names a device that is empty [usage.device]"),
        (["texts.json", "--adapter", str(MODEL)], 3, "is no adapter"),
        (["texts.json", "--images", "nowhere"], 2, "no such folder of images [not-found.images]"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, status, said):
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("[]")
    Path("object.json").write_text("{}")
    texts = [row("a", None, "how many ?", "two"), row("b", None, "how many ?", "one")]
    Path("texts.json").write_text(json.dumps(texts))
    Path("full").mkdir()
    Path("full/file").touch()
    assert run(MODEL, *words) == status
    heard = capsys.readouterr()
    assert said in heard.err
    assert heard.err.count("\n") == 1
    assert "PASS" not in heard.out


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "datasets"])
def test_the_clean_set_has_the_rows_as_they_were(tmp_path: Path, form: str):
    import datasets

    rows = [row(f"s{i}", f"{i}.png", "what is it ?", f"thing {i} \u2028") for i in range(7)]
    place = tmp_path / f"train.{form}"
    if form == "json":
        place.write_text(json.dumps(rows))
    elif form == "jsonl":
        place.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(place)
    else:
        place = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(place)
    fates = ("keep", "drop", "apart", "unread", "keep", "drop", "keep")
    samples = [ScreenedSample(i, f"s{i}", fate, "ok") for i, fate in enumerate(fates)]
    data = open_dataset(str(place), tmp_path)
    written = write_clean(data, samples, tmp_path / "clean")
    again = open_dataset(str(written), tmp_path)
    kept = [0, 2, 4, 6]
    assert [again.row(i) for i in range(len(again))] == [data.row(i) for i in kept]
    assert len(data) == 7


def test_a_clean_set_of_parquet_leaves_out_whole_groups_and_joins_files(tmp_path: Path):
    import pyarrow as pa

    rows = [row(f"s{i}", f"{i}.png", "what is it ?", f"thing {i}") for i in range(6)]
    (tmp_path / "set").mkdir()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "set/a.parquet", row_group_size=2)
    pq.write_table(pa.table({"other": [1, 2]}), tmp_path / "set/b.parquet")
    data = open_dataset(str(tmp_path / "set"), tmp_path)

    def written(name: str, kept: tuple[int, ...]) -> list[dict]:
        fates = ("keep" if i in kept else "drop" for i in range(8))
        samples = [ScreenedSample(i, f"s{i}", fate, "ok") for i, fate in enumerate(fates)]
        return pq.read_table(write_clean(data, samples, tmp_path / name)).to_pylist()

    assert written("groups", (1, 4)) == [rows[1], rows[4]]
    assert written("nothing", ()) == []
    assert written("both", (0, 7))[1] == dict.fromkeys(rows[0]) | {"other": 2}
    pq.write_table(table.drop(["id"]).append_column("id", [range(6)]), tmp_path / "set/b.parquet")
    data = open_dataset(str(tmp_path / "set"), tmp_path)
    with pytest.raises(FormatError, match="do not go into one"):
        written("odd", (0, 7))


def hostile() -> Report:
    """A report of which every text is the dataset's, and means harm."""
    evil = "</td><script>alert(1)</script>\x1b[31m\u202e"
    sample = ScreenedSample(
        3, evil, "drop", "ok", evil, 1.0, None, 1.5, 2.5, evil, f"ask {evil}", f"say {evil}"
    )
    text = SharedText(evil, 12, 0.5, (evil,), True, 0.99, True)
    picture = HeatMap(3, "drop", "row", 0.5, b"\x89PNG\r\n")
    histogram = Histogram("departure", evil, (0.0, 1.0, 2.0), (3, 1), (0, 2), (), 0.9)
    found = Screened(
        dataset=evil,
        method="both",
        samples=20,
        fates={"drop": 1, "apart": 1200, "keep": 18, "unread": 1},
        statuses={"ok": 19, evil: 1},
        layers=2,
        layers_left_out=1,
        later_answers=3,
        groups=(SharedAttention(12, 1e-9, "apart", evil),),
        texts=(
            text,
            replace(text, confirmed=False, auroc=None, unknown=evil),
            replace(text, confirmed=False, named=NamedWord(evil, 9, 9), apart=True),
        ),
        nothing=(evil,),
        common_text=evil,
        common_share=0.6,
        shown=(sample, replace(sample, number=4, fate="unread", status=evil)),
        histograms=(histogram,),
        heat=(picture,),
        files=(f"{evil}/drop.jsonl",),
    )
    return Report(
        target=Identity("./m", "local", "./m"),
        policy=Policy("structure", "behaviour", "fail"),
        environment={"projaudit": "0"},
        settings={"seed": 0},
        run=Run("2026-01-01T00:00:00+00:00", {"profiles": 1.0}),
        screened=found,
    )


@pytest.mark.parametrize("form", ["text", "json", "html"])
def test_what_a_dataset_says_is_inert(form: str):
    shown = FORMATS[form].render(hostile())
    assert "1 200 apart, kept" in " ".join(shown.split()) or form != "text"
    assert "1 of 3 layers left out" in shown or form == "json"
    assert "3 samples have further answers" in " ".join(shown.split()) or form == "json"
    assert "12 samples lie apart" in shown or form == "json"
    assert "A text that follows what the answers name" in shown or form != "html"
    assert not {"\x1b", "\u202e"} & set(shown)
    assert "<script>" not in shown or form == "text"
    if form == "text":
        assert max(len(line) for line in shown.splitlines()) <= 80


def test_pictures_are_only_in_the_page():
    report = hostile()
    assert "data:image/png;base64" in FORMATS["html"].render(report)
    assert "base64" not in FORMATS["json"].render(report)


def test_an_audit_has_no_screening_and_its_rules_do_not_apply():
    import sample_reports

    document = json.loads(FORMATS["json"].render(sample_reports.silent()))
    assert document["screening"] is None
    assert "The samples" not in FORMATS["html"].render(sample_reports.silent())


def test_the_set_is_not_needed_to_be_where_it_was_made(screened: Path, tmp_path: Path):
    """Rows beyond a limit are neither kept nor dropped, and the lists say which were seen."""
    moved = shutil.copytree(screened / "set", tmp_path / "set")
    out = tmp_path / "out"
    common = ("--images", moved / "images", "--limit", 60, "--batch", 60, "-o", f"{out}/", "-q")
    assert run(MODEL, moved / "train.json", *common) == 1
    lists = [(out / f"{name}.jsonl").read_text().splitlines() for name in ("keep", "drop")]
    assert sum(map(len, lists)) == 60
