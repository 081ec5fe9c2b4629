"""Projectors that transformers' own class runs: built from a config, equal, probed, refused."""

from __future__ import annotations

import json
import logging
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import projaudit
from projaudit.errors import UnsupportedError
from projaudit.family import families
from projaudit.findings import Verdict
from projaudit.locating import locate
from projaudit.module import build
from projaudit.projector import Projector, blueprint
from projaudit.recipe import LARGEST, Blueprint, settings

WEIGHTS = "model.safetensors"
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


# A whole audit


def pair_of(folder: Path, name: str, size: float = 0.02) -> tuple[Path, Path]:
    """(tuned, base) of a family as transformers saves them; only the projector is moved."""
    model = live(name)
    tensors, config = written(name, on_disk=True)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    names = {n for p in locate(shapes, config) for n in p.tensors}
    g = torch.Generator().manual_seed(3)
    for side in ("base", "tuned"):
        model.config.save_pretrained(folder / side)
        file = folder / side / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        moved = {
            n: t + size * t.norm() / t.numel() ** 0.5 * torch.randn(t.shape, generator=g)
            if side == "tuned" and n in names
            else t
            for n, t in tensors.items()
        }
        save_file({n: t.clone() for n, t in moved.items()}, folder / side / WEIGHTS)
    return folder / "tuned", folder / "base"


