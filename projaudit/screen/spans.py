"""Where system, image, question and answer stand among a sample's tokens, by its own processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from projaudit.errors import UnsupportedError
from projaudit.screen.samples import NoSample, Sample

SYSTEM, VISION, TEXT, ANSWER = range(4)
# No template knows it, and questions hardly: what changes where it stands is what was replaced.
_MARK = "\ue000\ue001\ue000"


@dataclass(frozen=True)
class Rendered:
    """A sample as its chat template writes it, and the characters of its parts."""

    text: str
    question: tuple[tuple[int, int], ...]
    """(start, end) of the question's texts."""
    answer: tuple[int, int]


@dataclass(frozen=True)
class Spans:
    """What each token of a sequence is, and which rows of attention are wanted of it."""

    kinds: npt.NDArray[np.int8]
    """(tokens,): SYSTEM (instruction, roles, separators and whatever is none of the others),
    VISION (one an image feature), TEXT (the question) or ANSWER."""
    first: int
    """The last token before the answer, whose row predicts the first of it: position 0."""
    targets: tuple[int, ...]
    """The token that each position predicts: the answer's tokens and the one that ends it."""

    @property
    def width(self) -> int:
        """Tokens that matter: none behind the last wanted row changes it."""
        return self.first + len(self.targets)


@dataclass(frozen=True)
class Batch:
    """Samples as a model takes them, padded on the right."""

    inputs: Any
    """What the processor made: `input_ids`, `attention_mask`, pixels, …"""
    samples: tuple[Sample, ...]
    spans: tuple[Spans, ...]


def encode(
    processor: Any, samples: Sequence[Sample], image_token: int, positions: int, longest: int
) -> tuple[Batch | None, list[tuple[Sample, NoSample]]]:
    """The samples as a batch, cut behind the last row that is wanted of any; and those left out.

    At most `positions` rows of a sample are wanted, and `longest` tokens are taken. Whatever a
    processor raises for a sample (a template that refuses it, an image that is too thin, words
    that are its own special tokens) is `unprocessable`.
    """
    kept: list[tuple[Sample, Rendered]] = []
    refused = []
    for sample in samples:
        try:
            kept.append((sample, render(processor, sample)))
        except NoSample as why:
            refused.append((sample, why))
    try:
        inputs: Any = _processed(processor, kept) if kept else None
    except NoSample:
        for pair in list(kept):
            try:
                _processed(processor, [pair])
            except NoSample as why:
                kept.remove(pair)
                refused.append((pair[0], why))
        inputs = _processed(processor, kept) if kept else None
    found = []
    for place, (sample, rendered) in enumerate(kept):
        ids = inputs["input_ids"][place][inputs["attention_mask"][place].bool()].tolist()
        try:
            span = locate(processor, rendered, ids, image_token, positions)
            if span.width > longest:
                raise NoSample("too-long", f"{span.width:,} tokens, above {longest:,}")
            found.append((place, sample, span))
        except NoSample as why:
            refused.append((sample, why))
    if not found:
        return None, refused
    if len(found) < len(samples) and len(found) < len(kept):
        # Pixels do not belong to rows one by one, so what goes on is processed again.
        inputs = _processed(processor, [kept[place] for place, _, _ in found])
    spans = tuple(span for _, _, span in found)
    _cut(inputs, max(span.width for span in spans))
    return Batch(inputs, tuple(sample for _, sample, _ in found), spans), refused


def render(processor: Any, sample: Sample) -> Rendered:
    """The sample in the processor's chat template, up to the end of its first answer.

    A part's characters are where the rendering changes if a mark takes the part's place, so that
    no template has to be known. Raises NoSample (`unprocessable`).
    """
    text = _template(processor, sample)

    def place(other: Sample) -> tuple[int, int]:
        return _changed(text, _template(processor, other))

    answer = place(replace(sample, answer=_MARK))
    if answer[0] >= answer[1]:
        raise NoSample("unprocessable", "its chat template leaves the answer out")
    question = []
    if sample.before:
        question.append(place(replace(sample, before=_MARK)))
    if sample.after:
        question.append(place(replace(sample, after=_MARK)))
    return Rendered(text, tuple(question), answer)


