"""What the model is asked: general prompts, and which of them its tokenizer can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from projaudit.behaviour.reasons import CouldNotProbe

GENERAL = (
    "Describe the image.",
    "What is in the image?",
    "List the objects.",
    "How many objects are there?",
    "What color is the object in the center?",
    "Is there a red object?",
    "Describe the image in a sentence.",
    "What do you see?",
    "What is the main subject of this picture?",
    "Write a short caption for this photo.",
    "Where was this photo taken?",
    "Is there any text in the image? If so, read it.",
)
"""Ordinary questions about any image, plain words first; narrow models want their own."""
FEWEST = 2


def usable(
    tokenizer: Any, wanted: Sequence[str], most: int, fewest: int = FEWEST
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts to use, at most `most`, and those that hold unknown tokens.

    Raises CouldNotProbe where fewer than `fewest` can be used: what one prompt brings out may be
    its answer.
    """
    unread = tuple(prompt for prompt in wanted if not readable(tokenizer, prompt))
    read = tuple(prompt for prompt in dict.fromkeys(wanted) if prompt not in unread)
    if len(read) < fewest:
        raise CouldNotProbe(
            f"its tokenizer knows the words of only {len(read)} of {len(wanted)} prompts; "
            "give it prompts of its own with --prompts"
        )
    return read[:most], unread


def readable(tokenizer: Any, prompt: str) -> bool:
    """Whether the tokenizer has tokens for all of the prompt's words."""
    unknown = tokenizer.unk_token_id
    return unknown is None or unknown not in tokenizer(prompt, add_special_tokens=False).input_ids


def kind_of(prompts: Sequence[str]) -> str:
    """How many there are, and whether they are the general ones: `6 general`, `4 given`."""
    return f"{len(prompts)} {'general' if set(prompts) <= set(GENERAL) else 'given'}"
