"""Every multimodal class of the installed transformers, built with no weights: what is located."""

from __future__ import annotations

import gzip
import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from projaudit import ProjauditError, locate
from projaudit.family import classes_of, families
from projaudit.readings import parameter

DATA = Path(__file__).parent / "data"
MAPPINGS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ")

# What a release of transformers cannot build from its own default config, and with what it can.
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WITH: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": VISION, "text_config": {"model_type": "cohere2", **TEXT}},
    "cohere_compass": {
        "text_config": {
            "layer_types": ["full_attention"] * 40,
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
        }
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * 40}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    },
    "granite4_vision": {
        "vision_config": VISION, "downsample_rate": "1/2", "deepstack_layer_map": [(0, 0), (1, 1)],
    },
    "hunyuan_vl": {"text_config": TEXT},
    "qwen3_omni_moe": {
        "enable_audio_output": False,
        "thinker_config": {"vision_config": {"deepstack_visual_indexes": [0]}},
    },
}  # fmt: skip
# Not built at all: in need of timm, or of configs whose defaults contradict each other.
UNBUILT = {
    "chameleon",
    "emu3",
    "fast_vlm",
    "gemma3n",
    "moonshine_streaming",
    "perception_lm",
    "qwen4_exp",
}
# Of one model, or of sound whose decoder attends to the encoder: nothing stands between two models.
NO_PROJECTOR = {
    "dia",
    "mistral4",
    "moonshine",
    "moonshine_streaming",
    "pop2piano",
    "seamless_m4t_v2",
    "speech_to_text",
    "speecht5",
}
# Not in the data: the modules that their classes build between the encoder and the language model.
MODULES = {
    "cohere2_vision": "multi_modal_projector.",
    "diffusion_gemma": "encoder.embed_vision.",
    "fast_vlm": "multi_modal_projector.",
    "fuyu": "vision_embed_tokens.",
    "inkling2": ("vision_tower.merger.", "visual.proj_"),
    "paddleocr_vl": ("projector.", "mlp_AR."),
    "qwen3_omni_moe": ("audio_tower.proj", "visual.merger"),
    "voxtral_realtime": "multi_modal_projector.",
}
# Debatable by the data's own word, and not located as it says: the last layer of an encoder that
# has no projector behind it, and an adapter within a speech encoder.
DEBATABLE = {"inkling_mm_model", "seamless_m4t", "seamless_m4t_v2"}


def test_model_types_stand_for_the_classes_that_transformers_builds() -> None:
    """What is missing in model_types.yaml is what a release of transformers has brought."""
    listed = {name for family in families() for name in family.architectures}
    built: dict[str, set[str]] = {}
    for kind, name in classes():
        if name in listed:
            built.setdefault(kind, set()).add(name)
    for kind, names in built.items():
        assert set(classes_of({"model_type": kind})) == names, kind


def classes() -> list[tuple[str, str]]:
    found = set()
    for mapping in MAPPINGS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type, name in names.items():
            found |= {(model_type, n) for n in ([name] if isinstance(name, str) else name)}
    return sorted(found)


@cache
def records() -> dict[str, list[dict[str, Any]]]:
    """The facts of transformers' layouts, by model type."""
    found: dict[str, list[dict[str, Any]]] = {}
    for fact in json.loads(gzip.decompress((DATA / "projectors.json.gz").read_bytes())):
        if fact["source"] == "transformers":
            found.setdefault(fact["model_type"], []).append(fact)
    return found


def shallow(config: Any) -> None:
    """Two layers a stack: the test is of names, not of patience."""
    for key in ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, key, None), int) and not getattr(config, "layer_types", None):
            setattr(config, key, min(getattr(config, key), 2))
    for part in list(vars(config).values()):
        if isinstance(part, hf.PreTrainedConfig):
            shallow(part)


def bare(name: str) -> str:
    """A tensor's name without what wraps the model that it is of."""
    return re.sub(r"^(model\.|thinker\.|vlm\.)+", "", name)


