"""Every LLaVA family: transformers' own classes, found and run as transformers runs them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

import projaudit
from projaudit.findings import Verdict
from projaudit.projector import forward, locate

VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 200,
}
FAMILIES = {
    "Llava": ("llava", 4, {}),
    "LlavaNext": ("llava", 5, {}),
    "LlavaNextVideo": ("llava", 5, {"video_token_index": 198}),
    "LlavaOnevision": ("llava", 5, {"video_token_index": 198}),
    "VideoLlava": ("llava", 4, {"video_token_index": 198}),
    "VipLlava": (
        "vipllava",
        6,
        {"vision_feature_layers": [-1, -2], "projector_layernorm_eps": 0.1},
    ),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    one_vision = name == "LlavaOnevision"
    vision = (hf.SiglipVisionConfig if one_vision else hf.CLIPVisionConfig)(**VISION)
    text = (hf.Qwen2Config if one_vision else hf.LlamaConfig)(**TEXT)
    config = getattr(hf, f"{name}Config")(
        vision_config=vision, text_config=text, image_token_index=199, **FAMILIES[name][2]
    )
    return getattr(hf, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_found_whole_and_passes(tmp_path: Path, name: str):
    family, tensors, _ = FAMILIES[name]
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "projector" in part or "newline" in part:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(tmp_path / "tuned")
    report = projaudit.check(str(tmp_path / "tuned"), str(tmp_path / "base"), seed=1)
    assert report.verdict is Verdict.PASS, report.sentence
    assert report.projectors[0].family == family
    assert len([read for read in report.tensors if read.side == "target"]) == tensors
    assert {p.name: p.status for p in report.coverage.parts} == {
        "projector": "audited",
        "vision tower": "equal",
        "language model": "equal",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_chain_is_the_module(name: str):
    model = build(name, seed=3)
    module = model.model.multi_modal_projector
    tensors = module.state_dict()
    shapes = {f"multi_modal_projector.{n}": tuple(t.shape) for n, t in tensors.items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (projector,) = locate(shapes, config)
    x = torch.randn(5, projector.in_features)
    tensors["projector_layernorm.eps"] = torch.tensor(projector.norm_eps)
    with torch.no_grad():
        torch.testing.assert_close(forward(projector.chain, tensors, x), module(x))


def sizes(**named: Any) -> SimpleNamespace:
    """What a projector's class reads of a config: 12 features in, 16 out."""
    return SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=12, projection_dim=16, vision_output_dim=12),
        text_config=SimpleNamespace(hidden_size=16),
        audio_config=SimpleNamespace(d_model=12),
        **named,
    )


def aligner(depth: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=12, projection_dim=16, depth=depth, hidden_act="silu")


MODULES: dict[str, tuple[str, str, str, str, Any]] = {
    "internvl": (
        "InternVLForConditionalGeneration",
        "internvl.modeling_internvl.InternVLMultiModalProjector",
        "multi_modal_projector",
        "norm+mlp2",
        sizes(downsample_ratio=0.5, projector_hidden_act="gelu"),
    ),
    "linear-projector": (
        "PaliGemmaForConditionalGeneration",
        "paligemma.modeling_paligemma.PaliGemmaMultiModalProjector",
        "model.multi_modal_projector",
        "linear",
        sizes(),
    ),
    "linear-projector of sound": (
        "Qwen2AudioForConditionalGeneration",
        "qwen2_audio.modeling_qwen2_audio.Qwen2AudioMultiModalProjector",
        "multi_modal_projector",
        "linear",
        sizes(),
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        "llama4.modeling_llama4.Llama4MultiModalProjector",
        "multi_modal_projector",
        "linear",
        sizes(),
    ),
    "idefics3": (
        "SmolVLMForConditionalGeneration",
        "idefics3.modeling_idefics3.Idefics3SimpleMLP",
        "model.connector.modality_projection",
        "linear",
        sizes(scale_factor=2),
    ),
    "deepseek-vl": (
        "DeepseekVLForConditionalGeneration",
        "deepseek_vl.modeling_deepseek_vl.DeepseekVLAligner",
        "model.aligner",
        "mlp2",
        sizes(),
    ),
    "janus": (
        "JanusForConditionalGeneration",
        "janus.modeling_janus.JanusVisionAlignerMLP",
        "model.aligner",
        "mlp2",
        aligner(2),
    ),
    "janus, deeper": (
        "JanusForConditionalGeneration",
        "janus.modeling_janus.JanusVisionAlignerMLP",
        "model.aligner",
        "mlp3",
        aligner(3),
    ),
    "videollama3": (
        "VideoLlama3ForConditionalGeneration",
        "video_llama_3.modeling_video_llama_3.VideoLlama3Projector",
        "model.projector",
        "mlp2",
        sizes(),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_forward_chain_of_a_family_is_its_module(name: str):
    architecture, path, prefix, kind, config = MODULES[name]
    file, _, class_name = path.rpartition(".")
    torch.manual_seed(4)
    module = getattr(import_module(f"transformers.models.{file}"), class_name)(config)
    with torch.no_grad():
        for parameter in module.parameters():  # norms begin as the identity
            parameter.add_(0.3 * torch.randn_like(parameter))
    tensors = {f"{prefix}.{n}": t for n, t in module.state_dict().items()}
    known = {"architectures": [architecture], "vision_config": {"hidden_act": "silu"}}
    (projector,) = locate({n: tuple(t.shape) for n, t in tensors.items()}, known)
    assert (projector.family, projector.kind) == (name.partition(",")[0].partition(" of")[0], kind)
    assert set(projector.tensors) == set(tensors)
    weights = {role: tensors[tensor] for role, tensor in projector.vectors.items()}
    for layer in projector.linears:
        weights[f"{layer.role}.weight"] = tensors[layer.weight]
        if layer.bias:
            weights[f"{layer.role}.bias"] = tensors[layer.bias]
    x = torch.randn(5, projector.in_features)
    with torch.no_grad():
        torch.testing.assert_close(
            forward(projector.chain, weights, x), module(x), rtol=1e-5, atol=1e-5
        )


def test_a_projector_that_only_shares_names_with_a_family_is_of_none():
    """SwiGLU halves in between; an RMSNorm has no bias; a norm before the merge is narrow."""
    w1, w2 = "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"
    norm = "multi_modal_projector.layer_norm"
    others: list[dict[str, tuple[int, ...]]] = [
        {w1: (64, 12), w2: (16, 32)},
        {f"{norm}.weight": (12,), w1: (16, 12), w2: (16, 16)},
        {f"{norm}.weight": (3,), f"{norm}.bias": (3,), w1: (16, 12), w2: (16, 16)},
    ]
    for shapes in others:
        (projector,) = locate(shapes, {"architectures": ["OtherForConditionalGeneration"]})
        assert (projector.family, projector.chain) == ("unknown", ())
        assert set(projector.tensors) == set(shapes)
    (known,) = locate({w1: (16, 12), w2: (16, 16)})
    assert known.family == "llava"


def test_a_text_model_has_no_projector():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert locate(shapes, model.config.to_dict()) == ()
