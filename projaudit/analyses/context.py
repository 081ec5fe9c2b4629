"""What a projector's metrics read: its update, the probes through it, and what to aim them at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from projaudit.analyses.nearest import NearestTokens
    from projaudit.analyses.responses import Probes
    from projaudit.module import Module
    from projaudit.recipe import Blueprint
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
    blueprints: tuple[Blueprint | None, Blueprint | None] = (None, None)
    """What transformers' module of the target and of the base is built from, where it is run."""

    @cached_property
    def modules(self) -> tuple[Module, Module]:
        """transformers' own module of target and base. Raises Skip where it cannot be run."""
        from projaudit.errors import UnsupportedError
        from projaudit.metrics import Skip
        from projaudit.module import build

        target, base = self.blueprints
        if target is None or base is None or target.recipe != base.recipe:
            raise Skip("the projector's forward path is not known")
        device = self.update.layers[0].before.device
        try:
            return build(target, device), build(base, device)
        except UnsupportedError as error:
            raise Skip(error.message) from None

    @cached_property
    def probes(self) -> Probes:
        """Both projectors on the same inputs, beside random updates. Raises Skip as run_probes."""
        from projaudit.analyses.responses import run_probes
        from projaudit.analyses.sets import run_set_probes

        if any(self.blueprints):
            return run_set_probes(self)
        return run_probes(self.update)

    @cached_property
    def nearest(self) -> NearestTokens:
        """The vocabulary's nearest tokens of the top directions. Raises Skip without a matrix."""
        from projaudit.analyses.nearest import nearest_tokens

        return nearest_tokens(self)
