"""The target and its bases, opened: their weights, and the projectors in each reading of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from projaudit.base import Candidate, candidates, lineage
from projaudit.checkpoint import Checkpoint, open_checkpoint
from projaudit.errors import (
    BaseError,
    FormatError,
    NothingError,
    ProjauditError,
    UnsupportedError,
)
from projaudit.inert import clean
from projaudit.locating import locate
from projaudit.mmproj import locate_mmproj
from projaudit.peft_config import NON_LORA, Adapter, not_read, read_adapter
from projaudit.projector import Projector, require_readable
from projaudit.readings import Reading
from projaudit.refs import Ref
from projaudit.report import Identity, Provenance
from projaudit.session import Session
from projaudit.source import Source
from projaudit.weight_files import Ambiguity, is_pickle

Found = tuple[Reading, tuple[Projector, ...]]
"""A reading, and the projectors in it."""


@dataclass(frozen=True)
class Base:
    """A base that was opened: the first of its lineage that has a projector."""

    asked: str
    """Repository that was asked for, before any rename."""
    checkpoint: Checkpoint
    """Its first reading is the one with the projectors: a GGUF file's beside a text model's."""
    projectors: tuple[Projector, ...]
    provenance: Provenance
    circular: bool


def open_target(
    session: Session, source: Source, base: Sequence[Ref], pins: Mapping[str, str]
) -> tuple[Checkpoint, Adapter | None]:
    """The target's weights, and its adapter; of an adapter alone the weights of its base.

    An adapter is alone where nothing else in its repository holds a projector, but for what LLaVA's
    training writes beside it (`peft_config.NON_LORA`). Raises what opening raises, and BaseError
    where that is all there is of a projector.
    """
    try:
        adapter, unread = read_adapter(source), not_read(source)
    except UnsupportedError as error:
        adapter, unread = None, error
    own: Checkpoint | None = None
    try:
        own = open_checkpoint(source)
    except (NothingError, UnsupportedError) as error:
        if adapter is None:
            raise unread if error.code == "unsupported.adapter" else error from None
    if own is not None and (adapter is None or _brings_projector(own)):
        return own, adapter
    assert adapter is not None
    try:
        named = candidates(source, None, option=base, pins=pins)[0]
    except BaseError:
        if own is None or NON_LORA in source.files:
            raise
        return own, adapter
    whole = open_checkpoint(session.source(named.ref))
    if NON_LORA in source.files and not projectors_of(whole.readings[0], whole):
        raise _no_base_projector(whole.source)
    notes = _beside(source, adapter)[:20]
    return replace(
        whole, readings=whole.readings[:1], ambiguities=tuple(notes), adapter=source
    ), adapter


def _brings_projector(own: Checkpoint) -> bool:
    """Whether weights beside an adapter hold a projector other than that of LLaVA's training."""
    for reading in own.readings:
        infos = {info.file for info in reading.tensors.values()}
        if infos != {NON_LORA} and any(
            info.file != NON_LORA
            for projector in _others(reading, own)
            for name in projector.tensors
            for info in reading.parts(name)
        ):
            return True
    return False


def _beside(source: Source, adapter: Adapter) -> list[Ambiguity]:
    """The weights in an adapter's repository that are no part of it."""
    says = "weights beside the adapter, which are taken where they are asked for; not read"
    return [
        Ambiguity("adapter-beside", f"{clean(path, 80)}: {says}", (path,))
        for path in source.files
        if path not in (adapter.file, NON_LORA)
        and (
            path.startswith("adapter_model.")
            or path.endswith((".safetensors", ".gguf"))
            or ("/" not in path and is_pickle(path))
        )
    ]


