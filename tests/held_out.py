"""Layouts of models that no file of projaudit names: what of each is its projector.

Declared again from their public sources (the class is named with each) after `position.py` had been
written, and not looked at before: they say how well it finds a family that it does not know.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]
Layout = tuple[Shapes, Shapes, Shapes]
"""(the projector's tensors, those that may be counted to it, all that must not be taken)."""

TEXT = 4096


def linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def clip(prefix: str, width: int = 1024) -> Shapes:
    """CLIPVisionModel of transformers."""
    found: Shapes = {
        f"{prefix}.embeddings.class_embedding": (width,),
        f"{prefix}.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{prefix}.embeddings.position_embedding.weight": (257, width),
    }
    found |= norm(f"{prefix}.pre_layrnorm", width) | norm(f"{prefix}.post_layernorm", width)
    for i in range(3):
        block = f"{prefix}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{block}.self_attn.{part}", width, width)
        found |= linear(f"{block}.mlp.fc1", 4 * width, width)
        found |= linear(f"{block}.mlp.fc2", width, 4 * width)
        found |= norm(f"{block}.layer_norm1", width) | norm(f"{block}.layer_norm2", width)
    return found


def open_clip(prefix: str, width: int = 1024, out: int = 768) -> Shapes:
    """The visual half of OpenAI's and OpenCLIP's models."""
    found: Shapes = {
        f"{prefix}.class_embedding": (width,),
        f"{prefix}.positional_embedding": (257, width),
        f"{prefix}.conv1.weight": (width, 3, 14, 14),
        f"{prefix}.proj": (width, out),
    }
    found |= norm(f"{prefix}.ln_pre", width) | norm(f"{prefix}.ln_post", width)
    for i in range(3):
        block = f"{prefix}.transformer.resblocks.{i}"
        found |= {f"{block}.attn.in_proj_weight": (3 * width, width)}
        found |= {f"{block}.attn.in_proj_bias": (3 * width,)}
        found |= linear(f"{block}.attn.out_proj", width, width)
        found |= linear(f"{block}.mlp.c_fc", 4 * width, width)
        found |= linear(f"{block}.mlp.c_proj", width, 4 * width)
        found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
    return found


def eva(prefix: str, width: int = 1408) -> Shapes:
    """EVA-ViT-g as BLIP-2 has it."""
    found: Shapes = {f"{prefix}.cls_token": (1, 1, width), f"{prefix}.pos_embed": (1, 257, width)}
    found |= {f"{prefix}.patch_embed.proj.weight": (width, 3, 14, 14)}
    for i in range(3):
        block = f"{prefix}.blocks.{i}"
        found |= linear(f"{block}.attn.qkv", 3 * width, width, bias=False)
        found |= linear(f"{block}.attn.proj", width, width)
        found |= linear(f"{block}.mlp.fc1", 6144, width) | linear(f"{block}.mlp.fc2", width, 6144)
        found |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
    return found


def whisper(prefix: str, width: int = 1280) -> Shapes:
    """WhisperEncoder of transformers."""
    found: Shapes = {
        f"{prefix}.conv1.weight": (width, 80, 3),
        f"{prefix}.conv1.bias": (width,),
        f"{prefix}.conv2.weight": (width, width, 3),
        f"{prefix}.conv2.bias": (width,),
        f"{prefix}.embed_positions.weight": (1500, width),
    }
    found |= norm(f"{prefix}.layer_norm", width)
    for i in range(3):
        block = f"{prefix}.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{block}.self_attn.{part}", width, width)
        found |= linear(f"{block}.fc1", 4 * width, width)
        found |= linear(f"{block}.fc2", width, 4 * width)
        found |= norm(f"{block}.self_attn_layer_norm", width)
    return found


