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
from projaudit.behaviour.ways import Enough, Ways

ROWS = 384
"""Most answers that are decoded at once."""
ROOM = 3 << 30
"""Bytes of activations that a batch may take: what a 24 GB card has left beside 7B in bfloat16."""
SETS = 64
"""Images that are seen at once."""
Side = Mapping[str, Tensor]
"""The tensors of a projector by their names in its module."""

_NO_WORD = 0
"""Token that is scored in the place of one that stands for an image."""


@dataclass
class Speaker:
    """A loaded model: vision tower, projector and language model, with its processor."""

    model: Any
    processor: Any
    projector: nn.Module
    """What holds the tensors that are swapped."""
    device: torch.device
    entry: nn.Module | None = None
    """What is handed the features; None: the projector."""
    exit: nn.Module | None = None
    """What gives its outputs; None: the projector."""
    beside: Sequence[nn.Module] = ()
    """What is handed the features of other projectors that the image goes through."""
    by_token: bool = True
    """Whether `projector` can be called alone, on features (…, in) in any arrangement."""
    answers: int = 0
    """Answers decoded so far."""
    passes: int = 0
    """Rows that went through the language model to score a text, backward or not."""
    _ids: Tensor = field(init=False)
    _mask: Tensor = field(init=False)
    _kinds: dict[str, Tensor] = field(init=False)
    """What else there is for every token of a prompt."""
    _one: dict[str, Tensor] = field(init=False)
    """What there is of an image."""
    _text: str = field(init=False)
    _ways: Ways = field(init=False)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self._ways = Ways([self.entry or self.projector, *self.beside])

    @property
    def tokens(self) -> int | None:
        """Of the rows of an image's features, the first that are tokens of the projector itself."""
        return self._ways.tokens

    @property
    def several_ways(self) -> bool:
        """Whether more is handed over of an image than the features of the projector itself."""
        return bool(self._ways.others)

    def prepare(self, prompts: Sequence[str], image: Image) -> None:
        """Sets the prompts, by the model's own chat template; all images have the size of `image`.

        Raises CouldNotProbe where the processor has no template, or makes no image tokens.
        """
        try:
            texts = [self._chat(prompt) for prompt in prompts]
        except (ValueError, TypeError, AttributeError) as error:
            if getattr(self.processor, "chat_template", None) or not self._places_images(image):
                raise CouldNotProbe(f"its chat template does not work: {error}") from None
            texts = list(prompts)  # as models without one are asked
        encoded = self._encoded(texts, [image] * len(texts), padding=True)
        ids, mask = encoded.pop("input_ids"), encoded.pop("attention_mask")
        self._kinds = {
            name: _left(encoded[name], mask)[0]
            for name in list(encoded)
            if isinstance(encoded[name], Tensor) and encoded[name].shape == ids.shape
        }
        self._ids, self._mask = _left(ids, mask)
        self._one = {
            name: value[: len(value) // len(texts)]
            for name, value in encoded.items()
            if isinstance(value, Tensor)
            and name not in self._kinds
            and len(value)
            and len(value) % len(texts) == 0
        }
        self._text = texts[0]

    def _places_images(self, image: Image) -> bool:
        """Whether the processor itself puts the tokens of an image before a text without them."""
        config = self.model.config
        token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", 0)
        try:
            ids = self._encoded(["a"], [image])["input_ids"]
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            return False
        return token is not None and bool((ids == token).any())

    def _encoded(self, texts: Sequence[str], images: Sequence[Image], **how: Any) -> Any:
        """What the processor makes of texts with an image each."""
        from PIL import Image as Picture

        shown = [[Picture.fromarray(image)] for image in images]
        encoded = self.processor(text=list(texts), images=shown, return_tensors="pt", **how)
        encoded.pop("labels", None)  # PaliGemma's are those of training
        return encoded.to(self.device)

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text

    @torch.no_grad()
    def features(self, images: Sequence[Image]) -> Tensor:
        """(images, tokens, in) in float32: what the vision tower hands over (`ways.Ways`)."""
        found = []
        for start in range(0, len(images), SETS):
            batch = list(images[start : start + SETS])
            encoded = self._cast(self._encoded([self._text] * len(batch), batch))
            found.append(self._ways.read(self.model, encoded, len(batch)))
        return torch.cat(found)

    @torch.no_grad()
    def settle(self, images: Sequence[Image]) -> None:
        """Finds out how the projector is called and by which ways an image comes, of the first two.

        Raises CouldNotProbe where the features of one image in another's place do not give the
        answer to the image itself: then more than they tells the language model what is in it.
        """
        with self._ways.watched() as handed:
            first = self._next(images[0])
        with self._ways.watched() as other:
            second = self._next(images[1])
        self._ways.settle(handed, other)
        features = self.features(images[:2])
        self.by_token = not self.several_ways and self._is_by_token(features[0])
        moved = self._scores(features[1:], [0], [()], 1)[:, -1]
        apart = float((moved - second).abs().max())
        noise, share = (1e-4, 0.01) if self.model.dtype == torch.float32 else (0.1, 0.1)
        if not apart <= max(noise, share * float((first - second).abs().max())):
            raise CouldNotProbe(
                "what its projector is handed is not all that the language model has of an image"
            )

    def _is_by_token(self, features: Tensor) -> bool:
        """Whether the projector gives one output for every token, whatever stands beside it."""
        if {self.entry or self.projector, self.exit or self.projector} != {self.projector}:
            return False
        dtype, some = next(self.projector.parameters()).dtype, max(1, len(features) // 2)
        try:
            whole, part = (self.projector(x.to(dtype)) for x in (features, features[:some]))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False
        return (
            isinstance(whole, Tensor)
            and whole.shape[:-1] == features.shape[:-1]
            and torch.allclose(whole[:some].float(), part.float(), rtol=1e-2, atol=1e-3)
        )

    def _next(self, image: Image) -> Tensor:
        """(1, vocabulary): ln p of the first word of the answer to an image, as a user asks."""
        logits: Tensor = self.model(**self._cast(self._encoded([self._text], [image]))).logits[
            :, -1
        ]
        return logits.float().log_softmax(-1)

    def knows(self, texts: Iterable[Tokens]) -> bool:
        """Whether it has embeddings for all these tokens: a fine-tune may have added some."""
        known: int = self.model.get_input_embeddings().weight.shape[0]
        return all(token < known for text in texts for token in text)

    def use(self, side: Side) -> None:
        """Puts these tensors into the projector."""
        self.projector.load_state_dict(dict(side), strict=False)

    def forward(self, features: Tensor) -> Tensor:
        """The projector alone, on features (…, tokens, in), in its own dtype; (…, out) in float32.

        Through the model where it reads whole sets of tokens: (…, outputs, out).
        """
        if self.by_token:
            dtype = next(self.projector.parameters()).dtype
            out: Tensor = self.projector(features.to(dtype))
            return out.float()
        sets = features.reshape(-1, *features.shape[-2:])
        parts = [self._through(sets[i : i + SETS]) for i in range(0, len(sets), SETS)]
        return torch.cat(parts).reshape(*features.shape[:-2], -1, parts[0].shape[-1])

    def _through(self, sets: Tensor) -> Tensor:
        """(sets, outputs, out): what leaves the projector within the model."""
        given: list[Tensor] = []

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, (tuple, list)) else out
            given.append(first if isinstance(first, Tensor) else first.last_hidden_state)
            raise Enough

        hook = (self.exit or self.projector).register_forward_hook(leave)
        try:
            with self._ways.instead(sets):
                self.model(
                    input_ids=self._ids[:1].expand(len(sets), -1),
                    attention_mask=self._mask[:1].expand(len(sets), -1),
                    **{n: kind[:1].expand(len(sets), -1) for n, kind in self._kinds.items()},
                    **self._images(len(sets)),
                )
        except Enough:
            pass
        finally:
            hook.remove()
        if not given:
            raise CouldNotProbe("its projector gives its outputs in a way that is not known")
        return given[0].float().reshape(len(sets), -1, given[0].shape[-1])

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

    def pulled(self, weight: str, along: Tensor, features: Tensor) -> Tensor | None:
        """(tokens, in): the gradient of Σ ⟨row, along⟩ over the rows that a layer is handed.

        At features (1, tokens, in); None where it is handed no rows of that width.
        """
        seen: list[Tensor] = []
        layer = self.projector.get_submodule(weight.rpartition(".")[0])
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        x = features.clone().requires_grad_(True)
        try:
            self.forward(x)
        finally:
            hook.remove()
        if not seen or seen[0].shape[-1] != len(along):
            return None
        total = (seen[0].float() @ along).sum()
        found: Tensor = torch.autograd.grad(total, x)[0][0]
        return found

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
            with self._ways.instead(features[start : start + rows]):
                out = self.model.generate(
                    input_ids=self._ids[which],
                    attention_mask=self._mask[which],
                    max_new_tokens=length,
                    do_sample=False,
                    **{name: kind[which] for name, kind in self._kinds.items()},
                    **self._images(len(which)),
                )
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
        self.passes += len(prompts)
        return self._scores(features, prompts, after, last)

    def _scores(
        self, features: Tensor, prompts: Sequence[int], after: Sequence[Tokens], last: int
    ) -> Tensor:
        media = _media(self.model.config)
        rows = [
            [
                *self._ids[p][self._mask[p].bool()].tolist(),
                *(_NO_WORD if token in media else token for token in tail),
            ]
            for p, tail in zip(prompts, after, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        kinds = {name: torch.zeros_like(ids) for name in self._kinds}
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
            asked = int(self._mask[prompt].sum())
            for name, kind in kinds.items():
                start = width - len(row)
                kind[i, start : start + asked] = self._kinds[name][prompt][-asked:]
        with self._ways.instead(features):
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                logits_to_keep=last,
                **kinds,
                **self._images(len(rows)),
            ).logits[:, -last:]
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
