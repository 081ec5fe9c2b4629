"""Which bytes are the weights: every way in which a loader may read a repository's tensors."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from projaudit.errors import FormatError, LimitError, NothingError, UnsupportedError
from projaudit.inert import clean
from projaudit.safetensors_header import Header, TensorInfo, read_header
from projaudit.source import Source, refuse_lfs_pointer
from projaudit.strict import JSON_LIMIT, load_json

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TRANSFORMERS = (5, 23, 0)
"""The release of transformers whose choice of files is mirrored here."""

MAX_SHARDS = 2_000
MAX_TENSORS = 2_000_000
MAX_READINGS = 16
INDEX_LIMIT = 64 << 20
"""Bytes of an index."""
TENSOR_LIMIT = 4 << 30
"""Bytes of one tensor that is loaded."""
_NAMED = 100  # tensors that an ambiguity lists

_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What a Trainer leaves beside the weights, and no loader takes for weights.
_TRAINER = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)")
_SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<total>\d{5})(?P<tail>.*)")
# With `$`, as transformers has it: a newline at the end of the name is let through.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")
_VARIANT = re.compile(
    r"model(\.[^.]+\.safetensors|\.[^.]+-\d.*|-\d{5}-of-\d{5}\.[^.]+\.safetensors)"
)
_PIECES = "DCP_SHARDING_INFO"
_CONFIG_VERSION = re.compile(r"config\.(\d+(?:\.\d+){0,3})\.json")


@dataclass(frozen=True)
class Ambiguity:
    """Something in a repository that lets two loaders, or two releases, read different weights."""

    kind: str
    """`redirect` `config-redirect` `distributed-shards` `index-beside-file` `shadowed-tensor`
    `unindexed-tensor` `alias-names` `confusable-names` `variant-file` `consolidated-file`
    `unread-file` `unread-subfolder` `no-index` `pickle-beside` `gguf-beside` `adapter-beside`
    `quantized` `custom-code`"""
    message: str
    """One inert line."""
    files: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    """The first hundred names; untrusted text."""


@dataclass(frozen=True)
class Reading:
    """One way in which a loader may read the repository."""

    label: str
    """`main` for what transformers loads; else a short unique word of ours."""
    why: str
    tensors: Mapping[str, TensorInfo] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a source: where each tensor is, for every reading; nothing loaded yet."""

    source: Source
    config: Mapping[str, object] | None
    """config.json as a loader sees it; None where there is none."""
    readings: tuple[Reading, ...]
    """What transformers loads first, then what others may load instead."""
    ambiguities: tuple[Ambiguity, ...]
    headers: Mapping[str, Header] = field(repr=False)
    """By file, of every file whose header was read."""

    @property
    def quantized(self) -> bool:
        """Whether config.json makes a loader rewrite weights as it loads them."""
        return any(item.kind == "quantized" for item in self.ambiguities)


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in its file."""

    info: TensorInfo
    sha256: str
    """Of the bytes read, hex."""
    tensor: torch.Tensor
    """In its storage dtype, on the CPU."""


def open_checkpoint(source: Source) -> Checkpoint:
    """The weights of a source, in every way that a loader may read them.

    Reads config.json, the index and the headers of the safetensors files in the root. Raises
    FormatError (`format.config`, `format.index`, `format.safetensors`, `format.lfs-pointer`),
    NothingError (`nothing.weights`), UnsupportedError (`unsupported.format`,
    `unsupported.adapter`) where there are weights that projaudit does not read, and LimitError
    (`limit.shards`, `limit.tensors`, `limit.readings`).
    """
    if source.ref.path is not None and not source.ref.path.is_dir():
        return _open_file(source)
    config, redirect, hints, notes = _read_config(source)
    headers = _Headers(source)
    readings = _Readings(source)
    root = [path for path in source.files if "/" not in path]
    weights = [p for p in root if p.endswith(".safetensors") and not _is_adapter(p)]
    if len(weights) > MAX_SHARDS:
        raise LimitError(f"{len(weights)} safetensors files, above {MAX_SHARDS}", "shards")

    ways = _ways(source, redirect, hints, weights)
    if not ways:
        raise _nothing_to_read(source, root)
    for way in ways:
        parts = [headers[path] for path in way.files]
        if way.label == "distributed" and any(_PIECES in part.metadata for part in parts):
            raise UnsupportedError(
                "is a distributed checkpoint, with tensors in pieces",
                "format",
                file=clean(source.name),
                remedy="save it with save_pretrained on one process",
            )
        notes += readings.add_way(way, parts, config)
    if not readings.found:
        raise NothingError("its weight files hold no tensors", "weights", file=clean(source.name))
    used = {path for way in ways for path in way.files}
    notes += _unread_files(source, weights, used, headers, readings, config)
    notes += _beside(source, root, used)
    notes += _odd_names(readings.found)
    return Checkpoint(source, config, tuple(readings.found), tuple(notes), headers.known)


def load_tensors(source: Source, infos: Iterable[TensorInfo]) -> dict[str, Stored]:
    """The tensors of those infos by name, in storage dtype, with the sha256 of their bytes.

    Raises UnsupportedError (`unsupported.dtype`) for what is not floating point of 8 to 64 bits,
    LimitError (`limit.tensor-size`) above 4 GiB, both before anything is read; ValueError for two
    infos of one name; and what the source raises.
    """
    by_file: dict[str, list[TensorInfo]] = defaultdict(list)
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise ValueError(f"two tensors are called {info.name!r}")
        names.add(info.name)
        _check_loadable(info)
        by_file[info.file].append(info)
    stored: dict[str, Stored] = {}
    for path, wanted in by_file.items():
        wanted.sort(key=lambda info: info.start)
        spans = source.read_spans(path, [(info.start, info.stop) for info in wanted])
        for info, data in zip(wanted, spans, strict=True):
            digest = hashlib.sha256(data).hexdigest()
            stored[info.name] = Stored(info, digest, _as_tensor(info, data))
    return stored


def _check_loadable(info: TensorInfo) -> None:
    where = {"file": clean(info.file), "field": clean(info.name)}
    if info.dtype not in _TORCH_DTYPES:
        raise UnsupportedError(
            f"dtype {info.dtype} is not audited",
            "dtype",
            **where,
            remedy=f"save the projector as one of {', '.join(_TORCH_DTYPES)}",
        )
    if info.nbytes > TENSOR_LIMIT:
        raise LimitError(f"{info.nbytes} bytes, above {TENSOR_LIMIT}", "tensor-size", **where)


def _as_tensor(info: TensorInfo, data: bytes) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[info.dtype])
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    # A copy, as torch wants memory that may be written to.
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(info.shape)


@dataclass(frozen=True)
class _Way:
    """Files that a loader reads one after the other, a later tensor replacing an earlier one."""

    label: str
    why: str
    files: tuple[str, ...]
    kind: str = ""
    """The ambiguity that it is, if it reads other bytes than the ways before it."""
    index: str = ""
    weight_map: Mapping[str, str] = field(default_factory=dict)


def _ways(
    source: Source, redirect: str | None, hints: Sequence[str], weights: Sequence[str]
) -> list[_Way]:
    """The ways to read the repository, what transformers does first."""
    ways: list[_Way] = []
    if redirect is not None:
        ways.append(_redirected(source, redirect, "redirect"))
    if WEIGHTS in source.files:
        ways.append(_Way("default", f"{WEIGHTS}, which transformers takes first", (WEIGHTS,)))
    if INDEX in source.files:
        kind = "index-beside-file" if WEIGHTS in source.files else ""
        ways.append(_indexed(source, INDEX, "index", f"the shards of {INDEX}", kind))
    if not ways and weights and not any(_is_pickled_model(path) for path in source.files):
        why = f"there is neither {WEIGHTS} nor its index: some loaders take all safetensors files"
        ways.append(_Way("all-files", why, tuple(weights), kind="no-index"))
    for number, hint in enumerate(hints, start=1):
        ways.append(_redirected(source, hint, f"redirect-hint-{number}"))
    shards = [path for path in source.files if _DISTRIBUTED.match(path)]
    if shards:
        # transformers looks for these in a folder before anything else, then reads every file.
        why = f"{clean(shards[0], 80)} makes transformers read the folder as a distributed one"
        files = [p for p in source.files if "/" not in p and p.endswith(".safetensors")]
        way = _Way("distributed", why, tuple(files), kind="distributed-shards")
        ways.insert(0 if source.ref.kind == "local" else len(ways), way)
    return ways


def _redirected(source: Source, target: str, label: str) -> _Way:
    why = f"the config says transformers_weights: {clean(target, 100)}"
    suffixes = (".safetensors", ".safetensors.index.json")
    if not target.endswith(suffixes):
        raise UnsupportedError(
            f"transformers_weights names {clean(target, 100)!r}, which is not read",
            "format",
            file="config.json",
            remedy="convert the weights to safetensors; projaudit never unpickles",
        )
    _named_file(source, target, "config", "config.json", "transformers_weights", suffixes)
    if target.endswith(".json"):
        return _indexed(source, target, label, why, "redirect")
    return _Way(label, why, (target,), kind="redirect")


def _indexed(source: Source, index: str, label: str, why: str, kind: str) -> _Way:
    data = source.read_small(index, INDEX_LIMIT)
    refuse_lfs_pointer(data, index)
    content = load_json(data, file=index, limit=INDEX_LIMIT, kind="index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no weight_map", "index", file=clean(index))
    for path in set(weight_map.values()) if _all_text(weight_map.values()) else [None]:
        _named_file(source, path, "index", index, "weight_map", (".safetensors",))
    files = sorted(set(weight_map.values()))
    if len(files) > MAX_SHARDS:
        raise LimitError(f"{len(files)} shards, above {MAX_SHARDS}", "shards", file=clean(index))
    return _Way(label, why, tuple(files), kind=kind, index=index, weight_map=weight_map)


def _all_text(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _named_file(
    source: Source, path: object, kind: str, file: str, key: str, suffixes: tuple[str, ...]
) -> None:
    """None, or FormatError if what a file of the repository names is none of its weight files."""

    def refuse(message: str) -> FormatError:
        return FormatError(message, kind, file=clean(file), field=key)

    if not isinstance(path, str):
        raise refuse("names something that is no file name")
    shown = clean(repr(path), 120)
    if path.startswith(("/", "../")) or "\\" in path or posixpath.normpath(path) != path:
        raise refuse(f"names {shown}, which may lie outside the repository")
    if path not in source.files:
        raise refuse(f"names {shown}, which is not there")
    if not path.endswith(suffixes):
        raise refuse(f"names {shown}, which is not a safetensors file")


class _Headers:
    """The headers of a source's files, each read once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.known: dict[str, Header] = {}
        self.tensors = 0

    def __getitem__(self, path: str) -> Header:
        if path not in self.known:
            header = self.known[path] = read_header(self.source, path)
            self.tensors += len(header.tensors)
            if self.tensors > MAX_TENSORS:
                raise LimitError(f"more than {MAX_TENSORS} tensors in all files", "tensors")
        return self.known[path]


