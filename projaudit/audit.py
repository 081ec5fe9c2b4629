"""The pipeline: source → checkpoint → projector → update → measurements → findings → report."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from projaudit import __version__
from projaudit.base import Candidate, candidates, lineage
from projaudit.checkpoint import Checkpoint, Reading, Stored, load_tensors, open_checkpoint
from projaudit.coverage import compare
from projaudit.errors import (
    BaseError,
    NothingError,
    ProjauditError,
    UsageError,
)
from projaudit.findings import Measurement, Series, Skipped, Unevaluated
from projaudit.inert import clean
from projaudit.judge import judge
from projaudit.policy import RuleSet, load_policy
from projaudit.projector import Projector, locate
from projaudit.report import (
    AuditedProjector,
    Coverage,
    ErrorRecord,
    Identity,
    Layer,
    Policy,
    Provenance,
    Report,
    Run,
    TensorRead,
)
from projaudit.source import Ref, Source, open_local, parse_ref

if TYPE_CHECKING:
    import torch

    from projaudit.analyses.context import Direction
    from projaudit.analyses.structure import Facts

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes so far, bytes in all); (…, 0, 0) starts a stage."""
DEFAULT_POLICY = "structure"
DEFAULT_RANK = 32
MAX_RANK = 512


@dataclass
class _Session:
    """What one check has opened and how long its stages took."""

    offline: bool
    verify: Literal["range", "full"]
    progress: Progress | None
    notify: Callable[[str], None] | None
    open: ExitStack = field(default_factory=ExitStack)
    stages: dict[str, float] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of its body to the stage of that name."""
        if self.progress:
            self.progress(name, 0, 0)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.stages[name] = self.stages.get(name, 0.0) + spent

    def source(self, ref: Ref) -> Source:
        """The source of a reference, opened once."""
        for known in self.sources:
            if (known.ref.kind, known.ref.path, known.ref.repo, known.ref.revision) == (
                ref.kind,
                ref.path,
                ref.repo,
                ref.revision,
            ):
                return known
        if ref.kind == "local":
            found: Source = open_local(ref)
        else:
            from projaudit.hub import guarded_client, open_hub

            self.open.enter_context(guarded_client())
            found = open_hub(
                ref,
                offline=self.offline,
                verify=self.verify,
                progress=self.progress,
                notify=self.notify,
            )
        self.sources.append(found)
        return found


def check(
    target: str,
    base: str | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    rules: Path | None = None,
    policy: str | Path = DEFAULT_POLICY,
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

    `target` and `base` are a Hub id (`org/model`, `org/model@rev`), a Hub URL, a folder or a file.
    What is None here comes from the policy, then from the defaults (device auto, rank 32, a fresh
    seed, verify range). Raises a ProjauditError with a stable `code` where there is no audit; what
    could not be told within one stands in the report.
    """
    started = datetime.now(UTC)
    from projaudit.analyses import METRICS

    ruleset = load_policy(policy, METRICS, rules)
    options = ruleset.options
    settings = _settings(options, device=device, rank=rank, seed=seed, verify=verify)
    session = _Session(
        bool(options.get("offline", False) if offline is None else offline),
        settings.verify,
        progress,
        notify,
    )
    with session.open:
        return _audit(
            session,
            ruleset if fail_on is None else replace(ruleset, fail_on=fail_on),
            settings,
            parse_ref(target, revision),
            _base_ref(base, base_revision, options),
            directions,
            target_texts,
            exit_zero,
            started,
        )


def failed(target: str, error: ProjauditError, policy: Policy | None = None) -> Report:
    """The report of an audit that did not happen, so that every format can say why."""
    return Report(
        target=Identity(target, "local", target),
        policy=policy or Policy(DEFAULT_POLICY, "weights", "fail"),
        environment={"projaudit": __version__},
        settings={},
        run=Run(datetime.now(UTC).isoformat(timespec="seconds"), {}),
        error=ErrorRecord(
            error.code, error.message, error.file, error.field, error.remedy, error.exit_code
        ),
    )


@dataclass(frozen=True)
class _Settings:
    device: str
    rank: int
    rank_given: bool
    seed: int
    verify: Literal["range", "full"]


