"""Depth behaviour within an audit: what the user wants of it, and what came of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from projaudit.behaviour.able import require_runnable, require_unasked
from projaudit.behaviour.asked import Asked, find_images, read_prompts
from projaudit.behaviour.hear import announce
from projaudit.behaviour.prompts import FEWEST, kind_of
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.staged import Part, by_role, hears, host
from projaudit.calibration import Calibration, Shape, load_calibration, shipped, stand
from projaudit.checkpoint import Checkpoint
from projaudit.errors import UsageError
from projaudit.evidence import Evidence
from projaudit.findings import Measurement
from projaudit.inert import clean
from projaudit.projector import Projector
from projaudit.report import Coverage, Standing
from projaudit.session import Session

if TYPE_CHECKING:
    import torch

    from projaudit.adapters import Fit
    from projaudit.sides import Side

Depth = Literal["weights", "behaviour"]


class Hear(Protocol):
    """How a model is heard: `behaviour.hear.hear`, or what does more in the same process."""

    def __call__(
        self,
        target: Part,
        base: Part | None,
        asked: Asked,
        *,
        other_model: bool,
        device: torch.device,
        seed: int,
        progress: Callable[[str, int, int], None] | None,
    ) -> Evidence: ...


@dataclass(frozen=True)
class Wish:
    """What the user wants of depth behaviour."""

    depth: Literal["auto", "weights", "behaviour"]
    asked: Asked
    calibration: Calibration | None
    source: str
    """Of the calibration."""


def wish(
    depth: Literal["auto", "weights", "behaviour"],
    prompts: Path | None,
    images: Path | None,
    requests: Path | None,
    budget: int | None,
    calibration: Path | None,
) -> Wish:
    """The wish as the options say it; UsageError where one cannot be read."""

    def read(option: str, path: Path | None, function: Callable[[Path], Any]) -> Any:
        try:
            return None if path is None else function(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(clean(reason), option, file=clean(path), field=f"--{option}") from None

    if budget is not None and not 100 <= budget <= 1_000_000:
        raise UsageError("is not between 100 and 1,000,000 answers", "option", field="--budget")
    asked = Asked(
        read("prompts", prompts, lambda file: read_prompts(file, FEWEST)),
        read("images", images, find_images),
        read("requests", requests, read_prompts),
        budget,
    )
    if calibration is None:
        return Wish(depth, asked, shipped(), "shipped")
    return Wish(depth, asked, load_calibration(calibration), str(calibration))


def depth_of(wanted: str, target: Checkpoint, device: torch.device) -> tuple[Depth, str]:
    """The depth that is run, and why it is not behaviour where that was left to us."""
    if wanted != "auto":
        return ("weights" if wanted == "weights" else "behaviour"), ""
    try:
        require_unasked(target, device)
    except CouldNotProbe as why:
        return "weights", why.reason
    return "behaviour", ""


def run_of(sides: Sequence[Side]) -> list[Side]:
    """Those that are run, together: the first reading's, with an adapter beside it merged in.

    First the one whose features are moved along directions: of images, and none of a numbered list.
    """
    merged = {s.projector.tensors: s for s in sides if s.reading.label == "adapter"}
    first = [side for side in sides if side.reading is sides[0].reading]
    run = [merged.get(side.projector.tensors, side) for side in first]
    return sorted(
        run, key=lambda s: (hears(s.projector), s.projector.prefix.rpartition(".")[2].isdigit())
    )


def heard(
    session: Session,
    device: torch.device,
    target: Sequence[Side],
    base: Sequence[Side],
    ways: tuple[Sequence[Projector], Sequence[Projector]],
    fitted: Fit | None,
    coverage: Coverage,
    wish: Wish,
    hear: Hear,
) -> Evidence:
    """What depth behaviour brought back; raises CouldNotProbe.

    Of the sides that are run and their counterparts in the base, if there is one; `ways` are all
    the projectors of either's model.
    """
    if hears(target[0].projector):
        raise CouldNotProbe("its projector is one of sound, which is not asked about")
    with session.stage("behaviour"):
        ours = _part(target, ways[0], fitted)
        theirs = _part(base, ways[1]) if base else None
        run = host(ours, theirs)
        # Before it is said that it will run.
        require_runnable(run.checkpoint, device, adapter_read=run.adapter_read)
        if session.notify:
            session.notify(announce(run.checkpoint, wish.asked, device))
        return hear(
            ours,
            theirs,
            wish.asked,
            other_model=models_differ(coverage),
            device=device,
            seed=session.settings.seed,
            progress=teller(session),
        )


def _part(sides: Sequence[Side], ways: Sequence[Projector], fitted: Fit | None = None) -> Part:
    side = sides[0]
    names = {name for one in sides for name in one.projector.tensors}
    ours = names.union(*(one.projector.unexpected for one in sides))
    held = None
    if side.fit is not None:
        held = {name: stored.tensor for name, stored in replace(side, fit=None).load().items()}
    return Part(
        side.checkpoint,
        side.projector,
        {name: stored.tensor for name, stored in side.load().items()},
        held=held,
        adapter_read=fitted is not None,
        alone=side.reading.metadata is not None or ours.issuperset(side.reading.shapes),
        left=left_out(side, fitted),
        others=tuple(_part([one], ()) for one in sides[1:]),
        ways=tuple(ways),
    )


def left_out(side: Side, fitted: Fit | None) -> str:
    """What of the audited model is not in the one that is run; empty where it is all of it."""
    if fitted is not None and fitted.elsewhere:
        many = len(fitted.elsewhere)
        return (
            f"the {many} tensors of the adapter that change the rest of the model were left out: "
            "its projector was run in the model that it is for"
        )
    if side.reading.metadata is not None:
        return (
            "only the projector of the GGUF file was run, in the base's model: not its vision "
            "tower, nor the text model that goes with it"
        )
    return ""


def not_run(sides: Sequence[Side], run: Sequence[Side], base: Sequence[Side]) -> str:
    """Which of the projectors that were audited was not heard; empty where all of them were.

    Weights beside an adapter that are the base's have nothing to say without it.
    """
    for side in sides:
        if side in run:
            if hears(side.projector):
                return f"{clean(side.projector.prefix, 80)} is one of sound: it was not asked about"
            continue
        merged = [i for i, one in enumerate(run) if one.projector == side.projector and one.fit]
        if side.reading is not sides[0].reading or not merged:
            return "only the projector that transformers loads first was run"
        if not base or not _alike(side, base[merged[0]]):
            return "the weights were run with the adapter beside them only"
    return ""


def _alike(side: Side, base: Side) -> bool:
    """Whether a projector holds the values of the base's."""
    try:
        theirs = by_role(side.projector, _part([base], ()))
    except CouldNotProbe:
        return False
    ours = {name: stored.tensor for name, stored in side.load().items()}
    return ours.keys() == theirs.keys() and all(
        bool((ours[name].float() == theirs[name].float()).all()) for name in ours
    )


