"""What else differs from the base: the rest of the weights, other files, config keys."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from projaudit.checkpoint import Checkpoint
from projaudit.inert import clean
from projaudit.report import Coverage, Part, PartStatus
from projaudit.safetensors_header import TensorInfo
from projaudit.source import RepoFile, Source
from projaudit.strict import load_json

FULL_COMPARE = 256 << 20
"""Bytes of other tensors up to which every one is compared (local files)."""
_WINDOW = 16 << 10
_WINDOWS = 3
_SMALL_FILE = 16 << 20
_NAMED = 20

# What a key is where config.json does not say; a key absent on one side is otherwise no change.
_CONFIG: Mapping[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "projector_layernorm_eps": 1e-5,
    "vision_feature_layer": -2,
    "vision_feature_layers": None,
    "vision_feature_select_strategy": "default",
    "image_token_index": None,
    "image_token_id": None,
    "image_seq_length": None,
    "image_grid_pinpoints": None,
    "mm_projector_type": None,
    "mm_vision_select_layer": None,
    "mm_vision_select_feature": None,
    "mm_patch_merge_type": None,
    "mm_use_im_start_end": None,
    "mm_use_im_patch_token": None,
    "vision_config.model_type": None,
    "vision_config.hidden_act": None,
    "vision_config.hidden_size": None,
    "vision_config.image_size": None,
    "vision_config.patch_size": None,
    "vision_config.layer_norm_eps": None,
    "vision_config.num_hidden_layers": None,
}
_PREPROCESSOR: Mapping[str, Any] = dict.fromkeys(
    (
        "image_mean",
        "image_std",
        "do_normalize",
        "do_rescale",
        "rescale_factor",
        "do_resize",
        "resample",
        "size",
        "do_center_crop",
        "crop_size",
        "do_convert_rgb",
        "image_aspect_ratio",
        "image_grid_pinpoints",
    )
)
_VISION = {
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder",
    "audio_tower", "audio_model", "image_tower", "video_tower",
}  # fmt: skip
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
    there = {canonical(n): t for n, t in base.readings[0].tensors.items() if n not in audited_base}
    here = {canonical(n): t for n, t in target.readings[0].tensors.items() if n not in audited}
    free = _at_hand(target.source, here) and _at_hand(base.source, there)
    whole = _bytes(list(here.values())) <= FULL_COMPARE
    rng = random.Random(seed)  # noqa: S311 - which windows are read, no secret
    states = {
        name: _tensor_state(target.source, base.source, info, there[name], free, whole, rng)
        for name, info in here.items()
        if name in there
    }
    parts = [_part(part, here, states) for part in ("vision tower", "language model", "other")]
    if not here and there:
        how = "the target holds nothing but the projector"
        parts = [Part("rest of the model", "not-looked-at", how, len(there), 0)]
        there = {}
    projector = [t for n, t in target.readings[0].tensors.items() if n in audited]
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
        config_compared=target.config is not None and base.config is not None,
        config_changes=tuple(_config_changes(target, base)),
        tensors_added=tuple(sorted(here[n].name for n in here.keys() - there.keys())),
        tensors_removed=tuple(sorted(there[n].name for n in there.keys() - here.keys())),
    )


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
    if any(s in _VISION for s in segments[:3]):
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
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return "differs"
    digest = target.files[info.file].sha256
    same_place = info.start == other.start
    if digest is not None and digest == base.files[other.file].sha256 and same_place:
        return "equal"
    if not free:
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


def _part(part: str, here: Mapping[str, TensorInfo], states: Mapping[str, PartStatus]) -> Part:
    names = [n for n in here if _part_of(n) == part]
    found = [states[n] for n in names if n in states]
    differing = sorted(here[n].name for n in names if states.get(n) == "differs")
    unseen = found.count("not-looked-at")
    new = len(names) - len(found)
    status: PartStatus
    if differing:
        status, how = "differs", f"{len(differing)} of {len(names)} tensors differ"
    elif new:
        status, how = "differs", f"{new} of {len(names)} tensors are not in the base"
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
        tensors=len(names),
        bytes=_bytes([here[n] for n in names]),
        differing=tuple(differing[:_NAMED]),
    )


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


def _config_changes(target: Checkpoint, base: Checkpoint) -> Iterator[str]:
    yield from _changed_keys("", target.config, base.config, _CONFIG)
    ours, theirs = (_preprocessor(side.source) for side in (target, base))
    yield from _changed_keys("preprocessor: ", ours, theirs, _PREPROCESSOR)


def _preprocessor(source: Source) -> Mapping[str, Any] | None:
    places = (("preprocessor_config.json", ""), ("processor_config.json", "image_processor"))
    for path, key in places:
        if path in source.files:
            found = load_json(source.read_small(path, _SMALL_FILE), file=path)
            inner = found.get(key) if key and isinstance(found, dict) else found
            if isinstance(inner, dict):
                return inner
    return None


def _changed_keys(
    where: str,
    ours: Mapping[str, Any] | None,
    theirs: Mapping[str, Any] | None,
    keys: Mapping[str, Any],
) -> Iterator[str]:
    if ours is None or theirs is None:
        return
    for key, default in keys.items():
        new, old = (_look_up(side, key, default) for side in (ours, theirs))
        if new is not None and old is not None and new != old:
            yield f"{where}{key}: {clean(old, 60)} → {clean(new, 60)}"


def _look_up(config: Mapping[str, Any], dotted: str, default: Any) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else value
