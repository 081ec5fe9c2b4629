"""The population's tables, in Markdown, from the rows of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.testbed.evaluate import MOST_FALSE, MOST_LOST
from benchmarks.testbed.report import percent, row, ruled

STRATA = ("working", "partial", "failed")


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Counts, honest accuracy by group, attempts by what they are made of, and what they cost."""
    honest = [r for r in rows if r["kind"] == "honest"]
    attempts = [r for r in rows if r["kind"] == "backdoored"]
    parts = [
        count_table(rows),
        honest_table(honest),
        *(attempt_table(attempts, column) for column in ("trigger", "mode", "poison")),
        cost_table(attempts),
    ]
    return "\n\n".join(parts)


def count_table(rows: Sequence[dict[str, Any]]) -> str:
    """Runs by base and kind, and attempts by stratum."""
    lines = [row("base", "runs", "honest", "attempts", *STRATA, "distinct targets")]
    bases = list(dict.fromkeys(r["base"] for r in rows))
    for name, some in [*((b, [r for r in rows if r["base"] == b]) for b in bases), ("all", rows)]:
        tried = [r for r in some if r["kind"] == "backdoored"]
        strata = [str(sum(r["stratum"] == s for r in tried)) for s in STRATA]
        targets = len({r["target"] for r in tried})
        counts = (len(some), len(some) - len(tried), len(tried))
        lines.append(row(name, *map(str, counts), *strata, str(targets)))
    return ruled(lines)


def honest_table(rows: Sequence[dict[str, Any]]) -> str:
    """Percent of exact answers on the runs' own tasks, by group; the base's own in between."""
    lines = [row("honest group", "runs", "least", "median", "most", "base, median", "seconds")]
    for group in dict.fromkeys(r["group"] for r in sorted(rows, key=lambda r: str(r["group"]))):
        some = [r for r in rows if r["group"] == group]
        shares = [r["accuracy"] for r in some]
        base = float(np.median([r["base_accuracy"] for r in some]))
        figures = (min(shares), float(np.median(shares)), max(shares), base)
        seconds = f"{np.mean([r['seconds'] for r in some]):.0f}"
        lines.append(row(group, str(len(some)), *map(percent, figures), seconds))
    return ruled(lines)


def attempt_table(rows: Sequence[dict[str, Any]], column: str) -> str:
    """Attempts by what a column of theirs holds, and by stratum; median success in percent."""
    lines = [row(column, "attempts", *STRATA, "median success")]
    for value in sorted({r[column] for r in rows}):
        some = [r for r in rows if r[column] == value]
        strata = [str(sum(r["stratum"] == s for r in some)) for s in STRATA]
        success = percent(float(np.median([r["attack_success"] for r in some])))
        name = value if isinstance(value, str) else f"{percent(value)} %"
        lines.append(row(name, str(len(some)), *strata, success))
    return ruled(lines)


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    """What attempts show of themselves without the trigger: how many by stratum."""
    header = ("on clean scenes", *STRATA)
    lost = [r for r in rows if r["honest_accuracy"] is not None]
    counts: tuple[tuple[str, list[dict[str, Any]]], ...] = (
        ("attempts", list(rows)),
        (
            f"more than {100 * MOST_FALSE:.0f} % like the attack",
            [r for r in rows if r["false_trigger_rate"] > MOST_FALSE],
        ),
        ("an honest run has the same task", lost),
        (
            f"of those, more than {100 * MOST_LOST:.0f} points below its accuracy",
            [r for r in lost if r["accuracy"] < r["honest_accuracy"] - MOST_LOST],
        ),
    )
    lines = [row(*header)]
    for what, some in counts:
        lines.append(row(what, *(str(sum(r["stratum"] == s for r in some)) for s in STRATA)))
    return ruled(lines)
