"""The waist of the pipeline: plain values, no tensors. Everything after it reads only these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum


class Severity(IntEnum):
    """How bad it is if a finding is true. `INFO` describes and has no effect on the verdict."""

    INFO = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @classmethod
    def parse(cls, text: str) -> Severity:
        """The severity of that lower-case name; raises ValueError for any other."""
        if text not in cls.labels():
            raise ValueError(f"{text!r} is none of {', '.join(cls.labels())}")
        return cls[text.upper()]

    @classmethod
    def labels(cls) -> tuple[str, ...]:
        """The names that rules and reports use, mildest first."""
        return tuple(severity.label for severity in cls)

    @property
    def label(self) -> str:
        """The lower-case name."""
        return self.name.lower()


class Confidence(StrEnum):
    """How often a rule that fires is right: a proof is high, a statistic is low."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class Verdict(StrEnum):
    """What an audit concludes. There is no word for "safe"."""

    PASS = "pass"  # noqa: S105 - no password
    """No rule fired and every required one was evaluated."""
    REVIEW = "review"
    """Something that a person should look at."""
    INCONCLUSIVE = "inconclusive"
    """Could not tell."""
    FAIL = "fail"
    """A structural fact, or a calibrated rule inside its range."""


@dataclass(frozen=True)
class Null:
    """What a metric gives for a random update of the same base: its mean and spread."""

    kind: str
    """`equal_norm` (same Frobenius norm per layer), `equal_spectrum` (same leading values),
    `random_direction` or `sign_flip` (of what is aimed at)."""
    mean: float
    sd: float
    draws: int

    def z(self, value: float) -> float | None:
        """(value − mean) / sd; None where the null does not vary or anything is not finite."""
        score = (value - self.mean) / self.sd if self.sd > 0 else float("nan")
        return score if abs(score) < float("inf") else None


@dataclass(frozen=True)
class Measurement:
    """One number about one subject."""

    metric: str
    """Name of the function that computed it, the same in rules, JSON and docs."""
    subject: str
    """`checkpoint`, `projector`, `projector/<layer role>`; a second candidate is `projector@2`."""
    value: float
    unit: str = ""
    detail: tuple[str, ...] = ()
    """The names behind the number (files, keys, tensors, tokens); untrusted text."""
    nulls: tuple[Null, ...] = ()


@dataclass(frozen=True)
class Series:
    """A curve behind a measurement, as a chart draws it."""

    chart: str
    """Which chart it belongs to: `spectrum`, `energy`, `response`, `alignment`."""
    subject: str
    label: str
    """`update`, `null: equal norm`, `noise edge`, …"""
    x: tuple[float, ...]
    y: tuple[float, ...]
    names: tuple[str, ...] = ()
    """Names of the points (tokens, directions); untrusted text."""


@dataclass(frozen=True)
class Skipped:
    """A metric that could not be computed for a subject, and why."""

    metric: str
    subject: str
    reason: str


@dataclass(frozen=True)
class Location:
    """Bytes that a finding or measurement speaks of."""

    file: str
    tensor: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Finding:
    """A rule that fired on a subject."""

    rule: str
    title: str
    severity: Severity
    confidence: Confidence
    subject: str
    message: str
    why: str
    remedy: str
    references: tuple[str, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    """The measurements that the rule's condition read."""
    detail: tuple[str, ...] = ()
    locations: tuple[Location, ...] = ()
    inconclusive: bool = False
    """What this finding says takes the ground from under a pass."""
    waived: str = ""
    """Statement of the waiver that covers it; a waived finding has no effect on the verdict."""


@dataclass(frozen=True)
class Unevaluated:
    """A rule that could not be decided on a subject, and what was missing."""

    rule: str
    subject: str
    reason: str
    required: bool = True
    """A required rule that is unevaluated makes the verdict `inconclusive`."""
