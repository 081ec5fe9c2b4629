"""Which bytes a loader takes: checked against transformers itself, on a tiny LLaVA."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from repos import (
    CANONICAL,
    LINEAR_1,
    Repo,
    distributed,
    pickle_alone,
    save_sharded,
    two_names,
    unindexed,
    value,
)
from safetensors.torch import save_file

from projaudit.checkpoint import open_checkpoint
from projaudit.errors import FormatError, LimitError, NothingError, UnsupportedError
from projaudit.readings import MAX_READINGS, parameter
from projaudit.refs import Ref, parse_ref
from projaudit.safetensors_header import TensorInfo
from projaudit.source import LocalSource, RepoFile, Traffic, open_local
from projaudit.weights import load_tensors


def test_tensor_absent_from_the_index_is_loaded_and_said(repo: Repo) -> None:
    unindexed(repo)
    opened = repo.open()
    assert repo.loaded() == 2.0
    assert value(opened, opened.readings[0].tensors[LINEAR_1]) == 2.0
    assert LINEAR_1 not in opened.readings[1].tensors
    assert [(a.kind, a.tensors) for a in opened.ambiguities] == [("unindexed-tensor", (LINEAR_1,))]


def with_company(repo: Repo) -> None:
    (repo.folder / "onnx").mkdir()
    for name in ("onnx/model.onnx", "tokenizer.json", "training_args.bin", "optimizer.pt", "x.py"):
        (repo.folder / name).write_bytes(b"?")
    repo.index(dict.fromkeys(repo.tensors, "model.safetensors"))


def original_llava(repo: Repo) -> None:
    renamed = {
        name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        .replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        .replace("language_model.model.", "model.")
        .replace("vision_tower.", "model.vision_tower.vision_tower."): tensor
        for name, tensor in repo.tensors.items()
    }
    save_file(renamed, repo.folder / "model.safetensors", metadata={"format": "pt"})
    repo.config(architectures=["LlavaLlamaForCausalLM"])


@pytest.mark.parametrize("make", [lambda _: None, save_sharded, with_company, original_llava])
def test_ordinary_repositories_are_not_ambiguous(repo: Repo, make: Callable[[Repo], None]) -> None:
    make(repo)
    opened = repo.open()
    assert opened.ambiguities == ()
    assert [reading.label for reading in opened.readings] == ["main"]
    assert len(opened.readings[0].tensors) == len(repo.tensors)
    assert opened.config is not None
    assert not any(note.kind == "quantized" for note in opened.ambiguities)


def test_sharded_repository_gives_the_same_bytes(repo: Repo) -> None:
    save_sharded(repo)
    opened = repo.open()
    stored = load_tensors(opened.source, opened.readings[0].tensors.values())
    assert stored.keys() == repo.tensors.keys()
    for name, tensor in repo.tensors.items():
        assert torch.equal(stored[name].tensor, tensor)
        raw = tensor.contiguous().numpy().tobytes()
        assert stored[name].sha256 == hashlib.sha256(raw).hexdigest()


def test_original_llava_class_prefers_its_own_projector_name(repo: Repo) -> None:
    two_names("model.mm_projector.0.weight", LINEAR_1)(repo)
    repo.config(architectures=["LlavaLlamaForCausalLM"])
    assert repo.read() == [1.0, 2.0]


def test_copy_with_the_same_digest_is_no_ambiguity(repo: Repo) -> None:
    shutil.copy(repo.folder / "model.safetensors", repo.folder / "consolidated.safetensors")
    assert repo.kinds() == ["consolidated-file"]
    source = Hashed(open_local(parse_ref(str(repo.folder))))
    opened = open_checkpoint(source)
    assert opened.ambiguities == ()
    assert list(opened.headers) == ["model.safetensors"]


@dataclass
class Hashed:
    """A source whose listing has digests, as a Hub's has."""

    local: LocalSource
    commit: str | None = "0" * 40
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def ref(self) -> Ref:
        return Ref("hf://a/b", "hub", repo="a/b")

    @property
    def name(self) -> str:
        return "a/b"

    @property
    def files(self) -> dict[str, RepoFile]:
        digests = {
            path: hashlib.sha256((self.local.root / path).read_bytes()).hexdigest()
            for path in self.local.files
        }
        return {p: RepoFile(p, f.size, digests[p]) for p, f in self.local.files.items()}

    def read(self, path: str, start: int, stop: int) -> bytes:
        return self.local.read(path, start, stop)

    def read_spans(self, path: str, spans: list[tuple[int, int]]) -> list[bytes]:
        return self.local.read_spans(path, spans)

    def read_small(self, path: str, limit: int) -> bytes:
        return self.local.read_small(path, limit)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_distributed_shards_come_last_on_a_hub(repo: Repo) -> None:
    distributed(repo)
    opened = open_checkpoint(Hashed(open_local(parse_ref(str(repo.folder)))))
    assert [reading.label for reading in opened.readings][:2] == ["main", "distributed"]
    assert value(opened, opened.readings[0].tensors[LINEAR_1]) == 1.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adapter_config.json", "adapter-beside"),
        ("model-Q4_K_M.gguf", "gguf-beside"),
        ("mm_projector.bin", "pickle-beside"),
        ("checkpoint-500/model.safetensors", "unread-subfolder"),
    ],
)
def test_weights_beside_that_are_not_read_are_said(repo: Repo, name: str, kind: str) -> None:
    (repo.folder / name).parent.mkdir(exist_ok=True)
    (repo.folder / name).write_bytes(b"{}")
    opened = repo.open()
    assert [(a.kind, a.files) for a in opened.ambiguities] == [(kind, (name,))]
    assert "not read" in opened.ambiguities[0].message
    assert len(opened.readings) == 1


