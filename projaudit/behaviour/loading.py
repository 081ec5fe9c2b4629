"""The model of a staged folder, loaded by transformers, with both projectors to swap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from projaudit.behaviour.reasons import CouldNotProbe, without_own_model
from projaudit.behaviour.speaker import Side, Speaker

LARGEST_IMAGE = 448
"""Pixels; what resizes its images to more is given images of this size."""


def load(
    request: Mapping[str, Any],
) -> tuple[tuple[Speaker, Side], tuple[Speaker, Side] | None, str]:
    """The tuned model and projector, the base's, and the first layer's weight in the module.

    A base of its own that cannot be loaded is left out, which is added to the list
    `request["notes"]`. Raises CouldNotProbe where transformers cannot build the target, has no
    weights for a part of it, or loads another projector than the one that was audited.
    """
    speaker = _speaker(request["folder"], request)
    tuned_on_disk = load_file(request["tuned"])
    names = _names(speaker, tuned_on_disk, request["prefix"])
    tuned = _side(speaker, tuned_on_disk, names)
    state = speaker.projector.state_dict()
    for name, tensor in tuned.items():
        if not torch.equal(state[name], tensor):
            raise CouldNotProbe(f"transformers loads another {name} than the one audited")
    first = names[request["first"]]
    if request["base"] is None:
        return (speaker, tuned), None, first
    other = speaker
    if request["base_folder"] is not None:
        try:
            other = _speaker(request["base_folder"], request)
        except CouldNotProbe as why:
            request["notes"].append(without_own_model(why.reason))
    base = _side(speaker, load_file(request["base"]), names)
    return (speaker, tuned), (other, {**tuned, **base}), first


def _speaker(folder: str, request: Mapping[str, Any]) -> Speaker:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place, device = Path(folder), torch.device(request["device"])
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    build: Any = AutoModelForImageTextToText.from_pretrained  # its types know one answer only
    try:
        model, loaded = build(
            place,
            dtype=getattr(torch, request["dtype"]),
            device_map={"": device},
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            **local,
        )
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            place, **local
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a hostile or unknown configuration makes it raise
        first = str(error).strip().partition("\n")[0]
        raise CouldNotProbe(
            f"transformers cannot build it: {type(error).__name__}: {first}"
        ) from None
    if missing := sorted(loaded["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise CouldNotProbe(f"its weights lack {len(missing)} tensors, {missing[0]} for one")
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise CouldNotProbe("transformers finds no tokenizer and image processor for it")
    _decode_plainly(model)
    word = request["prefix"].rpartition(".")[2]
    inside = [in_module(n, request["prefix"]) for n in _inside(request)]
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == word and set(inside) <= module.state_dict().keys():
            model.eval()
            return Speaker(model, processor, module, device)
    raise CouldNotProbe(f"transformers builds no module {word} with the projector's tensors")


def in_module(name: str, prefix: str) -> str:
    """A tensor's name in the projector's module, of its name on disk."""
    return name.removeprefix(prefix).lstrip(".")


def _inside(request: Mapping[str, Any]) -> list[str]:
    return [name for name in load_file(request["tuned"]) if name.startswith(request["prefix"])]


def _names(speaker: Speaker, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Name on disk -> name in the projector's module, of the tensors that live in it."""
    names = {n: in_module(n, prefix) for n in tensors if n.startswith(prefix)}
    state = speaker.projector.state_dict()
    for disk, name in names.items():
        if state[name].shape != tensors[disk].shape:
            raise CouldNotProbe(f"transformers builds {name} in another shape than it has on disk")
    return names


def _side(speaker: Speaker, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Side:
    state: Mapping[str, Tensor] = speaker.projector.state_dict()
    found = {}
    for disk, tensor in tensors.items():
        if disk in names:
            like = state[names[disk]]
            found[names[disk]] = tensor.to(like.device, like.dtype)
    return found


def _decode_plainly(model: Any) -> None:
    """Greedy decoding whatever the repository wishes; only its end and pad tokens count."""
    from transformers import GenerationConfig

    wished = model.generation_config
    ends, pad = wished.eos_token_id, wished.pad_token_id
    if ends is None:
        raise CouldNotProbe("neither its config nor its generation config names an end token")
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=wished.bos_token_id,
        eos_token_id=ends,
        pad_token_id=(ends[0] if isinstance(ends, list) else ends) if pad is None else pad,
    )


def image_size(processor: Any) -> int:
    """Pixels a side of the images that the model is shown."""
    size: Any = getattr(processor.image_processor, "size", None)
    for key in ("height", "shortest_edge", "longest_edge"):
        # Some releases of transformers have a dict here, others a class that is none.
        value = size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)
        if type(value) is int and value > 0:  # True is no size
            return min(value, LARGEST_IMAGE)
    return 336
