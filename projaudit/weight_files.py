"""Which files a loader takes for the weights, and what config.json has to say in that."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.inert import clean
from projaudit.peft_config import NON_LORA
from projaudit.source import Source
from projaudit.strict import JSON_LIMIT, load_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
LLAVA_PROJECTOR = "mm_projector.bin"
TRANSFORMERS = (5, 23, 0)
"""The release of transformers whose choice of files is mirrored here."""

MAX_SHARDS = 2_000
INDEX_LIMIT = 64 << 20
"""Bytes of an index."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What a Trainer leaves beside the weights, and no loader takes for weights.
_TRAINER = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)")
SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<total>\d{5})(?P<tail>.*)")

# With `$`, as transformers has it: a newline at the end of the name is let through.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")
_CONFIG_VERSION = re.compile(r"config\.(\d+(?:\.\d+){0,3})\.json")


@dataclass(frozen=True)
class Ambiguity:
    """Something in a repository that lets two loaders, or two releases, read different weights."""

    kind: str
    """`redirect` `config-redirect` `distributed-shards` `index-beside-file` `shadowed-tensor`
    `unindexed-tensor` `alias-names` `confusable-names` `variant-file` `consolidated-file`
    `unread-file` `unread-subfolder` `no-index` `pickle-beside` `gguf-beside` `adapter-beside`
    `quantized` `undeclared-scales` `nested-tensors` `custom-code` `shared-memory`
    `equal-pickle`"""
    message: str
    """One inert line."""
    files: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    """The first hundred names; untrusted text."""


@dataclass(frozen=True)
class Way:
    """Files that a loader reads one after the other, a later tensor replacing an earlier one."""

    label: str
    why: str
    files: tuple[str, ...]
    kind: str = ""
    """The ambiguity that it is, if it reads other bytes than the ways before it."""
    index: str = ""
    weight_map: Mapping[str, str] = field(default_factory=dict)


def ways_to_read(
    source: Source,
    redirect: str | None,
    hints: Sequence[str],
    weights: Sequence[str],
    pickles: Sequence[str],
) -> list[Way]:
    """The ways to read the repository, what transformers does first.

    `weights` and `pickles` are the safetensors files and those of torch.save in its root; the
    latter are a way only where transformers takes them, or where there is nothing else.
    """
    ways: list[Way] = []
    if redirect is not None:
        ways.append(_redirected(source, redirect, "redirect"))
    if WEIGHTS in source.files:
        ways.append(Way("default", f"{WEIGHTS}, which transformers takes first", (WEIGHTS,)))
    if INDEX in source.files:
        kind = "index-beside-file" if WEIGHTS in source.files else ""
        ways.append(_indexed(source, INDEX, "index", f"the shards of {INDEX}", kind))
    if not ways:
        ways += _torch_ways(source)
    if not ways and weights:
        why = f"there is neither {WEIGHTS} nor its index: some loaders take all safetensors files"
        ways.append(Way("all-files", why, tuple(weights), kind="no-index"))
    if not ways and pickles:
        ways.append(_only_pickles(pickles))
    for number, hint in enumerate(hints, start=1):
        ways.append(_redirected(source, hint, f"redirect-hint-{number}"))
    shards = [path for path in source.files if _DISTRIBUTED.match(path)]
    if shards:
        # transformers looks for these in a folder before anything else, then reads every file.
        why = f"{clean(shards[0], 80)} makes transformers read the folder as a distributed one"
        files = [p for p in source.files if "/" not in p and p.endswith(".safetensors")]
        way = Way("distributed", why, tuple(files), kind="distributed-shards")
        ways.insert(0 if source.ref.kind != "hub" else len(ways), way)
    return ways


def is_pickle(path: str) -> bool:
    """Whether a file in the root is named as weights of torch.save are."""
    return path.endswith(PICKLES) and not _TRAINER.match(path) and not is_adapter(path)


