"""What shifts are aimed at: the user's vectors, the tokens of a text, the embedding matrix."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from projaudit.analyses.context import Direction
from projaudit.checkpoint import Checkpoint
from projaudit.errors import FormatError, ProjauditError, UnsupportedError, UsageError
from projaudit.inert import clean
from projaudit.readings import Reading
from projaudit.refs import Ref
from projaudit.safetensors_header import TensorInfo, read_header
from projaudit.source import open_local
from projaudit.weights import load_tensors

_FILE_LIMIT = 256 << 20
_TOKENIZER_LIMIT = 64 << 20
_MAX_DIRECTIONS = 256
_MAX_TOKENS = 32
_BLOCK_BYTES = 32 << 20
_ROWS = 512  # embedding rows that decide whether a rotation is shared
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
)


def load_directions(files: Sequence[Path]) -> tuple[Direction, ...]:
    """The vectors of .npy (d,) or (k, d) and .safetensors files, each named by file and index.

    Raises UsageError `usage.direction` naming the file for anything else, for values that are not
    finite and for a vector of zeros.
    """
    found = [direction for file in files for direction in _directions_of(file)]
    if len(found) > _MAX_DIRECTIONS:
        raise UsageError(f"{len(found)} directions, above {_MAX_DIRECTIONS}", "direction")
    return tuple(found)


def check_widths(directions: Sequence[Direction], width: int) -> None:
    """Raises UsageError `usage.direction` for a direction that is not `width` wide."""
    for direction in directions:
        if direction.vector.numel() != width:
            raise UsageError(
                f"has {direction.vector.numel()} values, the projector writes {width}",
                "direction",
                file=clean(direction.name),
            )


def _directions_of(file: Path) -> Iterator[Direction]:
    def wrong(message: str, field: str | None = None) -> UsageError:
        return UsageError(
            message,
            "direction",
            file=clean(file),
            field=field,
            remedy="give a .npy or .safetensors file of float vectors",
        )

    for name, tensor in _read_vectors(file, wrong):
        rows = tensor if tensor.ndim == 2 else tensor[None]
        if tensor.ndim not in (1, 2) or not rows.numel():
            raise wrong(f"has shape {list(tensor.shape)}, wanted (d,) or (k, d)", name)
        for i, row in enumerate(rows.float()):
            label = f"{file.name}:{name}" if name else file.name
            label = f"{label}[{i}]" if len(rows) > 1 else label
            if not bool(torch.isfinite(row).all()) or not bool(row.any()):
                raise wrong("is not finite or zero throughout", f"{name or 'row'} {i}")
            yield Direction(label, row)


def _read_vectors(file: Path, wrong: Any) -> list[tuple[str, Tensor]]:
    try:
        is_file, size = file.is_file(), file.stat().st_size if file.exists() else 0
    except OSError as error:
        raise wrong(str(error.strerror)) from None
    if not is_file:
        raise wrong("is no file")
    if size > _FILE_LIMIT:
        raise wrong(f"is larger than {_FILE_LIMIT >> 20} MiB")
    if file.suffix == ".safetensors":
        try:
            source = open_local(Ref(str(file), "local", file))
            (path,) = source.files
            infos = read_header(source, path).tensors.values()
            found = [(n, s.tensor) for n, s in load_tensors(source, infos).items()]
        except ProjauditError as error:
            raise wrong(error.message, error.field) from None
        if not found:
            raise wrong("holds no tensor")
        return found
    import numpy as np

    try:
        array = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
        with np.errstate(over="ignore"):  # what overflows is refused as not finite
            vectors = torch.from_numpy(array.astype("float32"))
    except MemoryError:
        raise
    except Exception:
        # A hostile header reaches numpy's parser of Python literals, which raises almost anything.
        raise wrong("cannot be read as an array of floats") from None
    if array.dtype.kind != "f":
        raise wrong("holds no floating point array")
    return [("", vectors)]


def embedding_tensor(reading: Reading, width: int) -> TensorInfo | None:
    """Where the language model's input embeddings (vocabulary × width) are, None if nowhere."""
    fitting = [
        info
        for name, info in reading.tensors.items()
        if name.endswith(_EMBEDDINGS)
        and _is_rows(info)
        and info.shape[1] == width
        and name not in reading.packed
        and name not in reading.unread
    ]
    return min(fitting, key=lambda info: len(info.name), default=None)


def _is_rows(info: TensorInfo) -> bool:
    """Whether it is a matrix whose rows stand one behind the other."""
    return len(info.shape) == 2 and info.strides is None


