"""What a user wants of the lens: the options, checked and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from projaudit.behaviour import asked
from projaudit.errors import FormatError, UsageError
from projaudit.inert import clean
from projaudit.lens.triggers import parse_trigger
from projaudit.strict import load_json

MOST_IMAGES = 512
"""Of a folder; the answer of the process that looks at them has a limit."""
LABELS_LIMIT = 16 << 20

Ranks = Literal["cumulative", "single"]


@dataclass(frozen=True)
class Wish:
    """What a user may choose of the lens."""

    images: Path
    """A folder of clean images."""
    trigger: str | None = None
    """A spec that is laid over them."""
    triggered: Path | None = None
    """A folder of triggered images instead."""
    target_text: str | None = None
    prompts: Path | None = None
    labels: Path | None = None
    """JSON: file name -> [question, right answer]."""
    images_per_cell: int = 16
    """Of each group; 0: no heat maps."""
    most: int = 8
    """Largest k of the heat maps."""
    ranks: tuple[Ranks, ...] = ("cumulative",)
    bias: tuple[bool, ...] = (True,)
    answer_tokens: int = 30


def asked_of(wish: Wish) -> dict[str, Any]:
    """What the process is asked, of the options; UsageError names the one that is wrong."""

    def wrong(option: str, message: str, file: Path | None = None) -> UsageError:
        place = None if file is None else clean(file)
        return UsageError(message, option, file=place, field=f"--{option}")

    def read(option: str, path: Path | None, function: Callable[[Path], Any]) -> Any:
        try:
            return None if path is None else function(path)
        except (OSError, ValueError) as error:
            raise wrong(option, clean(getattr(error, "strerror", None) or error), path) from None

    if wish.trigger is not None and wish.triggered is not None:
        raise wrong("trigger", "is given beside --triggered; one of them is enough")
    for option, value, low, high in (
        ("images-per-cell", wish.images_per_cell, 0, MOST_IMAGES),
        ("max-rank", wish.most, 1, 64),
        ("answer-tokens", wish.answer_tokens, 1, 512),
    ):
        if not low <= value <= high:
            raise wrong(option, f"{value} is not between {low} and {high}")
    if wish.target_text is not None and not wish.target_text.strip():
        raise wrong("target-text", "is empty")
    said = []

    def images(option: str, folder: Path | None) -> Any:
        files = read(option, folder, lambda f: asked.find_images(f, 1, MOST_IMAGES + 1))
        if files is not None and len(files) > MOST_IMAGES:
            said.append(f"of --{option} the first {MOST_IMAGES} images by name were taken")
        return None if files is None else list(files[:MOST_IMAGES])

    prompts = read("prompts", wish.prompts, asked.read_prompts)
    return {
        "images": images("images", wish.images),
        "triggered": images("triggered", wish.triggered),
        "trigger": None if wish.trigger is None else str(parse_trigger(wish.trigger)),
        "target": wish.target_text,
        "prompts": None if prompts is None else list(prompts),
        "labels": read("labels", wish.labels, _labels) or {},
        "per_cell": wish.images_per_cell,
        "most": wish.most,
        "maps": [[ranks, bias] for ranks in wish.ranks for bias in wish.bias],
        "length": wish.answer_tokens,
        "said": said,
    }


def _labels(file: Path) -> dict[str, list[str]]:
    try:
        content = load_json(file.read_bytes(), file=str(file), limit=LABELS_LIMIT)
    except FormatError as error:
        raise ValueError(error.message) from None
    pairs = content.items() if isinstance(content, dict) else ()
    for name, pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise ValueError(f"{name!r} has no [question, answer]")
    if not pairs:
        raise ValueError("is no JSON object of file name -> [question, answer]")
    return dict(pairs)


def options_of(wish: Wish) -> dict[str, Any]:
    """The options as they go into the report; paths as they were typed."""
    return {
        "images": str(wish.images),
        "triggered": None if wish.triggered is None else str(wish.triggered),
        "prompts": None if wish.prompts is None else str(wish.prompts),
        "labels": None if wish.labels is None else str(wish.labels),
        "images-per-cell": wish.images_per_cell,
        "max-rank": wish.most,
        "ranks": list(wish.ranks),
        "bias": ["on" if bias else "off" for bias in wish.bias],
        "answer-tokens": wish.answer_tokens,
    }
