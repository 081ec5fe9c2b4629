"""References as users type them, and exact bytes of local files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from projaudit import source as module
from projaudit.errors import (
    FormatError,
    IntegrityError,
    LimitError,
    NotFoundError,
    ProjauditError,
    UsageError,
)
from projaudit.refs import parse_hub_id, parse_ref
from projaudit.source import LocalSource, open_local

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("org/model", None),
        ("org/model@main", "main"),
        (f"org/model@{SHA}", SHA),
        ("hf://org/model", None),
        ("hf://org/model@refs/pr/1", "refs/pr/1"),
        ("https://huggingface.co/org/model", None),
        ("https://huggingface.co/org/model/", None),
        ("https://hf.co/org/model?x=1#y", None),
        ("https://huggingface.co/org/model/tree/v1.0", "v1.0"),
        ("https://huggingface.co/org/model/tree/refs%2Fpr%2F1", "refs/pr/1"),
        ("https://huggingface.co/org/model/tree/refs/pr/1", "refs/pr/1"),
    ],
)
def test_forms_of_a_hub_reference(text: str, revision: str | None) -> None:
    ref = parse_ref(text)
    assert (ref.kind, ref.repo, ref.revision, ref.path) == ("hub", "org/model", revision, None)
    assert ref.text == text


def test_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:8080/hub/")
    ref = parse_ref("http://127.0.0.1:8080/hub/org/model/tree/main")
    assert (ref.repo, ref.revision) == ("org/model", "main")
    with pytest.raises(UsageError):
        parse_ref("http://127.0.0.1:8081/hub/org/model")


def test_local_path_wins_over_a_bare_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert parse_ref("org/model").kind == "local"
    assert parse_ref("hf://org/model").kind == "hub"
    assert parse_ref("org/model@main").kind == "hub"
    assert parse_hub_id("org/model") == ("org/model", None)
    with pytest.raises(UsageError, match="hf://") as caught:
        parse_ref("org/model", "main")
    assert caught.value.code == "usage.revision"


def test_home_and_single_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert parse_ref("~/model.safetensors").path == tmp_path / "model.safetensors"
    assert parse_ref("model.safetensors").kind == "local"


@pytest.mark.parametrize(
    "text",
    [
        "./org/model",
        "../model",
        "/no/where",
        "~/nowhere",
        "~nobody-of-that-name/x",
        ".",
        "model",
        "a/b/c",
        "org/model.safetensors",
        "org/my model",
        "model@main",
        "C:\\models",
    ],
)
def test_paths_that_do_not_exist(text: str, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    if text == ".":
        assert parse_ref(text).kind == "local"
        return
    with pytest.raises(NotFoundError) as caught:
        parse_ref(text)
    assert caught.value.code == "not-found.path"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "org/model\n",
        "org/\x1b[2Jmodel",
        "a\0b",
        "x" * 5000,
        "hf://model",
        "hf://a/b/c",
        "hf://../x",
        "hf:///etc/passwd",
        "org/mod--el",
        "org/model..x",
        "org/-model",
        "hf://org/mod el",
        "hf://org/" + "x" * 100,
        "https://example.com/org/model",
        "https://huggingface.co@example.com/org/model",
        "http://[::1/org/model",
        "https://huggingface.co/org",
        "https://huggingface.co/datasets/org/x",
        "https://huggingface.co/spaces/org/x",
        "https://huggingface.co/org/model/blob/main/model.safetensors",
        "https://huggingface.co/org/model/tree/main/sub",
    ],
)
def test_what_cannot_be_a_reference(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ref(text)
    assert caught.value.code == "usage.reference"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "revision", ["", "-x", "../x", "a..b", "a b", "x" * 202, "a\n", "/x", "a;b", "\u0661"]
)
def test_revisions_that_reach_no_url(revision: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_ref("org/model", revision)
    assert caught.value.code == "usage.revision"
    if revision.isprintable():
        with pytest.raises(UsageError):
            parse_ref(f"org/model@{revision}")


def test_revision_twice_is_refused_and_once_is_obeyed() -> None:
    assert parse_ref("org/model", "v1").revision == "v1"
    with pytest.raises(UsageError, match="twice"):
        parse_ref("org/model@v1", "v1")


def opened(path: Path) -> LocalSource:
    return open_local(parse_ref(str(path)))


def test_folder_is_listed_with_its_links_to_files(tmp_path: Path) -> None:
    """A snapshot of the Hub cache is a folder of links to blobs outside it."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"12345")
    snapshot = tmp_path / "snapshots" / "sha"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "sub" / "x.json").write_text("{}")
    (snapshot / ".git").mkdir()
    (snapshot / ".git" / "config").write_text("")
    (snapshot / "linked").symlink_to(tmp_path / "blobs", target_is_directory=True)
    (snapshot / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(snapshot / "pipe")
    source = opened(snapshot)
    assert list(source.files) == ["model.safetensors", "sub/x.json"]
    assert source.files["model.safetensors"].size == 5
    assert source.read("model.safetensors", 1, 3) == b"23"
    assert (source.name, source.commit) == (str(snapshot), None)
    assert source.traffic == module.Traffic()


def test_reading_exact_spans(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(range(100)))
    source = opened(path)
    assert source.read_spans("x.bin", [(90, 100), (0, 2), (5, 5)]) == [
        bytes(range(90, 100)),
        b"\0\1",
        b"",
    ]
    assert source.read_small("x.bin", 100) == bytes(range(100))


def test_long_reads_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_READ", 3)
    (tmp_path / "x").write_bytes(b"0123456789")
    assert opened(tmp_path).read("x", 1, 9) == b"12345678"


@pytest.mark.parametrize(
    ("call", "error", "code"),
    [
        (lambda s: s.read("x", 0, 11), FormatError, "format.truncated"),
        (lambda s: s.read("absent", 0, 1), NotFoundError, "not-found.file"),
        (lambda s: s.read("../x", 0, 1), NotFoundError, "not-found.file"),
        (lambda s: s.read_small("x", 9), LimitError, "limit.file-size"),
        (lambda s: s.read_small("pointer", 999), FormatError, "format.lfs-pointer"),
    ],
)
def test_bytes_that_are_not_there(
    tmp_path: Path, call: object, error: type[ProjauditError], code: str
) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    with pytest.raises(error) as caught:
        call(opened(tmp_path))  # type: ignore[operator]
    assert caught.value.code == code


def test_spans_that_are_none_are_a_bug(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123")
    with pytest.raises(ValueError, match="no span"):
        opened(tmp_path).read("x", 3, 2)


def test_file_that_shrinks_after_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    source = opened(tmp_path)
    os.truncate(path, 4)
    with pytest.raises(FormatError, match="truncated"):
        source.read("x", 0, 2)


def test_file_that_is_replaced_after_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    source = opened(tmp_path)
    (tmp_path / "y").write_bytes(b"9876543210")
    (tmp_path / "y").rename(path)
    with pytest.raises(IntegrityError) as caught:
        source.read("x", 0, 2)
    assert caught.value.code == "integrity.changed"


def test_file_that_vanishes_or_becomes_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    source = opened(tmp_path)
    path.unlink()
    with pytest.raises(FormatError, match="no such file"):
        source.read("x", 0, 2)
    os.mkfifo(path)
    with pytest.raises(FormatError, match="not a regular file"):
        source.read("x", 0, 2)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", Path("/dev/zero")):
        with pytest.raises(FormatError) as caught:
            opened(path)
        assert caught.value.code == "format.file"


def test_dangling_weights_are_not_read_as_absent(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(FormatError, match="no such file"):
        opened(tmp_path)


def test_path_that_vanishes_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    ref = parse_ref(str(tmp_path / "x"))
    (tmp_path / "x").rmdir()
    with pytest.raises(NotFoundError):
        open_local(ref)


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(LimitError) as caught:
        opened(tmp_path)
    assert caught.value.code == "limit.files"


def test_importing_is_light() -> None:
    code = (
        "import sys, projaudit.source, projaudit.strict, projaudit.checkpoint\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.stdout.strip() == "[]"
