"""Rules and policies: YAML files that turn measurements into findings. Parsed, never evaluated."""

from __future__ import annotations

import math
import operator
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from projaudit.errors import ProjauditError, UsageError
from projaudit.findings import (
    Confidence,
    Severity,
)
from projaudit.inert import clean
from projaudit.metrics import Metric
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
_NULLS = ("equal_norm", "equal_spectrum", "random_direction", "sign_flip")
MAX_FALSE_POSITIVES = 0.05
"""Share of honest fine-tunes above which a rule describes and does not accuse."""
MAX_BOUND = 0.02
"""Upper 95 % bound of that share, above which what was heard is for a reader to judge."""
SUBJECTS = ("layer", "vector", "projector", "merge", "behaviour", "checkpoint", "dataset")
"""Finest first."""
_RULE_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_RULE_KEYS = {
    "title", "severity", "confidence", "when", "message", "why", "remedy", "references",
    "inconclusive", "calibration", "examples",
}  # fmt: skip


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

    @property
    def needs_bound(self) -> bool:
        """Whether it accuses by what was heard, which takes a population's bound."""
        return self.subject == "behaviour" and self.severity >= Severity.HIGH


Wrong = Callable[..., UsageError]
"""Makes the error of a file: `wrong(message, key)`."""


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
    entry = mapping(read_entry(file, "rule"), wrong)
    if unknown := sorted(set(map(str, entry)) - _RULE_KEYS):
        raise wrong(f"unknown key; known are {', '.join(sorted(_RULE_KEYS))}", clean(unknown[0]))
    text = {
        key: text_of(entry, key, wrong)
        for key in ("title", "severity", "confidence", "message", "why", "remedy")
    }
    try:
        severity, confidence = Severity.parse(text["severity"]), Confidence(text["confidence"])
    except ValueError as error:
        raise wrong(clean(error), "severity or confidence") from None
    if "when" not in entry:
        raise wrong("is missing", "when")
    when = _condition(entry["when"], wrong)
    read = metrics_of(when)
    for name in read:
        if _metric(name, metrics) is None:
            raise wrong(f"unknown metric {clean(name)}; see `projaudit rules metrics`", "when")
    subjects = {m.subject for name in read if (m := _metric(name, metrics))}
    for first, second in (("layer", "vector"), ("behaviour", "layer"), ("behaviour", "vector")):
        if {first, second} <= subjects:
            raise wrong(
                f"reads metrics of {first}s and of {second}s, which share no subject", "when"
            )
    if "dataset" in subjects and len(subjects) > 1:
        raise wrong("reads metrics of a dataset and of a model, which share no subject", "when")
    _check_message(text["message"], read, wrong)
    calibration = entry.get("calibration")
    if calibration is not None:
        _check_calibration(calibration, wrong)
    kinds = [m.kind for name in read if (m := _metric(name, metrics))]
    if "statistic" in kinds and severity > Severity.INFO and calibration is None:
        raise wrong("a rule on statistics is `info` unless it has a calibration", "severity")
    if "behaviour" in kinds and severity >= Severity.HIGH and not is_calibrated(when):
        raise wrong(
            "a rule on behaviour is at most `medium` unless it demands, in `all`, "
            f"hidden_text_bound <= {MAX_BOUND:g} (or less) and calibration_covers == 1",
            "severity",
        )
    examples = mapping(entry.get("examples", {}), wrong, "examples")
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
        subject=next(s for s in SUBJECTS if s in subjects),
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


def is_calibrated(when: Comparison | Condition) -> bool:
    """Whether a condition demands the bound on false positives and a population of the kind."""
    terms = when.terms if isinstance(when, Condition) and when.kind == "all" else (when,)
    demands = {(t.metric, t.operator): t.threshold for t in terms if isinstance(t, Comparison)}
    bounds = [demands.get(("hidden_text_bound", o), math.inf) for o in ("<", "<=")]
    return min(bounds) <= MAX_BOUND and demands.get(("calibration_covers", "==")) == 1


