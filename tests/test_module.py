"""Projectors that transformers' own class runs: built from a config, equal, probed, refused."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from projaudit.errors import UnsupportedError
from projaudit.module import build
from projaudit.projector import Projector, blueprint, families, locate

VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 200,
}
LLAMA = TEXT | {"model_type": "llama"}
FORMER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "encoder_hidden_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 16,
}
KOSMOS = {
    "latent_query_num": 5,
    "text_config": {
        "embed_dim": 64,
        "attention_heads": 4,
        "ffn_dim": 96,
        "layers": 1,
        "vocab_size": 200,
    },
}
BLIP = {
    "num_query_tokens": 5,
    "vision_config": VISION,
    "qformer_config": FORMER,
    "text_config": LLAMA,
}
GRANITE = {
    "window_size": 6,
    "downsample_rate": 2,
    "projector_config": FORMER,
    "text_config": TEXT | {"model_type": "granite"},
    "encoder_config": {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "dim_head": 16},
}

# family -> what its config says otherwise than by default
CONFIGS: dict[str, dict[str, Any]] = {
    "blip-2": BLIP,
    "instructblip": BLIP,
    "instructblipvideo": BLIP,
    "granite-speech": GRANITE,
    "granite-speech-plus": GRANITE,
    "granite4-vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[0, 0]],
        "vision_config": VISION
        | {"model_type": "clip_vision_model", "hidden_size": 64, "image_size": 128},
        "text_config": TEXT,
        "qformer_config": FORMER | {"cross_attention_frequency": 1},
    },
    "idefics": TEXT
    | {
        "use_resampler": True,
        "vision_config": {"embed_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
    },
    "idefics2": {
        "vision_config": VISION,
        "text_config": TEXT | {"model_type": "mistral", "hidden_act": "silu"},
        "perceiver_config": {
            "hidden_size": 64,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-3,
        },
    },
    "kosmos-2": KOSMOS | {"vision_config": VISION},
    "kosmos-2.5": KOSMOS
    | {"vision_config": VISION | {"head_dim": 16, "patch_embed_hidden_size": 12}},
    "aria": {
        "projector_patch_to_query_dict": {16: 3, 64: 5},
        "vision_config": VISION | {"model_type": "idefics3_vision", "num_attention_heads": 4},
        "text_config": TEXT | {"moe_num_experts": 2, "moe_topk": 1},
    },
    "evolla": TEXT
    | {
        "resampler_depth": 2,
        "resampler_dim_head": 8,
        "resampler_heads": 4,
        "resampler_num_latents": 5,
        "resampler_ff_mult": 2,
        "aligner_num_add_layers": 1,
        "protein_encoder_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 40,
        },
    },
    "fun-asr-nano": {
        "audio_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_timestamp_prediction_layers": 1,
            "intermediate_size": 40,
        },
        "text_config": TEXT | {"model_type": "qwen3"},
        "adaptor_config": {
            "hidden_size": 64,
            "intermediate_size": 16,
            "num_attention_heads": 4,
            "projector_hidden_size": 40,
            "layer_norm_eps": 1e-3,
        },
    },
    "deepseek-vl-hybrid": {
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "high_res_vision_config": {
            "hidden_size": 32,
            "output_channels": 6,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "global_attn_indexes": [0],
            "mlp_dim": 40,
        },
        "text_config": LLAMA,
    },
    "ernie-4.5-vl": {
        "vision_config": {
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 2,
            "intermediate_size": 40,
            "rms_norm_eps": 1e-3,
        },
        "text_config": TEXT
        | {
            "moe_num_experts": 2,
            "moe_k": 1,
            "moe_intermediate_size": [12, 12],
            "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 6, 4],
            },
        },
    },
    "minimax-m3": {
        "projector_hidden_size": 40,
        "vision_config": VISION,
        "text_config": TEXT | {"num_local_experts": 2, "num_experts_per_tok": 1},
    },
    "got-ocr2": {
        "vision_config": VISION | {"output_channels": 12, "global_attn_indexes": [], "mlp_dim": 40},
        "text_config": TEXT | {"model_type": "qwen2"},
    },
    "pp-formulanet": {
        "vision_config": VISION
        | {
            "output_channels": 12,
            "post_conv_in_channels": 12,
            "post_conv_mid_channels": 20,
            "post_conv_out_channels": 28,
            "decoder_hidden_size": 64,
            "global_attn_indexes": [],
            "mlp_dim": 40,
        },
        "text_config": {
            "d_model": 64,
            "decoder_layers": 1,
            "decoder_ffn_dim": 96,
            "decoder_attention_heads": 4,
            "vocab_size": 200,
        },
    },
    "glm5-next": {
        "vision_config": {
            "out_hidden_size": 64,
            "projection_intermediate_size": 40,
            "swiglu_limit": 0.3,
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 40,
        },
        "text_config": {
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "vocab_size": 200,
            "pad_token_id": 0,
        },
    },
    "granite-docling": {
        "vision_config": VISION
        | {
            "image_size": 128,
            "out_hidden_size": 64,
            "scale_factor": 4,
            "deepstack_visual_indexes": [0],
            "num_hidden_layers": 2,
        },
        "text_config": TEXT | {"pad_token_id": 0},
    },
    "ovis2": {
        "hidden_size": 64,
        "vision_config": VISION | {"vocab_size": 30, "hidden_stride": 2},
        "text_config": TEXT | {"model_type": "qwen2"},
    },
}
CONFIGS["granite4-vision-spatial"] = CONFIGS["granite4-vision"] | {"use_spatial_sampling": True}
OWN = [family for family in families() if family.recipe]


def part(path: str) -> Any:
    """A live model's module of that path, called with x."""
    return lambda model, x: model.get_submodule(path)(x)