def _settings(
    options: Mapping[str, Any],
    *,
    device: str | None,
    rank: int | None,
    seed: int | None,
    verify: Literal["range", "full"] | None,
) -> _Settings:
    def chosen(name: str, given: Any, default: Any, kind: type, ok: Callable[[Any], bool]) -> Any:
        value = given if given is not None else options.get(name, default)
        if isinstance(value, bool) or not isinstance(value, kind) or not ok(value):
            raise UsageError(f"{clean(value)!r} is not allowed", "option", field=name)
        return value

    wanted = chosen("rank", rank, DEFAULT_RANK, int, lambda k: 1 <= k <= MAX_RANK)
    fresh = secrets.randbelow(1 << 31)
    return _Settings(
        device=chosen("device", device, "auto", str, bool),
        rank=wanted,
        rank_given=rank is not None or "rank" in options,
        seed=chosen("seed", seed, fresh, int, lambda s: 0 <= s < 1 << 63),
        verify=chosen("verify", verify, "range", str, lambda v: v in ("range", "full")),
    )


def _base_ref(base: str | None, revision: str | None, options: Mapping[str, Any]) -> Ref | None:
    if base is None and "base" in options:
        base, revision = str(options["base"]), revision or options.get("base_revision")
    if base is None:
        if revision is not None:
            raise UsageError("needs a base", "option", field="--base-revision")
        return None
    return parse_ref(base, revision)


def _audit(
    session: _Session,
    ruleset: RuleSet,
    settings: _Settings,
    target_ref: Ref,
    base_ref: Ref | None,
    direction_files: Sequence[Path],
    texts: Sequence[str],
    exit_zero: bool,
    started: datetime,
) -> Report:
    with session.stage("import torch"):
        from projaudit.targets import load_directions

        device = _device(settings.device)
    directions = load_directions(direction_files)
    with session.stage("open target"):
        source = session.source(target_ref)
        target = open_checkpoint(source)
        found = [(reading, _projectors(reading, target)) for reading in target.readings]
        if not found[0][1]:
            raise _no_projector(target)
    with session.stage("open base"):
        bases = [
            _opened(session, candidate)
            for candidate in candidates(source, target.config, option=base_ref, pins=ruleset.pins)
        ]
    gathered = _Gathered()
    for number, base in enumerate(bases, 1):
        for reading, projectors in found:
            if reading is not target.readings[0] and _same_bytes(reading, projectors, found[0]):
                continue
            for projector in projectors:
                _measure_projector(
                    session,
                    settings,
                    device,
                    gathered,
                    target,
                    reading,
                    projector,
                    base,
                    directions=directions,
                    texts=texts,
                )
        with session.stage("compare the rest"):
            first = found[0][1][0]
            coverage = compare(
                target,
                base.checkpoint,
                audited=frozenset(n for p in found[0][1] for n in p.tensors),
                audited_base=frozenset(n for p in base.projectors for n in p.tensors),
                seed=settings.seed,
            )
            facts = _facts(target, base, coverage, first)
            subject = "checkpoint" if number == 1 else f"checkpoint@{number}"
            gathered.measure("checkpoint", subject, facts)
        gathered.coverage.append(coverage)
    return _report(session, ruleset, settings, device, gathered, target, bases, exit_zero, started)


@dataclass(frozen=True)
class _Base:
    """A base that was opened: the first of its lineage that has a projector."""

    candidate: Candidate
    asked: str
    checkpoint: Checkpoint
    projectors: tuple[Projector, ...]
    provenance: Provenance
    circular: bool

    @property
    def source(self) -> Source:
        return self.checkpoint.source


def _opened(session: _Session, candidate: Candidate) -> _Base:
    first = session.source(candidate.ref)
    chain, circular = lineage(first, session.source)
    names = tuple(_identity(s).name for s in chain)
    provenance = replace(candidate.provenance, lineage=names)
    for source in chain:
        try:
            checkpoint = open_checkpoint(source)
        except NothingError:
            continue
        projectors = _projectors(checkpoint.readings[0], checkpoint)
        if projectors:
            asked = candidate.ref.repo if source is first else source.name
            return _Base(
                candidate, asked or source.name, checkpoint, projectors, provenance, circular
            )
    raise BaseError(
        "has no LLaVA-family projector" + (", nor has any base of it" if len(chain) > 1 else ""),
        "no-projector",
        file=clean(first.name),
        remedy="name the multimodal model that this one was made from with --base",
    )


def _projectors(reading: Reading, checkpoint: Checkpoint) -> tuple[Projector, ...]:
    shapes = {name: info.shape for name, info in reading.tensors.items()}
    try:
        return locate(shapes, checkpoint.config)
    except ProjauditError as error:
        error.file = error.file or clean(checkpoint.source.name)
        raise