def teller(session: Session) -> Callable[[str, int, int], None]:
    """What is called with (what is being done, how many of them so far, how many in all)."""

    def tell(what: str, done: int, total: int) -> None:
        if session.progress:
            session.progress(f"{what} {done} of {total}" if total else what, 0, 0)

    return tell


def models_differ(coverage: Coverage) -> bool:
    """Whether more than the projector differs from the base, or may."""
    return any(
        part.status in ("differs", "not-looked-at")
        for part in coverage.parts
        if part.name in ("vision tower", "language model", "other tensors")
    )


def standing(
    wish: Wish, evidence: Evidence, projector: Projector, measurements: Sequence[Measurement]
) -> Standing | None:
    """Where the score stands; None without a score or a calibration."""
    value = evidence.score
    if value is None or wish.calibration is None:
        return None
    norms = [m.value for m in measurements if m.metric == "relative_norm"]
    shape = Shape(
        family=projector.family,
        parameters=evidence.parameters,
        in_features=projector.in_features,
        out_features=projector.out_features,
        relative_norm=max(norms, default=None),
        images=evidence.images,
        prompts=kind_of(evidence.prompts),
    )
    return stand(wish.calibration, wish.source, value, shape)


def unheard(
    required: Depth,
    depth: Depth,
    not_probed: str,
    evidence: Evidence | None,
    left: str,
) -> str:
    """What a verdict at depth behaviour lacks; empty where nothing is missing or wanted."""
    if evidence is None:
        if required == "behaviour" or depth == "behaviour":
            return not_probed or "depth behaviour was not asked for (--depth behaviour)"
        return ""
    if evidence.stopped == "budget":
        return (
            f"the budget of {evidence.budget:,} answers was spent after {evidence.probes} of "
            f"{evidence.planned} probes"
        )
    return left
