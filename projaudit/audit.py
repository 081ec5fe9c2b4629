"""The pipeline: source → checkpoint → projector → update → measurements → findings → report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from projaudit.adapters import fit
from projaudit.against_base import counterpart, coverage_of, facts_of
from projaudit.base import MAX_CANDIDATES
from projaudit.behaviour.hear import hear
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.checkpoint import open_checkpoint
from projaudit.errors import ProjauditError, UnsupportedError, UsageError
from projaudit.explain import Explanation, explain
from projaudit.inert import clean
from projaudit.listening import (
    Hear,
    Wish,
    depth_of,
    heard,
    left_out,
    not_run,
    run_of,
    standing,
    wish,
)
from projaudit.mmproj import as_converted, as_stored
from projaudit.opened import around, found_in, name_of, open_bases, open_target
from projaudit.policy import load_policy
from projaudit.refs import Ref, parse_ref
from projaudit.report import Coverage, Report
from projaudit.reporting import Audit, report_of
from projaudit.session import Progress, Session, find_device, settle
from projaudit.sides import noted, settled, sides_of

if TYPE_CHECKING:
    from projaudit.analyses.context import Direction


def check(
    target: str,
    base: str | Sequence[str] | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    rules: Path | None = None,
    policy: str | Path | None = None,
    depth: Literal["auto", "weights", "behaviour"] | None = None,
    prompts: Path | None = None,
    images: Path | None = None,
    requests: Path | None = None,
    budget: int | None = None,
    calibration: Path | None = None,
    fail_on: Literal["fail", "review"] | None = None,
    exit_zero: bool = False,
    directions: Sequence[Path] = (),
    target_texts: Sequence[str] = (),
    device: str | None = None,
    rank: int | None = None,
    seed: int | None = None,
    offline: bool | None = None,
    verify: Literal["range", "full"] | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    hear: Hear = hear,
) -> Report:
    """The audit of `target` against its base, as a Report; prints nothing.

    `target` and `base` are a Hub id (`org/model`, `org/model@rev`), a Hub URL, a folder or a file;
    a merge has several bases, and is compared with each.
    What is None here comes from the policy, then from the defaults (device auto, rank 32, a fresh
    seed, verify range). Depth `auto`, the default without a policy, runs the language model where
    all of it is on this machine and the extra `behaviour` is installed; the policy is then
    `default`, else `structure`. `prompts` and `requests` are files with one a line, `images` a
    folder, `budget` the most answers, `calibration` a file of `projaudit calibrate`; `hear` is what
    runs the model, which does more than that in a repair. Raises a
    ProjauditError with a stable `code` where there is no audit; what could not be told within one
    stands in the report.
    """
    from projaudit.analyses import METRICS

    started = datetime.now(UTC)
    named = policy or {"weights": "structure", "behaviour": "default"}.get(depth or "")
    ruleset = load_policy(named or "structure", METRICS, rules)
    wanted = wish(
        depth or (ruleset.depth if policy else "auto"),
        prompts,
        images,
        requests,
        budget,
        calibration,
    )
    settings = settle(
        ruleset.options, device=device, rank=rank, seed=seed, verify=verify, offline=offline
    )
    asked = {
        "policy": named and str(named),
        "depth": depth,
        "prompts": None if prompts is None else str(prompts),
        "images": None if images is None else str(images),
        "requests": None if requests is None else str(requests),
        "budget": budget,
        "calibration": None if calibration is None else str(calibration),
        "rules": None if rules is None else str(rules),
        "direction": tuple(str(file) for file in directions),
        "target-text": tuple(target_texts),
    }
    with Session(settings, progress, notify) as session:
        with session.stage("import torch"):
            from projaudit.targets import load_directions
        audit = _audit(
            session,
            parse_ref(target, revision),
            _base_refs(base, base_revision, ruleset.options),
            ruleset.pins,
            load_directions(directions),
            target_texts,
            wanted,
            hear,
        )
        if named is None and audit.depth == "behaviour":
            ruleset = load_policy("default", METRICS, rules)
        if fail_on is not None:
            ruleset = replace(ruleset, fail_on=fail_on)
        with session.stage("judge"):
            return report_of(session, ruleset, audit, asked, exit_zero, started)


def explained(
    target: str,
    revision: str | None = None,
    *,
    base: str | None = None,
    offline: bool | None = None,
) -> Explanation:
    """Where the projectors of `target` were found, why, and what was nearly taken; by its headers.

    Of an adapter alone they are those of `base`, or of the one that it names.

    Raises a ProjauditError where it cannot be read.
    """
    settings = settle({}, device=None, rank=None, seed=None, verify=None, offline=offline)
    with Session(settings, None, None) as session:
        source, of = session.source(parse_ref(target, revision)), ""
        try:
            checkpoint = open_checkpoint(source)
        except UnsupportedError as error:
            if error.code != "unsupported.adapter":
                raise
            named = () if base is None else (parse_ref(base),)
            checkpoint, _ = open_target(session, source, named, {})
            of = clean(name_of(checkpoint.source))
        reading = checkpoint.readings[0]
        shapes = reading.shapes
        try:
            if reading.metadata is None:
                return replace(explain(shapes, checkpoint.config), base=of)
            found = explain(*as_converted(shapes, reading.metadata))
            stored = [(as_stored(p, list(shapes), reading.metadata), why) for p, why in found.found]
            return replace(found, found=tuple(stored))
        except ProjauditError as error:
            error.file = error.file or clean(checkpoint.source.name)
            raise


def _base_refs(
    base: str | Sequence[str] | None, revision: str | None, options: Mapping[str, Any]
) -> tuple[Ref, ...]:
    named = [base] if isinstance(base, str) else list(base or ())
    if not named and "base" in options:
        named, revision = [str(options["base"])], revision or options.get("base_revision")
    if revision is not None and len(named) != 1:
        raise UsageError("needs one base", "option", field="--base-revision")
    if len(named) > MAX_CANDIDATES:
        raise UsageError(f"is given {len(named)} times", "option", field="--base")
    return tuple(dict.fromkeys(parse_ref(name, revision) for name in named))


def _audit(
    session: Session,
    target_ref: Ref,
    base_refs: Sequence[Ref],
    pins: Mapping[str, str],
    directions: Sequence[Direction],
    texts: Sequence[str],
    wanted: Wish,
    hear: Hear,
) -> Audit:
    from projaudit.analyses.behaviour import Behaviour
    from projaudit.measure import Measured, measure_merge, measure_projector, read_projector

    device = find_device(session.settings.device)
    with session.stage("open target"):
        source = session.source(target_ref)
        target, adapter = open_target(session, source, base_refs, pins)
        found = found_in(target)
        target = settled(target, found)
    depth, not_probed = depth_of(wanted.depth, target, device)
    bases, without_base = open_bases(session, target, base_refs, pins, required=depth == "weights")
    fitted = None if adapter is None else fit(adapter, found[0][1], around(found[0], bases))
    target = noted(target, fitted)
    target, sides = sides_of(session, target, found, fitted, bases)
    measured = Measured()
    coverages = []
    if not bases:
        read_projector(session, sides[0], measured)
    for number, base in enumerate(bases, 1):
        for side in sides:
            partner = counterpart(side.projector, base)
            measure_projector(session, device, side, partner, directions, texts, measured)
        with session.stage("compare the rest"):
            seed = session.settings.seed
            coverages.append(coverage_of(target, base, found[0], fitted, seed=seed))
        facts = facts_of(target, base, coverages[-1], found[0])
        subject = "checkpoint" if number == 1 else f"checkpoint@{number}"
        measured.ask(session, "checkpoint", subject, facts)
    for side in sides if len(bases) > 1 else ():
        partners = [counterpart(side.projector, base) for base in bases]
        measure_merge(session, side, partners, measured)
    coverage = coverages[0] if coverages else Coverage()
    evidence, place, left = None, None, ""
    if depth == "behaviour":
        run = run_of(sides)
        others = [counterpart(side.projector, bases[0]) for side in run if bases]
        ways = found[0][1], bases[0].projectors if bases else ()
        left = left_out(run[0], fitted) or not_run(sides, run, others)
        try:
            evidence = heard(session, device, run, others, ways, fitted, coverage, wanted, hear)
        except CouldNotProbe as why:
            not_probed = why.reason
        else:
            place = standing(wanted, evidence, run[0].projector, measured.measurements)
            measured.ask(session, "behaviour", "behaviour", Behaviour(evidence, place))
    return Audit(
        target=target,
        bases=bases,
        measured=measured,
        coverage=coverage,
        device=device,
        depth=depth,
        not_probed=not_probed,
        evidence=evidence,
        standing=place,
        without_base=without_base,
        left_out=left,
    )
