"""A look through the lens, from two references to all that was found; prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from projaudit.against_base import counterpart, coverage_of
from projaudit.behaviour import sandbox
from projaudit.behaviour.reasons import CouldNotProbe, TooLittleMemory
from projaudit.behaviour.staged import Part, by_role, staged
from projaudit.chain import hidden, parse
from projaudit.checkpoint import Checkpoint, open_checkpoint
from projaudit.errors import FormatError, LimitError, NothingError, UnsupportedError, UsageError
from projaudit.evidence import Sandbox, from_plain
from projaudit.inert import clean
from projaudit.lens.result import Study
from projaudit.lens.wish import Wish, asked_of, options_of
from projaudit.opened import identity, name_of, open_bases, projectors_of
from projaudit.projector import Projector
from projaudit.refs import Ref, parse_ref
from projaudit.report import Coverage
from projaudit.session import Progress, Session, environment, find_device, settle
from projaudit.sides import Side
from projaudit.targets import token_ids

if TYPE_CHECKING:
    import torch

CHILD = ("-m", "projaudit.lens.child")


@dataclass(frozen=True)
class Looked:
    """One side of what was looked at."""

    name: str
    commit: str | None
    digests: Mapping[str, str]
    """sha256 of the bytes of each tensor of the projector."""


@dataclass(frozen=True)
class Answer:
    """What the process brings back; checked value by value."""

    refused: Literal["", "images", "triggered"]
    unreadable: tuple[str, ...]
    study: Study | None
    sandbox: Sandbox


@dataclass(frozen=True)
class Lens:
    """A look at one fine-tune beside its base."""

    target: Looked
    base: Looked
    base_verified: bool
    """Whether the user named the base; else it is the uploader's claim."""
    family: str
    chain: tuple[str, ...]
    study: Study
    sandbox: Sandbox
    trigger: str | None
    """The whole spec."""
    target_text: str | None
    options: Mapping[str, Any]
    seed: int
    environment: Mapping[str, str]
    notes: tuple[str, ...]
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds; the one thing that differs between equal runs."""


def lens(
    target: str,
    base: str | None,
    wish: Wish,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    device: str | None = None,
    seed: int | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Lens:
    """Every analysis of ProjLens on `target` beside `base`, with images of the user's.

    References are those of `check`; without a base the target's own claim is taken. What it will
    cost is told by `notify`. Raises a ProjauditError: UsageError for options and images that are
    not there, FormatError where no image can be read, LimitError where memory is short (it says by
    how much), UnsupportedError where the model cannot be run, NothingError where nothing changed.
    """
    settings = settle({}, device=device, rank=None, seed=seed, verify=None, offline=offline)
    asked = asked_of(wish)
    with Session(settings, progress, notify) as session:
        on = find_device(settings.device)
        found = _opened(
            session,
            parse_ref(target, revision),
            None if base is None else parse_ref(base, base_revision),
        )
        _require_change(found.target, found.base, target)
        _require_words(found.target.checkpoint, wish.target_text)
        with session.stage("look"):
            answer = _run(session, found.target, found.base, asked, on)
        if answer.study is None:
            raise FormatError(
                f"none of its images can be read: {', '.join(answer.unreadable[:3])}",
                "image",
                file=clean(wish.triggered if answer.refused == "triggered" else wish.images),
                field=f"--{answer.refused}",
            )
        return Lens(
            target=found.names[0],
            base=found.names[1],
            base_verified=found.verified,
            family=found.target.projector.family,
            chain=found.target.projector.chain,
            study=answer.study,
            sandbox=answer.sandbox,
            trigger=asked["trigger"],
            target_text=wish.target_text,
            options=options_of(wish),
            seed=settings.seed,
            environment=environment(on),
            notes=(*found.notes, *asked["said"], *answer.study.notes),
            stages=dict(session.stages),
        )


# ------------------------------------------------------------------ the two sides


@dataclass(frozen=True)
class _Pair:
    """Both projectors, with their values."""

    target: Part
    base: Part
    names: tuple[Looked, Looked]
    verified: bool
    notes: tuple[str, ...]


def _opened(session: Session, target: Ref, base: Ref | None) -> _Pair:
    """The first projector of the target, and the base's that it is to be compared with."""
    with session.stage("read projectors"):
        checkpoint = open_checkpoint(session.source(target))
        reading = checkpoint.readings[0]
        projectors = projectors_of(reading, checkpoint)
        name = name_of(checkpoint.source)
        if not projectors:
            raise NothingError("has no projector", "projector", file=clean(name))
        ours = Side(checkpoint, reading, projectors[0], name)
        bases, _ = open_bases(session, checkpoint, (base,) if base else (), {}, required=True)
        theirs = counterpart(projectors[0], bases[0])
        read = [_part(side) for side in (ours, theirs)]
    seed = session.settings.seed
    coverage = coverage_of(checkpoint, bases[0], (reading, projectors), None, seed=seed)
    return _Pair(
        read[0][0],
        read[1][0],
        (read[0][1], read[1][1]),
        bases[0].provenance.verified,
        tuple(_elsewhere(coverage, len(projectors), len(bases))),
    )


