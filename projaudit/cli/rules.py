"""`projaudit rules`: list them, read one, test your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from projaudit.cli.terminal import emit, option
from projaudit.errors import UsageError
from projaudit.inert import clean


@click.group()
def rules() -> None:
    """The rules: list them, read one, test your own."""


@rules.command("list")
@option("--rules", "folder", type=click.Path(path_type=Path), help="Your own rules as well.")
def list_rules(folder: Path | None) -> None:
    """One line per rule: severity, id, title."""
    for rule in sorted(_known_rules(folder), key=lambda r: (-r.severity, r.id)):
        emit(f"{rule.severity.label:<9} {rule.id:<28} {clean(rule.title)}")


@rules.command("show")
@click.argument("rule")
@option("--rules", "folder", type=click.Path(path_type=Path), help="Your own rules as well.")
def show_rule(rule: str, folder: Path | None) -> None:
    """What a rule says, why, and what to do about it."""
    known = {r.id: r for r in _known_rules(folder)}
    if rule not in known:
        raise UsageError(f"there is no rule {clean(rule)!r}", "rule", remedy="see `rules list`")
    found = known[rule]
    import textwrap

    indent = "  "
    emit(f"{found.id}: {clean(found.title)}")
    emit(f"  severity {found.severity.label}, confidence {found.confidence.value}")
    if found.inconclusive:
        emit("  takes the ground from under a pass")
    emit(f"  when     {_condition_text(found.when)}")
    for text in (found.message, found.why, found.remedy):
        emit("")
        emit(textwrap.fill(clean(text, 2000), 88, initial_indent=indent, subsequent_indent=indent))
    if found.references:
        emit(f"\n  {', '.join(clean(r) for r in found.references)}")


@rules.command("test")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def test_rules(folder: Path | None) -> None:
    """Load rules and run their own examples; a rule that cannot fire or stay quiet is an error."""
    found = _known_rules(folder)
    examples = sum(len(rule.fires) + len(rule.passes) for rule in found)
    emit(f"{len(found)} rules, {examples} examples: all behave as written")


@rules.command("metrics")
def list_metrics() -> None:
    """The names that a rule's condition may use, with unit and formula."""
    from projaudit.analyses import METRICS

    for metric in METRICS.values():
        unit = f" [{metric.unit}]" if metric.unit else ""
        emit(f"{metric.subject:<10} {metric.name:<28} {metric.formula}{unit}")


def _condition_text(condition: Any) -> str:
    """A condition on one line, as a rule's author would write it."""
    if hasattr(condition, "metric"):
        return f"{condition.metric} {condition.operator} {condition.threshold:g}"
    terms = [_condition_text(term) for term in condition.terms]
    if condition.kind == "not":
        return f"not ({terms[0]})"
    return "(" + (" and " if condition.kind == "all" else " or ").join(terms) + ")"


def _known_rules(folder: Path | None) -> Any:
    from projaudit.analyses import METRICS
    from projaudit.data import data_path
    from projaudit.policy import load_policy
    from projaudit.rules import load_rules

    own = load_rules(data_path("rules"), METRICS)
    if folder is None or folder.resolve() == data_path("rules").resolve():
        return own
    return load_policy("structure", METRICS, folder).rules