def _no_projector(target: Checkpoint) -> NothingError:
    architectures = (target.config or {}).get("architectures")
    known = isinstance(architectures, list) and architectures
    what = f" ({clean(architectures[0])})" if known and isinstance(architectures, list) else ""
    return NothingError(
        f"has no LLaVA-family projector{what} among {len(target.readings[0].tensors)} tensors",
        "projector",
        file=clean(target.source.name),
        remedy="only LLaVA-style models are read so far; a text model has nothing to audit",
    )


def _same_bytes(
    reading: Reading,
    projectors: Sequence[Projector],
    first: tuple[Reading, Sequence[Projector]],
) -> bool:
    def places(of: Reading, found: Sequence[Projector]) -> set[tuple[str, int]]:
        names = [name for projector in found for name in projector.tensors]
        return {(of.tensors[name].file, of.tensors[name].start) for name in names}

    return places(reading, projectors) <= places(*first)


@dataclass
class _Gathered:
    """What the measuring yields, over all projectors."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    tensors: list[TensorRead] = field(default_factory=list)
    projectors: list[AuditedProjector] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)
    budget: dict[str, int] = field(default_factory=dict)

    def measure(self, kind: str, subject: str, of: object) -> None:
        """Adds every metric of that kind for a subject: a number, or why there is none."""
        from projaudit.analyses import run

        measurements, skipped = run(kind, subject, of)
        self.measurements += measurements
        self.skipped += skipped


def _measure_projector(
    session: _Session,
    settings: _Settings,
    device: torch.device,
    gathered: _Gathered,
    target: Checkpoint,
    reading: Reading,
    projector: Projector,
    base: _Base,
    *,
    directions: Sequence[Direction],
    texts: Sequence[str],
) -> None:
    import torch

    from projaudit.analyses import ProjectorContext, probes, spectral
    from projaudit.targets import (
        check_widths,
        embedding_matrix,
        embedding_pair,
        text_directions,
    )
    from projaudit.update import pair

    check_widths(directions, projector.out_features)
    number = len(gathered.projectors) + 1
    subject = "projector" if number == 1 else f"projector@{number}"
    other = _counterpart(projector, base.projectors)
    base_reading = base.checkpoint.readings[0]
    with session.stage("read projector"):
        ours = load_tensors(target.source, [reading.tensors[n] for n in projector.tensors])
        theirs = load_tensors(base.source, [base_reading.tensors[n] for n in other.tensors])
    if settings.rank_given and settings.rank > (side := _smallest_side(projector)):
        raise UsageError(
            f"{settings.rank} is more than the {side} singular values of the smallest layer",
            "option",
            field="--rank",
        )
    gathered.tensors += _tensors_read("target", subject, projector, ours, target.source)
    gathered.tensors += _tensors_read("base", subject, other, theirs, base.source)
    gathered.projectors.append(_audited(subject, projector, other, reading, base))
    generator = torch.Generator().manual_seed(settings.seed + number)
    with session.stage("pair"):
        update = pair(
            projector,
            other,
            {name: stored.tensor for name, stored in ours.items()},
            {name: stored.tensor for name, stored in theirs.items()},
            subject=subject,
            device=device,
            rank=settings.rank,
            generator=generator,
            embedding_rows=lambda: embedding_pair(base.checkpoint, target, device),
        )
    del ours, theirs
    with session.stage("spectrum"):
        for layer in update.layers:
            gathered.measure("layer", layer.subject, layer)
            gathered.series += spectral.series(layer)
        for vector in update.vectors:
            gathered.measure("vector", vector.subject, vector)
    with session.stage("probes"):
        width = projector.out_features
        context = ProjectorContext(
            update=update,
            directions=(*directions, *text_directions(target, reading, texts, width)),
            tokens=embedding_matrix(target, reading, width),
        )
        gathered.measure("projector", subject, context)
        gathered.series += probes.series(context)


def _counterpart(projector: Projector, found: Sequence[Projector]) -> Projector:
    """The base's projector of the same kind, by module name where there are several."""
    word = projector.prefix.rpartition(".")[2]
    return max(found, key=lambda p: (p.kind == projector.kind, p.prefix.endswith(word)))


def _smallest_side(projector: Projector) -> int:
    return min(min(layer.shape) for layer in projector.linears)


