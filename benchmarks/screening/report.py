"""The measured tables, in Markdown: the fine-tunes, what is found, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.screening.recipes import TRIGGERS
from benchmarks.testbed.report import percent, row, ruled

PUBLISHED = ("bye published", "tcap published")
WAYS = (*PUBLISHED, "bye", "tcap", "all heads", "both", "answers alone", "own words alone")
# F1 in percent of BYE and TCAP on InternVL2.5 and ScienceQA, 10 %, as TCAP's paper (2601.21692)
# gives them; its text prefix for TCAP alone.
PAPERS: dict[str, tuple[str, str]] = {
    "patch": ("97.9", "100"),
    "random patch": ("–", "–"),
    "blend": ("0", "98.3"),
    "sinusoid": ("9.9", "92.1"),
    "warp": ("4.0", "99.2"),
    "frequency": ("9.6", "85.2"),
    "text": ("–", "100"),
}
AIMS = {trigger: 95 if trigger in ("patch", "blend", "text") else 90 for trigger in TRIGGERS}


def tables(found: Mapping[str, Any]) -> str:
    """All of them, from what `benchmarks.screen` packs."""
    runs = {run["name"]: run for run in found["runs"]}
    rows = [{**runs[one["name"]], **one} for one in found["detected"]]
    parts = [
        ("Found, by trigger, at 10 %", trigger_table(rows, found["choosing"])),
        ("Found at other rates", rate_table(rows)),
        ("What the attention could tell", attention_table(rows)),
        ("Clean sets", clean_table(rows)),
        ("After retraining on what is kept", retrain_table(runs, found["retrained"])),
        ("Every poisoned set", set_table(rows)),
        ("Every fine-tune", tune_table(found["runs"])),
    ]
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in parts)


def working(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in rows if one.get("stratum") == "working"]


def trigger_table(rows: Sequence[Mapping[str, Any]], choosing: str) -> str:
    """Mean F1 of the sets at 10 % whose attack took hold, by trigger, mode and base."""
    header = ("trigger", "mode", "base", "sets", *WAYS, "aim", "BYE, paper", "TCAP, paper")
    lines = [row(*header)]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for one in working(rows):
        if one["attack"]["poison"] == 0.1:
            where = (one["shown"], one["attack"]["mode"], one["base"])
            groups.setdefault(where, []).append(one)
    order = {trigger: i for i, trigger in enumerate(TRIGGERS)}
    for trigger, mode, base in sorted(groups, key=lambda g: (g[1] != "replace", order[g[0]], g[2])):
        some = groups[trigger, mode, base]
        scores = [percent(float(np.mean([one[way]["f1"] for one in some]))) for way in WAYS]
        papers = PAPERS[trigger] if mode == "replace" else ("–", "–")
        where = f"{base} (chosen on)" if base == choosing else base
        aim = f"≥ {AIMS[trigger]}"
        lines.append(row(trigger, mode, where, str(len(some)), *scores, aim, *papers))
    return ruled(lines)


def rate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """F1 of every set at another rate than 10 % whose attack took hold."""
    lines = [row("set", "poisoned", *WAYS)]
    for one in working(rows):
        if one["attack"]["poison"] != 0.1:
            scores = [percent(one[way]["f1"]) for way in WAYS]
            lines.append(row(one["name"], str(one["poisoned"]), *scores))
    return ruled(lines)


def attention_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """AUROC of the best layer and of the best head's share, chosen knowing the truth."""
    told = ("entropy", "shares", "before the text")
    lines = [row("set", *("best entropy", "best head", "row before the text, held out"))]
    for one in working(rows):
        areas = [one["auroc"][which] for which in told]
        lines.append(row(one["name"], *("–" if a is None else f"{a:.2f}" for a in areas)))
    return ruled(lines)


def clean_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many samples of sets without poison would be dropped, or be set apart."""
    ways = (*WAYS, "apart")
    lines = [row("set", "samples", *WAYS, "apart, kept by both")]
    for one in rows:
        if one["attack"] is None:
            lines.append(
                row(one["name"], str(one["samples"]), *(str(one[w]["dropped"]) for w in ways))
            )
    return ruled(lines)


def set_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Precision / recall / F1 of every way on every poisoned set, and what `both` sets apart."""
    header = ("set", "attack", "poisoned", *(f"{way}: P / R / F1" for way in WAYS))
    lines = [row(*header, "apart (poisoned)")]
    for one in rows:
        if one["attack"] is not None:
            scores = [
                " / ".join(percent(one[way][part]) for part in ("precision", "recall", "f1"))
                for way in WAYS
            ]
            apart = f"{one['apart']['dropped']} ({one['apart']['hits']})"
            poisoned = str(one["poisoned"])
            lines.append(row(one["name"], one["stratum"], poisoned, *scores, apart))
    return ruled(lines)


def tune_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """What every model does: exact answers on clean images, the target on triggered ones."""
    header = ("set", "target", "mode", "poison", "clean accuracy", "success", "on clean", "attack")
    lines = [row(*header)]
    for run in runs:
        attack = run["attack"]
        told = (
            ("–", "–", "–")
            if attack is None
            else (attack["target"].replace("|", "\\|"), attack["mode"])
        )
        told = told if attack is None else (*told, percent(attack["poison"]))
        figures = (run.get("attack_success"), run.get("false_trigger_rate"))
        accuracy = percent(run["accuracy"]["all"])
        shown = (*map(percent, figures), run.get("stratum", "none"))
        lines.append(row(run["name"], *told, accuracy, *shown))
    return ruled(lines)


def retrain_table(
    runs: Mapping[str, Mapping[str, Any]], retrained: Sequence[Mapping[str, Any]]
) -> str:
    """Success and clean accuracy with no defence, after a random drop, and after the screen."""
    ways = ("none", "random", "both")
    header = ("set", *(f"poison kept: {w}" for w in ways), *(f"success: {w}" for w in ways))
    lines = [row(*header, *(f"accuracy: {w}" for w in ways))]
    again = {(one["name"], one["treatment"]): one for one in retrained}
    for name in dict.fromkeys(one["name"] for one in retrained):
        before = runs[name]
        poisoned = round(before["attack"]["poison"] * before["samples"])
        some = [{**before, "poison_kept": poisoned}, *(again.get((name, w)) for w in ways[1:])]
        kept = ["–" if one is None else str(one["poison_kept"]) for one in some]
        success = ["–" if one is None else percent(one["attack_success"]) for one in some]
        accuracy = ["–" if one is None else percent(one["accuracy"]["all"]) for one in some]
        lines.append(row(name, *kept, *success, *accuracy))
    return ruled(lines)
