"""The plan of ranges: which bytes to ask a server for, so that the wanted ones come with few."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Span = tuple[int, int]
"""Start and stop (end exclusive)."""
Data = bytes | bytearray | memoryview

GAP = 1 << 20
"""Bytes between two spans that may be fetched along with them."""
BLOCK = 64 << 20
"""Largest range of one request, in bytes."""
WASTE = 0.05
"""Share of the needed bytes that bridged gaps may add in all."""


def plan_blocks(
    spans: Sequence[Span], *, gap: int = GAP, block: int = BLOCK, waste: float = WASTE
) -> list[Span]:
    """Disjoint ascending ranges (start, stop) that cover the union of the spans.

    No range is longer than `block` bytes. Gaps of at most `gap` bytes are bridged, the shortest
    first, as long as all of them together stay within `waste` times the needed bytes. No byte
    outside the hull of the spans is ever asked for.
    """
    pieces = cut(spans, block)
    gaps = sorted(
        (after[0] - before[1], index)
        for index, (before, after) in enumerate(pairwise(pieces), start=1)
    )
    left = int(waste * sum(stop - start for start, stop in pieces))
    bridged: set[int] = set()
    for length, index in gaps:
        if length > min(gap, left):
            break
        left -= length
        bridged.add(index)
    blocks: list[Span] = []
    for index, (start, stop) in enumerate(pieces):
        if index in bridged and stop - blocks[-1][0] <= block:
            blocks[-1] = blocks[-1][0], stop
        else:
            blocks.append((start, stop))
    return blocks


def cut(spans: Sequence[Span], block: int) -> list[Span]:
    """The union of the spans in disjoint ascending pieces of at most `block` bytes."""
    union: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(stop, union[-1][1])
        else:
            union.append((start, stop))
    return [
        (at, min(at + block, stop)) for start, stop in union for at in range(start, stop, block)
    ]


def put(into: Sequence[bytearray], spans: Sequence[Span], at: int, data: Data) -> None:
    """Copies `data`, which stands at `at` in the file, to where the spans want its bytes."""
    view, end = memoryview(data), at + len(data)
    for target, (start, stop) in zip(into, spans, strict=True):
        a, b = max(start, at), min(stop, end)
        if a < b:
            target[a - start : b - start] = view[a - at : b - at]
