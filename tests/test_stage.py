"""What transformers is given of a repository, and which repositories are not given to it at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakehub import FakeHub
from huggingface_hub import close_session, constants, hf_hub_download

from projaudit.behaviour import sandbox
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.stage import VOCABULARY_LIMIT, stage, to_download
from projaudit.data import data_path
from projaudit.errors import IntegrityError, NotFoundError, OfflineError
from projaudit.hub import Limits, open_hub
from projaudit.refs import parse_ref
from projaudit.source import LFS_POINTER, LocalSource, open_local

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FILES: dict[str, Any] = {
    "config.json": {"model_type": "llava", "vision_config": {"hidden_size": 8}},
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
    "tokenizer.json": {"model": {"vocab": {"auto_map": 1}}},
    "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"},
    WEIGHTS: "weights",
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def local(folder: Path) -> LocalSource:
    return open_local(parse_ref(str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", FILES)


@pytest.fixture
def staged(folder: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Stages the folder with other files in it (None: without them); what then is where."""

    def action(weights: list[str] | None = None, **files: Any) -> dict[str, str]:
        for name in [name for name, content in files.items() if content is None]:
            (folder / name).unlink()
        write(folder, {name: content for name, content in files.items() if content is not None})
        into = stage(local(folder), weights or [WEIGHTS], tmp_path / "into")
        found = (path for path in into.rglob("*") if not path.is_dir())
        return {path.relative_to(into).as_posix(): path.read_text() for path in found}

    return action


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CouldNotProbe) as caught:
        action()
    assert caught.value.reason.isprintable()
    return caught.value.reason


# ------------------------------------------------------------------ what is there


def test_only_known_files_are_there(staged: Any, tmp_path: Path) -> None:
    others = {
        "modeling_evil.py": "import os",
        "pytorch_model.bin": "pickle",
        "spk_dict.pt": "pickle",
        "README.md": "hi",
        "other.safetensors": "more",
        "sub/config.json": "{}",
        "custom_generate/generate.py": "import os",
        "additional_chat_templates/deep/x.jinja": "x",
        "additional_chat_templates/.hidden.jinja": "x",
        "tokenizer.4.0.0.json": "{}",
        "CONFIG.JSON": "{}",
    }
    known = {
        "generation_config.json": '{"eos_token_id": 3}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "merges.txt": "a b",
    }
    found = staged(**others, **known)
    assert found.keys() == FILES.keys() | known.keys()
    assert {name: found[name] for name in known} == known
    links = {p.name for p in (tmp_path / "into").rglob("*") if p.is_symlink()}
    assert links == {WEIGHTS}
    assert (tmp_path / "into" / WEIGHTS).readlink() == tmp_path / "model" / WEIGHTS


def test_what_was_checked_is_what_is_read(folder: Path, tmp_path: Path) -> None:
    into = stage(local(folder), [WEIGHTS], tmp_path / "into")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    assert "auto_map" not in (into / "config.json").read_text()


def test_a_used_folder_is_not_used_again(folder: Path) -> None:
    with pytest.raises(ValueError, match="not empty"):
        stage(local(folder), [WEIGHTS], folder)


def test_shards_come_with_their_index(staged: Any) -> None:
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    files = {INDEX: index, SHARDS[0]: "one", SHARDS[1]: "two", WEIGHTS: None}
    found = staged(SHARDS, **files)
    assert json.loads(found[INDEX]) == index
    assert (found[SHARDS[0]], found[SHARDS[1]]) == ("one", "two")


def test_an_index_beside_the_one_file_is_left_out(staged: Any) -> None:
    assert INDEX not in staged(**{INDEX: {"weight_map": {"a": "../../etc/passwd"}}})


# ------------------------------------------------------------------ what is taken out


