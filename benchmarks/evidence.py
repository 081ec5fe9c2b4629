"""Measure what depth behaviour hears of every model of the population, beside what others look at.

python -m benchmarks.evidence --population DIR --out DIR            # resumes if stopped
python -m benchmarks.evidence … --prompts own --images own          # as a user of that world asks
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import pickle
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from benchmarks.baselines import baselines
from benchmarks.population.build import COMMITTED, RUNS, projector_file
from benchmarks.population.recipes import PLANS
from benchmarks.testbed.build import in_parallel
from benchmarks.testbed.evaluate import heldout
from benchmarks.testbed.export import LOCAL_WORD, WEIGHTS, append_run, read_runs
from benchmarks.testbed.export import load as load_model
from benchmarks.testbed.recipes import Task
from projaudit.behaviour.listen import Listening
from projaudit.behaviour.loading import load
from projaudit.behaviour.probe import study_of, weigh
from projaudit.behaviour.texts import Tokens, gather
from projaudit.behaviour.told import candidates, whole
from projaudit.projector import Linear

BUDGET = 20_000
EVIDENCE = "evidence.jsonl"
MOST = 40
FOREIGN, PLAIN = "foreign", "plain"
"""Keys of a text's foreign tokens and of its share of ordinary answers, among its strengths."""
NESTED = ("evidence", "texts", "strengths", "baselines")


def measure(population: Path, out: Path, prompts: str, images: str, jobs: int) -> None:
    """One line for every run of the population that `out` lacks: what was heard of it.

    Nothing of a run but its projector and its base is looked at. The plan is carried out whole, so
    that any part of it can be left out afterwards; all answers are kept for that.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in read_runs(out / EVIDENCE)}
    missing = [run for run in read_runs(population / RUNS) if run["name"] not in done]
    one = partial(measured, population, out, prompts, images)
    calls = [(run["name"], run["base"]) for run in missing]
    for run, row in zip(missing, in_parallel(one, calls, jobs), strict=True):
        append_run(out / EVIDENCE, row)
        texts = [(p["text"], round(p["strength"], 2)) for p in row["evidence"]["payloads"][:1]]
        print(row["name"], run.get("stratum", run["group"]), *texts, row["seconds"], flush=True)


def measured(
    population: Path, out: Path, prompts: str, images: str, name: str, base_name: str
) -> dict[str, Any]:
    """What is heard of one run, the strengths of its texts by family of probes, the baselines."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    speaker, base, first = base_of(base_name)
    tensors = load_file(projector_file(population, base_name, name))
    tuned = {n.partition(LOCAL_WORD)[2]: t.float() for n, t in tensors.items()}
    request = {
        "prompts": asked(base_name, prompts),
        "images": None if images == "synthetic" else scenes(base_name, out),
        "requests": None,
        "seed": zlib.crc32(name.encode()),
        "budget": BUDGET,
        "dtype": "float32",
        "notes": [],
    }
    started, spent = time.monotonic(), time.process_time()
    speaker.answers = speaker.passes = 0
    kept: list[Listening] = []
    study, used, unread = study_of(request, (speaker, tuned), (speaker, base), first)
    study = replace(study, enough=math.inf)
    heard = weigh(request, study, used, unread, lambda what, count, total: None, kept.append)
    row = {
        "name": name,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - spent, 1),
        "evidence": heard,
        **weighed(kept[0], partial(words, speaker)),
        "baselines": baselines(*base_model(base_name), tuned, base, request["seed"]),
    }
    file = out / "heard" / f"{name}.pkl.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wb") as stream:
        pickle.dump(replace(kept[0], probes=()), stream)  # closures
    return row


