"""What else differs from the base: the rest of the weights, other files."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from projaudit.checkpoint import Checkpoint
from projaudit.config_changes import config_changes, says
from projaudit.gguf_values import QUANTISED
from projaudit.readings import place_of
from projaudit.report import Coverage, Part, PartStatus
from projaudit.safetensors_header import TensorInfo
from projaudit.source import RepoFile, Source
from projaudit.weights import check_places

FULL_COMPARE = 256 << 20
"""Bytes of other tensors up to which every one is compared (local files)."""
_WINDOW = 16 << 10
_WINDOWS = 3
_SMALL_FILE = 16 << 20
_NAMED = 20

_VISION = {
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder",
    "audio_tower", "audio_model", "image_tower", "video_tower",
}  # fmt: skip
_GGUF_TOWERS = {"v", "a"}
_LANGUAGE = {"language_model", "lm_head", "embed_tokens", "layers", "norm", "text_model"}


def compare(
    target: Checkpoint,
    base: Checkpoint,
    *,
    audited: frozenset[str],
    audited_base: frozenset[str],
    seed: int,
) -> Coverage:
    """What is known of everything but the projector's weights, target against base.

    Files with one digest are equal at no cost. Where both sides' bytes are on this machine, the
    other tensors are compared in full (up to 256 MiB) or in random windows; elsewhere they are
    `not-looked-at`, since fetching them would mean fetching the model.
    """
    there = {
        canonical(n): t for n, t in base.readings[0].tensors.items() if t.name not in audited_base
    }
    here = {canonical(n): t for n, t in target.readings[0].tensors.items() if t.name not in audited}
    parts, gone = _parts(target.source, here, base.source, there, seed)
    if (target.readings[0].metadata is None) != (base.readings[0].metadata is None):
        # A GGUF file names, splits and rounds an encoder's tensors in ways of its own.
        how = f"{len(here)} tensors of another format than the base's were not compared"
        parts = [Part("rest of the model", "not-looked-at", how, max(len(here), 1), 0)]
        here, gone = {}, {}
    elif not here and there:
        how = "the target holds nothing but the projector"
        parts = [Part("rest of the model", "not-looked-at", how, len(there), 0)]
        gone = {}
    projector = [t for t in target.readings[0].tensors.values() if t.name in audited]
    parts.insert(
        0,
        Part("projector", "audited", "compared in full", len(projector), _bytes(projector)),
    )
    equal, differing, unknown = _files(target.source, base.source)
    return Coverage(
        parts=tuple(p for p in parts if p.tensors),
        files_equal=equal,
        files_differing=tuple(differing),
        files_unknown=tuple(unknown),
        files_added=tuple(sorted(set(target.source.files) - set(base.source.files))),
        files_removed=tuple(sorted(set(base.source.files) - set(target.source.files))),
        config_compared=says(target) is not None and says(base) is not None,
        config_changes=tuple(dict.fromkeys(config_changes(target, base))),
        tensors_added=tuple(sorted(here[n].name for n in here.keys() - there.keys())),
        tensors_removed=tuple(sorted(info.name for info in gone.values())),
    )


def compare_rest(
    source: Source, first: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], *, seed: int
) -> list[Part]:
    """What is known of the tensors of another reading against those of the first, part by part.

    Empty where they are the same bytes of the same files, and of a tensor that only the other one
    has: where it is one that both have, under a second name (tied weights).
    """
    there = {canonical(name): info for name, info in first.items()}
    here = {canonical(name): info for name, info in other.items()}
    tied = {place_of(info) for name, info in here.items() if name in there}
    here = {n: info for n, info in here.items() if n in there or place_of(info) not in tied}
    same = {n for n, info in here.items() if n in there and place_of(info) == place_of(there[n])}
    here = {name: info for name, info in here.items() if name not in same}
    there = {name: info for name, info in there.items() if name not in same}
    parts, _ = _parts(source, here, source, there, seed)
    return [part for part in parts if part.tensors]


def _parts(
    target: Source,
    here: Mapping[str, TensorInfo],
    base: Source,
    there: Mapping[str, TensorInfo],
    seed: int,
) -> tuple[list[Part], dict[str, TensorInfo]]:
    """What is known of each part of the target's tensors, and what only the base has."""
    free = _at_hand(target, here) and _at_hand(base, there)
    whole = _bytes(list(here.values())) <= FULL_COMPARE
    if free:
        for source, infos in ((target, here), (base, there)):
            check_places(source, infos.values())
    rng = random.Random(seed)  # noqa: S311 - which windows are read, no secret
    states = {
        name: _tensor_state(target, base, info, there[name], free, whole, rng)
        for name, info in here.items()
        if name in there
    }
    gone = {name: info for name, info in there.items() if name not in here}
    names = ("vision tower", "language model", "other")
    return [_part(name, here, gone, states) for name in names], gone


def canonical(name: str) -> str:
    """A tensor name without what loader generations moved: `model.` segments, where lm_head is."""
    parts = [part for part in name.split(".") if part != "model"]
    if parts[:2] == ["language_model", "lm_head"]:
        parts = parts[1:]
    return ".".join(parts)


def _bytes(infos: Sequence[TensorInfo]) -> int:
    return sum(info.stop - info.start for info in infos)


def _at_hand(source: Source, tensors: Mapping[str, TensorInfo]) -> bool:
    return all(source.at_hand(path) for path in {info.file for info in tensors.values()})


