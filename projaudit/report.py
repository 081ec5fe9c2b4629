"""What an audit found: one value that every format renders and every exit status comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from projaudit.evidence import Evidence
from projaudit.findings import (
    Finding,
    Measurement,
    Series,
    Severity,
    Skipped,
    Unevaluated,
    Verdict,
)
from projaudit.screened import Screened

SCHEMA_VERSION = "1.4.0"
"""Semantic version of the JSON report; readers refuse another major."""


@dataclass(frozen=True)
class Identity:
    """Which model: what was asked for and what was found."""

    ref: str
    """The reference as the user typed it."""
    kind: Literal["local", "hub", "s3", "gs", "https", "mlflow"]
    name: str
    """Repository id as the server gave it, the local path, the address, or an MLflow model's URI
    with the version that an alias was resolved to."""
    revision: str | None = None
    """What was asked for: a branch, a tag, a commit; None for the default branch."""
    commit: str | None = None
    """40 hex digits; None for local files."""
    endpoint: str | None = None
    gated: bool = False
    private: bool = False
    from_cache: bool = False
    """Resolved from caches only (offline)."""


@dataclass(frozen=True)
class Claim:
    """Something that names a base, and where it was found."""

    source: str
    """`--base`, `policy`, `adapter_config.json`, `Hub lineage`, `model card`, `config.json`."""
    repo: str


@dataclass(frozen=True)
class Provenance:
    """Where the base comes from, and how far that can be trusted."""

    source: str
    verified: bool
    """True for what the user or the policy named; everything else is the uploader's claim."""
    claims: tuple[Claim, ...] = ()
    lineage: tuple[str, ...] = ()
    """Base, base of the base, … as the Hub tells it."""


@dataclass(frozen=True)
class TensorRead:
    """Bytes that were read for the projector, so that anyone can fetch and compare them again."""

    side: Literal["target", "base"]
    projector: str
    """Subject of the projector that it belongs to."""
    role: str
    name: str
    file: str
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    file_sha256: str | None = None
    """LFS digest of the whole file as the server tells it."""
    verified: str = "range"
    """`range` (length and commit checked), `full` (sha256 of the file checked), `local`."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of the audited projector."""

    role: str
    weight: str
    shape: tuple[int, int]
    """(out, in)."""
    base_weight: str | None = None
    bias: bool = True


@dataclass(frozen=True)
class AuditedProjector:
    """One projector of the target that was compared with the base's."""

    subject: str
    """`projector`, or `projector@<label>` for another candidate of an ambiguous repository."""
    family: str
    reading: str
    """Which reading of the repository it comes from, and why that one."""
    layers: tuple[Layer, ...]
    chain: tuple[str, ...]
    """Forward chain: roles and activations in order; empty where the family gives none."""
    module: str
    """Class of transformers that was to be run in place of a chain; empty where there is none."""
    in_features: int
    out_features: int
    base: str = ""
    """Base that it was compared with, `name@commit`."""


PartStatus = Literal["equal", "sampled-equal", "differs", "not-looked-at", "audited"]


@dataclass(frozen=True)
class Part:
    """A part of the model, and what is known of it against the base."""

    name: str
    """`projector`, `vision tower`, `language model`, `other tensors`."""
    status: PartStatus
    how: str
    """How that is known: `same LFS sha256`, `12 of 291 tensors differ in sampled content`, …"""
    tensors: int
    bytes: int
    differing: tuple[str, ...] = ()
    """Names of tensors that differ, at most 20."""


@dataclass(frozen=True)
class Coverage:
    """What was compared besides the projector's weights."""

    parts: tuple[Part, ...] = ()
    files_equal: int = 0
    """Files of the target whose digest or content equals the base's file of that name."""
    files_differing: tuple[str, ...] = ()
    files_unknown: tuple[str, ...] = ()
    """Files of one size whose digests are not known on both sides."""
    files_added: tuple[str, ...] = ()
    files_removed: tuple[str, ...] = ()
    config_compared: bool = False
    """Whether both sides have a config.json."""
    config_changes: tuple[str, ...] = ()
    """`key: base value → target value`, for keys that change the projector's function."""
    tensors_added: tuple[str, ...] = ()
    tensors_removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Standing:
    """Where the score of a target stands in a population of known models."""

    score: float
    calibration: str
    """Id of the calibration that it was compared with."""
    source: str
    """`shipped`, or the file that the user gave."""
    honest: tuple[float, ...]
    """Scores of the population's honest fine-tunes, ascending."""
    backdoored: tuple[float, ...]
    """Scores of its working backdoors, ascending; empty where it has none."""
    percentile: float
    """Percent of the honest fine-tunes with a lower score."""
    false_positive_rate: float
    """Share of the honest fine-tunes with at least this score."""
    false_positive_bound: float
    """Upper end of its one-sided 95 % interval (Clopper and Pearson)."""
    outside: tuple[str, ...] = ()
    """In what the target lies outside the population's range; empty where it lies inside."""


@dataclass(frozen=True)
class RuleOutcome:
    """What became of one rule of the policy."""

    rule: str
    title: str
    severity: Severity
    outcome: Literal["fired", "quiet", "unevaluated", "not-applicable"]
    why: str
    remedy: str
    references: tuple[str, ...] = ()
    calibration: str = ""
    """Population, n and false-positive rate; empty for structural rules."""