def is_adapter(path: str) -> bool:
    """Whether a file in the root is part of an adapter."""
    return path.startswith(("adapter_config.json", "adapter_model.", "adapter_model-"))


def _torch_ways(source: Source) -> list[Way]:
    """What transformers takes where there are no safetensors files that it would."""
    ways: list[Way] = []
    if TORCH_WEIGHTS in source.files:
        why = f"{TORCH_WEIGHTS}, which transformers takes where {WEIGHTS} is missing"
        ways.append(Way("default", why, (TORCH_WEIGHTS,)))
    if TORCH_INDEX in source.files:
        kind = "index-beside-file" if ways else ""
        ways.append(_indexed(source, TORCH_INDEX, "index", f"the shards of {TORCH_INDEX}", kind))
    return ways


def llava_takes_non_lora(source: Source) -> bool:
    """Whether LLaVA's loader, given a base, takes NON_LORA for the projector, and no other file.

    By the name of the repository, as llava/model/builder.py and `get_model_name_from_path` do.
    """
    path = source.ref.path
    *_, before, last = ["", *(source.name if path is None else str(path.absolute())).split("/")]
    named = (f"{before}_{last}" if last.startswith("checkpoint-") else last).lower()
    return "llava" in named and "lora" in named


def _only_pickles(pickles: Sequence[str]) -> Way:
    """What a loader that is told the file's name takes; no name here is one that loaders know."""
    shards = [SHARD.fullmatch(path) for path in pickles]
    sets = {match.group("stem", "total", "tail") for match in shards if match}
    if len(pickles) == 1 or (all(shards) and len(sets) == 1):
        return Way("default", f"{clean(pickles[0], 80)}, the only weights", tuple(pickles))
    if {*pickles} == {LLAVA_PROJECTOR, NON_LORA}:
        why = f"{LLAVA_PROJECTOR}, which LLaVA's loader lays over a base, if not {NON_LORA}"
        return Way("default", why, (LLAVA_PROJECTOR,))
    why = "there are several files of torch.save, and none that loaders take by its name"
    return Way("all-files", why, tuple(pickles), kind="no-index")


def _redirected(source: Source, target: str, label: str) -> Way:
    why = f"the config says transformers_weights: {clean(target, 100)}"
    suffixes = (".safetensors", ".safetensors.index.json")
    if not target.endswith(suffixes):
        raise UnsupportedError(
            f"transformers_weights names {clean(target, 100)!r}, which is not read",
            "format",
            file="config.json",
            remedy="convert the weights to safetensors; projaudit never unpickles",
        )
    _check_named(source, target, "config", "config.json", "transformers_weights", suffixes)
    if target.endswith(".json"):
        return _indexed(source, target, label, why, "redirect")
    return Way(label, why, (target,), kind="redirect")


def _indexed(source: Source, index: str, label: str, why: str, kind: str) -> Way:
    data = source.read_small(index, INDEX_LIMIT)
    content = load_json(data, file=index, limit=INDEX_LIMIT, kind="index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no weight_map", "index", file=clean(index))
    if not _all_text(weight_map.values()):
        raise FormatError(
            "names something that is no file name", "index", file=clean(index), field="weight_map"
        )
    files = sorted(set(weight_map.values()))
    for path in files:
        _check_named(source, path, "index", index, "weight_map", (".safetensors", *PICKLES))
    if len(files) > MAX_SHARDS:
        raise LimitError(f"{len(files)} shards, above {MAX_SHARDS}", "shards", file=clean(index))
    return Way(label, why, tuple(files), kind=kind, index=index, weight_map=weight_map)


