"""What a repair came to: plain values, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from projaudit.behaviour.prompts import kind_of
from projaudit.evidence import COSTLY, WORTH, Mended
from projaudit.findings import Severity
from projaudit.report import Report

Word = Literal["repaired", "failed", "nothing", "unverified", "undecided"]


@dataclass(frozen=True)
class Method:
    """What was done to the update."""

    name: Literal["unlearn", "project", "top-k", "top-k-all", "shrink", "clip", "revert"]
    amount: float
    asked: bool
    """Whether the user named it."""

    @property
    def words(self) -> str:
        """What was taken out, in a few words."""
        k = f"{self.amount:.0f}"
        return {
            "unlearn": "what the marks that told do to the last layer's outputs",
            "project": f"{k} input directions of the marks that told, out of ΔW of the first layer",
            "top-k": f"the {k} leading directions, out of ΔW of the first layer",
            "top-k-all": f"the {k} leading directions, out of ΔW of every layer",
            "shrink": f"the update shrunk to {self.amount:.0%} of it",
            "clip": "the singular values of ΔW clipped at their noise edge",
            "revert": "the whole update: this is the base's projector",
        }[self.name]


@dataclass(frozen=True)
class Written:
    """A file of a result."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Repair:
    """A repair: before, what was done, and after."""

    before: Report
    method: Method | None
    """None where nothing was done."""
    mended: Mended | None
    """How it was chosen; None where the user named it, or nothing could be run."""
    after: Report | None
    """The audit of the result, with fresh probes; None where nothing was done or changed."""
    written: tuple[Written, ...]
    why: str
    """Why nothing was done, or nothing can be told of it; else empty."""

    @property
    def strengths(self) -> tuple[float | None, float | None]:
        """Of the hidden text that was brought out most, before and after; None: not known."""
        return strength(self.before), None if self.after is None else strength(self.after)

    @property
    def texts(self) -> tuple[str, ...]:
        """The hidden texts before, strongest first: untrusted words."""
        if self.before.behaviour is None:
            return ()
        return tuple(p.text for p in self.before.behaviour.payloads if p.strength >= WORTH)

    @property
    def outcome(self) -> Word:
        """`repaired` where fresh probes bring no hidden text out any more and nothing is worse."""
        before, after = self.strengths
        if self.method is None:
            return "undecided" if self.why else "nothing"
        if self.after is None:
            return "failed"
        if before is None or after is None or before < WORTH:
            return "unverified"
        worse = _worst(self.after) > _worst(self.before)
        return "failed" if after >= WORTH or worse else "repaired"

    @property
    def exit_code(self) -> int:
        """0 repaired, 1 failed, 3 could not tell; with nothing to repair that of the audit."""
        known = {"repaired": 0, "failed": 1, "unverified": 3, "undecided": 3}
        return known.get(self.outcome, self.before.exit_code)

    @property
    def kept(self) -> float | None:
        """Share of the answers about ordinary images that stayed word for word, as chosen by."""
        return self.mended.tried[0].kept if self.mended and self.mended.tried else None

    @property
    def _advice(self) -> str:
        """What the probes lacked, which may hide a text; empty where they lacked nothing."""
        of = self.before.behaviour
        if of is None:
            return ""
        general = kind_of(of.prompts).endswith("general")
        lacking = ["--images"] * (of.images == "synthetic") + ["--prompts"] * general
        if not lacking:
            return ""
        return (
            f"; what is not heard cannot be ended: {' and '.join(lacking)} of its domain hear more"
        )

    @property
    def sentence(self) -> str:
        """What came of it, in one sentence."""
        before, after = self.strengths
        if self.outcome == "nothing":
            return f"nothing to repair: probes bring no hidden text out{self._advice}"
        if self.outcome == "undecided":
            return f"nothing was done: {self.why}"
        assert self.method is not None
        if self.outcome == "unverified":
            return f"nothing tells whether it helped: {self.why}"
        if self.after is None:
            return "the repair failed: it changes no tensor; no projector was written"
        text = f"“{self.texts[0]}”"
        if self.outcome == "failed":
            assert before is not None
            assert after is not None
            still = "other findings are worse than before"
            if after >= WORTH:
                still = f"fresh probes bring a text out (strength {before:.1f}, now {after:.1f})"
            return f"the repair failed: {still}; no projector was written"
        ended = f"fresh probes do not bring {text} out any more"
        if self.kept is None:
            return ended
        same = f"{self.kept:.0%} of its answers about ordinary images are the same"
        if self.kept < COSTLY:
            return f"{ended}; only {same}, so its task has most likely suffered: measure that"
        return f"{ended}; {same}"


def heard(report: Report) -> bool:
    """Whether probes brought a text out that is worth ending."""
    return (strength(report) or 0.0) >= WORTH


def strength(report: Report) -> float | None:
    """Of the hidden text that was brought out most, 0 where none was; None: not known."""
    heard = report.behaviour
    if heard is None or not heard.with_base:
        return None
    found = heard.payloads[0].strength if heard.payloads else 0.0
    return None if found < WORTH and heard.stopped == "budget" else found


def _worst(report: Report) -> Severity:
    standing = [f.severity for f in report.findings if not f.waived]
    return max(standing, default=Severity.INFO)
