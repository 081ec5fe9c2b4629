"""The report of an audit, and that of one that did not happen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from projaudit import __version__
from projaudit.checkpoint import Checkpoint
from projaudit.errors import ProjauditError
from projaudit.evidence import Evidence
from projaudit.findings import Location, Unevaluated
from projaudit.judge import judge
from projaudit.listening import Depth, unheard
from projaudit.opened import Base, identity
from projaudit.policy import RuleSet
from projaudit.refs import parse_ref, public
from projaudit.report import (
    Coverage,
    ErrorRecord,
    Identity,
    Policy,
    Report,
    Run,
    Standing,
    TensorRead,
)
from projaudit.session import Session, environment

if TYPE_CHECKING:
    import torch

    from projaudit.measure import Measured


@dataclass(frozen=True)
class Audit:
    """Everything that the rules and the report need to know."""

    target: Checkpoint
    bases: Sequence[Base]
    measured: Measured
    coverage: Coverage
    device: torch.device
    depth: Depth
    not_probed: str
    """Why depth behaviour gave nothing; empty where it did, or was not wanted."""
    evidence: Evidence | None
    standing: Standing | None
    without_base: str
    """Why there is no base; empty where there is one."""
    left_out: str
    """What was audited and not run; empty where it is all of it."""


def report_of(
    session: Session,
    ruleset: RuleSet,
    audit: Audit,
    asked: Mapping[str, str | int | tuple[str, ...] | None],
    exit_zero: bool,
    started: datetime,
) -> Report:
    """The report of an audit, by the rules; `asked` are the options as they were given."""
    from projaudit.analyses import METRICS

    source, measured, settings = audit.target.origin, audit.measured, session.settings
    digests = {t.sha256 for t in measured.tensors if t.side == "target"}
    findings, unevaluated, outcomes = judge(
        ruleset,
        measured.measurements,
        measured.skipped,
        METRICS,
        digests=frozenset(digests | ({source.commit} if source.commit else set())),
    )
    # First, as the headline tells the first: what the user asked for, before what follows from it.
    if audit.without_base:
        unevaluated = (Unevaluated("base", "checkpoint", audit.without_base), *unevaluated)
    missing = unheard(
        ruleset.depth,
        audit.depth,
        audit.not_probed,
        audit.evidence,
        audit.left_out,
    )
    if missing:
        unevaluated = (Unevaluated("behaviour", "checkpoint", missing), *unevaluated)
    findings = tuple(
        replace(finding, locations=_locations(finding.subject, measured.tensors))
        for finding in findings
    )
    traffic = [opened.traffic for opened in session.sources]
    return Report(
        target=identity(source),
        policy=Policy(ruleset.name, audit.depth, ruleset.fail_on, exit_zero),
        environment=environment(audit.device),
        settings={
            **{name: value for name, value in asked.items() if value},
            "seed": settings.seed,
            "rank": settings.rank,
            "verify": settings.verify,
            "device": settings.device,
        },
        run=Run(
            started=started.isoformat(timespec="seconds"),
            stages=dict(session.stages),
            requests=sum(t.requests for t in traffic),
            wire_bytes=sum(t.bytes for t in traffic),
            cache_bytes=sum(t.from_cache for t in traffic),
            fallbacks=tuple(f for s in session.sources for f in getattr(s, "fallbacks", ())),
        ),
        base=identity(audit.bases[0].checkpoint.source) if audit.bases else None,
        provenance=audit.bases[0].provenance if audit.bases else None,
        projectors=tuple(measured.projectors),
        coverage=audit.coverage,
        tensors=tuple(measured.tensors),
        measurements=tuple(measured.measurements),
        series=tuple(measured.series),
        skipped=tuple(measured.skipped),
        findings=findings,
        unevaluated=unevaluated,
        rules=outcomes,
        behaviour=audit.evidence,
        standing=audit.standing,
        not_probed=audit.not_probed,
    )


def _locations(subject: str, tensors: Sequence[TensorRead]) -> tuple[Location, ...]:
    """The bytes of the target that a layer or a projector is; none for the checkpoint."""
    projector, _, role = subject.partition("/")
    return tuple(
        Location(read.file, read.name, read.start, read.stop)
        for read in tensors
        if read.side == "target"
        and read.projector == projector
        and (not role or read.role == role or read.role.startswith(f"{role}."))
    )


def failed(target: str, error: ProjauditError, asked: Mapping[str, Any]) -> Report:
    """The report of an audit that did not happen, so that every format can say why.

    `asked` are the options of `check` as they were given.
    """
    try:
        ref = parse_ref(target, asked.get("revision"))
        named = Identity(ref.text, ref.kind, ref.repo or ref.text, ref.revision)
    except ProjauditError:
        named = Identity(public(target), "local", public(target))
    return Report(
        target=named,
        policy=Policy(
            str(asked.get("policy") or "structure"),
            "weights",
            asked.get("fail_on") or "fail",
            bool(asked.get("exit_zero")),
        ),
        environment={"projaudit": __version__},
        settings={},
        run=Run(datetime.now(UTC).isoformat(timespec="seconds"), {}),
        error=ErrorRecord(
            error.code, error.message, error.file, error.field, error.remedy, error.exit_code
        ),
    )