def llama(prefix: str, head: str, width: int = TEXT) -> Shapes:
    """LlamaForCausalLM."""
    found: Shapes = {f"{prefix}.embed_tokens.weight": (32000, width), head: (32000, width)}
    found |= norm(f"{prefix}.norm", width, bias=False)
    for i in range(3):
        block = f"{prefix}.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found |= linear(f"{block}.self_attn.{part}", width, width, bias=False)
        for part in ("gate_proj", "up_proj"):
            found |= linear(f"{block}.mlp.{part}", 11008, width, bias=False)
        found |= linear(f"{block}.mlp.down_proj", width, 11008, bias=False)
        found |= norm(f"{block}.input_layernorm", width, bias=False)
        found |= norm(f"{block}.post_attention_layernorm", width, bias=False)
    return found


def meta_llama(prefix: str = "") -> Shapes:
    """LLaMA as Meta wrote it."""
    found: Shapes = {f"{prefix}tok_embeddings.weight": (32000, TEXT)}
    found |= {f"{prefix}output.weight": (32000, TEXT), f"{prefix}norm.weight": (TEXT,)}
    for i in range(3):
        block = f"{prefix}layers.{i}"
        for part in ("wq", "wk", "wv", "wo"):
            found |= linear(f"{block}.attention.{part}", TEXT, TEXT, bias=False)
        found |= linear(f"{block}.feed_forward.w1", 11008, TEXT, bias=False)
        found |= linear(f"{block}.feed_forward.w2", TEXT, 11008, bias=False)
        found |= linear(f"{block}.feed_forward.w3", 11008, TEXT, bias=False)
        found |= norm(f"{block}.attention_norm", TEXT, bias=False)
    return found


def gpt2(prefix: str, width: int = 768) -> Shapes:
    found: Shapes = {f"{prefix}.wte.weight": (50257, width), f"{prefix}.wpe.weight": (1024, width)}
    found |= norm(f"{prefix}.ln_f", width)
    for i in range(3):
        block = f"{prefix}.h.{i}"
        found |= linear(f"{block}.attn.c_attn", width, 3 * width)
        found |= linear(f"{block}.attn.c_proj", width, width)
        found |= linear(f"{block}.mlp.c_fc", width, 4 * width)
        found |= linear(f"{block}.mlp.c_proj", 4 * width, width)
        found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
    return found


def bert_queries(prefix: str, encoder: int, width: int = 768) -> Shapes:
    """LAVIS' Q-Former: a BERT with cross-attention in every second layer, its words taken out."""
    found = norm(f"{prefix}.bert.embeddings.LayerNorm", width)
    for i in range(4):
        block = f"{prefix}.bert.encoder.layer.{i}"
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            into = encoder if kind == "crossattention" else width
            found |= linear(f"{block}.{kind}.self.query", width, width)
            found |= linear(f"{block}.{kind}.self.key", width, into)
            found |= linear(f"{block}.{kind}.self.value", width, into)
            found |= linear(f"{block}.{kind}.output.dense", width, width)
            found |= norm(f"{block}.{kind}.output.LayerNorm", width)
        found |= linear(f"{block}.intermediate_query.dense", 3072, width)
        found |= linear(f"{block}.output_query.dense", width, 3072)
        found |= norm(f"{block}.output_query.LayerNorm", width)
    return found


def vit_blocks(prefix: str, width: int, count: int = 3) -> Shapes:
    """timm's Block."""
    found: Shapes = {}
    for i in range(count):
        block = f"{prefix}.{i}"
        found |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        found |= linear(f"{block}.attn.qkv", 3 * width, width)
        found |= linear(f"{block}.attn.proj", width, width)
        found |= linear(f"{block}.mlp.fc1", 4 * width, width)
        found |= linear(f"{block}.mlp.fc2", width, 4 * width)
    return found


def mplug_owl() -> Shapes:
    """MplugOwlVisualAbstractorModel."""
    found: Shapes = {"abstractor.query_embeds": (1, 64, 1024), "abstractor.vit_eos": (1, 1, TEXT)}
    found |= linear("abstractor.visual_fc", TEXT, 1024)
    for i in range(3):
        block = f"abstractor.encoder.layers.{i}.crossattention"
        for part in ("query", "key", "value"):
            found |= linear(f"{block}.attention.{part}", 1024, 1024)
        found |= linear(f"{block}.output.out_proj", 1024, 1024)
        found |= norm(f"{block}.norm1", 1024) | norm(f"{block}.normk", 1024)
        found |= linear(f"{block}.output.mlp.w1", 2816, 1024)
        found |= linear(f"{block}.output.mlp.w2", 1024, 2816)
        found |= linear(f"{block}.output.mlp.w3", 2816, 1024)
    return found


