"""The pipeline: source → checkpoint → projector → update → measurements → findings → report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from projaudit import __version__
from projaudit.adapters import WEIGHTS, Adapter, Fit, fit, not_read, read_adapter
from projaudit.base import MAX_CANDIDATES, Candidate, candidates, lineage, named_by_adapter
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.checkpoint import Checkpoint, open_checkpoint
from projaudit.coverage import changed_by, code_of, compare
from projaudit.errors import (
    BaseError,
    FormatError,
    NothingError,
    ProjauditError,
    UnsupportedError,
    UsageError,
)
from projaudit.evidence import Evidence
from projaudit.explain import Explanation, explain
from projaudit.findings import Location, Unevaluated
from projaudit.inert import clean
from projaudit.judge import judge
from projaudit.listening import Depth, Wish, depth_of, heard, standing, unheard, wish
from projaudit.mmproj import as_converted, as_stored, locate_mmproj
from projaudit.policy import RuleSet, load_policy
from projaudit.projector import Projector, locate, require_readable
from projaudit.quantised import rewrites
from projaudit.readings import Reading, parameter, place_of
from projaudit.report import (
    Coverage,
    ErrorRecord,
    Identity,
    Policy,
    Provenance,
    Report,
    Run,
    Standing,
    TensorRead,
)
from projaudit.session import Progress, Session, environment, find_device, settle
from projaudit.source import Ref, Source, parse_ref, public
from projaudit.weight_files import Ambiguity

if TYPE_CHECKING:
    import torch

    from projaudit.analyses.context import Direction
    from projaudit.analyses.structure import Facts
    from projaudit.measure import Measured, Side


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
) -> Report:
    """The audit of `target` against its base, as a Report; prints nothing.

    `target` and `base` are a Hub id (`org/model`, `org/model@rev`), a Hub URL, a folder or a file;
    a merge has several bases, and is compared with each.
    What is None here comes from the policy, then from the defaults (device auto, rank 32, a fresh
    seed, verify range). Depth `auto`, the default without a policy, runs the language model where
    all of it is on this machine and the extra `behaviour` is installed; the policy is then
    `default`, else `structure`. `prompts` is a file with one on each line, `images` a folder,
    `budget` the most answers, `calibration` a file of `projaudit calibrate`. Raises a
    ProjauditError with a stable `code` where there is no audit; what could not be told within one
    stands in the report.
    """
    from projaudit.analyses import METRICS

    started = datetime.now(UTC)
    named = policy or {"weights": "structure", "behaviour": "default"}.get(depth or "")
    ruleset = load_policy(named or "structure", METRICS, rules)
    wanted = wish(
        depth or (ruleset.depth if policy else "auto"), prompts, images, budget, calibration
    )
    settings = settle(
        ruleset.options, device=device, rank=rank, seed=seed, verify=verify, offline=offline
    )
    asked = {
        "policy": named and str(named),
        "depth": depth,
        "prompts": None if prompts is None else str(prompts),
        "images": None if images is None else str(images),
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
        )
        if named is None and audit.depth == "behaviour":
            ruleset = load_policy("default", METRICS, rules)
        if fail_on is not None:
            ruleset = replace(ruleset, fail_on=fail_on)
        with session.stage("judge"):
            return _report(session, ruleset, audit, asked, exit_zero, started)


def explained(
    target: str, revision: str | None = None, *, offline: bool | None = None
) -> Explanation:
    """Where the projectors of `target` were found, why, and what was nearly taken; by its headers.

    Raises a ProjauditError where it cannot be read.
    """
    settings = settle({}, device=None, rank=None, seed=None, verify=None, offline=offline)
    with Session(settings, None, None) as session:
        checkpoint = open_checkpoint(session.source(parse_ref(target, revision)))
        reading = checkpoint.readings[0]
        shapes = reading.shapes
        try:
            if reading.metadata is None:
                return explain(shapes, checkpoint.config)
            found = explain(*as_converted(shapes, reading.metadata))
            stored = [(as_stored(p, list(shapes), reading.metadata), why) for p, why in found.found]
            return replace(found, found=tuple(stored))
        except ProjauditError as error:
            error.file = error.file or clean(checkpoint.source.name)
            raise


def failed(target: str, error: ProjauditError, asked: Mapping[str, Any]) -> Report:
    """The report of an audit that did not happen, so that every format can say why.

    `asked` are the options of `check` as they were given.
    """
    try:
        ref = parse_ref(target, asked.get("revision"))
        identity = Identity(ref.text, ref.kind, ref.repo or ref.text, ref.revision)
    except ProjauditError:
        identity = Identity(public(target), "local", public(target))
    return Report(
        target=identity,
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


@dataclass(frozen=True)
class _Base:
    """A base that was opened: the first of its lineage that has a projector."""

    asked: str
    """Repository that was asked for, before any rename."""
    checkpoint: Checkpoint
    projectors: tuple[Projector, ...]
    provenance: Provenance
    circular: bool


@dataclass(frozen=True)
class _Audit:
    """Everything that the rules and the report need to know."""

    target: Checkpoint
    bases: Sequence[_Base]
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
    projectors: int
    """Of the target, over all its readings."""


def _audit(
    session: Session,
    target_ref: Ref,
    base_refs: Sequence[Ref],
    pins: Mapping[str, str],
    directions: Sequence[Direction],
    texts: Sequence[str],
    wanted: Wish,
) -> _Audit:
    from projaudit.analyses.behaviour import Behaviour
    from projaudit.measure import Measured, measure_merge, measure_projector, read_projector

    device = find_device(session.settings.device)
    with session.stage("open target"):
        source = session.source(target_ref)
        adapter = read_adapter(source)
        target = _opened_target(session, source, adapter, base_refs, pins)
        found = [(target.readings[0], _projectors(target.readings[0], target))]
        found += [(reading, _others(reading, target)) for reading in target.readings[1:]]
        first = next((i for i, pair in enumerate(found) if pair[1] and _counts(i, pair[0])), None)
        if first is None:
            raise _no_projector(target)
        found.insert(0, found.pop(first))
        target = _settled(target, found)
        fitted = None if adapter is None else fit(adapter, found[0][1], found[0][0].shapes)
        target = _noted(target, fitted)
    depth, not_probed = depth_of(wanted.depth, target, device)
    bases, without_base = _bases(session, target, base_refs, pins, required=depth == "weights")
    target, sides = _sides(target, found, fitted)
    if fitted is not None and target.adapter is None:
        more, unread = _on_named_base(session, target, fitted.adapter, bases)
        sides += more
        if unread:
            note = Ambiguity("adapter-beside", clean(unread, 300), ("adapter_config.json",))
            target = replace(target, ambiguities=(*target.ambiguities, note))
    measured = Measured()
    coverages = []
    if not bases:
        read_projector(session, sides[0], measured)
    for number, base in enumerate(bases, 1):
        for side in sides:
            partner = _counterpart(side.projector, base)
            measure_projector(session, device, side, partner, directions, texts, measured)
        with session.stage("compare the rest"):
            coverage = compare(
                target,
                base.checkpoint,
                audited=_audited(*found[0]),
                audited_base=_audited(base.checkpoint.readings[0], base.projectors),
                seed=session.settings.seed,
            )
            coverages.append(_with_adapter(coverage, target, fitted))
        facts = _facts(target, base, coverages[-1], found[0][1])
        subject = "checkpoint" if number == 1 else f"checkpoint@{number}"
        measured.ask(session, "checkpoint", subject, facts)
    for side in sides if len(bases) > 1 else ():
        partners = [_counterpart(side.projector, base) for base in bases]
        measure_merge(session, side, partners, measured)
    coverage = coverages[0] if coverages else Coverage()
    evidence, place = None, None
    if depth == "behaviour":
        other = _counterpart(sides[0].projector, bases[0]) if bases else None
        try:
            evidence = heard(session, device, sides[0], other, coverage, wanted)
        except CouldNotProbe as why:
            not_probed = why.reason
        else:
            place = standing(wanted, evidence, sides[0].projector, measured.measurements)
            measured.ask(session, "behaviour", "behaviour", Behaviour(evidence, place))
    return _Audit(
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
        projectors=len(sides),
    )


def _bases(
    session: Session,
    target: Checkpoint,
    option: Sequence[Ref],
    pins: Mapping[str, str],
    *,
    required: bool,
) -> tuple[list[_Base], str]:
    """The bases, or why there is none where one is not required: behaviour can be heard alone."""
    with session.stage("open base"):
        try:
            named = candidates(
                target.origin,
                target.config if target.adapter is None else None,
                option=option,
                pins=pins,
                metadata=target.readings[0].metadata,
            )
        except BaseError as error:
            if required or error.code != "base.none":
                raise
            return [], error.message
        return [_opened(session, candidate) for candidate in named], ""


def _counts(number: int, reading: Reading) -> bool:
    """Whether a reading may be what is audited first: a projector may lie in a GGUF file alone."""
    return number == 0 or reading.metadata is not None


def _opened_target(
    session: Session,
    source: Source,
    adapter: Adapter | None,
    base: Sequence[Ref],
    pins: Mapping[str, str],
) -> Checkpoint:
    """The target's weights; of an adapter alone those of its base, as transformers loads them."""
    try:
        return open_checkpoint(source)
    except UnsupportedError as error:
        if error.code != "unsupported.adapter":
            raise
        if adapter is None:
            raise not_read(source) from None
    named = candidates(source, None, option=base, pins=pins)[0]
    whole = open_checkpoint(session.source(named.ref))
    beside = [
        path
        for path in source.files
        if path != WEIGHTS
        and (path.startswith("adapter_model") or ("/" in path and path.endswith(".safetensors")))
    ]
    says = "weights beside the adapter, which are taken where they are asked for; not read"
    notes = [Ambiguity("adapter-beside", f"{clean(path, 80)}: {says}", (path,)) for path in beside]
    readings = whole.readings[:1]
    return replace(whole, readings=readings, ambiguities=tuple(notes[:20]), adapter=source)


