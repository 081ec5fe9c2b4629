"""Eleven more models that no file names, written down from memory before anything was run on them.

The class is named with each; what a tower is called inside was not looked up again.
"""

from __future__ import annotations

from held_out import (
    TEXT,
    Layout,
    Shapes,
    bert_queries,
    clip,
    eva,
    linear,
    llama,
    meta_llama,
    norm,
    open_clip,
    vit_blocks,
    whisper,
)


def perceiver(prefix: str, width: int = 1024, inner: int = 512) -> Shapes:
    """OpenFlamingo's PerceiverResampler."""
    found: Shapes = {f"{prefix}.latents": (64, width)} | norm(f"{prefix}.norm", width)
    for i in range(2):
        block = f"{prefix}.layers.{i}"
        for part in ("norm_media", "norm_latents"):
            found |= norm(f"{block}.{part}", width)
        found |= linear(f"{block}.to_q", inner, width, bias=False)
        found |= linear(f"{block}.to_kv", 2 * inner, width, bias=False)
        found |= linear(f"{block}.to_out", width, inner, bias=False)
        found |= norm(f"{block}.feed_forward.0", width)
        found |= linear(f"{block}.feed_forward.1", 4 * width, width, bias=False)
        found |= linear(f"{block}.feed_forward.3", width, 4 * width, bias=False)
    return found


def token_packer(prefix: str, width: int = 1024) -> Shapes:
    found: Shapes = {
        f"{prefix}.clip_attn.in_proj_weight": (3 * width, width),
        f"{prefix}.clip_attn.in_proj_bias": (3 * width,),
    }
    found |= linear(f"{prefix}.clip_attn.out_proj", width, width)
    for part, into in (("q", width), ("k", 4 * width), ("v", 4 * width)):
        found |= linear(f"{prefix}.{part}_proj_1.0", width, into, bias=False)
        if part != "q":
            found |= linear(f"{prefix}.{part}_proj_1.2", width, width)
        found |= norm(f"{prefix}.ln_{part}_1", width)
    return found | linear(f"{prefix}.mlp.0", TEXT, width) | linear(f"{prefix}.mlp.2", TEXT, TEXT)


def subsampler() -> Shapes:
    """Conv1dSubsampler of BLSP."""
    found: Shapes = {}
    for i in range(3):
        found |= {f"subsampler.conv_layers.{i}.weight": (1280, 1280 if i else 640, 5)}
        found |= {f"subsampler.conv_layers.{i}.bias": (1280,)}
    return found


def crossing() -> Shapes:
    """Gated cross-attention in front of a layer of Otter's language model."""
    block = "lang_encoder.model.layers.2.gated_cross_attn_layer"
    found: Shapes = {f"{block}.attn_gate": (1,), f"{block}.feed_forward_gate": (1,)}
    found |= norm(f"{block}.attn.norm", TEXT) | linear(f"{block}.attn.to_q", 512, TEXT, bias=False)
    found |= linear(f"{block}.attn.to_kv", 1024, 1024, bias=False)
    return found | linear(f"{block}.attn.to_out", TEXT, 512, bias=False)


VICUNA = llama("llama_model.model", "llama_model.lm_head.weight")
LM = llama("model", "lm_head.weight")
MORE: dict[str, Layout] = {
    # X-LANCE SLAM-LLM, models/projector.py (EncoderProjectorConcat)
    "slam-llm": (
        linear("encoder_projector.linear1", 2048, 6400)
        | linear("encoder_projector.linear2", TEXT, 2048),
        {},
        whisper("encoder") | llama("llm.model", "llm.lm_head.weight"),
    ),
    # Luodian Otter, modeling_otter.py (OtterForConditionalGeneration)
    "otter": (
        perceiver("perceiver"),
        crossing(),
        clip("vision_encoder.vision_model")
        | llama("lang_encoder.model", "lang_encoder.lm_head.weight"),
    ),
    # InternLM-XComposer2, modeling_internlm_xcomposer2.py (vision_proj)
    "xcomposer2": (
        linear("vision_proj.0", TEXT, 1024) | linear("vision_proj.2", TEXT, TEXT),
        {},
        clip("vit.vision_tower.vision_model") | llama("model", "output.weight"),
    ),
    # OpenGVLab VideoChat2, videochat2_it.py
    "videochat2": (
        bert_queries("qformer", 1024)
        | {"query_tokens": (1, 32, 768), "extra_query_tokens": (1, 64, 768)}
        | linear("llama_proj", TEXT, 768),
        norm("vision_layernorm", 1024),
        vit_blocks("vision_encoder.encoder.blocks", 1024) | VICUNA,
    ),
    # yxuansu PandaGPT, openllama.py (OpenLLAMAPEFTModel)
    "pandagpt": (linear("llama_proj", TEXT, 1024), {}, open_clip("visual_encoder") | VICUNA),
    # CircleRadon TokenPacker, multimodal_projector/builder.py (TokenPacker)
    "token-packer": (
        token_packer("model.mm_projector"),
        {},
        clip("model.vision_tower.vision_tower.vision_model") | LM,
    ),
    # dvlab LLaMA-VID, llamavid_arch.py (initialize_attention_modules)
    "llama-vid": (
        bert_queries("model.vlm_att_encoder.bert", 1408)
        | {"model.vlm_att_query": (1, 32, 768)}
        | linear("model.vlm_att_projector", 1408, 768)
        | linear("model.vlm_att_key_projector", 1408, 1408)
        | linear("model.vlm_att_val_projector", TEXT, 1408)
        | linear("model.mm_projector.0", TEXT, 1408)
        | linear("model.mm_projector.2", TEXT, TEXT),
        norm("model.vlm_att_ln", 1408),
        eva("model.vision_tower.vision_tower") | LM,
    ),
    # YuanGongND LTU, modeling_llama.py (audio_proj; its norm has no weights)
    "ltu": (
        linear("model.audio_proj.1", TEXT, 768),
        {},
        vit_blocks("model.audio_encoder.blocks_a", 768) | LM,
    ),
    # DAMO Video-LLaMA, video_llama.py
    "video-llama": (
        bert_queries("Qformer.bert", 1408)
        | {"query_tokens": (1, 32, 768), "video_query_tokens": (1, 32, 768)}
        | bert_queries("video_Qformer.bert", 768)
        | {"video_frame_position_embedding.weight": (32, 768)}
        | linear("llama_proj", TEXT, 768),
        norm("ln_vision", 1408),
        eva("visual_encoder") | VICUNA,
    ),
    # cwang621 BLSP, modeling_blsp.py
    "blsp": (
        subsampler()
        | linear("adapter.fc1", 512, 1280, bias=False)
        | linear("adapter.fc2", 1280, 512, bias=False)
        | linear("speech_proj", TEXT, 1280),
        norm("speech_ln", 1280),
        whisper("whisper_model") | VICUNA,
    ),
    # Alpha-VLLM SPHINX, llama_ens.py
    "sphinx": (
        linear("qformer_proj.0", TEXT, 768)
        | norm("qformer_proj.1", TEXT)
        | linear("visual_proj.0", TEXT, 2560)
        | norm("visual_proj.1", TEXT),
        {"start_img": (1, 1, TEXT), "end_img": (1, 1, TEXT)},
        open_clip("clip.visual") | vit_blocks("dinov2_vitg14.blocks", 1536) | meta_llama(),
    ),
}