class _Readings:
    """The distinct readings found so far."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[Reading] = []
        self._seen: list[dict[str, tuple[object, ...]]] = []

    def add(self, label: str, why: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether that reading has tensors and reads other bytes than those found before."""
        places = {name: self.place(info) for name, info in tensors.items()}
        if not places or places in self._seen:
            return False
        if len(self.found) == MAX_READINGS:
            raise LimitError(
                f"more than {MAX_READINGS} ways to read the weights",
                "readings",
                file=clean(self.source.name),
                remedy="remove the weight files that the model does not use",
            )
        self._seen.append(places)
        self.found.append(Reading("main" if not self.found else label, why, tensors))
        return True

    def add_way(
        self, way: _Way, headers: Sequence[Header], config: Mapping[str, object] | None
    ) -> list[Ambiguity]:
        """The ambiguities of a way, whose readings are added."""
        copies = self.copies(headers)
        notes: list[Ambiguity] = []
        first = not self.found
        best, aliases = _one_name_each(_choose(copies, -1), config)
        new = self.add(way.label, way.why, best)
        if way.kind and ((new and not first) or way.kind in _ALWAYS or self._is_detour(way)):
            notes.append(Ambiguity(way.kind, way.why, _files(way)))
        if not new:
            return notes

        twice = [name for name, found in copies.items() if len(found) > 1]
        if twice:
            says = f"{_count(twice)} in more than one file; transformers takes the last file's"
            notes.append(_about("shadowed-tensor", says, twice, copies))
        unindexed = [name for name in copies if way.weight_map and name not in way.weight_map]
        if unindexed:
            says = f"{_count(unindexed)} not in {clean(way.index, 80)}, loaded all the same"
            notes.append(_about("unindexed-tensor", says, unindexed, copies))
        if way.weight_map and (twice or unindexed):
            mapped = {
                name: next((i for i in found if i.file == way.weight_map[name]), found[-1])
                for name, found in copies.items()
                if name in way.weight_map
            }
            self.add(f"{way.label}-map", "what the index says", _one_name_each(mapped, config)[0])
        for number in range(2, 1 + max(map(len, copies.values()), default=0)):
            other = _one_name_each(_choose(copies, -number), config)[0]
            self.add(f"{way.label}-copy-{number}", f"copy {number} of a tensor counts", other)
        if aliases:
            names = sorted(name for group in aliases for name in group)
            says = f"{_count(names)} names of one parameter; one of them is loaded"
            notes.append(_about("alias-names", says, names, copies))
            for number in range(1, max(map(len, aliases))):
                other = _one_name_each(_choose(copies, -1), config, number)[0]
                self.add(f"{way.label}-alias-{number + 1}", "another name counts", other)
        return notes

    def copies(self, headers: Sequence[Header]) -> dict[str, list[TensorInfo]]:
        """Every tensor by name, the copies in the order of the files, provably equal ones once."""
        found: dict[str, list[TensorInfo]] = {}
        for header in headers:
            for name, info in header.tensors.items():
                others = found.get(name)
                if others is None:
                    found[name] = [info]
                else:
                    place = self.place(info)
                    found[name] = [copy for copy in others if self.place(copy) != place] + [info]
        return found

    def place(self, info: TensorInfo) -> tuple[object, ...]:
        """Where the bytes are, the same for files that are proven equal."""
        digest = self.source.files[info.file].sha256
        return (digest or f"path:{info.file}", info.start, info.stop, info.dtype, info.shape)

    def _is_detour(self, way: _Way) -> bool:
        # A redirect is the first way; it is none if it leads to where the loader goes anyway.
        plain = WEIGHTS if WEIGHTS in self.source.files else INDEX
        return way.kind == "redirect" and (way.index or way.files[0]) != plain


