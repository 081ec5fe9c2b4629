"""Policies: which rules apply, with which thresholds, pins, waivers and fail level."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from projaudit.data import data_path
from projaudit.errors import UsageError
from projaudit.inert import clean
from projaudit.metrics import Metric
from projaudit.rules import (
    MAX_BOUND,
    Comparison,
    Condition,
    Rule,
    Wrong,
    choice,
    is_calibrated,
    load_rules,
    mapping,
    metrics_of,
    read_entry,
    text_of,
)

OPTIONS: Mapping[str, tuple[type, ...]] = {
    "base": (str,),
    "base_revision": (str,),
    "device": (str,),
    "rank": (int,),
    "seed": (int,),
    "offline": (bool,),
    "verify": (str,),
    "format": (str, list),
}
"""Options of `check` that a policy file may set, with the types of their values."""
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_KEYS = {
    "name", "extends", "depth", "fail_on", "disable", "thresholds", "inconclusive", "pins",
    "waivers", "options",
}  # fmt: skip


@dataclass(frozen=True)
class Waiver:
    """A finding accepted by someone for these very bytes, until a day."""

    rule: str
    digest: str
    """Commit of the target (40 hex) or sha256 of a projector tensor (64 hex)."""
    statement: str
    owner: str
    expires: date


@dataclass(frozen=True)
class RuleSet:
    """A policy with its rules, as it will be applied."""

    name: str
    depth: Literal["weights", "behaviour"]
    fail_on: Literal["fail", "review"]
    rules: tuple[Rule, ...]
    pins: Mapping[str, str] = field(default_factory=dict)
    """Target repository -> base reference, which then counts as verified."""
    waivers: tuple[Waiver, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def load_policy(
    source: str | Path, metrics: Mapping[str, Metric], extra_rules: Path | None = None
) -> RuleSet:
    """A preset by name or a policy by file, with its rules and those of `extra_rules`.

    UsageError `usage.policy` or `usage.rule` names file and key.
    """
    rules = {rule.id: rule for rule in load_rules(data_path("rules"), metrics)}
    if extra_rules is not None:
        for rule in load_rules(extra_rules, metrics):
            if rule.id in rules:
                raise UsageError(
                    "a rule of this id exists already",
                    "rule",
                    file=clean(extra_rules / f"{rule.id}.yaml"),
                )
            rules[rule.id] = rule
    return _policy(source, rules, depth=0)


def presets() -> tuple[str, ...]:
    """Names of the policies that come with projaudit."""
    return tuple(sorted(f.stem for f in (data_path("rules") / "policies").glob("*.yaml")))


def _policy(source: str | Path, rules: Mapping[str, Rule], depth: int) -> RuleSet:
    named = isinstance(source, str) and source in presets()
    file = data_path("rules") / "policies" / f"{source}.yaml" if named else Path(source)

    def wrong(message: str, key: str = "") -> UsageError:
        return UsageError(message, "policy", file=clean(file), field=key or None)

    if depth > 8:
        raise wrong("extends itself", "extends")
    entry = mapping(read_entry(file, "policy"), wrong)
    if unknown := sorted(set(map(str, entry)) - _KEYS):
        raise wrong(f"unknown key; known are {', '.join(sorted(_KEYS))}", clean(unknown[0]))
    if "extends" in entry:
        parent = text_of(entry, "extends", wrong)
        if parent not in presets() or (named and parent == source):
            raise wrong(f"is no preset; presets are {', '.join(presets())}", "extends")
        start = _policy(parent, rules, depth + 1)
    else:
        start = RuleSet("", "weights", "fail", tuple(rules.values()))
    policy = replace(
        start,
        name=str(entry.get("name", file.stem)),
        depth=choice(entry, "depth", ("weights", "behaviour"), start.depth, wrong),
        fail_on=choice(entry, "fail_on", ("fail", "review"), start.fail_on, wrong),
        rules=_adjusted(start.rules, entry, wrong),
        pins={**start.pins, **_pins(entry, wrong)},
        waivers=(*start.waivers, *_waivers(entry, rules, wrong)),
        options={**start.options, **_options(entry, wrong)},
    )
    if not any(rule.required for rule in policy.rules):
        raise wrong("leaves no rule that could ever object", "disable")
    return policy


def _adjusted(rules: Sequence[Rule], entry: Mapping[str, Any], wrong: Wrong) -> tuple[Rule, ...]:
    known = {rule.id for rule in rules}

    def named(key: str) -> set[str]:
        ids = entry.get(key, [])
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise wrong("is no list of rule ids", key)
        for rule in ids:
            if rule not in known:
                raise wrong(f"unknown rule {clean(rule)}", key)
        return set(ids)

    disabled, undermining = named("disable"), named("inconclusive")
    thresholds = mapping(entry.get("thresholds", {}), wrong, "thresholds")
    for rule in thresholds:
        if rule not in known:
            raise wrong(f"unknown rule {clean(rule)}", "thresholds")
    adjusted = tuple(
        replace(
            rule,
            when=_with_thresholds(rule, thresholds.get(rule.id, {}), wrong),
            inconclusive=rule.inconclusive or rule.id in undermining,
        )
        for rule in rules
        if rule.id not in disabled
    )
    for changed in adjusted:
        if changed.needs_bound and not is_calibrated(changed.when):
            raise wrong(f"{changed.id}: hidden_text_bound is at most {MAX_BOUND:g}", "thresholds")
    return adjusted


def _with_thresholds(rule: Rule, changes: Any, wrong: Wrong) -> Comparison | Condition:
    new = mapping(changes, wrong, "thresholds")
    for metric, value in new.items():
        if metric not in metrics_of(rule.when):
            raise wrong(f"{rule.id} does not read {clean(metric)}", "thresholds")
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise wrong(f"{rule.id}: {clean(metric)} is no finite number", "thresholds")

    def changed(term: Comparison | Condition) -> Comparison | Condition:
        if isinstance(term, Comparison):
            return replace(term, threshold=float(new.get(term.metric, term.threshold)))
        return replace(term, terms=tuple(changed(t) for t in term.terms))

    return changed(rule.when)


def _pins(entry: Mapping[str, Any], wrong: Wrong) -> dict[str, str]:
    pins = mapping(entry.get("pins", {}), wrong, "pins")
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in pins.items()):
        raise wrong("maps target repositories to base references", "pins")
    return dict(pins)


def _options(entry: Mapping[str, Any], wrong: Wrong) -> dict[str, Any]:
    options = mapping(entry.get("options", {}), wrong, "options")
    for key, value in options.items():
        if key not in OPTIONS:
            raise wrong(f"unknown option {clean(key)}", "options")
        if type(value) not in OPTIONS[key]:
            raise wrong(f"{key} has a value of the wrong type", "options")
    return dict(options)


def _waivers(
    entry: Mapping[str, Any], rules: Mapping[str, Rule], wrong: Wrong
) -> tuple[Waiver, ...]:
    found = entry.get("waivers", [])
    if not isinstance(found, list):
        raise wrong("is no list", "waivers")
    waivers = []
    for item in found:
        waiver = mapping(item, wrong, "waivers")
        wanted = {"rule", "digest", "statement", "owner", "expires"}
        if set(waiver) != wanted:
            raise wrong(f"a waiver has the keys {', '.join(sorted(wanted))}", "waivers")
        rule, digest, statement, owner = (
            text_of(waiver, key, wrong) for key in ("rule", "digest", "statement", "owner")
        )
        if rule not in rules:
            raise wrong(f"unknown rule {clean(rule)}", "waivers")
        if not _DIGEST.fullmatch(digest):
            raise wrong("digest is neither a commit (40 hex) nor a sha256 (64 hex)", "waivers")
        try:
            expires = date.fromisoformat(str(waiver["expires"]))
        except ValueError:
            raise wrong("expires is no date (yyyy-mm-dd)", "waivers") from None
        waivers.append(Waiver(rule, digest, statement, owner, expires))
    return tuple(waivers)
