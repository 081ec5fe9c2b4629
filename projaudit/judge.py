"""Measurements under a policy's rules: findings, and what could not be decided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date

from projaudit.findings import Finding, Measurement, Skipped, Unevaluated
from projaudit.metrics import Metric
from projaudit.policy import RuleSet
from projaudit.report import RuleOutcome
from projaudit.rules import Rule, evaluate, metrics_of


def judge(
    policy: RuleSet,
    measurements: Iterable[Measurement],
    skipped: Iterable[Skipped],
    metrics: Mapping[str, Metric],
    *,
    digests: frozenset[str] = frozenset(),
    today: date | None = None,
) -> tuple[tuple[Finding, ...], tuple[Unevaluated, ...], tuple[RuleOutcome, ...]]:
    """Findings, rules that could not be decided, and the outcome of every rule.

    A rule is asked of every subject of its kind and also sees the values of the subjects above
    (layer, its projector, the checkpoint). `digests` are the commit and tensor digests of the
    target, which waivers are bound to.
    """
    values, details = _values(measurements)
    reasons = {(s.metric, s.subject): s.reason for s in skipped}
    subjects = _subjects(values, reasons, metrics)
    day = today or date.today()
    findings: list[Finding] = []
    unevaluated: list[Unevaluated] = []
    outcomes: list[RuleOutcome] = []
    for rule in policy.rules:
        fired, open_ = [], []
        asked = subjects.get(rule.subject, [])
        for subject in asked:
            seen = _seen(subject, values)
            result = evaluate(rule.when, seen)
            if result is None:
                missing = [m for m in metrics_of(rule.when) if m not in seen]
                reason = _reason(missing, subject, reasons)
                open_.append(Unevaluated(rule.id, subject, reason, rule.required))
            elif result:
                fired.append(_finding(rule, subject, seen, details, policy, digests, day))
        findings += fired
        unevaluated += open_
        outcomes.append(_outcome(rule, bool(fired), bool(open_), bool(asked)))
    findings.sort(key=lambda f: (-f.severity, f.rule, f.subject))
    return tuple(findings), tuple(unevaluated), tuple(outcomes)


def _values(
    measurements: Iterable[Measurement],
) -> tuple[dict[str, dict[str, float]], dict[tuple[str, str], tuple[str, ...]]]:
    """Subject -> metric -> value, with the z-scores of the nulls as values of their own."""
    values: dict[str, dict[str, float]] = {}
    details: dict[tuple[str, str], tuple[str, ...]] = {}
    for m in measurements:
        of_subject = values.setdefault(m.subject, {})
        of_subject[m.metric] = m.value
        details[m.metric, m.subject] = m.detail
        for null in m.nulls:
            if (z := null.z(m.value)) is not None:
                of_subject[f"{m.metric}_z_{null.kind}"] = z
    return values, details


def _subjects(
    values: Mapping[str, Mapping[str, float]],
    reasons: Mapping[tuple[str, str], str],
    metrics: Mapping[str, Metric],
) -> dict[str, list[str]]:
    """Subject kind -> subjects of that kind, from the metrics that were asked of them."""
    kinds: dict[str, list[str]] = {}
    asked = [(m, s) for s, of_subject in values.items() for m in of_subject] + list(reasons)
    for name, subject in asked:
        metric = metrics.get(name)
        if metric is not None and subject not in kinds.setdefault(metric.subject, []):
            kinds[metric.subject].append(subject)
    return {kind: sorted(found) for kind, found in kinds.items()}


def _seen(subject: str, values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    found = ((n, v) for s in _above(subject) for n, v in values.get(s, {}).items())
    return {name: value for name, value in found if math.isfinite(value)}


def _above(subject: str) -> tuple[str, ...]:
    """The subjects whose values a subject sees: the checkpoint's, its projector's, its own."""
    return tuple(dict.fromkeys(("checkpoint", subject.partition("/")[0], subject)))


def _reason(missing: Sequence[str], subject: str, reasons: Mapping[tuple[str, str], str]) -> str:
    for metric in missing:
        for where in reversed(_above(subject)):
            if (metric, where) in reasons:
                return f"{metric}: {reasons[metric, where]}"
    return f"{', '.join(missing)} not measured"


def _finding(
    rule: Rule,
    subject: str,
    seen: Mapping[str, float],
    details: Mapping[tuple[str, str], tuple[str, ...]],
    policy: RuleSet,
    digests: frozenset[str],
    day: date,
) -> Finding:
    read = metrics_of(rule.when)
    names = tuple(
        dict.fromkeys(
            name
            for metric in read
            for where in _above(subject)
            for name in details.get((metric, where), ())
        )
    )
    shown = dict.fromkeys(read, math.nan) | {m: seen[m] for m in read if m in seen}
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    waiver = next(
        (
            w
            for w in policy.waivers
            if w.rule == rule.id and w.digest in digests and w.expires >= day
        ),
        None,
    )
    return Finding(
        rule=rule.id,
        title=rule.title,
        severity=rule.severity,
        confidence=rule.confidence,
        subject=subject,
        message=rule.message.format_map({**shown, "detail": listed, "subject": subject}),
        why=rule.why,
        remedy=rule.remedy,
        references=rule.references,
        values={m: v for m, v in shown.items() if not math.isnan(v)},
        detail=names,
        inconclusive=rule.inconclusive,
        waived=f"{waiver.statement} ({waiver.owner}, until {waiver.expires})" if waiver else "",
    )


def _outcome(rule: Rule, fired: bool, open_: bool, asked: bool) -> RuleOutcome:
    c = rule.calibration
    return RuleOutcome(
        rule=rule.id,
        title=rule.title,
        severity=rule.severity,
        outcome="fired"
        if fired
        else "unevaluated"
        if open_
        else "quiet"
        if asked
        else "not-applicable",
        why=rule.why,
        remedy=rule.remedy,
        references=rule.references,
        calibration=""
        if c is None
        else f"{c['population']}, n = {c['n']}, false positives {c['false_positive_rate']:.1%} "
        f"(95 % interval {c['interval'][0]:.1%} to {c['interval'][1]:.1%})",
    )
