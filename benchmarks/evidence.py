"""Measure what depth behaviour hears of every model of the population, and weigh it.

python -m benchmarks.evidence measure --population DIR --out DIR   # resumes if stopped
"""

from __future__ import annotations

import argparse
import gzip
import pickle
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from benchmarks.population.build import COMMITTED, RUNS, projector_file
from benchmarks.testbed.export import LOCAL_WORD, WEIGHTS, append_run, read_runs
from projaudit.behaviour.loading import load
from projaudit.behaviour.probe import Listening, study_of, weigh

BUDGET = 8000
EVIDENCE = "evidence.jsonl"


def measure(population: Path, out: Path, prompts: dict[str, list[str]] | None = None) -> None:
    """One line for every run of the population that `out` lacks: what was heard of it.

    Nothing of a run but its projector and its base is looked at. All answers are kept as well, for
    other statistics than the shipped one.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in read_runs(out / EVIDENCE)}
    speakers: dict[str, Any] = {}
    for run in read_runs(population / RUNS):
        if run["name"] in done:
            continue
        done.add(run["name"])
        name = run["base"]
        if name not in speakers:
            speakers[name] = base_of(COMMITTED[name], out)
        speaker, base, first = speakers[name]
        tensors = load_file(projector_file(population, name, run["name"]))
        tuned = {n.partition(LOCAL_WORD)[2]: t.float() for n, t in tensors.items()}
        request = {
            "prompts": None if prompts is None else prompts[name],
            "images": None,
            "seed": zlib.crc32(run["name"].encode()),
            "budget": BUDGET,
            "dtype": "float32",
            "notes": [],
        }
        file = out / "heard" / f"{run['name']}.pkl.gz"
        started = time.monotonic()
        speaker.answers = speaker.passes = 0
        heard = weigh(
            request,
            *study_of(request, (speaker, tuned), (speaker, base), first),
            lambda what, count, total: None,
            partial(keep, file),
        )
        row = {
            "name": run["name"],
            "base": name,
            "seconds": round(time.monotonic() - started, 1),
            "score_inputs": heard,
        }
        append_run(out / EVIDENCE, row)
        best = heard["payloads"][0] if heard["payloads"] else None
        print(
            run["name"],
            run.get("stratum", run["group"]),
            best and (best["text"], round(best["strength"], 2)),
            row["seconds"],
            flush=True,
        )


def base_of(folder: Path, out: Path) -> tuple[Any, dict[str, torch.Tensor], str]:
    """The base's speaker, its projector's tensors, and the first layer's name in the module."""
    whole = {n: t for n, t in load_file(folder / WEIGHTS).items() if LOCAL_WORD in n}
    prefix = next(iter(whole)).partition(LOCAL_WORD)[0] + LOCAL_WORD.rstrip(".")
    file = out / f"{folder.name}.projector.safetensors"
    save_file(whole, file)
    (speaker, tuned), _, first = load(
        {
            "folder": str(folder),
            "base_folder": None,
            "tuned": str(file),
            "base": None,
            "prefix": prefix,
            "first": f"{prefix}.linear_1.weight",
            "device": "cpu",
            "dtype": "float32",
        }
    )
    return speaker, dict(tuned), first


def keep(file: Path, listening: Listening) -> None:
    """All answers of a run, for a look at them under other statistics."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wb") as out:
        pickle.dump(listening, out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("command", choices=["measure"])
    parser.add_argument("--population", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    measure(args.population, args.out)


if __name__ == "__main__":
    main()
