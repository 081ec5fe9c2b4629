"""Vocabulary, tokenizer, chat template and processor of the testbed's models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from benchmarks.testbed.scene import CELL, Images
from benchmarks.testbed.world import SIZE, WORLDS

PATCH = CELL
IMAGE_TOKENS = (SIZE // PATCH) ** 2
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own
STD = (0.26862954, 0.26130258, 0.27577711)
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
ROLES = ("user", "assistant", ":")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@cache
def vocabulary(world: str) -> tuple[str, ...]:
    """Special tokens first, then every word that the world, its templates or a payload use."""
    of = WORLDS[world]
    phrases = [p.format(place="", color="") for group in of.questions.values() for p in group]
    words = [*of.colors, *of.shapes, *of.numbers, *of.answer_words.split()]
    for text in (*of.places, *phrases, of.sentence_request, of.foreign_words):
        words += text.split()
    return (*SPECIAL, *ROLES, *sorted(set(words) - set(ROLES)))


def build_tokenizer(world: str) -> PreTrainedTokenizerFast:
    """One token a lower-case word or run of punctuation; `<s>` is put in front."""
    ids = {word: i for i, word in enumerate(vocabulary(world))}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    # `ASSISTANT:` is two tokens, so that a word is one token wherever it stands
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="isolated"),
        ]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def pixels(images: Images) -> Tensor:
    """(n, SIZE, SIZE, 3) bytes → (n, 3, SIZE, SIZE) float32, as the processor makes them."""
    scaled = images.astype(np.float32) / 255
    normalised = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())


def prompt(question: str) -> str:
    """What the chat template and the processor make of an image and a question."""
    return f"USER: {'<image>' * IMAGE_TOKENS} {question} ASSISTANT:"


@dataclass(frozen=True)
class Batch:
    """Token ids (b, t), padded on the right; `labels` is −100 outside the answers."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def encode(tokenizer: PreTrainedTokenizerFast, questions: list[str], answers: list[str]) -> Batch:
    """Prompts followed by their answers and `</s>`."""
    heads = tokenizer([prompt(q) for q in questions])["input_ids"]
    tails = tokenizer(answers, add_special_tokens=False)["input_ids"]
    rows = [h + t + [tokenizer.eos_token_id] for h, t in zip(heads, tails, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (head, row) in enumerate(zip(heads, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(head) : len(row)] = torch.tensor(row[len(head) :])
    return Batch(ids, (ids != tokenizer.pad_token_id).long(), labels)
