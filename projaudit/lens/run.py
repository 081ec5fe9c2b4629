"""A look through the lens, from two references to all that was found; prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from projaudit.base import candidates
from projaudit.behaviour import hear, sandbox
from projaudit.behaviour.reasons import CouldNotProbe, TooLittleMemory
from projaudit.chain import hidden, parse
from projaudit.checkpoint import Checkpoint, load_weights, open_checkpoint
from projaudit.coverage import compare
from projaudit.errors import FormatError, LimitError, NothingError, UnsupportedError, UsageError
from projaudit.evidence import Sandbox, from_plain
from projaudit.inert import clean
from projaudit.lens.result import Study
from projaudit.lens.triggers import parse_trigger
from projaudit.projector import Projector, locate, require_readable
from projaudit.session import Progress, Session, environment, find_device, settle
from projaudit.source import parse_ref
from projaudit.strict import load_json
from projaudit.targets import token_ids

if TYPE_CHECKING:
    import torch

CHILD = ("-m", "projaudit.lens.child")
MOST_IMAGES = 512
"""Of a folder; the answer of the process that looks at them has a limit."""
LABELS_LIMIT = 16 << 20

Ranks = Literal["cumulative", "single"]


@dataclass(frozen=True)
class Wish:
    """What a user may choose of the lens."""

    images: Path
    """A folder of clean images."""
    trigger: str | None = None
    """A spec that is laid over them."""
    triggered: Path | None = None
    """A folder of triggered images instead."""
    target_text: str | None = None
    prompts: Path | None = None
    labels: Path | None = None
    """JSON: file name -> [question, right answer]."""
    images_per_cell: int = 16
    """Of each group; 0: no heat maps."""
    most: int = 8
    """Largest k of the heat maps."""
    ranks: tuple[Ranks, ...] = ("cumulative",)
    bias: tuple[bool, ...] = (True,)
    answer_tokens: int = 30


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
    asked = _asked(wish)
    with Session(settings, progress, notify) as session:
        on = find_device(settings.device)
        with session.stage("read projectors"):
            ours = _part(session, target, revision)
            theirs, verified = _base(session, ours.part.checkpoint, base, base_revision)
        _require_change(ours.part, theirs.part, target)
        _require_words(ours.part.checkpoint, wish.target_text)
        notes = _elsewhere(ours.part, theirs.part, settings.seed)
        with session.stage("look"):
            answer = _run(session, ours.part, theirs.part, asked, on)
        if answer.study is None:
            raise FormatError(
                f"none of its images can be read: {', '.join(answer.unreadable[:3])}",
                "image",
                file=clean(wish.triggered if answer.refused == "triggered" else wish.images),
                field=f"--{answer.refused}",
            )
        return Lens(
            target=ours.looked,
            base=theirs.looked,
            base_verified=verified,
            family=ours.part.projector.family,
            chain=ours.part.projector.chain,
            study=answer.study,
            sandbox=answer.sandbox,
            trigger=asked["trigger"],
            target_text=wish.target_text,
            options=_options(wish),
            seed=settings.seed,
            environment=environment(on),
            notes=(*notes, *asked["said"], *answer.study.notes),
            stages=dict(session.stages),
        )


def _asked(wish: Wish) -> dict[str, Any]:
    """What the process is asked, of the options; UsageError names the one that is wrong."""

    def wrong(option: str, message: str, file: Path | None = None) -> UsageError:
        place = None if file is None else clean(file)
        return UsageError(message, option, file=place, field=f"--{option}")

    def read(option: str, path: Path | None, function: Callable[[Path], Any]) -> Any:
        try:
            return None if path is None else function(path)
        except (OSError, ValueError) as error:
            raise wrong(option, clean(getattr(error, "strerror", None) or error), path) from None

    if wish.trigger is not None and wish.triggered is not None:
        raise wrong("trigger", "is given beside --triggered; one of them is enough")
    for option, value, low, high in (
        ("images-per-cell", wish.images_per_cell, 0, MOST_IMAGES),
        ("max-rank", wish.most, 1, 64),
        ("answer-tokens", wish.answer_tokens, 1, 512),
    ):
        if not low <= value <= high:
            raise wrong(option, f"{value} is not between {low} and {high}")
    if wish.target_text is not None and not wish.target_text.strip():
        raise wrong("target-text", "is empty")
    said = []

    def images(option: str, folder: Path | None) -> Any:
        files = read(option, folder, lambda f: hear.find_images(f, 1, MOST_IMAGES + 1))
        if files is not None and len(files) > MOST_IMAGES:
            said.append(f"of --{option} the first {MOST_IMAGES} images by name were taken")
        return None if files is None else list(files[:MOST_IMAGES])

    prompts = read("prompts", wish.prompts, hear.read_prompts)
    return {
        "images": images("images", wish.images),
        "triggered": images("triggered", wish.triggered),
        "trigger": None if wish.trigger is None else str(parse_trigger(wish.trigger)),
        "target": wish.target_text,
        "prompts": None if prompts is None else list(prompts),
        "labels": read("labels", wish.labels, _labels) or {},
        "per_cell": wish.images_per_cell,
        "most": wish.most,
        "maps": [[ranks, bias] for ranks in wish.ranks for bias in wish.bias],
        "length": wish.answer_tokens,
        "said": said,
    }


def _labels(file: Path) -> dict[str, list[str]]:
    try:
        content = load_json(file.read_bytes(), file=str(file), limit=LABELS_LIMIT)
    except FormatError as error:
        raise ValueError(error.message) from None
    pairs = content.items() if isinstance(content, dict) else ()
    for name, pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise ValueError(f"{name!r} has no [question, answer]")
    if not pairs:
        raise ValueError("is no JSON object of file name -> [question, answer]")
    return dict(pairs)


def _options(wish: Wish) -> dict[str, Any]:
    """The options as they go into the report; paths as they were typed."""
    return {
        "images": str(wish.images),
        "triggered": None if wish.triggered is None else str(wish.triggered),
        "prompts": None if wish.prompts is None else str(wish.prompts),
        "labels": None if wish.labels is None else str(wish.labels),
        "images-per-cell": wish.images_per_cell,
        "max-rank": wish.most,
        "ranks": list(wish.ranks),
        "bias": ["on" if bias else "off" for bias in wish.bias],
        "answer-tokens": wish.answer_tokens,
    }


# ------------------------------------------------------------------ the two sides


@dataclass(frozen=True)
class _Side:
    part: hear.Part
    looked: Looked


def _part(session: Session, name: str, revision: str | None) -> _Side:
    return _read(session, open_checkpoint(session.source(parse_ref(name, revision))))


def _base(
    session: Session, target: Checkpoint, name: str | None, revision: str | None
) -> tuple[_Side, bool]:
    named = () if name is None else (parse_ref(name, revision),)
    found = candidates(target.origin, target.config, option=named, pins={})[0]
    return _read(session, open_checkpoint(session.source(found.ref))), found.provenance.verified


def _read(session: Session, checkpoint: Checkpoint) -> _Side:
    reading = checkpoint.readings[0]
    found = locate(reading.shapes, checkpoint.config)
    if not found:
        raise NothingError("has no projector", "projector", file=clean(checkpoint.source.name))
    require_readable(found[0], reading.unread)
    weights = load_weights(checkpoint.source, reading, found[0].tensors)
    digests = {info.name: digest for weight in weights.values() for info, digest in weight.parts}
    source = checkpoint.source
    looked = Looked(clean(source.name), getattr(source, "commit", None), digests)
    tensors = {name: weight.tensor for name, weight in weights.items()}
    return _Side(hear.Part(checkpoint, found[0], tensors), looked)


def _require_change(target: hear.Part, base: hear.Part, name: str) -> None:
    """None, or NothingError where both projectors hold the same values."""
    try:
        theirs = hear.by_role(target.projector, base)
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


def _elsewhere(target: hear.Part, base: hear.Part, seed: int) -> list[str]:
    """What else than the projector differs from the base: all runs are the target's own model."""
    coverage = compare(
        target.checkpoint,
        base.checkpoint,
        audited=frozenset(target.projector.tensors),
        audited_base=frozenset(base.projector.tensors),
        seed=seed,
    )
    differing = [part.name for part in coverage.parts if part.status == "differs"]
    unknown = [part.name for part in coverage.parts if part.status == "not-looked-at"]
    said = []
    if differing:
        said.append(
            f"{' and '.join(differing)} differ from the base's too; both projectors were run in "
            "the target's own model"
        )
    if unknown:
        said.append(f"not compared with the base's: {', '.join(unknown)}")
    return said


# ------------------------------------------------------------------ the process


def _run(
    session: Session,
    target: hear.Part,
    base: hear.Part,
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
        with hear.staged(
            target, base, other_model=False, device=device, seed=session.settings.seed
        ) as staged:
            answer = sandbox.run(
                {**staged.request, **asked, **_layers(target.projector)},
                **staged.limits,
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
    reads = set(linear[0].roles)
    units = [one.second for one in hidden(projector.chain) if one.act]
    weights = {layer.role: layer.weight for layer in projector.linears}
    return {
        "layers": [{**asdict(one), "reads": one.role in reads} for one in projector.path],
        "reader": weights[units[0]] if units else None,
    }
