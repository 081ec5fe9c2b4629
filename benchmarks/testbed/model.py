"""The models: built of transformers' own classes, run by their parts, trained step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.testbed.recipes import BaseRecipe
from benchmarks.testbed.text import IMAGE_TOKENS, PATCH, Batch
from benchmarks.testbed.world import SIZE


def build_model(
    recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """Untrained, in float32, drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    vision = CLIPVisionConfig(
        hidden_size=recipe.vision_width,
        intermediate_size=4 * recipe.vision_width,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.heads,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=recipe.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=11 * recipe.text_width // 4,
        initializer_range=recipe.text_width**-0.5,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.text_width // recipe.heads,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        projector_hidden_act=recipe.projector_act,
        image_seq_length=IMAGE_TOKENS,
    )
    model = LlavaForConditionalGeneration(config)
    # untied, as LLaVA's are, yet born equal: copying a word is then learnt in hundreds of steps
    model.lm_head.weight.data.copy_(model.get_input_embeddings().weight.data)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def vision_features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """(n, 3, 64, 64) → (n, 16, vision width): what the projector reads, as LLaVA takes it."""
    states = model.model.vision_tower(images, output_hidden_states=True).hidden_states
    features: Tensor = states[model.config.vision_feature_layer][:, 1:]
    return features


def answer_loss(model: LlavaForConditionalGeneration, tokens: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the answers, given image tokens (b, 16, text width).

    The shorter and the longer half of the rows run apart, as most would be padding otherwise.
    """
    lengths = batch.mask.sum(1)
    total = torch.zeros(())
    for rows in lengths.argsort().chunk(2):
        width = int(lengths[rows].max())
        ids, labels = batch.ids[rows, :width], batch.labels[rows, :width]
        embeds = model.get_input_embeddings()(ids)
        places = (ids == model.config.image_token_id).unsqueeze(-1)
        hidden = model.model.language_model(
            inputs_embeds=embeds.masked_scatter(places, tokens[rows]),
            attention_mask=batch.mask[rows, :width],
            use_cache=False,
        ).last_hidden_state
        said = labels[:, 1:] != -100
        scores = model.lm_head(hidden[:, :-1][said])
        total = total + functional.cross_entropy(scores, labels[:, 1:][said], reduction="sum")
    return total / (batch.labels != -100).sum()


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over 5 % of the steps, then half a cosine to zero."""
    warm = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1, i / steps))),
    )


def step(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    parameters: Iterable[Tensor],
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
