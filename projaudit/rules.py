"""Rules and policies: YAML files that turn measurements into findings. Parsed, never evaluated."""

from __future__ import annotations

import math
import operator
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from projaudit.data import data_path
from projaudit.errors import ProjauditError, UsageError
from projaudit.findings import (
    Confidence,
    Finding,
    Measurement,
    Severity,
    Skipped,
    Unevaluated,
)
from projaudit.inert import clean
from projaudit.metrics import Metric
from projaudit.report import RuleOutcome
from projaudit.strict import load_yaml

_COMPARISON = re.compile(
    r"([a-z][a-z0-9_]*)\s*(<=|>=|==|!=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
)
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_FORMAT = re.compile(r"[+,]?(\.\d{1,2})?[efg%]?")
_NULLS = ("equal_norm", "equal_spectrum")
_RULE_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_RULE_KEYS = {
    "title", "severity", "confidence", "when", "message", "why", "remedy", "references",
    "inconclusive", "calibration", "examples",
}  # fmt: skip
_POLICY_KEYS = {
    "name", "extends", "depth", "fail_on", "disable", "thresholds", "inconclusive", "pins",
    "waivers", "options",
}  # fmt: skip
OPTIONS = frozenset(
    {"base", "base_revision", "device", "rank", "seed", "offline", "verify", "format"}
)
"""Options of `check` that a policy file may set."""


@dataclass(frozen=True)
class Comparison:
    """`metric < threshold`, the one kind of term that a condition has."""

    metric: str
    operator: str
    threshold: float


@dataclass(frozen=True)
class Condition:
    """`all`, `any` or `not` over comparisons and conditions; Kleene's three values."""

    kind: Literal["all", "any", "not"]
    terms: tuple[Comparison | Condition, ...]


@dataclass(frozen=True)
class Rule:
    """One rule file; its id is the file's name."""

    id: str
    title: str
    severity: Severity
    confidence: Confidence
    subject: str
    """Finest kind of subject that the condition reads."""
    when: Comparison | Condition
    message: str
    why: str
    remedy: str
    references: tuple[str, ...]
    inconclusive: bool
    """Fired, it takes the ground from under a pass."""
    calibration: Mapping[str, Any] | None
    fires: tuple[Mapping[str, float], ...]
    passes: tuple[Mapping[str, float], ...]

    @property
    def required(self) -> bool:
        """Whether the verdict needs it evaluated: not for rules that only describe."""
        return self.severity > Severity.INFO or self.inconclusive


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


def load_rules(folder: Path, metrics: Mapping[str, Metric]) -> tuple[Rule, ...]:
    """The rules of a folder's YAML files by id; UsageError `usage.rule` names file and key."""
    if not folder.is_dir():
        raise UsageError("is not a folder of rules", "rule", file=clean(folder))
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UsageError("has no rule (*.yaml)", "rule", file=clean(folder))
    return tuple(load_rule(file, metrics) for file in files)


