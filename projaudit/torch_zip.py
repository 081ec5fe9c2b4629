"""Files of torch.save (`.bin`, `.pt`, `.pth`) by ranges: where their tensors are; no unpickling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from projaudit.errors import FormatError, LimitError, UnsupportedError
from projaudit.inert import clean
from projaudit.safetensors_header import MAX_TENSORS, Header, TensorInfo
from projaudit.source import Source, refuse_lfs_pointer
from projaudit.torch_entries import MAGIC, STORAGE, bad, check_frame, entries_of, unsupported
from projaudit.torch_pickle import Storage, Tensor, interpret

PICKLE_LIMIT = 32 << 20
"""Bytes of data.pkl; a hundred thousand tensors take twice that."""
BELOW = "below"
"""Key of a header's metadata: in what the tensors lie, where that is one level down."""

_OTHERS: Mapping[bytes, str] = {
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "gzipped",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"\xfd7zXZ": "compressed (xz)",
    b"Rar!": "a RAR archive",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
}
# What wraps a state dict, and what training leaves beside it that no loader takes for weights.
_WRAPPERS = {"model", "state_dict", "model_state_dict", "module", "weights", "net"}
_LEFTOVERS = {
    "optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "scheduler",
    "lr_scheduler", "lr_schedulers", "scheduler_state_dict", "scaler", "amp_scaler", "rng_state",
    "rng_states", "random_states", "callbacks", "loops",
}  # fmt: skip


def read_torch_zip(source: Source, path: str) -> Header:
    """The tensors of a file that torch.save wrote: where each one's bytes are, none of them read.

    Reads the zip's directory at its end and data.pkl. That is interpreted by a machine that knows
    nothing but what state dicts are made of: it imports and calls nothing. Raises FormatError
    (`format.torch-zip`, `format.lfs-pointer`) for what is malformed or what two readers could take
    for two things; UnsupportedError (`unsupported.format`) for legacy pickles, archives of other
    kinds and pickles of anything but a state dict, flat or one level down (`{"model": {…}}`);
    LimitError (`limit.pickle-size`, `limit.tensors`); and what the source raises. The local
    headers of storages are checked by whoever reads their bytes: `check_frames`.
    """
    size = source.files[path].size
    head = source.read(path, 0, min(size, 512))
    refuse_lfs_pointer(head, path)
    if not head.startswith(MAGIC):
        raise _no_zip(head, path)
    entries = entries_of(source, path, size)
    wanted = [entries[name] for name in ("data.pkl", "byteorder") if name in entries]
    if wanted[0].stop - wanted[0].data > PICKLE_LIMIT:
        raise LimitError(
            f"data.pkl has {wanted[0].stop - wanted[0].data} bytes, above {PICKLE_LIMIT}",
            "pickle-size",
            file=clean(path),
        )
    spans = [span for entry in wanted for span in (*entry.frame, (entry.data, entry.stop))]
    found = source.read_spans(path, spans)
    for number, entry in enumerate(wanted):
        check_frame(entry, found[3 * number], found[3 * number + 1], path)
    if len(wanted) > 1 and found[5] != b"little":
        if found[5] == b"big":
            raise unsupported(path, "holds big-endian numbers")
        raise bad(path, f"says its byte order is {clean(found[5][:20])}", "byteorder")
    storages = {
        match[1]: entry for name, entry in entries.items() if (match := STORAGE.fullmatch(name))
    }
    used: dict[str, Storage] = {}
    tensors, below = _state_dict(interpret(found[2], storages, used, path), path)
    unused = storages.keys() - used.keys()
    if unused:
        raise bad(path, "is a storage of no tensor", f"data/{min(unused)}")
    return Header(
        {name: _info(name, tensor, path) for name, tensor in tensors.items()},
        {BELOW: below} if below else {},
        min((entry.data for entry in storages.values()), default=0),
    )


def _state_dict(top: object, path: str) -> tuple[dict[str, Tensor], str]:
    """The tensors by name, of a flat state dict or of one below a key; that key."""
    if not isinstance(top, dict):
        what = "one tensor" if type(top) is Tensor else "no dict"
        raise unsupported(path, f"holds {what}, where a state dict is expected")
    holders = _holders(top)
    direct = _tensors(top, path)
    nested = {key: value for key, value in top.items() if id(value) in holders}
    if not direct:
        nested = {key: value for key, value in nested.items() if key not in _LEFTOVERS}
    if not nested:
        return direct, ""
    shown = ", ".join(clean(repr(key), 40) for key in list(nested)[:3])
    wrapped = [key for key in nested if key in _WRAPPERS]
    flat = all(
        isinstance(value, dict) and not any(id(inner) in holders for inner in value.values())
        for value in nested.values()
    )
    if direct or not flat or (wrapped and len(nested) > 1):
        raise unsupported(path, f"holds tensors in {shown}, beside or below a state dict")
    found: dict[str, Tensor] = {}
    for key, value in nested.items():
        assert isinstance(value, dict)
        for name, tensor in _tensors(value, path).items():
            full = name if wrapped else f"{key}.{name}"
            if full in found:
                raise bad(path, f"has the name {clean(repr(full), 80)} twice", "data.pkl")
            found[full] = tensor
    return found, shown


def _tensors(content: dict[object, object], path: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        if type(value) is Tensor:
            if not isinstance(key, str):
                raise unsupported(path, "holds tensors under numbers, not names")
            found[key] = value
    if len(found) > MAX_TENSORS:
        raise LimitError(f"{len(found)} tensors, above {MAX_TENSORS}", "tensors", file=clean(path))
    return found


def _holders(top: object) -> set[int]:
    """The ids of all containers that hold a tensor, at any depth; circles are fine."""
    parents: dict[int, list[int]] = defaultdict(list)
    seen, todo = {id(top)}, [top]
    holders: set[int] = set()
    while todo:
        container = todo.pop()
        items = container.values() if isinstance(container, dict) else container
        for item in items:  # type: ignore[attr-defined]
            if type(item) in (Tensor, Storage):
                holders.add(id(container))
            elif isinstance(item, (dict, list, tuple)):
                parents[id(item)].append(id(container))
                if id(item) not in seen:
                    seen.add(id(item))
                    todo.append(item)
    rising = list(holders)
    while rising:
        for parent in parents[rising.pop()]:
            if parent not in holders:
                holders.add(parent)
                rising.append(parent)
    return holders


def _info(name: str, tensor: Tensor, path: str) -> TensorInfo:
    return TensorInfo(
        name,
        tensor.dtype,
        tensor.shape,
        path,
        tensor.start,
        tensor.stop,
        tensor.strides,
        tensor.entry,
    )


def _no_zip(head: bytes, path: str) -> FormatError | UnsupportedError:
    what = next((says for magic, says in _OTHERS.items() if head.startswith(magic)), None)
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        what = "a legacy pickle, as torch wrote before 1.6"
    if head[257:262] == b"ustar":
        what = "a tar archive"
    if what:
        return unsupported(path, f"is {what}")
    return bad(path, "is no zip file of torch.save")
