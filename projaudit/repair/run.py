"""A repair: audit, choose what to take out, write what is left, audit that with fresh probes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from projaudit import __version__
from projaudit.adapters import fit
from projaudit.against_base import counterpart
from projaudit.audit import check
from projaudit.behaviour import sandbox
from projaudit.behaviour.asked import Asked
from projaudit.behaviour.hear import hear, questions, told
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.staged import Part, by_role, host, staged
from projaudit.errors import BaseError, UnsupportedError
from projaudit.evidence import Evidence, Mended
from projaudit.listening import wish
from projaudit.opened import around, found_in, open_bases, open_target
from projaudit.refs import parse_ref
from projaudit.repair.files import (
    MODEL,
    PROJECTOR,
    digest,
    require_new,
    require_repairable,
    write_model,
    write_projector,
)
from projaudit.repair.method import applied, best, parse_method, require_possible
from projaudit.repair.outcome import Method, Repair, Written, heard, strength
from projaudit.report import Report
from projaudit.session import Progress, Session, settle
from projaudit.sides import Side, sides_of

if TYPE_CHECKING:
    import torch

CHILD = ("-m", "projaudit.repair.child")
AFRESH = 1_000_003
"""From the seed of the audit before to that of the one after."""
_BY_HAND = "--method top-k:2, shrink:0.5, clip or revert does what you name"


def repair(
    target: str,
    base: str | None,
    output: Path,
    *,
    method: str = "auto",
    full: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
    prompts: Path | None = None,
    images: Path | None = None,
    budget: int | None = None,
    calibration: Path | None = None,
    device: str | None = None,
    seed: int | None = None,
    offline: bool | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Repair:
    """The repaired projector of `target`, written into the folder `output`, and what came of it.

    `method` is `auto`, which runs the model and chooses, or what to do: `top-k:K`, `top-k-all:K`,
    `shrink:SHARE`, `clip`, `revert`. `full` writes the whole model too. The other options are those
    of `check`. Raises UsageError where the output is in use or lies in the target,
    UnsupportedError (`unsupported.repair`) where the target is nothing that is written, and what
    `check` raises.
    """
    named = parse_method(method)
    ref = parse_ref(target, revision)
    require_new(output, ref.path)
    wish("auto", prompts, images, None, budget, calibration)  # before anything is opened
    settings = settle({}, device=device, rank=None, seed=seed, verify=None, offline=offline)
    options: dict[str, Any] = {
        "depth": "behaviour" if named is None else "auto",
        "prompts": prompts,
        "images": images,
        "budget": budget,
        "calibration": calibration,
        "device": device,
        "offline": offline,
        "progress": progress,
        "notify": notify,
    }
    with Session(settings, progress, notify) as session:
        ours, theirs = _sides(session, target, base, revision, base_revision)
        require_repairable(ours, full)
        part, other = _part(ours), _part(theirs)
        if named is not None:
            require_possible(named, ours.projector, part.tensors)
        chosen: list[Mended] = []
        before = check(
            target,
            base,
            revision=revision,
            base_revision=base_revision,
            seed=settings.seed,
            hear=partial(_hear, chosen) if named is None else hear,
            **options,
        )
        if named is None and strength(before) is not None and not heard(before):
            return Repair(before, None, None, None, (), "")
        try:
            mended = None if named else _mended(before, chosen)
            done = named or best(mended)  # type: ignore[arg-type]
            tensors = applied(
                done,
                None if mended is None else mended.factors,
                ours.projector,
                part.tensors,
                by_role(ours.projector, other),
            )
        except CouldNotProbe as reason:
            return Repair(before, None, None, None, (), f"{reason.reason}; {_BY_HAND}")
        if _same(tensors, part.tensors):  # whatever an audit of it would hear
            return Repair(before, done, mended, None, (), "")
        write_projector(output / PROJECTOR, tensors, _provenance(before, done, mended))
        fresh = (settings.seed + AFRESH) % (1 << 63)
        try:
            after = _after(before, ours, tensors, output, full, fresh, options)
        except BaseException:
            _remove(output)
            raise
    result = Repair(before, done, mended, after, (), _untold(before, after))
    if result.outcome == "failed":
        _remove(output)
        return result
    kept = sorted(path for path in output.rglob("*") if path.is_file())
    written = tuple(Written(path.relative_to(output).as_posix(), digest(path)) for path in kept)
    return replace(result, written=written)


def _same(tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether a change changed nothing, once it was rounded to the target's dtypes."""
    import torch

    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def _remove(output: Path) -> None:
    """None; what was written is no result."""
    (output / PROJECTOR).unlink(missing_ok=True)
    shutil.rmtree(output / MODEL, ignore_errors=True)


