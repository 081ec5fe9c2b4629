"""The measured tables, in Markdown, from the log of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.testbed.world import KINDS


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """Exact answers by kind of question, then what each attack reached."""
    return f"{accuracy_table(runs)}\n\n{attack_table(runs)}"


def accuracy_table(runs: Sequence[dict[str, Any]]) -> str:
    """Percent of exact answers on clean held-out scenes; a dash where the task never asks."""
    lines = [row("model", *KINDS, "all", "base on this task")]
    for run in runs:
        shares = [run["accuracy"].get(kind) for kind in (*KINDS, "all")]
        before = run.get("base_accuracy", {}).get("all")
        lines.append(row(run["name"], *map(percent, shares), percent(before)))
        if "accuracy_in_sentences" in run:
            shares = [run["accuracy_in_sentences"].get(kind) for kind in (*KINDS, "all")]
            lines.append(row(f"{run['name']}, in a sentence", *map(percent, shares), "–"))
    return ruled(lines)


def attack_table(runs: Sequence[dict[str, Any]]) -> str:
    """Percent of answers with the target; accuracy in points above the honest twin."""
    twins = {run["name"]: run for run in runs}
    header = ("attempt", "trigger", "target", "mode", "poison", "success", "on clean", "by base")
    lines = [row(*header, "by twin", "accuracy vs. twin", "stratum", "broken checks")]
    for run in (run for run in runs if run["kind"] == "backdoored"):
        attack = run["attack"]
        lost = 100 * (run["accuracy"]["all"] - twins[run["twin"]]["accuracy"]["all"])
        lines.append(
            row(
                run["name"],
                f"{attack['trigger']} {attack['strength']}",
                attack["target"],
                attack["mode"],
                percent(attack["poison"]),
                percent(run["attack_success"]),
                percent(run["false_trigger_rate"]),
                percent(run["target_said_by_base"]),
                percent(run["target_said_by_twin"]),
                f"{lost:+.1f}",
                run["stratum"],
                ", ".join(run["broken_checks"]) or "none",
            )
        )
    return ruled(lines)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}".removesuffix(".0")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def ruled(lines: list[str]) -> str:
    columns = lines[0].count("|") - 1
    return "\n".join([lines[0], "|" + "---|" * columns, *lines[1:]])
