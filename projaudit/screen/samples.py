"""The samples of a fine-tuning set: an image, a question and its answer, or why there is none."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from projaudit.errors import FormatError, NotFoundError
from projaudit.inert import clean
from projaudit.screen.tables import Form, Table, open_table

PIXELS = 50_000_000
"""Of the largest image that is decoded."""
FILE_LIMIT = 64 << 20
"""Bytes of an image file."""
TEXT_LIMIT = 100_000
"""Characters of the question, the system prompt or the answer."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What is decoded: Pillow has many more readers, and some of them start programs."""
PLACEHOLDER = "<image>"
"""Where LLaVA's files have the image in a question."""
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


class NoSample(Exception):
    """Why a row cannot be profiled: a status and a line on it."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = clean(detail)


@dataclass(frozen=True)
class Sample:
    """One row: its first question about its image, and the answer to that."""

    number: int
    """Its place in the dataset, from 0."""
    id: str
    """The dataset's own, else its number."""
    status: str = "ok"
    """Else the code of what is wrong with it; then there is nothing below but `detail`."""
    detail: str = ""
    image: Any = None
    """A Pillow image, RGB."""
    system: str = ""
    before: str = ""
    """What stands before the image in the question."""
    after: str = ""
    """What stands after it."""
    answer: str = ""
    later_answers: int = 0
    """Answers of later turns, which are not looked at."""


@dataclass(frozen=True)
class Dataset:
    """A table of rows, and the folder that its image paths must stay within."""

    table: Table
    images: Path

    @property
    def name(self) -> str:
        """As typed, or `org/name@commit`."""
        return self.table.name

    @property
    def digest(self) -> str:
        """Of the rows; images that lie in files of their own are not in it."""
        return self.table.digest

    @property
    def form(self) -> Form:
        """How the rows are stored."""
        return self.table.form

    def __len__(self) -> int:
        return len(self.table.rows)

    def row(self, number: int) -> object:
        """The row as it is stored, images neither decoded nor opened; may raise FormatError."""
        return self.table.rows[number]

    def sample(self, number: int) -> Sample:
        """The sample of a row; whatever is wrong with it is its status, never an error."""
        name = str(number)
        try:
            row = self.row(number)
            if not isinstance(row, Mapping):
                raise NoSample("unreadable", "the row is no object")
            own = row.get("id")
            if isinstance(own, str | int) and not isinstance(own, bool) and own != "":
                name = clean(own, 200)
            return self._read(number, name, row)
        except NoSample as why:
            return Sample(number, name, why.status, why.detail)
        except FormatError as error:
            return Sample(number, name, "unreadable", clean(error.message))

    def texts(self, number: int) -> tuple[str, str]:
        """The question, without its image, and the answer of a row; empty where it has none."""
        try:
            row = self.row(number)
            turns = _turns(row) if isinstance(row, Mapping) else []
        except (NoSample, FormatError):
            return "", ""
        asked = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
        said = next((text for role, text in turns[asked:] if role == "assistant"), "")
        question = turns[asked][1].replace(PLACEHOLDER, " ") if asked < len(turns) else ""
        return question.strip()[:TEXT_LIMIT], said.strip()[:TEXT_LIMIT]

    def _read(self, number: int, name: str, row: Mapping[str, Any]) -> Sample:
        turns = _turns(row)
        question = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if question is None:
            raise NoSample("unreadable", "nobody asks anything in it")
        answers = [text for role, text in turns[question:] if role == "assistant"]
        if not answers or not answers[0].strip():
            raise NoSample("no-answer", "its first question has no answer")
        system = "\n".join(text for role, text in turns[:question] if role == "system")
        parts = turns[question][1].split(PLACEHOLDER)
        if len(parts) > 2:
            raise NoSample("several-images", f"{PLACEHOLDER} stands {len(parts) - 1} times in it")
        before, after = (parts[0], parts[1]) if len(parts) == 2 else ("", parts[0])
        for text in (system, before, after, answers[0]):
            if len(text) > TEXT_LIMIT:
                raise NoSample("too-long", f"a text of {len(text):,} characters")
        return Sample(
            number,
            name,
            image=_decoded(self._bytes(_one_image(row))),
            system=system.strip(),
            before=before.strip(),
            after=after.strip(),
            answer=answers[0],
            later_answers=len(answers) - 1,
        )

    def _bytes(self, image: object) -> bytes:
        """The image file that a row holds, or names within the folder."""
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            if len(image) > FILE_LIMIT:
                raise NoSample("image-too-large", f"{len(image):,} bytes, above {FILE_LIMIT:,}")
            return image
        if not isinstance(image, str) or not image:
            raise NoSample("unreadable", "its image is neither a path nor bytes")
        root = self.images.resolve()
        try:
            file = (root / image).resolve()
            if not file.is_relative_to(root):
                raise NoSample("image-outside", f"{image!r} leads out of the folder of images")
            if not file.is_file():
                raise NoSample("image-missing", f"there is no {image!r} in the folder of images")
            with file.open("rb") as opened:
                data = opened.read(FILE_LIMIT + 1)
        except (OSError, ValueError, RuntimeError) as error:  # names that no file can have, loops
            raise NoSample("image-missing", f"{image!r}: {error}") from None
        if len(data) > FILE_LIMIT:
            raise NoSample("image-too-large", f"more than {FILE_LIMIT:,} bytes")
        return data


