"""Every LLaVA family: transformers' own classes, found and run as transformers runs them."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
import transformers as hf
import yaml

import projaudit
from projaudit.analyses.nulls import real_change
from projaudit.analyses.responses import _shift, _states
from projaudit.chain import forward, parse
from projaudit.family import undeclared
from projaudit.findings import Verdict
from projaudit.locating import locate
from projaudit.pair import pair
from projaudit.projector import Projector

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
    tensors["eps"] = torch.tensor(projector.norm_eps)
    with torch.no_grad():
        torch.testing.assert_close(forward(projector.chain, tensors, x), module(x))


D, OUT = 12, 16


def sizes(**named: Any) -> SimpleNamespace:
    """What a projector's class reads of a config: D features in, OUT out."""
    of = {
        "vision_config": SimpleNamespace(
            hidden_size=D,
            projection_dim=OUT,
            vision_output_dim=D,
            layer_norm_eps=1e-3,
            spatial_merge_size=2,
            merge_kernel_size=(2, 2),
            patch_size=1,
            image_size=2,
            projection_hidden_size=D,
            projection_layer_norm_eps=1e-3,
        ),
        "text_config": SimpleNamespace(hidden_size=OUT, rms_norm_eps=1e-3),
        "audio_config": SimpleNamespace(d_model=D),
        "projector_hidden_act": "silu",
    }
    return SimpleNamespace(**of | named)


def features(**named: Any) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=D, rms_norm_eps=1e-3, vocab_offset=0, vocab_size=8, **named)


def aligner(depth: int) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=D, projection_dim=OUT, depth=depth, hidden_act="silu")