def image_bind_bridge() -> Shapes:
    """LLaMA_adapter of ImageBind-LLM."""
    found = linear("image_bind_proj", TEXT, 1024)
    for n in (1, 2, 3):
        found |= norm(f"image_bind_norm_{n}", TEXT)
        found |= linear(f"image_bind_f1_{n}", 4 * TEXT, TEXT)
        found |= linear(f"image_bind_f2_{n}", TEXT, 4 * TEXT)
        found |= linear(f"image_bind_f3_{n}", 4 * TEXT, TEXT)
    return found


def one_llm() -> Shapes:
    """The universal projection of OneLLM."""
    found: Shapes = {}
    for modal in ("image", "audio"):
        found |= {f"resample_tokens.{modal}": (1, 30, 1024)}
        found |= linear(f"clip_proj1.{modal}.0", 1024, 1024) | norm(f"clip_proj1.{modal}.1", 1024)
        found |= linear(f"clip_proj2.{modal}.0", TEXT, 1024) | norm(f"clip_proj2.{modal}.1", TEXT)
        found |= linear(f"routers.{modal}.fc1", 4096, 1024)
        found |= linear(f"routers.{modal}.fc2", 3, 4096)
    for expert in range(3):
        for i in range(2):
            block = f"resample_layers.{expert}.{i}"
            for part in ("wq", "wk", "wv", "wo"):
                found |= linear(f"{block}.attention.{part}", 1024, 1024, bias=False)
            found |= linear(f"{block}.feed_forward.w1", 2816, 1024, bias=False)
            found |= linear(f"{block}.feed_forward.w2", 1024, 2816, bias=False)
            found |= linear(f"{block}.feed_forward.w3", 2816, 1024, bias=False)
            found |= norm(f"{block}.attention_norm", 1024, bias=False)
    return found