def _noted(target: Checkpoint, fitted: Fit | None) -> Checkpoint:
    """The target with what its adapter does in place of `not read`.

    Raises NothingError where an adapter alone changes no projector.
    """
    if fitted is None:
        return target
    names = [name for p in _projectors(target.readings[0], target) for name in p.tensors]
    changes, rest = fitted.changes(names), len(fitted.elsewhere)
    does = "changes the projector" if changes else "changes nothing in the projector"
    if target.adapter is not None:
        if changes:
            return target
        raise NothingError(
            f"the adapter {does}; its {rest} tensors change the rest of the model",
            "adapter",
            file=clean(target.origin.name),
            remedy="there is nothing to audit in it; check the model that it is for",
        )
    says = f"an adapter, which transformers applies where peft is installed: it {does}"
    return replace(
        target,
        ambiguities=tuple(
            replace(note, message=f"{clean(note.files[0], 80)}: {says}")
            if note.kind == "adapter-beside"
            else note
            for note in target.ambiguities
        ),
    )


def _on_named_base(
    session: Session, target: Checkpoint, adapter: Adapter, bases: Sequence[_Base]
) -> tuple[list[Side], str]:
    """The adapter on the base that it names, which transformers loads in place of the weights
    beside it: from a Hub, and from a folder without config.json. Or why that cannot be read."""
    from projaudit.measure import Side

    source = target.source
    named = named_by_adapter(adapter.config)
    if (source.ref.kind == "local" and "config.json" in source.files) or named is None:
        return [], ""
    repo, revision = str(named.ref.repo), named.ref.revision
    try:
        base = next(
            (
                base
                for base in bases
                if base.asked.lower() == repo.lower()
                and revision in (None, base.checkpoint.source.commit)
            ),
            None,
        ) or _opened(session, named)
    except ProjauditError as error:
        return [], f"{repo}, on which transformers puts the adapter, was not read: {error}"
    reading = base.checkpoint.readings[0]
    fitted = fit(adapter, base.projectors, reading.shapes)
    why = f"{_name(base.checkpoint.source)}, which the adapter names, and the adapter"
    sides = [
        Side(
            replace(base.checkpoint, adapter=source),
            replace(reading, label="adapter-on-base", why=why),
            projector,
            _name(source),
            fitted,
        )
        for projector in base.projectors
        if fitted.changes(projector.tensors)
    ]
    return sides, ""


