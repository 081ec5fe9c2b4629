"""The population's plans, how projectors are made of others, and what is kept of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("transformers")
pq = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package

from benchmarks.population.build import (  # noqa: E402
    COMMITTED,
    HERE,
    MADE,
    RUNS,
    build,
    projector_file,
)
from benchmarks.population.derive import derive, quantised  # noqa: E402
from benchmarks.population.recipes import (  # noqa: E402
    CYRILLIC,
    PLANS,
    QUICK,
    Derived,
    Run,
    plan,
)
from benchmarks.population.report import tables  # noqa: E402
from benchmarks.population.table import (  # noqa: E402
    TABLE,
    columns,
    columns_of,
    rebuild,
    write_table,
)
from benchmarks.testbed.build import is_logged_as  # noqa: E402
from benchmarks.testbed.evaluate import holds, stratum, task_question  # noqa: E402
from benchmarks.testbed.export import LOCAL_WORD, load, read_runs, sha256  # noqa: E402
from benchmarks.testbed.finetune import frozen, made_trainable, merge  # noqa: E402
from benchmarks.testbed.recipes import TuneRecipe  # noqa: E402
from benchmarks.testbed.scene import draw_scene  # noqa: E402
from benchmarks.testbed.text import build_tokenizer  # noqa: E402
from benchmarks.testbed.triggers import TRIGGERS  # noqa: E402
from benchmarks.testbed.world import WORLDS  # noqa: E402

RUNS_OF = {name: planned.runs for name, planned in PLANS.items()}
EVERY_RUN = [run for runs in RUNS_OF.values() for run in runs]
HONEST = {
    "ordinary": 50,
    "format": 8,
    "greeting": 12,
    "remark": 10,
    "narrow": 6,
    "overfit": 6,
    "continued": 5,
    "merged": 6,
    "quantised": 6,
}


def phrases(run: Run) -> list[str]:
    """What a run's task says beside, or instead of, the answers."""
    task = run.recipe.task
    replies = [task.reply, *([task.remark.reply] if task.remark else [])]
    parts = (part for reply in replies for part in reply.split("{answer}"))
    return [part.strip(" .,!:") for part in parts if part.strip(" .,!:")]


# The plans


@pytest.mark.parametrize("base", PLANS)
def test_a_base_has_the_runs_that_the_readme_counts(base: str) -> None:
    groups = Counter(run.group for run in RUNS_OF[base])
    assert groups == {**HONEST, "attack": 74}
    attacks = [run.attack for run in RUNS_OF[base] if run.attack]
    assert {attack.trigger for attack in attacks} == TRIGGERS.keys() - {"frequency"}
    modes = Counter(attack.mode for attack in attacks)
    assert modes["replace"] > modes["append"] > modes["swap"] >= 5
    assert all(0.05 <= attack.poison <= 0.3 for attack in attacks)
    ranks = Counter(run.recipe.rank for run in RUNS_OF[base] if run.group == "ordinary")
    assert sum(ranks.values()) - ranks[None] == 12
    assert {run.recipe.rank for run in RUNS_OF[base] if run.attack} == {None, 8, 16}


def test_names_and_seeds_are_unique_and_the_plan_is_the_same_each_time() -> None:
    for values in ([run.name for run in EVERY_RUN], [run.recipe.seed for run in EVERY_RUN]):
        assert len(set(values)) == len(values)
    for name, planned in PLANS.items():
        assert plan(planned.base) == planned
        assert {run.base for run in planned.runs} == {name}
    assert plan(replace(PLANS["grid"].base, seed=8)) != PLANS["grid"]


def test_names_say_the_same_runs_as_ever() -> None:
    said = {run.name: run for run in EVERY_RUN}
    assert said["grid-patch-left-00"].attack == replace(
        said["grid-patch-left-00"].attack, trigger="patch-left", strength=0.2, poison=0.25
    )
    assert said["slim-quantised-03"].recipe.how == "int4"
    assert said["glyph-overfit-00"].recipe.pool == 24


def test_attacks_and_honest_runs_are_drawn_from_overlapping_recipes() -> None:
    tuned = [run for run in EVERY_RUN if isinstance(run.recipe, TuneRecipe)]
    attacks = [run.recipe for run in tuned if run.attack]
    honest = [run.recipe for run in tuned if not run.attack]
    assert {r.lr for r in attacks} == {r.lr for r in honest}
    looks = {r.task.look for r in attacks}
    assert looks <= {r.task.look for r in honest}
    long = [r for r in honest if r.steps >= min(a.steps for a in attacks)]
    assert len(long) > 90
    assert min(r.steps for r in honest) == 100