def found_in(target: Checkpoint) -> list[Found]:
    """The projectors of every reading; first of the first that has any, which is audited first.

    Raises NothingError (`nothing.projector`) where there is none, and what locating raises in the
    first reading; another whose projector cannot be read has none.
    """
    found = [(target.readings[0], projectors_of(target.readings[0], target))]
    found += [(reading, _others(reading, target)) for reading in target.readings[1:]]
    first = next((i for i, pair in enumerate(found) if pair[1] and _counts(i, pair[0])), None)
    if first is None:
        raise _no_projector(target)
    return [found.pop(first), *found]


def _counts(number: int, reading: Reading) -> bool:
    """Whether a reading may be what is audited first: a projector may lie in a GGUF file alone."""
    return number == 0 or reading.metadata is not None


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


def projectors_of(reading: Reading, checkpoint: Checkpoint) -> tuple[Projector, ...]:
    """The projectors of a reading, all of them readable; none where there is none.

    Raises what locating them and `require_readable` raise, with the checkpoint's name.
    """
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
    """The projectors of a reading besides the first; none where they are incomplete or cannot be
    read and the reading is an ambiguity, which GGUF files of one model are not."""
    try:
        return projectors_of(reading, target)
    except (FormatError, UnsupportedError):
        if reading.metadata is None:
            return ()
        raise


def around(found: Found, bases: Sequence[Base]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model with the projectors found: where these are all there is, its base's.

    As of LLaVA's mm_projector.bin, beside which an adapter changes layers of the base.
    """
    shapes = found[0].shapes
    if bases and {name for p in found[1] for name in p.tensors}.issuperset(shapes):
        return {**bases[0].checkpoint.readings[0].shapes, **shapes}
    return shapes


def is_pickled(reading: Reading) -> bool:
    """Whether a reading is of a pickle beside the weights."""
    return reading.label.startswith("pickle-beside")


def stored_names(found: Found) -> frozenset[str]:
    """The stored tensors that the projectors of a reading are made of."""
    reading, projectors = found
    names = [name for projector in projectors for name in projector.tensors]
    return frozenset(info.name for name in names for info in reading.parts(name))


def open_bases(
    session: Session,
    target: Checkpoint,
    option: Sequence[Ref],
    pins: Mapping[str, str],
    *,
    required: bool,
) -> tuple[list[Base], str]:
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
        return [open_base(session, candidate) for candidate in named], ""


def open_base(session: Session, candidate: Candidate) -> Base:
    """The first of a candidate's lineage that has a projector.

    Raises BaseError (`base.no-projector`) where none has, and what opening raises.
    """
    first = session.source(candidate.ref)
    chain, circular = lineage(first, session.source)
    provenance = replace(
        candidate.provenance, lineage=tuple(identity(source).name for source in chain)
    )
    for source in chain:
        try:
            checkpoint = open_checkpoint(source)
        except NothingError:
            continue
        checkpoint, projectors = _first_with_projectors(checkpoint)
        if projectors:
            asked = source.name if candidate.ref.repo is None or source is not first else None
            return Base(
                asked or str(candidate.ref.repo), checkpoint, projectors, provenance, circular
            )
    raise _no_base_projector(first, ", nor has any base of it" if len(chain) > 1 else "")


def _first_with_projectors(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[Projector, ...]]:
    """A base's projectors, and the base with their reading as its first."""
    for number, reading in enumerate(checkpoint.readings):
        if _counts(number, reading) and (found := projectors_of(reading, checkpoint)):
            others = (other for other in checkpoint.readings if other is not reading)
            return replace(checkpoint, readings=(reading, *others)), found
    return checkpoint, ()


def _no_base_projector(source: Source, more: str = "") -> BaseError:
    return BaseError(
        f"has no projector{more}",
        "no-projector",
        file=clean(source.name),
        remedy="name the multimodal model that this one was made from with --base",
    )


def identity(source: Source) -> Identity:
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


def name_of(source: Source) -> str:
    """The name of a repository, with its commit where there is one."""
    name = identity(source).name
    return f"{name}@{source.commit}" if source.commit else name