def tokens(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What it makes of tokens that it merges four by four."""
    return module(x.reshape(-1, D))


def unshuffled(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What it makes of pixels that are shuffled already."""
    module.pixel_shuffle = lambda x, *_: x
    return module(x)


def grid(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What it makes of an image two patches high, each 2 × 2 of them a row of x."""
    image = x.reshape(len(x), 2, 2, D).permute(1, 0, 2, 3).reshape(-1, D)
    return module(image, torch.tensor([[2, 2 * len(x)]]))


def neighbours(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What it makes of patches whose every four neighbours are a row of x, less its separators."""
    image = x.reshape(len(x), 2, 2, D).permute(1, 0, 2, 3).reshape(1, -1, D)
    padded = torch.cat([image, image], dim=1)  # it wants two rows and columns at least
    return module(padded, (4, 2 * len(x)))[0, 1 : 1 + len(x)]


def pooled(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What it makes of an image of 2 × 2 patches, each pooled by itself."""
    return module(x.reshape(-1, 4, D)).reshape(len(x), -1)


class Muse(torch.nn.Module):
    """The adapter and what the model puts behind it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        muse = import_module("transformers.models.muse_glimmer.modeling_muse_glimmer")
        self.vision_adapter = muse.MuseGlimmerVisionAdapter(config)
        self.vision_projection = torch.nn.Linear(20, OUT, bias=False)
        self.norm = muse.MuseGlimmerRMSNorm(OUT, eps=1e-3, with_scale=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.vision_projection(self.vision_adapter(x)))


def plain(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x)


# family -> architecture, class, prefix of its tensors, kind, its arguments, how it is called
MODULES: dict[str, tuple[str, str, str, str, tuple[Any, ...], Any]] = {
    "internvl": (
        "InternVLForConditionalGeneration",
        "internvl.InternVLMultiModalProjector",
        "multi_modal_projector",
        "norm+mlp2",
        (sizes(downsample_ratio=0.5),),
        plain,
    ),
    "lfm3-vl": (
        "Lfm3VlForConditionalGeneration",
        "lfm3_vl.Lfm3VlMultiModalProjector",
        "multi_modal_projector",
        "norm+mlp2",
        (sizes(projector_hidden_size=20, projector_bias=True),),
        tokens,
    ),
    "nemotron-omni": (
        "NemotronH_Omni_Reasoning_V3",
        "nemotron_h_omni.NemotronH_Omni_Reasoning_V3MultiModalProjector",
        "multi_modal_projector",
        "norm+mlp2",
        (D, 20, OUT),
        plain,
    ),
    "nemotron-omni-sound": (
        "NemotronH_Omni_Reasoning_V3",
        "nemotron_h_omni.NemotronH_Omni_Reasoning_V3MultiModalProjector",
        "embed_audio",
        "norm+mlp2",
        (D, 20, OUT),
        plain,
    ),
    "aya-vision": (
        "AyaVisionForConditionalGeneration",
        "aya_vision.AyaVisionMultiModalProjector",
        "model.multi_modal_projector",
        "norm+gated mlp2",
        (sizes(downsample_factor=2, alignment_intermediate_size=20, adapter_layer_norm_eps=1e-3),),
        unshuffled,
    ),
    "cohere2-vision": (
        "Cohere2VisionForConditionalGeneration",
        "cohere2_vision.Cohere2VisionMultiModalProjector",
        "model.multi_modal_projector",
        "gated mlp2",
        (sizes(downsample_factor=2, alignment_intermediate_size=20),),
        unshuffled,
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "mistral3.Mistral3MultiModalProjector",
        "multi_modal_projector",
        "norm+mlp3",
        (sizes(spatial_merge_size=2, vision_feature_layer=-1, multimodal_projector_bias=True),),
        grid,
    ),
    "linear-projector": (
        "PaliGemmaForConditionalGeneration",
        "paligemma.PaliGemmaMultiModalProjector",
        "model.multi_modal_projector",
        "linear",
        (sizes(),),
        plain,
    ),
    "linear-projector of sound": (
        "Qwen2AudioForConditionalGeneration",
        "qwen2_audio.Qwen2AudioMultiModalProjector",
        "multi_modal_projector",
        "linear",
        (sizes(),),
        plain,
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "gemma3.Gemma3MultiModalProjector",
        "multi_modal_projector",
        "norm+linear",
        (sizes(mm_tokens_per_image=4),),
        pooled,
    ),
    "gemma3n": (
        "Gemma3nForConditionalGeneration",
        "gemma3n.Gemma3nMultimodalEmbedder",
        "model.embed_vision",
        "norm+linear+norm",
        (features(), SimpleNamespace(hidden_size=OUT)),
        lambda module, x: module(inputs_embeds=x),
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        "gemma4.Gemma4MultimodalEmbedder",
        "model.embed_audio",
        "norm+linear",
        (features(), SimpleNamespace(hidden_size=OUT)),
        plain,
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        "llama4.Llama4MultiModalProjector",
        "multi_modal_projector",
        "linear",
        (sizes(),),
        plain,
    ),
    "llama4-adapter": (
        "Llama4ForConditionalGeneration",
        "llama4.Llama4VisionMLP2",
        "vision_model.vision_adapter.mlp",
        "mlp2",
        (
            SimpleNamespace(
                hidden_size=D,
                intermediate_size=D,
                projector_input_dim=OUT,
                projector_output_dim=OUT,
                projector_dropout=0.0,
            ),
        ),
        plain,
    ),
    "paddleocr-vl": (
        "PaddleOCRVLForConditionalGeneration",
        "paddleocr_vl.PaddleOCRProjector",
        "mlp_AR",
        "norm+mlp2",
        (sizes(),),
        lambda module, x: module(
            x.reshape(len(x), 2, 2, D).permute(1, 0, 2, 3).reshape(-1, D),
            torch.tensor([[1, 2, 2 * len(x)]]),
        ),
    ),
    "hunyuan-vl": (
        "HunYuanVLForConditionalGeneration",
        "hunyuan_vl.HunYuanVLVisionPatchMerger",
        "model.vision_tower.patch_merger",
        "norm+mlp3+norm",
        (
            SimpleNamespace(
                hidden_size=D,
                spatial_merge_size=2,
                text_hidden_size=OUT,
                hidden_act="silu",
                rms_norm_eps=1e-3,
            ),
        ),
        neighbours,
    ),
    "inkling2": (
        "Inkling2ForConditionalGeneration",
        "inkling2.Inkling2VisionMerger",
        "model.vision_tower.merger",
        "mlp2",
        (
            SimpleNamespace(
                hidden_size=D,
                spatial_merge_size=2,
                projection_hidden_dim=20,
                text_hidden_size=OUT,
                hidden_act="silu",
                projector_bias=True,
            ),
        ),
        plain,
    ),
    "idefics3": (
        "SmolVLMForConditionalGeneration",
        "idefics3.Idefics3SimpleMLP",
        "model.connector.modality_projection",
        "linear",
        (sizes(scale_factor=2),),
        plain,
    ),
    "modernvbert": (
        "ModernVBertForMaskedLM",
        "modernvbert.ModernVBertConnector",
        "model.connector",
        "linear",
        (sizes(pixel_shuffle_factor=2),),
        unshuffled,
    ),
    "modernvbert, with a norm": (
        "UltraVBertForMaskedLM",
        "ultravbert.UltraVBertConnector",
        "model.connector",
        "linear+norm",
        (sizes(pixel_shuffle_factor=2),),
        unshuffled,
    ),
    "git": (
        "GitForCausalLM",
        "git.GitProjection",
        "git.visual_projection",
        "linear+norm",
        (sizes(hidden_size=OUT),),
        plain,
    ),
    "kimi-vl": (
        "Kimi_K25ForConditionalGeneration",
        "kimi_k25.Kimi_K25MultimodalProjection",
        "model.mm_projector",
        "norm+mlp2",
        (
            SimpleNamespace(
                vision_config=SimpleNamespace(hidden_size=D, merge_kernel_size=(2, 2)),
                text_config=SimpleNamespace(hidden_size=OUT),
                projection_hidden_size=D,
                projection_layer_norm_eps=1e-3,
            ),
        ),
        lambda module, x: module(x.reshape(len(x), 4, D))[:, 0],
    ),
    "moss-transcribe": (
        "MossTranscribeDiarizeForConditionalGeneration",
        "moss_transcribe_diarize.MossTranscribeDiarizeMultiModalProjector",
        "model.multi_modal_projector",
        "mlp2+norm",
        (sizes(adaptor_input_dim=D, projector_bias=True),),
        plain,
    ),
    "minicpm-v-merger": (
        "MiniCPMV4_6ForConditionalGeneration",
        "minicpmv4_6.MiniCPMV4_6DownsampleMLP",
        "model.merger.mlp.0",
        "norm+mlp2",
        (D, OUT),
        lambda module, x: module(x),
    ),
    "deepseek-vl": (
        "DeepseekVLForConditionalGeneration",
        "deepseek_vl.DeepseekVLAligner",
        "model.aligner",
        "mlp2",
        (sizes(),),
        plain,
    ),
    "janus": (
        "JanusForConditionalGeneration",
        "janus.JanusVisionAlignerMLP",
        "model.aligner",
        "mlp2",
        (aligner(2),),
        plain,
    ),
    "janus, deeper": (
        "JanusForConditionalGeneration",
        "janus.JanusVisionAlignerMLP",
        "model.aligner",
        "mlp3",
        (aligner(3),),
        plain,
    ),
    "muse": (
        "MuseGlimmerForConditionalGeneration",
        "",
        "model",
        "mlp3+norm",
        (sizes(out_hidden_size=D, projector_hidden_size=20),),
        plain,
    ),
    "videollama3": (
        "VideoLlama3ForConditionalGeneration",
        "video_llama_3.VideoLlama3Projector",
        "model.projector",
        "mlp2",
        (sizes(),),
        plain,
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl.PatchMerger",
        "visual.merger",
        "norm+mlp2",
        (OUT, D),
        tokens,
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl.Qwen2_5_VLPatchMerger",
        "model.visual.merger",
        "norm+mlp2",
        (OUT, D),
        tokens,
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl.Qwen3VLVisionPatchMerger",
        "model.visual.merger",
        "norm+mlp2",
        (SimpleNamespace(hidden_size=D, spatial_merge_size=2, out_hidden_size=OUT),),
        tokens,
    ),
    "qwen3-vl, deepstack": (
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe.Qwen3VLMoeVisionPatchMerger",
        "model.visual.deepstack_merger_list.1",
        "norm+mlp2",
        (SimpleNamespace(hidden_size=D, spatial_merge_size=2, out_hidden_size=OUT), True),
        tokens,
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        "glm4v.Glm4vVisionPatchMerger",
        "model.visual.merger",
        "gated mlp4",
        (OUT, 20, "silu", True),
        plain,
    ),
    "molmo2": (
        "Molmo2ForConditionalGeneration",
        "molmo2.Molmo2ImageProjectorMLP",
        "model.multi_modal_projector.image_projector",
        "gated mlp3",
        (
            SimpleNamespace(
                hidden_size=D,
                intermediate_size=20,
                text_hidden_size=OUT,
                mlp_bias=True,
                hidden_act="silu",
            ),
        ),
        plain,
    ),
    "vibevoice": (
        "VibeVoiceForConditionalGeneration",
        "vibevoice.VibeVoiceMultiModalProjector",
        "model.semantic_connector",
        "mlp2",
        (D, OUT),
        plain,
    ),
    "dots3-sound": (
        "Dots3NoteForConditionalGeneration",
        "dots3_note.Dots3NoteAudioAdapter",
        "model.audio_tower.adapter",
        "norm+mlp2",
        (SimpleNamespace(adapter_input_size=D, adapter_out_dim=OUT),),
        plain,
    ),
}
CONFIG = {
    "projector_hidden_act": "silu",
    "adapter_layer_norm_eps": 1e-3,
    "vision_config": {
        "hidden_act": "silu",
        "layer_norm_eps": 1e-3,
        "rms_norm_eps": 1e-3,
        "projection_layer_norm_eps": 1e-3,
    },
    "text_config": {"hidden_size": OUT, "rms_norm_eps": 1e-3},
}


def module_of(name: str) -> torch.nn.Module:
    """transformers' own module of a family, its weights random, its norms no identity."""
    path, arguments = MODULES[name][1], MODULES[name][4]
    torch.manual_seed(4)
    if path:
        model, _, class_name = path.partition(".")
        file = import_module(f"transformers.models.{model}.modeling_{model}")
        module = getattr(file, class_name)(*arguments)
    else:
        module = Muse(*arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.nan_to_num_(0).clamp_(-2, 2)  # some are memory that nobody has written to
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def located(name: str, tensors: dict[str, torch.Tensor]) -> Projector:
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    (projector,) = locate(shapes, CONFIG | {"architectures": [MODULES[name][0]]})
    return projector


def by_role(projector: Projector, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `forward` takes."""
    weights = {role: tensors[tensor] for role, tensor in projector.vectors.items()}
    for layer in projector.linears:
        weights[f"{layer.role}.weight"] = layer.matrix(tensors[layer.weight])
        if layer.bias:
            weights[f"{layer.role}.bias"] = tensors[layer.bias]
    return weights | {"eps": torch.tensor(projector.norm_eps)}


@pytest.mark.parametrize("name", MODULES)
def test_the_forward_chain_of_a_family_is_its_module(name: str):
    _, _, prefix, kind, _, call = MODULES[name]
    module = module_of(name)
    tensors = {f"{prefix}.{n}": t for n, t in module.state_dict().items()}
    projector = located(name, tensors)
    assert (projector.family, projector.kind) == (name.partition(",")[0].partition(" of")[0], kind)
    assert set(projector.tensors) == set(tensors)
    x = torch.randn(8, projector.in_features)
    with torch.no_grad():
        torch.testing.assert_close(
            forward(projector.chain, by_role(projector, tensors), x),
            call(module, x),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", MODULES)
def test_a_shift_of_a_family_is_the_difference_of_its_modules(name: str):
    """Carried along the chain as a difference, through norms and gates that changed as well."""
    _, _, prefix, _, _, call = MODULES[name]
    base, tuned = module_of(name), module_of(name)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    sides = [{f"{prefix}.{n}": t for n, t in m.state_dict().items()} for m in (tuned, base)]
    projector = located(name, sides[0])
    update = pair(
        projector,
        projector,
        *sides,
        subject="projector",
        device=torch.device("cpu"),
        rank=8,
        generator=torch.Generator().manual_seed(1),
    )
    x = torch.randn(8, update.in_features)
    with torch.no_grad():
        shift = call(tuned, x) - call(base, x)
        found = _shift(update, real_change(update), _states(update, x))
        torch.testing.assert_close(found, shift, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            forward(update.chain, update.weights("after"), x), call(tuned, x), rtol=1e-4, atol=1e-4
        )


def test_a_projector_that_only_shares_names_with_a_family_is_of_none():
    """A merge in between; a norm of a width that no tokens have; a norm of two widths."""
    w1, w2 = "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"
    norm = "multi_modal_projector.layer_norm"
    others: list[dict[str, tuple[int, ...]]] = [
        {w1: (64, 12), w2: (16, 256)},
        {f"{norm}.weight": (5,), w1: (16, 12), w2: (16, 16)},
        {f"{norm}.weight": (3,), f"{norm}.bias": (12,), w1: (16, 12), w2: (16, 16)},
    ]
    for shapes in others:
        (projector,) = locate(shapes, {"architectures": ["OtherForConditionalGeneration"]})
        assert (projector.family, projector.chain) == ("unknown", ())
        assert set(projector.tensors) == set(shapes)
    (known,) = locate({w1: (16, 12), w2: (16, 16)})
    assert known.family == "llava"


def test_a_config_without_a_class_is_of_its_model_type() -> None:
    module = "multi_modal_projector"
    shapes = {
        f"{module}.layer_norm.weight": (48,), f"{module}.layer_norm.bias": (48,),
        f"{module}.linear_1.weight": (64, 48), f"{module}.linear_1.bias": (64,),
        f"{module}.linear_2.weight": (64, 64), f"{module}.linear_2.bias": (64,),
    }  # fmt: skip
    text = {"text_config": {"hidden_size": 64}}
    for kind, family, eps in (("internvl", "internvl", 1e-5), ("lfm3_vl", "lfm3-vl", 1e-6)):
        (found,) = locate(shapes, {"model_type": kind, **text})
        assert (found.family, found.norm_eps, found.kind) == (family, eps, "norm+mlp2")
    # The class decides where both are named; of a type that nobody knows, nothing is known.
    named = {"model_type": "lfm3_vl", "architectures": ["InternVLForConditionalGeneration"]}
    assert locate(shapes, {**named, **text})[0].family == "internvl"
    (found,) = locate(shapes, {"model_type": "of_my_own", **text})
    assert (found.chain, undeclared(found, {"model_type": "of_my_own"})) == ((), "of_my_own")
    (found,) = locate(shapes, text)
    assert found.chain  # by its names alone


def test_a_text_model_has_no_projector():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert locate(shapes, model.config.to_dict()) == ()


# The file of families


def entries() -> list[dict[str, Any]]:
    return yaml.safe_load((Path(projaudit.__file__).parent / "families.yaml").read_text("utf-8"))


def schema() -> jsonschema.Draft202012Validator:
    text = (Path(projaudit.__file__).parent / "families.schema.json").read_text("utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def test_the_families_are_what_their_schema_says():
    jsonschema.Draft202012Validator.check_schema(schema().schema)
    schema().validate(entries())
    names = [entry["name"] for entry in entries()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("chain", ["linear_1", "dropout:0.1"]),
        ("layouts", {"linear_1": "upside-down"}),
        ("modules", ["multi modal"]),
        ("eps", {"default": 2}),
        ("prefixes", ["model."]),
    ],
)
def test_a_wrong_entry_breaks_the_schema(key: str, value: Any):
    with pytest.raises(jsonschema.ValidationError):
        schema().validate([entries()[0] | {key: value}])


def test_every_role_of_a_chain_is_named_and_every_layer_is_on_a_chain():
    for entry in (entry for entry in entries() if "chain" in entry):
        steps = [parse(step) for step in entry["chain"]]
        layers = {r for s in steps if s.kind in ("linear", "glu") for r in s.roles}
        norms = {r for s in steps if s.kind in ("norm", "rms", "rms1") for r in s.roles}
        assert layers == set(entry["linears"]), entry["name"]
        assert norms <= set(entry.get("norms", {})), entry["name"]
        named = {*entry["linears"], *entry.get("norms", {}), *entry.get("matrices", {})}
        assert set(entry.get("optional", ())) <= named, entry["name"]
        assert set(entry.get("layouts", ())) <= set(entry["linears"]), entry["name"]


def test_of_another_width_than_the_language_model_it_is_not_guessed_to_be_of_a_family():
    """What an architecture of its own is declared for is of that family all the same."""
    shapes = {f"multi_modal_projector.linear_{n}.weight": (16, 12 + 4 * (n - 1)) for n in (1, 2)}
    for declared, width, family in (
        ("LlavaForConditionalGeneration", 16, "llava"),
        ("LlavaForConditionalGeneration", 24, "llava"),
        ("OtherForConditionalGeneration", 16, "llava"),
        ("OtherForConditionalGeneration", 24, "unknown"),
    ):
        config = {"architectures": [declared], "text_config": {"hidden_size": width}}
        (projector,) = locate(shapes, config)
        assert projector.family == family
