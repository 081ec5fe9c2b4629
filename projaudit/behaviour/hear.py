"""Depth behaviour from the outside: what is asked, and what was heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from projaudit.behaviour import sandbox
from projaudit.behaviour.able import SMALL, parameters, weight_files
from projaudit.behaviour.asked import Asked
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.stage import to_download
from projaudit.behaviour.staged import Part, host, staged
from projaudit.checkpoint import Checkpoint
from projaudit.evidence import Evidence, from_plain

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BUDGET, BUDGET_LARGE = 16_500, 4_600
"""Answers of small and of large models where the user does not say: no plan takes more."""


def budget_of(checkpoint: Checkpoint, asked: Asked) -> int:
    """The answers that may be decoded."""
    if asked.budget is not None:
        return asked.budget
    return BUDGET if parameters(checkpoint) <= SMALL else BUDGET_LARGE


def announce(checkpoint: Checkpoint, asked: Asked, device: torch.device) -> str:
    """One line on what depth behaviour will download and do."""
    download = to_download(checkpoint.source, weight_files(checkpoint))
    first = f"download {download / 1e9:.2g} GB, then " if download else ""
    answers = budget_of(checkpoint, asked)
    return (
        f"depth behaviour will {first}run the language model on {device} for up to {answers:,} "
        "answers (--depth weights does without)"
    )


def hear(
    target: Part,
    base: Part | None,
    asked: Asked,
    *,
    other_model: bool,
    device: torch.device,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> Evidence:
    """What the tuned projector makes the target's model say, and the base does not.

    `other_model` says that more than the projector differs: the base's own model then answers for
    the base. Raises CouldNotProbe with a reason, and what reading the sources raises.
    """
    with staged(target, base, other_model=other_model, device=device, seed=seed) as run:
        answer = sandbox.run(
            run.request | questions(host(target, base), asked), **run.limits, progress=progress
        )
    return told(Evidence, answer)


def questions(part: Part, asked: Asked) -> dict[str, Any]:
    """What the process is asked, beside the model: prompts, images, requests, most answers."""
    return {
        "prompts": None if asked.prompts is None else list(asked.prompts),
        "images": None if asked.images is None else list(asked.images),
        "requests": None if asked.requests is None else list(asked.requests),
        "budget": budget_of(part.checkpoint, asked),
    }


def told(kind: type[T], answer: object) -> T:
    """What the process answered, as a value of that type; CouldNotProbe where it is none."""
    try:
        found: T = from_plain(kind, answer)
        if isinstance(found, Evidence) and any(p.strength < 0 for p in found.payloads):
            raise ValueError("a strength is negative")
    except (ValueError, OverflowError) as error:  # an integer that no float can hold
        raise CouldNotProbe(f"the process that ran it answered nonsense: {error}") from None
    return found
