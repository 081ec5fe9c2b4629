"""`python -m benchmarks.testbed`: train, measure and export everything; resumes if stopped."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.testbed.build import build
from benchmarks.testbed.export import read_runs
from benchmarks.testbed.recipes import PLAN, QUICK
from benchmarks.testbed.report import tables

EXPORTED = Path(__file__).parent / "exported"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: exported/, or a new folder if --quick")
    parser.add_argument("--quick", action="store_true", help="a few steps of each; learns nothing")
    parser.add_argument("--jobs", type=int, default=2, help="fine-tunes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each job, and of the base")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(args.threads)
    out = args.out or (Path(tempfile.mkdtemp(prefix="testbed-")) if args.quick else EXPORTED)
    build(QUICK if args.quick else PLAN, out, args.jobs)
    print(tables(read_runs(out / "runs.jsonl")))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
