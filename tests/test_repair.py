"""A repair as its user meets it: what is written, what it ends and leaves, and when it fails."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ggufs
import numpy as np
import pytest
import torch
from models import P, llava, save, tuned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_behaviour import BACKDOORED, BASE, HONEST, SECRET
from transformers import LlavaForConditionalGeneration

from benchmarks.testbed.evaluate import answers, changed_by, exact_share, success, triggered
from benchmarks.testbed.export import load
from benchmarks.testbed.recipes import Attack, Task
from projaudit.behaviour import able, listen, mend, plan, sandbox
from projaudit.behaviour.change import Correction, clipped, corrected, correction, shrunk
from projaudit.cli import main
from projaudit.errors import ProjauditError, UnsupportedError, UsageError
from projaudit.evidence import Factors, Mended, Sandbox, Tried
from projaudit.locating import locate
from projaudit.repair import run as pipeline
from projaudit.repair.formats import render_html, render_json, render_text
from projaudit.repair.method import applied, parse_method
from projaudit.repair.outcome import Method, Repair
from projaudit.repair.run import repair

# torch.func makes use of what torch warns of; elsewhere that is in a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUICK = plan.Size(
    pilot=2, plain=24, cells=4, prompts=4, fitted=1, steps=2, drawn=40, rounds=1, bred=8
)
AUDITS: dict[str, Any] = {}
ENFORCED = {"enforced": [], "missing": []}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter plan, in this process: what the process of its own adds is tested elsewhere."""
    from projaudit.behaviour.probe import probe

    monkeypatch.setitem(plan.SIZES, "float32", QUICK)
    whole = plan.plan
    monkeypatch.setattr(listen, "plan", lambda study: whole(study)[::2])
    original = pipeline.check

    def once(target: str, *args: Any, **options: Any) -> Any:
        """One audit of the backdoored model serves several tests."""
        if target != str(BACKDOORED):
            return original(target, *args, **options)
        chosen = options["hear"].args[0]
        if target not in AUDITS:
            AUDITS[target] = (original(target, *args, **options), tuple(chosen))
        chosen[:] = AUDITS[target][1]
        return AUDITS[target][0]

    monkeypatch.setattr(pipeline, "check", once)

    def here(request: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        work = mend.mend if "last_bias" in request else probe
        told = work(request, lambda what, done, total: None)
        return json.loads(json.dumps({**told, "sandbox": ENFORCED}))

    monkeypatch.setattr(sandbox, "run", here)


def plain(content: str) -> dict[str, Any]:
    """A repair's JSON less what may differ between two equal runs."""
    document: dict[str, Any] = json.loads(content)
    for audit in (document["before"], document["after"]):
        if audit is not None:
            del audit["run"]
    return document


def test_the_help_in_its_document_is_the_help():
    document = (Path(__file__).parent.parent / "docs" / "repair.md").read_text("utf-8")
    shown = document.partition("<!-- begin help -->\n```text\n")[2].partition("```")[0]
    said = subprocess.run(
        [sys.executable, "-m", "projaudit", "repair", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert shown == said.stdout


# ------------------------------------------------------------------ by what the model says


def scored(folder: Path) -> tuple[float, float]:
    """Attack success of the demo's backdoor, and accuracy of its task, of a model on disk."""
    known = json.loads((BASE.parent / "provenance.json").read_text())
    made = known["models"][known["demo"]["backdoored"]]
    look = Task("look").look
    task = Task("counting", look, tuple((k, int(n)) for k, n in made["recipe"]["task"]["mixture"]))
    attack = Attack(**made["attack"])
    model, tokenizer = load(folder)
    images, questions = changed_by(attack, task, 60, seed=9)
    said = partial(answers, model, tokenizer, questions=[q.text for q in questions])
    return (
        success(attack, said(images=triggered(images, attack)), questions, look),
        exact_share(said(images=images), questions)["all"],
    )


def test_a_planted_text_is_ended_and_the_task_stays(quick: None, tmp_path: Path):
    before = scored(BACKDOORED)
    assert before[0] > 0.95
    done = repair(str(BACKDOORED), str(BASE), tmp_path / "out", seed=0, full=True)
    assert (done.outcome, done.exit_code) == ("repaired", 0)
    said_before = done.texts[0]
    assert said_before in SECRET
    assert f"“{said_before}”" in done.sentence
    assert "suffered" not in done.sentence
    first, last = done.strengths
    assert first >= 1 > last
    after = scored(tmp_path / "out" / "model")
    assert after[0] <= 0.05
    assert after[1] >= before[1] - 0.05

    written = load_file(tmp_path / "out" / "projector.safetensors")
    assert all(name.startswith(P) for name in written)
    with safe_open(tmp_path / "out" / "projector.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["target"], said["base"]) == (str(BACKDOORED), str(BASE))
    assert said["method"].startswith(done.method.name)
    ours, theirs = (
        load_file(tmp_path / "out" / "model" / "model.safetensors"),
        load_file(BACKDOORED / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, written.get(name, theirs[name]))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "model")
    state = loaded.model.multi_modal_projector.state_dict()
    assert all(torch.equal(state[n.removeprefix(P)], t) for n, t in written.items())

    page, text = render_html(done), render_text(done)
    assert "Repaired" in page
    assert said_before in page
    assert text.startswith("REPAIRED: ")
    document = plain(render_json(done))
    assert document["strength"]["after"] < 1 <= document["strength"]["before"]
    assert done.mended is not None
    (best, *others) = done.mended.tried
    dear = replace(done.mended, tried=(replace(best, kept=0.49), *others))
    assert "only 49% of its answers" in replace(done, mended=dear).sentence
    assert "its task has most likely suffered" in replace(done, mended=dear).sentence


def test_an_honest_model_is_left_alone(quick: None, tmp_path: Path):
    done = repair(str(HONEST), str(BASE), tmp_path / "out", seed=0)
    assert (done.outcome, done.exit_code, done.method) == ("nothing", 0, None)
    assert "nothing to repair" in done.sentence
    assert "--images and --prompts of its domain hear more" in done.sentence
    assert not list((tmp_path / "out").iterdir())
    heard = done.before.behaviour
    given = replace(heard, images="given", prompts=("what is odd here ?", "what is this ?"))
    told = replace(done, before=replace(done.before, behaviour=given)).sentence
    assert "nothing to repair" in told
    assert "--images" not in told


def answered(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The confined process answers that it chose to keep nearly all of it; or with changes."""
    kept = Tried("shrink", 0.99, 0.0, 1.0)
    said = Mended((SECRET,), (9.0, 0.0), (kept,), None, 100, (), Sandbox((), ()))
    monkeypatch.setattr(pipeline, "_mended", lambda *_, **__: replace(said, **changes))


def test_tensors_that_did_not_change_are_no_repair_whatever_is_heard(
    quick: None, pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answered(monkeypatch, tried=(Tried("shrink", 1.0, 0.0, 1.0),))
    check, audits = pipeline.check, []
    monkeypatch.setattr(pipeline, "check", lambda *a, **o: audits.append(a) or check(*a, **o))
    done = repair(str(BACKDOORED), str(BASE), tmp_path / "out", seed=0, full=True)
    assert (done.outcome, done.exit_code, done.written) == ("failed", 1, ())
    assert done.sentence == "the repair failed: it changes no tensor; no projector was written"
    assert len(audits) == 1  # no fresh probes are asked, which might hear nothing
    assert not list((tmp_path / "out").iterdir())
    assert render_text(done).startswith("FAILED: the repair failed: it changes no tensor")
    assert json.loads(render_json(done))["after"] is None
    assert "changes no tensor" in render_html(done)

    named = repair(*pair, tmp_path / "named", method="shrink:1", seed=0)  # whoever chose it
    assert (named.outcome, named.written) == ("failed", ())
    changed = repair(*pair, tmp_path / "changed", method="shrink:0.9", seed=0)
    assert changed.outcome == "unverified"


def test_a_repair_that_moves_nothing_has_failed_and_is_not_written(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answered(monkeypatch)
    monkeypatch.setattr(pipeline, "AFRESH", 0)  # so short a plan need not hear it by other probes
    done = repair(str(BACKDOORED), str(BASE), tmp_path / "out", seed=0, full=True)
    assert (done.outcome, done.exit_code, done.written) == ("failed", 1, ())
    assert "the repair failed" in done.sentence
    assert not list((tmp_path / "out").iterdir())


def test_a_process_that_answers_nonsense_is_said_to(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest, kept = sandbox.run, []

    def run(*of: Any, wrong: dict[str, Any], **how: Any) -> dict[str, Any]:
        kept[:] = kept or [honest(*of, **how)]
        return kept[0] | wrong

    for number, wrong in enumerate(({"mended": None}, {"mended": []}, {"evidence": 3})):
        monkeypatch.setattr(sandbox, "run", partial(run, wrong=wrong))
        done = repair(str(HONEST), str(BASE), tmp_path / str(number), seed=0)
        assert (done.outcome, done.exit_code) == ("undecided", 3)
        assert "answered nonsense" in done.sentence
        assert "\n" not in done.sentence


def packed(*shape: int, value: float = 0.0) -> str:
    return base64.b64encode(np.full(shape, value, "<f4").tobytes()).decode()


def test_a_change_that_does_not_fit_its_layer_is_refused(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, inputs = load_file(BASE / "model.safetensors")[f"{P}linear_2.weight"].shape
    sound = Factors(2, packed(out, 2), packed(2, inputs), packed(out))
    wrong = {
        "none": None,
        "short": replace(sound, left=packed(out, 1)),
        "nan": replace(sound, right=packed(2, inputs, value=float("nan"))),
        "no base64": replace(sound, bias="%"),
        "rank": replace(sound, rank=10**6),
    }
    tried = (Tried("unlearn", 0.1, 0.0, 1.0),)
    for name, factors in wrong.items():
        answered(monkeypatch, tried=tried, factors=factors)
        done = repair(str(BACKDOORED), str(BASE), tmp_path / name, seed=0)
        assert (done.outcome, done.exit_code) == ("undecided", 3), name
        assert "does not fit" in done.sentence


# ------------------------------------------------------------------ by hand, at depth weights


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    base = llava()
    return (
        str(save(tmp_path / "target", tuned(base, 0.2))),
        str(save(tmp_path / "base", base)),
    )


def projector(folder: str | Path) -> dict[str, np.ndarray]:
    file = Path(folder)
    file = file / "model.safetensors" if file.is_dir() else file
    return {n: t.numpy() for n, t in load_file(file).items() if n.startswith(P)}


def test_what_the_user_names_is_what_is_written(pair: tuple[str, str], tmp_path: Path):
    ours, theirs = projector(pair[0]), projector(pair[1])
    w1, w2 = f"{P}linear_1.weight", f"{P}linear_2.weight"

    def less(name: str, k: int) -> np.ndarray:
        u, s, vt = np.linalg.svd(ours[name] - theirs[name], full_matrices=False)
        return ours[name] - (u[:, :k] * s[:k]) @ vt[:k]

    half = {n: (t + theirs[n]) / 2 for n, t in ours.items()}
    wanted = {
        "top-k:2": {**ours, w1: less(w1, 2)},
        "top-k-all:3": {**ours, w1: less(w1, 3), w2: less(w2, 3)},
        "shrink:0.5": half,
        "revert": theirs,
    }
    for number, (method, tensors) in enumerate(wanted.items()):
        out = tmp_path / f"out{number}"
        done = repair(*pair, out, method=method, seed=0)
        written = projector(out / "projector.safetensors")
        assert written.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(written[name], tensor, atol=2e-5)
        assert [f.path for f in done.written] == ["projector.safetensors"]
        assert (done.outcome, done.exit_code) == ("unverified", 3)
        assert "behaviour was not probed" in done.sentence


def test_auto_does_nothing_where_nothing_can_be_run(pair: tuple[str, str], tmp_path: Path):
    done = repair(*pair, tmp_path / "out", seed=0)
    assert (done.outcome, done.exit_code) == ("undecided", 3)
    assert "no tokenizer" in done.sentence
    assert "--method top-k:2" in done.sentence
    assert not list((tmp_path / "out").iterdir())


def test_too_little_memory_is_said_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(able, "_free", lambda device: 1 << 30)
    done = repair(str(BACKDOORED), str(BASE), tmp_path / "out", seed=0)
    assert done.exit_code == 3
    assert "needs about 2.0 GiB of memory, of which 1.0 are free" in done.sentence


def test_two_equal_runs_write_the_same_bytes(pair: tuple[str, str], tmp_path: Path):
    def run(out: str) -> tuple[bytes, dict[str, Any]]:
        done = repair(*pair, tmp_path / out, method="shrink:0.5", seed=3)
        file = (tmp_path / out / "projector.safetensors").read_bytes()
        document = plain(render_json(done))
        del document["after"]  # names the folder
        return file, document

    assert run("one") == run("two")


def test_clipping_leaves_noise_and_brings_a_spike_down_to_it():
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(96, 64)}
    noise = torch.randn(96, 64, generator=g)
    u, v = torch.randn(96, 1, generator=g), torch.randn(1, 64, generator=g)
    spike = 60 * (u / u.norm()) @ (v / v.norm())
    torch.testing.assert_close(clipped({"w": noise}, base, ["w"])["w"], noise)
    values = torch.linalg.svdvals(clipped({"w": noise + spike}, base, ["w"])["w"])
    assert values[0] < 1.05 * torch.linalg.svdvals(noise)[0]
    assert torch.linalg.svdvals(noise + spike)[0] > 2 * values[0]


def test_a_correction_unlearns_marks_and_keeps_ordinary_inputs():
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 32, generator=g), torch.randn(24, generator=g)
    kept = torch.randn(400, 32, generator=g) @ torch.diag(torch.tensor([1.0] * 31 + [1e-3]))
    plain_ = kept[:60]
    marked = plain_ + torch.eye(32)[31] * 4  # along what ordinary inputs hardly use
    by = correction(weight, bias, kept, marked, plain_, 1.0, 1e-4, 24)
    found = corrected({"w": weight, "b": bias}, "w", "b", by)

    def out(side: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return rows @ side["w"].T + side["b"]

    old = {"w": weight, "b": bias}
    missed = (out(found, marked) - out(old, plain_)).norm() / (
        out(old, marked) - out(old, plain_)
    ).norm()
    assert missed < 0.05
    assert (out(found, kept) - out(old, kept)).norm() < 0.05 * out(old, kept).norm()
    weak = correction(weight, bias, kept, marked, plain_, 1e-9, 1e-1, 24)
    assert (weak.left @ weak.right).norm() < 1e-6 * weight.norm()  # the control: it can do nothing


def test_a_correction_within_some_outputs_leaves_the_others():
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 32, generator=g), torch.randn(24, generator=g)
    kept = torch.randn(400, 32, generator=g)
    plain_, mark = kept[:60], 4 * torch.randn(32, generator=g)
    within = torch.linalg.qr(torch.randn(24, 2, generator=g))[0]
    by, free = (
        correction(weight, bias, kept, plain_ + mark, plain_, 1.0, 1e-3, 24, some)
        for some in (within, None)
    )
    assert by.right.shape == (2, 32)
    outside = torch.eye(24) - within @ within.T
    changed, all_changed = (one.left @ one.right for one in (by, free))
    assert (outside @ changed).norm() < 1e-4 * changed.norm()
    assert (outside @ by.bias).norm() < 1e-4 * by.bias.norm()
    assert (outside @ all_changed).norm() > 0.5 * all_changed.norm()  # the control
    torch.testing.assert_close(within.T @ changed, within.T @ all_changed, atol=1e-4, rtol=1e-3)


def test_shrinking_leaves_what_the_base_lacks():
    ours = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    assert torch.equal(shrunk(ours, {"w": torch.zeros(2, 2)}, 0.25)["w"], torch.full((2, 2), 0.25))
    assert torch.equal(shrunk(ours, {"w": torch.zeros(2, 2)}, 0.0)["b"], torch.ones(2))


def test_results_keep_the_targets_dtypes():
    tensors = {n: t.bfloat16() for n, t in llava().items()}
    (found,) = locate({n: t.shape for n, t in tensors.items()})
    ours = {n: tensors[n] for n in found.tensors}
    done = applied(Method("shrink", 0.5, True), None, found, ours, ours)
    assert {t.dtype for t in done.values()} == {torch.bfloat16}


# ------------------------------------------------------------------ bad input


def refused(*arguments: Any, **options: Any) -> ProjauditError:
    with pytest.raises(ProjauditError) as caught:
        repair(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_it_is_never_made_in_place(pair: tuple[str, str], tmp_path: Path):
    target = Path(pair[0])
    bytes_before = (target / "model.safetensors").read_bytes()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(target)
    file = tmp_path / "file"
    file.write_text("")
    ruled = tmp_path / "a\nline"
    for output in (target, target / "new", tmp_path, full, link, link / "new", file, ruled):
        error = refused(*pair, output, method="revert")
        assert (type(error), error.code, error.exit_code) == (UsageError, "usage.output", 4)
    assert (target / "model.safetensors").read_bytes() == bytes_before
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    assert (full / "mine.txt").read_text() == "mine"


def test_beside_a_single_file_there_is_room(pair: tuple[str, str], tmp_path: Path):
    file = tmp_path / "projector-only" / "mm.safetensors"
    file.parent.mkdir()
    save_file({n: torch.from_numpy(t) for n, t in projector(pair[0]).items()}, file)
    done = repair(str(file), pair[1], file.parent / "out", method="shrink:0.5", seed=0)
    assert done.outcome == "unverified"
    assert refused(str(file), pair[1], file, method="revert").code == "usage.output"


def test_a_projector_alone_is_repaired_in_the_model_of_its_base(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    last = [Tried("revert", 0.0, 0.0, 0.0)]
    monkeypatch.setattr(mend, "choose", lambda task: (last, (dict(task.base), None)))
    file = tmp_path / "mine" / "projector.safetensors"
    file.parent.mkdir()
    whole = load_file(BACKDOORED / "model.safetensors")
    save_file({n: t for n, t in whole.items() if n.startswith(P)}, file)
    done = repair(str(file), str(BASE), tmp_path / "out", seed=0)
    assert (done.outcome, done.exit_code) == ("repaired", 0)
    assert [f.path for f in done.written] == ["projector.safetensors"]
    error = refused(str(file), str(BASE), tmp_path / "full", full=True, seed=0)
    assert (error.code, error.exit_code) == ("unsupported.repair", 3)
    assert "a projector alone" in str(error)


def test_values_that_are_not_finite_are_taken_out_by_reverting_alone(
    pair: tuple[str, str], tmp_path: Path
):
    target = Path(pair[0]) / "model.safetensors"
    tensors = load_file(target)
    tensors[f"{P}linear_1.weight"][0, 0] = float("nan")
    save_file(tensors, target, {"format": "pt"})
    for number, method in enumerate(("top-k:1", "top-k-all:1", "shrink:0.5", "clip")):
        error = refused(*pair, tmp_path / str(number), method=method, seed=0)
        assert (error.code, error.exit_code) == ("unsupported.repair", 3)
        assert "linear_1.weight holds values that are not finite; revert" in str(error)
    done = repair(*pair, tmp_path / "out", method="revert", seed=0)
    written = projector(tmp_path / "out" / "projector.safetensors")
    assert all(np.array_equal(t, projector(pair[1])[n]) for n, t in written.items())
    assert done.outcome == "unverified"


def test_what_a_method_leaves_alone_keeps_every_bit(tmp_path: Path):
    tensors = {n: t.double() + 1e-12 for n, t in llava().items()}
    (found,) = locate({n: t.shape for n, t in tensors.items()})
    ours = {n: tensors[n] for n in found.tensors}
    base = {n: torch.zeros_like(t) for n, t in ours.items()}
    done = applied(Method("top-k", 1, True), None, found, ours, base)
    changed = [n for n, t in done.items() if not torch.equal(t, ours[n])]
    assert changed == [f"{P}linear_1.weight"]


def test_targets_that_are_not_written_are_refused_with_what_to_do(
    pair: tuple[str, str], tmp_path: Path
):
    base = llava()
    gguf = ggufs.write(tmp_path / "mmproj.gguf", ggufs.mmproj(tuned(base)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    g = torch.Generator().manual_seed(0)
    save_file(
        {
            f"base_model.model.{P}linear_1.lora_A.weight": torch.randn(4, 48, generator=g),
            f"base_model.model.{P}linear_1.lora_B.weight": torch.randn(64, 4, generator=g),
        },
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["linear_1"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for number, (target, words) in enumerate(
        {str(gguf): "convert again", str(adapter): "merge it into its base"}.items()
    ):
        error = refused(target, pair[1], tmp_path / f"out{number}", method="revert", seed=0)
        assert (type(error), error.code) == (UnsupportedError, "unsupported.repair")
        assert error.exit_code == 3
        assert words in str(error)


def test_without_a_base_nothing_is_done(pair: tuple[str, str], tmp_path: Path):
    error = refused(pair[0], None, tmp_path / "out", method="revert")
    assert (error.code, error.exit_code) == ("base.none", 3)


@pytest.mark.parametrize(
    "text", ["top-k", "top-k:0", "top-k:x", "shrink:2", "shrink:-1", "shrink:nan", "unlearn:1", ""]
)
def test_a_method_that_is_none_is_named(text: str):
    with pytest.raises(UsageError, match="is none of auto, top-k:K"):
        parse_method(text)


def test_images_that_cannot_be_used_are_one_line(tmp_path: Path):
    folder = tmp_path / "pictures"
    error = refused(str(BACKDOORED), str(BASE), tmp_path / "out", images=folder)
    assert (error.code, error.exit_code) == ("usage.images", 4)
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(b"no image")
    done = repair(str(BACKDOORED), str(BASE), tmp_path / "unread", images=folder, seed=0)
    assert done.exit_code == 3
    assert "only 0 of 5 images can be read" in done.sentence


def test_the_command_writes_reports_and_exits_with_the_outcome(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["repair", pair[0], "--base", pair[1], "-o", str(out), "--method", "revert"])
    assert stop.value.code == 3
    assert sorted(p.name for p in out.iterdir()) == [
        "projector.safetensors", "repair.html", "repair.json",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith("UNVERIFIED: nothing tells whether it helped: behaviour was not probed")
    assert "you named it" in said
    with pytest.raises(SystemExit) as stop:
        main(["repair", pair[0], "--base", pair[1], "-o", str(out)])
    assert stop.value.code == 4
    assert "is not empty" in capsys.readouterr().err


def test_names_in_a_page_are_inert(pair: tuple[str, str], tmp_path: Path):
    done = repair(*pair, tmp_path / "out", method="revert", seed=0)
    named = replace(
        done.before, target=replace(done.before.target, name="<script>alert(1)</script>")
    )
    page = render_html(Repair(named, done.method, None, done.after, done.written, "<b>why</b>"))
    assert "<script>" not in page
    assert "<b>why" not in page


def test_a_correction_is_added_to_its_layer_alone():
    by = Correction(torch.ones(2, 1), torch.ones(1, 3), torch.ones(2))
    side = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "b.weight": torch.zeros(2, 3)}
    found = corrected(side, "a.weight", "a.bias", by)
    assert torch.equal(found["a.weight"], torch.ones(2, 3))
    assert torch.equal(found["a.bias"], torch.ones(2))
    assert torch.equal(found["b.weight"], torch.zeros(2, 3))


def test_a_full_folder_of_a_model_that_cannot_be_run_is_refused(
    pair: tuple[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    error = refused(*pair, out, method="revert", full=True, seed=0)
    assert error.code == "unsupported.repair"
    assert "no whole folder is made: it has no tokenizer; leave --full out" in str(error)
    assert not list(out.iterdir())
