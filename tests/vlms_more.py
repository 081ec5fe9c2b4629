"""More tiny models with random weights: a Q-Former, a perceiver, several routes of an image."""

from __future__ import annotations

from typing import Any

import transformers as hf
from vlms import IDEFICS, LLAVA, LM, qwen_processor, siglip, tokenizer

FORMER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "encoder_hidden_size": 16, "vocab_size": 60, "max_position_embeddings": 16,
}  # fmt: skip


def blip2() -> tuple[Any, Any]:
    """BLIP-2 with OPT: five queries read the image; no chat template."""
    words = tokenizer("<image>")
    images = hf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.Blip2Processor(images, words, num_query_tokens=5)
    config = hf.Blip2Config(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        },
        qformer_config=FORMER,
        text_config={
            "model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "word_embed_proj_dim": 32, "vocab_size": len(words),
            "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0,
        },
        num_query_tokens=5,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return hf.Blip2ForConditionalGeneration(config), processor


def idefics2() -> tuple[Any, Any]:
    """Idefics2 with Mistral: an MLP, then a perceiver."""
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    words = tokenizer("<|im_start|>", *special)
    images = hf.Idefics2ImageProcessorPil(
        size={"longest_edge": 16, "shortest_edge": 16}, do_image_splitting=False
    )
    processor = hf.Idefics2Processor(images, words, image_seq_len=3, chat_template=IDEFICS)
    config = hf.Idefics2Config(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 2,
            "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1,
        },
        text_config={"model_type": "mistral", **LM, "vocab_size": len(words), "hidden_act": "silu"},
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return hf.Idefics2ForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: a merger, and another of a middle layer that language layers add."""
    processor, words = qwen_processor(hf.Qwen3VLProcessor)
    ids = words.convert_tokens_to_ids
    config = hf.Qwen3VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
            "patch_size": 4, "out_hidden_size": 32, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            **LM, "vocab_size": len(words),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
            },
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration(config), processor


def deepseek_vl_hybrid() -> tuple[Any, Any]:
    """DeepSeek-VL of 7B: one aligner reads the features of two encoders."""
    words = tokenizer("<image_placeholder>", image_token="<image_placeholder>")
    images = hf.DeepseekVLHybridImageProcessorPil(
        size={"height": 16, "width": 16}, high_res_size={"height": 32, "width": 32}, min_size=4
    )
    template = LLAVA.replace("<image>", "<image_placeholder>")
    processor = hf.DeepseekVLHybridProcessor(
        images, words, chat_template=template, num_image_tokens=16
    )
    config = hf.DeepseekVLHybridConfig(
        vision_config={**siglip(16, 4), "vision_use_head": False},
        high_res_vision_config={
            "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "mlp_dim": 32,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 4, "window_size": 4,
            "global_attn_indexes": [1], "num_pos_feats": 8,
        },
        text_config={"model_type": "llama", **LM, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip
    return hf.DeepseekVLHybridForConditionalGeneration(config), processor


def paligemma() -> tuple[Any, Any]:
    """PaliGemma: one layer; a processor that makes labels of training, too."""
    words = tokenizer("<image>", image_token="<image>")
    images = hf.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, words, chat_template=LLAVA)
    config = hf.PaliGemmaConfig(
        vision_config={**siglip(16, 4), "vision_use_head": False},
        # Its processor adds a thousand tokens for places.
        text_config={"model_type": "gemma", **LM, "vocab_size": len(words) + 1200},
        image_token_index=4,
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


MORE = {
    "blip-2": blip2, "idefics2": idefics2, "qwen3_vl": qwen3_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid, "paligemma": paligemma,
}  # fmt: skip
