"""Models in S3, in Google's storage, behind https and in an MLflow registry: real servers here."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from models import llava, save, tuned
from webserver import Request, WebServer

import projaudit
import projaudit.formats.html
import projaudit.formats.json
from projaudit.cli import main
from projaudit.errors import NetworkError, ProjauditError, UsageError
from projaudit.findings import Verdict
from projaudit.hub.guard import Limits
from projaudit.refs import parse_ref
from projaudit.remote import open_remote
from projaudit.remote.transfer import check_redirect

# Libraries of other people, whose warnings are not ours.
pytestmark = pytest.mark.filterwarnings("default")

BASE = llava(d=192, h=256, out=256)
BASE["language_model.model.layers.1.mlp.up_proj.weight"] = torch.randn(16384, 256)
TUNED = tuned(BASE, 0.05)
SECRET = "wJalrXUtnFEMIsekrit"
QUICK = Limits(connect=2, read=1, tries=2, grace=0.4)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save(root / "base", BASE, dtype=torch.bfloat16)
    save(root / "tuned", TUNED, dtype=torch.bfloat16)
    return root


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "AWS_", "MLFLOW_", "FSSPEC_")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("projaudit.hub.link.sleep", lambda seconds: None)


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The status and what was printed in all, of `projaudit check`."""
    with pytest.raises(SystemExit) as left:
        main(["check", "--depth", "weights", *arguments])
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out + printed.err


def same_numbers(report: projaudit.Report, local: projaudit.Report) -> bool:
    """Whether all that was measured there was measured here, with the same values."""
    here, there = (
        {(m.metric, m.subject): m.value for m in one.measurements} for one in (local, report)
    )
    return len(there) > 50 and there.items() <= here.items()


def one_line(code: str, printed: str) -> str:
    lines = printed.strip().splitlines()
    found = [line for line in lines if f"[{code}]" in line]
    assert len(found) == 1, printed
    assert "Traceback" not in printed
    assert "\x1b" not in printed
    assert "sekrit" not in printed
    return found[0]


# --- references -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "uri"),
    [
        ("s3://bucket/a/b/", "s3", "s3://bucket/a/b"),
        ("s3://bucket", "s3", "s3://bucket/"),
        ("gs://bucket/model", "gs", "gs://bucket/model"),
        ("https://host.example/a/model.safetensors", "https", "https://host.example/a/model.safetensors"),
        ("models:/llava/3", "mlflow", "models:/llava/3"),
        ("models:/llava@prod", "mlflow", "models:/llava@prod"),
        ("runs:/0123abc/model", "mlflow", "runs:/0123abc/model"),
    ],
)  # fmt: skip
def test_forms_of_a_reference_to_elsewhere(text: str, kind: str, uri: str):
    ref = parse_ref(text)
    assert (ref.kind, ref.uri, ref.repo, ref.path) == (kind, uri, None, None)


