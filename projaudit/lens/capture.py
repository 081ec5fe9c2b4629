"""Images through the vision tower once, and their features through both projectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from projaudit.behaviour.images import Image, opened
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.inert import clean

BATCH = 8
"""Images that go through a projector at once."""


@dataclass(frozen=True)
class Pictures:
    """The image files of a folder that can be read."""

    names: tuple[str, ...]
    """Of the files, inert."""
    images: list[Image]
    unreadable: tuple[str, ...]


def read_all(files: Sequence[str], size: int) -> Pictures:
    """All of the files, as squares of `size` pixels."""
    names, images, unreadable = [], [], []
    for file in files:
        name, image = clean(Path(file).name, 100), opened(file, size)
        if image is None:
            unreadable.append(name)
        else:
            names.append(name)
            images.append(image)
    return Pictures(tuple(names), images, tuple(unreadable))


@dataclass
class UnitMeans:
    """Sums over tokens of what hidden units do, in fp64."""

    means: Tensor | None = None
    fires: Tensor | None = None
    tokens: int = 0

    def add(self, values: Tensor) -> None:
        """Takes in activations (…, units)."""
        rows = values.detach().double().reshape(-1, values.shape[-1])
        self.means = rows.sum(0) + (0 if self.means is None else self.means)
        self.fires = (rows > 0).double().sum(0) + (0 if self.fires is None else self.fires)
        self.tokens += len(rows)

    def over_tokens(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """M and F: mean activation, and share of tokens above zero, of each unit."""
        if self.means is None or self.fires is None:
            return (), ()
        return plain(self.means / self.tokens), plain(self.fires / self.tokens)


def plain(values: Tensor) -> tuple[float, ...]:
    """The values as numbers of seven digits, which is what float32 holds."""
    return tuple(float(f"{value:.7g}") for value in values.flatten().tolist())


@dataclass
class Both:
    """The two projectors of a speaker, and a look at the hidden units of each."""

    speaker: Speaker
    base: Side
    tuned: Side
    reader: str
    """The layer that reads the hidden units, by its module's name; empty where there is none."""
    _watched: UnitMeans | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.reader:
            try:
                module = self.speaker.projector.get_submodule(self.reader)
            except AttributeError:
                self.reader = ""  # transformers built it otherwise
            else:
                module.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._watched is not None and args and isinstance(args[0], Tensor):
            self._watched.add(args[0])

    @torch.no_grad()
    def outputs(
        self, features: Tensor, units: tuple[UnitMeans, UnitMeans] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """P_base(x) and P_tuned(x) of each image (tokens × d, fp32), of features (n, tokens, in).

        `units` (of base and tuned) take in what the hidden units do meanwhile. Raises CouldNotProbe
        where the module wants more than features.
        """
        for start in range(0, len(features), BATCH):
            batch = features[start : start + BATCH]
            found = []
            for number, side in enumerate((self.base, self.tuned)):
                self._watched = units[number] if units and self.reader else None
                self.speaker.use(side)
                try:
                    out = self.speaker.forward(batch)
                except (TypeError, ValueError, IndexError, RuntimeError) as error:
                    first = str(error).partition("\n")[0]
                    raise CouldNotProbe(
                        f"its projector wants more than features: {first}"
                    ) from None
                finally:
                    self._watched = None
                found.append(out.reshape(len(batch), -1, out.shape[-1]))
            yield from zip(found[0], found[1], strict=True)


def input_norms(features: Tensor, tokens: int) -> Tensor | None:
    """(tokens,) norms of what (read, in) features of an image become `tokens` outputs.

    A merge reads several in a row for one output, whose norm is taken together; None where the
    outputs are no whole share of what is read.
    """
    if tokens == 0 or len(features) % tokens:
        return None
    found: Tensor = features.reshape(tokens, -1).norm(dim=-1)
    return found


@contextmanager
def tower_once(speaker: Speaker) -> Iterator[None]:
    """Inside, the vision tower runs once for each shape of its input, and is remembered.

    What it says is replaced by cached features before anything reads it, as `Speaker.answer` does;
    then only the projector and the language model cost time.
    """
    undo: list[Callable[[], None]] = []
    for module in _towers(speaker):
        undo.append(_remember(module))
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _towers(speaker: Speaker) -> list[nn.Module]:
    """The modules beside the projector that read pixels: by name, as every class has one."""
    path = next(name for name, m in speaker.model.named_modules() if m is speaker.projector)
    parent = speaker.model.get_submodule(path.rpartition(".")[0])
    words = ("vision_tower", "vision_model", "vision_encoder", "image_encoder")
    return [child for name, child in parent.named_children() if name in words]


def _remember(module: nn.Module) -> Callable[[], None]:
    inner, known = module.forward, dict[Any, Any]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        key = tuple((tuple(t.shape), t.dtype) for t in tensors)
        if key not in known:
            known.clear()  # the last batch alone is of another size
            known[key] = inner(*args, **kwargs)
        return known[key]

    module.forward = forward

    def restore() -> None:
        del module.forward

    return restore
