"""Make the fine-tuning sets and the models tuned on them; resumes if stopped.

python -m benchmarks.screening --out DIR            # all bases of the plan
python -m benchmarks.screening --out DIR --bases glyph
python -m benchmarks.screening --quick              # a tiny one in a new folder
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.screening.build import build
from benchmarks.screening.recipes import PAIRS, Sizes, Tuning, planned


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.screening",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/screening"))
    parser.add_argument("--bases", default=",".join(PAIRS), help="in this order, part by part")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--quick", action="store_true", help="one set, hardly trained")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    if args.quick:
        quick = replace(planned()[len(PAIRS)], samples=40, tuning=Tuning(epochs=1, batch=8))
        out = Path(tempfile.mkdtemp(prefix="screening-"))
        build([quick], out, Sizes(8, 8), jobs=1)
        print(f"written to {out}")
        return
    build(planned(args.bases.split(",")), args.out, Sizes(), args.jobs)


if __name__ == "__main__":
    main()
