"""Every distinct set of tensors that a loader may take for the weights."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache

from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.gguf_header import read_gguf_header
from projaudit.inert import clean
from projaudit.mmproj import added, projector_types
from projaudit.peft_config import NON_LORA
from projaudit.quantised import find
from projaudit.quantised_layouts import Packed
from projaudit.safetensors_header import PROBE, Header, TensorInfo, read_header
from projaudit.source import Source
from projaudit.torch_entries import MAGIC
from projaudit.torch_zip import BELOW, read_torch_zip
from projaudit.weight_files import (
    INDEX,
    PICKLES,
    SHARD,
    TORCH_WEIGHTS,
    WEIGHTS,
    Ambiguity,
    Way,
    llava_takes_non_lora,
)

MAX_TENSORS = 2_000_000
MAX_READINGS = 16
_NAMED = 100  # tensors that an ambiguity lists

# What training wraps a model in, and transformers does not take off the names again.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
_PIECES = "DCP_SHARDING_INFO"
_ALWAYS = {"distributed-shards", "no-index"}
_VARIANT = re.compile(
    r"model(\.[^.]+\.safetensors|\.[^.]+-\d.*|-\d{5}-of-\d{5}\.[^.]+\.safetensors)"
)


@dataclass(frozen=True)
class Reading:
    """One way in which a loader may read the repository."""

    label: str
    """`main` for what transformers loads; else a short unique word of ours."""
    why: str
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    packed: Mapping[str, Packed] = field(default_factory=dict, repr=False)
    """Quantised weights by name, each made of several of the tensors."""
    unread: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    """Tensors of a quantised weight that is not read -> (its name, why)."""
    metadata: Mapping[str, str] | None = None
    """What a GGUF file says of itself, and names its tensors by; None where it is none."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its name, quantised ones in place of their parts."""
        if not self.packed:
            return {name: info.shape for name, info in self.tensors.items()}
        weight_of = {
            info.name: name
            for name, weight in self.packed.items()
            for info in weight.parts.values()
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, info in self.tensors.items():
            weight = weight_of.get(name)
            if weight is None:
                shapes[name] = info.shape
            else:
                shapes[weight] = self.packed[weight].shape
        return shapes

    def parts(self, name: str) -> tuple[TensorInfo, ...]:
        """The tensors that make the weight of that name: itself, but for quantised ones."""
        if name in self.packed:
            return tuple(self.packed[name].parts.values())
        return (self.tensors[name],)


class Readings:
    """The distinct readings of a source found so far, and what they leave ambiguous."""

    def __init__(
        self, source: Source, config: Mapping[str, object] | None, notes: Sequence[Ambiguity] = ()
    ) -> None:
        self.found: list[Reading] = []
        self.notes = list(notes)
        self.headers: dict[str, Header] = {}
        """By file, each read once."""
        self._source = source
        self._config = config
        self._seen: list[dict[str, tuple[object, ...]]] = []
        self._small: dict[tuple[str, int], bytes] = {}

    def add_way(self, way: Way) -> None:
        """Adds what a loader that reads those files may take for the weights."""
        if way.label == "distributed" and any(
            _PIECES in self._header(path).metadata for path in way.files
        ):
            raise UnsupportedError(
                "is a distributed checkpoint, with tensors in pieces",
                "format",
                file=clean(self._source.name),
                remedy="save it with save_pretrained on one process",
            )
        copies = self._copies(way.files)
        first = not self.found
        best, aliases = self._one_name_each(_choose(copies, -1))
        new = self._add(way.label, way.why, best)
        if way.kind and ((new and not first) or way.kind in _ALWAYS or self._is_detour(way)):
            files = (way.index, *way.files) if way.index else way.files
            self.notes.append(Ambiguity(way.kind, way.why, files))
        if not new:
            return
        below = [f for f in way.files if BELOW in self._header(f).metadata]
        if below and (way.index or TORCH_WEIGHTS in below):
            inside = self._header(below[0]).metadata[BELOW]
            says = f"its tensors lie in {inside}, where transformers looks for none"
            self.notes.append(
                Ambiguity("nested-tensors", f"{clean(below[0], 80)}: {says}", tuple(below))
            )
        wrapped = [name for name in best if name.startswith(_WRAPPERS)]
        if wrapped and (way.index or {WEIGHTS, TORCH_WEIGHTS} & {*way.files}):
            wrapper = next(w for w in _WRAPPERS if wrapped[0].startswith(w))
            says = f"{_count(wrapped)} named {wrapper}…, where transformers looks for none"
            self._note("nested-tensors", says, wrapped, copies)
        twice = [name for name, found in copies.items() if len(found) > 1]
        if twice:
            says = f"{_count(twice)} in more than one file; transformers takes the last file's"
            self._note("shadowed-tensor", says, twice, copies)
        unindexed = [name for name in copies if way.weight_map and name not in way.weight_map]
        if unindexed:
            says = f"{_count(unindexed)} not in {clean(way.index, 80)}, loaded all the same"
            self._note("unindexed-tensor", says, unindexed, copies)
        if way.weight_map and (twice or unindexed):
            mapped = {
                name: next((i for i in found if i.file == way.weight_map[name]), found[-1])
                for name, found in copies.items()
                if name in way.weight_map
            }
            self._add(f"{way.label}-map", "what the index says", self._one_name_each(mapped)[0])
        for number in range(2, 1 + max(map(len, copies.values()), default=0)):
            other = self._one_name_each(_choose(copies, -number))[0]
            self._add(f"{way.label}-copy-{number}", f"copy {number} of a tensor counts", other)
        if aliases:
            names = sorted(name for group in aliases for name in group)
            says = f"{_count(names)} names of one parameter; one of them is loaded"
            self._note("alias-names", says, names, copies)
            for number in range(1, max(map(len, aliases))):
                other = self._one_name_each(_choose(copies, -1), number)[0]
                self._add(f"{way.label}-alias-{number + 1}", "another name counts", other)

    def add_unread(self, weights: Sequence[str], used: Set[str]) -> None:
        """Adds the weight files that no way so far reads, as some other loader may.

        A pickle that cannot be read is noted with the reason, and no error.
        """
        files = self._source.files
        proven = {files[path].sha256 for path in used} - {None}
        groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for path in weights:
            if path not in used and files[path].sha256 not in proven:
                shard = SHARD.fullmatch(path)
                groups[shard.group("stem", "total", "tail") if shard else (path,)].append(path)
        main = self.found[0].tensors
        parameters = {parameter(name): name for name in main}
        for number, group in enumerate(groups.values(), start=1):
            kind, says = _kind_of_unread(group[0], self._source)
            why = f"{clean(group[0], 80)}: {says}"
            try:
                if kind == "pickle-beside" and len(self.found) == MAX_READINGS:
                    raise UnsupportedError("is one way to read the weights too many")
                copies = self._copies(group)
            except (FormatError, UnsupportedError) as error:
                if kind != "pickle-beside":
                    raise
                unread = f"{why}; not read, as it {clean(error.message)}"
                self.notes.append(Ambiguity(kind, unread, tuple(group)))
                continue
            tensors: Mapping[str, TensorInfo] = _choose(copies, -1)
            replaced = {parameters[p] for p in map(parameter, tensors) if p in parameters}
            tensors, _ = self._one_name_each(tensors)
            if replaced and len(replaced) < len(main):
                # A part of the model: what a loader of all files puts over the rest.
                named = {parameters.get(parameter(n), n): info for n, info in tensors.items()}
                tensors = {**main, **named}
            if self._add(f"{kind}-{number}", why, tensors):
                names = tuple(sorted(copies)[:_NAMED])
                self.notes.append(Ambiguity(kind, why, tuple(group), names))

    def add_gguf(self, path: str, *, beside: bool) -> None:
        """Adds the projector file that llama.cpp reads besides the weights, or alone."""
        header = self.headers[path] = read_gguf_header(self._source, path)
        numbers = added(header.metadata)
        tensors = {
            name: replace(info, added=numbers.get(name, 0.0))
            for name, info in header.tensors.items()
        }
        types = ", ".join(clean(kind, 40) for kind in projector_types(header.metadata))
        why = f"{clean(path, 80)}, which llama.cpp takes for a projector of type {types}"
        for name, number in numbers.items():
            if name in tensors:
                why += f"; the converter added {number:g} to {name}, taken off here"
        if self._add(f"gguf-{len(self.found) + 1}", why, tensors, header.metadata) and beside:
            self.notes.append(Ambiguity("gguf-beside", why, (path,)))

    def note_odd_names(self) -> None:
        """Notes the tensors whose name may pass for another."""
        places = [(i.name, i.file) for reading in self.found for i in reading.tensors.values()]
        odd = [one for one in places if not (one[0].isascii() and one[0].isprintable() and one[0])]
        if odd:
            names = sorted({name for name, _ in odd})
            files = sorted({file for _, file in odd})
            says = "whose name is not plain printable ASCII, so it may pass for another"
            line, named = f"{_count(names)} {says}", tuple(names[:_NAMED])
            self.notes.append(Ambiguity("confusable-names", line, tuple(files), named))

    def _add(
        self,
        label: str,
        why: str,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """Whether that reading has tensors and reads other bytes than those found before."""
        places = {name: self._place(info) for name, info in tensors.items()}
        if not places or places in self._seen:
            return False
        if len(self.found) == MAX_READINGS:
            raise LimitError(
                f"more than {MAX_READINGS} ways to read the weights",
                "readings",
                file=clean(self._source.name),
                remedy="remove the weight files that the model does not use",
            )
        self._seen.append(places)
        quantised = find(tensors if metadata is None else {}, self._config, self._bytes)
        if quantised.packed and quantised.undeclared:
            says = (
                f"{_count(list(quantised.packed))} made of codes and scales, which no config says"
            )
            line = f"{says}: transformers loads the codes as if they were the weights"
            files = sorted(
                {info.file for w in quantised.packed.values() for info in w.parts.values()}
            )
            named = tuple(sorted(quantised.packed)[:_NAMED])
            self.notes.append(Ambiguity("undeclared-scales", line, tuple(files), named))
        label = "main" if not self.found else label
        self.found.append(
            Reading(label, why, tensors, quantised.packed, quantised.unread, metadata)
        )
        return True

    def _bytes(self, info: TensorInfo) -> bytes:
        """The bytes of a small tensor, read once for all readings."""
        place = (info.file, info.start)
        if place not in self._small:
            self._small[place] = self._source.read(info.file, info.start, info.stop)
        return self._small[place]

    def _header(self, path: str) -> Header:
        if path not in self.headers:
            self.headers[path] = _read_any_header(self._source, path)
            if sum(len(header.tensors) for header in self.headers.values()) > MAX_TENSORS:
                raise LimitError(f"more than {MAX_TENSORS} tensors in all files", "tensors")
        return self.headers[path]

    def _copies(self, files: Sequence[str]) -> dict[str, list[TensorInfo]]:
        """Every tensor by name, the copies in the order of the files, provably equal ones once."""
        found: dict[str, list[TensorInfo]] = {}
        for path in files:
            for name, info in self._header(path).tensors.items():
                others = found.get(name, ())
                place = self._place(info)
                found[name] = [*(one for one in others if self._place(one) != place), info]
        return found

    def _place(self, info: TensorInfo) -> tuple[object, ...]:
        """Where the bytes are, the same for files that are proven equal."""
        digest = self._source.files[info.file].sha256
        return (digest or f"path:{info.file}", *place_of(info)[1:])

    def _one_name_each(
        self, tensors: Mapping[str, TensorInfo], number: int = 0
    ) -> tuple[Mapping[str, TensorInfo], list[list[str]]]:
        """The tensors less those whose parameter another name supplies, and groups of such names.

        `number` picks the second, third, … best name instead of the one that transformers takes.
        What is kept stands under the name in its group that its neighbours have.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for name in tensors:
            groups[parameter(name)].append(name)
        several = [group for group in groups.values() if len(group) > 1]
        places = Counter(_place_of_name(g[0]) for g in groups.values() if len(g) == 1)
        kept = {g[0]: tensors[g[0]] for g in groups.values() if len(g) == 1}
        for group in several:
            group.sort(key=lambda name: (_is_foreign(name, self._config), _natural_key(name)))
            own = group[min(number, len(group) - 1)]
            spelled = max([own, *group], key=lambda name: places[_place_of_name(name)])
            kept[spelled] = tensors[own]
        return kept, several

    def _note(
        self, kind: str, says: str, names: Sequence[str], copies: Mapping[str, list[TensorInfo]]
    ) -> None:
        files = sorted({info.file for name in names for info in copies[name]})
        line = f"{clean(names[0], 100)}: {says}"
        self.notes.append(Ambiguity(kind, line, tuple(files), tuple(names[:_NAMED])))

    def _is_detour(self, way: Way) -> bool:
        # A redirect is the first way; it is none if it leads to where the loader goes anyway.
        plain = WEIGHTS if WEIGHTS in self._source.files else INDEX
        return way.kind == "redirect" and (way.index or way.files[0]) != plain


def place_of(info: TensorInfo) -> tuple[object, ...]:
    """File, span and how its bytes are read: equal for tensors that are the same bytes."""
    return (info.file, info.start, info.stop, info.dtype, info.shape, info.strides)


def _read_any_header(source: Source, path: str) -> Header:
    """The header of a weight file, by what it holds, whatever its name."""
    head = source.read(path, 0, min(source.files[path].size, PROBE))
    named_pickle = path.endswith(PICKLES) and head[8:9] != b"{"
    return (read_torch_zip if head.startswith(MAGIC) or named_pickle else read_header)(source, path)


def _choose(copies: Mapping[str, list[TensorInfo]], number: int) -> dict[str, TensorInfo]:
    return {name: found[max(number, -len(found))] for name, found in copies.items()}


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


# What stands for the same parameter in transformers (a leading `model.` comes and goes, and its
# pattern's dot takes any character) and in the original code of LLaVA, InternVL, Pixtral, Molmo and
# Inkling.
_RENAMES = (
    (re.compile(r"^(?:model[^\n]|thinker\.)+"), ""),
    (re.compile(r"(?<=\.)model\."), ""),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"(?<=vision_tower\.)vision_model\."), ""),
    (re.compile(r"(?<=LayerNorm)[^\n]gamma$"), ".weight"),
    (re.compile(r"(?<=LayerNorm)[^\n]beta$"), ".bias"),
    (re.compile(r"^(?:mm_projector\.0|mlp1\.1|vision_language_adapter\.w_in)\."), "P.linear_1."),
    (re.compile(r"^(?:mm_projector\.2|mlp1\.3|vision_language_adapter\.w_out)\."), "P.linear_2."),
    (re.compile(r"^mlp1\.0\."), "P.layer_norm."),
    (re.compile(r"^P\."), "multi_modal_projector."),
    (
        re.compile(r"^vision_backbone\.(?=image_(?:pooling_2d|projector)\.)"),
        "multi_modal_projector.",
    ),
    (re.compile(r"(?<=\.image_pooling_2d\.)w([qkvo])\."), r"\1_proj."),
    (re.compile(r"^visual\.proj_in\."), "vision_tower.merger.linear_1."),
    (re.compile(r"^visual\.proj_out\."), "vision_tower.merger.linear_2."),
    (
        re.compile(r"^(?:visual|vision_tower)\.layers\.linear_(\d+)\."),
        r"vision_tower.encoder_layers.\1.projection.",
    ),
)


@lru_cache(maxsize=1 << 16)
def parameter(name: str) -> str:
    """The parameter that a tensor name stands for: equal for names that a loader may mix up."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


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


def _place_of_name(name: str) -> str:
    """The module that a layer of that name is in, or the layer that a tensor of it is of."""
    return name.rpartition(".")[0]


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


def _kind_of_unread(path: str, source: Source) -> tuple[str, str]:
    if path == NON_LORA:
        here = "does" if llava_takes_non_lora(source) else "does not"
        says = f"holds `llava` and `lora`, as this one's {here}"
        return (
            "pickle-beside",
            f"what LLaVA's loader lays over a base where the model's name {says}",
        )
    if path.endswith(PICKLES):
        if path.startswith("mm_projector"):
            return "pickle-beside", "a projector of its own, which LLaVA's loader lays over a base"
        return "pickle-beside", "pickled weights, which older or other loaders may take"
    if path.startswith("consolidated"):
        return "consolidated-file", "weights in Mistral's layout, which vLLM may read instead"
    if _VARIANT.fullmatch(path):
        return "variant-file", "weights that are read when a variant is asked for"
    return "unread-file", "weights that transformers does not read and other loaders may"