def former(model: nn.Module, x: Tensor) -> Tensor:
    queries = model.query_tokens.expand(len(x), -1, -1)
    said = {"query_embeds": queries, "encoder_hidden_states": x}
    if hasattr(model.qformer, "embeddings"):
        said["input_ids"] = torch.tensor([[1, 2, 3, 4]] * len(x))
    return model.language_projection(model.qformer(**said)[0][:, : queries.shape[1]])


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.long)


def aria(model: nn.Module, x: Tensor) -> Tensor:
    module = model.model.multi_modal_projector
    whole = module.patch_to_query_dict
    module.patch_to_query_dict = {16: 5}  # as of 64 patches, to be quick
    found = module(x)
    module.patch_to_query_dict = whole
    return found


def hybrid(model: nn.Module, x: Tensor) -> Tensor:
    return model.model.aligner(x[..., :32], x[..., 32:])


def ernie(model: nn.Module, x: Tensor) -> Tensor:
    grid = torch.tensor([[1, 2, 2]])
    return torch.stack([model.model.resampler_model(s.reshape(4, 32), grid) for s in x])


def minimax(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([model.model.multi_modal_projector(one) for one in x])


def image(path: str) -> Any:
    return lambda model, x: model.get_submodule(path)(x.transpose(1, 2).reshape(len(x), -1, 8, 8))


def docling(model: nn.Module, x: Tensor) -> Tensor:
    connector = model.model.vision_model.connector
    found = []
    for fine in (False, True):
        for one in x:
            image, deep = connector(one[None, :, :32], [one[None, :, 32:]], fine=fine)
            found.append((fine, torch.cat([image, *deep])))
    return torch.stack(
        [
            torch.cat([o for f, o in found[i :: len(x)]])  # coarse, then fine
            for i in range(len(x))
        ]
    )


def ovis(model: nn.Module, x: Tensor) -> Tensor:
    """From what the tower hands over, as Ovis2VisionModel and Ovis2Model have it."""
    tower = model.model.vision_tower
    words = tower.head_norm(tower.head_linear(x)).softmax(-1)
    return model.model.visual_embeddings_table(nn.functional.pad(words, (0, 5)))


def window(model: nn.Module, x: Tensor, index: str) -> Tensor:
    module = model.model.get_submodule(index)
    whole, module.image_side = module.image_side, 4
    found = module(x)
    module.image_side = whole
    return found


LIVE: dict[str, Any] = {
    "blip-2": former,
    "instructblip": former,
    "instructblipvideo": former,
    "granite-speech": part("model.projector"),
    "granite-speech-plus": part("model.projector"),
    "granite4-vision": lambda model, x: window(model, x, "layerwise_projectors.0"),
    "granite4-vision-spatial": lambda model, x: window(model, x, "spatial_projectors.3"),
    "idefics": part("model.perceiver_resampler"),
    "idefics2": lambda model, x: model.model.connector(x, ones(x)),
    "kosmos-2": lambda model, x: model.image_to_text_projection(x)[0],
    "kosmos-2.5": lambda model, x: model.image_to_text_projection(x)[0],
    "aria": aria,
    "evolla": lambda model, x: model.model.protein_encoder.sequence_compressor_resampler(
        x, ones(x)
    ),
    "fun-asr-nano": lambda model, x: model.model.multi_modal_projector(x, ones(x)),
    "deepseek-vl-hybrid": hybrid,
    "ernie-4.5-vl": ernie,
    "minimax-m3": minimax,
    "got-ocr2": image("model.multi_modal_projector"),
    "pp-formulanet": image("model.encoder.multi_modal_projector"),
    "glm5-next": part("model.visual.merger"),
    "granite-docling": docling,
    "ovis2": ovis,
}


@cache
def live(name: str) -> nn.Module:
    """transformers' own whole model of a family, tiny, its weights random."""
    family = next(f for f in OWN if f.name == name)
    torch.manual_seed(5)
    logging.disable(logging.WARNING)
    try:
        config = CONFIG_MAPPING[family.recipe.config](**CONFIGS[name])
        model = getattr(hf, family.architectures[0])(config).eval()
    finally:
        logging.disable(logging.NOTSET)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0).clamp_(-2, 2)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def written(name: str, *, on_disk: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors under the names of memory or disk, and its config.json."""
    import json

    model = live(name)
    tensors = dict(model.state_dict())
    if on_disk:
        tensors = revert_weight_conversion(model, dict(tensors))
    config = json.loads(model.config.to_json_string())
    return tensors, config | {"architectures": [type(model).__name__]}


def of_family(name: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> Projector:
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return [p for p in locate(shapes, config) if p.family == name][-1]


def by_role(projector: Projector, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {role: tensors[tensor] for role, tensor in projector.vectors.items()}
    for layer in projector.linears:
        weights[f"{layer.role}.weight"] = layer.matrix(tensors[layer.weight])
        if layer.bias:
            weights[f"{layer.role}.bias"] = tensors[layer.bias]
    return weights


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_module_is_built_from_config_and_tensors_and_is_transformers_own(
    name: str, on_disk: bool
):
    tensors, config = written(name, on_disk=on_disk)
    projector = of_family(name, tensors, config)
    plan = blueprint(projector, config, {n: tuple(t.shape) for n, t in tensors.items()})
    module = build(plan, torch.device("cpu"))
    x = torch.randn(3, module.tokens, module.width)
    found = module(by_role(projector, tensors), x)
    assert found.shape[-1] == projector.out_features
    with torch.no_grad():
        expected = LIVE[name](live(name), x)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


def test_every_family_of_a_class_is_tested():
    assert {family.name for family in OWN} == set(LIVE) == set(CONFIGS)