def weighed(listening: Listening, told: Callable[[Tokens], str]) -> dict[str, Any]:
    """The texts that would be told; the strengths of the loudest by family, before any weight."""
    found = gather(listening.heard, listening.speech)
    # Which are loudest depends on the weights, which folds choose.
    raw = sorted(found.values(), key=lambda s: -sum(s.by.values()))[:MOST]
    shipped = sorted(found.values(), key=lambda s: -s.strength)[:MOST]
    loudest = {id(s): s for s in (*shipped, *raw) if s.by}.values()
    chosen = candidates(found, listening.speech, 2)
    return {
        "texts": [told(whole(candidate.text, listening.heard)) for candidate in chosen],
        "strengths": [s.by | {FOREIGN: s.foreign, PLAIN: s.plain} for s in loudest],
    }


def pack(out: Path, file: Path) -> None:
    """What was measured, a row a run, without the answers."""
    rows = sorted(read_runs(out / EVIDENCE), key=lambda row: str(row["name"]))
    for row in rows:
        row["evidence"] = {k: v for k, v in row["evidence"].items() if k != "exchanges"}
        row |= {key: json.dumps(row[key], sort_keys=True, ensure_ascii=False) for key in NESTED}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")


def unpack(out: Path, file: Path) -> None:
    """The rows of a packed file as `measure` keeps them, so that it goes on from there."""
    for one in read_evidence(file):
        append_run(out / EVIDENCE, one)


def read_evidence(file: Path) -> list[dict[str, Any]]:
    """The rows of a packed file."""
    return [
        row | {key: json.loads(row[key]) for key in NESTED}
        for row in pq.read_table(file).to_pylist()
    ]


def words(speaker: Any, text: Tokens) -> str:
    said: str = speaker.processor.tokenizer.decode(list(text))
    return said


def asked(base: str, whose: str) -> list[str] | None:
    """The prompts; None for the general ones, of which `glyph` knows no word and is asked its own.

    Its own are six questions that its training asks.
    """
    if whose == "general" and base != "glyph":
        return None
    _, questions = heldout(Task("own", PLANS[base].base.look), 1, seed=77)
    return [question.text for question in questions[:6]]


def scenes(base: str, out: Path) -> list[str]:
    """Files of 48 held-out scenes of a base's own world."""
    folder = out / "images" / base
    if not folder.exists():
        folder.mkdir(parents=True)
        pictures, _ = heldout(Task("own", PLANS[base].base.look), 7, seed=78)
        for number, picture in enumerate(pictures[:48]):
            Image.fromarray(picture).save(folder / f"{number:02d}.png")
    return sorted(str(file) for file in folder.iterdir())


@cache
def base_model(base: str) -> Any:
    return load_model(COMMITTED[base])


def base_of(name: str) -> tuple[Any, dict[str, torch.Tensor], Linear]:
    """As `base_in`, of one of the population's bases."""
    return base_in(COMMITTED[name])


@cache
def base_in(folder: Path) -> tuple[Any, dict[str, torch.Tensor], Linear]:
    """A base's speaker, its projector's tensors, and the first layer in the module."""
    whole = {n: t for n, t in load_file(folder / WEIGHTS).items() if LOCAL_WORD in n}
    prefix = next(iter(whole)).partition(LOCAL_WORD)[0] + LOCAL_WORD.rstrip(".")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "projector.safetensors"
        save_file(whole, file)
        weight = f"{prefix}.linear_1.weight"
        first = Linear("linear_1", weight, f"{prefix}.linear_1.bias", (*whole[weight].shape,))
        (speaker, tuned), _, first = load(
            {
                "folder": str(folder),
                "base_folder": None,
                "stored": str(file),
                "tuned": str(file),
                "base": None,
                "prefix": prefix,
                "entry": prefix,
                "first": asdict(first),
                "last": f"{prefix}.linear_2.weight",
                "beside": [],
                "device": "cpu",
                "dtype": "float32",
            }
        )
        return speaker, {name: t.clone() for name, t in tuned.items()}, first


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--population", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", choices=["general", "own"], default="general")
    parser.add_argument("--images", choices=["synthetic", "own"], default="synthetic")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write what is measured so far")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="go on from a packed file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.pack:
        pack(args.out, args.pack)
    elif args.unpack:
        unpack(args.out, args.unpack)
    else:
        measure(args.population, args.out, args.prompts, args.images, args.jobs)


if __name__ == "__main__":
    main()
