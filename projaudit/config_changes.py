"""What configs say otherwise than the base's, and what code of a repository they name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from projaudit.checkpoint import Checkpoint
from projaudit.clip_keys import changed_from_config, changed_keys
from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.source import Source
from projaudit.strict import load_json

LARGEST = 16 << 20
"""Bytes of a config that is read."""

# What a key is where config.json does not say; None: absent is not the same as any value.
_CONFIG: Mapping[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "projector_layernorm_eps": 1e-5,
    "vision_feature_layer": -2,
    "vision_feature_layers": None,
    "vision_feature_select_strategy": "default",
    "image_grid_pinpoints": None,
    "mm_projector_type": None,
    "mm_vision_select_layer": None,
    "mm_vision_select_feature": None,
    "mm_patch_merge_type": None,
    "mm_use_im_start_end": None,
    "mm_use_im_patch_token": None,
}
# Of these a config may leave out any, and what they are then depends on the tower's class.
_TOWER: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "image_size": 224,
        "layer_norm_eps": 1e-5,
        "num_hidden_layers": 12,
        "patch_size": 32,
    },
    "siglip_vision_model": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 768,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
        "num_hidden_layers": 12,
        "patch_size": 16,
    },
}
_PREPROCESSOR = (
    "image_processor_type",
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
_PROCESSOR = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
_MAPPED = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def says(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What says what a loader makes of the weights: the GGUF file itself, else config.json."""
    metadata = checkpoint.readings[0].metadata
    return checkpoint.config if metadata is None else metadata


def config_changes(target: Checkpoint, base: Checkpoint) -> Iterator[str]:
    """What the target's config or GGUF keys say otherwise than the base's; a line each."""
    for reading in target.readings:
        if reading.metadata is None:
            continue
        theirs = base.readings[0].metadata
        if theirs is not None:
            yield from changed_keys(reading.metadata, theirs)
        else:
            images = _image_processor(base.source) or {}
            yield from changed_from_config(reading.metadata, base.config or {}, images)
    if target.readings[0].metadata is None and base.readings[0].metadata is not None:
        images = _image_processor(target.source) or {}
        yield from changed_from_config(base.readings[0].metadata, target.config or {}, images)
    if target.readings[0].metadata is None and base.readings[0].metadata is None:
        yield from _changed_configs(target, base)


def adapter_config_changes(adapter: Source, base: Checkpoint) -> tuple[str, ...]:
    """What an adapter's own config.json says otherwise than the base's, where both are of one
    model type: loaders of original LLaVA take the adapter's."""
    config = _json(adapter, "config.json")
    if not config or config.get("model_type") != (base.config or {}).get("model_type"):
        return ()
    own = replace(base, config=config)
    return tuple(dict.fromkeys(_changed_configs(own, base)))


def _changed_configs(target: Checkpoint, base: Checkpoint) -> Iterator[str]:
    ours, theirs = target.config, base.config
    if ours is not None and theirs is not None:
        yield from _changed_keys("", ours, theirs, _CONFIG)
        yield from _changed_keys("", _token(ours), _token(theirs), {"image_token_index": 32000})
        towers = [_mapping(config.get("vision_config")) for config in (ours, theirs)]
        kinds = [str(tower.get("model_type", "")) for tower in towers]
        if kinds[0] != kinds[1] and all(kinds):
            yield f"vision_config.model_type: {clean(kinds[1], 60)} → {clean(kinds[0], 60)}"
        known = dict.fromkeys(_TOWER["clip_vision_model"]) | dict(
            _TOWER.get(kinds[0] or kinds[1], {})
        )
        yield from _changed_keys("vision_config.", towers[0], towers[1], known)
    # A target that brings nothing but weights is fed by whatever the base brings.
    files = [
        [read(side.source) for side in (target, base)] for read in (_image_processor, _processor)
    ]
    for label, (mine, other), keys in zip(
        ("preprocessor: ", "processor: "), files, (_PREPROCESSOR, _PROCESSOR), strict=True
    ):
        if mine is not None or other is not None:
            yield from _changed_keys(label, mine or {}, other or {}, dict.fromkeys(keys))


def _token(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The placeholder's token id, under either of its two names."""
    return {"image_token_index": config.get("image_token_index", config.get("image_token_id"))}


def _image_processor(source: Source) -> Mapping[str, Any] | None:
    """What images are prepared with: the processor's own part wins, as in transformers 5."""
    nested = _mapping(_json(source, "processor_config.json").get("image_processor"))
    return nested or _json(source, "preprocessor_config.json") or None


def _processor(source: Source) -> Mapping[str, Any] | None:
    return _json(source, "processor_config.json") or None


def _json(source: Source, path: str) -> Mapping[str, Any]:
    """The object in a JSON file of the repository, empty where there is no such file."""
    if path not in source.files:
        return {}
    found = load_json(source.read_small(path, LARGEST), file=path)
    if not isinstance(found, dict):
        raise FormatError("is no JSON object", "config", file=path)
    return found


def code_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Python files and `auto_map` entries of the repository: what remote code would run."""
    files = sorted(path for path in checkpoint.source.files if path.endswith(".py"))
    configs = [("config.json", checkpoint.config or {})]
    configs += [(path, _json(checkpoint.source, path)) for path in _MAPPED]
    mapped = [f"{path}: {where}" for path, config in configs for where in _auto_maps(config)]
    return (*mapped, *files)


def _auto_maps(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in config.items():
        if key == "auto_map" and value:
            yield f"{path}auto_map"
        elif isinstance(value, Mapping):
            yield from _auto_maps(value, f"{path}{key}.")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _changed_keys(
    where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], keys: Mapping[str, Any]
) -> Iterator[str]:
    for key, default in keys.items():
        new, old = (default if side.get(key) is None else side[key] for side in (ours, theirs))
        if new != old:
            yield f"{where}{key}: {_shown(old)} → {_shown(new)}"


def _shown(value: object) -> str:
    return "absent" if value is None else clean(json.dumps(value), 60)