@dataclass(frozen=True)
class Run:
    """What may differ between two equal runs; everything else in a report is reproducible."""

    started: str
    """ISO 8601, UTC."""
    stages: Mapping[str, float]
    """Seconds by stage, in order."""
    requests: int = 0
    wire_bytes: int = 0
    cache_bytes: int = 0
    fallbacks: tuple[str, ...] = ()
    """Files that had to be fetched whole because the server ignores ranges."""

    @property
    def seconds(self) -> float:
        """Sum of the stages."""
        return sum(self.stages.values())


@dataclass(frozen=True)
class Policy:
    """The policy as it was applied."""

    name: str
    depth: Literal["weights", "behaviour"]
    fail_on: Literal["fail", "review"]
    exit_zero: bool = False


@dataclass(frozen=True)
class ErrorRecord:
    """Why there is no audit."""

    code: str
    message: str
    file: str | None = None
    field: str | None = None
    remedy: str | None = None
    exit_code: int = 2


@dataclass(frozen=True)
class Report:
    """One audit of one target."""

    target: Identity
    policy: Policy
    environment: Mapping[str, str]
    """Versions (projaudit, python, torch, numpy, scipy, safetensors, huggingface_hub), device,
    device name, dtype, threads."""
    settings: Mapping[str, str | int | float | bool | tuple[str, ...] | None]
    """Seed, rank, verify, policy, directions: what a second run needs to be equal."""
    run: Run
    base: Identity | None = None
    provenance: Provenance | None = None
    projectors: tuple[AuditedProjector, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    tensors: tuple[TensorRead, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    series: tuple[Series, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    findings: tuple[Finding, ...] = ()
    unevaluated: tuple[Unevaluated, ...] = ()
    rules: tuple[RuleOutcome, ...] = ()
    behaviour: Evidence | None = None
    """What the language model said behind the projector; None at depth weights."""
    not_probed: str = ""
    """Why behaviour was not probed; empty where it was, or where it was not wanted."""
    standing: Standing | None = None
    """Its score among known models; None without evidence or calibration."""
    screened: Screened | None = None
    """What a screening of a fine-tuning set found; the target is then the model that was tuned."""
    error: ErrorRecord | None = None

    @property
    def status(self) -> Literal["ok", "degraded", "failed"]:
        """`failed` where there is no audit, `degraded` where something required is missing."""
        if self.error is not None:
            return "failed"
        return "degraded" if self.limits else "ok"

    @property
    def limits(self) -> tuple[str, ...]:
        """What takes the ground from under a pass: the reasons of `inconclusive`."""
        undermining = [f.message for f in self._standing if f.inconclusive]
        missing = [f"{u.rule} on {u.subject}: {u.reason}" for u in self.unevaluated if u.required]
        looked_at = self.projectors or self.screened or self.error
        nothing = [] if looked_at else ["no projector was compared"]
        return (*undermining, *missing, *nothing)

    @property
    def verdict(self) -> Verdict:
        """fail > inconclusive > review > pass, over the findings that no waiver covers."""
        if self.error is not None:
            return Verdict.INCONCLUSIVE
        worst = max((f.severity for f in self._standing), default=Severity.INFO)
        if worst >= Severity.HIGH:
            return Verdict.FAIL
        if self.limits:
            return Verdict.INCONCLUSIVE
        return Verdict.REVIEW if worst > Severity.INFO else Verdict.PASS

    @property
    def exit_code(self) -> int:
        """0, 1 (the policy says no), 3 (could not tell), or the error's; 2 > 1 > 3 > 0."""
        if self.error is not None:
            code = self.error.exit_code
            return 0 if self.policy.exit_zero and code in {1, 3} else code
        threshold = Severity.HIGH if self.policy.fail_on == "fail" else Severity.LOW
        refused = any(f.severity >= threshold for f in self._standing)
        code = 1 if refused else 3 if self.limits else 0
        return 0 if self.policy.exit_zero else code

    @property
    def scope(self) -> str:
        """What the verdict does not cover, in a few words; stands beside every verdict."""
        if self.screened is not None:
            return "the fine-tuning set; the model is not audited"
        if self.behaviour is None:
            return "structure only; behaviour not probed"
        return "structure and behaviour"

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        if self.error is not None:
            return f"could not audit: {self.error.message}"
        standing = [f for f in self._standing if f.severity > Severity.INFO]
        if self.verdict is Verdict.PASS:
            waived = sum(f.severity > Severity.INFO for f in self.findings)
            fired = f"no rule but {waived} waived" if waived else "no rule"
            text = f"{fired} fired and every required one was evaluated"
        elif self.verdict is Verdict.INCONCLUSIVE:
            more = f" (and {len(self.limits) - 1} more)" if len(self.limits) > 1 else ""
            text = f"could not tell: {self.limits[0]}{more}"
            found = [f for f in standing if not f.inconclusive and f.severity >= Severity.MEDIUM]
            if found:
                text = f"{text}; found so far: {max(found, key=lambda f: f.severity).message}"
        else:
            first = max(standing, key=lambda f: f.severity)
            more = f" (and {len(standing) - 1} more)" if len(standing) > 1 else ""
            text = f"{first.message}{more}"
        return text

    @property
    def _standing(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if not f.waived)