def test_where_it_was_saved_is_taken_out(staged: Any) -> None:
    config = {
        "_name_or_path": "org/other",
        "text_config": {"_name_or_path": "/home/me/vicuna", "hidden_size": 4},
        "vision_config": {"_attn_implementation": "flash_attention_2", "time_step": [0.0, 1.0]},
        "attn_implementation": {"": "sdpa", "text_config": "eager"},
        "auto_map": None,
        "quantization_config": {},
        "use_timm_backbone": False,
        "trust_remote_code": False,
    }
    found = staged(
        **{
            "config.json": json.dumps(config)[:-1] + ', "limit": Infinity}',
            "tokenizer_config.json": {
                "name_or_path": "org/other",
                "merges_file": "/etc/passwd",
                "special_tokens_map_file": "/root/.cache/x.json",
                "unk_token": "<unk>",
                "added_tokens_decoder": {"0": {"content": "/"}},
            },
            "special_tokens_map.json": {"vocab_file": "/etc/passwd", "eos_token": "</s>"},
            "generation_config.json": {"compile_config": {"backend": "x"}, "eos_token_id": 3},
        }
    )
    assert found["config.json"] == json.dumps(
        {
            "text_config": {"hidden_size": 4},
            "vision_config": {"time_step": [0.0, 1.0]},
            "limit": float("inf"),
        }
    )
    assert json.loads(found["tokenizer_config.json"]) == {
        "unk_token": "<unk>",
        "added_tokens_decoder": {"0": {"content": "/"}},
    }
    assert json.loads(found["special_tokens_map.json"]) == {"eos_token": "</s>"}
    assert json.loads(found["generation_config.json"]) == {"eos_token_id": 3}


def test_a_file_without_any_of_that_keeps_its_bytes(staged: Any) -> None:
    text = '{ "model_type":"llava",\n "vision_config": {"limit": -Infinity, "e": 1E-5} }'
    assert staged(**{"config.json": text})["config.json"] == text


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}}, "code of its own"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "x--y.Z"}}}, "code of its own"),
        ("config.json", {"parts": [{"auto_map": {"a": "b"}}]}, "code of its own"),
        ("config.json", {"custom_code": True}, "code of its own"),
        ("config.json", {"trust_remote_code": True}, "code of its own"),
        ("config.json", {"custom_pipelines": {"a": {"impl": "b.C"}}}, "code of its own"),
        ("config.json", {"_attn_implementation": "org/kernel"}, "code of its own"),
        ("config.json", {"attn_implementation": {"text_config": "o/k:f"}}, "code of its own"),
        ("config.json", {"experts_implementation": "paged|o/k@v1"}, "code of its own"),
        ("config.json", {"kernel_config": {"RMSNorm": "o/k:n"}}, "code of its own"),
        ("config.json", {"text_config": {"quantization_config": {"a": 1}}}, "is quantized"),
        ("config.json", {"compression_config": {"a": 1}}, "is quantized"),
        ("config.json", {"backbone": "org/model"}, "files from elsewhere"),
        ("config.json", {"use_timm_backbone": True}, "files from elsewhere"),
        ("config.json", {"vision_config": {"model_type": "timm_wrapper"}}, "files from elsewhere"),
        ("config.json", {"adapter_path": "/tmp/x"}, "files from elsewhere"),
        ("config.json", {"transformers_weights": "adapter_model.bin"}, "other weights"),
        ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "another config"),
        ("config.json", {"attribute_map": {"x": "auto_map"}}, "renames the keys"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}, "code of its"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../x/tokenizer.4.json"]}, "another t"),
        ("tokenizer_config.json", {"gguf_file": "../../model.gguf"}, "another tokenizer"),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "files from elsewhere"),
        ("tokenizer_config.json", {"vocab": "/etc/passwd"}, "files from elsewhere"),
        ("special_tokens_map.json", {"merges": "/etc/passwd"}, "files from elsewhere"),
        ("generation_config.json", {"auto_map": {"a": "b"}}, "code of its own"),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "a.B"}}, "code of its own"),
        ("preprocessor_config.json", {"repo_path": "/etc", "class_info_file": "x"}, "elsewhere"),
        ("video_preprocessor_config.json", {"auto_map": {"a": "b"}}, "code of its own"),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "A"}}, "elsewhere"),
        ("processor_config.json", {"image_processor": {"auto_map": {"a": "b"}}}, "code of its"),
        ("chat_template.json", {"auto_map": {"a": "b"}}, "code of its own"),
        ("config.json", '{"vision_config": {}, "auto_m\\u0061p": {"a": "b"}}', "code of its own"),
        ("config.json", '{"vision_config": {}, "a": 1, "a": 2}', "config.json"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", "{", "not JSON"),
        ("config.json", '{"vision_config": ' + '{"a":' * 70 + "1" + "}" * 71, "deeper"),
        ("tokenizer.json", '{"model": {"a": 1, "a": 2}}', "tokenizer.json"),
        ("tokenizer.json", "{}" + " " * VOCABULARY_LIMIT, "above the limit"),
        ("chat_template.jinja", " " * (2 << 20), "above the limit"),
        ("vocab.json", "[]", "no JSON object"),
        ("preprocessor_config.json", LFS_POINTER.decode() + "\noid", "Git LFS pointer"),
        (WEIGHTS, LFS_POINTER.decode() + "\noid", "Git LFS pointer"),
        ("adapter_config.json", {"base_model_name_or_path": "org/other"}, "an adapter"),
        ("shard-00000-model-00001-of-00001.safetensors", "x", "distributed"),
    ],
)
def test_the_dangerous_is_refused(staged: Any, name: str, content: Any, why: str) -> None:
    if isinstance(content, dict):
        content = {**FILES.get(name, {}), **content}
    assert why in refusal(lambda: staged(**{name: content}))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"config.json": None}, "no config.json"),
        ({"tokenizer.json": None}, "no tokenizer"),
        ({"tokenizer.json": None, "vocab.json": "{}"}, "no tokenizer"),
        ({"preprocessor_config.json": None}, "no image processor"),
        ({"preprocessor_config.json": None, "processor_config.json": "{}"}, "no image processor"),
        ({"config.json": {"model_type": "llama"}}, "no vision tower"),
        ({"config.json": {"vision_config": None}}, "no vision tower"),
    ],
)
def test_what_is_missing_is_said(staged: Any, change: dict[str, Any], why: str) -> None:
    assert why in refusal(lambda: staged(**change))


