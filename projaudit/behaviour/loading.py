"""The model of a staged folder, loaded by transformers, with both projectors to swap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from projaudit.behaviour.places import Place, find_place, together
from projaudit.behaviour.reasons import CouldNotProbe, without_own_model
from projaudit.behaviour.speaker import Side, Speaker
from projaudit.projector import Linear

LARGEST_IMAGE = 448
"""Pixels; what resizes its images to more is given images of this size."""


def load(
    request: Mapping[str, Any],
) -> tuple[tuple[Speaker, Side], tuple[Speaker, Side] | None, Linear]:
    """The tuned model and projector, the base's, and the first layer by its names in the module.

    `request`: `folder` (staged), `base_folder` (that of the base's own model, or None); safetensors
    files of the projector's tensors by their names in the folder: `stored` (as it holds them),
    `tuned`, `base` (or None); `prefix` (the projector's module), `entry` (what the features go
    into, where that module holds other things), `first` (the layer that reads them: the values of a
    `Linear`), `last` (the weight of the one that gives the outputs), `beside` (the same of other
    projectors in the model, with their `tensors` and whether an image is `seen` by them);
    `device`, `dtype`. A base of
    its own that cannot be loaded is left out, which is added to the list `request["notes"]`. Raises
    CouldNotProbe where transformers cannot build the model, has no weights for a part of it, or
    loads another projector than the one that was audited.
    """
    stored = load_file(request["stored"])
    speaker, names = _speaker(request["folder"], request, stored)
    own = _side(speaker, stored, names)
    for name, tensor in own.items():
        if not torch.equal(speaker.projector.state_dict()[name], tensor):
            raise CouldNotProbe(f"transformers loads another {name} than the one audited")
    tuned = {**own, **_side(speaker, load_file(request["tuned"]), names)}
    first = _renamed(Linear(**request["first"]), names)
    if request["base"] is None:
        return (speaker, tuned), None, first
    other = speaker
    if request["base_folder"] is not None:
        try:
            other, _ = _speaker(request["base_folder"], request, stored)
        except CouldNotProbe as why:
            request["notes"].append(without_own_model(why.reason))
    base = _side(speaker, load_file(request["base"]), names)
    return (speaker, tuned), (other, {**tuned, **base}), first


def _speaker(
    folder: str, request: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[Speaker, Mapping[str, str]]:
    """The model of a folder, and the names in its projector of the tensors on disk."""
    from transformers import AutoModelForImageTextToText

    place, device = Path(folder), torch.device(request["device"])
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    build: Any = AutoModelForImageTextToText.from_pretrained  # its types know one answer only
    try:
        model, loaded = build(
            place,
            dtype=getattr(torch, request["dtype"]),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
        processor: Any = processor_class(model).from_pretrained(place, **local)
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
    others = request["beside"]
    apart = {name for other in others for name in other["tensors"]}
    where = together(
        model,
        _place(model, request, stored.keys() - apart),
        [(_place(model, other, other["tensors"]), other["seen"]) for other in others],
    )
    model.eval()
    speaker = Speaker(model, processor, where.home, device, where.entry, where.exit, where.beside)
    return speaker, where.names


def _place(model: Any, of: Mapping[str, Any], tensors: Iterable[str]) -> Place:
    return find_place(model, tensors, of["prefix"], of["entry"], of["first"]["weight"], of["last"])


def processor_class(model: Any) -> Any:
    """The class that loads the processor; without torchvision one that leaves videos out.

    Only videos need torchvision, but a processor that knows them does not load without it.
    """
    from transformers import PROCESSOR_MAPPING, AutoProcessor

    known: Any = PROCESSOR_MAPPING.get(type(model.config), None)
    if find_spec("torchvision") is not None or known is None:
        return AutoProcessor
    stills = [name for name in known.get_attributes() if name != "video_processor"]
    return type(known.__name__, (known,), {"get_attributes": classmethod(lambda _: stills)})


def _renamed(layer: Linear, names: Mapping[str, str]) -> Linear:
    bias = None if layer.bias is None else names[layer.bias]
    return replace(layer, weight=names[layer.weight], bias=bias, shape=(*layer.shape,))


def _side(speaker: Speaker, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Side:
    state: Mapping[str, Tensor] = speaker.projector.state_dict()
    found = {}
    for disk, tensor in tensors.items():
        if disk in names:
            name = names[disk]
            if state[name].shape != tensor.shape:
                raise CouldNotProbe(
                    f"transformers builds {name} in another shape than it has on disk"
                )
            found[name] = tensor.to(state[name].device, state[name].dtype)
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