def failed_examples(rule: Rule) -> list[str]:
    """What a rule's own examples say against it; empty if every one behaves as written."""
    failed = []
    for wanted, examples in ((True, rule.fires), (False, rule.passes)):
        for values in examples:
            if evaluate(rule.when, values) is not wanted:
                verb = "fire" if wanted else "stay quiet"
                failed.append(f"{dict(values)} should make {rule.id} {verb} and does not")
    return failed


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


def _metric(name: str, metrics: Mapping[str, Metric]) -> Metric | None:
    """The metric of that name, or the statistic whose z-score it is."""
    for null in _NULLS:
        scored = metrics.get(name.removesuffix(f"_z_{null}"))
        if name.endswith(f"_z_{null}"):
            return scored if scored and scored.kind == "statistic" else None
    return metrics.get(name)


def metrics_of(condition: Comparison | Condition) -> tuple[str, ...]:
    if isinstance(condition, Comparison):
        return (condition.metric,)
    return tuple(dict.fromkeys(m for term in condition.terms for m in metrics_of(term)))


def _condition(entry: object, wrong: Wrong, depth: int = 0) -> Comparison | Condition:
    if depth > 8:
        raise wrong("is nested too deeply", "when")
    if isinstance(entry, str):
        match = _COMPARISON.fullmatch(entry.strip())
        if match is None or not math.isfinite(float(match[3])):
            raise wrong(f"{clean(entry)!r} is no comparison such as `stable_rank < 2`", "when")
        return Comparison(match[1], match[2], float(match[3]))
    if isinstance(entry, dict) and len(entry) == 1:
        kind, terms = next(iter(entry.items()))
        if kind == "not":
            return Condition("not", (_condition(terms, wrong, depth + 1),))
        if kind in ("all", "any") and isinstance(terms, list) and terms:
            return Condition(kind, tuple(_condition(t, wrong, depth + 1) for t in terms))
    raise wrong("wants a comparison, or one of all: […], any: […], not: …", "when")


def _check_message(message: str, read: Sequence[str], wrong: Wrong) -> None:
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


def _check_calibration(entry: object, wrong: Wrong) -> None:
    c = mapping(entry, wrong, "calibration")
    if set(c) != {"population", "n", "false_positive_rate", "interval"}:
        raise wrong("has the keys population, n, false_positive_rate, interval", "calibration")
    interval = c["interval"] if isinstance(c["interval"], list) else []
    numbers = [c["n"], c["false_positive_rate"], *interval]
    if len(numbers) != 4 or not all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
        for x in numbers
    ):
        raise wrong("n, rate and both interval ends are numbers", "calibration")
    if not (c["n"] >= 1 and 0 <= c["interval"][0] <= c["false_positive_rate"] <= c["interval"][1]):
        raise wrong("the interval does not hold the rate", "calibration")
    if c["false_positive_rate"] > MAX_FALSE_POSITIVES:
        raise wrong("a rule with more than 5 % false positives has to stay `info`", "calibration")


def _examples(
    examples: Mapping[str, Any], key: str, read: Sequence[str], wrong: Wrong
) -> tuple[Mapping[str, float], ...]:
    found = examples.get(key)
    if set(examples) != {"fires", "passes"} or not isinstance(found, list) or not found:
        raise wrong("wants `fires` and `passes`, each with at least one set of values", "examples")
    for values in found:
        for name, value in mapping(values, wrong, "examples").items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in read or not number:
                raise wrong(f"{clean(name)} is no metric of `when` with a number", "examples")
    return tuple({k: float(v) for k, v in values.items()} for values in found)


def read_entry(file: Path, kind: str) -> object:
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


def mapping(entry: object, wrong: Wrong, key: str = "") -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise wrong("is no mapping of keys to values", key)
    return entry


def text_of(entry: Mapping[str, Any], key: str, wrong: Wrong) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise wrong("is missing or no text", key)
    return value.strip()


def choice(
    entry: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str, wrong: Wrong
) -> Any:
    value = entry.get(key, default)
    if value not in allowed:
        raise wrong(f"is none of {', '.join(allowed)}", key)
    return value