_ALWAYS = {"distributed-shards", "no-index"}


def _choose(copies: Mapping[str, list[TensorInfo]], number: int) -> dict[str, TensorInfo]:
    return {name: found[max(number, -len(found))] for name, found in copies.items()}


def _files(way: _Way) -> tuple[str, ...]:
    return (way.index, *way.files) if way.index else way.files


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _about(
    kind: str, says: str, names: Sequence[str], copies: Mapping[str, list[TensorInfo]]
) -> Ambiguity:
    files = sorted({info.file for name in names for info in copies[name]})
    return Ambiguity(kind, f"{clean(names[0], 100)}: {says}", tuple(files), tuple(names[:_NAMED]))


# What stands for the same parameter in transformers (a leading `model.` comes and goes, and its
# pattern's dot takes any character) and in the original code of LLaVA, InternVL and Pixtral.
_RENAMES = (
    (re.compile(r"^(?:model[^\n])+"), ""),
    (re.compile(r"(?<=\.)model\."), ""),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"(?<=vision_tower\.)vision_model\."), ""),
    (re.compile(r"^(?:mm_projector\.0|mlp1\.1|vision_language_adapter\.w_in)\."), "P.linear_1."),
    (re.compile(r"^(?:mm_projector\.2|mlp1\.3|vision_language_adapter\.w_out)\."), "P.linear_2."),
    (re.compile(r"^mlp1\.0\."), "P.layer_norm."),
    (re.compile(r"^P\."), "multi_modal_projector."),
)