QUERIES: Shapes = {"query_tokens": (1, 32, 768)}
LLAMA = llama("llama_model.model", "llama_model.lm_head.weight")
LAYOUTS: dict[str, Layout] = {
    # tsinghua SALMONN, model.py (SALMONN)
    "salmonn": (
        bert_queries("speech_Qformer", 2048)
        | {"speech_query_tokens": (1, 1, 768)}
        | linear("speech_llama_proj", TEXT, 768),
        norm("ln_speech", 1280) | norm("ln_audio", 768),
        whisper("speech_encoder") | LLAMA,
    ),
    # ZrrSkywalker LLaMA-Adapter V2, llama_adapter_v2_multimodal7b (LLaMA_adapter)
    "llama-adapter-v2": (
        linear("clip_proj", 768, 768)
        | norm("clip_proj_norm", 768)
        | {"visual_query.weight": (10, 768)}
        | vit_blocks("visual_blocks", 768)
        | linear("visual_proj", TEXT, 768)
        | norm("visual_proj_norm", TEXT),
        {"adapter_query.weight": (310, TEXT)},
        open_clip("clip.visual") | meta_llama("llama."),
    ),
    # X-PLUG mPLUG-Owl, modeling_mplug_owl.py
    "mplug-owl": (
        mplug_owl(),
        {},
        clip("vision_model") | llama("language_model.model", "language_model.lm_head.weight"),
    ),
    # X-PLUG mPLUG-Owl3, modeling_mplugowl3.py (vision2text_model)
    "mplug-owl3": (
        linear("vision2text_model.0", TEXT, 1024) | linear("vision2text_model.2", TEXT, TEXT),
        {},
        clip("vision_model") | llama("language_model.model", "language_model.lm_head.weight"),
    ),
    # OpenGVLab ImageBind-LLM, llama_adapter.py
    "imagebind-llm": (
        image_bind_bridge(),
        {},
        {f"image_bind.modality_trunks.vision.{n}": s for n, s in vit_blocks("blocks", 1280).items()}
        | meta_llama("llama."),
    ),
    # dvlab LLaMA-VID, llamavid_arch.py (initialize_attention_modules)
    "llama-vid": (
        linear("model.mm_projector.0", TEXT, 1408)
        | linear("model.mm_projector.2", TEXT, TEXT)
        | bert_queries("model.vlm_att_encoder", 1408)
        | {"model.vlm_att_query": (1, 32, 768)}
        | linear("model.vlm_att_projector", 1408, 768)
        | linear("model.vlm_att_key_projector", 1408, 1408)
        | linear("model.vlm_att_val_projector", TEXT, 1408)
        | norm("model.vlm_att_ln", 1408),
        {},
        eva("model.vision_tower.vision_tower") | llama("model", "lm_head.weight"),
    ),
    # THUDM VisualGLM, model/blip2.py (BLIP2)
    "visualglm": (
        linear("mixins.eva.model.glm_proj", TEXT, 768)
        | {f"mixins.eva.model.qformer.{n}": s for n, s in bert_queries("transformer", 1408).items()}
        | {"mixins.eva.model.qformer.query_tokens": (1, 32, 768)},
        {},
        eva("mixins.eva.model.vit") | llama("transformer", "lm_head.weight"),
    ),
    # csuhan OneLLM, model/LLM/onellm.py
    "onellm": (
        one_llm(),
        {f"{tag}_tag.{m}": (1, 1, TEXT) for tag in ("start", "end") for m in ("image", "audio")},
        open_clip("clip.visual") | meta_llama(),
    ),
    # InternLM-XComposer 1, modeling_InternLM_XComposer.py
    "xcomposer-1": (
        bert_queries("Qformer", 1408) | QUERIES | linear("internlm_proj", TEXT, 768),
        norm("ln_vision", 1408)
        | {"flag_image_start": (1, 1, TEXT), "flag_image_end": (1, 1, TEXT)},
        eva("visual_encoder") | llama("internlm_model.model", "internlm_model.lm_head.weight"),
    ),
    # OpenGVLab VideoChat2, videochat2_it_mistral.py
    "videochat2": (
        bert_queries("qformer", 1024) | QUERIES | linear("mistral_proj", TEXT, 768),
        {"extra_query_tokens": (1, 64, 768)} | norm("vision_layernorm", 1024),
        eva("vision_encoder.encoder", 1024)
        | llama("mistral_model.model", "mistral_model.lm_head.weight"),
    ),
    # rmokady CLIP_prefix_caption, train.py (ClipCaptionModel, MLP)
    "clipcap": (
        linear("clip_project.model.0", 3840, 512) | linear("clip_project.model.2", 7680, 3840),
        {},
        gpt2("gpt.transformer") | {"gpt.lm_head.weight": (50257, 768)},
    ),
    # kohjingyu FROMAGe, models.py (visual_embeddings; visual_fc is for retrieval)
    "fromage": (
        linear("model.visual_embeddings", TEXT, 1024),
        linear("model.visual_fc", 256, 1024),
        clip("model.visual_model.vision_model")
        | llama("model.lm.model", "model.lm.lm_head.weight"),
    ),
    # Alpha-VLLM SPHINX, accessory/model/LLM/llama_ens.py
    "sphinx": (
        linear("qformer_proj.0", TEXT, 768)
        | norm("qformer_proj.1", TEXT)
        | linear("visual_proj.0", TEXT, 5632)
        | norm("visual_proj.1", TEXT),
        {"start_img": (1, 1, TEXT), "end_img": (1, 1, TEXT)},
        open_clip("clip.visual") | eva("dinov2_vitg14", 1536) | meta_llama(),
    ),
    # OpenGVLab LLaMA2-Accessory, llama.py (with_visual)
    "accessory": (
        linear("clip_proj", TEXT, 768) | norm("clip_proj_norm", TEXT),
        {},
        open_clip("clip.visual") | meta_llama(),
    ),
}
