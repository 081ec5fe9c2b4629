"""Which projectors are measured: those of every reading that is another, and of the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from projaudit.adapters import Applied, Fit, apply, fit
from projaudit.base import named_by_adapter
from projaudit.checkpoint import Checkpoint
from projaudit.coverage import compare_rest
from projaudit.errors import FormatError, NothingError, ProjauditError, UnsupportedError
from projaudit.inert import clean
from projaudit.opened import (
    Base,
    Found,
    is_pickled,
    name_of,
    open_base,
    projectors_of,
    stored_names,
)
from projaudit.peft_config import Adapter
from projaudit.projector import Projector
from projaudit.quantised_config import rewrites
from projaudit.readings import Reading, parameter, place_of
from projaudit.session import Session
from projaudit.source import Source
from projaudit.weight_files import Ambiguity
from projaudit.weights import Weight, load_weights


@dataclass(frozen=True)
class Side:
    """A projector and the reading of the checkpoint that it was found in."""

    checkpoint: Checkpoint
    reading: Reading
    projector: Projector
    name: str
    """Of the repository, with its commit where there is one."""
    fit: Fit | None = None
    """Of the adapter that is merged into what the checkpoint holds."""

    @property
    def source(self) -> Source:
        """Where its bytes are."""
        return self.checkpoint.source

    @property
    def alone(self) -> bool:
        """Whether its files hold no more of a model than it."""
        ours = {*self.projector.tensors, *self.projector.unexpected}
        return ours.issuperset(self.reading.shapes)

    def load(self) -> Mapping[str, Weight]:
        """Its weights by name, with the adapter merged into them where there is one."""
        return self.applied().weights

    def applied(self) -> Applied:
        """Its weights, and what an adapter has brought to them."""
        weights = load_weights(self.source, self.reading, self.projector.tensors)
        return Applied(weights) if self.fit is None else apply(self.fit, weights)


def settled(target: Checkpoint, found: Sequence[Found]) -> Checkpoint:
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


def noted(target: Checkpoint, fitted: Fit | None) -> Checkpoint:
    """The target with what its adapter does in place of `not read`.

    Raises NothingError where an adapter alone changes no projector.
    """
    if fitted is None:
        return target
    names = [name for p in projectors_of(target.readings[0], target) for name in p.tensors]
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


def sides_of(
    session: Session,
    target: Checkpoint,
    found: Sequence[Found],
    fitted: Fit | None,
    bases: Sequence[Base],
) -> tuple[Checkpoint, list[Side]]:
    """Every projector of every reading, but for readings that take the very bytes of the first.

    An adapter is a reading of its own, of the projectors that it changes; alone, the only one.
    The target comes back with what that says of its ambiguities: which pickles hold the same
    projector and rest, which hold others or none that compares, and whose tensors share memory.
    """

    def places(reading: Reading, projectors: Sequence[Projector]) -> set[tuple[object, ...]]:
        names = [name for projector in projectors for name in projector.tensors]
        return {(parameter(i.name), *place_of(i)) for name in names for i in reading.parts(name)}

    first = places(*found[0])
    sides: list[Side] = []
    notes = list(target.ambiguities)
    at = -1
    for number, (reading, projectors) in enumerate(found):
        new = [Side(target, reading, projector, name_of(target.origin)) for projector in projectors]
        same = number > 0 and places(reading, projectors) <= first
        if number and is_pickled(reading):
            # Readings and their notes come in one order; two cut names may read the same.
            at = next(i for i, n in enumerate(notes) if i > at and n.message == reading.why)
            alike = (same or _alike(new, sides[: len(found[0][1])])) if new else None
            if alike is None:
                says = f"{reading.why}; not compared, as it holds no projector of that form"
                notes[at] = replace(notes[at], message=says)
                continue
            if alike:
                notes[at] = _repeated(notes[at], target, found[0], found[number], session)
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
    if target.adapter is not None:
        return target, adapted
    more, unread = _on_named_base(session, target, fitted.adapter, bases)
    if unread:
        note = Ambiguity("adapter-beside", clean(unread, 300), ("adapter_config.json",))
        target = replace(target, ambiguities=(*target.ambiguities, note))
    return target, [*sides, *adapted, *more]


def _repeated(
    note: Ambiguity, target: Checkpoint, first: Found, other: Found, session: Session
) -> Ambiguity:
    """What there is to say of a pickle with the first reading's projector: of the rest in it."""
    ours, theirs = (
        {name: info for name, info in reading.tensors.items() if info.name not in audited}
        for reading, audited in ((found[0], stored_names(found)) for found in (first, other))
    )
    try:
        parts = compare_rest(target.source, ours, theirs, seed=session.settings.seed)
    except FormatError as error:
        return replace(note, message=f"{note.message}; the same projector; of the rest: {error}")
    file = clean(note.files[0], 80)
    if differing := [f"{part.name}: {part.how}" for part in parts if part.status == "differs"]:
        return replace(note, message=f"{file}: the same projector, another {', '.join(differing)}")
    rest = "holds the same rest of the model, too" if parts else "holds nothing else"
    if any(part.status == "not-looked-at" for part in parts):
        rest = "holds a rest of the model that was not compared"
    elif any(part.status == "sampled-equal" for part in parts):
        rest = "holds the same rest of the model where it was sampled"
    return replace(note, kind="equal-pickle", message=f"{file} {rest}")


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


def _otherwise(ours: Sequence[Side], first: Sequence[Side]) -> list[Ambiguity]:
    """What there is to say where a second GGUF file is no rounding of the first's projector."""
    from projaudit.rounding import rounding

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


def _adapted(target: Checkpoint, first: Found, fitted: Fit) -> list[Side]:
    """The projectors that an adapter changes, with it merged into them."""
    on = "the weights beside it" if target.adapter is None else name_of(target.source)
    files = " and ".join(fitted.files or (fitted.adapter.file,))
    why = f"{files} ({clean(fitted.adapter.method, 20)}), merged into {on}"
    reading = replace(first[0], label="adapter", why=why)
    return [
        Side(target, reading, projector, name_of(target.origin), fitted)
        for projector in first[1]
        if fitted.changes(projector.tensors)
    ]


def _on_named_base(
    session: Session, target: Checkpoint, adapter: Adapter, bases: Sequence[Base]
) -> tuple[list[Side], str]:
    """The adapter on the base that it names, which transformers loads in place of the weights
    beside it: from a Hub, and from a folder without config.json. Or why that cannot be read."""
    source = target.source
    named = named_by_adapter(adapter.config)
    if (source.ref.kind != "hub" and "config.json" in source.files) or named is None:
        return [], ""
    repo, revision = str(named.ref.repo), named.ref.revision
    compared = next(
        (
            base
            for base in bases
            if base.asked.lower() == repo.lower()
            and revision in (None, base.checkpoint.source.commit)
        ),
        None,
    )
    try:
        base = compared or open_base(session, named)
    except ProjauditError as error:
        return [], f"{repo}, on which transformers puts the adapter, was not read: {error}"
    reading = base.checkpoint.readings[0]
    fitted = fit(adapter, base.projectors, reading.shapes)
    why = f"{name_of(base.checkpoint.source)}, which the adapter names, and the adapter"
    sides = [
        Side(
            replace(base.checkpoint, adapter=source),
            replace(reading, label="adapter-on-base", why=why),
            projector,
            name_of(source),
            fitted if fitted.changes(projector.tensors) else None,
        )
        for projector in base.projectors
        # One that it leaves alone is the base's own: loaded in place of the target's all the same.
        if fitted.changes(projector.tensors) or compared is None
    ]
    return sides, ""