def load_rule(file: Path, metrics: Mapping[str, Metric]) -> Rule:
    """One rule file, checked throughout; UsageError `usage.rule` names file and key."""

    def wrong(message: str, key: str = "") -> UsageError:
        return UsageError(message, "rule", file=clean(file), field=key or None)

    if not _RULE_ID.fullmatch(file.stem):
        raise wrong("the file name is no rule id (lower-case words joined by hyphens)")
    entry = _mapping(_read_yaml(file, "rule"), wrong)
    if unknown := sorted(set(map(str, entry)) - _RULE_KEYS):
        raise wrong(f"unknown key; known are {', '.join(sorted(_RULE_KEYS))}", clean(unknown[0]))
    text = {
        key: _text(entry, key, wrong)
        for key in ("title", "severity", "confidence", "message", "why", "remedy")
    }
    try:
        severity, confidence = Severity.parse(text["severity"]), Confidence(text["confidence"])
    except ValueError as error:
        raise wrong(clean(error), "severity or confidence") from None
    if "when" not in entry:
        raise wrong("is missing", "when")
    when = _condition(entry["when"], wrong)
    read = _metrics_of(when)
    for name in read:
        if _metric(name, metrics) is None:
            raise wrong(f"unknown metric {clean(name)}; see `projaudit rules metrics`", "when")
    subjects = {m.subject for name in read if (m := _metric(name, metrics))}
    if {"layer", "vector"} <= subjects:
        raise wrong("reads metrics of layers and of vectors, which share no subject", "when")
    _check_message(text["message"], read, wrong)
    calibration = entry.get("calibration")
    if calibration is not None:
        _check_calibration(calibration, wrong)
    statistic = any(m.kind == "statistic" for name in read if (m := _metric(name, metrics)))
    if statistic and severity > Severity.INFO and calibration is None:
        raise wrong("a rule on statistics is `info` unless it has a calibration", "severity")
    examples = _mapping(entry.get("examples", {}), wrong, "examples")
    fires, passes = (_examples(examples, key, read, wrong) for key in ("fires", "passes"))
    inconclusive = entry.get("inconclusive", False)
    if not isinstance(inconclusive, bool):
        raise wrong("is neither true nor false", "inconclusive")
    references = entry.get("references", [])
    if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
        raise wrong("is no list of texts", "references")
    rule = Rule(
        id=file.stem,
        title=text["title"],
        severity=severity,
        confidence=confidence,
        subject=next(s for s in ("layer", "vector", "projector", "checkpoint") if s in subjects),
        when=when,
        message=text["message"],
        why=text["why"],
        remedy=text["remedy"],
        references=tuple(references),
        inconclusive=inconclusive,
        calibration=calibration,
        fires=fires,
        passes=passes,
    )
    if failed := failed_examples(rule):
        raise wrong(failed[0], "examples")
    return rule


def failed_examples(rule: Rule) -> list[str]:
    """What a rule's own examples say against it; empty if every one behaves as written."""
    failed = []
    for wanted, examples in ((True, rule.fires), (False, rule.passes)):
        for values in examples:
            if evaluate(rule.when, values) is not wanted:
                verb = "fire" if wanted else "stay quiet"
                failed.append(f"{dict(values)} should make {rule.id} {verb} and does not")
    return failed


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
    entry = _mapping(_read_yaml(file, "policy"), wrong)
    if unknown := sorted(set(map(str, entry)) - _POLICY_KEYS):
        raise wrong(f"unknown key; known are {', '.join(sorted(_POLICY_KEYS))}", clean(unknown[0]))
    if "extends" in entry:
        parent = _text(entry, "extends", wrong)
        if parent not in presets() or parent == file.stem:
            raise wrong(f"is no preset; presets are {', '.join(presets())}", "extends")
        start = _policy(parent, rules, depth + 1)
    else:
        start = RuleSet("", "weights", "fail", tuple(rules.values()))
    policy = replace(
        start,
        name=str(entry.get("name", file.stem)),
        depth=_choice(entry, "depth", ("weights", "behaviour"), start.depth, wrong),
        fail_on=_choice(entry, "fail_on", ("fail", "review"), start.fail_on, wrong),
        rules=_adjusted(start.rules, entry, wrong),
        pins={**start.pins, **_pins(entry, wrong)},
        waivers=(*start.waivers, *_waivers(entry, rules, wrong)),
        options={**start.options, **_options(entry, wrong)},
    )
    if not any(rule.required for rule in policy.rules):
        raise wrong("leaves no rule that could ever object", "disable")
    return policy


_Wrong = Callable[..., UsageError]


def _adjusted(rules: Sequence[Rule], entry: Mapping[str, Any], wrong: _Wrong) -> tuple[Rule, ...]:
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
    thresholds = _mapping(entry.get("thresholds", {}), wrong, "thresholds")
    for rule in thresholds:
        if rule not in known:
            raise wrong(f"unknown rule {clean(rule)}", "thresholds")
    return tuple(
        replace(
            rule,
            when=_with_thresholds(rule, thresholds.get(rule.id, {}), wrong),
            inconclusive=rule.inconclusive or rule.id in undermining,
        )
        for rule in rules
        if rule.id not in disabled
    )


