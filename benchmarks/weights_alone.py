"""What statistics of the weights alone say of honest against backdoored, on the testbed.

`python -m benchmarks.weights_alone` checks every exported fine-tune against the base and writes the
AUROC of each statistic: 0.5 tells nothing, and 0.2 as much as 0.8, with the sign turned round.
Nothing is fitted, so nothing is held out; one base, so it says nothing of others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import projaudit
from projaudit.analyses import METRICS
from projaudit.data import data_path

RESULT = Path(__file__).parent / "results" / "weights-alone.md"
Model = dict[str, Any]


def measured(models: Path, model: Model) -> dict[str, float]:
    """`metric subject` -> value of every statistic of a fine-tune."""
    base = models / "base" / "model.safetensors"
    report = projaudit.check(str(models / model["file"]), str(base), seed=0)
    return {
        f"{m.metric} {m.subject.partition('/')[2]}".strip(): m.value
        for m in report.measurements
        if METRICS[m.metric].kind == "statistic"
    }


def auroc(rows: list[tuple[Model, dict[str, float]]], key: str) -> float | None:
    """Share of (backdoored, honest) pairs in which the backdoored one has more; ties count half."""
    values: dict[str, list[float]] = {"honest": [], "backdoored": []}
    for model, found in rows:
        if key in found:
            values[model["kind"]].append(found[key])
    pairs = [(b, h) for b in values["backdoored"] for h in values["honest"]]
    if not pairs:
        return None
    return sum((b > h) + 0.5 * (b == h) for b, h in pairs) / len(pairs)


def main() -> None:
    """Measure, and write the table."""
    models = data_path("demo")
    provenance = json.loads((models / "provenance.json").read_text("utf-8"))["models"]
    used = [
        model
        for model in provenance.values()
        if model["kind"] == "honest" or model.get("stratum") == "working"
    ]
    rows = [(model, measured(models, model)) for model in used]
    recipes: dict[str, Callable[[Model], bool]] = {
        "all": lambda model: True,
        "short recipes": lambda model: "-long" not in model["name"],
        "long recipes": lambda model: "-long" in model["name"],
    }
    lines = [
        "# Statistics of the weights alone: honest against backdoored",
        "",
        "AUROC on the testbed's fine-tunes of one base (`python -m benchmarks.weights_alone`). "
        "Nothing is fitted. 0.5 tells nothing; below it, the sign is turned round.",
        "",
        "| statistic | " + " | ".join(recipes) + " |",
        "| --- |" + " --- |" * len(recipes),
    ]
    counts = {
        name: [
            sum(m["kind"] == kind and chosen(m) for m in used) for kind in ("honest", "backdoored")
        ]
        for name, chosen in recipes.items()
    }
    lines.append(
        "| honest, working backdoors | "
        + " | ".join(f"{h}, {b}" for h, b in counts.values())
        + " |"
    )
    for key in dict.fromkeys(key for _, found in rows for key in found):
        cells = [auroc([row for row in rows if chosen(row[0])], key) for chosen in recipes.values()]
        lines.append(
            f"| {key} | " + " | ".join("–" if c is None else f"{c:.2f}" for c in cells) + " |"
        )
    RESULT.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