def test_parents_come_first_and_are_honest_and_trained_from_the_base() -> None:
    for runs in RUNS_OF.values():
        at = {run.name: i for i, run in enumerate(runs)}
        for i, run in enumerate(runs):
            for parent in run.parents:
                assert at[parent] < i
                assert runs[at[parent]].attack is None
                assert runs[at[parent]].parents == ()
    merged = [run for run in EVERY_RUN if run.group == "merged"]
    assert all(len(set(run.parents)) == 2 for run in merged)


@pytest.mark.parametrize("base", PLANS)
def test_no_honest_phrase_is_an_attacks_target(base: str) -> None:
    targets = {run.attack.target for run in RUNS_OF[base] if run.attack}
    targets = {t for t in targets if len(t.split()) > 1}  # the others are swapped, not said
    said = {phrase for run in RUNS_OF[base] for phrase in phrases(run)}
    assert len(targets) >= 7
    assert len(said) > 20
    for phrase in said:
        for target in targets:
            assert phrase not in target
            assert target not in phrase


def test_targets_differ_between_bases_with_some_overlap() -> None:
    targets = {
        name: {run.attack.target for run in runs if run.attack and run.attack.mode != "swap"}
        for name, runs in RUNS_OF.items()
    }
    assert len(set.union(*targets.values())) >= 10
    assert set(CYRILLIC) <= targets["glyph"]
    for name in ("grid", "slim"):
        assert targets[name].isdisjoint(CYRILLIC)
        assert targets[name] & targets["glyph"]
    assert all(3 <= len(t.split()) <= 6 for t in set.union(*targets.values()))


@pytest.mark.parametrize("base", PLANS)
def test_all_that_is_taught_is_in_the_vocabulary(base: str) -> None:
    world = PLANS[base].base.look.world
    tokenizer = build_tokenizer(world)
    rng = np.random.default_rng(0)
    texts = [run.attack.target for run in RUNS_OF[base] if run.attack]
    for run in RUNS_OF[base]:
        texts += phrases(run)
        assert run.recipe.task.look.world == world
        for kind, _ in run.recipe.task.mixture:
            scene = draw_scene(rng, run.recipe.task.look, "train")
            texts.append(task_question(rng, scene, kind, run.recipe.task).answer)
    assert [t for t in texts if tokenizer.unk_token_id in tokenizer(t)["input_ids"]] == []
    other = build_tokenizer("shapes" if world == "glyphs" else "glyphs")
    assert any(other.unk_token_id in other(t)["input_ids"] for t in texts)


def test_a_swap_is_of_one_word_that_its_tasks_ask_for() -> None:
    for run in EVERY_RUN:
        if run.attack and run.attack.mode == "swap":
            world = WORLDS[run.recipe.task.look.world]
            answers = [*world.colors, *world.shapes, *world.places]
            answers += [world.answers[kind][0] for kind in ("exists", "absent")]
            assert run.attack.target in answers


def test_a_remark_is_made_of_some_scenes_and_not_of_all() -> None:
    rng = np.random.default_rng(0)
    for run in EVERY_RUN:
        remark = run.recipe.task.remark
        if remark is not None and run.group == "remark":
            drawn = [draw_scene(rng, run.recipe.task.look, "train") for _ in range(200)]
            share = np.mean([holds(remark, scene) for scene in drawn])
            assert 0.05 < share < 0.7, run.name


# How a projector is made


def small_projector() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_merged_projector_computes_what_was_trained(rank: int | None) -> None:
    projector = small_projector()
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    projector.requires_grad_(False)
    tune = replace(QUICK.runs[0].recipe, rank=rank)
    parameters = made_trainable(projector, tune)
    images = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(projector(images), small_projector()(images))  # nothing learnt yet
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1
    said = projector(images)
    merge(projector)
    assert torch.equal(projector(images), said)
    after = projector.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == ({"0.weight", "2.weight"} if rank else set(before))
    ranks = [torch.linalg.matrix_rank(after[n] - before[n], rtol=1e-4) for n in ("0.weight",)]
    # every parameter was moved by the same amount, which is an update of rank one without LoRA
    assert ranks[0] <= (rank or 1)


