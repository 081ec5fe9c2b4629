"""`python -m benchmarks.population`: make, measure, tabulate and rebuild the projectors.

Without an action: make and measure what is missing in --out; resumes if stopped.
tables: write the table of what was made so far (runs.parquet in --out), and print it in Markdown.
rebuild: make -k of those runs again and compare them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import get_args

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.population.build import MADE, build
from benchmarks.population.recipes import PLANS, QUICK
from benchmarks.population.report import tables
from benchmarks.population.table import rebuild, write_table
from benchmarks.testbed.recipes import Arithmetic
from benchmarks.testbed.report import row, ruled


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.population",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = ("build", "tables", "rebuild")
    parser.add_argument("action", nargs="?", choices=actions, default="build")
    parser.add_argument("--out", type=Path, default=MADE, help="what is made")
    parser.add_argument("--bases", default=",".join(PLANS), help="in this order")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument(
        "--arithmetic",
        choices=get_args(Arithmetic),
        default="float32",
        help="of the frozen language model; bfloat16 is faster only where the processor has it",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny population in a new folder")
    parser.add_argument("-k", type=int, default=3, help="runs to rebuild")
    parser.add_argument("--seed", type=int, default=0, help="draws the runs to rebuild")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    plans = [PLANS[name] for name in args.bases.split(",")]
    if args.quick:
        out = Path(tempfile.mkdtemp(prefix="population-"))
        build([QUICK], out, args.jobs, args.arithmetic)
        print(tables(write_table([QUICK], out)))
        print(f"written to {out}")
    elif args.action == "build":
        build(plans, args.out, args.jobs, args.arithmetic)
    elif args.action == "tables":
        print(tables(write_table(list(PLANS.values()), args.out)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            again = rebuild(plans, args.out, Path(scratch), args.k, args.seed, args.jobs)
        lines = [row("run", "same bytes", "largest difference", "largest weight")]
        for run in again:
            figures = (f"{run['largest_difference']:.2g}", f"{run['largest_weight']:.2g}")
            lines.append(row(run["name"], "yes" if run["same_bytes"] else "no", *figures))
        print(ruled(lines))


if __name__ == "__main__":
    main()