def text_directions(
    checkpoint: Checkpoint, reading: Reading, texts: Sequence[str], width: int
) -> tuple[Direction, ...]:
    """The embedding rows of the tokens of each text, without and with a leading space.

    Only those rows are fetched. Raises UnsupportedError (`unsupported.tokenizer`,
    `unsupported.embeddings`) where the model lacks what it takes, UsageError `usage.target-text`
    where no token of a text is in the vocabulary.
    """
    if not texts:
        return ()
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None:
        raise UnsupportedError(
            "has no tokenizer.json, so a text has no tokens",
            "tokenizer",
            file=clean(checkpoint.source.name),
            remedy="give vectors with --direction instead of --target-text",
        )
    info = embedding_tensor(reading, width)
    if info is None:
        raise UnsupportedError(
            f"has no embedding matrix of width {width}",
            "embeddings",
            file=clean(checkpoint.source.name),
            remedy="give vectors with --direction instead of --target-text",
        )
    unknown = _unknown_ids(tokenizer)
    tokens: dict[int, str] = {}
    for text in texts:
        ids = [
            i
            for spelled in (text, " " + text)
            for i in tokenizer.encode(spelled, add_special_tokens=False).ids
            if i not in unknown and i < info.shape[0]
        ]
        if not ids:
            raise UsageError(
                f"no token of {clean(text)!r} is in the model's vocabulary", "target-text"
            )
        tokens |= {i: f"{tokenizer.id_to_token(i)}" for i in ids}
    if len(tokens) > _MAX_TOKENS:
        raise UsageError(f"{len(tokens)} tokens, above {_MAX_TOKENS}", "target-text")
    rows = _rows(checkpoint, info, sorted(tokens))
    return tuple(Direction(f"token {tokens[i]!r}", row) for i, row in rows.items())


def token_ids(checkpoint: Checkpoint, text: str) -> tuple[int, ...] | None:
    """The ids of a text's tokens, none without a tokenizer.json; None where a word has none."""
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None:
        return ()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return None if not ids or _unknown_ids(tokenizer).intersection(ids) else tuple(ids)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    """The repository's tokenizer.json through the tokenizers library, None if there is none."""
    path = "tokenizer.json"
    if path not in checkpoint.source.files:
        return None
    from tokenizers import Tokenizer

    data = checkpoint.source.read_small(path, _TOKENIZER_LIMIT)
    try:
        return Tokenizer.from_str(data.decode("utf-8"))
    except BaseException as error:
        # The library raises bare Exception, and BaseException where its Rust code panics.
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise FormatError(clean(error, 120), "tokenizer", file=path) from None


def _unknown_ids(tokenizer: Any) -> set[int]:
    names = ("<unk>", "[UNK]", "<UNK>", "<|unk|>")
    return {i for name in names if (i := tokenizer.token_to_id(name)) is not None}


def _row_info(info: TensorInfo, first: int, last: int) -> TensorInfo:
    """Rows first ≤ i < last of a row-major matrix, as a tensor of its own."""
    size = (info.stop - info.start) // info.shape[0]
    return TensorInfo(
        name=f"{info.name}[{first}:{last}]",
        dtype=info.dtype,
        shape=(last - first, info.shape[1]),
        file=info.file,
        start=info.start + first * size,
        stop=info.start + last * size,
        entry=info.entry,
    )


def _rows(checkpoint: Checkpoint, info: TensorInfo, ids: Sequence[int]) -> dict[int, Tensor]:
    parts = {i: _row_info(info, i, i + 1) for i in ids}
    stored = load_tensors(checkpoint.source, parts.values())
    return {i: stored[part.name].tensor[0].float() for i, part in parts.items()}


def embedding_pair(
    base: Checkpoint, target: Checkpoint, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The same embedding rows (n × d, fp32) of base and target, None where they do not compare."""
    sides = []
    for side in (base, target):
        reading = side.readings[0]
        infos = [i for n, i in reading.tensors.items() if n.endswith(_EMBEDDINGS)]
        if len(infos) != 1 or not _is_rows(infos[0]):
            return None
        if infos[0].name in reading.packed or infos[0].name in reading.unread:
            return None
        sides.append((side, infos[0]))
    if sides[0][1].shape != sides[1][1].shape:
        return None
    count = sides[0][1].shape[0]
    first = max(0, (count - _ROWS) // 2)
    pair = []
    for side, info in sides:
        part = _row_info(info, first, min(count, first + _ROWS))
        (stored,) = load_tensors(side.source, [part]).values()
        pair.append(stored.tensor.to(device, torch.float32))
    return pair[0], pair[1]


@dataclass(frozen=True)
class StoredEmbeddings:
    """A checkpoint's embedding matrix, read in blocks of rows from bytes at hand."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, width)."""
        return self.info.shape[0], self.info.shape[1]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(id of the first row, rows fp32) in order."""
        count, width = self.shape
        step = max(1, _BLOCK_BYTES // (4 * width))
        for first in range(0, count, step):
            part = _row_info(self.info, first, min(first + step, count))
            (stored,) = load_tensors(self.checkpoint.source, [part]).values()
            yield first, stored.tensor.float()

    def name(self, token: int) -> str:
        """What the tokenizer calls the id, `#id` where it has no name."""
        name = None if self._names is None else self._names.id_to_token(token)
        return f"#{token}" if name is None else str(name)

    @cached_property
    def _names(self) -> Any:
        return _tokenizer(self.checkpoint)


def embedding_matrix(
    checkpoint: Checkpoint, reading: Reading, width: int
) -> StoredEmbeddings | None:
    """The embedding matrix where its bytes are on this machine; it is never fetched whole."""
    info = embedding_tensor(reading, width)
    if info is None or not checkpoint.source.at_hand(info.file):
        return None
    return StoredEmbeddings(checkpoint, info)
