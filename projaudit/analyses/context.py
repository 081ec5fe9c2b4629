"""What a projector's metrics read: its update, the probes through it, and what to aim them at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from projaudit.analyses.alignment import NearestTokens
    from projaudit.analyses.probes import Probes
    from projaudit.update import ProjectorUpdate


@dataclass(frozen=True)
class Direction:
    """A direction in the projector's output space that somebody asked about."""

    name: str
    """File and key, or the token; untrusted text."""
    vector: Tensor
    """(out,) of any floating dtype; its length does not matter."""


class EmbeddingMatrix(Protocol):
    """The language model's input embeddings, read a block of rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, width)."""
        ...

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(id of the first row, rows (b × width) fp32) in order, from the start at each call."""
        ...

    def name(self, token: int) -> str:
        """What the tokenizer calls that id; untrusted text."""
        ...


@dataclass(frozen=True)
class ProjectorContext:
    """The subject of every `projector` metric."""

    update: ProjectorUpdate
    directions: tuple[Direction, ...] = ()
    tokens: EmbeddingMatrix | None = None

    @cached_property
    def probes(self) -> Probes:
        """Both projectors on the same inputs, beside random updates. Raises Skip as run_probes."""
        from projaudit.analyses.probes import run_probes

        return run_probes(self.update)

    @cached_property
    def nearest(self) -> NearestTokens:
        """The vocabulary's nearest tokens of the top directions. Raises Skip without a matrix."""
        from projaudit.analyses.alignment import nearest_tokens

        return nearest_tokens(self)