def locate(
    processor: Any, rendered: Rendered, ids: Sequence[int], image_token: int, positions: int
) -> Spans:
    """The spans among the ids that the processor made of a rendered sample, without padding.

    A processor writes the image's tokens in place of the template's one, and changes nothing before
    and behind it. So the rendered text's own tokens, whose characters are known, are met again at
    both ends of the ids. Raises NoSample (`unprocessable`).
    """
    own = _tokens(processor, rendered.text)
    offsets, plain = own["offset_mapping"], own["input_ids"]
    head = _common(plain, ids)
    tail = _common(plain[head:][::-1], ids[head:][::-1])
    kinds = np.full(len(ids), SYSTEM, np.int8)
    for number, (start, end) in enumerate(offsets):
        if head <= number < len(plain) - tail:
            continue
        place = number if number < head else number + len(ids) - len(plain)
        for kind, spans in ((TEXT, rendered.question), (ANSWER, (rendered.answer,))):
            if any(start < last and end > first for first, last in spans):
                kinds[place] = kind
    kinds[np.asarray(ids) == image_token] = VISION
    answers = np.flatnonzero(kinds == ANSWER)
    if not len(answers) or answers[0] == 0:
        raise NoSample("unprocessable", "its answer is not found among its tokens")
    if not (kinds[: answers[0]] == VISION).any():
        raise NoSample("unprocessable", "its processor makes no image tokens of its image")
    first = int(answers[0]) - 1
    end = min(int(answers[-1]) + 2, first + 1 + positions)
    return Spans(kinds, first, tuple(ids[first + 1 : end]))


def _template(processor: Any, sample: Sample) -> str:
    def said(role: str, *parts: dict[str, str]) -> dict[str, Any]:
        return {"role": role, "content": list(parts)}

    def text(words: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": words}] if words else []

    asked = [*text(sample.before), {"type": "image"}, *text(sample.after)]
    turns = [said("user", *asked), said("assistant", *text(sample.answer))]
    if sample.system:
        turns.insert(0, said("system", *text(sample.system)))
    try:
        return str(processor.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template is a program, and may refuse
        raise NoSample("unprocessable", f"its chat template refuses it: {error}") from None


def _changed(text: str, other: str) -> tuple[int, int]:
    """The characters of `text` between what it shares with `other` at both ends."""
    head = _common(text, other)
    return head, len(text) - _common(text[head:][::-1], other[head:][::-1])


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first items are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _tokens(processor: Any, text: str) -> Any:
    try:
        return processor.tokenizer(text, return_offsets_mapping=True, **_special(processor, text))
    except NotImplementedError:
        says = "its tokenizer does not say which characters its tokens are"
        raise UnsupportedError(says, "model") from None


def _special(processor: Any, text: str) -> dict[str, bool]:
    """As `apply_chat_template(tokenize=True)` does: no second start where the template has one."""
    start = processor.tokenizer.bos_token
    return {"add_special_tokens": not (start and text.startswith(start))}


def _processed(processor: Any, kept: Sequence[tuple[Sample, Rendered]]) -> Any:
    texts = [rendered.text for _, rendered in kept]
    try:
        inputs = processor(
            text=texts,
            images=[[sample.image] for sample, _ in kept],
            padding=True,
            # What stands behind a row never changes it, so rows keep the places they have alone.
            padding_side="right",
            return_tensors="pt",
            **_special(processor, texts[0]),
        )
    except Exception as error:  # processors raise whatever an odd image or text makes them
        says = f"its processor refuses it: {type(error).__name__}: {error}"
        raise NoSample("unprocessable", says) from None
    if not inputs["attention_mask"][:, 0].all():
        raise UnsupportedError("its processor pads on the left, whatever it is told", "model")
    return inputs


def _cut(inputs: Any, width: int) -> None:
    """Leaves out, in place, the columns behind the last that matters."""
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if getattr(value, "shape", None) == shape and not value.is_floating_point():
            inputs[name] = value[:, :width]
