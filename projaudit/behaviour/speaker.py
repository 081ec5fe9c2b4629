"""A multimodal model whose projector can be swapped, and asked about images and features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from projaudit.behaviour.images import Image
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.texts import Tokens

ROWS = 384
"""Most answers that are decoded at once."""
ROOM = 3 << 30
"""Bytes of activations that a batch may take: what a 24 GB card has left beside 7B in bfloat16."""
Side = Mapping[str, Tensor]
"""The tensors of a projector by their names in its module."""


_NO_WORD = 0
"""Token that is scored in the place of one that stands for an image."""


class _Enough(Exception):
    """No error: the forward pass has given what was wanted of it."""


@dataclass
class Speaker:
    """A loaded model: vision tower, projector and language model, with its processor."""

    model: Any
    processor: Any
    projector: nn.Module
    device: torch.device
    answers: int = 0
    """Answers decoded so far."""
    passes: int = 0
    """Rows that went through the language model to score a text, backward or not."""
    _ids: Tensor = field(init=False)
    _mask: Tensor = field(init=False)
    _one: dict[str, Tensor] = field(init=False)
    _text: str = field(init=False)
    _instead: Tensor | None = None
    _capture: bool = False
    _seen: Tensor | None = None

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.projector.register_forward_pre_hook(self._intercept)

    def _intercept(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Reads the projector's input, or puts probe features in its place."""
        if not args or not isinstance(args[0], Tensor):
            raise CouldNotProbe("its projector takes its features in a way that is not known")
        if self._capture:
            self._seen = args[0].detach()
            raise _Enough
        if self._instead is None:
            return None
        return (self._instead.to(args[0].dtype).reshape(args[0].shape), *args[1:])

    def prepare(self, prompts: Sequence[str], image: Image) -> None:
        """Sets the prompts, by the model's own chat template; all images have the size of `image`.

        Raises CouldNotProbe where the processor has no template, or makes no image tokens.
        """
        try:
            texts = [self._chat(prompt) for prompt in prompts]
        except (ValueError, TypeError, AttributeError) as error:
            raise CouldNotProbe(f"its chat template does not work: {error}") from None
        encoded = self.processor(
            text=texts, images=[image] * len(texts), padding=True, return_tensors="pt"
        ).to(self.device)
        self._ids, self._mask = _left(encoded.pop("input_ids"), encoded.pop("attention_mask"))
        self._one = {
            name: value[: len(value) // len(texts)]
            for name, value in encoded.items()
            if isinstance(value, Tensor) and len(value) and len(value) % len(texts) == 0
        }
        self._text = texts[0]

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text

    @torch.no_grad()
    def features(self, images: Sequence[Image]) -> Tensor:
        """(images, tokens, in) in float32: what the vision tower hands to the projector."""
        found = []
        for start in range(0, len(images), 64):
            batch = list(images[start : start + 64])
            encoded = self.processor(
                text=[self._text] * len(batch), images=batch, return_tensors="pt"
            ).to(self.device)
            self._capture = True
            try:
                self.model(**self._cast(encoded))
            except _Enough:
                pass
            finally:
                self._capture = False
            if self._seen is None:
                raise CouldNotProbe("its projector is not reached from an image")
            found.append(self._seen.float().reshape(len(batch), -1, self._seen.shape[-1]))
        return torch.cat(found)

    def knows(self, texts: Iterable[Tokens]) -> bool:
        """Whether it has embeddings for all these tokens: a fine-tune may have added some."""
        known: int = self.model.get_input_embeddings().weight.shape[0]
        return all(token < known for text in texts for token in text)

    def use(self, side: Side) -> None:
        """Puts these tensors into the projector."""
        self.projector.load_state_dict(dict(side), strict=False)

    def forward(self, features: Tensor) -> Tensor:
        """The projector alone, on features (…, in), in its own dtype; (…, out) in float32."""
        dtype = next(self.projector.parameters()).dtype
        out: Tensor = self.projector(features.to(dtype))
        return out.float()

    @torch.no_grad()
    def inputs(self, side: Side, weight: str, features: Tensor) -> Tensor:
        """(rows, width): what the layer with that weight is handed, of features (…, in)."""
        seen: list[Tensor] = []
        layer = self.projector.get_submodule(weight.rpartition(".")[0])
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        try:
            self.use(side)
            self.forward(features)
        finally:
            hook.remove()
        return torch.cat(seen).float().flatten(0, -2)

    @torch.no_grad()
    def answer(
        self, side: Side, features: Tensor, prompts: Sequence[int], length: int
    ) -> list[Tokens]:
        """Greedy answers of at most `length` tokens; row i has features i and prompt `prompts[i]`.

        Without the end token and what follows it.
        """
        self.use(side)
        ends, said = set(_ends(self.model)), []
        rows = self._rows(self._ids.shape[1] + length)
        for start in range(0, len(features), rows):
            which = torch.tensor(prompts[start : start + rows], device=self.device)
            self._instead = features[start : start + rows]
            try:
                out = self.model.generate(
                    input_ids=self._ids[which],
                    attention_mask=self._mask[which],
                    max_new_tokens=length,
                    do_sample=False,
                    **self._images(len(which)),
                )
            finally:
                self._instead = None
            for row in out[:, self._ids.shape[1] :].tolist():
                stop = next((i for i, token in enumerate(row) if token in ends), len(row))
                said.append(tuple(row[:stop]))
        self.answers += len(said)
        return said

    def log_likelihood(
        self, features: Tensor, prompts: Sequence[int], before: Sequence[Tokens], text: Tokens
    ) -> Tensor:
        """(rows, tokens): ln p of each token of `text` after its prompt and `before`.

        With the projector that is in place; differentiable in the features.
        """
        after = [(*head, *text) for head in before]
        scores = self.log_probabilities(features, prompts, after, len(text) + 1)[:, :-1]
        wanted = torch.tensor(text, device=self.device).expand(len(prompts), -1)
        found: Tensor = scores.gather(-1, wanted[..., None])[..., 0]
        return found

    def log_probabilities(
        self, features: Tensor, prompts: Sequence[int], after: Sequence[Tokens], last: int
    ) -> Tensor:
        """(rows, last, vocabulary): ln p of what follows each of the last tokens of every row.

        A row is its prompt and the tokens `after` it. With the projector that is in place;
        differentiable in the features.
        """
        media = _media(self.model.config)
        rows = [
            [
                *self._ids[p][self._mask[p].bool()].tolist(),
                *(_NO_WORD if token in media else token for token in tail),
            ]
            for p, tail in zip(prompts, after, strict=True)
        ]
        self.passes += len(rows)
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        self._instead = features
        try:
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                logits_to_keep=last,
                **self._images(len(rows)),
            ).logits[:, -last:]
        finally:
            self._instead = None
        found: Tensor = logits.float().log_softmax(-1)
        return found

    def rows(self, extra: int) -> int:
        """Rows of a prompt with `extra` tokens that fit into the room for one pass."""
        return self._rows(self._ids.shape[1] + extra)

    def _rows(self, width: int) -> int:
        text = self.model.config.get_text_config()
        each = width * text.hidden_size * (2 * text.num_hidden_layers + 40) * 4
        return max(1, min(ROWS, ROOM // int(each)))

    def _images(self, rows: int) -> dict[str, Tensor]:
        return self._cast({n: v.repeat(rows, *[1] * (v.ndim - 1)) for n, v in self._one.items()})

    def _cast(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.model.dtype
        return {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}


def _media(config: Any) -> set[int]:
    """The tokens in whose places a model puts features: an answer that holds one has none."""
    kinds = ("image", "video", "audio")
    names = [f"{kind}_token_{what}" for kind in kinds for what in ("id", "index")]
    return {t for t in (getattr(config, name, None) for name in names) if type(t) is int}


def _left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with their padding moved to the left, as decoding wants it."""
    order = mask.argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    return [*(ends if isinstance(ends, list) else [ends]), pad]
