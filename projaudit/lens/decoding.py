"""Which tokens a direction of the outputs points at (ProjLens, shift decoding; docs/lens.md 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from projaudit.lens.result import Decoding, Group

SHOWN = 12
"""Tokens whose frequency is kept."""
FIRST = 5
"""Tokens of an image that count."""
DRAWS = 512
"""Random directions that chance is measured on."""

Space = Literal["LM head", "input embeddings"]


@dataclass(frozen=True)
class Words:
    """The rows that a direction is compared with, and how they are spelled."""

    space: Space
    rows: Tensor
    """(vocabulary, d), fp32: of the LM head as they are, of the embeddings of length 1."""
    spell: Callable[[int], str]


def words_of(space: Space, weight: Tensor, spell: Callable[[int], str]) -> Words:
    """Logits through the LM head are products; embeddings are compared by cosine."""
    rows = weight.detach().float()
    if space == "input embeddings":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    return Words(space, rows, spell)


def first_tokens(words: Words, directions: Tensor, most: int = FIRST) -> Tensor:
    """(n, most): ids of the tokens with the largest rows · v0, for directions (n × d)."""
    scores = directions.to(words.rows) @ words.rows.T
    return scores.topk(min(most, len(words.rows)), dim=-1).indices


def decode(
    words: Words,
    group: Group,
    directions: Tensor,
    common: Tensor,
    *,
    centred: bool,
    target: frozenset[int],
) -> tuple[Decoding, ...]:
    """Both signs of the images' v0 (n × d) and of what they have in common (d,)."""
    found = []
    signs: Sequence[tuple[Literal["+", "-"], float]] = (("+", 1.0), ("-", -1.0))
    for sign, factor in signs:
        rows = first_tokens(words, factor * directions).tolist()
        shared = first_tokens(words, factor * common[None])[0].tolist()
        counts = Counter(token for row in rows for token in row)
        often = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:SHOWN]
        found.append(
            Decoding(
                group=group,
                centred=centred,
                sign=sign,
                space=words.space,
                common=tuple(words.spell(token) for token in shared),
                tokens=tuple(words.spell(token) for token, _ in often),
                shares=tuple(count / len(rows) for _, count in often),
                target_first=_share([row[0] in target for row in rows]) if target else None,
                target_five=_share([not target.isdisjoint(row) for row in rows])
                if target
                else None,
            )
        )
    return tuple(found)


def chance(words: Words, target: frozenset[int], generator: torch.Generator) -> float | None:
    """Share of isotropic random directions with a target token among their first five."""
    if not target:
        return None
    draws = torch.randn(DRAWS, words.rows.shape[1], generator=generator)
    rows = first_tokens(words, draws.to(words.rows.device)).tolist()
    return _share([not target.isdisjoint(row) for row in rows])


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
