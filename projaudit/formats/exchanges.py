"""What was asked under a probe and what both models answered, ready for a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from itertools import groupby

from projaudit.evidence import Answer, Evidence, Exchange, Picture
from projaudit.formats import said

_MOST = 3
ANSWER = 320
"""Characters of an answer that are shown."""
_KINDS = {
    "image": "a mark on the images",
    "direction": "a push along a direction of the projector's input",
    "amplified": "the projector's update, amplified",
}
Pieces = list[tuple[str, bool]]
"""An inert text in pieces: (piece, whether it is to be marked)."""


@dataclass(frozen=True)
class Row:
    """One answer of an exchange, ready to be shown."""

    image: int
    tuned: Pieces
    in_part: bool
    """It holds the part of the text that is counted, and not all that is shown of it."""
    base: Pieces | None


@dataclass(frozen=True)
class Shown:
    """One probe with some of its answers, by prompt."""

    probe: str
    kind: str
    agreeing: int
    """Answers with the part of the text that is counted."""
    whole: int
    """Of these, those with all of the text."""
    total: int
    shown: int
    prompts: list[tuple[str, list[Row]]]
    pictures: tuple[tuple[str, str], ...]
    """(data URL, caption): the image as it is, then with the probe's mark."""


def exchanges(evidence: Evidence) -> list[Shown]:
    """The first exchanges, each with a sample of its answers in which every prompt is heard."""
    text = evidence.payloads[0].text if evidence.payloads else ""
    return [_shown(evidence, one, text) for one in evidence.exchanges[:_MOST]]


def _shown(evidence: Evidence, exchange: Exchange, text: str) -> Shown:
    sample = said.sample(exchange.answers, text)
    return Shown(
        probe=exchange.probe,
        kind=_KINDS[exchange.kind],
        agreeing=sum(answer.agrees for answer in exchange.answers),
        whole=sum(said.telling(answer, text) == 2 for answer in exchange.answers),
        total=len(exchange.answers),
        shown=len(sample),
        prompts=[
            (said.asked_as(evidence, prompt), [_row(answer, text) for answer in group])
            for prompt, group in groupby(sample, key=lambda answer: answer.prompt)
        ],
        pictures=_pictures(exchange.picture) if exchange.picture else (),
    )


def _row(answer: Answer, text: str) -> Row:
    tuned = said.pieces(answer.tuned, text, ANSWER)
    base = None if answer.base is None else said.pieces(answer.base, text, ANSWER)
    found = any(marked for _, marked in tuned)
    return Row(answer.image + 1, tuned, answer.agrees and not found, base)


def _pictures(of: Picture) -> tuple[tuple[str, str], ...]:
    number = of.image + 1
    return (
        (_data_url(of, "plain"), f"image {number}"),
        (_data_url(of, "marked"), f"image {number} with the mark"),
    )


def _data_url(of: Picture, which: str) -> str:
    """`plain` or `marked`: a PNG that is drawn here from its pixels, whatever they are."""
    from PIL import Image

    out = io.BytesIO()
    Image.frombytes("RGB", (of.side, of.side), of.pixels(which)).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