def _tensors_read(
    side: Literal["target", "base"],
    subject: str,
    projector: Projector,
    stored: Mapping[str, Stored],
    source: Source,
) -> list[TensorRead]:
    roles = {
        name: f"{layer.role}.{leaf}"
        for layer in projector.linears
        for leaf, name in (("weight", layer.weight), ("bias", layer.bias))
        if name
    } | {name: role for role, name in projector.vectors.items()}
    verified = getattr(source, "verified", {})
    return [
        TensorRead(
            side=side,
            projector=subject,
            role=roles[name],
            name=name,
            file=item.info.file,
            start=item.info.start,
            stop=item.info.stop,
            dtype=item.info.dtype,
            shape=item.info.shape,
            sha256=item.sha256,
            file_sha256=source.files[item.info.file].sha256,
            verified=verified.get(item.info.file, "local"),
        )
        for name, item in stored.items()
    ]


def _audited(
    subject: str, projector: Projector, other: Projector, reading: Reading, base: _Base
) -> AuditedProjector:
    partners = {layer.role: layer.weight for layer in other.linears}
    identity = _identity(base.source)
    return AuditedProjector(
        subject=subject,
        family=projector.family,
        reading=f"{reading.label}: {reading.why}",
        base=f"{identity.name}@{identity.commit}" if identity.commit else identity.name,
        layers=tuple(
            Layer(layer.role, layer.weight, layer.shape, partners.get(layer.role), bool(layer.bias))
            for layer in projector.linears
        ),
        chain=projector.chain,
        in_features=projector.in_features,
        out_features=projector.out_features,
    )


def _facts(target: Checkpoint, base: _Base, coverage: Coverage, projector: Projector) -> Facts:
    from projaudit.analyses.structure import Facts

    other = _counterpart(projector, base.projectors)

    def roles(of: Projector) -> set[str]:
        biases = {f"{layer.role}.bias" for layer in of.linears if layer.bias}
        return biases | set(of.vectors)

    return Facts(
        target=_identity(target.source),
        base=_identity(base.source),
        provenance=base.provenance,
        asked_base=base.asked,
        circular=base.circular,
        coverage=coverage,
        checkpoint=target,
        unexpected=projector.unexpected,
        missing=sorted(roles(other) - roles(projector)),
    )


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


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in {"cpu", "cuda"} or (index and (kind == "cpu" or not index.isdecimal())):
        raise UsageError(f"{clean(name)!r} is none of auto, cpu, cuda, cuda:n", "device")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", "device", field="--device")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name}; there are {torch.cuda.device_count()}", "device"
        )
    return torch.device(name)


def _environment(device: torch.device) -> dict[str, str]:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {p: version(p) for p in ("numpy", "scipy", "safetensors", "huggingface-hub")}
    return {
        "projaudit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "platform": platform.system(),
        "device": str(device),
        "device_name": name,
        "dtype": "float32",
        "threads": str(torch.get_num_threads()),
    }


def _report(
    session: _Session,
    ruleset: RuleSet,
    settings: _Settings,
    device: torch.device,
    gathered: _Gathered,
    target: Checkpoint,
    bases: Sequence[_Base],
    exit_zero: bool,
    started: datetime,
) -> Report:
    from projaudit.analyses import METRICS

    with session.stage("judge"):
        digests = {t.sha256 for t in gathered.tensors if t.side == "target"}
        digests |= {target.source.commit} if target.source.commit else set()
        findings, unevaluated, outcomes = judge(
            ruleset,
            gathered.measurements,
            gathered.skipped,
            METRICS,
            digests=frozenset(digests),
        )
        if ruleset.depth == "behaviour":
            missing = Unevaluated("behaviour", "checkpoint", "depth behaviour was not run")
            unevaluated = (*unevaluated, missing)
    traffic = [source.traffic for source in session.sources]
    first = bases[0]
    return Report(
        target=_identity(target.source),
        policy=Policy(ruleset.name, "weights", ruleset.fail_on, exit_zero),
        environment=_environment(device),
        settings={
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
        base=_identity(first.source),
        provenance=first.provenance,
        projectors=tuple(gathered.projectors),
        coverage=gathered.coverage[0],
        tensors=tuple(gathered.tensors),
        measurements=tuple(gathered.measurements),
        series=tuple(gathered.series),
        skipped=tuple(gathered.skipped),
        findings=findings,
        unevaluated=unevaluated,
        rules=outcomes,
    )
