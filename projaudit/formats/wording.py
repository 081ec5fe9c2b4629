"""Words and numbers that the formats for people share, so that they say the same thing."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType

from projaudit.findings import Finding, Measurement, Severity, Verdict
from projaudit.inert import clean
from projaudit.report import PartStatus, Provenance, Report, RuleOutcome

NULLS: Mapping[str, str] = MappingProxyType(
    {"equal_norm": "equal norm", "equal_spectrum": "equal spectrum"}
)
"""What random updates are called, in the order in which they are shown."""

STATUS: Mapping[PartStatus, str] = MappingProxyType(
    {
        "audited": "audited",
        "equal": "equal to the base",
        "sampled-equal": "equal where sampled",
        "differs": "differs from the base",
        "not-looked-at": "not looked at",
    }
)

OUTCOMES = ("fired", "descriptive", "unevaluated", "quiet", "not applicable")
"""What can become of a rule, in the order in which it is shown."""

_MEANING = {
    "PASS": "What the rules look for was not found. That is no promise about anything outside the "
    "scope below.",
    "REVIEW": "Something here deserves a person's judgement before the model is used.",
    "INCONCLUSIVE": "The evidence does not reach a verdict. Treat it as not audited until the "
    "reasons below are gone.",
    "FAIL": "A structural fact, or a rule inside its calibrated range, says no.",
    "NOT AUDITED": "There is no audit of this model: an error came first.",
}


_SCREENED = (
    "Samples of this set should not be trained on. They are listed below, with what speaks against "
    "each; the set itself was not changed."
)


def verdict_word(report: Report) -> str:
    """The verdict in capitals; `NOT AUDITED` where an error came first."""
    return "NOT AUDITED" if report.error else report.verdict.value.upper()


def meaning(report: Report) -> str:
    """What that verdict says, and what it does not."""
    if report.screened is not None and report.verdict is Verdict.FAIL:
        return _SCREENED
    return _MEANING[verdict_word(report)]


def number(value: float) -> str:
    """Four significant digits, the same notation as a rule's threshold; `not finite` for NaN."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return format(value, ".4g")


def short(value: float) -> str:
    """Two decimals, or `number` where those would say nothing."""
    return f"{value:.2f}" if 0.01 <= abs(value) < 1000 else number(value)


def percent(fraction: float) -> str:
    """The fraction in per cent, with two or three significant digits."""
    if not math.isfinite(fraction):
        return "not finite"
    scaled = 100 * fraction
    if scaled == 0:
        return "0 %"
    if abs(scaled) < 0.01 or abs(scaled) >= 1e6:
        return f"{scaled:.1e} %"
    digits = 0 if abs(scaled) >= 10 else 1 if abs(scaled) >= 1 else 2
    return f"{scaled:.{digits}f} %"


def signed(score: float | None) -> str:
    """A z-score with its sign; a dash where there is none."""
    if score is None or not math.isfinite(score):
        return "–"
    return f"{score:+.1e}" if abs(score) >= 1e4 else f"{score:+.{0 if abs(score) >= 20 else 1}f}"


def size(count: int) -> str:
    """A number of bytes in decimal units, with three significant digits."""
    scaled, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(scaled) < 999.5 or unit == "TB":
            break
        scaled /= 1000
    return f"{scaled:.0f} {unit}" if unit == "B" else f"{scaled:.3g} {unit}"


def width(character: str) -> int:
    """Columns that the character takes in a terminal."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def fit(text: str, columns: int) -> str:
    """The text cut to that many columns, with an ellipsis."""
    if sum(map(width, text)) <= columns:
        return text
    taken, used = [], 1
    for character in text:
        used += width(character)
        if used > columns:
            break
        taken.append(character)
    return "".join(taken) + "…"


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}".replace(",", " ")


def base_origin(provenance: Provenance) -> str:
    """Who says that this is the base, and which others were compared as well."""
    repos = list(dict.fromkeys(claim.repo for claim in provenance.claims))
    others = f"; also compared: {', '.join(map(clean, repos[1:]))}" if len(repos) > 1 else ""
    if provenance.verified:
        return f"verified: named by {provenance.source}{others}"
    return f"the uploader's claim ({provenance.source}){others}"


def outcome_word(rule: RuleOutcome) -> str:
    """One of `OUTCOMES`: a rule of severity info that holds describes, and has no effect."""
    if rule.outcome == "fired" and rule.severity == Severity.INFO:
        return "descriptive"
    return rule.outcome.replace("-", " ")


def worst_first(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The findings by severity, those that a waiver covers last."""
    return tuple(
        sorted(findings, key=lambda f: (bool(f.waived), -f.severity, f.rule, f.subject, f.message))
    )


def values(report: Report) -> dict[tuple[str, str], Measurement]:
    """The measurements by (subject, metric)."""
    return {(m.subject, m.metric): m for m in report.measurements}


def scores(measurement: Measurement) -> dict[str, float | None]:
    """The z-scores by kind of null, in the order in which they are shown."""
    found = {null.kind: null.z(measurement.value) for null in measurement.nulls}
    order = [kind for kind in NULLS if kind in found] + [k for k in found if k not in NULLS]
    return {kind: found[kind] for kind in order}
