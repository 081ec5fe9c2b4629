"""The one pass: attention from the answer's rows, reduced layer by layer to what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from projaudit.errors import LimitError, UnsupportedError
from projaudit.screen.model import Loaded
from projaudit.screen.spans import TEXT, VISION, Batch

COMPONENTS = TEXT + 1
"""System, vision and text: what a row's attention is summed over."""


@dataclass
class Watch:
    """What is wanted of the attention of a pass, and what has been found of it."""

    layers: Mapping[int, int]
    """id of a module of the decoder -> number of its layer."""
    rows: Tensor
    """(batch, positions) int64: places in the sequence."""
    members: Tensor
    """(batch, tokens, 3) float32: 1 where a token is system, vision, text."""
    keep: Callable[[int, Tensor, Tensor], Any]
    """(layer, attention (batch, heads, positions, tokens) float32, members) -> what is kept."""
    found: dict[int, Any] = field(default_factory=dict)
    """What was kept, by layer."""

    def wants(self, module: nn.Module, queries: int, keys: int) -> bool:
        """Whether this is the attention of a layer of the decoder over the whole sequence."""
        number = self.layers.get(id(module))
        return number is not None and queries == keys == self.members.shape[1]

    def take(self, module: nn.Module, attention: Tensor) -> None:
        """Keeps what is wanted of the rows' attention in a layer."""
        number = self.layers[id(module)]
        if number not in self.found:
            self.found[number] = self.keep(number, attention, self.members)


def reduced(_: int, attention: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy (batch, positions) and shares (batch, heads, positions, 3) of a layer, float32.

    Entropy: −Σ a ln a of the head-mean attention over the image tokens, made to sum to 1 (BYE,
    arXiv 2505.16916); NaN where no attention falls on them. Shares: a head's attention on the
    system, vision and text tokens (TCAP, arXiv 2601.21692).
    """
    shares = attention @ members[:, None]
    seen = attention.mean(1) * members[:, None, :, VISION]
    seen = seen / seen.sum(-1, keepdim=True)
    return -torch.special.xlogy(seen, seen).sum(-1), shares


def attend(
    loaded: Loaded, batch: Batch, keep: Callable[[int, Tensor, Tensor], Any] = reduced
) -> dict[int, Any]:
    """What `keep` makes of each layer's attention from the batch's rows, by layer number.

    One forward pass. A sample's rows are those of its positions, short ones filled up with its
    last. Layers without attention over the sequence (linear attention, convolutions) are left out.
    Raises UnsupportedError (`unsupported.attention`) where there is no other, and LimitError
    (`limit.memory`).
    """
    model = loaded.model
    rows, members = rows_at(batch, loaded.device), members_of(batch, loaded.device)
    watch = Watch(_layers(model), rows, members, keep)
    inputs = {
        name: value.to(loaded.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.inputs.items()
        if isinstance(value, Tensor)
    }
    try:
        with torch.inference_mode(), _watched(model, watch):
            model(**inputs, use_cache=False, logits_to_keep=1)
    except torch.OutOfMemoryError:
        count, width = members.shape[:2]
        says = f"a batch of {count} samples of {width} tokens does not fit on {loaded.device}"
        raise LimitError(says, "memory", remedy="a smaller --batch") from None
    if not watch.found:
        raise UnsupportedError("no layer of its language model shows attention", "attention")
    return dict(sorted(watch.found.items()))


def rows_at(batch: Batch, device: torch.device) -> Tensor:
    """(batch, positions) int64: where each position's row is; short samples repeat their last."""
    most = max(len(spans.targets) for spans in batch.spans)
    places = [
        [spans.first + min(p, len(spans.targets) - 1) for p in range(most)] for spans in batch.spans
    ]
    return torch.tensor(places, device=device)


def members_of(batch: Batch, device: torch.device) -> Tensor:
    """(batch, tokens, 3) float32: 1 where a token is system, vision, text."""
    count, width = batch.inputs["input_ids"].shape
    kinds = torch.full((count, width), -1)
    for i, spans in enumerate(batch.spans):
        known = torch.from_numpy(spans.kinds[:width]).long()
        kinds[i, : len(known)] = known
    components = torch.arange(COMPONENTS)
    return (kinds[..., None] == components).float().to(device)


def _layers(model: Any) -> dict[int, int]:
    """The decoder's modules that know the number of their layer."""
    return {
        id(module): module.layer_idx
        for module in model.get_decoder().modules()
        if type(getattr(module, "layer_idx", None)) is int
    }


@contextmanager
def _watched(model: Any, watch: Watch) -> Iterator[None]:
    """A context in which the attention of the model's decoder comes by the watch.

    Where transformers computes it by `scaled_dot_product_attention`, which returns no weights, the
    wanted rows are computed from the same queries and keys; the rest runs as it would. Where it
    computes the weights itself, a hook reads the rows and the map is gone with its layer. The
    table of attention functions is global to the process: one watched pass at a time.
    """
    from transformers import AttentionInterface

    plain = AttentionInterface()["sdpa"]  # type: ignore[no-untyped-call]

    def sdpa(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        if watch.wants(module, query.shape[2], key.shape[2]):
            watch.take(module, rows_of(query, key, attention_mask, watch.rows, **kwargs))
        return plain(module, query, key, value, attention_mask, **kwargs)

    def hook(module: nn.Module, _: object, output: object) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if (
            isinstance(weights, Tensor)
            and weights.ndim == 4
            and watch.wants(module, *weights.shape[2:])
        ):
            places = watch.rows[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
            watch.take(module, weights.gather(2, places).float())

    decoder = model.get_decoder()
    hooks = [m.register_forward_hook(hook) for m in decoder.modules() if id(m) in watch.layers]
    AttentionInterface.register("sdpa", sdpa)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", plain)
        for one in hooks:
            one.remove()


def rows_of(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    rows: Tensor,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """(batch, heads, positions, tokens) float32: softmax(q·k·scaling + mask) of some rows.

    Queries (batch, heads, tokens, width) and keys (batch, heads or groups of them, tokens, width)
    after rotary embedding, as an attention function of transformers gets them; the mask is boolean
    (True: attend), added, or None for a causal one. `rows` (batch, positions).
    """
    batch, heads, tokens, size = query.shape
    groups, positions = key.shape[1], rows.shape[1]
    wanted = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, size))
    # Heads that share keys stand together, so that the keys need not be repeated.
    grouped = wanted.reshape(batch, groups, heads // groups * positions, size)
    scores = (grouped @ key.transpose(2, 3)).reshape(batch, heads, positions, tokens).float()
    scores = scores * (size**-0.5 if scaling is None else scaling)
    for mask in (position_bias, attention_mask):
        if mask is None:
            continue
        mask = mask[..., :tokens].expand(batch, -1, -1, -1)
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, tokens))
        hidden = ~mask if mask.dtype == torch.bool else None
        scores = scores + mask if hidden is None else scores.masked_fill(hidden, -torch.inf)
    if attention_mask is None and is_causal is not False:
        later = torch.arange(tokens, device=rows.device) > rows[..., None]
        scores = scores.masked_fill(later[:, None], -torch.inf)
    return scores.softmax(-1)