def _part_of(name: str) -> str:
    segments = name.split(".")
    if any(s in _VISION for s in segments[:3]) or segments[0] in _GGUF_TOWERS:
        return "vision tower"
    if any(s in _LANGUAGE for s in segments[:2]):
        return "language model"
    return "other"


def _tensor_state(
    target: Source,
    base: Source,
    info: TensorInfo,
    other: TensorInfo,
    free: bool,
    whole: bool,
    rng: random.Random,
) -> PartStatus:
    dtypes = {info.dtype, other.dtype}
    if info.shape == other.shape and len(dtypes) > 1 and dtypes & QUANTISED:
        return "not-looked-at"
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return "differs"
    digest = target.files[info.file].sha256
    same_place = (info.start, info.strides) == (other.start, other.strides)
    if digest is not None and digest == base.files[other.file].sha256 and same_place:
        return "equal"
    if not free or info.strides is not None or other.strides is not None:
        return "not-looked-at"
    length = info.stop - info.start
    for start, stop in _windows(length, whole, rng):
        ours = target.read(info.file, info.start + start, info.start + stop)
        if ours != base.read(other.file, other.start + start, other.start + stop):
            return "differs"
    return "equal" if whole or length <= _WINDOW * _WINDOWS else "sampled-equal"


def _windows(length: int, whole: bool, rng: random.Random) -> Iterator[tuple[int, int]]:
    if whole or length <= _WINDOW * _WINDOWS:
        step = 8 << 20
        yield from ((at, min(at + step, length)) for at in range(0, length, step))
        return
    for _ in range(_WINDOWS):
        start = rng.randrange(length - _WINDOW)
        yield start, start + _WINDOW


def _part(
    part: str,
    here: Mapping[str, TensorInfo],
    gone: Mapping[str, TensorInfo],
    states: Mapping[str, PartStatus],
) -> Part:
    names = [n for n in here if _part_of(n) == part]
    found = [states[n] for n in names if n in states]
    changed = sorted(here[n].name for n in names if states.get(n) == "differs")
    new = sorted(here[n].name for n in names if n not in states)
    missing = sorted(info.name for n, info in gone.items() if _part_of(n) == part)
    unseen = found.count("not-looked-at")
    differing = [*changed, *new, *missing]
    status: PartStatus
    if differing:
        status = "differs"
        counts = {"differ": changed, "are new": new, "are missing": missing}
        listed = ", ".join(f"{len(which)} {verb}" for verb, which in counts.items() if which)
        how = f"of {len(names)} tensors {listed}"
    elif unseen:
        status, how = "not-looked-at", f"{unseen} of {len(names)} tensors were not read"
    elif "sampled-equal" in found:
        status = "sampled-equal"
        how = f"{_WINDOWS} random windows of {_WINDOW >> 10} KiB per tensor are equal"
    else:
        status, how = "equal", "same digest or same bytes throughout"
    return Part(
        name=part if part != "other" else "other tensors",
        status=status,
        how=how,
        tensors=len(names) + len(missing),
        bytes=_bytes([here[n] for n in names]),
        differing=tuple(differing[:_NAMED]),
    )


def changed_by(coverage: Coverage, adapter: Sequence[TensorInfo]) -> Coverage:
    """The coverage of a model whose rest those tensors of an adapter change."""
    groups: dict[str, list[TensorInfo]] = {}
    for info in adapter:
        part = _part_of(canonical(info.name.removeprefix("base_model.model.")))
        groups.setdefault(part if part != "other" else "other tensors", []).append(info)
    parts = {part.name: part for part in coverage.parts}
    for name, infos in groups.items():
        known = parts.get(name, Part(name, "differs", "", 0, 0))
        how = f"{len(infos)} tensors of the adapter change it"
        parts[name] = replace(
            known,
            status="differs",
            how=f"{how}; {known.how}" if known.status == "differs" and known.how else how,
            tensors=known.tensors or len(infos),
            bytes=known.bytes or _bytes(infos),
            differing=(*sorted(info.name for info in infos), *known.differing)[:_NAMED],
        )
    return replace(coverage, parts=tuple(parts.values()))


def _files(target: Source, base: Source) -> tuple[int, list[str], list[str]]:
    """(equal, differing, not known) among the files that both have."""
    equal, differing, unknown = 0, [], []
    for path in sorted(target.files.keys() & base.files.keys()):
        ours, theirs = target.files[path], base.files[path]
        if ours.size != theirs.size:
            differing.append(path)
            continue
        same = _same_file(target, ours, base, theirs)
        if same is None:
            unknown.append(path)
        elif same:
            equal += 1
        else:
            differing.append(path)
    return equal, differing, unknown


def _same_file(target: Source, ours: RepoFile, base: Source, theirs: RepoFile) -> bool | None:
    if ours.sha256 is not None and theirs.sha256 is not None:
        return ours.sha256 == theirs.sha256
    if ours.oid is not None and theirs.oid is not None:
        return ours.oid == theirs.oid
    if ours.size > _SMALL_FILE:
        return None
    digests = []
    for source, file, other in ((target, ours, theirs), (base, theirs, ours)):
        known = file.sha256 if other.sha256 or not other.oid else file.oid
        if known is not None:
            digests.append(known)
        elif source.at_hand(file.path):
            data = source.read(file.path, 0, file.size)
            git = other.oid and not other.sha256
            digests.append(_git_oid(data) if git else hashlib.sha256(data).hexdigest())
        else:
            return None
    return digests[0] == digests[1]


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\x00" % len(data) + data, usedforsecurity=False).hexdigest()
