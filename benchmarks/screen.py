"""How well `projaudit screen` finds poisoned samples, and what is left of an attack without them.

python -m benchmarks.screen profile --built DIR     # of every set that benchmarks.screening made
python -m benchmarks.screen detect --built DIR      # the detectors on the profiles
python -m benchmarks.screen retrain --built DIR     # on what is kept, against a random drop
python -m benchmarks.screen tables                  # of the committed results, as Markdown
python -m benchmarks.screen pack --built DIR        # what was measured → benchmarks/results

Every step resumes if stopped; `detect` is quick and always looks again.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from transformers.utils import logging as transformers_logging

from benchmarks.screening.build import MODEL, RUNS
from benchmarks.screening.control import with_own_words
from benchmarks.screening.dataset import IMAGES, JSON, read, read_poisoned
from benchmarks.screening.recipes import CHOOSING, Recipe, Sizes, planned
from benchmarks.screening.report import tables
from benchmarks.screening.tune import measured, tuned
from benchmarks.testbed.build import in_parallel
from benchmarks.testbed.export import append_run, read_runs
from projaudit.screen.detect import Method, Screening, screen
from projaudit.screen.profiles import Profiles, read_profiles
from projaudit.screen.profiling import profile
from projaudit.screen.samples import open_dataset

log = logging.getLogger(__name__)
BUILT = Path("build/screening")
RESULT = Path(__file__).parent / "results" / "screen.json"
PROFILES, DETECTED, RETRAINED = "profiles", "detected.json", "retrained.jsonl"
METHODS: tuple[Method, ...] = ("bye", "tcap", "both")
Bools = npt.NDArray[np.bool_]


def profiled(name: str, built: Path) -> Profiles:
    """The profiles of one set by the model tuned on it; made where they are not there."""
    folder = built / name
    return profile(
        str(folder / MODEL),
        str(folder / JSON),
        folder / PROFILES,
        images=str(folder / IMAGES),
        batch=50,
        device="cpu",
        offline=True,
    )


def screened(name: str, built: Path, methods: tuple[Method, ...] = METHODS) -> dict[str, Screening]:
    """What each method says of one set, from its profiles and its own texts; `… published` too."""
    profiles = read_profiles(built / name / PROFILES)
    questions, answers = said_in(name, built, profiles)
    found = {
        method: screen(profiles, method, questions=questions, answers=answers) for method in methods
    }
    for method in methods:
        if method != "both":
            found[f"{method} published"] = screen(profiles, method, published=True)
    return found


def said_in(name: str, built: Path, profiles: Profiles) -> tuple[list[str], list[str]]:
    """The questions and the answers of the profiled samples."""
    folder = built / name
    data = open_dataset(str(folder / JSON), folder / IMAGES, offline=True)
    texts = [data.texts(int(number)) for number in profiles.numbers]
    return [question for question, _ in texts], [answer for _, answer in texts]


def detected(name: str, built: Path) -> dict[str, Any]:
    """Counts of each method on one set, and of the answers alone, without any attention."""
    found = screened(name, built)
    bad = read_poisoned(built / name)
    profiles = read_profiles(built / name / PROFILES)
    ids = profiles.ids
    poisoned = np.array([id_ in bad for id_ in ids])
    row: dict[str, Any] = {"name": name, "samples": len(ids), "poisoned": int(poisoned.sum())}
    if poisoned.any():
        row["auroc"] = {
            "entropy": best_auroc(profiles.entropy[:, 0], poisoned),
            "shares": best_auroc(profiles.shares[:, 0], poisoned),
            "before the text": max((d.auroc or 0 for d in found["both"].confirmed), default=None),
        }
    for method, one in found.items():
        row[method] = counts(one.dropped, poisoned) | {"nothing": list(one.nothing)}
    row["apart"] = counts(found["both"].apart, poisoned)
    groups = [one.group.members for one in found["both"].judged if one.fate != "keep"]
    together = np.any(groups, axis=0) if groups else np.zeros(len(ids), bool)
    row["all heads"] = counts(together, poisoned)
    texts = [text.payload.holders for text in found["both"].departures]
    alone = np.any(texts, axis=0) if texts else np.zeros(len(ids), bool)
    row["answers alone"] = counts(alone, poisoned)
    questions, answers = said_in(name, built, profiles)
    row["own words alone"] = counts(with_own_words(answers, questions), poisoned)
    return row


def best_auroc(values: npt.NDArray[np.float32], poisoned: Bools) -> float:
    """How well the best layer, or head and share, tells the poisoned, chosen knowing which are.

    `values` (samples, …) of one row of attention. Either sign; no method can do that well without
    knowing the truth.
    """
    columns = values.reshape(len(values), -1).T
    found = [roc_auc_score(poisoned, column) for column in columns if np.isfinite(column).all()]
    return max((max(area, 1 - area) for area in found), default=0.5)


def counts(dropped: Bools, poisoned: Bools) -> dict[str, Any]:
    """How many samples are dropped, rightly or not.

    `precision` is None where none is dropped, `recall` and `f1` where none is poisoned.
    """
    hits = int((dropped & poisoned).sum())
    taken, there = int(dropped.sum()), int(poisoned.sum())
    return {
        "dropped": taken,
        "hits": hits,
        "precision": hits / taken if taken else None,
        "recall": hits / there if there else None,
        "f1": 2 * hits / (taken + there) if there else None,
    }


def to_retrain(built: Path, bases: set[str]) -> Iterator[tuple[str, str]]:
    """(set, treatment) for every working attack at 10 % on the bases: screened, random drop."""
    for run in read_runs(built / RUNS):
        works = run["base"] in bases and run.get("stratum") == "working"
        if works and run["attack"]["poison"] == 0.1:
            yield from ((run["name"], treatment) for treatment in ("both", "random"))


def retrained(
    name: str, treatment: str, built: Path, recipe: Recipe, sizes: Sizes
) -> dict[str, Any]:
    """Figures of a model tuned on what one treatment keeps of a set; None where that is nothing."""
    folder = built / name
    profiles = read_profiles(folder / PROFILES)
    dropped = screened(name, built, ("both",))["both"].dropped
    if treatment == "random":
        rng = np.random.default_rng([recipe.seed, 22])
        dropped = rng.permutation(dropped)
    gone = {id_ for id_, is_gone in zip(profiles.ids, dropped, strict=True) if is_gone}
    samples = read(folder)
    rows = [row for row, id_ in enumerate(samples.ids) if id_ not in gone]
    left = len(read_poisoned(folder) - gone)
    row = {"name": name, "treatment": treatment, "kept": len(rows), "poison_kept": left}
    if len(rows) < recipe.tuning.batch:  # nothing to tune on
        return row | {"accuracy": {"all": None}, "attack_success": None}
    out = built / "retrained" / f"{name}-{treatment}"
    return row | tuned(recipe, samples.at(rows), None, out) | measured(recipe, out, sizes)


def results(built: Path) -> dict[str, Any]:
    """All that was measured: the fine-tunes, the detection, the retraining."""
    return {
        "choosing": CHOOSING,
        "runs": read_runs(built / RUNS),
        "detected": json.loads((built / DETECTED).read_text("utf-8")),
        "retrained": read_runs(built / RETRAINED),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.screen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=("profile", "detect", "retrain", "tables", "pack"))
    parser.add_argument("--built", type=Path, default=BUILT, help="the folder of what was made")
    parser.add_argument("--bases", default="slim,grid", help="of `retrain`")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    built: Path = args.built
    if args.step == "tables":
        print(tables(json.loads(RESULT.read_text("utf-8"))))
        return
    if args.step == "pack":
        RESULT.write_text(json.dumps(results(built), indent=1, sort_keys=True) + "\n", "utf-8")
        print(tables(results(built)))
        return
    names = [run["name"] for run in read_runs(built / RUNS)]
    if args.step == "profile":
        for name in names:
            log.info("%s: %d profiles", name, len(profiled(name, built).ids))
    elif args.step == "detect":
        there = [name for name in names if (built / name / PROFILES).exists()]
        rows = list(in_parallel(detected, [(name, built) for name in there], args.jobs))
        (built / DETECTED).write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    else:
        done = {(run["name"], run["treatment"]) for run in read_runs(built / RETRAINED)}
        recipes = {recipe.name: recipe for recipe in planned()}
        calls = [
            (name, treatment, built, recipes[name], Sizes())
            for name, treatment in to_retrain(built, set(args.bases.split(",")))
            if (name, treatment) not in done
        ]
        for row in in_parallel(retrained, calls, args.jobs):
            append_run(built / RETRAINED, row)


if __name__ == "__main__":
    main()