def _all_text(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_named(
    source: Source, path: str, kind: str, file: str, key: str, suffixes: tuple[str, ...]
) -> None:
    """None, or FormatError if what a file of the repository names is none of its weight files."""

    def refuse(message: str) -> FormatError:
        return FormatError(message, kind, file=clean(file), field=key)

    shown = clean(repr(path), 120)
    if path.startswith(("/", "../")) or "\\" in path or posixpath.normpath(path) != path:
        raise refuse(f"names {shown}, which may lie outside the repository")
    if path not in source.files:
        raise refuse(f"names {shown}, which is not there")
    if not path.endswith(suffixes):
        raise refuse(f"names {shown}, which is no weight file")


def read_config(
    source: Source,
) -> tuple[Mapping[str, object] | None, str | None, list[str], list[Ambiguity]]:
    """config.json as a loader sees it, where it redirects to, where its other parts and versions
    would, and its ambiguities."""
    if "config.json" not in source.files:
        return None, None, [], []
    notes: list[Ambiguity] = []
    configs = {"config.json": _load_config(source, "config.json")}
    chosen = "config.json"
    versions = _config_versions(configs[chosen])
    for path in versions:
        if path not in source.files:
            raise _bad_config("names a file that is not there", "configuration_files")
        configs[path] = _load_config(source, path)
    for path, version in versions.items():
        if version > TRANSFORMERS:
            break
        chosen = path
    if versions:
        why = f"transformers reads {clean(chosen, 60)} in place of config.json"
        notes.append(Ambiguity("config-redirect", why, tuple(configs)))
    config = configs[chosen]
    mapped = config.get("attribute_map")
    if mapped is not None:
        # An instance attribute of that name shadows the class's own, and moves any other key.
        if not isinstance(mapped, dict) or not _all_text(mapped.values()):
            raise _bad_config("is no object of texts", "attribute_map")
        config = {**config, **{key: config[to] for key, to in mapped.items() if to in config}}
        why = "attribute_map in the config moves keys, so a loader reads other values than shown"
        notes.append(Ambiguity("config-redirect", why, (chosen,)))

    parts = [
        part for key, part in config.items() if isinstance(part, dict) and key.endswith("_config")
    ]
    redirect = _redirect_of(config)
    # Not what transformers does with this config and class, but close enough to be read as well.
    hints = [_redirect_of(other) for other in (*configs.values(), *parts)]
    others = [hint for hint in dict.fromkeys(hints) if hint is not None and hint != redirect]
    parts.append(dict(config))
    if any(part.get("quantization_config") for part in parts):
        why = "quantization_config makes a loader rewrite the weights as it loads them"
        notes.append(Ambiguity("quantized", why, (chosen,)))
    if any(part.get("auto_map") for part in parts):
        why = "auto_map names code of the repository, which may do anything with the weights"
        notes.append(Ambiguity("custom-code", why, (chosen,)))
    return config, redirect, others, notes


def _load_config(source: Source, path: str) -> dict[str, object]:
    data = source.read_small(path, JSON_LIMIT)
    # Infinity stands in the configs of honest state space models.
    config = load_json(data, file=path, kind="config", constants="text")
    if not isinstance(config, dict):
        raise FormatError("is no JSON object", "config", file=clean(path))
    return config


def _config_versions(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """The version of each config file that `configuration_files` names, in the order they count."""
    listed = config.get("configuration_files", [])
    if not isinstance(listed, list) or len(listed) > 16 or not _all_text(listed):
        raise _bad_config("is no short list of file names", "configuration_files")
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(listed):
        match = _CONFIG_VERSION.fullmatch(path)
        if match:
            found[path] = tuple(int(part[:9]) for part in match[1].split("."))
        elif path != "config.json":
            raise _bad_config("names a file that is no config", "configuration_files")
    return found


def _redirect_of(config: Mapping[str, object]) -> str | None:
    target = config.get("transformers_weights")
    if target is not None and not isinstance(target, str):
        raise _bad_config("is no file name", "transformers_weights")
    return target


def _bad_config(message: str, key: str) -> FormatError:
    return FormatError(message, "config", file="config.json", field=key)