def _with_thresholds(rule: Rule, changes: Any, wrong: _Wrong) -> Comparison | Condition:
    new = _mapping(changes, wrong, "thresholds")
    for metric, value in new.items():
        if metric not in _metrics_of(rule.when):
            raise wrong(f"{rule.id} does not read {clean(metric)}", "thresholds")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            raise wrong(f"{rule.id}: {clean(metric)} is no finite number", "thresholds")

    def changed(term: Comparison | Condition) -> Comparison | Condition:
        if isinstance(term, Comparison):
            return replace(term, threshold=float(new.get(term.metric, term.threshold)))
        return replace(term, terms=tuple(changed(t) for t in term.terms))

    return changed(rule.when)


def _pins(entry: Mapping[str, Any], wrong: _Wrong) -> dict[str, str]:
    pins = _mapping(entry.get("pins", {}), wrong, "pins")
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in pins.items()):
        raise wrong("maps target repositories to base references", "pins")
    return dict(pins)


def _options(entry: Mapping[str, Any], wrong: _Wrong) -> dict[str, Any]:
    options = _mapping(entry.get("options", {}), wrong, "options")
    for key in options:
        if key not in OPTIONS:
            raise wrong(f"unknown option {clean(key)}", "options")
    return dict(options)


def _waivers(
    entry: Mapping[str, Any], rules: Mapping[str, Rule], wrong: _Wrong
) -> tuple[Waiver, ...]:
    found = entry.get("waivers", [])
    if not isinstance(found, list):
        raise wrong("is no list", "waivers")
    waivers = []
    for item in found:
        waiver = _mapping(item, wrong, "waivers")
        wanted = {"rule", "digest", "statement", "owner", "expires"}
        if set(waiver) != wanted:
            raise wrong(f"a waiver has the keys {', '.join(sorted(wanted))}", "waivers")
        rule, digest, statement, owner = (
            _text(waiver, key, wrong) for key in ("rule", "digest", "statement", "owner")
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
                missing = [m for m in _metrics_of(rule.when) if m not in seen]
                reason = _reason(missing, subject, reasons)
                open_.append(Unevaluated(rule.id, subject, reason, rule.required))
            elif result:
                fired.append(_finding(rule, subject, seen, details, policy, digests, day))
        findings += fired
        unevaluated += open_
        outcomes.append(_outcome(rule, bool(fired), bool(open_), bool(asked)))
    findings.sort(key=lambda f: (-f.severity, f.rule, f.subject))
    return tuple(findings), tuple(unevaluated), tuple(outcomes)


def evaluate(condition: Comparison | Condition, values: Mapping[str, float]) -> bool | None:
    """Whether the condition holds, None where a value that decides it is missing or NaN."""
    if isinstance(condition, Comparison):
        value = values.get(condition.metric)
        if value is None or math.isnan(value):
            return None
        return _OPERATORS[condition.operator](value, condition.threshold)
    results = [evaluate(term, values) for term in condition.terms]
    if condition.kind == "not":
        return None if results[0] is None else not results[0]
    decisive = condition.kind == "any"
    if decisive in results:
        return decisive
    return None if None in results else not decisive


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
    read = _metrics_of(rule.when)
    names = tuple(
        name
        for metric in read
        for where in _above(subject)
        for name in details.get((metric, where), ())
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


def _metric(name: str, metrics: Mapping[str, Metric]) -> Metric | None:
    """The metric of that name, or the one whose z-score it is."""
    for null in _NULLS:
        name = name.removesuffix(f"_z_{null}")
    return metrics.get(name)


def _metrics_of(condition: Comparison | Condition) -> tuple[str, ...]:
    if isinstance(condition, Comparison):
        return (condition.metric,)
    return tuple(dict.fromkeys(m for term in condition.terms for m in _metrics_of(term)))


def _condition(entry: object, wrong: _Wrong, depth: int = 0) -> Comparison | Condition:
    if depth > 8:
        raise wrong("is nested too deeply", "when")
    if isinstance(entry, str):
        match = _COMPARISON.fullmatch(entry.strip())
        if match is None or not _finite(float(match[3])):
            raise wrong(f"{clean(entry)!r} is no comparison such as `stable_rank < 2`", "when")
        return Comparison(match[1], match[2], float(match[3]))
    if isinstance(entry, dict) and len(entry) == 1:
        kind, terms = next(iter(entry.items()))
        if kind == "not":
            return Condition("not", (_condition(terms, wrong, depth + 1),))
        if kind in ("all", "any") and isinstance(terms, list) and terms:
            return Condition(kind, tuple(_condition(t, wrong, depth + 1) for t in terms))
    raise wrong("wants a comparison, or one of all: […], any: […], not: …", "when")


def _check_message(message: str, read: Sequence[str], wrong: _Wrong) -> None:
    try:
        parts = list(string.Formatter().parse(message))
    except ValueError as error:
        raise wrong(clean(error), "message") from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name in ("detail", "subject") and not spec and conversion is None:
            continue
        if name not in read:
            raise wrong(f"the field {clean(name)} is not read in `when`", "message")
        if conversion is not None or not _FORMAT.fullmatch(spec or ""):
            raise wrong(f"the format of {name} is not one for numbers", "message")


def _check_calibration(entry: object, wrong: _Wrong) -> None:
    c = _mapping(entry, wrong, "calibration")
    if set(c) != {"population", "n", "false_positive_rate", "interval"}:
        raise wrong("has the keys population, n, false_positive_rate, interval", "calibration")
    numbers = [c["n"], c["false_positive_rate"], *(c["interval"] or ())]
    if len(numbers) != 4 or not all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and _finite(x) for x in numbers
    ):
        raise wrong("n, rate and both interval ends are numbers", "calibration")
    if not (c["n"] >= 1 and 0 <= c["interval"][0] <= c["false_positive_rate"] <= c["interval"][1]):
        raise wrong("the interval does not hold the rate", "calibration")


def _examples(
    examples: Mapping[str, Any], key: str, read: Sequence[str], wrong: _Wrong
) -> tuple[Mapping[str, float], ...]:
    found = examples.get(key)
    if set(examples) != {"fires", "passes"} or not isinstance(found, list) or not found:
        raise wrong("wants `fires` and `passes`, each with at least one set of values", "examples")
    for values in found:
        for name, value in _mapping(values, wrong, "examples").items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in read or not number:
                raise wrong(f"{clean(name)} is no metric of `when` with a number", "examples")
    return tuple({k: float(v) for k, v in values.items()} for values in found)


def _read_yaml(file: Path, kind: str) -> object:
    try:
        if file.stat().st_size > 256 * 1024:
            raise UsageError("is larger than 256 KiB", kind, file=clean(file))
        data = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UsageError(clean(reason), kind, file=clean(file)) from None
    try:
        return load_yaml(data, file=clean(file))
    except ProjauditError as error:
        raise UsageError(error.message, kind, file=clean(file), field=error.field) from None


def _mapping(entry: object, wrong: _Wrong, key: str = "") -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise wrong("is no mapping of keys to values", key)
    return entry


def _text(entry: Mapping[str, Any], key: str, wrong: _Wrong) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise wrong("is missing or no text", key)
    return value.strip()


def _choice(
    entry: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str, wrong: _Wrong
) -> Any:
    value = entry.get(key, default)
    if value not in allowed:
        raise wrong(f"is none of {', '.join(allowed)}", key)
    return value


def _finite(value: float) -> bool:
    return math.isfinite(value)
