"""Every LLaVA family: transformers' own classes, found and run as transformers runs them."""

from __future__ import annotations

from pathlib import Path

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


def test_a_text_model_has_no_projector():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert locate(shapes, model.config.to_dict()) == ()