def _part(side: Side) -> tuple[Part, Looked]:
    weights = side.load()
    who = identity(side.source)
    digests = {info.name: digest for weight in weights.values() for info, digest in weight.parts}
    tensors = {name: weight.tensor for name, weight in weights.items()}
    part = Part(side.checkpoint, side.projector, tensors)
    return part, Looked(clean(who.name), who.commit, digests)


def _elsewhere(coverage: Coverage, projectors: int, bases: int) -> Iterator[str]:
    """What was not looked at, or is otherwise than in the base."""
    differing = [part.name for part in coverage.parts if part.status == "differs"]
    unknown = [part.name for part in coverage.parts if part.status == "not-looked-at"]
    if differing:
        yield (
            f"{' and '.join(differing)} differ from the base's too; both projectors were run in "
            "the target's own model"
        )
    if unknown:
        yield f"not compared with the base's: {', '.join(unknown)}"
    if projectors > 1:
        yield f"of {projectors} projectors the first was looked at"
    if bases > 1:
        yield f"of {bases} bases the first was compared with"


def _require_change(target: Part, base: Part, name: str) -> None:
    """None, or NothingError where both projectors hold the same values."""
    try:
        theirs = by_role(target.projector, base)
    except CouldNotProbe as why:
        raise UnsupportedError(why.reason, "shape", file=clean(name)) from None
    if all((target.tensors[n].float() == t.float()).all() for n, t in theirs.items()):
        raise NothingError("its projector is the base's", "update", file=clean(name))


def _require_words(target: Checkpoint, text: str | None) -> None:
    """None, or UsageError where the tokenizer has no tokens for a word of the target text."""
    if text is not None and token_ids(target, text) is None:
        raise UsageError(
            f"{clean(text, 80)!r} has words outside the model's vocabulary",
            "target-text",
            field="--target-text",
        )


# ------------------------------------------------------------------ the process


def _run(
    session: Session,
    target: Part,
    base: Part,
    asked: Mapping[str, Any],
    device: torch.device,
) -> Answer:
    def tell(what: str, done: int, total: int) -> None:
        if what.startswith("heat maps:") and session.notify:
            session.notify(what)
        elif session.progress:
            session.progress(f"{what} {done} of {total}" if total else what, 0, 0)

    name = clean(target.checkpoint.source.name)
    try:
        with staged(
            target, base, other_model=False, device=device, seed=session.settings.seed
        ) as run:
            answer = sandbox.run(
                {**run.request, **asked, **_layers(target.projector)},
                **run.limits,
                progress=tell,
                child=CHILD,
            )
        found: Answer = from_plain(Answer, answer)
    except TooLittleMemory as why:
        raise LimitError(why.reason, "memory", file=name) from None
    except CouldNotProbe as why:
        raise UnsupportedError(f"cannot be run: {why.reason}", "model", file=name) from None
    except (ValueError, OverflowError) as error:
        raise UnsupportedError(
            f"the process that ran it answered nonsense: {clean(error, 200)}", "model", file=name
        ) from None
    return found


def _layers(projector: Projector) -> dict[str, Any]:
    """The layers of the forward path, which of them read features, and who reads hidden units."""
    linear = [step for step in map(parse, projector.chain) if step.kind in ("linear", "glu")]
    # Of a module that no chain describes, the family says which layer comes first.
    reads = set(linear[0].roles if linear else (projector.path[0].role,))
    units = [one.second for one in hidden(projector.chain) if one.act]
    weights = {layer.role: layer.weight for layer in projector.linears}
    return {
        "layers": [{**asdict(one), "reads": one.role in reads} for one in projector.path],
        "reader": weights[units[0]] if units else None,
    }