def test_quantization_and_custom_code_are_said(repo: Repo) -> None:
    repo.config(quantization_config={"quant_method": "fp8"}, auto_map={"AutoModel": "modeling_x.X"})
    assert repo.kinds() == ["quantized", "custom-code"]
    assert any(note.kind == "quantized" for note in repo.open().ambiguities)


HOSTILE = {
    "homoglyph and escapes": "multi_modal_pr\u043ejector.linear_1.weight\x1b[2J\n",
    "NFD twin": "multi_modal_projector.line\u0061\u0301r_1.weight",
    "NFC twin": "multi_modal_projector.line\u00e1r_1.weight",
    "right to left": "\u202emulti_modal_projector.linear_1.weight",
    "NUL": "\0",
    "empty": "",
    "a megabyte": "\u043e" * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_said_and_inert(repo: Repo, name: str) -> None:
    """threats B6."""
    repo.save("model.safetensors", 1.0, HOSTILE[name])
    (ambiguity,) = repo.open().ambiguities
    assert ambiguity.kind == "confusable-names"
    assert ambiguity.message.isprintable()
    assert len(ambiguity.message) < 500


def test_safetensors_files_without_an_index_are_read_together(repo: Repo) -> None:
    save_sharded(repo)
    repo.remove("model.safetensors.index.json")
    opened = repo.open()
    assert [a.kind for a in opened.ambiguities] == ["no-index"]
    assert opened.readings[0].tensors.keys() == repo.tensors.keys()


def test_pickles_without_a_known_name(repo: Repo) -> None:
    pickle_alone(repo, "step-100.pth")
    opened = repo.open()
    assert opened.ambiguities == ()
    assert value(opened, opened.readings[0].tensors[LINEAR_1]) == 9.0
    torch.save({"other": torch.ones(2)}, repo.folder / "ema.pt")
    opened = repo.open()
    assert [note.kind for note in opened.ambiguities] == ["no-index"]
    assert opened.readings[0].tensors.keys() == {*repo.tensors, "other"}


def test_index_of_pickles_that_are_not_there(repo: Repo) -> None:
    repo.index({LINEAR_1: "pytorch_model-00001-of-00001.bin"}, "pytorch_model.bin.index.json")
    assert repo.kinds() == []  # left behind by a conversion; nothing takes it
    repo.remove("model.safetensors")
    with pytest.raises(FormatError) as caught:
        repo.open()
    assert caught.value.code == "format.index"


def test_single_file(repo: Repo) -> None:
    path = repo.folder / "model.safetensors"
    repo.config(transformers_weights="nowhere.safetensors")
    opened = open_checkpoint(open_local(parse_ref(str(path))))
    assert opened.config is None
    assert opened.ambiguities == ()
    assert opened.readings[0].tensors.keys() == repo.tensors.keys()


@pytest.mark.parametrize(
    "weight_map",
    [
        {LINEAR_1: "../x.safetensors"},
        {LINEAR_1: "/etc/passwd"},
        {LINEAR_1: "sub/../../x.safetensors"},
        {LINEAR_1: "..\\x.safetensors"},
        {LINEAR_1: "./model.safetensors"},
        {LINEAR_1: "absent.safetensors"},
        {LINEAR_1: "config.json"},
        {LINEAR_1: "model.safetensors.index.json"},
        {LINEAR_1: 3},
        {LINEAR_1: ["model.safetensors"]},
        {},
        [],
        None,
    ],
)
def test_index_that_names_no_weight_file_of_the_repository(repo: Repo, weight_map: object) -> None:
    repo.index(weight_map)
    with pytest.raises(FormatError, match="weight_map") as caught:
        repo.open()
    assert caught.value.code == "format.index"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {"a": "b", "a": "c"}}', "\xff"])
