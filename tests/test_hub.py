"""The Hub source against a Hub on this machine, spoken to by the real client."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fakehub import FakeHub, on
from huggingface_hub import HfApi, close_session, constants, get_session, hf_hub_download
from hypothesis import given, settings
from hypothesis import strategies as st

from projaudit.errors import (
    AuthError,
    FormatError,
    NetworkError,
    NotFoundError,
    OfflineError,
    ProjauditError,
)
from projaudit.hub import HubSource, Limits, guard, guarded_client, listing, open_hub
from projaudit.hub.cache import Cache, cache_root, open_cache
from projaudit.hub.ranges import plan_blocks
from projaudit.refs import Ref, parse_ref

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
QUICK = Limits(connect=5.0, read=5.0)
IMPATIENT = Limits(connect=2.0, read=0.5)
SHARD = "model.safetensors"
DATA = random.Random(7).randbytes(3_000_000)
SPANS = [(8, 2_000), (600_000, 900_000), (900_100, 1_400_000)]
NEEDED = sum(stop - start for start, stop in SPANS)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No token, cache, proxy or switch of this machine; no client left over."""
    for name in list(os.environ):
        if name.startswith(("HF_", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub(tmp_path) as server:
        yield server
        close_session()


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept, in seconds."""
    slept: list[float] = []
    monkeypatch.setattr("projaudit.hub.link.sleep", slept.append)
    return slept


@pytest.fixture
def model(hub: FakeHub) -> str:
    return hub.add("org/model", {"config.json": b'{"a": 1}', SHARD: DATA, "README.md": b"hi"})


def opened(hub: FakeHub, text: str = "org/model", **options: Any) -> HubSource:
    return open_hub(parse_ref(f"hf://{text}"), endpoint=hub.url, **{"limits": QUICK, **options})


def wanted(spans: list[tuple[int, int]] = SPANS) -> list[bytes]:
    return [DATA[start:stop] for start, stop in spans]


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(ProjauditError) as caught:
        action()
    text = str(caught.value)
    assert TOKEN not in text
    assert "Signature" not in text
    assert text.isprintable()
    return caught.value.code


# ------------------------------------------------------------------ the usual case


def test_source_reads_exactly_the_spans(hub: FakeHub, model: str) -> None:
    source = opened(hub)
    assert (source.name, source.id, source.commit) == ("org/model", "org/model", model)
    assert type(source.commit) is str
    assert source.files[SHARD].size == len(DATA)
    assert source.files[SHARD].sha256 == hashlib.sha256(DATA).hexdigest()
    assert source.files["config.json"].sha256 is None
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.read(SHARD, 5, 5) == b""
    assert source.read_small("config.json", 100) == b'{"a": 1}'
    assert source.verified == {SHARD: "range", "config.json": "full"}
    assert not source.fallbacks
    assert source.complete


def test_wire_bytes_and_requests(hub: FakeHub, model: str) -> None:
    source = opened(hub)
    source.read(SHARD, 0, 2_000)
    source.read_spans(SHARD, SPANS[1:])
    wire = hub.wire("cdn")
    assert wire <= 1.05 * (NEEDED + 8)
    # commit, listing, one HEAD, the header's range, one range for two neighbours
    assert [one.method for one in hub.log] == ["GET", "GET", "HEAD", "GET", "GET"]
    assert source.traffic.requests == len(hub.log)
    assert source.traffic.bytes == hub.wire()
    assert all(f"/{model}" in one.path for one in hub.requests("hub")[1:])


def test_second_run_fetches_no_content(hub: FakeHub, model: str) -> None:
    first = opened(hub)
    first.read_spans(SHARD, SPANS)
    first.read_small("config.json", 100)
    hub.log.clear()
    again = opened(hub)
    assert again.read_spans(SHARD, SPANS) == wanted()
    assert again.read(SHARD, 700_000, 700_100) == DATA[700_000:700_100]
    assert again.read_small("config.json", 100) == b'{"a": 1}'
    assert len(hub.log) == 2
    assert hub.wire("cdn") == 0
    assert again.traffic.from_cache == NEEDED + 100 + 8


def test_progress_counts_the_bytes_to_fetch(hub: FakeHub, model: str) -> None:
    seen: list[tuple[str, int, int]] = []
    opened(hub, progress=lambda *now: seen.append(now)).read_spans(SHARD, SPANS)
    total = seen[-1][2]
    assert seen[-1] == (SHARD, total, total)
    assert NEEDED <= total <= 1.05 * NEEDED


def test_lineage_and_access_of_the_repository(hub: FakeHub) -> None:
    hub.add(
        "org/tuned",
        {"config.json": b"{}"},
        base_models=["org/base", "other/base"],
        tags=["base_model:org/base"],
        gated="auto",
        card={"tags": 7, "self": 1},
    )
    source = opened(hub, "org/tuned")
    assert source.base_models == (("org/base", "finetune"), ("other/base", "finetune"))
    assert source.tags == ("base_model:org/base",)
    assert source.gated == "auto"
    assert source.private is False


@pytest.mark.parametrize(
    "value", [None, 7, "x", [], {}, {"models": [{"id": 3}, 4]}, {"relation": 5, "models": None}]
)
def test_lineage_of_odd_form_is_left_out(value: object) -> None:
    assert listing._lineage(value) == ()


def test_library_prints_nothing(
    hub: FakeHub, model: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(on(headers={"X-HF-Warning": "topic; \x1b[2Jowned"}))
    hub.faults.append(on("cdn", times=1, status=503))
    opened(hub).read_spans(SHARD, SPANS)
    assert capfd.readouterr() == ("", "")
    assert "owned" not in caplog.text


def test_large_files_are_served_from_disk(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    (folder / "sub").mkdir(parents=True)
    with (folder / "sub" / SHARD).open("wb") as file:
        file.write(b"begin")
        file.truncate(200 << 20)
        file.seek(100 << 20)
        file.write(DATA[:1000])
    hub.add("org/big", folder, digests={f"sub/{SHARD}": "a" * 64})
    source = opened(hub, "org/big")
    assert source.read(f"sub/{SHARD}", 100 << 20, (100 << 20) + 1000) == DATA[:1000]
    assert hub.wire("cdn") == 1000


def test_names_of_every_kind(hub: FakeHub) -> None:
    names = ["a b#c?d%41.json", "ü/\u202ex.json", "x\ny.json"]
    hub.add("org/names", dict.fromkeys(names, b"[]"))
    source = opened(hub, "org/names")
    assert sorted(source.files) == sorted(names)
    for name in names:
        assert source.read_small(name, 10) == b"[]"
    hub.faults.append(on(status=404))
    close_session()
    source._cache.root.rename(source._cache.root.with_name("gone"))
    assert code_of(lambda: source.read_small("x\ny.json", 10)) == "not-found.file"


# ------------------------------------------------------------------ pinning


def test_push_between_header_and_body(hub: FakeHub, model: str) -> None:
    source = opened(hub, "org/model@main")
    head = source.read(SHARD, 0, 100)
    hub.add("org/model", {SHARD: DATA[::-1]})
    assert head + source.read(SHARD, 100, 5_000) == DATA[:5_000]
    assert source.read_small("README.md", 10) == b"hi"
    # Control: who asks for the branch again does see the push.
    assert opened(hub, "org/model@main").read(SHARD, 0, 100) == DATA[::-1][:100]


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1.0"])
def test_revisions_with_slashes(hub: FakeHub, revision: str) -> None:
    sha = hub.add("org/model", {SHARD: DATA}, revision=revision)
    source = open_hub(Ref("x", "hub", repo="org/model", revision=revision), endpoint=hub.url)
    assert source.commit == sha
    assert open_hub(Ref("x", "hub", repo="org/model", revision=sha), endpoint=hub.url).commit == sha


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "-x", "a b", ""])
def test_revision_that_walks_is_refused(hub: FakeHub, model: str, revision: str) -> None:
    ref = Ref("x", "hub", repo="org/model", revision=revision)
    assert code_of(lambda: open_hub(ref, endpoint=hub.url)) == "usage.revision"
    assert not hub.log


def test_commit_other_than_asked_for(hub: FakeHub, model: str) -> None:
    info = {"id": "org/model", "sha": "b" * 40}
    hub.faults.append(on("hub", match="/revision/", body=json.dumps(info).encode()))
    assert code_of(lambda: opened(hub, f"org/model@{model}")) == "integrity.commit"


# ------------------------------------------------------------------ the plan of ranges

spans_of_a_file = st.lists(
    st.tuples(st.integers(0, 5_000), st.integers(0, 600)).map(lambda s: (s[0], s[0] + s[1])),
    max_size=12,
)


@settings(deadline=None, max_examples=300)
@given(spans_of_a_file, st.integers(1, 300), st.integers(1, 900), st.sampled_from([0, 0.05, 0.5]))
def test_plan_covers_without_overlap(
    spans: list[tuple[int, int]], gap: int, block: int, waste: float
) -> None:
    blocks = plan_blocks(spans, gap=gap, block=block, waste=waste)
    needed = {byte for start, stop in spans for byte in range(start, stop)}
    asked = [byte for start, stop in blocks for byte in range(start, stop)]
    assert needed <= set(asked)
    assert asked == sorted(set(asked))
    assert all(0 < stop - start <= block for start, stop in blocks)
    assert len(asked) <= (1 + waste) * len(needed)
    if needed:
        assert min(needed) == asked[0]
        assert max(needed) == asked[-1]


def test_plan_bridges_what_pays() -> None:
    mib = 1 << 20
    near = [(0, 40 * mib), (41 * mib, 60 * mib)]
    assert plan_blocks(near) == [(0, 60 * mib)]
    assert plan_blocks([(0, 40 * mib), (42 * mib, 60 * mib)]) == [
        (0, 40 * mib),
        (42 * mib, 60 * mib),
    ]
    assert plan_blocks([(0, 100), (200, 300)]) == [(0, 100), (200, 300)]
    assert plan_blocks([(0, 150 * mib)]) == [
        (0, 64 * mib),
        (64 * mib, 128 * mib),
        (128 * mib, 150 * mib),
    ]
    assert plan_blocks([]) == []


@settings(deadline=None, max_examples=25)
@given(
    spans=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 9_000)), min_size=1, max_size=6)
)
def test_any_spans_in_any_order(
    spans: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = DATA[:50_000]
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("xdg"))
    asked = [(start, min(start + length, len(data))) for start, length in spans]
    with FakeHub(tmp_path_factory.mktemp("hub")) as server:
        server.add("org/any", {SHARD: data})
        with guarded_client(server.url):
            for _ in range(2):
                got = opened(server, "org/any").read_spans(SHARD, asked)
                assert got == [data[start:stop] for start, stop in asked]


# ------------------------------------------------------------------ broken transfers


@pytest.mark.parametrize(
    "fault",
    [
        {"drop_after": 100_000},
        {"truncate": 100_000},
        {"drop_after": 0},
        {"status": 503},
        {"status": 500},
        {"stall_after": 70_000},
        {"delay": 3.0},
        {"status": 429, "headers": {"Retry-After": "7"}},
    ],
    ids=str,
)
def test_transfer_is_resumed(hub: FakeHub, model: str, fault: dict[str, Any]) -> None:
    source = opened(hub)
    if "delay" in fault or "stall_after" in fault:
        source._transfer._link.limits = IMPATIENT
    hub.faults.append(on("cdn", times=2, **fault))
    assert source.read(SHARD, 0, 1_000_000) == DATA[:1_000_000]
    assert not source.fallbacks
    asked = [one.range for one in hub.requests("cdn")]
    lost = fault.get("drop_after") or fault.get("truncate") or fault.get("stall_after") or 0
    if "stall_after" not in fault and "drop_after" not in fault:
        assert asked == [f"bytes={n * lost}-999999" for n in range(3)]
    assert hub.wire("cdn") <= 1_000_000 + 3 * 65_536
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"drop_after": 0}, "network.connection"),
        ({"truncate": 0}, "network.incomplete"),
        ({"status": 503}, "network.server"),
        ({"stall_after": 10}, "network.timeout"),
        ({"status": 429}, "rate-limit"),
    ],
    ids=str,
)
def test_transfer_that_never_heals(
    hub: FakeHub, model: str, fault: dict[str, Any], code: str, naps: list[float]
) -> None:
    source = opened(hub)
    if "stall_after" in fault:
        source._transfer._link.limits = IMPATIENT
    hub.faults.append(on("cdn", **fault))
    assert code_of(lambda: source.read(SHARD, 0, 1_000)) == code
    assert len(hub.requests("cdn")) == 5
    assert naps == [0.5, 1, 2, 4]


def test_body_that_only_trickles(hub: FakeHub, model: str) -> None:
    slow = Limits(connect=2, read=0.4, grace=0.0, slowest=1 << 60)
    source = opened(hub)
    source._transfer._link.limits = slow
    assert code_of(lambda: source.read(SHARD, 0, 1_000_000)) == "network.timeout"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"content_range": "bytes 1-1000/3000000"}, "integrity.content-range"),
        ({"content_range": "bytes 0-999/3000001"}, "integrity.content-range"),
        ({"content_range": "bytes 0-999/*"}, "integrity.content-range"),
        ({"content_range": "bytes 0-998/3000000"}, "integrity.content-range"),
        ({"content_range": "\x1b[2J"}, "integrity.content-range"),
        ({"headers": {"Content-Range": None}}, "integrity.content-range"),
        ({"gzip": True}, "integrity.encoding"),
        ({"extra": 50}, "integrity.size"),
        ({"status": 416}, "integrity.content-range"),
        ({"status": 404}, "not-found.file"),
        ({"status": 418}, "network.status"),
        ({"headers": {"Content-Range": "bytes 0-" + "9" * 5000 + "/1"}}, "integrity.content-range"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_transfer_that_contradicts_itself(
    hub: FakeHub, model: str, fault: dict[str, Any], code: str
) -> None:
    source = opened(hub)
    hub.faults.append(on("cdn", **fault))
    assert code_of(lambda: source.read(SHARD, 0, 1_000)) == code
    assert len(hub.requests("cdn")) == 1
    # Nothing of it was kept.
    hub.faults.clear()
    assert source.read(SHARD, 0, 1_000) == DATA[:1_000]


def test_stored_file_that_changes_between_ranges(hub: FakeHub, model: str) -> None:
    source = opened(hub)
    source.read(SHARD, 0, 10)
    hub.faults.append(on("cdn", headers={"ETag": '"other"'}))
    assert code_of(lambda: source.read(SHARD, 20, 30)) == "integrity.etag"


def test_expired_link_is_signed_again(hub: FakeHub, model: str) -> None:
    source = opened(hub)
    source.read(SHARD, 0, 10)
    hub.expire_links()
    assert source.read(SHARD, 20, 30) == DATA[20:30]
    assert len(hub.requests("hub", "resolve")) == 2
    hub.faults.append(on("cdn", status=403))
    assert code_of(lambda: source.read(SHARD, 40, 50)) == "auth.refused"
    assert len(hub.requests("hub", "resolve")) == 3


def test_server_without_ranges(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("cdn", ignore_range=True))
    source = opened(hub)
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.read(SHARD, 0, 4) == DATA[:4]
    assert source.fallbacks == [SHARD]
    assert source.verified == {SHARD: "range"}
    # Once it is known, no range is asked for; nothing behind the last wanted byte is read.
    assert [one.range is None for one in hub.requests("cdn")] == [False, True, True]
    assert source.traffic.bytes < SPANS[-1][1] + 300_000
    # What was read is in the cache.
    assert opened(hub).read_spans(SHARD, SPANS) == wanted()
    assert len(hub.requests("cdn")) == 3


def test_server_without_ranges_within_the_budget(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("cdn", ignore_range=True))
    source = opened(hub, limits=Limits(whole_files=1_000_000))
    assert source.read(SHARD, 0, 400_000) == DATA[:400_000]
    assert code_of(lambda: source.read(SHARD, 500_000, 700_000)) == "limit.bytes"


def test_server_without_ranges_that_drops(hub: FakeHub, model: str) -> None:
    hub.faults += [on("cdn", ignore_range=True), on("cdn", drop_after=50_000, skip=1, times=2)]
    assert opened(hub).read_spans(SHARD, SPANS) == wanted()


def test_whole_file_as_one_range_may_come_as_200(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("cdn", ignore_range=True))
    source = opened(hub)
    assert source.read(SHARD, 0, len(DATA)) == DATA
    assert not source.fallbacks


# ------------------------------------------------------------------ patience


def test_rate_limit_beyond_the_budget(hub: FakeHub, model: str, naps: list[float]) -> None:
    hub.faults.append(on("hub", status=429, headers={"Retry-After": "100000000"}))
    began = time.monotonic()
    assert code_of(lambda: opened(hub)) == "rate-limit"
    assert len(hub.log) == 1
    assert naps == []
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "30"},
        {"RateLimit": '"api";r=0;t=29', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
    ],
)
def test_rate_limit_is_waited_for_and_told(
    hub: FakeHub, model: str, naps: list[float], headers: dict[str, str]
) -> None:
    hub.faults.append(on("hub", times=2, status=429, headers=headers))
    told: list[str] = []
    opened(hub, notify=told.append)
    assert naps == [30, 30]
    assert [line.split(":")[0] for line in told] == ["waiting 30 s"] * 2


def test_waits_add_up_to_the_budget(hub: FakeHub, model: str, naps: list[float]) -> None:
    hub.faults.append(on("hub", status=503, headers={"Retry-After": "50"}))
    assert code_of(lambda: opened(hub)) == "rate-limit"
    assert naps == [50, 50]


@pytest.mark.parametrize(
    "value", ["soon", "-5", "9" * 5000, "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Foo 2015"]
)
def test_odd_retry_after(hub: FakeHub, model: str, value: str) -> None:
    hub.faults.append(on("hub", times=1, status=503, headers={"Retry-After": value}))
    if value.startswith("9"):
        assert code_of(lambda: opened(hub)) == "rate-limit"
    else:
        assert opened(hub).commit == model


def test_server_that_never_answers(hub: FakeHub, model: str, naps: list[float]) -> None:
    hub.faults.append(on("hub", delay=60))
    began = time.monotonic()
    source_limits = Limits(connect=1, read=0.2, tries=3)
    assert code_of(lambda: opened(hub, limits=source_limits)) == "network.timeout"
    assert time.monotonic() - began < 5
    assert len(hub.log) == 3


def test_server_that_is_not_there(naps: list[float]) -> None:
    with socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        port = idle.getsockname()[1]
    ref = parse_ref("hf://org/model")
    assert code_of(lambda: open_hub(ref, endpoint=f"http://127.0.0.1:{port}")) == (
        "network.connection"
    )
    assert code_of(lambda: open_hub(ref, endpoint="http://no.such.host.invalid")) == "network.dns"


def test_server_without_a_trusted_certificate(hub: FakeHub) -> None:
    ref = parse_ref("hf://org/model")
    secure = hub.url.replace("http://", "https://")
    assert code_of(lambda: open_hub(ref, endpoint=secure)) == "network.tls"


@pytest.mark.parametrize("endpoint", ["ftp://x", "huggingface.co", "http://", "http://[::1"])
def test_endpoint_that_is_no_address(endpoint: str) -> None:
    assert code_of(lambda: open_hub(parse_ref("hf://org/model"), endpoint=endpoint)) == (
        "usage.endpoint"
    )


# ------------------------------------------------------------------ who may read


def test_missing_repository_revision_and_file(hub: FakeHub, model: str) -> None:
    assert code_of(lambda: opened(hub, "org/none")) == "not-found.repo"
    assert code_of(lambda: opened(hub, "org/model@none")) == "not-found.revision"
    assert code_of(lambda: opened(hub, "org/model@" + "c" * 40)) == "not-found.revision"
    source = opened(hub)
    assert code_of(lambda: source.read("none", 0, 1)) == "not-found.file"
    assert code_of(lambda: source.read_small("none", 1)) == "not-found.file"


def test_private_repository(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/secret", {SHARD: DATA}, private=True)
    with pytest.raises(NotFoundError, match="or it is private"):
        opened(hub, "org/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert code_of(lambda: opened(hub, "org/secret")) == "auth.token"
    hub.tokens.add(TOKEN)
    source = opened(hub, "org/secret")
    assert source.private
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert code_of(lambda: opened(hub, "org/none")) == "not-found.repo"


def test_gated_repository(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", {SHARD: DATA, "config.json": b"{}"}, gated="manual")
    source = opened(hub, "org/gated")
    for action in (lambda: source.read(SHARD, 0, 9), lambda: source.read_small("config.json", 9)):
        assert code_of(action) == "auth.gated"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens.add(TOKEN)
    refused = opened(hub, "org/gated")
    with pytest.raises(AuthError, match="ask for access at"):
        refused.read(SHARD, 0, 9)
    hub.granted.add("org/gated")
    assert opened(hub, "org/gated").read(SHARD, 0, 9) == DATA[:9]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"status": 401}, "not-found.repo"),
        ({"status": 403, "headers": {"X-Error-Message": "no\x9b"}}, "auth.refused"),
        ({"status": 404}, "not-found.repo"),
        (
            {"status": 403, "headers": {"X-Error-Message": "Access to this resource is disabled."}},
            "auth.disabled",
        ),
        ({"status": 451}, "auth.disabled"),
        ({"status": 400}, "network.status"),
        ({"status": 204}, "network.status"),
        ({"status": 304}, "network.status"),
    ],
    ids=str,
)
def test_refusals_of_the_api(hub: FakeHub, model: str, fault: dict[str, Any], code: str) -> None:
    hub.faults.append(on("hub", **fault))
    assert code_of(lambda: opened(hub)) == code


def test_renamed_repository(hub: FakeHub, model: str) -> None:
    hub.rename("org/model", "new/home")
    source = opened(hub)
    assert (source.name, source.id) == ("org/model", "new/home")
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.read_small("config.json", 100) == b'{"a": 1}'
    hub.log.clear()
    other = opened(hub, "new/home")
    assert other.name == other.id


@pytest.mark.parametrize("token", ["with\nnewline", "with ümlaut"])
def test_token_that_is_none(hub: FakeHub, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(AuthError) as caught:
        opened(hub)
    assert token not in str(caught.value)
    assert not hub.log


def test_token_switched_off(hub: FakeHub, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    opened(hub)
    assert all(one.auth is None for one in hub.log)


# ------------------------------------------------------------------ answers that make no sense


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Please log in</html>",
        b"{}",
        b"[]",
        b"null",
        b"",
        b'{"id": 5, "sha": "x"}',
        b'{"id": "org", "sha": "' + b"a" * 40 + b'"}',
        b'{"id": "../../x", "sha": "' + b"a" * 40 + b'"}',
        b'{"id": "a/../b", "sha": "' + b"a" * 40 + b'"}',
        b"[" * 100_000,
        b'{"id": ' + b"9" * 5_000 + b"}",
        b"\xff\xfe",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_captive_portals_and_other_nonsense(hub: FakeHub, model: str, body: bytes) -> None:
    hub.faults.append(on("hub", body=body))
    assert code_of(lambda: opened(hub)) == "network.answer"


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"path": "../x"}, "integrity.path"),
        ({"path": "/etc/passwd"}, "integrity.path"),
        ({"path": "a//b"}, "integrity.path"),
        ({"path": ""}, "integrity.path"),
        ({"path": "a\0"}, "integrity.path"),
        ({"path": 5}, "network.answer"),
        ({"size": -1}, "integrity.size"),
        ({"size": True}, "integrity.size"),
        ({"size": 1e300}, "integrity.size"),
        ({"size": None}, "integrity.size"),
        ({"oid": "../../x"}, "integrity.etag"),
        ({"oid": ["a"]}, "integrity.etag"),
        ({"lfs": {"oid": "../../x", "size": 5}}, "integrity.etag"),
        ({"lfs": {"oid": "a" * 64, "size": 6}}, "integrity.size"),
        ({"lfs": []}, "integrity.etag"),
        ({"lfs": 7}, "integrity.etag"),
    ],
    ids=str,
)
def test_listing_that_makes_no_sense(
    hub: FakeHub, model: str, entry: dict[str, Any], code: str
) -> None:
    sound = {"type": "file", "path": "x", "size": 5, "oid": "a" * 40}
    hub.faults.append(on("hub", match="/tree/", body=json.dumps([{**sound, **entry}]).encode()))
    assert code_of(lambda: opened(hub)) == code
    hub.faults[:] = [on("hub", match="/tree/", body=json.dumps([sound, sound]).encode())]
    assert code_of(lambda: opened(hub)) == "integrity.listing"
    hub.faults[:] = [on("hub", match="/tree/", body=json.dumps([sound]).encode())]
    assert list(opened(hub).files) == ["x"]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"X-Repo-Commit": None}, "network.answer"),
        ({"X-Repo-Commit": "../../x"}, "integrity.commit"),
        ({"X-Repo-Commit": "d" * 40}, "integrity.commit"),
        ({"X-Linked-Etag": '"../../x"'}, "integrity.etag"),
        ({"X-Linked-Etag": '"' + "e" * 64 + '"'}, "integrity.etag"),
        ({"X-Linked-Etag": None, "ETag": None}, "integrity.etag"),
        ({"X-Linked-Size": "2999999"}, "integrity.size"),
        ({"X-Linked-Size": "many"}, "integrity.size"),
        ({"X-Linked-Size": "²"}, "integrity.size"),
    ],
    ids=str,
)
def test_metadata_that_contradicts_the_listing(
    hub: FakeHub, model: str, headers: dict[str, str | None], code: str, tmp_path: Path
) -> None:
    source = opened(hub)
    hub.faults.append(on("hub", match="/resolve/", headers=headers))
    before = sorted(tmp_path.rglob("*"))
    assert code_of(lambda: source.read(SHARD, 0, 10)) == code
    assert not any(one.method == "GET" for one in hub.requests("cdn"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("sha", ["main", "../../x", "A" * 40, "a" * 39, 7, None])
def test_commit_that_is_none(hub: FakeHub, model: str, sha: object) -> None:
    info = {"id": "org/model", "sha": sha}
    hub.faults.append(on("hub", match="^/api/models", body=json.dumps(info).encode()))
    assert code_of(lambda: opened(hub)) == "integrity.commit"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"body": b"{}"}, "network.answer"),
        ({"body": b"[5]"}, "network.answer"),
        ({"headers": {"Link": '<http://[::1>; rel="next"'}}, "network.answer"),
        ({"headers": {"Content-Encoding": "gzip"}}, "network.connection"),
    ],
    ids=str,
)
def test_listing_that_is_none(
    hub: FakeHub, model: str, fault: dict[str, Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.append(on("hub", match="/tree/", **fault))
    assert code_of(lambda: opened(hub)) == code
    hub.faults.clear()
    monkeypatch.setattr(listing, "MAX_FILES", 2)
    assert code_of(lambda: opened(hub)) == "limit.files"


def test_redirect_without_the_size(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("hub", match="/resolve/", headers={"X-Linked-Size": None}))
    assert opened(hub).read(SHARD, 0, 10) == DATA[:10]


def test_answer_that_never_ends(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("hub", body=b" " * 3_000_000))
    assert code_of(lambda: opened(hub, limits=Limits(listing=1_000_000))) == "limit.listing"


def test_small_file_with_other_bytes(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("hub", match="resolve-cache", times=1, garble=True))
    source = opened(hub)
    assert code_of(lambda: source.read_small("config.json", 100)) == "integrity.sha1"
    assert source.read_small("config.json", 100) == b'{"a": 1}'
    hub.faults.append(on("cdn", times=1, garble=True))
    assert code_of(lambda: source.read_small(SHARD, len(DATA))) == "integrity.sha256"
    assert code_of(lambda: source.read_small(SHARD, len(DATA) - 1)) == "limit.file-size"
    hub.faults[:] = [on("hub", match="resolve-cache", extra=1)]
    assert code_of(lambda: source.read_small("README.md", 100)) == "integrity.size"


def test_span_behind_the_end(hub: FakeHub, model: str) -> None:
    source = opened(hub)
    with pytest.raises(FormatError, match="truncated"):
        source.read(SHARD, 0, len(DATA) + 1)
    with pytest.raises(ValueError, match="no span"):
        source.read(SHARD, 5, 4)


def test_pointer_instead_of_weights(hub: FakeHub) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64
    hub.add("org/pointer", {"model.data": pointer, SHARD: pointer})
    source = opened(hub, "org/pointer")
    assert code_of(lambda: source.read("model.data", 0, 100)) == "format.lfs-pointer"
    assert code_of(lambda: source.read_small(SHARD, 1_000)) == "format.lfs-pointer"


# ------------------------------------------------------------------ the token stays at home


@pytest.fixture
def token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens.add(TOKEN)
    return TOKEN


def test_token_goes_to_the_hub_only(hub: FakeHub, model: str, token: str) -> None:
    told: list[str] = []
    source = opened(hub, notify=told.append)
    source.read_spans(SHARD, SPANS)
    source.read_small("config.json", 100)
    assert all(one.auth == f"Bearer {TOKEN}" for one in hub.requests("hub"))
    assert hub.requests("cdn")
    assert all(one.auth is None for one in hub.requests("cdn"))
    assert ["HF_ENDPOINT" in line for line in told] == [True]
    assert not any(TOKEN in line for line in told)


def test_redirect_to_a_foreign_server(hub: FakeHub, model: str, token: str) -> None:
    away = {"Location": f"{hub.evil_url}/x"}
    hub.faults.append(on("hub", match="^/api/models", status=307, headers=away))
    assert code_of(lambda: opened(hub)) == "network.answer"
    assert hub.requests("evil")
    assert all(one.auth is None for one in hub.requests("evil"))


def test_next_page_at_a_foreign_server(hub: FakeHub, model: str, token: str) -> None:
    link = {"Link": f'<{hub.evil_url}/api/models/x>; rel="next"'}
    hub.faults.append(on("hub", match="/tree/", headers=link))
    assert code_of(lambda: opened(hub)) == "network.answer"
    assert not hub.requests("evil")
    # The client's own listing goes there: without the guard with the token, with it without.
    api = HfApi(endpoint=hub.url)
    list(api.list_repo_tree("org/model", recursive=True))
    assert hub.requests("evil")[-1].auth == f"Bearer {TOKEN}"
    with guarded_client(hub.url):
        list(api.list_repo_tree("org/model", recursive=True))
    assert hub.requests("evil")[-1].auth is None
    assert len(hub.requests("evil")) == 2


def test_xet_route_at_a_foreign_server(hub: FakeHub, model: str, token: str) -> None:
    from huggingface_hub.utils._xet import _fetch_xet_connection_info_with_url  # the client's own

    headers = {"authorization": f"Bearer {TOKEN}"}
    with guarded_client(hub.url), pytest.raises(ValueError, match=r"[Xx]et"):
        _fetch_xet_connection_info_with_url(f"{hub.evil_url}/token", headers)
    assert [one.auth for one in hub.requests("evil")] == [None]


def test_listing_in_pages(hub: FakeHub) -> None:
    names = {f"part/{n:03}.json": b"{}" for n in range(25)}
    hub.page_size = 4
    hub.add("org/many", names)
    assert sorted(opened(hub, "org/many").files) == sorted(names)
    assert len(hub.requests("hub", "/tree/")) == 7
    link = f'<{hub.url}/api/models/org/many/tree/main?recursive=true>; rel="next"'
    hub.faults.append(on("hub", match="/tree/", body=b"[]", headers={"Link": link}))
    assert code_of(lambda: opened(hub, "org/many")) == "network.answer"


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://[::ffff:169.254.169.254]/",
        "http://[fe80::1]/",
        "http://metadata.google.internal/",
        "http://100.100.100.200/",
        "http://0.0.0.0/",
        "/x",
        "",
        "http://[::1",
    ],
)
@pytest.mark.parametrize("where", ["api", "resolve"])
def test_redirect_to_where_nobody_goes(hub: FakeHub, model: str, location: str, where: str) -> None:
    source = opened(hub)
    redirect = on("hub", match=where, status=302, headers={"Location": location})
    loop = on("hub", match="^/x", status=302, headers={"Location": location})
    hub.faults += [redirect, loop]
    hub.log.clear()
    action = (lambda: opened(hub)) if where == "api" else (lambda: source.read(SHARD, 0, 5))
    assert code_of(action).startswith("network.")
    assert len(hub.log) <= 30


def test_redirects_are_counted(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("hub", status=302, headers={"Location": "/again"}))
    assert code_of(lambda: opened(hub)) == "network.redirect"
    assert len(hub.log) == 6
    with guarded_client(hub.url), pytest.raises(guard.http().TooManyRedirects):
        get_session().get(f"{hub.url}/again")
    assert len(hub.log) == 12


def request_to(url: str, endpoint: str) -> None:
    http = guard.http()
    request = http.Request("GET", url, headers={"authorization": "Bearer x"})
    with guarded_client(endpoint):
        guard._check_target(request)
    assert ("authorization" in request.headers) == url.startswith(endpoint)


@pytest.mark.parametrize(
    "url",
    ["http://cdn.example/x", "http://hub.example/x", "https://127.0.0.1/", "https://localhost/x"],
)
def test_downgrade_and_loopback_are_refused(url: str) -> None:
    with pytest.raises(NetworkError):
        request_to(url, "https://hub.example")
    request_to("https://cdn.example/x", "https://hub.example")
    request_to("https://hub.example/x", "https://hub.example")
    request_to("https://hub.example:444/x", "https://hub.example/")


def test_redirect_from_https_to_http_is_refused() -> None:
    http = guard.http()
    client = http.Client(
        transport=http.MockTransport(
            lambda request: http.Response(302, headers={"location": "http://cdn.example/x"})
        ),
        follow_redirects=True,
    )
    with guard._guard(client, Limits()) as guarded, guarded_client("http://hub.example"):
        with pytest.raises(NetworkError, match="https"):
            guarded.get("https://storage.example/x", follow_redirects=True)
        with pytest.raises(http.TooManyRedirects):
            guarded.get("http://storage.example/x", follow_redirects=True)


def test_guard_is_put_back(hub: FakeHub, model: str) -> None:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http as internals

    made: list[Any] = []

    def factory() -> Any:
        made.append(internals.default_client_factory())
        return made[-1]

    set_client_factory(factory)
    try:
        with guarded_client(hub.url), guarded_client(hub.url):
            opened(hub).read(SHARD, 0, 5)
            client = get_session()
            assert client is made[-1]
            assert client.max_redirects == guard.MAX_REDIRECTS
            # The client's own offline hook still stands before ours.
            constants.HF_HUB_OFFLINE = True
            with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
                client.get(hub.url)
            constants.HF_HUB_OFFLINE = False
        assert internals._GLOBAL_CLIENT_FACTORY is factory
        assert get_session().max_redirects != guard.MAX_REDIRECTS
        # What a factory hands out for ever is not guarded for ever.
        request = client.build_request("GET", "http://x", headers={"authorization": "Bearer x"})
        client.event_hooks["request"][-1](request)
        assert "authorization" in request.headers
        with pytest.raises(RuntimeError), guarded_client(hub.url):
            raise RuntimeError
        assert internals._GLOBAL_CLIENT_FACTORY is factory
    finally:
        set_client_factory(internals.default_client_factory)


def test_guard_makes_every_timeout_finite(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("hub", delay=60))
    began = time.monotonic()
    with (
        guarded_client(hub.url, limits=Limits(connect=1, read=0.2)),
        pytest.raises(guard.http().TimeoutException),
    ):
        HfApi(endpoint=hub.url).model_info("org/model")
    assert time.monotonic() - began < 5


def test_real_client_understands_this_hub(hub: FakeHub, model: str, token: str) -> None:
    api = HfApi(endpoint=hub.url)
    with guarded_client(hub.url):
        info = api.model_info("org/model", files_metadata=True)
        assert info.sha == model
        assert {one.rfilename for one in info.siblings or ()} == {"config.json", SHARD, "README.md"}
        assert [one.path for one in api.get_paths_info("org/model", [SHARD, "none"])] == [SHARD]
        assert api.list_repo_refs("org/model").branches[0].target_commit == model
        for name in (SHARD, "config.json"):
            hf_hub_download("org/model", name, endpoint=hub.url)
        with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
            hf_hub_download("org/model", "none", endpoint=hub.url)
    assert all(one.auth is None for one in hub.requests("cdn"))


# ------------------------------------------------------------------ caches


def test_cached_shard_costs_no_byte(hub: FakeHub, model: str) -> None:
    hf_hub_download("org/model", SHARD, endpoint=hub.url)
    hf_hub_download("org/model", "config.json", endpoint=hub.url)
    hub.log.clear()
    source = opened(hub)
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.read_small("config.json", 10) == b'{"a": 1}'
    assert hub.wire("cdn") == 0
    assert not hub.requests("hub", "resolve")
    assert source.verified == {SHARD: "full", "config.json": "full"}
    assert source.traffic.from_cache == NEEDED + 8


def test_cached_shard_is_hashed_once(
    hub: FakeHub, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hf_hub_download("org/model", SHARD, endpoint=hub.url)
    opened(hub).read(SHARD, 0, 10)
    again = opened(hub)
    monkeypatch.setattr(again._copies, "_pieces", None)
    assert again.read(SHARD, 0, 10) == DATA[:10]
    # Control: a file that was touched is hashed again.
    os.utime(path)
    with pytest.raises(TypeError):
        again.read(SHARD, 0, 10)


def test_damaged_shard_in_the_standard_cache(hub: FakeHub, model: str) -> None:
    path = Path(hf_hub_download("org/model", SHARD, endpoint=hub.url)).resolve()
    path.write_bytes(b"\0" * len(DATA))
    told: list[str] = []
    source = opened(hub, notify=told.append)
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.verified == {SHARD: "range"}
    assert "damaged" in told[0]
    path.write_bytes(b"short")
    assert opened(hub).read_spans(SHARD, SPANS) == wanted()


def ranges_kept(tmp_path: Path) -> list[Path]:
    return [
        path for path in (tmp_path / "xdg/projaudit").glob("ranges@*/*/*/*-*") if path.is_file()
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "folder"])
def test_damaged_range_is_fetched_again(
    hub: FakeHub, model: str, tmp_path: Path, damage: str
) -> None:
    opened(hub).read(SHARD, 0, 1_000)
    (kept,) = ranges_kept(tmp_path)
    held = bytearray(kept.read_bytes())
    assert bytes(held[32:]) == DATA[:1_000]
    held[500] ^= 1
    kept.unlink()
    match damage:
        case "folder":
            kept.mkdir()
        case "flip":
            kept.write_bytes(held)
        case "cut":
            kept.write_bytes(held[:-1])
        case "longer":
            kept.write_bytes(bytes(held) + b"x")
        case "empty":
            kept.write_bytes(b"")
    hub.log.clear()
    source = opened(hub)
    assert source.read(SHARD, 0, 1_000) == DATA[:1_000]
    assert source.traffic.from_cache == 0
    assert hub.wire("cdn") == 1_000
    if damage != "folder":
        hub.log.clear()
        assert opened(hub).read(SHARD, 0, 1_000) == DATA[:1_000]
        assert hub.wire("cdn") == 0


@pytest.mark.parametrize("root", ["file", "missing"])
@pytest.mark.parametrize("verify", ["range", "full"])
def test_cache_that_cannot_be_written(
    hub: FakeHub,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    root: str,
    verify: str,
) -> None:
    blocked = tmp_path / "blocked"
    if root == "file":
        blocked.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked / "x") if root == "file" else "/proc/none")
    source = opened(hub, verify=verify)
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.read_small("config.json", 10) == b'{"a": 1}'
    scratch = source._copies.scratch
    assert (scratch is not None) == (verify == "full")
    del source
    assert scratch is None or not scratch.exists()


def test_disk_that_fills_up(
    hub: FakeHub, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert opened(hub).read_spans(SHARD, SPANS) == wanted()
    assert not [path for path in (tmp_path / "xdg").rglob("*") if path.is_file()]
    source = opened(hub, verify="full")
    assert code_of(lambda: source.read(SHARD, 0, 10)) == "limit.disk"
    assert not [path for path in (tmp_path / "xdg").rglob("*") if path.is_file()]


def test_mirror_cannot_fill_the_cache_of_another(
    hub: FakeHub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub(tmp_path / "mirror") as mirror:
        mirror.add("org/model", {SHARD: DATA})
        mirror.faults.append(on("cdn", garble=True))
        lied = opened(mirror)
        assert lied.read(SHARD, 0, 100) != DATA[:100]
        source = opened(hub)
        assert source.files[SHARD].sha256 == lied.files[SHARD].sha256
        assert source.read(SHARD, 0, 100) == DATA[:100]
        # A whole file proves itself, whoever sent it.
        mirror.faults.clear()
        opened(mirror, verify="full").read(SHARD, 0, 100)
    hub.log.clear()
    assert opened(hub).read(SHARD, 5_000, 6_000) == DATA[5_000:6_000]
    assert hub.wire("cdn") == 0
    own = open_cache("https://huggingface.co")
    assert own.ranges == "ranges"
    assert own.root == tmp_path / "xdg/projaudit"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache/projaudit"

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    cache = Cache(cache_root())
    cache.keep("a" * 64, (0, 1), b"x")
    assert cache.spans("a" * 64) == []


# ------------------------------------------------------------------ offline


def test_offline_end_to_end(hub: FakeHub, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    online = opened(hub)
    online.read_spans(SHARD, SPANS)
    online.read_small("config.json", 100)
    hub.log.clear()
    hub.faults.append(on(status=500))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("org/model", "org/model@main", f"org/model@{model}"):
        source = opened(hub, name)
        assert (source.commit, source.from_cache, source.complete) == (model, True, True)
        assert source.files == online.files
        assert source.read_spans(SHARD, SPANS) == wanted()
        assert source.read_small("config.json", 100) == b'{"a": 1}'
        assert source.traffic.requests == 0
    assert code_of(lambda: source.read(SHARD, 2_000_000, 2_000_001)) == "offline.not-cached"
    with pytest.raises(OfflineError, match=r"org/model/README\.md"):
        source.read_small("README.md", 100)
    assert code_of(lambda: source.read_small("none", 100)) == "not-found.file"
    assert code_of(lambda: opened(hub, "org/other")) == "offline.not-cached"
    assert code_of(lambda: opened(hub, "org/model@other")) == "offline.not-cached"
    assert not hub.log


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "argument"])
def test_offline_switches(
    hub: FakeHub, model: str, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    if switch != "argument":
        monkeypatch.setenv(switch, "1")
    assert code_of(lambda: opened(hub, offline=switch == "argument")) == "offline.not-cached"
    assert not hub.log


def test_offline_from_the_standard_cache_alone(hub: FakeHub, model: str) -> None:
    hf_hub_download("org/model", SHARD, endpoint=hub.url)
    hf_hub_download("org/model", "config.json", endpoint=hub.url)
    hub.log.clear()
    source = opened(hub, offline=True)
    assert (source.commit, source.complete) == (model, False)
    assert sorted(source.files) == ["config.json", SHARD]
    assert source.files[SHARD].sha256 == hashlib.sha256(DATA).hexdigest()
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.read_small("config.json", 100) == b'{"a": 1}'
    assert source.verified == {SHARD: "full", "config.json": "full"}
    assert code_of(lambda: source.read_small("README.md", 100)) == "offline.not-cached"
    assert not hub.log


def test_offline_snapshot_without_digests(hub: FakeHub, model: str) -> None:
    path = Path(hf_hub_download("org/model", SHARD, endpoint=hub.url))
    path.unlink()
    path.write_bytes(DATA)  # as on systems without symbolic links
    source = opened(hub, offline=True)
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.verified == {SHARD: "unverified"}
    path.write_bytes(b"x" * len(DATA))
    online = opened(hub)
    assert online.read_spans(SHARD, SPANS) == wanted()


def test_offline_takes_the_later_knowledge_of_a_branch(hub: FakeHub, model: str) -> None:
    opened(hub)
    later = hub.add("org/model", {SHARD: DATA[::-1]})
    hf_hub_download("org/model", SHARD, endpoint=hub.url)
    source = opened(hub, offline=True)
    assert source.commit == later
    assert source.read(SHARD, 0, 9) == DATA[::-1][:9]


def test_offline_knows_the_commit_and_not_its_files(
    hub: FakeHub, model: str, tmp_path: Path
) -> None:
    assert code_of(lambda: opened(hub, f"org/model@{model}", offline=True)) == "offline.not-cached"


def test_small_file_with_other_bytes_in_the_range_cache(hub: FakeHub, model: str) -> None:
    hub.faults.append(on("hub", match="resolve-cache", method="GET", garble=True))
    source = opened(hub)
    assert source.read("README.md", 0, 2) != b"hi"
    hub.faults.clear()
    assert opened(hub).read_small("README.md", 9) == b"hi"
    assert opened(hub).read("README.md", 0, 2) == b"hi"


def test_what_is_at_hand(hub: FakeHub, model: str) -> None:
    source = opened(hub)
    source.read(SHARD, 0, 10)
    assert not source.at_hand(SHARD)
    hf_hub_download("org/model", SHARD, endpoint=hub.url)
    assert source.at_hand(SHARD)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": []}', '{"key": ["x"], "files": 5}'])
def test_offline_with_a_damaged_record(hub: FakeHub, model: str, tmp_path: Path, text: str) -> None:
    opened(hub)
    records = list((tmp_path / "xdg/projaudit/repos").iterdir())
    assert len(records) == 2
    for record in records:
        record.write_text(text)
    assert code_of(lambda: opened(hub, offline=True)) == "offline.not-cached"


def test_online_never_falls_back_to_the_cache(hub: FakeHub, model: str) -> None:
    opened(hub).read_spans(SHARD, SPANS)
    hub.repos["org/model"].private = True
    assert code_of(lambda: opened(hub)) == "not-found.repo"
    hub.faults.append(on("hub", status=500))
    assert code_of(lambda: opened(hub)) == "network.server"


# ------------------------------------------------------------------ whole files


def test_full_verification(hub: FakeHub, model: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    source = opened(hub, verify="full", progress=lambda *now: seen.append(now))
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.verified == {SHARD: "full"}
    assert hub.wire("cdn") == len(DATA)
    assert (SHARD, len(DATA), len(DATA)) in seen
    hub.log.clear()
    again = opened(hub, verify="full")
    assert again.read_spans(SHARD, SPANS) == wanted()
    assert hub.wire("cdn") == 0
    offline = opened(hub, verify="full", offline=True)
    assert offline.read_spans(SHARD, SPANS) == wanted()
    assert offline.verified == {SHARD: "full"}


@pytest.mark.parametrize("ranges", [True, False])
def test_full_verification_finds_other_bytes(
    hub: FakeHub, model: str, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("projaudit.hub.source.BLOCK", 1 << 20)
    hub.faults.append(on("cdn", garble=True, ignore_range=not ranges))
    source = opened(hub, verify="full")
    assert code_of(lambda: source.read_spans(SHARD, SPANS)) == "integrity.sha256"
    assert not list((tmp_path / "xdg").rglob("files/**/*.*"))
    # Control: a range carries no digest, and the report says so.
    ranged = opened(hub)
    assert ranged.read_spans(SHARD, SPANS) != wanted()
    assert ranged.verified == {SHARD: "range"}
    hub.faults[:] = [on("cdn", ignore_range=not ranges), on("cdn", times=2, drop_after=300_000)]
    assert source.read_spans(SHARD, SPANS) == wanted()
    assert source.verified == {SHARD: "full"}
    assert source.fallbacks == ([] if ranges else [SHARD])


def test_full_verification_does_not_settle_for_ranges_offline(hub: FakeHub, model: str) -> None:
    opened(hub).read_spans(SHARD, SPANS)
    source = opened(hub, verify="full", offline=True)
    assert code_of(lambda: source.read_spans(SHARD, SPANS)) == "offline.not-cached"
    assert opened(hub, offline=True).read_spans(SHARD, SPANS) == wanted()


# ------------------------------------------------------------------ the rest


def test_import_stays_light() -> None:
    script = "import projaudit.hub, sys; print('huggingface_hub' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_environment_for_a_subprocess(hub: FakeHub, model: str) -> None:
    script = (
        "from projaudit.hub import open_hub; from projaudit.refs import parse_ref\n"
        "source = open_hub(parse_ref('hf://org/model'))\n"
        f"print(source.commit, len(source.read('{SHARD}', 0, 1000)))"
    )
    for offline in (False, True):
        hub.log.clear()
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=hub.env(token=None, offline=offline),
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        )
        assert done.stdout == f"{model} 1000\n"
        assert done.stderr == ""
        assert bool(hub.log) != offline
    assert stat.S_ISDIR((hub.root / "xdg-cache/projaudit").stat().st_mode)


def test_every_fault_at_every_request_ends_in_an_error_of_ours(
    hub: FakeHub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[dict[str, Any]] = [
        {"status": 401},
        {"status": 403},
        {"status": 404},
        {"status": 429},
        {"status": 500},
        {"status": 200, "body": b"<html>"},
        {"drop_after": 1},
        {"truncate": 1},
        {"gzip": True},
        {"garble": True},
        {"extra": 3},
        {"content_range": "bytes 5-6/7"},
        {"ignore_range": True},
        {"headers": {"X-Repo-Commit": "../x", "ETag": "../x", "X-Linked-Etag": "../x"}},
        {"headers": {"Location": "http://169.254.169.254/"}},
    ]

    def work() -> bool:
        source = opened(hub)
        head = source.read(SHARD, 0, 100)
        body = source.read(SHARD, 100, 9_000)
        return head + body == DATA[:9_000] and source.read_small("config.json", 99) == b'{"a": 1}'

    hub.log.clear()
    assert work()
    outcomes: dict[str, int] = {}
    for number in range(len(hub.log)):
        for index, fault in enumerate(faults):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"xdg-{number}-{index}"))
            hub.faults[:] = [on(skip=number, **fault)]
            try:
                with guarded_client(hub.url):
                    sound = work()
            except ProjauditError as error:
                outcomes[error.code] = error.exit_code
            else:
                # Only wrong bytes inside a range go unnoticed; the source says "range" of them.
                assert sound or "garble" in fault
    assert len(outcomes) > 8
    assert set(outcomes.values()) == {2}
