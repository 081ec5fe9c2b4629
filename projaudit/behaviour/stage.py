"""The folder that transformers is given in place of the repository: known names, checked bytes.

Weights are links to files whose bytes are proven. Everything smaller is a copy, so that what was
checked here is what is read there. Where a file would make transformers run code, reach for another
repository or open a path, either the reach is taken out, if the model stays the same without it,
or the model is refused. The places named below are those of transformers 5.23.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.errors import FormatError, LimitError
from projaudit.inert import clean
from projaudit.source import Source, refuse_lfs_pointer
from projaudit.strict import JSON_LIMIT, load_json
from projaudit.weight_files import INDEX, INDEX_LIMIT, WEIGHTS

CONFIGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
# JSON whose keys are tokens, so that no key in them means anything.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
TEXTS = ("merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")
VOCABULARY_LIMIT = 64 << 20
"""Bytes of a vocabulary; the largest in use have about 35 MiB."""
TEMPLATE_LIMIT = 1 << 20
"""Bytes of a chat template."""

_TEMPLATE = re.compile(r"additional_chat_templates/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\.jinja")
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.safetensors")
# get_checkpoint_shard_files: files of these names go before model.safetensors in a local folder.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-")
# What a tokenizer can be built from, without anything else.
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)

_CODE = "needs code of its own"
_ELSEWHERE = "needs files from elsewhere"
# Key -> why a model is refused whose JSON gives it a value, at any depth.
_REFUSED = {
    # dynamic_module_utils: classes out of *.py of this or another repository.
    "auto_map": _CODE,
    "custom_code": _CODE,
    "trust_remote_code": _CODE,
    "custom_pipelines": _CODE,
    # integrations/hub_kernels: compiled code from the Hub.
    "kernel_config": _CODE,
    "use_kernels": _CODE,
    # quantizers/auto: other weights than stored, by libraries and kernels that it fetches.
    "quantization_config": "is quantized, and what unpacks it is not run",
    "compression_config": "is quantized, and what unpacks it is not run",
    # backbone_utils.consolidate_backbone_kwargs_to_config: asks the Hub for the repository that
    # `backbone` names, or reads the folder; timm fetches weights by name.
    "backbone": _ELSEWHERE,
    "use_timm_backbone": _ELSEWHERE,
    "use_pretrained_backbone": _ELSEWHERE,
    # processing_utils.get_processor_dict: from_pretrained of a name in the file.
    "audio_tokenizer": _ELSEWHERE,
    # The image processor of OneFormer opens repo_path/class_info_file, or asks the Hub for it;
    # RAG does so with its index.
    "repo_path": _ELSEWHERE,
    "class_info_file": _ELSEWHERE,
    "index_path": _ELSEWHERE,
    "passages_path": _ELSEWHERE,
    # modeling_utils._get_resolved_checkpoint_files, get_configuration_file and
    # get_fast_tokenizer_file: other files than those of the usual names.
    "transformers_weights": "is redirected to other weights",
    "configuration_files": "is redirected to another config",
    "fast_tokenizer_files": "is redirected to another tokenizer",
    "gguf_file": "is redirected to another tokenizer",
    # PreTrainedConfig.__setattr__: any key may then be set under the name of another.
    "attribute_map": "renames the keys of its config",
}
# tokenization_utils_base._from_pretrained: positional arguments and vocabularies of the class,
# which opens them if they are texts.
_REFUSED_IN_TOKENIZERS = {"init_inputs": _ELSEWHERE, "vocab": _ELSEWHERE, "merges": _ELSEWHERE}
_ATTENTION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_LOCATION = re.compile(r".*(_file|_files|_path|_paths|_dir|_name_or_path|repo_id)")
# Where the model was once saved, which is nothing to load from: `name_or_path` is set anew by every
# from_pretrained. compile_config makes generate() start compilers, for the same answer.
_DROPPED = frozenset({"_name_or_path", "name_or_path", "compile_config"})
# Of weights that are no longer quantised.
_UNPACKED = _DROPPED | {"quantization_config", "compression_config"}


def stage(
    source: Source, weight_files: Sequence[str] | None, into: Path, *, adapter_read: bool = False
) -> Path:
    """The folder `into`, new or empty before, with what transformers may read of the source.

    `weight_files` are the files of the reading that is to run, by their names in the repository;
    those of a Hub are downloaded as a whole where they are not on this machine. None stands for
    float weights that the caller will write there: no config of a quantiser is left. An adapter
    beside them is left out where the caller has read it, and a reason otherwise. Raises
    CouldNotProbe where the model is not one that can be run from such a folder alone, and what the
    source raises.
    """
    into.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(into.iterdir()):
        raise ValueError(f"{into} is not empty")
    try:
        require_parts(source, adapter_read=adapter_read)
        # Weights last: they are what is downloaded.
        for path, data in _small_files(source, _UNPACKED if weight_files is None else _DROPPED):
            _write(into / path, data)
        if weight_files is None:
            return into
        shards, index = _weights(source, weight_files)
        if index is not None:
            _write(into / INDEX, index)
        for path in shards:
            (into / path).symlink_to(_proven(source, path))
    except (FormatError, LimitError) as error:
        raise CouldNotProbe(str(error)) from None
    return into


def to_download(source: Source, weight_files: Sequence[str]) -> int:
    """How many bytes, at most, `stage` would have to download."""
    wanted = {path for path in (*_names(source), *weight_files) if path in source.files}
    return sum(source.files[path].size for path in wanted if not source.at_hand(path))


def _names(source: Source) -> list[str]:
    """The small files that are staged."""
    known = (*CONFIGS, *TOKENIZER_CONFIGS, *VOCABULARIES, *TEXTS)
    return [path for path in source.files if path in known or _TEMPLATE.fullmatch(path)]


def require_parts(source: Source, *, adapter_read: bool = False) -> None:
    """None, or CouldNotProbe where a part is missing that a run cannot do without."""
    there = source.files.keys()
    if "config.json" not in there:
        raise CouldNotProbe("it has no config.json")
    if not any(set(files) <= there for files in _TOKENIZERS):
        raise CouldNotProbe("it has no tokenizer")
    if there.isdisjoint({"preprocessor_config.json", "processor_config.json"}):
        raise CouldNotProbe("it has no image processor (preprocessor_config.json)")
    if "adapter_config.json" in there and not adapter_read:
        # integrations/peft.maybe_load_adapters: applied wherever peft is installed.
        raise CouldNotProbe("it comes with an adapter, which some loaders apply to it")
    if any(_DISTRIBUTED.match(path) for path in there):
        raise CouldNotProbe("it comes with distributed shards, which some loaders take first")


def _small_files(source: Source, dropped: Set[str]) -> Iterator[tuple[str, bytes]]:
    sees = False
    for path in _names(source):
        _require_inside(source, path)
        if path in VOCABULARIES:
            data = source.read_small(path, VOCABULARY_LIMIT)
            if not isinstance(load_json(data, file=path, limit=VOCABULARY_LIMIT), dict):
                raise FormatError("is no JSON object", "json", file=path)
        elif path.endswith(".json"):
            data = source.read_small(path, JSON_LIMIT)
            content = _load(path, data)
            if path == "config.json" and not isinstance(content.get("vision_config"), dict):
                raise CouldNotProbe("its config.json describes no vision tower (vision_config)")
            sees |= path == "preprocessor_config.json" or isinstance(
                content.get("image_processor"), dict
            )
            cleaned = _cleaned(content, path, dropped)
            if cleaned != content:
                data = json.dumps(cleaned).encode()
        else:
            large = path in TEXTS and not path.endswith(".jinja")
            data = source.read_small(path, VOCABULARY_LIMIT if large else TEMPLATE_LIMIT)
        yield path, data
    if not sees:
        raise CouldNotProbe("it has no image processor (preprocessor_config.json)")


def _load(path: str, data: bytes) -> dict[str, object]:
    # First for its errors alone: Infinity, which configs hold, must go through as what it is.
    load_json(data, file=path, constants="text")
    content: object = json.loads(data)
    if not isinstance(content, dict):
        raise FormatError("is no JSON object", "json", file=path)
    return content


def _cleaned(content: Mapping[str, object], file: str, dropped: Set[str]) -> dict[str, object]:
    """The content without what is not needed; raises CouldNotProbe for what is not allowed."""
    kept: dict[str, object] = {}
    for key, value in content.items():
        if key not in dropped and not _refused_or_needless(key, value, file):
            kept[key] = _cleaned_value(value, file, dropped)
    return kept


def _cleaned_value(value: object, file: str, dropped: Set[str]) -> object:
    if isinstance(value, dict):
        return _cleaned(value, file, dropped)
    if isinstance(value, list):
        return [_cleaned_value(item, file, dropped) for item in value]
    return value


def _refused_or_needless(key: str, value: object, file: str) -> bool:
    """Whether a key is left out; raises CouldNotProbe where it stands for more than it may."""
    of_tokenizer = file in TOKENIZER_CONFIGS
    reason = _REFUSED.get(key) or (_REFUSED_IN_TOKENIZERS.get(key) if of_tokenizer else None)
    if reason is not None:
        if value:
            raise _refused(reason, file, key)
        return True
    if key == "model_type" and isinstance(value, str) and value.startswith("timm"):
        # timm.create_model(architecture, **model_args): names on the Hub, files and pickles.
        raise _refused(_ELSEWHERE, file, key)
    if _ATTENTION.fullmatch(key):
        # "org/name" is a kernel from the Hub; "flash_attention_2" falls back to one where flash
        # attention is not installed. Which of the others computes it is up to the run.
        if "/" in json.dumps(value):
            raise _refused(_CODE, file, key)
        return True
    if _LOCATION.fullmatch(key) and isinstance(value, (str, list)) and value:
        # Paths of the machine that saved a tokenizer are common. A vocabulary that lies in the
        # repository replaces them; the others would be opened as they are.
        if of_tokenizer:
            return True
        raise _refused(_ELSEWHERE, file, key)
    return False


def _refused(reason: str, file: str, key: str) -> CouldNotProbe:
    return CouldNotProbe(f"it {reason} ({file}: {clean(key, 60)})")


def _weights(source: Source, weight_files: Sequence[str]) -> tuple[list[str], bytes | None]:
    """The weights that transformers would read out of the folder, and their index."""
    for path in weight_files:
        if not _SHARD.fullmatch(path) or path not in source.files:
            raise CouldNotProbe(f"its weights are in {clean(repr(path), 80)}, which is not staged")
    if WEIGHTS in source.files:
        if list(weight_files) != [WEIGHTS]:
            raise CouldNotProbe(f"its weights are not those that transformers takes ({WEIGHTS})")
        return [WEIGHTS], None
    if INDEX not in source.files:
        raise CouldNotProbe(f"it has neither {WEIGHTS} nor its index")
    data = source.read_small(INDEX, INDEX_LIMIT)
    content = load_json(data, file=INDEX, limit=INDEX_LIMIT, kind="index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    # get_checkpoint_shard_files joins these names to the folder, whatever they are.
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not named or any(name not in weight_files for name in named):
        raise CouldNotProbe(f"{INDEX} names other files than its weights")
    return sorted(set(named)), data


def _proven(source: Source, path: str) -> Path:
    """Where the bytes of a weight file are."""
    _require_inside(source, path)
    found = source.whole(path).resolve()
    refuse_lfs_pointer(source.read(path, 0, min(64, source.files[path].size)), path)
    return found


def _require_inside(source: Source, path: str) -> None:
    """None, or CouldNotProbe where a link of a local folder leads out of it."""
    if source.ref.path is None:
        return
    root = source.ref.path.resolve()
    found = (root / path).resolve()
    # Snapshots of the Hub cache are links to the blobs beside them.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not found.is_relative_to(root) and not found.is_relative_to(blobs):
        raise CouldNotProbe(f"{clean(path, 80)} is a link that leaves the folder")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with path.open("xb") as out:
        out.write(data)
