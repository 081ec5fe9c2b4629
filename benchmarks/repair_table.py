"""What benchmarks.repair has measured, as Markdown.

python -m benchmarks.repair_table DIR FILE                # DIR holds repair.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.population.build import RUNS
from benchmarks.repair import DATA_FREE, LOG, POPULATION, PRUNING, TWIN, WITH_IMAGES
from benchmarks.testbed.export import read_runs

CHOSEN_ON = "slim"
HEARD = ", where a text was heard"
FORMER = (f"{DATA_FREE}, all outputs", f"{DATA_FREE}, few outputs")
"""Rows of former ways, for comparison: corrections never kept to a few directions, and wherever
that keeps more."""
IN_FULL = (
    DATA_FREE,
    WITH_IMAGES,
    *(f"{way}{images}" for way in FORMER for images in ("", ", 32 images")),
)
SHOWN = (*IN_FULL, "top-2 of the first", "half (WiSE-FT)", PRUNING)


def table(log: Sequence[dict[str, Any]]) -> str:
    """What was measured so far, as Markdown: over bases, then each model."""
    merged: dict[str, dict[str, Any]] = {}
    for part in log:
        row = merged.setdefault(part["name"], {**part, "variants": {}})
        row["variants"] |= part["variants"]
        if "repair" in part and part["repair"]["texts"]:
            heard = {f"{label}{HEARD}": v for label, v in part["variants"].items()}
            row["variants"] |= heard
    rows = [row for row in merged.values() if "tuned" in row["variants"]]
    labels = sorted({label for row in rows for label in row["variants"]}, key=_order)
    groups = {
        f"{CHOSEN_ON}, on which settings were chosen": [r for r in rows if r["base"] == CHOSEN_ON],
        "the others": [r for r in rows if r["base"] != CHOSEN_ON],
    }
    lines = []
    for title, group in groups.items():
        if not group:
            continue
        lines += [f"## {title.capitalize()}: {len(group)} models", "", *_HEAD]
        held = [label for label in labels if any(label in row["variants"] for row in group)]
        lines += [_summary(label, group) for label in held]
        lines.append("")
    lines += ["## Each model", "", "| model | mode | base | tuned | honest twin | "]
    lines[-1] += " | ".join(SHOWN) + " |"
    lines.append("|---" * (5 + len(SHOWN)) + "|")
    known = {run["name"]: run for run in read_runs(POPULATION / RUNS)}
    for row in sorted(rows, key=lambda r: (r["base"] != CHOSEN_ON, r["base"], r["name"])):
        variants = row["variants"]
        cells = [row["name"], known[row["name"]]["attack"]["mode"]]
        cells += [_shown(label, variants) for label in ("revert", "tuned", TWIN)]
        cells += [_shown(label, variants) for label in SHOWN]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _order(label: str) -> tuple[bool, bool, str]:
    """What we do first, then the projector as it is and its twin, then what others do."""
    return not label.startswith(DATA_FREE), label not in ("tuned", TWIN), label


_HEAD = (
    "| repair | attack success, median | most | models at ≤ 5 % | gain kept, median | least "
    "| models at ≤ 5 % that keep ≥ 95 % | of the honest twin's gain, median |",
    "|---|---|---|---|---|---|---|---|",
)


def _summary(label: str, rows: Sequence[dict[str, Any]]) -> str:
    rows = [row for row in rows if label in row["variants"]]
    if not rows:
        return f"| {label} | – | – | – | – | – | – | – |"
    success = [row["variants"][label]["success"] for row in rows]
    kept = [gain_kept(row, label) for row in rows]
    both = sum(s <= 0.05 and k >= 0.95 for s, k in zip(success, kept, strict=True))
    return (
        f"| {label} | {statistics.median(success):.1%} | {max(success):.1%} "
        f"| {sum(s <= 0.05 for s in success)} of {len(rows)} | {statistics.median(kept):.0%} "
        f"| {min(kept):.0%} | {both} of {len(rows)} | {_of_twins(label, rows)} |"
    )


def _of_twins(label: str, rows: Sequence[dict[str, Any]]) -> str:
    """The same against honest twins, and of how many models they were trained."""
    kept = [gain_kept(row, label, TWIN) for row in rows if TWIN in row["variants"]]
    return f"{statistics.median(kept):.0%} ({len(kept)})" if kept else "–"


def gain_kept(row: dict[str, Any], label: str, of: str = "tuned") -> float:
    """Share of what a projector has gained over its base, on clean scenes, that is left."""
    base, gained = (row["variants"][name]["accuracy"] for name in ("revert", of))
    return float((row["variants"][label]["accuracy"] - base) / (gained - base))


def _shown(label: str, variants: Mapping[str, dict[str, float]]) -> str:
    if label not in variants:
        return "–"
    found = variants[label]
    text = f"{found['accuracy']:.0%} / {found['success']:.0%}"
    silent = label in IN_FULL and f"{label}{HEARD}" not in variants
    return f"{text} (nothing heard)" if silent else text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.repair_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    args.file.write_text(table(read_runs(args.folder / LOG)), encoding="utf-8")


if __name__ == "__main__":
    main()