def change(folder: Path, part: str, **keys: object) -> None:
    """Sets keys in a part of a config.json (empty: the top)."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    (config[part] if part else config).update(keys)
    file.write_text(json.dumps(config))


def audit(tuned: Path, base: Path) -> projaudit.Report:
    return projaudit.check(str(tuned), str(base), seed=1, depth="weights")


def reasons(report: projaudit.Report) -> set[str]:
    return {s.reason for s in report.skipped if s.metric == "shift_magnitude"}


@pytest.mark.parametrize("name", ["blip-2", "ovis2", "minimax-m3"])
def test_what_no_chain_describes_is_probed_and_passes(tmp_path: Path, name: str):
    report = audit(*pair_of(tmp_path, name))
    assert report.verdict is Verdict.PASS, report.sentence
    assert all(projector.module and not projector.chain for projector in report.projectors)
    of = [m for m in report.measurements if m.metric == "shift_magnitude"]
    assert len(of) == len(report.projectors)
    assert all(0 < m.value < 1 and len(m.nulls) == 2 for m in of)


def test_the_same_seed_gives_the_same_measurements(tmp_path: Path):
    sides = pair_of(tmp_path, "kosmos-2")
    first, second = audit(*sides), audit(*sides)
    assert first.measurements == second.measurements


def test_a_payload_planted_behind_a_q_former_stands_out(tmp_path: Path):
    """One output is written for whatever is read; a random update of its size writes many."""
    tuned, base = pair_of(tmp_path, "blip-2", size=0.0)
    tensors = load_file(tuned / WEIGHTS)
    weight = tensors["language_projection.weight"]
    payload = torch.outer(torch.ones(len(weight)), weight.mean(0)) * 0.2
    tensors["language_projection.weight"] = weight + payload
    save_file(tensors, tuned / WEIGHTS)
    (found,) = [m for m in audit(tuned, base).measurements if m.metric == "shift_energy_top1"]
    assert found.value > 0.99
    assert all(found.value > null.mean for null in found.nulls)
    (tmp_path / "control").mkdir()
    random = audit(*pair_of(tmp_path / "control", "blip-2"))
    (other,) = [m for m in random.measurements if m.metric == "shift_energy_top1"]
    assert other.value < 0.99


def test_the_shift_is_the_difference_of_the_two_modules(tmp_path: Path):
    tuned, base = pair_of(tmp_path, "idefics2")
    report = audit(tuned, base)
    config = json.loads((base / "config.json").read_text())
    sides = []
    for folder in (tuned, base):
        tensors = load_file(folder / WEIGHTS)
        projector = of_family("idefics2", tensors, config)
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        module = build(blueprint(projector, config, shapes), torch.device("cpu"))
        sides.append(partial(module, by_role(projector, tensors)))
    w1 = load_file(base / WEIGHTS)["model.connector.modality_projection.gate_proj.weight"]
    x = torch.randn(200, 16, 32, dtype=torch.float64)
    x *= w1.numel() ** 0.5 / w1.norm() / x.norm(dim=-1, keepdim=True)
    old = sides[1](x)
    expected = ((sides[0](x) - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)).median()
    (found,) = [m for m in report.measurements if m.metric == "shift_magnitude"]
    assert found.value == pytest.approx(float(expected), rel=0.15)


# What cannot be told, and what is hostile


def test_without_transformers_it_is_not_probed_and_does_not_pass(tmp_path: Path, monkeypatch):
    sides = pair_of(tmp_path, "idefics2")
    monkeypatch.setattr("projaudit.module.find_spec", lambda name: None)
    report = audit(*sides)
    assert report.verdict is Verdict.INCONCLUSIVE
    (why,) = reasons(report)
    assert "transformers is not installed; pip install 'projaudit[behaviour]'" in why


def test_other_heads_of_the_same_weights_are_another_function(tmp_path: Path):
    tuned, base = pair_of(tmp_path, "blip-2")
    change(tuned, "qformer_config", num_attention_heads=2)
    report = audit(tuned, base)
    assert report.verdict is not Verdict.PASS
    assert reasons(report) == {"base and target compute different functions of the same weights"}


HOSTILE: dict[str, tuple[str, dict[str, object]]] = {
    "as many layers as would take a day": ("qformer_config", {"num_hidden_layers": 100_000}),
    "a width that no memory holds": ("qformer_config", {"hidden_size": 1 << 40}),
    "another width": ("qformer_config", {"intermediate_size": 64}),
    "a width that is a list": ("qformer_config", {"hidden_size": [48, 48]}),
    "no heads": ("qformer_config", {"num_attention_heads": 0}),
    "a negative number": ("qformer_config", {"cross_attention_frequency": -1}),
    "a rate that is no number": ("qformer_config", {"layer_norm_eps": float("inf")}),
    "an activation that is code": ("qformer_config", {"hidden_act": "__import__('os').getpid"}),
    "an activation that is none": ("qformer_config", {"hidden_act": "no_such"}),
    "another class": ("qformer_config", {"model_type": "llama"}),
    "a language model of no class": ("text_config", {"model_type": "no-such"}),
    "a part that is no object": ("", {"qformer_config": "x"}),
    "a long list": ("", {"num_query_tokens": [5] * 100}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_config_that_is_not_the_weights_is_said_in_a_line(tmp_path: Path, name: str):
    tuned, base = pair_of(tmp_path, "blip-2")
    part, keys = HOSTILE[name]
    change(tuned, part, **keys)
    started = time.process_time()
    report = audit(tuned, base)
    assert time.process_time() - started < 20
    assert report.verdict is not Verdict.PASS
    (why,) = reasons(report)
    assert "Blip2QFormerModel was not run" in why
    assert "\n" not in why
    assert len(why) < 300


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("", {"auto_map": {"AutoModel": "evil.Model"}, "custom_code": True}),
        ("qformer_config", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("qformer_config", {"_attn_implementation": "evil/kernel"}),
        ("vision_config", {"backbone": "evil/model", "use_timm_backbone": True}),
        ("text_config", {"torch_dtype": "evil", "attribute_map": {"hidden_size": "evil"}}),
    ],
)
def test_keys_that_reach_elsewhere_reach_nobody(tmp_path: Path, monkeypatch, part, keys):
    """No config key but those that the recipe names is handed to transformers."""
    tuned, base = pair_of(tmp_path, "blip-2")
    (tuned / "evil.py").write_text("raise SystemExit('run')")
    change(tuned, part, **keys)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    report = audit(tuned, base)
    assert any(m.metric == "shift_magnitude" for m in report.measurements)


def test_a_tensor_too_many_or_too_few_is_not_run(tmp_path: Path):
    tuned, base = pair_of(tmp_path, "kosmos-2")
    for folder in (tuned, base):
        tensors = load_file(folder / WEIGHTS)
        tensors["image_to_text_projection.extra.weight"] = torch.randn(64, 32)
        save_file(tensors, folder / WEIGHTS)
    report = audit(tuned, base)
    assert report.verdict is Verdict.INCONCLUSIVE
    (why,) = reasons(report)
    assert "extra.weight is not in the class and [64, 32] here" in why


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=80),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@hypothesis.settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(LIVE)), st.data())
def test_whatever_a_config_holds_only_bounded_plain_values_get_through(name: str, data):
    recipe = next(f.recipe for f in OWN if f.name == name)
    config: dict[str, Any] = {}
    for part, keys in recipe.keys.items():
        given_keys = data.draw(st.dictionaries(st.sampled_from([*keys, "other"]), values))
        config |= {part: given_keys} if part else given_keys
    plan = Blueprint(recipe, config, "x", {}, {"weight": (2, 2)})
    try:
        kept = settings(plan)
    except UnsupportedError:
        return
    allowed = {key for keys in recipe.keys.values() for key in keys} | recipe.keys.keys()
    flat = [
        v for part in kept.values() for v in (part.values() if isinstance(part, dict) else [part])
    ]
    assert set(kept) <= allowed
    for value in flat:
        assert not isinstance(value, int | float) or abs(value) <= LARGEST
        assert not isinstance(value, str) or len(value) <= 64