@lru_cache(maxsize=1 << 16)
def parameter(name: str) -> str:
    """The parameter that a tensor name stands for: equal for names that a loader may mix up."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _one_name_each(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, object] | None, number: int = 0
) -> tuple[Mapping[str, TensorInfo], list[list[str]]]:
    """The tensors less those whose parameter another name supplies, and groups of such names.

    `number` picks the second, third, … best name instead of the one that transformers takes.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        groups[parameter(name)].append(name)
    several = [group for group in groups.values() if len(group) > 1]
    dropped: set[str] = set()
    for group in several:
        group.sort(key=lambda name: (_is_foreign(name, config), _natural_key(name)))
        dropped.update(group)
        dropped.remove(group[min(number, len(group) - 1)])
    if not dropped:
        return tensors, []
    return {name: info for name, info in tensors.items() if name not in dropped}, several


def _is_foreign(name: str, config: Mapping[str, object] | None) -> bool:
    """Whether the model's class does not know that name of a projector."""
    config = config or {}
    listed = config.get("architectures")
    classes = [str(item) for item in listed] if isinstance(listed, list) else []
    if "mm_projector." in name:
        return not any(c.startswith("Llava") and c.endswith("ForCausalLM") for c in classes)
    if name.startswith("mlp1."):
        return "internvl" not in str(config.get("model_type"))
    return name.startswith("vision_language_adapter.")


