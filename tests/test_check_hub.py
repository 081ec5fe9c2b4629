"""`check` against a Hub: the real client, a local server, and what a user would see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakehub import FakeHub, on
from ggufs import mmproj, write
from huggingface_hub import close_session, constants
from models import CONFIG, llava, save, tuned
from safetensors.torch import save_file

import projaudit
from projaudit.findings import Verdict

BASE = llava(d=192, h=256, out=256)
TUNED = tuned(BASE, 0.05)
PROJECTOR = 2 * sum(t.numel() for n, t in BASE.items() if "projector" in n)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with org/base and org/tuned, and a client that knows no other."""
    for name in list(os.environ):
        if name.startswith(("HF_", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("projaudit.hub.link.sleep", lambda seconds: None)
    close_session()
    with FakeHub(tmp_path) as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        publish(server, tmp_path, "org/base", BASE)
        yield server
        close_session()


def publish(hub: FakeHub, tmp_path: Path, repo: str, tensors, *, card: str = "", **kw) -> str:
    folder = save(tmp_path / "repos" / repo, tensors, dtype=torch.bfloat16, card=card)
    for path, text in kw.pop("files", {}).items():
        (folder / path).write_text(text)
    return hub.add(repo, folder, **kw)


def card(*bases: str) -> str:
    listed = "".join(f"\n- {base}" for base in bases)
    return f"---\nbase_model:{listed}\n---\n# a model\n"


def rules_of(report: projaudit.Report) -> set[str]:
    return {f.rule for f in report.findings}


@pytest.mark.parametrize(
    "reference",
    ["org/tuned", "org/tuned@main", "hf://org/tuned@{sha}", "https://huggingface.co/org/tuned/tree/main"],
)  # fmt: skip
def test_every_form_of_reference_is_pinned(hub: FakeHub, tmp_path: Path, reference: str):
    sha = publish(hub, tmp_path, "org/tuned", TUNED)
    report = projaudit.check(reference.format(sha=sha), "org/base", seed=1)
    assert report.verdict is Verdict.PASS
    assert report.target.commit == sha
    assert report.base is not None
    assert len(report.base.commit or "") == 40
    asked = [r.path for r in hub.requests("hub", "/resolve/")]
    assert asked
    assert all(sha in path or (report.base.commit or "") in path for path in asked)


def test_only_the_projector_crosses_the_wire(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED)
    report = projaudit.check("org/tuned", "org/base", seed=1)
    shards = sum(f.stat().st_size for f in (tmp_path / "repos").rglob("*.safetensors"))
    headers = 2 * (64 << 10)
    assert hub.wire("cdn") <= 1.05 * 2 * PROJECTOR + headers
    assert hub.wire("cdn") < 0.6 * shards
    assert report.run.wire_bytes == hub.wire()
    assert report.run.requests == len(hub.requests())


def test_of_a_pickle_only_the_projector_crosses_the_wire_too(hub: FakeHub, tmp_path: Path):
    """40 MB of torch zip: its directory, its pickle and the projector's storages are read."""
    content = {name: tensor.bfloat16() for name, tensor in TUNED.items()}
    content["language_model.model.layers.1.mlp.up_proj.weight"] = torch.zeros(20_000_000).bfloat16()
    folder = save(tmp_path / "pickled", TUNED)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    hub.add("org/pickled", folder)
    twin = publish(hub, tmp_path, "org/tuned", TUNED)
    report = projaudit.check("org/pickled", "org/base", seed=1)
    assert (folder / "pytorch_model.bin").stat().st_size > 40_000_000
    assert hub.wire("cdn") <= 1.05 * 2 * PROJECTOR + 4 * (64 << 10)
    assert len(hub.requests("cdn")) < 25
    other = projaudit.check(f"org/tuned@{twin}", "org/base", seed=1)
    shown = [[m for m in r.measurements if m.subject != "checkpoint"] for r in (report, other)]
    assert shown[0] == shown[1]
    assert report.verdict is other.verdict is Verdict.PASS


def test_the_second_run_needs_no_weights_and_offline_needs_no_hub(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/base"))
    first = projaudit.check("org/tuned", seed=1)
    before = hub.wire("cdn")
    again = projaudit.check("org/tuned", seed=1)
    assert hub.wire("cdn") == before
    count = len(hub.requests())
    offline = projaudit.check("org/tuned", seed=1, offline=True)
    assert len(hub.requests()) == count
    assert offline.target.from_cache
    assert first.measurements == again.measurements == offline.measurements
    assert first.verdict is again.verdict is offline.verdict


def test_offline_without_a_cache(hub: FakeHub):
    with pytest.raises(projaudit.ProjauditError) as raised:
        projaudit.check("org/base", "org/base", offline=True)
    assert (raised.value.code, raised.value.exit_code) == ("offline.not-cached", 2)
    assert hub.requests() == []


# --- the base -------------------------------------------------------------------------------------


def test_a_claimed_base_is_followed_and_said_to_be_a_claim(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/base"))
    report = projaudit.check("org/tuned", seed=1)
    assert report.provenance is not None
    assert not report.provenance.verified
    assert rules_of(report) >= {"base-unverified"}
    assert report.verdict is Verdict.REVIEW
    assert report.exit_code == 0
    assert projaudit.check("org/tuned", policy="default", seed=1).exit_code == 3


def test_a_pinned_base_is_verified(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/evil"))
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: structure\npins: {org/tuned: org/base}\n")
    report = projaudit.check("org/tuned", policy=policy, seed=1)
    assert report.provenance is not None
    assert (report.provenance.source, report.provenance.verified) == ("policy", True)
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("pinned", ["org/tuned", "New/Home"])
def test_a_pin_holds_under_the_old_and_the_new_name(hub: FakeHub, tmp_path: Path, pinned: str):
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/evil"))
    hub.rename("org/tuned", "new/home")
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"extends: structure\npins: {{{pinned}: org/base}}\n")
    report = projaudit.check("org/tuned", policy=policy, seed=1)
    assert report.provenance is not None
    assert (report.provenance.source, report.provenance.verified) == ("policy", True)
    assert report.target.name == "new/home"


def test_claims_that_differ_are_all_compared_and_the_worst_counts(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/other", llava(7, d=192, h=256, out=256))
    publish(
        hub, tmp_path, "org/tuned", TUNED, card=card("org/base"),
        base_models=["org/other"],
    )  # fmt: skip
    report = projaudit.check("org/tuned", seed=1)
    assert {"base-conflict", "base-implausible"} <= rules_of(report)
    assert len(report.projectors) == 2
    assert report.exit_code == 3


def test_a_base_that_answers_under_another_name(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED)
    hub.rename("org/base", "thief/base")
    report = projaudit.check("org/tuned", "org/base", seed=1)
    assert "base-renamed" in rules_of(report)
    assert report.exit_code == 3


def test_a_model_that_names_itself(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/tuned"))
    report = projaudit.check("org/tuned", seed=1)
    assert "base-is-target" in rules_of(report)
    assert report.exit_code == 3


def test_a_lineage_that_turns_in_a_circle(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/a", BASE, base_models=["org/b"])
    publish(hub, tmp_path, "org/b", BASE, base_models=["org/a"])
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/a"))
    assert "base-circular" in rules_of(projaudit.check("org/tuned", seed=1))


def test_a_lineage_that_turns_in_a_circle_under_another_name(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/a-old", BASE, base_models=["org/a-old"])
    hub.rename("org/a-old", "org/a")
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/a"))
    report = projaudit.check("org/tuned", seed=1)
    assert "base-circular" in rules_of(report)
    assert report.provenance is not None
    assert report.provenance.lineage == ("org/a",)


def test_the_first_ancestor_with_a_projector_is_the_base(hub: FakeHub, tmp_path: Path):
    text = {n: t for n, t in BASE.items() if n.startswith("language_model")}
    publish(hub, tmp_path, "org/text", text, base_models=["org/base"])
    publish(hub, tmp_path, "org/tuned", TUNED)
    report = projaudit.check("org/tuned", "org/text", seed=1)
    assert report.base is not None
    assert report.base.name == "org/base"
    assert report.provenance is not None
    assert report.provenance.lineage == ("org/text", "org/base")


@pytest.mark.parametrize(
    "claim",
    [".", "/etc", "../x", "http://169.254.169.254/latest", "org/base/../x", "file:///etc/passwd"],
)
def test_what_a_card_names_is_a_hub_id_or_nothing(hub: FakeHub, tmp_path: Path, claim: str):
    publish(hub, tmp_path, "org/tuned", TUNED, card=f"---\nbase_model: {json.dumps(claim)}\n---\n")
    with pytest.raises(projaudit.ProjauditError) as raised:
        projaudit.check("org/tuned")
    assert (raised.value.code, raised.value.exit_code) == ("base.none", 3)


@pytest.mark.parametrize(
    "front", ["tags: 7", "ignore_metadata_errors: true", "self: 1", "a: [", "&a [*a]"]
)
def test_a_hostile_card_blinds_nothing(hub: FakeHub, tmp_path: Path, front: str):
    publish(hub, tmp_path, "org/tuned", TUNED, card=f"---\n{front}\n---\n")
    assert projaudit.check("org/tuned", "org/base", seed=1).verdict is Verdict.PASS


def test_a_local_model_names_a_base_on_the_hub(hub: FakeHub, tmp_path: Path):
    folder = save(tmp_path / "mine", TUNED, dtype=torch.bfloat16, card=card("org/base"))
    report = projaudit.check(str(folder), seed=1)
    assert report.base is not None
    assert report.base.kind == "hub"
    assert "base-unverified" in rules_of(report)


# --- coverage -------------------------------------------------------------------------------------


def test_shards_with_one_digest_are_equal_at_no_cost(hub: FakeHub, tmp_path: Path):
    """The language model in a file of its own, the same on both sides, is never fetched."""
    from safetensors.torch import save_file

    for repo, tensors in (("org/b2", BASE), ("org/t2", TUNED)):
        folder = tmp_path / "split" / repo
        save(folder, {})
        (folder / "model.safetensors").unlink()
        weight_map = {}
        for number, word in ((1, "projector"), (2, "")):
            part = {n: t.bfloat16() for n, t in tensors.items() if ("projector" in n) == bool(word)}
            file = f"model-0000{number}-of-00002.safetensors"
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        hub.add(repo, folder)
    report = projaudit.check("org/t2", "org/b2", seed=1)
    parts = {p.name: p.status for p in report.coverage.parts}
    assert parts["language model"] == parts["vision tower"] == "equal"


def test_one_shard_that_differs_leaves_the_rest_unknown(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED)
    report = projaudit.check("org/tuned", "org/base", seed=1)
    parts = {p.name: p.status for p in report.coverage.parts}
    assert parts["language model"] == "not-looked-at"
    full = projaudit.check("org/tuned", "org/base", seed=1, verify="full")
    assert {p.name: p.status for p in full.coverage.parts}["language model"] == "equal"
    assert {t.verified for t in full.tensors} == {"full"}


# --- what goes wrong ------------------------------------------------------------------------------


def run(hub: FakeHub, *arguments: str, **kw) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "projaudit", "check", *arguments, "--format", "json"],
        env={**os.environ, **hub.env(**kw)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_as_a_command(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED)
    hub.tokens.add("hf_secretsecretsecret")
    done = run(hub, "org/tuned", "--base", "org/base", "--seed", "1", token="hf_secretsecretsecret")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["target"]["name"] == "org/tuned"
    assert "hf_secret" not in done.stdout + done.stderr
    assert all(r.auth is None for r in hub.requests("cdn") + hub.requests("evil"))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (on("hub", status=429, headers={"Retry-After": "100000000"}), "rate-limit"),
        (on("hub", status=503), "network."),
        (on("hub", status=200, body=b"<html>please log in</html>"), "network."),
        (on("cdn", ignore_range=True, garble=True), "format."),
        (on("cdn", content_range="bytes 0-9/10"), "integrity."),
        (on("cdn", truncate=10), "network."),
        (on("cdn", status=403), "auth."),
        (on("hub", method="HEAD", headers={"X-Repo-Commit": "0" * 40}), "integrity."),
    ],
)
def test_transfers_that_go_wrong_never_pass(hub: FakeHub, tmp_path: Path, fault, code: str):
    publish(hub, tmp_path, "org/tuned", TUNED)
    hub.faults.append(fault)
    with pytest.raises(projaudit.ProjauditError) as raised:
        projaudit.check("org/tuned", "org/base", seed=1)
    assert raised.value.exit_code == 2
    assert raised.value.code.startswith(code)


@pytest.mark.parametrize(
    ("kind", "code"),
    [("gated", "auth."), ("private", "not-found."), ("missing", "not-found.")],
)
def test_repositories_that_are_closed(hub: FakeHub, tmp_path: Path, kind: str, code: str):
    options = {} if kind == "missing" else {kind: True}
    publish(hub, tmp_path, "org/closed" if kind != "missing" else "org/x", TUNED, **options)
    for target, base in (("org/closed", "org/base"), ("org/base", "org/closed")):
        with pytest.raises(projaudit.ProjauditError) as raised:
            projaudit.check(target, base)
        assert raised.value.code.startswith(code)
        assert raised.value.exit_code == 2
        assert "org/closed" in str(raised.value)


def test_dropped_transfers_are_resumed(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED)
    clean = projaudit.check("org/tuned", "org/base", seed=1)
    import shutil

    shutil.rmtree(tmp_path / "xdg")
    hub.faults.append(on("cdn", drop_after=50_000, times=2))
    again = projaudit.check("org/tuned", "org/base", seed=1)
    assert again.measurements == clean.measurements


def test_a_server_without_ranges_is_read_from_its_start_and_said(hub: FakeHub, tmp_path: Path):
    publish(hub, tmp_path, "org/tuned", TUNED)
    hub.faults.append(on("cdn", ignore_range=True))
    report = projaudit.check("org/tuned", "org/base", seed=1)
    assert report.verdict is Verdict.PASS
    assert report.run.fallbacks


FAULTS = {
    "500": {"status": 500},
    "429": {"status": 429, "headers": {"Retry-After": "100000000"}},
    "404": {"status": 404},
    "html": {"status": 200, "body": b"<html>please log in</html>"},
    "empty object": {"status": 200, "body": b"{}"},
    "cut": {"drop_after": 5},
    "truncated": {"truncate": 5},
    "garbled": {"garble": True},
    "compressed": {"gzip": True},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_any_request_ends_in_a_listed_status(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """From the n-th request on, for every n: an error with a code, or what a sound run says."""
    publish(hub, tmp_path, "org/tuned", TUNED, card=card("org/base"))
    sound = projaudit.check("org/tuned", seed=1)
    count = len(hub.requests())
    assert count >= 10
    for number in range(count):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"xdg-{number}"))
        hub.faults[:] = [on(skip=number, **FAULTS[kind])]
        ended = outcome("org/tuned")
        if isinstance(ended, projaudit.ProjauditError):
            assert ended.exit_code in (2, 3), (number, ended)
        else:  # bytes that a range cannot prove may be garbled; then no pass may come of them
            sound_after_all = ended.measurements == sound.measurements
            assert sound_after_all or ended.exit_code != 0, number


def outcome(target: str) -> projaudit.Report | projaudit.ProjauditError:
    try:
        return projaudit.check(target, seed=1)
    except projaudit.ProjauditError as error:
        return error


def test_a_quantised_model_is_asked_for_the_shape_of_few_layers(hub: FakeHub, tmp_path: Path):
    from bitsandbytes import functional

    def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, state = functional.quantize_4bit(weight, quant_type="nf4")
        parts = state.as_dict(packed=True).items()
        return {name: codes, **{f"{name}.{key}": part.clone() for key, part in parts}}

    matrices = {n: t for n, t in tuned(BASE, 0.4).items() if t.ndim == 2 and "projector" in n}
    tensors = {n: t for n, t in BASE.items() if n not in matrices}
    for name, weight in matrices.items():
        tensors |= packed(name, weight)
    for i in range(40):
        tensors |= packed(
            f"language_model.model.layers.{i}.mlp.gate_proj.weight", torch.ones(64, 64)
        )
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = save(tmp_path / "q4", tensors, config={**CONFIG, "quantization_config": method})
    hub.add("org/q4", folder)
    report = projaudit.check("org/q4", "org/base", seed=1)
    assert report.verdict is Verdict.PASS
    assert {m.value for m in report.measurements if m.metric == "quantised"} == {1.0}
    assert len(hub.requests("cdn")) < 20


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("said_in", ["card", "header"])
def test_a_repository_of_gguf_files_against_the_model_they_were_made_from(
    hub: FakeHub, tmp_path: Path, said_in: str
):
    folder = tmp_path / "ggufs"
    folder.mkdir()
    keys: dict[str, object] = {"clip.projector_type": "mlp"}
    if said_in == "card":
        (folder / "README.md").write_text(card("org/base"))
    else:
        keys["general.base_model.0.repo_url"] = "https://huggingface.co/org/base"
    write(folder / "mmproj-Q8_0.gguf", mmproj(TUNED), "Q8_0", keys=keys)
    text_model = {f"blk.{i}.attn_q.weight": torch.ones(512, 512) for i in range(20)}
    write(folder / "model-F16.gguf", text_model, "F16", architecture="llama", keys={"llama.x": 1})
    hub.add("org/ggufs", folder)
    report = projaudit.check("org/ggufs", seed=1)
    assert report.base is not None
    assert report.base.name == "org/base"
    assert [p.reading.split(",")[0] for p in report.projectors] == ["main: mmproj-Q8_0.gguf"]
    assert "base-unverified" in rules_of(report)
    norms = [m.value for m in report.measurements if m.metric == "relative_norm"]
    assert norms == pytest.approx([0.05, 0.05], rel=0.02)
    # The headers of both files and the projector, twice: never the text model.
    assert report.run.wire_bytes < 2 * PROJECTOR + 400_000


# --- adapters -------------------------------------------------------------------------------------


def lora(folder: Path, **config: object) -> None:
    """A LoRA of linear_1, as peft writes it."""
    name = "base_model.model.model.multi_modal_projector.linear_1"
    g = torch.Generator().manual_seed(2)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(4, 192, generator=g) * 0.02,
        f"{name}.lora_B.weight": torch.randn(256, 4, generator=g) * 0.02,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**known, **config}))


def test_an_adapter_is_measured_on_the_base_that_it_names(hub: FakeHub, tmp_path: Path):
    old = hub.repos["org/base"].refs["main"]
    lora(tmp_path / "lora", revision=old)
    publish(hub, tmp_path, "org/base", tuned(BASE, 0.3, seed=9))
    sha = hub.add("org/lora", tmp_path / "lora")
    report = projaudit.check("org/lora", seed=1)
    assert (report.target.name, report.target.commit) == ("org/lora", sha)
    assert report.base is not None
    assert (report.base.name, report.base.commit) == ("org/base", old)
    assert report.provenance is not None
    assert report.provenance.source == "adapter_config.json"
    assert not report.provenance.verified
    assert f"org/base@{report.base.commit}" in report.projectors[0].reading
    norms = {m.subject: m.value for m in report.measurements if m.metric == "relative_norm"}
    assert norms["projector/linear_1"] > 0
    assert norms["projector/linear_2"] == 0
    # The base's projector is read once for both sides: nothing of its language model.
    assert hub.wire("cdn") <= 1.05 * 2 * PROJECTOR + 3 * (64 << 10) + 20_000


def test_base_says_otherwise_than_the_adapter(hub: FakeHub, tmp_path: Path):
    lora(tmp_path / "lora", base_model_name_or_path="/home/someone/base")
    hub.add("org/lora", tmp_path / "lora")
    with pytest.raises(projaudit.ProjauditError) as caught:
        projaudit.check("org/lora", seed=1)
    assert caught.value.code == "base.none"
    publish(hub, tmp_path, "org/other", TUNED)
    report = projaudit.check("org/lora", "org/other", seed=1)
    assert report.base is not None
    assert report.base.name == "org/other"
    assert "org/other@" in report.projectors[0].reading


def test_on_a_hub_an_adapter_beside_weights_goes_on_the_base_that_it_names(
    hub: FakeHub, tmp_path: Path
):
    folder = save(tmp_path / "repos" / "org/both", TUNED, dtype=torch.bfloat16)
    lora(folder)
    hub.add("org/both", folder)
    report = projaudit.check("org/both", "org/base", seed=1)
    readings = [projector.reading.split(":")[0] for projector in report.projectors]
    assert readings == ["main", "adapter", "adapter-on-base"]
    norms = {m.subject: m.value for m in report.measurements if m.metric == "relative_norm"}
    assert norms["projector@3/linear_2"] == 0 < norms["projector@2/linear_2"]
    assert report.verdict is not Verdict.PASS

    lora(folder, base_model_name_or_path="org/gone")
    hub.add("org/both", folder)
    report = projaudit.check("org/both", "org/base", seed=1)
    assert len(report.projectors) == 2
    assert any("org/gone" in m for f in report.findings for m in f.message.splitlines())
    assert report.verdict is not Verdict.PASS


def test_an_adapter_of_the_language_model_brings_the_projector_of_the_base_that_it_names(
    hub: FakeHub, tmp_path: Path
):
    """threats J7: transformers loads the named base then, and nothing of the weights beside."""
    publish(hub, tmp_path, "org/evil", tuned(BASE, 0.3, seed=9))
    folder = save(tmp_path / "repos" / "org/both", TUNED, dtype=torch.bfloat16)
    lora(folder, base_model_name_or_path="org/evil")
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj"
    adapted = {
        f"{name}.lora_A.weight": torch.ones(4, 64),
        f"{name}.lora_B.weight": torch.ones(8, 4),
    }
    save_file(adapted, folder / "adapter_model.safetensors")
    hub.add("org/both", folder)
    report = projaudit.check("org/both", "org/base", seed=1)
    assert [p.reading.split(":")[0] for p in report.projectors] == ["main", "adapter-on-base"]
    norms = {m.subject: m.value for m in report.measurements if m.metric == "relative_norm"}
    assert norms["projector@2/linear_1"] == pytest.approx(0.3, rel=0.02)
    assert "ambiguous-sources" in rules_of(report)
    assert report.verdict is not Verdict.PASS
