"""A model with its processor, out of a staged snapshot: safetensors, and no code of its own."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from projaudit.behaviour.loading import processor_class
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.stage import stage
from projaudit.checkpoint import open_checkpoint
from projaudit.errors import FormatError, UnsupportedError, UsageError
from projaudit.inert import clean
from projaudit.peft_config import CONFIG as ADAPTER_CONFIG
from projaudit.peft_config import WEIGHTS as ADAPTER_WEIGHTS
from projaudit.peft_config import not_read, rank_of, read_adapter
from projaudit.refs import parse_ref
from projaudit.session import Session, find_device, settle
from projaudit.source import Source

PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "peft")
# adapter_config.json: what peft reads when it puts an adapter into a model that is at hand. The
# others name repositories, files and modules, or are for training.
_ADAPTER_KEYS = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "bias",
    "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "lora_bias", "target_parameters", "init_r", "target_r",
    "decompose_both", "decompose_factor", "use_effective_conv2d", "feedforward_modules",
    "rank_dropout", "module_dropout", "alpha", "task_type",
}  # fmt: skip

# A tensor of an adapter: the module's path, then what the method calls its own.
_LEAF = re.compile(r"base_model\.model\.(.+?)\.(?:lora_|hada_|lokr_|ia3_)")


@dataclass(frozen=True)
class Loaded:
    """What runs: a model in evaluation mode, its processor, and where."""

    model: Any
    processor: Any
    device: torch.device
    image_token: int
    """The id of the token that stands for one image feature."""
    longest: int
    """Tokens that the language model has places for."""
    about: dict[str, Any]
    """`commit`, `digest`, `device`, `dtype`, `versions`, `template`, `adapter_…`."""


@contextmanager
def opened(
    model: str,
    *,
    adapter: str | None = None,
    device: str = "auto",
    offline: bool = False,
) -> Iterator[Loaded]:
    """The model of a folder or a Hub repository, with an adapter of peft put into it, not merged.

    float32 on a CPU, bfloat16 on a GPU. Raises UnsupportedError (`unsupported.model`: it cannot be
    run from a staged snapshot, has no image tokens or no chat template; `unsupported.adapter`;
    `unsupported.extra`), UsageError (`usage.device`), and what opening sources raises.
    """
    missing = [n for n in ("transformers", "accelerate", "PIL", "pyarrow") if find_spec(n) is None]
    if adapter is not None and find_spec("peft") is None:
        missing.append("peft")
    if missing:
        says = f"not installed: {', '.join(missing)}"
        raise UnsupportedError(says, "extra", remedy="pip install 'projaudit[screen]'")
    place = find_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with _snapshot(model, adapter, offline) as (staged, staged_adapter, about):
        net, processor = _built(staged, place, dtype)
        if staged_adapter is not None:
            net = _adapted(net, staged_adapter, str(adapter))
        template = getattr(processor, "chat_template", None)
        if not template:
            raise UnsupportedError("its processor has no chat template", "model", file=clean(model))
        about |= {
            "device": place.type,
            "dtype": str(dtype).removeprefix("torch."),
            "versions": {p: version(p) for p in PACKAGES if adapter is not None or p != "peft"},
            "template": "sha256:" + hashlib.sha256(str(template).encode()).hexdigest(),
        }
        yield Loaded(net, processor, place, _image_token(net, model), _longest(net), about)


def identity(model: str, adapter: str | None, *, offline: bool) -> dict[str, Any]:
    """What `Loaded.about` says of the bytes that a model is made from; nothing is loaded."""
    with _snapshot(model, adapter, offline) as (_, _, about):
        return about


@contextmanager
def _snapshot(
    model: str, adapter: str | None, offline: bool
) -> Iterator[tuple[Path, Path | None, dict[str, Any]]]:
    """The staged folders of the model and its adapter, with their commits and digests."""
    settings = settle({}, device="cpu", rank=None, seed=0, verify=None, offline=offline)
    with (
        Session(settings, None, None) as session,
        tempfile.TemporaryDirectory(prefix="projaudit-", ignore_cleanup_errors=True) as folder,
    ):
        source = session.source(parse_ref(model))
        staged = _staged(source, Path(folder) / "model")
        about = {"commit": source.commit, "digest": _digest(staged)}
        added = None
        if adapter is not None:
            there = session.source(parse_ref(adapter))
            added = _staged_adapter(there, Path(folder) / "adapter")
            about |= {"adapter_commit": there.commit, "adapter_digest": _digest(added)}
        yield staged, added, about


def _staged(source: Source, into: Path) -> Path:
    if ADAPTER_CONFIG in source.files and "config.json" not in source.files:
        raise UsageError(
            "is an adapter",
            "model",
            file=clean(source.name),
            remedy="give its base as the model, and it with --adapter",
        )
    checkpoint = open_checkpoint(source)
    files = sorted({info.file for info in checkpoint.readings[0].tensors.values()})
    try:
        return stage(source, files, into)
    except CouldNotProbe as why:
        raise _cannot(source.name, why.reason) from None


def _cannot(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"cannot be run: {reason}", "model", file=clean(name))


def _digest(folder: Path) -> str:
    """Of every file that the model is made from."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _built(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, with the attention that transformers takes by itself, and its processor."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    build: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, loading = build(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
        processor: Any = processor_class(model).from_pretrained(folder, **local)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a hostile or unknown configuration makes it raise
        first = str(error).strip().partition("\n")[0]
        says = f"transformers cannot build it: {type(error).__name__}: {clean(first)}"
        raise UnsupportedError(says, "model") from None
    finally:
        if shown:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    if missing := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        says = f"its weights lack {len(missing)} tensors, {clean(missing[0], 80)} for one"
        raise UnsupportedError(says, "model")
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        says = "transformers finds no tokenizer and image processor for it"
        raise UnsupportedError(says, "model")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return model.eval().requires_grad_(False), processor


def _staged_adapter(source: Source, into: Path) -> Path:
    if ADAPTER_CONFIG not in source.files:
        says = f"is no adapter: it has no {ADAPTER_CONFIG}"
        raise UnsupportedError(says, "adapter", file=clean(source.name))
    adapter = read_adapter(source)
    if adapter is None:
        raise not_read(source)
    kept = {key: value for key, value in adapter.config.items() if key in _ADAPTER_KEYS}
    places = (_LEAF.match(name) for name in adapter.tensors)
    modules = sorted({place[1] for place in places if place})
    for module in modules:
        rank_of(adapter.config, module, "r", 8)  # for what it raises: patterns that take long
    if isinstance(kept.get("target_modules"), str):
        # An expression of the repository's, which may take for ever; what it found is known.
        kept |= {"target_modules": modules, "exclude_modules": None, "layers_to_transform": None}
    elif isinstance(kept.get("exclude_modules"), str):
        raise FormatError("is an expression, beside target_modules that are none", "adapter",
                          file=ADAPTER_CONFIG, field="exclude_modules")  # fmt: skip
    into.mkdir(mode=0o700)
    (into / ADAPTER_CONFIG).write_text(json.dumps(kept))
    (into / ADAPTER_WEIGHTS).symlink_to(source.whole(ADAPTER_WEIGHTS).resolve())
    return into


def _adapted(model: Any, folder: Path, name: str) -> Any:
    """The model with the adapter beside its weights, as training ran it; nothing is rounded."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with warnings.catch_warnings():
            # peft asks transformers for what it has renamed, and tells what is asked below.
            warnings.simplefilter("ignore")
            with_adapter: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            stored = set(file.keys())
        if unused := stored - set(get_peft_model_state_dict(with_adapter)):
            says = f"{len(unused)} of its tensors have no place, {clean(min(unused), 80)} for one"
            raise FormatError(says, "adapter", file=clean(name))
    except FormatError:
        raise
    except Exception as error:  # whatever a hostile or unknown configuration makes it raise
        first = clean(str(error).strip().partition("\n")[0])
        says = f"peft cannot put it into the model: {type(error).__name__}: {first}"
        raise UnsupportedError(says, "adapter", file=clean(name)) from None
    return with_adapter.eval().requires_grad_(False).get_base_model()


def _image_token(model: Any, name: str) -> int:
    for key in ("image_token_id", "image_token_index"):
        found = getattr(model.config, key, None)
        if type(found) is int:
            return found
    raise _cannot(name, "its config names no image token (image_token_id)")


def _longest(model: Any) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if type(longest) is int and longest > 0 else 1 << 20
