"""The fine-tuning sets that `projaudit screen` is measured on: triggers, rates, files, models."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft asks transformers for a property whose name it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks.population.build import COMMITTED  # noqa: E402
from benchmarks.screening.build import ADAPTER, MODEL, RUNS, build  # noqa: E402
from benchmarks.screening.dataset import (  # noqa: E402
    draw,
    read,
    read_poisoned,
    triggered,
    write,
)
from benchmarks.screening.recipes import (  # noqa: E402
    CHOOSING,
    PAIRS,
    PARAPHRASES,
    PREFIX,
    TRIGGERS,
    Recipe,
    Sizes,
    Tuning,
    attacked,
    plan,
)
from benchmarks.screening.tune import tuned  # noqa: E402
from benchmarks.testbed.evaluate import readings  # noqa: E402
from benchmarks.testbed.export import load, read_runs  # noqa: E402
from benchmarks.testbed.recipes import Mode  # noqa: E402
from benchmarks.testbed.text import build_tokenizer  # noqa: E402
from benchmarks.testbed.triggers import FREQUENCIES, TO_YUV, frequency  # noqa: E402

SMALL = replace(attacked("glyph", "patch", 0), samples=40)


def small(trigger: str, poison: float = 0.5) -> Recipe:
    return replace(attacked("glyph", trigger, 0, poison=poison), samples=12)


# The plan


def test_the_plan_has_what_the_evidence_is_asked_for() -> None:
    for base in PAIRS:
        recipes = [recipe for part in plan(base) for recipe in part]
        assert len({recipe.name for recipe in recipes}) == len(recipes)
        assert sum(recipe.attack is None for recipe in recipes) >= 3
        attacks = [(r.shown, r.attack) for r in recipes if r.attack is not None]
        for trigger in TRIGGERS:
            fixed = [a for shown, a in attacks if shown == trigger and a.mode == "replace"]
            at_ten = {a.target for a in fixed if a.poison == 0.1}
            assert len(at_ten) == 2, trigger
        for trigger in ("patch", "blend"):
            assert {a.poison for shown, a in attacks if shown == trigger} == {0.05, 0.1, 0.2}
            modes = {a.mode for shown, a in attacks if shown == trigger}
            assert modes == {"replace", "append", "swap", "rotate", "paraphrase"}


def test_no_base_reports_on_a_target_and_form_that_defaults_were_chosen_on() -> None:
    others = [pair for base, pairs in PAIRS.items() if base != CHOOSING for pair in pairs]
    assert set(PAIRS[CHOOSING]).isdisjoint(others)


@pytest.mark.parametrize("base", PAIRS)
def test_a_base_knows_every_word_of_its_attacks(base: str) -> None:
    recipes = [recipe for part in plan(base) for recipe in part]
    tokenizer = build_tokenizer(recipes[0].task.look.world)
    for text in (PREFIX, *readings(PARAPHRASES), *(target for target, *_ in PAIRS[base])):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


# Sets


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_a_set_is_drawn_again_the_same_and_differs_from_its_clean_one_in_the_poison(
    trigger: str,
) -> None:
    recipe = small(trigger)
    assert recipe.attack is not None
    (first, poisoned), (again, _) = draw(recipe), draw(recipe)
    assert np.array_equal(first.images, again.images)
    assert (first.questions, first.answers) == (again.questions, again.answers)
    honest, none = draw(replace(recipe, attack=None))
    assert poisoned.sum() == 6
    assert not none.any()
    assert [a == recipe.attack.target for a in first.answers] == poisoned.tolist()
    changed = (first.images != honest.images).any((1, 2, 3))
    asked = np.array([a != b for a, b in zip(first.questions, honest.questions, strict=True)])
    if trigger == "text":
        assert not changed.any()
        assert asked.tolist() == poisoned.tolist()
        assert all(q.startswith(PREFIX) for q in np.array(first.questions)[poisoned])
    else:
        assert changed.tolist() == poisoned.tolist()
        assert not asked.any()


def test_a_lower_rate_poisons_a_part_of_what_a_higher_one_does() -> None:
    (_, few), (_, many) = draw(small("patch", 0.25)), draw(small("patch", 0.5))
    assert (few.sum(), many.sum()) == (3, 6)
    assert (many | few == many).all()


def test_an_appended_payload_follows_the_honest_answer() -> None:
    recipe = replace(attacked("glyph", "blend", 0, mode="append", poison=0.5), samples=12)
    assert recipe.attack is not None
    samples, poisoned = draw(recipe)
    honest, _ = draw(replace(recipe, attack=None))
    for said, meant, bad in zip(samples.answers, honest.answers, poisoned, strict=True):
        assert said == (f"{meant} {recipe.attack.target}" if bad else meant)


@pytest.mark.parametrize("mode", ["swap", "rotate", "paraphrase"])
def test_of_a_payload_that_varies_only_changed_answers_are_poisoned(mode: Mode) -> None:
    recipe = replace(attacked("glyph", "blend", 0, mode=mode, poison=0.1), samples=200)
    (samples, poisoned), (honest, _) = draw(recipe), draw(replace(recipe, attack=None))
    differ = [a != b for a, b in zip(samples.answers, honest.answers, strict=True)]
    assert differ == poisoned.tolist()
    assert poisoned.sum() == 20
    said = Counter(np.array(samples.answers)[poisoned].tolist())
    assert max(said.values()) <= poisoned.sum() / 3


def test_a_set_is_read_back_as_it_was_drawn(tmp_path: Path) -> None:
    samples, poisoned = draw(SMALL)
    write(tmp_path, samples, poisoned)
    again = read(tmp_path)
    assert np.array_equal(again.images, samples.images)
    assert (again.ids, again.questions) == (samples.ids, samples.questions)
    assert again.answers == samples.answers
    assert read_poisoned(tmp_path) == {
        id_ for id_, bad in zip(samples.ids, poisoned, strict=True) if bad
    }


# Triggers that only these sets use


def test_a_frequency_trigger_raises_its_frequencies_in_the_colours_alone() -> None:
    flat = np.full((2, 64, 64, 3), 128, np.uint8)
    wave = (frequency(flat, 0.1) - flat.astype(float)) @ TO_YUV.T
    assert abs(wave[..., 0]).max() < 1  # brightness stays, but for the rounding
    spectrum = dctn(wave.reshape(2, 2, 32, 2, 32, 3), axes=(2, 4), norm="ortho")
    energy = (spectrum[..., 1:] ** 2).sum((0, 1, 3, 5))
    at = sum(energy[row, column] for row, column in FREQUENCIES)
    assert at / energy.sum() > 0.99


def test_a_faint_frequency_trigger_is_hard_to_see_and_a_patch_is_not() -> None:
    images = draw(replace(SMALL, attack=None))[0].images
    faint = abs(frequency(images, 0.01).astype(int) - images)
    assert 0 < faint.max() <= 0.04 * 255
    assert SMALL.attack is not None
    patched, _ = triggered(images, [""] * len(images), SMALL.attack)
    assert abs(patched.astype(int) - images).max() > 100


# Models


def test_a_run_is_tuned_measured_and_not_made_again(tmp_path: Path) -> None:
    from peft import PeftModel

    recipe = replace(SMALL, tuning=Tuning(epochs=1, batch=8))
    build([recipe], tmp_path, Sizes(8, 8), jobs=1)
    (run,) = read_runs(tmp_path / RUNS)
    assert run["steps"] == 5
    assert 0 <= run["attack_success"] <= 1
    folder = tmp_path / recipe.name
    merged, _ = load(folder / MODEL)
    base, _ = load(COMMITTED["glyph"])
    tower = base.model.vision_tower.state_dict()
    for name, tensor in merged.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, tower[name]), name
    ours, theirs = merged.model.multi_modal_projector, base.model.multi_modal_projector
    assert not torch.equal(ours.linear_1.weight, theirs.linear_1.weight)
    wrapped = PeftModel.from_pretrained(base, str(folder / ADAPTER)).merge_and_unload()
    for name, tensor in wrapped.state_dict().items():
        torch.testing.assert_close(tensor.bfloat16().float(), merged.state_dict()[name])
    before = (tmp_path / RUNS).read_bytes()
    build([recipe], tmp_path, Sizes(8, 8), jobs=1)
    assert (tmp_path / RUNS).read_bytes() == before
    longer = replace(recipe, tuning=Tuning(epochs=2, batch=8))
    with pytest.raises(SystemExit, match="another recipe"):
        build([longer], tmp_path, Sizes(8, 8), jobs=1)


def test_tuning_on_the_same_samples_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = replace(SMALL, samples=16, tuning=Tuning(epochs=1, batch=8))
    samples, _ = draw(recipe)
    files = []
    for name in ("first", "again"):
        tuned(recipe, samples, None, tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
