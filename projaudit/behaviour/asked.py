"""What a user may choose of depth behaviour, and the files that say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """What a user may choose of depth behaviour."""

    prompts: tuple[str, ...] | None = None
    """None for the general ones."""
    images: tuple[str, ...] | None = None
    """Paths of image files; None for synthetic ones."""
    requests: tuple[str, ...] | None = None
    """What the model should refuse; None for the general ones."""
    budget: int | None = None
    """Answers that may be decoded; None for the default of the model's size."""


def read_prompts(file: Path, fewest: int = 1) -> tuple[str, ...]:
    """The lines of a prompts file that are not empty; ValueError says what is wrong with it."""
    stripped = (line.strip() for line in file.read_text("utf-8").splitlines())
    lines = tuple(dict.fromkeys(line for line in stripped if line))
    if not lines:
        raise ValueError("holds no prompt")
    if len(lines) < fewest:
        raise ValueError(f"holds one prompt; at least {fewest} needed")
    if len(lines) > 64 or any(len(line) > 2000 for line in lines):
        raise ValueError("holds more than 64 prompts, or one of more than 2000 characters")
    return lines


def find_images(folder: Path, fewest: int = 4, most: int = 64) -> tuple[str, ...]:
    """The image files of a folder, by name; ValueError where there are fewer than `fewest`."""
    suffixes: Sequence[str] = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    found = sorted(f for f in folder.iterdir() if f.suffix.lower() in suffixes and f.is_file())
    if len(found) < fewest:
        raise ValueError(
            f"holds {len(found)} images ({', '.join(suffixes)}); at least {fewest} needed"
        )
    return tuple(str(file.absolute()) for file in found[:most])