@cache
def built(model_type: str, name: str) -> torch.nn.Module:
    for reduce in (shallow, lambda config: None):
        try:
            config = CONFIG_MAPPING[model_type](**WITH.get(model_type, {}))
            reduce(config)
            with torch.device("meta"):
                return getattr(hf, name)(config)
        except Exception as error:
            problem = error
    raise AssertionError(f"{model_type}: {problem}")


@pytest.mark.parametrize(("model_type", "name"), classes())
def test_of_a_class_exactly_the_projector_is_located(model_type: str, name: str):
    """On the names of its modules and on those that it is saved under."""
    facts = records().get(model_type, [])
    assert facts or model_type in {*NO_PROJECTOR, *MODULES}, "a model type that nothing is known of"
    if model_type in UNBUILT:
        pytest.skip("its default config cannot be built here")
    logging.disable(logging.WARNING)
    try:
        model = built(model_type, name)
    finally:
        logging.disable(logging.NOTSET)
    state = dict(model.state_dict())
    config = model.config.to_dict() | {"architectures": [name]}
    wanted = {bare(tensor["name"]) for fact in facts for tensor in fact["projector"]}
    allowed = wanted | {bare(tensor["name"]) for fact in facts for tensor in fact["optional"]}
    for names in (state, revert_weight_conversion(model, dict(state))):
        shapes = {n: tuple(t.shape) for n, t in names.items()}
        taken = {bare(n) for p in locate(shapes, config) for n in p.tensors}
        there = {bare(n) for n in shapes}
        if model_type in MODULES:
            allowed = wanted = {n for n in there if n.startswith(MODULES[model_type])}
        if model_type not in DEBATABLE:
            assert taken <= allowed
            assert wanted & there <= taken
            assert bool(taken) == bool(wanted & there)


def test_the_shares_of_classes_with_a_family_and_with_a_chain_are_as_documented():
    known = {a for family in families() for a in family.architectures}
    runs = {a for f in families() if f.chain or f.recipe for a in f.architectures}
    with_one = {
        (model_type, name)
        for model_type, name in classes()
        if any(fact["projector"] for fact in records().get(model_type, [])) or model_type in MODULES
    }
    share = {
        "family": sum(name in known for _, name in with_one) / len(with_one),
        "function": sum(name in runs for _, name in with_one) / len(with_one),
    }
    assert len(with_one) == 108
    assert share["family"] >= 0.99, share
    assert share["function"] >= 0.99, share


# Parts of a speech encoder, which are no projector of anything.
UNNOTICED = {"seamless_m4t", "seamless_m4t_v2"}


def second_names(model: Any, name: str) -> set[str]:
    """What else a file may call a tensor so that transformers loads it there."""
    transforms = get_model_conversion_mapping(model)
    found = {name}
    for transform in reversed(transforms):
        back = transform.reverse_transform()
        found |= {back.rename_source_key(one)[0] for one in found}
    prefix = model.base_model_prefix
    found |= {f"{prefix}.{one}" for one in found} | {n.removeprefix(f"{prefix}.") for n in found}
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    state = model.state_dict()
    return {
        other
        for other in found - state.keys()
        if rename_source_key(other, renamings, [], prefix, state)[0] == name
    }


@pytest.mark.parametrize(("model_type", "name"), classes())
def test_a_second_name_of_a_projectors_tensor_is_noticed(model_type: str, name: str):
    """threats J4: as another name of the same, or as a tensor that is in a projector too many."""
    if model_type in UNBUILT | UNNOTICED:
        pytest.skip("cannot be built here, or has no projector")
    logging.disable(logging.WARNING)
    try:
        model = built(model_type, name)
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        ours = [n for p in locate(shapes, {"architectures": [name]}) for n in p.tensors]
        second = [(n, other) for n in ours for other in second_names(model, n)]
    finally:
        logging.disable(logging.NOTSET)
    for tensor, other in second:
        if parameter(other) == parameter(tensor):
            continue
        try:
            found = locate({**shapes, other: shapes[tensor]}, {"architectures": [name]})
        except ProjauditError:
            continue
        assert any(other in (*p.tensors, *p.unexpected) for p in found), (tensor, other)