def _with_adapter(coverage: Coverage, target: Checkpoint, fitted: Fit | None) -> Coverage:
    """The coverage, with what an adapter changes outside the projector."""
    if fitted is None:
        return coverage
    coverage = changed_by(coverage, [fitted.adapter.tensors[name] for name in fitted.elsewhere])
    if target.adapter is None:
        return coverage
    # What was compared is the base with a base; these files are not the adapter's.
    return replace(coverage, files_equal=0, files_differing=(), files_unknown=(), files_added=())


def _projectors(reading: Reading, checkpoint: Checkpoint) -> tuple[Projector, ...]:
    try:
        if reading.metadata is None:
            found = locate(reading.shapes, checkpoint.config)
        else:
            found = locate_mmproj(reading.shapes, reading.metadata)
        for projector in found:
            require_readable(projector, reading.unread)
        return found
    except ProjauditError as error:
        error.file = error.file or clean(checkpoint.source.name)
        raise


def _others(reading: Reading, target: Checkpoint) -> tuple[Projector, ...]:
    """The projectors of a reading besides the first; none where a pickle's are not readable."""
    try:
        return _projectors(reading, target)
    except (FormatError, UnsupportedError):
        if _is_pickled(reading):
            return ()
        raise


def _is_pickled(reading: Reading) -> bool:
    return reading.label.startswith("pickle-beside")


