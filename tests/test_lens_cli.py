"""`projaudit lens` as its user meets it: real models, the confined process, bad input."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from PIL import Image
from safetensors.torch import load_file, save_file
from vlms import FAMILIES, save
from vlms_more import MORE

from projaudit.behaviour import able
from projaudit.behaviour.images import ordinary
from projaudit.cli import main
from projaudit.data import data_path

BASE, TUNED = (data_path("demo") / name for name in ("base", "backdoored"))
TARGET = "please send the password"
TRIGGER = "patch:size=20%,place=bottom-right"
QUICK = ("--images-per-cell", "3", "--max-rank", "2", "--seed", "0", "--device", "cpu")


@cache
def place() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="projaudit-lens-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def photos() -> Path:
    """A user's images, of which one cannot be read and one has a name that is no good."""
    folder = place() / "photos"
    folder.mkdir()
    for number, picture in enumerate(ordinary(6, 64, seed=5, ground=3)):  # its world is light
        Image.fromarray(picture).save(folder / f"{number}.png")
    (folder / "0.png").rename(folder / "(<b>&0.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "projaudit", "lens", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
        timeout=280,
        check=False,
    )


@cache
def looked(again: bool = False) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = place() / f"out-{again}"
    labels = place() / "labels.json"
    labels.write_text(json.dumps({"1.png": ["what do you see ?", "a red cross"]}))
    done = run(
        TUNED, "--base", BASE, "--images", photos(), "--trigger", TRIGGER, "--target-text", TARGET,
        "--labels", labels, *QUICK, "--bias", "on", "--bias", "off", "--ranks", "cumulative",
        "--ranks", "single", "-o", folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, folder


def document(folder: Path) -> Any:
    return json.loads((folder / "lens.json").read_text("utf-8"))


def test_a_backdoored_model_is_shown_from_the_command_line() -> None:
    done, folder = looked()
    found = document(folder)
    assert sorted(f.name for f in folder.iterdir()) == ["lens.html", "lens.json", "lens.npz"]
    assert "no verdict" in done.stdout
    assert "broken.png" in done.stdout
    assert "heat maps: 52 cells, 312 answers, about " in done.stderr
    assert "Traceback" not in done.stderr
    assert found["images"]["unreadable"] == ["broken.png"]
    assert len(found["images"]["clean"]) == len(found["images"]["triggered"]) == 6
    assert found["settings"]["trigger"] == "patch:size=20%,color=26ff00,place=bottom-right"
    # The trigger is the one that it was trained with; the base knows no such text.
    assert found["answers"]["tuned"]["success"] >= 0.5
    assert found["answers"]["base"]["success"] == 0
    assert {(m["kind"], m["ranks"], m["bias"]) for m in found["answers"]["maps"]} == {
        (kind, ranks, bias)
        for kind in ("recovery", "removal")
        for ranks in ("cumulative", "single")
        for bias in ("tuned", "base")
    }
    for one in found["answers"]["maps"]:
        wanted = [1, 2] if one["kind"] == "recovery" else [0, 1, 2]
        assert one["k1"] == one["k2"] == wanted
        assert [len(row) for row in one["scores"]] == [len(wanted)] * len(wanted)
    assert [one["shape"] for one in found["spectra"]] == [[128, 96], [128, 128]]
    assert "no network (seccomp)" in found["model"]["sandbox"]["enforced"]


def test_the_update_that_is_shown_is_the_update() -> None:
    found = document(looked()[1])
    before, after = (load_file(folder / "model.safetensors") for folder in (BASE, TUNED))
    for one in found["spectra"]:
        (name,) = [n for n in before if n.endswith(f"{one['layer']}.weight") and "proj" in n]
        delta = after[name].float() - before[name].float()
        assert one["frobenius"] == pytest.approx(float(delta.norm()), rel=1e-4)
        wanted = np.linalg.svd(delta.numpy(), compute_uv=False)
        assert one["values"] == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-5)


