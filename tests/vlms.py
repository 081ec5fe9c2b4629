"""Tiny models of several families with random weights, each with its own processor and template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# As their makers write them, without the branches for videos and tools.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + (prefix if loop.first else '') }}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokenizer(*special: str, **named: str) -> Any:
    """One token a byte, and the special ones; `named` are those that processors ask for by name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *special, *letters]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>", *special])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=named,
        model_max_length=1024,
    )


def stills(processor: Any) -> Any:
    """The processor class without its part for videos, which needs torchvision."""
    kept = [name for name in processor.get_attributes() if name != "video_processor"]
    return type(processor.__name__, (processor,), {"get_attributes": classmethod(lambda _: kept)})


def siglip(image: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": patch,
    }


def llava(**text: Any) -> tuple[Any, Any]:
    """LLaVA with CLIP and Llama: 16 image tokens in a 4 × 4 grid."""
    words = tokenizer("<image>", image_token="<image>")
    size = {"height": 32, "width": 32}
    images = hf.CLIPImageProcessorPil(size=size, crop_size=size)
    processor = hf.LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default",
        chat_template=LLAVA, num_additional_image_tokens=1,
    )  # fmt: skip
    vision = {**siglip(32, 8), "model_type": "clip_vision_model", "projection_dim": 16}
    lm = {"model_type": "llama", **LM, "vocab_size": len(words), **text}
    config = hf.LlavaConfig(vision_config=vision, text_config=lm, image_token_index=4)
    return hf.LlavaForConditionalGeneration(config), processor


def qwen_processor(kind: Any) -> tuple[Any, Any]:
    """A processor of that class, and its tokenizer."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(*special, "<|image_pad|>", "<|video_pad|>")
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 8 * 8 * 2, "longest_edge": 8 * 8 * 30},
    )  # fmt: skip
    return stills(kind)(images, words, chat_template=QWEN), words


def qwen2_vl() -> tuple[Any, Any]:
    """Qwen2-VL: as many image tokens as an image is large; rotary positions of three axes."""
    processor, words = qwen_processor(hf.Qwen2VLProcessor)
    ids = words.convert_tokens_to_ids
    config = hf.Qwen2VLConfig(
        vision_config={
            "depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config={
            **LM, "vocab_size": len(words),
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2],
            },
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    """InternVL with Qwen2: tiles of 4 image tokens, and a thumbnail."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    words = tokenizer("<|im_start|>", "<|im_end|>", *named.values(), **named)
    images = hf.GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4
    )
    processor = stills(hf.InternVLProcessor)(
        images, words, image_seq_length=4, chat_template=INTERN
    )
    config = hf.InternVLConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": [16, 16], "patch_size": [4, 4],
        },
        text_config={"model_type": "qwen2", **LM, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """Idefics3 with Llama: tiles named by row and column, and the whole image."""
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    special = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    words = tokenizer("<|im_start|>", *special, *tiles)
    images = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    processor = hf.Idefics3Processor(images, words, image_seq_len=4, chat_template=IDEFICS)
    config = hf.Idefics3Config(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
        text_config={"model_type": "llama", **LM, "vocab_size": len(words)},
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: image tokens see each other both ways, and most layers see a window only."""
    named = {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }  # fmt: skip
    words = tokenizer("<start_of_turn>", "<end_of_turn>", *named.values(), **named)
    images = hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = hf.Gemma3Processor(images, words, image_seq_length=4, chat_template=GEMMA)
    config = hf.Gemma3Config(
        vision_config={**siglip(16, 4), "vision_use_head": False},
        text_config={
            **LM, "vocab_size": len(words), "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
        image_token_id=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        mm_tokens_per_image=4,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava, "qwen2_vl": qwen2_vl, "internvl": internvl, "idefics3": idefics3,
    "gemma3": gemma3,
}  # fmt: skip
# A LLaVA whose language model caps its attention scores, some with attention in one layer of three
# (linear attention or convolutions in the others), and one without any.
LINEAR = {
    "model_type": "qwen3_5_text", "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2,
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "llava_gemma2": {
        "model_type": "gemma2", "sliding_window": 16, "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
    },
    "llava_qwen3_5": {
        **LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "llava_lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
    "llava_linear": {**LINEAR, "layer_types": ["linear_attention"] * 3},
}  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """A model of that family, or a LLaVA with a text model of `TEXTS`, as a repository holds it.

    Its weights are large enough to attend unevenly.
    """
    torch.manual_seed(0)
    model, processor = llava(**TEXTS[family]) if family in TEXTS else FAMILIES[family]()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