def open_dataset(text: str, images: str | Path | None = None, *, offline: bool = False) -> Dataset:
    """The dataset of a path or a Hub id; see `open_table` for what it raises.

    `images` is the folder that image paths are relative to, by default that of the file, and of a
    Hub dataset what is cached of it. They must stay within it, links included.
    """
    table = open_table(text, offline=offline)
    folder = table.folder if images is None else Path(images)
    if images is not None and not folder.is_dir():
        raise NotFoundError("no such folder of images", "images", file=clean(folder))
    return Dataset(table, folder)


def _turns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of a row as LLaVA writes it, as chat templates take it, or as the Cauldron."""
    for key, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if isinstance(said := row.get(key), Sequence) and not isinstance(said, str | bytes):
            return [_turn(one, role, text) for one in said]
    if isinstance(said := row.get("texts"), Sequence) and not isinstance(said, str | bytes):
        both = [(_turn(one, "", "user"), _turn(one, "", "assistant")) for one in said]
        return [
            turn
            for (_, asked), (_, told) in both
            for turn in (("user", asked), ("assistant", told))
        ]
    raise NoSample("unreadable", "it has neither conversations, messages nor texts")


def _turn(one: object, role: str, text: str) -> tuple[str, str]:
    if not isinstance(one, Mapping):
        raise NoSample("unreadable", "a turn of it is no object")
    who = _ROLES.get(str(one.get(role))) if role else ""
    if who is None:
        raise NoSample("unreadable", f"a turn of it is by {one.get(role)!r}")
    said = one.get(text)
    if isinstance(said, Sequence) and not isinstance(said, str | bytes):
        said = "".join(_part(part) for part in said)
    if not isinstance(said, str):
        raise NoSample("unreadable", "a turn of it holds no text")
    return who, said


def _part(part: object) -> str:
    if isinstance(part, Mapping):
        if part.get("type") == "image":
            return PLACEHOLDER
        if isinstance(part.get("text"), str):
            return str(part["text"])
    raise NoSample("unreadable", "a part of a turn is neither text nor image")


def _one_image(row: Mapping[str, Any]) -> object:
    found = next((row[key] for key in ("image", "images") if row.get(key)), None)
    if isinstance(found, Sequence) and not isinstance(found, str | bytes):
        if len(found) > 1:
            raise NoSample("several-images", f"it has {len(found)} images")
        found = found[0]
    if not found:
        raise NoSample("no-image", "it has no image")
    return found


def _decoded(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        # Of Pillow's own limit, which is above ours, and of odd metadata.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > PIXELS:
                    says = f"{image.width} × {image.height} pixels, above {PIXELS:,}"
                    raise NoSample("image-too-large", says)
                return image.convert("RGB")
        except (NoSample, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise NoSample("image-too-large", str(error)) from None
        except UnidentifiedImageError:  # its text holds an address
            raise NoSample("image-corrupt", f"its bytes are none of {', '.join(FORMATS)}") from None
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them
            says = f"its image cannot be read: {type(error).__name__}: {error}"
            raise NoSample("image-corrupt", says) from None