def test_an_image_processor_may_be_part_of_the_processor(staged: Any) -> None:
    processor = {"image_processor": {"image_processor_type": "CLIPImageProcessor"}}
    assert staged(**{"preprocessor_config.json": None, "processor_config.json": processor})


@pytest.mark.parametrize(
    "weights",
    [
        ["../model.safetensors"],
        ["/etc/passwd"],
        ["sub/x.safetensors"],
        ["pytorch_model.bin"],
        ["model.safetensors\n"],
        [".safetensors"],
        ["missing.safetensors"],
        ["other.safetensors"],
        [WEIGHTS, "other.safetensors"],
    ],
)
def test_other_weights_are_refused(staged: Any, weights: list[str]) -> None:
    files = {"sub/x.safetensors": "x", "pytorch_model.bin": "x", "other.safetensors": "x"}
    files["model.safetensors\n"] = files[".safetensors"] = "x"
    assert "weights are" in refusal(lambda: staged(weights, **files))


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../../../etc/passwd"}},
        {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}},
        {"weight_map": {"a": "pytorch_model.bin"}},
        {"weight_map": {"a": [SHARDS[0]]}},
        {"weight_map": {}},
        {"weight_map": [SHARDS[0]]},
        [],
    ],
)
def test_an_index_names_its_weights_and_nothing_else(staged: Any, index: Any) -> None:
    files = {INDEX: index, SHARDS[0]: "x", SHARDS[1]: "y", "pytorch_model.bin": "z", WEIGHTS: None}
    assert "names other files" in refusal(lambda: staged([SHARDS[0]], **files))


def test_without_an_index_nothing_is_taken(staged: Any) -> None:
    files = {"any.safetensors": "x", WEIGHTS: None}
    assert "neither" in refusal(lambda: staged(["any.safetensors"], **files))