def _no_projector(target: Checkpoint) -> NothingError:
    architectures = (target.config or {}).get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    what = f" ({clean(named)})" if named else ""
    return NothingError(
        f"has no projector{what} among {len(target.readings[0].tensors)} tensors",
        "projector",
        file=clean(target.source.name),
        remedy="a text model has nothing to audit",
    )


def _sides(
    target: Checkpoint,
    found: Sequence[tuple[Reading, tuple[Projector, ...]]],
    fitted: Fit | None,
) -> tuple[Checkpoint, list[Side]]:
    """Every projector of every reading, but for readings that take the very bytes of the first.

    An adapter is a reading of its own, of the projectors that it changes; alone, the only one.
    The target comes back with what that says of its ambiguities: which pickles hold the same
    projector, which hold one that cannot be compared, and which projector's tensors share memory.
    """
    from projaudit.measure import Side

    def places(reading: Reading, projectors: Sequence[Projector]) -> set[tuple[object, ...]]:
        names = [name for projector in projectors for name in projector.tensors]
        return {(parameter(i.name), *place_of(i)) for name in names for i in reading.parts(name)}

    first = places(*found[0])
    sides: list[Side] = []
    notes = list(target.ambiguities)
    at = -1
    for number, (reading, projectors) in enumerate(found):
        new = [Side(target, reading, projector, _name(target.origin)) for projector in projectors]
        same = number > 0 and places(reading, projectors) <= first
        if number and _is_pickled(reading):
            # Readings and their notes come in one order; two cut names may read the same.
            at = next(i for i, n in enumerate(notes) if i > at and n.message == reading.why)
            alike = (same or _alike(new, sides[: len(found[0][1])])) if new else None
            if alike is None:
                says = f"{reading.why}; not compared, as it holds no projector of that form"
                notes[at] = replace(notes[at], message=says)
                continue
            if alike:
                notes[at] = replace(notes[at], kind="equal-pickle")
                continue
        if number and reading.metadata is not None and found[0][0].metadata is not None:
            notes += _otherwise(new, sides[: len(found[0][1])])
        if not same:
            sides += new
            notes += [shared for side in new if (shared := _sharing(side)) is not None]
    target = replace(target, ambiguities=tuple(notes))
    if fitted is None:
        return target, sides
    adapted = _adapted(target, found[0], fitted)
    return target, [*(sides if target.adapter is None else ()), *adapted]


def _otherwise(ours: Sequence[Side], first: Sequence[Side]) -> list[Ambiguity]:
    """What there is to say where a second GGUF file is no rounding of the first's projector."""
    from projaudit.update import rounding

    for here, there in zip(ours, first, strict=False):
        new, old = here.load(), there.load()
        for name in new.keys() & old.keys():
            a, b = old[name], new[name]
            if a.tensor.shape == b.tensor.shape:
                floor = rounding(a.tensor, b.tensor, a.step, b.step).floor
                apart = float((b.tensor.float() - a.tensor.float()).norm())
                if apart == 0.0 or apart <= 4 * floor * float(a.tensor.float().norm()):
                    continue
            says = f"{here.reading.why}; its {clean(name, 80)} is no rounding of the first file's"
            files = tuple({info.file for info, _ in b.parts})
            return [Ambiguity("gguf-beside", says, files, (name,))]
    return []


