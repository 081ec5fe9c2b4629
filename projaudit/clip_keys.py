"""What a GGUF file's `clip.*` keys say otherwise than its base: what its projector is fed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from projaudit.inert import clean

# Key of the file -> key of the base's config.json.
_NUMBERS = {
    "clip.vision.image_size": "vision_config.image_size",
    "clip.vision.patch_size": "vision_config.patch_size",
    "clip.vision.embedding_length": "vision_config.hidden_size",
    "clip.vision.attention.head_count": "vision_config.num_attention_heads",
    "clip.vision.attention.layer_norm_epsilon": "vision_config.layer_norm_eps",
    "clip.vision.spatial_merge_size": "vision_config.spatial_merge_size",
    "clip.audio.embedding_length": "audio_config.d_model",
    "clip.audio.num_mel_bins": "audio_config.num_mel_bins",
}
_IMAGES = {"clip.vision.image_mean": "image_mean", "clip.vision.image_std": "image_std"}
_TOWER_ACTS = {"clip.use_gelu": "gelu", "clip.use_silu": "silu"}


def changed_keys(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    """Every `clip.*` key by which two GGUF files differ, as `key: theirs → ours`."""
    for key in sorted(ours.keys() | theirs.keys()):
        if key.startswith("clip.") and ours.get(key) != theirs.get(key):
            yield _line(key, theirs.get(key), ours.get(key))


def changed_from_config(
    said: Mapping[str, str], config: Mapping[str, Any], images: Mapping[str, Any]
) -> Iterator[str]:
    """The `clip.*` keys that contradict a config.json and what prepares images, where both speak.

    The activation that is compared is the encoder's; the projector's is a step of its chain.
    """
    for key, other in _NUMBERS.items():
        yield from _contradiction(key, said.get(key), _get(config, other))
    for key, other in _IMAGES.items():
        yield from _contradiction(key, said.get(key), images.get(other))
    act = _get(config, "vision_config.hidden_act")
    for key, named in _TOWER_ACTS.items():
        if said.get(key) == "true" and isinstance(act, str) and not act.startswith(named):
            yield _line(key, act, named)


def _contradiction(key: str, said: str | None, other: object) -> Iterator[str]:
    theirs = _numbers(other if isinstance(other, list) else [other])
    ours = _numbers(said.split(",")) if said is not None else None
    if ours is None or theirs is None:
        return
    # The file holds float32.
    close = [math.isclose(a, b, rel_tol=1e-6) for a, b in zip(ours, theirs, strict=False)]
    if len(ours) != len(theirs) or not all(close):
        yield _line(key, other, said)


def _numbers(values: list[Any]) -> list[float] | None:
    """The values as numbers; None where one is none."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    part, _, key = dotted.partition(".")
    inner = config.get(part)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _line(key: str, old: object, new: object) -> str:
    return f"{clean(key, 60)}: {clean(old, 60)} → {clean(new, 60)}"