@pytest.mark.parametrize("name", [WEIGHTS, "chat_template.jinja", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    said = refusal(lambda: stage(local(folder), [WEIGHTS], tmp_path / "into"))
    assert said == f"{name} is a link that leaves the folder"


def test_a_link_inside_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(folder / "blob")
    (folder / WEIGHTS).symlink_to("blob")
    assert (stage(local(folder), [WEIGHTS], tmp_path / "into") / WEIGHTS).read_text() == "weights"


def test_a_snapshot_of_the_hub_cache_is_staged(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--model" / "blobs"
    snapshot = blobs.parent / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(FILES):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    found = stage(local(snapshot), [WEIGHTS], tmp_path / "into")
    assert (found / WEIGHTS).readlink().parent == blobs.resolve()


def test_one_file_is_no_model(folder: Path, tmp_path: Path) -> None:
    source = local(folder / WEIGHTS)
    assert "no config.json" in refusal(lambda: stage(source, [WEIGHTS], tmp_path / "into"))


def test_a_local_file_that_changed_is_an_error(folder: Path, tmp_path: Path) -> None:
    source = local(folder)
    assert source.whole(WEIGHTS) == folder / WEIGHTS
    (folder / WEIGHTS).write_text("others!")
    with pytest.raises(IntegrityError):
        stage(source, [WEIGHTS], tmp_path / "into")
    with pytest.raises(NotFoundError):
        source.whole("../secret")


# ------------------------------------------------------------------ from a Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in list(os.environ):
        if name.startswith(("HF_", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    with FakeHub(tmp_path) as server:
        server.add("org/model", {**{p.name: p for p in BASE.iterdir()}, "evil.py": b"import os"})
        yield server
        close_session()


BASE = data_path("demo") / "base"


def opened(hub: FakeHub, **options: Any) -> Any:
    limits = Limits(connect=5.0, read=5.0)
    return open_hub(parse_ref("hf://org/model"), endpoint=hub.url, limits=limits, **options)


def test_a_hub_is_staged_from_whole_copies(hub: FakeHub, tmp_path: Path) -> None:
    source = opened(hub)
    before = to_download(source, [WEIGHTS])
    assert before == sum(p.stat().st_size for p in BASE.iterdir() if p.name != "README.md")
    into = stage(source, [WEIGHTS], tmp_path / "into")
    assert to_download(source, [WEIGHTS]) < 50_000 < before
    assert (into / WEIGHTS).read_bytes() == (BASE / WEIGHTS).read_bytes()
    assert source.verified[WEIGHTS] == source.verified["tokenizer.json"] == "full"
    assert not (into / "evil.py").exists()

    sent = hub.wire()
    again = stage(opened(hub, offline=True), [WEIGHTS], tmp_path / "again")
    assert (again / WEIGHTS).resolve() == (into / WEIGHTS).resolve()
    assert hub.wire() == sent


def test_a_file_of_the_standard_cache_is_a_whole_copy(hub: FakeHub) -> None:
    found = Path(hf_hub_download("org/model", WEIGHTS, endpoint=hub.url))
    source = opened(hub)
    sent = hub.wire("cdn")
    assert source.whole(WEIGHTS) == found
    assert hub.wire("cdn") == sent
    blob = found.resolve()
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    assert opened(hub).whole(WEIGHTS).resolve() != blob  # damaged: another is downloaded
    assert hub.wire("cdn") > sent


def test_offline_a_whole_copy_is_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    opened(hub).read(WEIGHTS, 0, 100)
    source = opened(hub, offline=True)
    with pytest.raises(OfflineError) as caught:
        source.whole(WEIGHTS)
    assert caught.value.code == "offline.not-cached"
    with pytest.raises(OfflineError):
        stage(source, [WEIGHTS], tmp_path / "into")


def test_other_bytes_than_the_hub_named_are_never_staged(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.append(lambda origin, *_: {"garble": True} if origin == "cdn" else None)
    with pytest.raises(IntegrityError):
        stage(opened(hub), [WEIGHTS], tmp_path / "into")


def test_transformers_loads_and_generates_in_the_sandbox(hub: FakeHub, tmp_path: Path) -> None:
    code = """
import json, os, sys
told = json.load(sys.stdin)
from projaudit.behaviour import confinement
confinement.fence(told["parent"], told["gpu"])
import torch, transformers
confinement.confine(told["memory"], told["gpu"])
from PIL import Image
folder = told["request"]["folder"]
options = {"local_files_only": True, "trust_remote_code": False}
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)
processor = transformers.AutoProcessor.from_pretrained(folder, **options)
torch.set_num_threads(2)
image = Image.new("RGB", (64, 64), "red")
asked = processor(images=image, text="<image>", return_tensors="pt")
made = model.generate(**asked, max_new_tokens=4, do_sample=False)
print(json.dumps({"result": {"length": made.shape[1] - asked["input_ids"].shape[1]}}), flush=True)
os._exit(0)
"""
    into = stage(opened(hub), [WEIGHTS], tmp_path / "into")
    answer = sandbox.run(
        {"folder": str(into)}, seconds=200, memory=2 << 30, gpu=False, child=("-c", code)
    )
    assert 1 <= answer["length"] <= 4