def _natural_key(name: str) -> list[tuple[int | str, ...]]:
    """transformers loads names in this order, and the first of two that mean one parameter wins."""
    key: list[tuple[int | str, ...]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        # Longer numbers are larger; int() refuses the very long ones.
        number = (len(digits.lstrip("0")), digits.lstrip("0")) if digits else ()
        key.append((1, text, *number) if text else (0, *number))
    return key


def _unread_files(
    source: Source,
    weights: Sequence[str],
    used: set[str],
    headers: _Headers,
    readings: _Readings,
    config: Mapping[str, object] | None,
) -> list[Ambiguity]:
    """The ambiguities of safetensors files that no way so far reads, added as readings."""
    proven = {source.files[path].sha256 for path in used} - {None}
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in weights:
        if path not in used and source.files[path].sha256 not in proven:
            shard = _SHARD.fullmatch(path)
            groups[shard.group("stem", "total", "tail") if shard else (path,)].append(path)
    notes: list[Ambiguity] = []
    main = readings.found[0].tensors
    parameters = {parameter(name): name for name in main}
    for number, group in enumerate(groups.values(), start=1):
        copies = readings.copies([headers[path] for path in group])
        tensors = _choose(copies, -1)
        replaced = {parameters[p] for p in map(parameter, tensors) if p in parameters}
        kind, says = _kind_of_unread(group[0])
        if replaced and len(replaced) < len(main):
            # A part of the model: what a loader of all files puts over the rest.
            rest = {name: info for name, info in main.items() if name not in replaced}
            tensors = {**rest, **tensors}
        why = f"{clean(group[0], 80)}: {says}"
        if readings.add(f"{kind}-{number}", why, _one_name_each(tensors, config)[0]):
            notes.append(Ambiguity(kind, why, tuple(group), tuple(sorted(copies)[:_NAMED])))
    return notes


def _kind_of_unread(path: str) -> tuple[str, str]:
    if path.startswith("consolidated"):
        return "consolidated-file", "weights in Mistral's layout, which vLLM may read instead"
    if _VARIANT.fullmatch(path):
        return "variant-file", "weights that are read when a variant is asked for"
    return "unread-file", "weights that transformers does not read and other loaders may"


def _beside(source: Source, root: Sequence[str], used: set[str]) -> list[Ambiguity]:
    """The ambiguities of weights that are not read here."""
    found = {
        "pickle-beside": [p for p in root if _is_pickle(p)],
        "gguf-beside": [p for p in root if p.endswith(".gguf")],
        "adapter-beside": [p for p in root if _is_adapter(p)],
        "unread-subfolder": [
            path
            for path in source.files
            if "/" in path and path.endswith(".safetensors") and path not in used
        ],
    }
    says = {
        "pickle-beside": "pickled weights, which older or other loaders may take; not read",
        "gguf-beside": "GGUF weights, which llama.cpp takes; not read",
        "adapter-beside": "an adapter, which transformers applies where peft is installed "
        "(from a Hub: to the base that the adapter names); not read",
        "unread-subfolder": "weights in a subfolder, loaded if it is asked for; not read",
    }
    return [
        Ambiguity(kind, f"{clean(files[0], 80)}: {says[kind]}", tuple(files))
        for kind, files in found.items()
        if set(files) - used
    ]


def _odd_names(readings: Sequence[Reading]) -> list[Ambiguity]:
    odd = sorted(
        {
            name
            for reading in readings
            for name in reading.tensors
            if not (name.isascii() and name.isprintable() and name)
        }
    )
    if not odd:
        return []
    says = f"{_count(odd)} whose name is not plain printable ASCII, so it may pass for another"
    files = {r.tensors[n].file for r in readings for n in odd if n in r.tensors}
    return [Ambiguity("confusable-names", says, tuple(sorted(files)), tuple(odd[:_NAMED]))]


def _is_pickle(path: str) -> bool:
    return path.endswith(_PICKLES) and not _TRAINER.match(path) and not _is_adapter(path)


def _is_adapter(path: str) -> bool:
    return path.startswith(("adapter_config.json", "adapter_model."))


def _is_pickled_model(path: str) -> bool:
    return path in ("pytorch_model.bin", "pytorch_model.bin.index.json")


def _nothing_to_read(source: Source, root: Sequence[str]) -> NothingError | UnsupportedError:
    pickles = [path for path in root if _is_pickle(path)]
    ggufs = [path for path in root if path.endswith(".gguf")]
    if pickles or ggufs:
        return _not_read(source.name, (pickles or ggufs)[0], bool(pickles))
    if any(_is_adapter(path) for path in root):
        return UnsupportedError(
            "holds an adapter without the model",
            "adapter",
            file=clean(source.name),
            remedy="merge it into its base and audit the result",
        )
    return NothingError("holds no model weights", "weights", file=clean(source.name))


def _not_read(where: str, path: str, pickled: bool) -> UnsupportedError:
    remedy = "convert it to safetensors" + ("; projaudit never unpickles" if pickled else "")
    says = f"{clean(path, 80)} holds {'pickled' if pickled else 'GGUF'} weights, which are not read"
    return UnsupportedError(says, "format", file=clean(where), remedy=remedy)


def _open_file(source: Source) -> Checkpoint:
    """The one file that the user named."""
    path = next(iter(source.files))
    head = source.read(path, 0, min(source.files[path].size, 64))
    refuse_lfs_pointer(head, path)
    if head.startswith(b"GGUF") or path.endswith((".gguf", *_PICKLES)):
        raise _not_read(source.name, path, not head.startswith(b"GGUF"))
    if path.endswith(".json"):
        raise UnsupportedError(
            "is no weight file", "format", file=clean(path), remedy="name its folder"
        )
    headers = _Headers(source)
    header = headers[path]
    if not header.tensors:
        raise NothingError("holds no tensors", "weights", file=clean(path))
    readings = _Readings(source)
    notes = readings.add_way(_Way("main", "the file as named", (path,)), [header], None)
    notes += _odd_names(readings.found)
    return Checkpoint(source, None, tuple(readings.found), tuple(notes), headers.known)


def _read_config(
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
    refuse_lfs_pointer(data, path)
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