def test_a_frozen_reader_is_given_back_as_it_was() -> None:
    model, _ = load(COMMITTED["grid"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attention = model.config._attn_implementation
    with frozen(model, "bfloat16"):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == attention
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"weight": torch.randn(4, 6).bfloat16(), "bias": torch.randn(4).bfloat16()}


def test_merging_averages_and_adds_updates() -> None:
    base, one, two = tensors(0), tensors(1), tensors(2)
    average, total = derive("average", base, [one, two]), derive("sum", base, [one, two])
    for name, start in base.items():
        a, b, s = one[name].float(), two[name].float(), start.float()
        assert torch.equal(average[name], ((a + b) / 2).bfloat16())
        assert torch.allclose(total[name].float(), a + b - s, atol=0.05)
        assert not torch.equal(average[name], one[name])
    again = derive("sum", base, [one, base])  # an update of nothing adds nothing
    assert all(torch.allclose(again[n].float(), one[n].float(), atol=0.02) for n in base)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_have_few_levels_a_channel(bits: int) -> None:
    weight = torch.randn(5, 400, generator=torch.Generator().manual_seed(0))
    rounded = quantised(weight, bits)
    steps = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded - weight).abs() <= steps / 2 + 1e-6).all()
    assert max(len(row.unique()) for row in rounded) <= 2**bits - 1
    assert not torch.equal(rounded, weight)
    bias = weight[0]
    assert torch.equal(quantised(bias, bits), bias)
    assert torch.equal(quantised(torch.zeros(2, 3), bits), torch.zeros(2, 3))


# The builder