@pytest.mark.parametrize(
    "text",
    [
        "s3://", "s3:///x", "s3://a b/x", "s3://bucket/a/../b", "s3://bucket//x", "s3://-/x",
        "s3://KEY:wJalrXUtnFEMIsekrit@bucket/x", "gs://UP/x", "gs://bucket/./x",
        "http://host.example/model.safetensors", "https://host.example/org/model",
        "https://me:sekrit@host.example/model.safetensors", "https:///model.safetensors",
        "https://host.example:99999/model.safetensors", "https://[::1/model.safetensors",
        "https://host.example/%2e%2e%2fx.safetensors", "https://ho st/model.safetensors",
        "https://huggingface.co/org/model/resolve/main/model.safetensors",
        "az://container/model", "ftp://host/model.safetensors", "git+https://host/x",
        "models:/", "models:/a/../../b", "models://a/1", "runs:/", "runs:/x",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str):
    with pytest.raises(UsageError) as raised:
        parse_ref(text)
    assert raised.value.code == "usage.reference"
    assert "sekrit" not in str(raised.value)


def test_a_hub_url_stays_one_and_only_the_hub_has_revisions():
    assert parse_ref("https://huggingface.co/org/model").kind == "hub"
    with pytest.raises(UsageError) as raised:
        parse_ref("s3://bucket/x", "main")
    assert raised.value.code == "usage.revision"


def test_a_file_url_is_a_path(tmp_path: Path):
    (tmp_path / "a b.safetensors").write_bytes(b"x")
    ref = parse_ref(f"file://{tmp_path}/a%20b.safetensors")
    assert (ref.kind, ref.path) == ("local", tmp_path / "a b.safetensors")


def test_signatures_are_fetched_with_and_never_shown():
    ref = parse_ref("https://host.example/m.safetensors?X-Amz-Signature=sekrit&who=me#frag")
    assert ref.text == "https://host.example/m.safetensors"
    assert ref.uri == "https://host.example/m.safetensors?X-Amz-Signature=sekrit&who=me"
    assert "sekrit" not in repr(ref)


@pytest.mark.parametrize(
    "text", ["s3://bucket/x", "gs://bucket/x", "https://h.example/m.safetensors", "models:/a/1"]
)
def test_offline_asks_nobody(text: str, capsys: pytest.CaptureFixture[str]):
    status, printed = complaint(capsys, text, "--offline", "--base", text)
    assert status == 2
    assert text in one_line("offline.not-cached", printed)


def test_full_verification_is_not_pretended(capsys: pytest.CaptureFixture[str]):
    status, printed = complaint(capsys, "s3://bucket/x", "--verify", "full", "--base", "s3://b-b/x")
    assert status == 4
    assert "no digests" in one_line("usage.option", printed)


@pytest.mark.parametrize(
    ("text", "library", "extra"),
    [
        ("s3://bucket/x", "s3fs", "s3"),
        ("gs://bucket/x", "gcsfs", "gcs"),
        ("models:/a/1", "mlflow", "mlflow"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    text: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setitem(sys.modules, library, None)
    status, printed = complaint(capsys, text, "--base", text)
    assert status == 4
    assert f"pip install 'projaudit[{extra}]'" in one_line("usage.extra", printed)


def test_none_of_the_libraries_is_loaded_unasked():
    code = "import projaudit.remote, projaudit.cli, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fsspec", "s3fs", "gcsfs", "mlflow", "aiohttp", "torch"} & set(done.stdout.split())


# --- redirects ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "allowed"),
    [
        ("https://cdn.example/x", True),
        ("http://cdn.example/x", False),
        ("file:///etc/passwd", False),
        ("https://169.254.169.254/x", False),
        ("https://2852039166/x", False),
        ("https://[fe80::1]/x", False),
        ("https://[::ffff:10.0.0.1]/x", False),
        ("https://inside.example/x", False),
        ("https://10.0.0.1/x", False),
        ("https://127.0.0.1/x", False),
        ("https://0.0.0.0/x", False),
        ("https://public.example/else", True),
    ],
)
def test_where_a_public_server_may_redirect_to(
    there: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
):
    names = {
        "public.example": "93.184.216.34",
        "cdn.example": "93.184.216.35",
        "inside.example": "10.1.2.3",
    }
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: real(names.get(host, host), *a, **k)
    )
    if allowed:
        check_redirect("https://public.example/x", there)
    else:
        with pytest.raises(NetworkError) as raised:
            check_redirect("https://public.example/x", there)
        assert raised.value.code == "network.redirect"


def test_a_private_server_may_redirect_within_its_network_but_not_to_metadata():
    check_redirect("https://10.0.0.1/x", "https://10.0.0.2/x")
    with pytest.raises(NetworkError):
        check_redirect("https://10.0.0.1/x", "https://169.254.169.254/x")


# --- https ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def https(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Iterator[WebServer]:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    with WebServer(context) as server:
        server.bundle = bundle  # type: ignore[attr-defined]
        for name in ("base", "tuned"):
            data = (folders / name / "model.safetensors").read_bytes()
            server.files[f"/{name}/model.safetensors"] = data
        yield server


@pytest.fixture
def web(https: WebServer, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    monkeypatch.setenv("SSL_CERT_FILE", str(https.bundle))  # type: ignore[attr-defined]
    monkeypatch.setattr("projaudit.remote.places.Limits", lambda: QUICK)
    https.reset()
    return https


def test_a_weight_file_behind_https_is_audited_by_ranges(web: WebServer, folders: Path):
    report = projaudit.check(
        f"{web.url}/tuned/model.safetensors?signature=sekrit",
        f"{web.url}/base/model.safetensors",
        seed=1, depth="weights",
    )  # fmt: skip
    local = projaudit.check(
        str(folders / "tuned" / "model.safetensors"), str(folders / "base" / "model.safetensors"),
        seed=1, depth="weights",
    )  # fmt: skip
    assert same_numbers(report, local)
    assert report.verdict is local.verdict
    assert report.target.kind == "https"
    assert report.target.name == f"{web.url}/tuned/model.safetensors"
    assert report.run.wire_bytes == web.sent
    assert web.sent < 0.15 * 2 * size_of(folders / "tuned")
    assert any("sekrit" in path for path, _, _ in web.log)
    for text in (projaudit.formats.json.render(report), projaudit.formats.html.render(report)):
        assert "sekrit" not in text
    assert {t.verified for t in report.tensors} == {"range"}


def test_one_side_here_and_one_there(web: WebServer, folders: Path):
    report = projaudit.check(
        str(folders / "tuned"), f"{web.url}/base/model.safetensors", seed=1, depth="weights"
    )
    assert (report.target.kind, report.base.kind) == ("local", "https")
    assert report.provenance.verified
    assert report.verdict is Verdict.INCONCLUSIVE  # a file alone has no config to compare


def test_a_server_that_nobody_vouches_for(
    web: WebServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("SSL_CERT_FILE")
    url = f"{web.url}/tuned/model.safetensors"
    status, printed = complaint(capsys, url, "--base", url)
    assert (status, web.sent) == (2, 0)
    one_line("network.tls", printed)


def later(fault):
    """The fault from the second request on: the first finds the file."""
    count = [0]

    def misbehave(request: Request) -> bool:
        count[0] += 1
        return bool(count[0] > 1 and fault(request))

    return misbehave


def status_of(status: int, **headers: str):
    def fault(request: Request) -> bool:
        request.answer(status, b"\x1b[31mtoken=sekrit", **headers)
        return True

    return fault


def shifted(request: Request) -> bool:
    start, stop = request.span
    request.answer(206, request.data[start + 1 : stop + 1], start=start + 1)
    return True


def shortened(request: Request) -> bool:
    start, stop = request.span
    request.answer(206, request.data[start : stop - 1], start=start)
    return True


def dropped(request: Request) -> bool:
    start, stop = request.span
    said = f"bytes {start}-{stop - 1}/{len(request.data)}"
    whole = {"Content_Length": str(stop - start), "Content_Range": said}
    request.close_connection = True
    request.answer(206, request.data[start : start + 1], **whole)
    return True


def slow(request: Request) -> bool:
    start, stop = request.span
    said = f"bytes {start}-{stop - 1}/{len(request.data)}"
    whole = {"Content_Length": str(stop - start), "Content_Range": said}
    request.answer(206, b"", **whole)
    try:
        for at in range(start, min(stop, start + 12)):
            time.sleep(0.08)
            request.wfile.write(request.data[at : at + 1])
    except OSError:
        pass
    request.close_connection = True
    return True


def silent(request: Request) -> bool:
    time.sleep(1.2)
    request.close_connection = True
    return True


def other_state(request: Request) -> bool:
    start, stop = request.span
    request.answer(206, request.data[start:stop], start=start, ETag='"another"')
    return True


def compressed(request: Request) -> bool:
    start, stop = request.span
    request.answer(206, request.data[start:stop], start=start, Content_Encoding="gzip")
    return True


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (status_of(404), "not-found.file"),
        (status_of(403), "auth.refused"),
        (status_of(401), "auth.refused"),
        (status_of(416), "integrity.content-range"),
        (status_of(429), "rate-limit"),
        (status_of(500), "network.server"),
        (status_of(418), "network.status"),
        (status_of(302, Location="https://169.254.169.254/latest/meta-data"), "network.redirect"),
        (status_of(302, Location="http://127.0.0.1:1/x"), "network.redirect"),
        (status_of(302, Location="file:///etc/passwd"), "network.redirect"),
        (shifted, "integrity.content-range"),
        (shortened, "integrity.content-range"),
        (dropped, "network.connection"),
        (other_state, "integrity.changed"),
        (compressed, "integrity.encoding"),
        (slow, "network.timeout"),
        (silent, "network.timeout"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_faults_of_a_server_each_have_their_line(
    web: WebServer, fault, code: str, capsys: pytest.CaptureFixture[str]
):
    web.misbehave(later(fault))
    url = f"{web.url}/tuned/model.safetensors"
    status, printed = complaint(capsys, f"{url}?token=sekrit", "--base", url, "--quiet")
    assert status == 2
    line = one_line(code, printed)
    assert "127.0.0.1" in line
    assert "HF_TOKEN" not in line


def test_a_short_body_is_asked_for_again_where_it_stopped(web: WebServer, folders: Path):
    broken = [0]

    def once(request: Request) -> bool:
        broken[0] += 1
        if broken[0] != 3:
            return False
        return dropped(request)

    source = open_remote(parse_ref(f"{web.url}/tuned/model.safetensors"))
    web.misbehave(once)
    data = (folders / "tuned" / "model.safetensors").read_bytes()
    for start in (0, 100, 1000):
        assert source.read("model.safetensors", start, start + 50) == data[start : start + 50]
    assert [span for _, _, span in web.log[-2:]] == [(1000, 1050), (1001, 1050)]


def test_a_file_that_changes_between_header_and_body_is_noticed(web: WebServer):
    path = "/moving/model.safetensors"
    web.files[path] = web.files["/base/model.safetensors"]
    source = open_remote(parse_ref(web.url + path))
    source.read("model.safetensors", 0, 8)
    web.files[path] = web.files["/tuned/model.safetensors"]
    with pytest.raises(ProjauditError) as raised:
        source.read("model.safetensors", 8, 100)
    assert (raised.value.code, raised.value.exit_code) == ("integrity.changed", 2)


def ignoring_ranges(request: Request) -> bool:
    if request.data:
        request.answer(200, request.data)
    return bool(request.data)


def test_a_server_without_ranges_costs_the_whole_file_and_the_report_says_so(web: WebServer):
    web.misbehave(ignoring_ranges)
    said: list[str] = []
    url = f"{web.url}/tuned/model.safetensors"
    report = projaudit.check(url, url, seed=1, depth="weights", notify=said.append)
    assert report.run.fallbacks == ("model.safetensors",)
    assert any("ignores byte ranges" in line for line in said)
    assert "base-is-target" in {f.rule for f in report.findings}
    small = open_remote(parse_ref(url), limits=Limits(whole_files=1000))
    with pytest.raises(ProjauditError) as raised:
        small.read("model.safetensors", 0, 8)
    assert raised.value.code == "limit.bytes"


def test_what_is_no_file(web: WebServer, capsys: pytest.CaptureFixture[str]):
    web.misbehave(status_of(200, Content_Type="text/html; charset=utf-8"))
    url = f"{web.url}/tuned/model.safetensors"
    status, printed = complaint(capsys, url, "--base", url)
    assert (status, "web page" in one_line("network.answer", printed)) == (2, True)


def test_a_whole_copy_is_gone_with_its_source(web: WebServer):
    source = open_remote(parse_ref(f"{web.url}/tuned/model.safetensors"))
    assert not source.at_hand("model.safetensors")
    copy = source.whole("model.safetensors")
    assert copy.read_bytes() == web.files["/tuned/model.safetensors"]
    assert source.at_hand("model.safetensors")
    del source
    assert not copy.exists()


def test_reports_are_named_after_the_address_without_its_signature(
    web: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    url = f"{web.url}/tuned/model.safetensors?X-Amz-Signature=sekrit"
    status, printed = complaint(
        capsys, url, "--base", url, "-o", f"{tmp_path}/out/", "--format", "json", "--format", "html"
    )
    assert status in (1, 3)
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 2
    for file in files:
        assert "sekrit" not in file.name + file.read_text() + printed


# --- S3 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def moto_server(folders: Path) -> Iterator[Any]:
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id="AKIATESTING", aws_secret_access_key=SECRET,
    )  # fmt: skip
    client.url = url
    client.create_bucket(Bucket="models")
    for folder in ("base", "tuned"):
        for file in (folders / folder).iterdir():
            client.put_object(
                Bucket="models", Key=f"llava/{folder}/{file.name}", Body=file.read_bytes()
            )
    client.put_object(Bucket="models", Key="llava/tuned/", Body=b"")
    client.put_object(Bucket="models", Key="llava/tuned-2/config.json", Body=b"{}")
    yield client
    server.stop()


@pytest.fixture
def s3(moto_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    nowhere = str(tmp_path / "none")
    for name, value in {
        "AWS_ENDPOINT_URL": moto_server.url, "AWS_ACCESS_KEY_ID": "AKIATESTING",
        "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": nowhere, "AWS_SHARED_CREDENTIALS_FILE": nowhere,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return moto_server


def test_a_folder_in_s3_is_audited_by_ranges(s3: Any, folders: Path):
    report = projaudit.check("s3://models/llava/tuned/", "s3://models/llava/base", seed=1)
    local = projaudit.check(str(folders / "tuned"), str(folders / "base"), seed=1)
    assert report.verdict is local.verdict is Verdict.PASS
    assert same_numbers(report, local)
    assert (report.target.kind, report.target.name) == ("s3", "s3://models/llava/tuned")
    assert report.run.wire_bytes < 0.15 * 2 * size_of(folders / "tuned")
    text = projaudit.formats.json.render(report)
    assert SECRET not in text
    assert "AKIA" not in text
    assert "X-Amz" not in text
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(text), projaudit.formats.json.schema())
    assert json.loads(text)["target"]["kind"] == "s3"


def test_one_object_and_its_neighbours(s3: Any):
    source = open_remote(parse_ref("s3://models/llava/tuned/model.safetensors"))
    assert list(source.files) == ["model.safetensors"]
    folder = open_remote(parse_ref("s3://models/llava/tuned"))
    assert sorted(folder.files) == ["config.json", "model.safetensors"]
    report = projaudit.check(
        "s3://models/llava/tuned/model.safetensors", "s3://models/llava/base/model.safetensors",
        seed=1, depth="weights",
    )  # fmt: skip
    assert [p.base for p in report.projectors] == ["s3://models/llava/base/model.safetensors"]
    assert report.verdict is Verdict.INCONCLUSIVE  # a file alone has no config to compare


def test_an_object_that_is_replaced_is_noticed(s3: Any, folders: Path):
    data = (folders / "base" / "model.safetensors").read_bytes()
    s3.put_object(Bucket="models", Key="moving/model.safetensors", Body=data)
    source = open_remote(parse_ref("s3://models/moving"))
    assert source.read("model.safetensors", 0, 8) == data[:8]
    s3.put_object(Bucket="models", Key="moving/model.safetensors", Body=data[:-1] + b"\x01")
    with pytest.raises(ProjauditError) as raised:
        source.read("model.safetensors", 8, 100)
    assert (raised.value.code, raised.value.exit_code) == ("integrity.changed", 2)
    s3.delete_object(Bucket="models", Key="moving/model.safetensors")
    with pytest.raises(ProjauditError) as raised:
        source.read("model.safetensors", 8, 100)
    assert raised.value.code == "not-found.file"


@pytest.mark.parametrize("key", ["../evil.json", "a/../../b", "a//b", "./c", "x\x1b[2Jy", "/etc/x"])
def test_hostile_keys_are_refused(s3: Any, key: str, capsys: pytest.CaptureFixture[str]):
    s3.put_object(Bucket="models", Key=f"hostile/{key}", Body=b"{}")
    try:
        status, printed = complaint(
            capsys, "s3://models/hostile", "--base", "s3://models/llava/base"
        )
    finally:
        s3.delete_object(Bucket="models", Key=f"hostile/{key}")
    assert status == 2
    one_line("integrity.path", printed)


def test_more_files_than_any_model_has(s3: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("projaudit.remote.buckets.MAX_FILES", 1)
    with pytest.raises(ProjauditError) as raised:
        open_remote(parse_ref("s3://models/llava"))
    assert raised.value.code == "limit.files"


def test_a_listing_of_several_pages(s3: Any, monkeypatch: pytest.MonkeyPatch):
    for number in range(5):
        s3.put_object(Bucket="models", Key=f"many/{number}.txt", Body=b"x")
    monkeypatch.setattr("projaudit.remote.buckets.PAGE", 2)
    source = open_remote(parse_ref("s3://models/many"))
    assert len(source.files) == 5
    assert source.traffic.requests == 3
    monkeypatch.setattr("projaudit.remote.buckets.MAX_PAGES", 2)
    with pytest.raises(ProjauditError) as raised:
        open_remote(parse_ref("s3://models/many"))
    assert raised.value.code == "network.answer"


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("s3://models/nothing/here", "not-found.path"),
        ("s3://no-such-bucket/x", "not-found.path"),
        ("s3://models/llava/tuned-3/model.safetensors", "not-found.path"),
    ],
)
def test_what_is_not_there(s3: Any, target: str, code: str, capsys: pytest.CaptureFixture[str]):
    status, printed = complaint(capsys, target, "--base", "s3://models/llava/base")
    assert status == 2
    assert target in one_line(code, printed)


def test_an_s3_that_cannot_be_reached(s3: Any, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    status, printed = complaint(capsys, "s3://models/llava/tuned", "--base", "s3://models/x")
    assert status == 2
    one_line("network.connection", printed)


def test_an_s3_that_refuses_the_account(s3: Any, web: WebServer, monkeypatch, capsys):
    def refuse(request: Request) -> bool:
        body = b"<Error><Code>AccessDenied</Code><Message>\x1b[31msekrit</Message></Error>"
        request.answer(403, body, Content_Type="application/xml")
        return True

    with WebServer(None) as other:
        other.misbehave(refuse)
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
        status, printed = complaint(capsys, "s3://models/llava/tuned", "--base", "s3://models/x")
    assert status == 2
    assert "AWS_PROFILE" in one_line("auth.refused", printed)


def test_without_an_account_a_public_bucket_is_asked_anonymously(s3: Any, monkeypatch):
    s3.put_object(Bucket="models", Key="open/config.json", Body=b"{}", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    said: list[str] = []
    source = open_remote(parse_ref("s3://models/open"), notify=said.append)
    assert source.read("config.json", 0, 2) == b"{}"
    assert any("no AWS account" in line for line in said)


# --- MLflow ---------------------------------------------------------------------------------------

_TRACKING = """
import os, sys
from mlflow.server import app
from mlflow.server.handlers import initialize_backend_stores
initialize_backend_stores(os.environ["_MLFLOW_SERVER_FILE_STORE"], None, "mlflow-artifacts:/")
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, app, threaded=True)
print("port", server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server application on SQLite, serving artifacts, in a process of its own."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("flask")
    folder = tmp_path_factory.mktemp("mlflow")
    # Its first start writes and syncs some sixty migrations, which takes seconds on a busy disk.
    memory = Path("/dev/shm")
    database = tempfile.mkdtemp(dir=memory if memory.is_dir() else folder)
    environment = {
        **os.environ,
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{database}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "served"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with subprocess.Popen(
        [sys.executable, "-c", _TRACKING], env=environment, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        port = next(m[1] for line in process.stdout if (m := re.match(r"port (\d+)", line)))
        url = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(f"{url}/health").read()
        yield url
        process.kill()
    shutil.rmtree(database)


@pytest.fixture
def mlflow(tracking: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    import mlflow as library

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return library.MlflowClient(tracking)


def registered(client: Any, name: str, location: str | None, put: Any) -> None:
    """A registered model of one version, whose artifacts `put(artifact uri, run id)` brings."""
    experiment = client.create_experiment(name, artifact_location=location)
    run = client.create_run(experiment)
    put(run.info.artifact_uri, run.info.run_id)
    client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/model"
    version = client.create_model_version(name, source, run.info.run_id)
    client.set_registered_model_alias(name, "prod", version.version)


def model_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder as mlflow's transformers flavor lays them out."""
    files = {f"model/{file.name}": file.read_bytes() for file in folder.iterdir()}
    return {"MLmodel": b"flavors:\n  transformers:\n    model_binary: model\n", **files}


def test_a_registered_model_in_a_folder(mlflow: Any, folders: Path, tmp_path: Path):
    def put(uri: str, _: str) -> None:
        for path, data in model_files(folders / "tuned").items():
            file = Path(uri.removeprefix("file://")) / "model" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    registered(mlflow, "local-model", f"file://{tmp_path}/store", put)
    report = projaudit.check(
        "models:/local-model@prod", str(folders / "base"), seed=1, depth="weights"
    )
    assert report.verdict is Verdict.PASS
    assert (report.target.kind, report.target.name) == ("mlflow", "models:/local-model/1")
    assert report.target.ref == "models:/local-model@prod"
    assert report.run.wire_bytes == 0


def test_a_registered_model_in_s3_is_read_by_ranges(mlflow: Any, s3: Any, folders: Path):
    def put(uri: str, _: str) -> None:
        for path, data in model_files(folders / "tuned").items():
            key = f"{uri.removeprefix('s3://models/')}/model/{path}"
            s3.put_object(Bucket="models", Key=key, Body=data)

    registered(mlflow, "s3-model", "s3://models/mlflow", put)
    report = projaudit.check("models:/s3-model/1", "s3://models/llava/base", seed=1)
    assert report.verdict is Verdict.PASS
    assert (report.target.kind, report.base.kind) == ("mlflow", "s3")
    assert 0 < report.run.wire_bytes < 0.15 * 2 * size_of(folders / "tuned")
    assert report.run.fallbacks == ()


def test_a_model_that_only_mlflow_serves_is_fetched_whole_and_said_so(
    mlflow: Any, folders: Path, tmp_path: Path
):
    def put(_: str, run: str) -> None:
        for path, data in model_files(folders / "tuned").items():
            file = tmp_path / "up" / "model" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        mlflow.log_artifacts(run, str(tmp_path / "up"))

    registered(mlflow, "served-model", None, put)
    said: list[str] = []
    report = projaudit.check(
        "models:/served-model/1", str(folders / "base"), seed=1, depth="weights", notify=said.append
    )
    assert report.verdict is Verdict.PASS
    assert "model.safetensors" in report.run.fallbacks
    assert any("fetched whole through mlflow" in line for line in said)
    small = open_remote(parse_ref("models:/served-model/1"), limits=Limits(whole_files=10_000))
    with pytest.raises(ProjauditError) as raised:
        small.read("model.safetensors", 0, 8)
    assert raised.value.code == "limit.bytes"


@pytest.mark.parametrize("target", ["models:/nobody/1", "models:/nobody@prod", "runs:/abc/model"])
def test_a_model_that_is_not_registered(mlflow: Any, target: str, capsys):
    status, printed = complaint(capsys, target, "--base", target)
    assert status == 2
    assert target in one_line("not-found.path", printed)


def test_a_registry_that_cannot_be_reached(mlflow: Any, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:sekrit@127.0.0.1:9")
    status, printed = complaint(capsys, "models:/llava/1", "--base", "models:/llava/2")
    assert status == 2
    assert "MLFLOW_TRACKING_URI" in one_line("network.connection", printed)


def test_no_registry_is_named(mlflow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    status, printed = complaint(capsys, "models:/llava/1", "--base", "models:/llava/2")
    assert status == 4
    assert "MLFLOW_TRACKING_URI" in one_line("usage.reference", printed)
    assert not list(tmp_path.iterdir())


# --- Google's storage -----------------------------------------------------------------------------


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WebServer]:
    """What Google's documentation of its JSON API says: names, media, conditions; no emulator."""
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with WebServer(None) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        server.generation = 7  # type: ignore[attr-defined]

        def speak(request: Request) -> bool:
            path, _, query = request.path.partition("?")
            if path == "/storage/v1/b/models/o":
                items = [
                    {"name": name[1:], "size": str(len(data)), "generation": "7"}
                    for name, data in server.files.items()
                ]
                request.answer(200, json.dumps({"items": items}).encode())
                return True
            name = unquote(path.removeprefix("/storage/v1/b/models/o/"))
            request.data = server.files.get(f"/{name}", b"")
            if "alt=media" not in query or not request.data:
                request.answer(404, b"{}")
            elif f"ifGenerationMatch={server.generation}" not in query:  # type: ignore[attr-defined]
                request.answer(412, b"{}")
            else:
                start, stop = request.span
                request.answer(206, request.data[start:stop], start=start, X_Goog_Generation="7")
            return True

        server.misbehave(speak)
        yield server


def test_a_folder_in_googles_storage(google: WebServer, folders: Path):
    for folder in ("base", "tuned"):
        for file in (folders / folder).iterdir():
            google.files[f"/llava/{folder}/{file.name}"] = file.read_bytes()
    everything = dict(google.files)

    def only(folder: str) -> None:
        google.files.clear()
        google.files.update({n: d for n, d in everything.items() if folder in n})

    only("tuned")
    source = open_remote(parse_ref("gs://models/llava/tuned"))
    assert sorted(source.files) == ["config.json", "model.safetensors"]
    data = (folders / "tuned" / "model.safetensors").read_bytes()
    assert source.read("model.safetensors", 100, 200) == data[100:200]
    assert google.log[-1][2] == (100, 200)
    google.generation = 8  # type: ignore[attr-defined]
    with pytest.raises(ProjauditError) as raised:
        source.read("model.safetensors", 100, 200)
    assert raised.value.code == "integrity.changed"


def test_an_emulator_of_googles_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="models")
    server.start()
    try:
        urllib.request.urlopen(
            f"http://127.0.0.1:{port}/upload/storage/v1/b/models/o?uploadType=media&name=a%2Fb.gguf",
            data=b"0123456789",
        )
        source = open_remote(parse_ref("gs://models/a"))
        assert {path: file.size for path, file in source.files.items()} == {"b.gguf": 10}
        assert source.read("b.gguf", 3, 6) == b"345"
        for missing in ("gs://models/none", "gs://no-bucket/a"):
            with pytest.raises(ProjauditError) as raised:
                open_remote(parse_ref(missing))
            assert raised.value.code == "not-found.path"
    finally:
        server.stop()