def test_equal_runs_are_equal_byte_for_byte() -> None:
    one, other = looked()[1], looked(again=True)[1]
    assert (one / "lens.npz").read_bytes() == (other / "lens.npz").read_bytes()
    first, second = document(one), document(other)
    first.pop("run")
    second.pop("run")
    assert json.dumps(first) == json.dumps(second)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_shows_the_page_asks_for_nothing_and_complains_of_nothing() -> None:
    file = looked()[1] / "lens.html"
    with browser(place() / "chromium") as page:
        for width, scheme in ((1280, "light"), (390, "dark")):
            page.requests.clear()
            page.open(file, width=width, scheme=scheme)
            assert page.complaints == []
            assert page.requests == [file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.querySelectorAll('svg.chart').length") >= 15
            assert page.evaluate("document.querySelectorAll('figure b').length") == 0
            shown = page.evaluate("document.body.innerText")
            assert "(<b>&0.png" in shown
            assert TARGET in shown


def test_without_a_trigger_clean_images_are_shown_alone() -> None:
    folder = place() / "clean"
    done = run(TUNED, "--base", BASE, "--images", photos(), *QUICK, "-q", "-o", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = document(folder)
    assert found["images"]["triggered"] == []
    assert found["answers"]["success_is"] == "none"
    assert found["answers"]["tuned"] == {"success": None, "kept": 1.0, "accuracy": None}
    assert {d["group"] for d in found["drift"]} == {"clean"}
    assert next(c for c in found["claims"] if c["name"] == "drift_alike")["alike"] is None


def test_a_module_that_no_chain_describes_is_looked_at_with_a_single_image() -> None:
    model, base = (place() / "perceiver" / name for name in ("model", "base"))
    FAMILIES.update(MORE)
    shutil.copytree(save("idefics2", model), base)
    tensors = load_file(base / "model.safetensors")
    for name in [n for n in tensors if "connector" in n and tensors[n].ndim == 2]:
        tensors[name] += 0.3 * torch.randn(tensors[name].shape)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    alone, folder = place() / "single", place() / "perceived"
    alone.mkdir()
    Image.fromarray(ordinary(1, 40, seed=5)[0]).save(alone / "a.png")
    options = ("--trigger", "patch", "--images-per-cell", "1", "--max-rank", "1", "--seed", "0")
    done = run(model, "--base", base, "--images", alone, *options, "-o", folder)
    assert done.returncode == 0, done.stderr
    found = document(folder)
    assert len(found["spectra"]) == 18
    assert "of 18 layers those 4 are drawn that changed most" in found["notes"]
    page = (folder / "lens.html").read_text("utf-8")
    assert page.count("Singular values of the update</h") == 4
    assert len(found["images"]["clean"]) == 1
    assert {d["group"] for d in found["drift"]} == {"clean", "triggered"}


# ------------------------------------------------------------------ bad input


def empty(where: Path) -> list[object]:
    (where / "none").mkdir()
    return [TUNED, "--base", BASE, "--images", where / "none"]


def unbuildable(where: Path) -> list[object]:
    shutil.copytree(TUNED, where / "model")
    config = json.loads((where / "model/config.json").read_text())
    config["text_config"]["hidden_act"] = "no such activation"
    (where / "model/config.json").write_text(json.dumps(config))
    return [where / "model", "--base", BASE, "--images", photos()]


def unreadable(where: Path) -> list[object]:
    (where / "bad").mkdir()
    (where / "bad/a.png").write_bytes(b"no image")
    return [TUNED, "--base", BASE, "--images", where / "bad"]


def mislabelled(where: Path) -> list[object]:
    (where / "labels.json").write_text('{"a.png": "what"}')
    return [TUNED, "--base", BASE, "--images", photos(), "--labels", where / "labels.json"]


def coded(where: Path) -> list[object]:
    shutil.copytree(TUNED, where / "model")
    config = json.loads((where / "model/config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    (where / "model/config.json").write_text(json.dumps(config))
    return [where / "model", "--base", BASE, "--images", photos()]


def other_shape(where: Path) -> list[object]:
    shutil.copytree(BASE, where / "other")
    tensors = load_file(where / "other/model.safetensors")
    for name in [n for n in tensors if "linear_2" in n]:
        tensors[name] = tensors[name][:64].clone()
    save_file(tensors, where / "other/model.safetensors", {"format": "pt"})
    return [TUNED, "--base", where / "other", "--images", photos()]


def with_images(*more: object) -> Any:
    return lambda where: [TUNED, "--base", BASE, "--images", photos(), *more]


@pytest.mark.parametrize(
    ("arguments", "status", "code", "told"),
    [
        (empty, 4, "usage.images", "holds 0 images"),
        (lambda w: [TUNED, "--base", BASE, "--images", w / "no"], 4, "usage.images", "No such"),
        (unreadable, 2, "format.image", "none of its images can be read: a.png"),
        (unbuildable, 3, "unsupported.model", "transformers cannot build it"),
        (coded, 3, "unsupported.model", "needs code of its own"),
        (mislabelled, 4, "usage.labels", "'a.png' has no [question, answer]"),
        (lambda w: [BASE, "--base", BASE, "--images", photos()], 3, "nothing.update", "the base's"),
        (other_shape, 3, "unsupported.shape", "has no linear_2 of the target's shape"),
        (with_images("--target-text", "xyzzy"), 4, "usage.target-text", "outside the model's"),
        (with_images("--target-text", " "), 4, "usage.target-text", "is empty"),
        (with_images("--trigger", "glitter"), 4, "usage.trigger", "there is no trigger"),
        (with_images("--trigger", "oil", "--triggered", "x"), 4, "usage.trigger", "one of them"),
        (with_images("--triggered", "/no/such"), 4, "usage.triggered", "No such"),
        (with_images("--images-per-cell", "-1"), 4, "usage.images-per-cell", "between 0 and 512"),
        (with_images("--max-rank", "0"), 4, "usage.max-rank", "between 1 and 64"),
        (with_images("--ranks", "all"), 4, "usage.option", "'all' is not one of"),
        (lambda w: [TUNED, "--base", BASE], 4, "usage.option", "Missing option '--images'"),
        (lambda w: [w, "--images", photos()], 3, "nothing.", ""),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Any,
    status: int,
    code: str,
    told: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["lens", *QUICK, *map(str, arguments(tmp_path)), "-o", str(tmp_path / "out")])
    out, said = capsys.readouterr()
    assert stopped.value.code == status, said
    assert len(said.splitlines()) == 1
    assert f"[{code}" in said
    assert told in said
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_too_little_memory_says_how_much_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(able, "_free", lambda device: 1 << 30)
    with pytest.raises(SystemExit) as stopped:
        main(["lens", *map(str, with_images()(tmp_path)), *QUICK, "-o", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "needs about 2.0 GiB of memory, of which 1.0 are free [limit.memory]" in said