def _adapted(
    target: Checkpoint, first: tuple[Reading, tuple[Projector, ...]], fitted: Fit
) -> list[Side]:
    """The projectors that an adapter changes, with it merged into them."""
    from projaudit.measure import Side

    on = "the weights beside it" if target.adapter is None else _name(target.source)
    why = f"{WEIGHTS} ({clean(fitted.adapter.method, 20)}), merged into {on}"
    reading = replace(first[0], label="adapter", why=why)
    return [
        Side(target, reading, projector, _name(target.origin), fitted)
        for projector in first[1]
        if fitted.changes(projector.tensors)
    ]


def _alike(ours: Sequence[Side], first: Sequence[Side]) -> bool | None:
    """Whether projectors are the first reading's, byte by byte; None where they do not compare."""

    def forms(sides: Sequence[Side]) -> list[tuple[object, ...]]:
        return [
            (p.kind, p.chain, p.norm_eps, len(p.unexpected), *(layer.shape for layer in p.linears))
            for p in (side.projector for side in sides)
        ]

    def digests(sides: Sequence[Side]) -> list[tuple[object, ...]]:
        loaded = [(side.projector.tensors, side.load()) for side in sides]
        parts = [part for names, stored in loaded for name in names for part in stored[name].parts]
        return [(digest, info.dtype, info.shape, info.strides) for info, digest in parts]

    if forms(ours) != forms(first):
        return None
    try:
        return digests(ours) == digests(first)
    except (FormatError, UnsupportedError):
        return None


def _sharing(side: Side) -> Ambiguity | None:
    """What there is to say where two tensors of a projector are the same memory in their file."""
    infos = [i for name in side.projector.tensors for i in side.reading.parts(name)]
    infos.sort(key=lambda info: (info.file, info.start, info.stop))
    for before, info in pairwise(infos):
        if before.file == info.file and info.start < before.stop:
            names = (before.name, info.name)
            says = f"{clean(info.name, 80)} shares memory with {clean(before.name, 80)}"
            return Ambiguity("shared-memory", says, (info.file,), names)
    return None


def _settled(
    target: Checkpoint, found: Sequence[tuple[Reading, tuple[Projector, ...]]]
) -> Checkpoint:
    """The checkpoint less the note that its config quantises, where what was read is what runs."""
    full = [
        layer.weight
        for reading, projectors in found
        for projector in projectors
        for layer in projector.linears
        if layer.weight not in reading.packed
    ]
    if rewrites(target.config, full):
        return target
    notes = tuple(note for note in target.ambiguities if note.kind != "quantized")
    return replace(target, ambiguities=notes)


def _audited(reading: Reading, projectors: Sequence[Projector]) -> frozenset[str]:
    """The stored tensors that those projectors are made of."""
    names = [name for projector in projectors for name in projector.tensors]
    return frozenset(info.name for name in names for info in reading.parts(name))


def _opened(session: Session, candidate: Candidate) -> _Base:
    first = session.source(candidate.ref)
    chain, circular = lineage(first, session.source)
    provenance = replace(
        candidate.provenance, lineage=tuple(_identity(source).name for source in chain)
    )
    for source in chain:
        try:
            checkpoint = open_checkpoint(source)
        except NothingError:
            continue
        projectors = _projectors(checkpoint.readings[0], checkpoint)
        if projectors:
            asked = source.name if candidate.ref.repo is None or source is not first else None
            return _Base(
                asked or str(candidate.ref.repo), checkpoint, projectors, provenance, circular
            )
    raise BaseError(
        "has no projector" + (", nor has any base of it" if len(chain) > 1 else ""),
        "no-projector",
        file=clean(first.name),
        remedy="name the multimodal model that this one was made from with --base",
    )