def _sides(
    session: Session,
    target: str,
    base: str | None,
    revision: str | None,
    base_revision: str | None,
) -> tuple[Side, Side]:
    """The projector that transformers loads, and the base's of the same kind."""
    ref = parse_ref(target, revision)
    bases = () if base is None else (parse_ref(base, base_revision),)
    source = session.source(ref)
    checkpoint, adapter = open_target(session, source, bases, {})
    found = found_in(checkpoint)
    opened, _ = open_bases(session, checkpoint, bases, {}, required=True)
    fitted = None if adapter is None else fit(adapter, found[0][1], around(found[0], opened))
    if len(opened) > 1:
        raise BaseError(
            f"names {len(opened)} bases, and a repair needs one",
            "several",
            file=source.name,
            remedy="name one with --base",
        )
    _, sides = sides_of(session, checkpoint, found, fitted, opened)
    if len(found[0][1]) > 1:
        raise UnsupportedError(
            f"has {len(found[0][1])} projectors, of which one can be repaired at a time",
            "repair",
            file=source.name,
        )
    return sides[0], counterpart(sides[0].projector, opened[0])


def _part(side: Side) -> Part:
    tensors = {name: weight.tensor for name, weight in side.load().items()}
    return Part(side.checkpoint, side.projector, tensors)


def _hear(
    chosen: list[Mended],
    target: Part,
    base: Part | None,
    asked: Asked,
    *,
    other_model: bool,
    device: torch.device,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> Evidence:
    """As `behaviour.hear.hear`; `chosen` is given what ends what was heard, by the same process."""
    part = host(target, base)
    path = part.projector.path
    if base is None or {layer.layout for layer in (*path[:1], *path[-1:])} != {"plain"}:
        return hear(
            target,
            base,
            asked,
            other_model=other_model,
            device=device,
            seed=seed,
            progress=progress,
        )
    with staged(target, base, other_model=other_model, device=device, seed=seed) as run:
        answer = sandbox.run(
            {
                **run.request,
                **questions(part, asked),
                "last": path[-1].weight,
                "last_bias": path[-1].bias,
                "matrices": [layer.weight for layer in path],
            },
            **{**run.limits, "seconds": 2 * run.limits["seconds"]},
            progress=progress,
            child=CHILD,
        )

    def part_of(name: str) -> object:
        found = answer.get(name)
        return {**found, "sandbox": answer.get("sandbox")} if isinstance(found, dict) else found

    chosen.append(told(Mended, part_of("mended")))
    return told(Evidence, part_of("evidence"))


def _mended(before: Report, chosen: Sequence[Mended]) -> Mended:
    """What the process that ran the model chose; CouldNotProbe where nothing could be chosen."""
    if before.behaviour is None:
        raise CouldNotProbe(f"behaviour was not probed ({before.not_probed})")
    if strength(before) is None:
        raise CouldNotProbe("the budget was spent before the plan was through (--budget)")
    if not chosen:
        raise CouldNotProbe("the weights of its projector are those of no linear layers")
    if not chosen[0].tried:
        raise CouldNotProbe(
            "what probes bring out is said openly of other ordinary images too, or by no probe "
            "that can be asked of another projector"
        )
    return chosen[0]


def _after(
    before: Report,
    ours: Side,
    tensors: Mapping[str, torch.Tensor],
    output: Path,
    full: bool,
    seed: int,
    options: Mapping[str, Any],
) -> Report:
    """The audit of what was written; of the whole model where it can be run."""
    assert before.base is not None
    of_hub = before.base.kind == "hub"
    place, depth = output / PROJECTOR, "behaviour" if before.behaviour is not None else "weights"
    try:
        if full or (depth == "behaviour" and not ours.alone):  # else its base's model runs it
            place = output / MODEL
            write_model(ours, tensors, place, linked=not full)
        report = check(
            str(place),
            before.base.name if of_hub else before.base.ref,
            base_revision=before.base.commit if of_hub else None,
            seed=seed,
            **{**options, "depth": depth},
        )
    except CouldNotProbe as why:
        raise UnsupportedError(
            f"no whole folder is made: {why.reason}",
            "repair",
            file=before.target.name,
            remedy="leave --full out" if full else "",
        ) from None
    finally:
        if not full:
            shutil.rmtree(output / MODEL, ignore_errors=True)
    return report


def _untold(before: Report, after: Report) -> str:
    """Why a result that was written is unverified; empty where the audits tell."""
    if before.behaviour is None:
        return f"behaviour was not probed ({before.not_probed or 'it was not asked for'})"
    if after.behaviour is None:
        return f"the result could not be run ({after.not_probed})"
    return "no hidden text was heard before, so none could be ended"


def _provenance(before: Report, method: Method, mended: Mended | None) -> dict[str, str]:
    """What the file says of itself: texts that are safe to show, and digests."""

    def who(side: Literal["target", "base"]) -> dict[str, str]:
        identity = getattr(before, side)
        return {side: identity.name, f"{side}_commit": identity.commit or ""}

    read = {f"{t.side} {t.name}": t.sha256 for t in before.tensors}
    return {
        **who("target"),
        **who("base"),
        **{f"sha256 of {name}": sha256 for name, sha256 in sorted(read.items())},
        "repaired_by": f"projaudit {__version__}",
        "method": f"{method.name}:{method.amount:g}",
        "removed": method.words,
        "seed": str(before.settings["seed"]),
        "chosen_by": "what the model said" if mended is not None else "the user",
    }