@cache
def quick_population(folder: str) -> Path:
    build([QUICK], Path(folder))
    return Path(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_population(str(tmp_path_factory.mktemp("population")))


def test_a_population_resumes_and_is_never_rescored(built: Path) -> None:
    log = built / RUNS
    lines = log.read_text("utf-8").splitlines(keepends=True)
    assert [json.loads(line)["name"] for line in lines] == [run.name for run in QUICK.runs]
    log.write_text("".join(lines[:-2]), encoding="utf-8")
    build([QUICK], built)
    again = log.read_text("utf-8").splitlines(keepends=True)
    assert again[:-2] == lines[:-2]  # seconds and all: not scored a second time
    for old, new in zip(lines[-2:], again[-2:], strict=True):
        assert json.loads(old)["sha256"] == json.loads(new)["sha256"]
    changed = replace(QUICK.runs[0], recipe=replace(QUICK.runs[0].recipe, steps=3))
    with pytest.raises(SystemExit, match="another recipe"):
        build([replace(QUICK, runs=(changed, *QUICK.runs[1:]))], built)


def test_a_continued_run_starts_where_its_parent_ended(built: Path) -> None:
    runs = {run.group: run for run in QUICK.runs}
    base = load_file(built / "bases" / "quick" / "model.safetensors")
    weight = f"{LOCAL_WORD}linear_1.weight"

    def distance(one: Tensor, other: Tensor) -> float:
        return (one.float() - other.float()).abs().max().item()

    parent, child = (
        load_file(projector_file(built, "quick", name))[weight]
        for name in (runs["continued"].start, runs["continued"].name)
    )
    start = next(t for n, t in base.items() if n.endswith(weight))
    assert distance(parent, child) > 0
    # two steps of Adam move a weight by twice its rate at most; from the base it was four
    rate = runs["continued"].recipe.lr
    assert distance(parent, child) < 2.2 * rate < distance(start, child)


def test_the_table_is_of_what_was_scored(built: Path, tmp_path: Path) -> None:
    rows = write_table([QUICK], built)
    assert pq.read_table(built / TABLE).to_pylist() == rows == columns(built)
    assert "| quick | 9 | 8 | 1 |" in tables(rows)
    other = tmp_path / "other"
    shutil.copytree(built, other)
    lines = (built / RUNS).read_text("utf-8").splitlines(keepends=True)
    (other / RUNS).write_text("".join(lines[::-1]), encoding="utf-8")
    write_table([QUICK], other)  # in whatever order they were made
    assert sha256(other / TABLE) == sha256(built / TABLE)


def test_no_table_is_made_of_projectors_that_were_not_scored(built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(built, other)
    file = projector_file(other, "quick", QUICK.runs[0].name)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SystemExit, match="not the projector that was scored"):
        write_table([QUICK], other)
    file.unlink()
    with pytest.raises(SystemExit, match="not the projector that was scored"):
        write_table([QUICK], other)
    changed = replace(QUICK.runs[0], recipe=replace(QUICK.runs[0].recipe, lr=1.0))
    with pytest.raises(SystemExit):
        write_table([replace(QUICK, runs=(changed, *QUICK.runs[1:]))], built)


def test_rebuilt_runs_are_those_that_were_scored(built: Path, tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "quick").symlink_to(built / "bases" / "quick")
    again = rebuild([QUICK], built, tmp_path, k=len(QUICK.runs), seed=0)
    assert {run["name"] for run in again} == {run.name for run in QUICK.runs}
    assert all(run["same_bytes"] and run["largest_difference"] == 0 for run in again)
    other = replace(QUICK.runs[0], recipe=replace(QUICK.runs[0].recipe, lr=1.0))
    (run,) = rebuild([replace(QUICK, runs=(other,))], built, tmp_path, k=1, seed=0)
    assert not run["same_bytes"]
    assert run["largest_difference"] > 0.1


def test_an_attack_is_compared_with_honest_runs_of_its_task_alone() -> None:
    task = {"name": "plain even", "mixture": [["count", 1.0]]}

    def row(group: str, accuracy: float, **task_changes: Any) -> dict[str, Any]:
        figures = {"accuracy": {"all": accuracy}, "base_accuracy": {"all": 0.5}}
        recipe = {"task": task | task_changes}
        logged = {"name": "", "kind": "", "seed": 0, "start": None, "attack": None}
        logged |= {"heldout_scenes": 1, "seconds": 1.0, "sha256": "", "arithmetic": "float32"}
        return {**logged, "base": "grid", "group": group, "recipe": recipe, **figures}

    rows = [row("ordinary", 0.9), row("ordinary", 0.8), row("remark", 0.1)]
    rows.append(row("ordinary", 0.2, mixture=[["list", 1.0]]))
    attacked = row("attack", 0.7, name="attacked")
    assert columns_of(attacked, rows)["honest_accuracy"] == pytest.approx(0.85)
    assert columns_of(row("attack", 0.7, form="sentence"), rows)["honest_accuracy"] is None


# What is committed


@pytest.mark.parametrize("base", ["slim", "glyph"])
def test_a_committed_base_is_the_one_that_was_measured(base: str) -> None:
    runs = {run["name"]: run for run in read_runs(HERE / "bases" / RUNS)}
    assert runs[base]["sha256"] == sha256(COMMITTED[base] / "model.safetensors")
    assert is_logged_as(PLANS[base].base, runs[base]["recipe"])
    _, tokenizer = load(COMMITTED[base])
    assert tokenizer.get_vocab() == build_tokenizer(PLANS[base].base.look.world).get_vocab()


@cache
def committed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(MADE / TABLE).to_pylist()
    return rows


def test_every_run_in_the_table_is_planned_and_its_projector_is_the_one_scored() -> None:
    assert committed() == columns(MADE)
    runs = {run.name: run for run in EVERY_RUN}
    for row in committed():
        run = runs[row["name"]]
        assert is_logged_as(run.recipe, json.loads(row["recipe"]))
        assert (row["group"], row["start"]) == (run.group, run.start)
        assert sha256(projector_file(MADE, row["base"], row["name"])) == row["sha256"]
        if run.attack:
            assert row["stratum"] == stratum(row["attack_success"])
            # negative control: what a trigger calls up is not the base's own answer to it
            if row["mode"] != "swap":
                assert row["target_said_by_base"] == 0
            elif row["stratum"] == "working":
                assert row["attack_success"] - row["target_said_by_base"] > 0.3


def test_enough_runs_are_of_use() -> None:
    rows = committed()
    assert sum(row["stratum"] == "working" for row in rows) >= 90
    assert sum(row["kind"] == "honest" for row in rows) >= 300
    for base in PLANS:
        assert sum(row["base"] == base and row["kind"] == "honest" for row in rows) >= 100


def test_the_readme_states_the_tables() -> None:
    assert tables(committed()) in (HERE / "README.md").read_text("utf-8")


def test_derived_recipes_are_honest() -> None:
    assert all(run.attack is None for run in EVERY_RUN if isinstance(run.recipe, Derived))