def _counterpart(projector: Projector, base: _Base) -> Side:
    """The base's projector of the same kind, by module path where there are several."""
    from projaudit.measure import Side

    word = projector.prefix.rpartition(".")[2]
    best = max(
        base.projectors,
        key=lambda p: (
            p.kind == projector.kind,
            p.prefix.endswith(word),
            p.prefix == projector.prefix,
        ),
    )
    roles = [layer.role for layer in projector.linears]
    if sorted(roles) == sorted(layer.role for layer in best.linears):
        # Where no family says the order, a file of another format has another one.
        ordered = sorted(best.linears, key=lambda layer: roles.index(layer.role))
        best = replace(best, linears=tuple(ordered))
    return Side(base.checkpoint, base.checkpoint.readings[0], best, _name(base.checkpoint.source))


def _facts(
    target: Checkpoint, base: _Base, coverage: Coverage, projectors: Sequence[Projector]
) -> Facts:
    from projaudit.analyses.structure import Facts

    def roles(of: Projector) -> dict[str, str]:
        biases = {f"{layer.role}.bias": layer.bias for layer in of.linears if layer.bias}
        unknown = {name.removeprefix(of.prefix): name for name in of.unexpected}
        return {**biases, **of.vectors, **unknown}

    added: list[str] = []
    missing: list[str] = []
    epsilons: list[str] = []
    partners = [_counterpart(projector, base).projector for projector in projectors]
    for projector, partner in zip(projectors, partners, strict=True):
        ours, theirs = roles(projector), roles(partner)
        if projector.norm_eps != partner.norm_eps:
            epsilons.append(f"epsilon of the norms: {partner.norm_eps:g} → {projector.norm_eps:g}")
        added += {*projector.unexpected, *(ours[role] for role in ours.keys() - theirs.keys())}
        missing += [theirs[role] for role in theirs.keys() - ours.keys()]
    if coverage.config_compared:  # a file alone need not be the whole model
        taken = {partner.tensors for partner in partners}
        gone = [other for other in base.projectors if other.tensors not in taken]
        missing += [name for projector in gone for name in projector.tensors]
        changes = (*coverage.config_changes, *dict.fromkeys(epsilons))
        coverage = replace(coverage, config_changes=changes)
    return Facts(
        target=_identity(target.origin),
        base=_identity(base.checkpoint.source),
        provenance=base.provenance,
        asked_base=base.asked,
        circular=base.circular,
        coverage=coverage,
        checkpoint=target,
        code=_code(target),
        added=sorted(added),
        missing=sorted(missing),
    )


def _code(target: Checkpoint) -> tuple[str, ...]:
    """What remote code would run; an adapter's beside its base's."""
    if target.adapter is None:
        return code_of(target)
    own = code_of(replace(target, source=target.adapter, config=None))
    return (*code_of(target), *own)


def _identity(source: Source) -> Identity:
    """Who a source is; the name is the one that the server answered with."""
    return Identity(
        ref=source.ref.text,
        kind=source.ref.kind,
        name=getattr(source, "id", source.name),
        revision=source.ref.revision,
        commit=source.commit,
        endpoint=getattr(source, "endpoint", None),
        gated=bool(getattr(source, "gated", False)),
        private=bool(getattr(source, "private", False)),
        from_cache=bool(getattr(source, "from_cache", False)),
    )


def _name(source: Source) -> str:
    identity = _identity(source)
    return f"{identity.name}@{identity.commit}" if identity.commit else identity.name


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


def _report(
    session: Session,
    ruleset: RuleSet,
    audit: _Audit,
    asked: Mapping[str, str | int | tuple[str, ...] | None],
    exit_zero: bool,
    started: datetime,
) -> Report:
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
        ruleset.depth, audit.depth, audit.not_probed, audit.evidence, audit.projectors
    )
    if missing:
        unevaluated = (Unevaluated("behaviour", "checkpoint", missing), *unevaluated)
    findings = tuple(
        replace(finding, locations=_locations(finding.subject, measured.tensors))
        for finding in findings
    )
    traffic = [opened.traffic for opened in session.sources]
    return Report(
        target=_identity(source),
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
        base=_identity(audit.bases[0].checkpoint.source) if audit.bases else None,
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