def test_malformed_index(repo: Repo, text: str) -> None:
    (repo.folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError) as caught:
        repo.open()
    assert caught.value.code == "format.index"


@pytest.mark.parametrize(
    "keys",
    [
        {"transformers_weights": 3},
        {"transformers_weights": "../evil.safetensors"},
        {"transformers_weights": "/tmp/evil.safetensors"},
        {"transformers_weights": "absent.safetensors"},
        {"attribute_map": []},
        {"attribute_map": {"a": 1}},
        {"configuration_files": "config.5.0.0.json"},
        {"configuration_files": ["../config.5.0.0.json"]},
        {"configuration_files": ["config.5.0.0.json"]},
    ],
)
def test_config_that_no_loader_should_follow(repo: Repo, keys: dict[str, object]) -> None:
    repo.config(**keys)
    with pytest.raises(FormatError) as caught:
        repo.open()
    assert caught.value.code == "format.config"
    assert caught.value.field in keys


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 5000])
def test_malformed_config(repo: Repo, text: str) -> None:
    (repo.folder / "config.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        repo.open()
    assert caught.value.code == "format.config"


def test_infinity_in_a_config_is_its_name(repo: Repo) -> None:
    config = repo.folder / "config.json"
    config.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert repo.open().config == {"time_step_limit": [0.0, "Infinity"]}


def test_redirect_to_a_pickle_is_unsupported(repo: Repo) -> None:
    repo.config(transformers_weights="adapter_model.bin")
    with pytest.raises(UnsupportedError, match="never unpickles"):
        repo.open()


@pytest.mark.parametrize(
    ("files", "error", "code"),
    [
        ([], NothingError, "nothing.weights"),
        (["config.json"], NothingError, "nothing.weights"),
        (["training_args.bin"], NothingError, "nothing.weights"),
        (["pytorch_model.bin"], FormatError, "format.torch-zip"),
        (["pytorch_model.bin", "extra.safetensors"], FormatError, "format.torch-zip"),
        (["consolidated.00.pth"], FormatError, "format.torch-zip"),
        (["model.gguf"], UnsupportedError, "unsupported.format"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            UnsupportedError,
            "unsupported.adapter",
        ),
    ],
)
def test_nothing_that_can_be_read(
    tmp_path: Path, files: list[str], error: type[Exception], code: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(error) as caught:
        open_checkpoint(open_local(parse_ref(str(tmp_path))))
    assert caught.value.code == code  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", "format.gguf"),
        ("disguised.safetensors", b"GGUF\3\0\0\0", "format.gguf"),
        ("pytorch_model.bin", b"PK\3\4", "format.torch-zip"),
        ("x.pt", b"7z\xbc\xaf", "unsupported.format"),
        ("config.json", b"{}", "unsupported.format"),
        ("x.safetensors", b"PK\3\4 and more than eight", "format.torch-zip"),
        ("x.pt", b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "unsupported.format"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "format.lfs-pointer"),
        ("x.bin", b"version https://git-lfs.github.com/spec/v1\n", "format.lfs-pointer"),
        ("x.safetensors", b"\2\0\0\0\0\0\0\0{}", "nothing.weights"),
        ("x.safetensors", b"", "format.safetensors"),
    ],
)
def test_single_file_that_is_no_weights(tmp_path: Path, name: str, data: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises((FormatError, UnsupportedError, NothingError)) as caught:
        open_checkpoint(open_local(parse_ref(str(tmp_path / name))))
    assert caught.value.code == code


def test_lfs_pointers_in_a_folder(repo: Repo) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (repo.folder / "model.safetensors").write_text(pointer)
    with pytest.raises(FormatError, match="git lfs pull") as caught:
        repo.open()
    assert caught.value.code == "format.lfs-pointer"


def test_model_without_tensors(repo: Repo) -> None:
    (repo.folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(NothingError):
        repo.open()


def test_distributed_pieces_are_unsupported(repo: Repo) -> None:
    name = "shard-00001-model-00001-of-00002.safetensors"
    save_file({"a": torch.ones(2)}, repo.folder / name, {"DCP_SHARDING_INFO": "{}"})
    with pytest.raises(UnsupportedError, match="distributed"):
        repo.open()


def test_more_ways_to_read_than_are_audited(repo: Repo) -> None:
    for number in range(MAX_READINGS):
        repo.save(f"x{number}.safetensors", float(number), alone=True)
    with pytest.raises(LimitError) as caught:
        repo.open()
    assert caught.value.code == "limit.readings"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_floating_dtypes_come_back_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = {"w": tensor, "empty": torch.empty(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = open_checkpoint(open_local(parse_ref(str(tmp_path / "x.safetensors"))))
    stored = load_tensors(opened.source, opened.readings[0].tensors.values())
    assert stored["w"].tensor.dtype == dtype
    assert torch.equal(stored["w"].tensor.view(torch.uint8), tensor.view(torch.uint8))
    assert stored["empty"].tensor.shape == (0, 4)


@pytest.mark.parametrize(
    "dtype",
    ["I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL", "C64", "F4", "F6_E2M3",
     "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ"],
)  # fmt: skip
def test_other_dtypes_are_refused_before_a_byte_is_read(repo: Repo, dtype: str) -> None:
    info = TensorInfo("w", dtype, (4,), "nowhere", 0, 4)
    with pytest.raises(UnsupportedError) as caught:
        load_tensors(repo.open().source, [info])
    assert caught.value.code == "unsupported.dtype"


def test_matrix_above_the_budget_is_refused_before_a_byte_is_read(repo: Repo) -> None:
    info = TensorInfo("w", "F32", (1 << 20, 1 << 20), "nowhere", 0, 1 << 42)
    with pytest.raises(LimitError) as caught:
        load_tensors(repo.open().source, [info])
    assert caught.value.code == "limit.tensor-size"


def test_no_layout_of_the_field_has_two_names_of_one_parameter() -> None:
    lines = gzip.decompress(
        (Path(__file__).parent / "data/projector_layouts.jsonl.gz").read_bytes()
    )
    for line in lines.splitlines():
        names = {name for name, *_ in json.loads(line)["tensors"]}
        assert len({parameter(name) for name in names}) == len(names)


def test_names_of_one_parameter() -> None:
    same = [LINEAR_1, CANONICAL, f"model.{CANONICAL}", "model.mm_projector.0.weight"]
    assert {parameter(name) for name in same} == {LINEAR_1}
    language = ["language_model.model.norm.weight", "model.language_model.norm.weight"]
    assert len({parameter(name) for name in language}) == 1
    different = ["norm.weight", "lm_head.weight", "multi_modal_projector.linear_2.weight"]
    assert len({parameter(name) for name in different}) == 3
