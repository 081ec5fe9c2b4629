"""The ways by which the features of an image come to the projectors: read and replaced together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from projaudit.behaviour.reasons import CouldNotProbe

Way: TypeAlias = tuple[int, int | str]
"""Number of a module, and the position or name of an argument that it is handed."""
# What Q-Formers call the features that their queries read.
_FEATURES = ("encoder_hidden_states",)


class Enough(Exception):
    """No error: the forward pass has given what was wanted of it."""


class Ways:
    """Hooks at modules that are handed features of an image, the main one first.

    Features are one tensor (images, tokens + rest, in): the tokens of the main way, then what comes
    by the others, as rows of the same width. Only the former are features of a token each.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.tokens: int | None = None
        """Of the main way, for an image; None before features were read."""
        self.others: tuple[Way, ...] = ()
        self._main: Way | None = None
        self._instead: Tensor | None = None
        self._handed: dict[Way, Tensor] | None = None
        self._waiting: set[int] | None = None
        self._sizes: tuple[int, ...] = ()
        self._modules = len(modules)
        for number, module in enumerate(modules):
            module.register_forward_pre_hook(_hook(self, number), with_kwargs=True)

    @contextmanager
    def watched(self) -> Iterator[dict[Way, Tensor]]:
        """What comes by every way, in the block, as it is handed."""
        self._handed = {}
        try:
            yield self._handed
        finally:
            self._handed = None

    @contextmanager
    def instead(self, features: Tensor) -> Iterator[None]:
        """In the block, every row of the model is given these features instead of its own."""
        self._instead = features
        try:
            yield
        finally:
            self._instead = None

    def settle(self, first: Mapping[Way, Tensor], second: Mapping[Way, Tensor]) -> None:
        """Takes as ways all by which two images come otherwise.

        Queries and positions come alike for every image. Raises CouldNotProbe where an image does
        not come to one of the modules.
        """
        if len({number for number, _ in first}) < self._modules:
            raise CouldNotProbe("one of its projectors is not reached from an image")
        self.others = tuple(
            way
            for way, tensor in first.items()
            if way != self._main and (way not in second or not torch.equal(tensor, second[way]))
        )

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor], images: int) -> Tensor:
        """(images, tokens + rest, in) in float32: what the vision tower hands over."""
        self._waiting = {0, *(number for number, _ in self.others)}
        try:
            with self.watched() as handed:
                model(**inputs)
        except Enough:
            pass
        finally:
            self._waiting = None
        if self._main is None or self._main not in handed:
            raise CouldNotProbe("its projector is not reached from an image")
        main = handed[self._main]
        if main.ndim > 3:
            raise CouldNotProbe("its projector is handed whole feature maps, and no tokens")
        found = [main, *(handed[way] for way in self.others)]
        if main.shape[:-1].numel() % images or any(len(x.flatten()) % images for x in found):
            raise CouldNotProbe("its images have not the same number of tokens")
        tokens, *rest = (x.float().reshape(images, -1) for x in found)
        self.tokens = tokens.shape[1] // main.shape[-1]
        self._sizes = tuple(x.shape[1] for x in rest)
        if rest:
            flat = torch.cat(rest, 1)
            tokens = torch.cat([tokens, pad(flat, (0, -flat.shape[1] % main.shape[-1]))], 1)
        return tokens.reshape(images, -1, main.shape[-1])

    def _handle(
        self, number: int, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        handed: dict[Any, Any] = {**dict(enumerate(args)), **named}
        given = {
            (number, key): value
            for key, value in handed.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        if number == 0:
            key = next(
                (k for k in _FEATURES if (0, k) in given), 0 if args else next(iter(named), 0)
            )
            if (0, key) not in given:
                raise CouldNotProbe("its projector takes its features in a way that is not known")
            self._main = (0, key)
        if self._handed is not None:
            self._handed |= {way: tensor.detach() for way, tensor in given.items()}
        if self._waiting is not None:
            self._waiting.discard(number)
            if not self._waiting:
                raise Enough
        if self._instead is None:
            return None
        moved = self._cut(self._instead, given)
        return (
            tuple(moved.get((number, at), value) for at, value in enumerate(args)),
            {name: moved.get((number, name), value) for name, value in named.items()},
        )

    def _cut(self, features: Tensor, given: Mapping[Way, Tensor]) -> dict[Way, Tensor]:
        """What comes by each way in place of what is given, out of features of all ways."""
        tokens = features.shape[1] if self.tokens is None else self.tokens
        rest, at = features[:, tokens:].flatten(1), 0
        parts = {} if self._main is None else {self._main: features[:, :tokens]}
        for way, size in zip(self.others, self._sizes, strict=True):
            parts[way] = rest[:, at : at + size]
            at += size
        found = {}
        for way, part in parts.items():
            if way in given:
                if part.numel() != given[way].numel():
                    raise CouldNotProbe("its projector is handed another number of features")
                found[way] = part.to(given[way].dtype).reshape(given[way].shape)
        return found


def _hook(ways: Ways, number: int) -> Any:
    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return ways._handle(number, args, named)

    return before
