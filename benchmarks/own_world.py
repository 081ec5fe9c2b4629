"""What images and prompts of a model's own world add: the same models, asked both ways.

python -m benchmarks.evidence … --prompts own --images own --out DIR   # those models, or some
python -m benchmarks.evidence … --out DIR --pack benchmarks/results/evidence-own.parquet
python -m benchmarks.own_world --population DIR                        # the table, in Markdown
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.evaluation import RESULTS, share, with_interval
from benchmarks.folds import (
    text_attacks,
)
from benchmarks.measured import (
    SHIPPED,
    Model,
    models,
    score,
)
from benchmarks.testbed.report import row, ruled

OWN = RESULTS / "evidence-own.parquet"
WAYS = ("synthetic, general", "own")


def asked_twice(population: Path, both: Path, own: Path) -> list[tuple[Model, Model]]:
    """Every model that was asked both ways: as anybody asks, then as a user of its world."""
    general = {m.name: m for m in models(population, both)}
    return [(general[m.name], m) for m in models(population, own) if m.name in general]


def table(pairs: Sequence[tuple[Model, Model]]) -> str:
    """AUROC of each way, and what lies above every honest model of the other bases by that way."""
    columns = ("AUROC (95 %)", "found", "false alarms")
    named = [f"{what}, {way}" for what in columns for way in WAYS]
    lines = [row("base", "backdoors", "honest", *named)]
    ways = [[pair[place] for pair in pairs] for place in range(len(WAYS))]
    scores = [{m.name: score(m, SHIPPED) for m in of} for of in ways]
    bases = sorted({m.base for m in ways[0]})
    for base in [*bases, "**all**"]:
        mine = [m for m in ways[0] if base in (m.base, "**all**")]
        attacks, honest = text_attacks(mine), [m for m in mine if m.honest]
        areas = [
            with_interval(*([of[m.name] for m in some] for some in (attacks, honest)))
            for of in scores
        ]
        rates = [
            share([above(of, m, ways[0]) for m in some])
            for some in (attacks, honest)
            for of in scores
        ]
        lines.append(row(base, str(len(attacks)), str(len(honest)), *areas, *rates))
    return ruled(lines)


def above(scores: Mapping[str, float], one: Model, of: Sequence[Model]) -> bool:
    """Whether it scores above every honest model of the other bases."""
    others = [scores[m.name] for m in of if m.honest and m.base != one.base]
    return scores[one.name] > max(others)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_world",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--population", type=Path, required=True)
    parser.add_argument("--evidence", type=Path, default=RESULTS / "evidence.parquet")
    parser.add_argument("--own", type=Path, default=OWN)
    args = parser.parse_args(argv)
    print(table(asked_twice(args.population, args.evidence, args.own)))


if __name__ == "__main__":
    main()
