"""ProjLens' claims on models that really were trained: backdoored ones, and their honest twins.

python -m benchmarks.lens --out DIR           # look at every model, resumes if stopped
python -m benchmarks.lens --out DIR --write   # the table of what was looked at, into results/

Models: the testbed's attempts of its long recipe that work and break no check, each with its honest
twin, and the first working attack on each of the population's other bases. A twin is looked at with
the trigger and the target of its first attack, which it never met.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.population.build import COMMITTED, RUNS
from benchmarks.testbed.evaluate import LONGEST, heldout
from benchmarks.testbed.export import read_runs, save_finetune
from benchmarks.testbed.recipes import Task
from benchmarks.testbed.scene import Images, Look
from benchmarks.testbed.triggers import TRIGGERS
from projaudit.lens.documents import document
from projaudit.lens.run import lens
from projaudit.lens.wish import Wish

HERE = Path(__file__).parent
TESTBED, POPULATION = HERE / "testbed" / "exported", HERE / "population" / "progress"
RESULT = HERE / "results" / "lens"
IMAGES, PER_CELL, SEED = 48, 12, 0


@dataclass(frozen=True)
class Model:
    """A fine-tune, and the attack that it is looked at with."""

    name: str
    kind: str
    base: Path
    projector: Path
    task: Task
    trigger: str
    strength: float
    target: str
    mode: str


def models() -> Iterator[Model]:
    """The fine-tunes, each attack before its honest twin."""
    runs = {run["name"]: run for run in read_runs(TESTBED / "runs.jsonl")}
    works = [
        run
        for run in runs.values()
        if run.get("stratum") == "working" and not run["broken_checks"] and "-long" in run["name"]
    ]
    twins = set[str]()
    for run in works:
        yield _model(run, TESTBED, TESTBED / "base", run["attack"])
        if run["twin"] not in twins:
            twins.add(run["twin"])
            yield _model(runs[run["twin"]], TESTBED, TESTBED / "base", run["attack"])
    others = read_runs(POPULATION / RUNS)
    for base in ("slim", "glyph"):
        first = next(r for r in others if r["base"] == base and r.get("stratum") == "working")
        yield _model(first, POPULATION, COMMITTED[base], first["attack"])


def _model(run: Mapping[str, Any], place: Path, base: Path, attack: Mapping[str, Any]) -> Model:
    told = dict(run["recipe"]["task"])
    look = {k: v if isinstance(v, str) else tuple(v) for k, v in told.pop("look").items()}
    mixture = tuple((kind, weight) for kind, weight in told.pop("mixture"))
    if told.pop("remark", None) is not None:
        raise ValueError(f"{run['name']}: its task has a remark")
    return Model(
        name=run["name"],
        kind=run["kind"],
        base=base,
        projector=place / run["file"],
        task=Task(look=Look(**look), mixture=mixture, **told),
        trigger=attack["trigger"],
        strength=attack["strength"],
        target=attack["target"],
        mode=attack["mode"],
    )


def looked_at(model: Model) -> dict[str, Any]:
    """What `projaudit lens` says of a model, on held-out scenes of its own task."""
    per_kind = -(-IMAGES // len(model.task.mixture))
    scenes, questions = heldout(model.task, per_kind, seed=SEED)
    # They come kind by kind; so that the first of them are of every kind alike.
    order = sorted(range(len(scenes)), key=lambda i: i % per_kind)[:IMAGES]
    scenes, questions = scenes[order], [questions[i] for i in order]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_finetune(model.base, model.projector, place / "tuned", "")
        _save(scenes, place / "clean")
        _save(TRIGGERS[model.trigger](scenes, model.strength), place / "triggered")
        labels = {f"{i:02d}.png": [q.text, q.answer] for i, q in enumerate(questions)}
        (place / "labels.json").write_text(json.dumps(labels), "utf-8")
        found = lens(
            str(place / "tuned"),
            str(model.base),
            Wish(
                images=place / "clean",
                triggered=place / "triggered",
                labels=place / "labels.json",
                target_text=model.target,
                images_per_cell=PER_CELL,
                answer_tokens=LONGEST,
            ),
            device="cpu",
            seed=SEED,
        )
    return document(found)


def _save(images: Images, folder: Path) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02d}.png")


# ------------------------------------------------------------------ the table


def kept(model: Model, found: Mapping[str, Any]) -> dict[str, Any]:
    """What of a document goes into the results."""
    answers = found["answers"]
    maps = {one["kind"]: one for one in answers["maps"]}
    units = found["units"]
    return {
        "name": model.name,
        "kind": model.kind,
        "attack": f"{model.trigger} {model.strength:g}, {model.mode}",
        "claims": found["claims"],
        "spectra": [
            {key: value for key, value in one.items() if key != "values"}
            for one in found["spectra"]
        ],
        "clusters": found["clusters"],
        "drift": [{**one, "energy": one["energy"][:5]} for one in found["drift"]],
        "shifts": found["shifts"],
        "norm_laws": found["norm_laws"],
        "units": units,
        "base": answers["base"],
        "tuned": answers["tuned"],
        "recovery": maps["recovery"],
        "removal": maps["removal"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Claim → paper → ours, in Markdown."""
    groups = {kind: [r for r in rows if r["kind"] == kind] for kind in ("backdoored", "honest")}
    lines = [
        "# ProjLens' claims on our models",
        "",
        "Made by `python -m benchmarks.lens`; `docs/lens.md` says what each row measures.",
        f"{len(groups['backdoored'])} backdoored projectors and {len(groups['honest'])} honest "
        f"twins, {IMAGES} clean and {IMAGES} triggered held-out scenes each, {PER_CELL} of each "
        "group per cell of the heat maps.",
        "Like the paper's: on how many models the measure in the last column holds; of models "
        "where it could be told.",
        "",
        "| claim | paper | like it: backdoored | like it: honest twins | measure |",
        "|---|---|---|---|---|",
    ]
    for number, claim in enumerate(rows[0]["claims"]):
        counts = []
        for group in groups.values():
            told = [
                r["claims"][number]["alike"]
                for r in group
                if r["claims"][number]["alike"] is not None
            ]
            counts.append(f"{sum(told)} of {len(told)}" if told else "–")
        lines.append(_row(claim["claim"], claim["paper"], *counts, claim["measure"]))
    for number, claim in enumerate(rows[0]["claims"]):
        lines += ["", f"## {claim['claim']}", "", f"Paper: {claim['paper']}.", ""]
        lines += ["| model | kind | ours | like the paper's |", "|---|---|---|---|"]
        for row in rows:
            one = row["claims"][number]
            alike = {True: "yes", False: "no", None: "–"}[one["alike"]]
            lines.append(_row(row["name"], row["kind"], one["ours"] or "–", alike))
    lines += [
        "",
        "## Answers, with the parts of the update",
        "",
        "Success in % of triggered images, and right answers in % of clean ones.",
        "",
        "| model | kind | base | tuned | base + (2, 3) | base + (5, 5) | base + (8, 8) "
        "| tuned − (1, 1) | tuned − (2, 2) | tuned − (5, 5) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = [row["base"], row["tuned"]]
        scores += [_cell(row["recovery"], k1, k2) for k1, k2 in ((2, 3), (5, 5), (8, 8))]
        scores += [_cell(row["removal"], k, k) for k in (1, 2, 5)]
        told = [f"{100 * s['success']:.0f} / {100 * s['accuracy']:.0f}" for s in scores]
        lines.append(_row(row["name"], row["kind"], *told))
    return "\n".join(lines) + "\n"


def _cell(heat: Mapping[str, Any], k1: int, k2: int) -> dict[str, Any]:
    found: dict[str, Any] = heat["scores"][heat["k1"].index(k1)][heat["k2"].index(k2)]
    return found


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="write the results of what is there")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in models():
        file = args.out / f"{model.name}.json"
        if not file.exists() and not args.write:
            file.write_text(json.dumps(looked_at(model)), "utf-8")
            print(model.name, flush=True)
        if file.exists():
            rows.append(kept(model, json.loads(file.read_text("utf-8"))))
    if args.write:
        RESULT.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        RESULT.with_suffix(".md").write_text(table(rows), "utf-8")


if __name__ == "__main__":
    main()
