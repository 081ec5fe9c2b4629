"""`check` on disk, as its user runs it: verdicts, exit statuses, one clear line for bad input."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from models import CONFIG, P, llava, save, tuned

import projaudit
from projaudit.findings import Verdict

BASE = llava()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save(tmp_path / "base", BASE, dtype=torch.bfloat16)
    return save(tmp_path / "tuned", tuned(BASE, 0.05), dtype=torch.bfloat16), base


def cli(*arguments: object, env: dict[str, str] | None = None, **kw) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "projaudit", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1", **(env or {})},
        timeout=120,
        check=False,
        **kw,
    )


def in_process(*arguments: object) -> int:
    from projaudit.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return int(stop.value.code or 0)


def rules_of(report: projaudit.Report) -> set[str]:
    return {f.rule for f in report.findings}


# --- verdicts -------------------------------------------------------------------------------------


def test_an_honest_fine_tune_passes_and_says_what_was_not_looked_at(pair):
    report = projaudit.check(str(pair[0]), str(pair[1]), seed=1)
    assert report.verdict is Verdict.PASS
    assert report.exit_code == 0
    assert "behaviour not probed" in report.scope
    assert {p.name: p.status for p in report.coverage.parts} == {
        "projector": "audited",
        "vision tower": "equal",
        "language model": "equal",
    }


def test_default_policy_does_not_pass_without_behaviour(pair):
    report = projaudit.check(str(pair[0]), str(pair[1]), policy="default", seed=1)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.exit_code == 3


def test_same_seed_same_json(pair):
    from projaudit.formats import FORMATS

    def document() -> dict:
        report = projaudit.check(str(pair[0]), str(pair[1]), seed=7)
        found = json.loads(FORMATS["json"].render(report))
        found.pop("run")
        return found

    assert json.dumps(document()) == json.dumps(document())


def test_two_seeds_agree_on_the_spectrum(pair):
    values = []
    for seed in (1, 2):
        report = projaudit.check(str(pair[0]), str(pair[1]), seed=seed)
        values.append(
            [m.value for m in report.measurements if m.metric == "leading_singular_value"]
        )
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_and_prefixes_make_no_difference(tmp_path: Path, pair, shards: int):
    renamed = {f"model.{n}" if n.startswith(P) else n: t for n, t in tuned(BASE, 0.05).items()}
    sharded = save(tmp_path / "sharded", renamed, dtype=torch.bfloat16, shards=shards)
    one, other = (projaudit.check(str(t), str(pair[1]), seed=3) for t in (pair[0], sharded))
    assert one.verdict is other.verdict is Verdict.PASS

    def spectral(report):
        return [(m.metric, m.subject, m.value) for m in report.measurements if "energy" in m.metric]

    assert spectral(one) == spectral(other)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_any_floating_dtype_on_either_side(tmp_path: Path, pair, dtype):
    target = save(tmp_path / "t", tuned(BASE, 0.2), dtype=dtype)
    report = projaudit.check(str(target), str(pair[1]), seed=1)
    assert report.verdict is Verdict.PASS
    back = projaudit.check(str(pair[0]), str(save(tmp_path / "b", BASE, dtype=dtype)), seed=1)
    assert back.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE)
    assert not any(m.value != m.value for m in report.measurements)


def test_original_llava_names_against_transformers_names(tmp_path: Path, pair):
    """Pairing goes by role: the two may differ in prefix and in family."""
    names = {"linear_1": "0", "linear_2": "2"}
    original = {
        "model.mm_projector." + names[n.split(".")[1]] + "." + n.split(".")[2]: t
        for n, t in tuned(BASE, 0.05).items()
        if n.startswith(P)
    }
    config = {"architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}
    target = save(tmp_path / "original", original, dtype=torch.bfloat16, config=config)
    report = projaudit.check(str(target), str(pair[1]), seed=1)
    assert report.projectors[0].family == "llava-original"
    assert {"relative_norm", "shift_slope"} <= {m.metric for m in report.measurements}


# --- findings -------------------------------------------------------------------------------------


def test_base_equal_to_target(pair):
    report = projaudit.check(str(pair[0]), str(pair[0]), seed=1)
    assert {"base-is-target", "projector-unchanged"} <= rules_of(report)
    assert report.exit_code == 3
    assert projaudit.check(str(pair[0]), str(pair[0]), fail_on="review").exit_code == 1


def test_a_copy_of_the_base_is_nothing_to_audit(tmp_path: Path, pair):
    copy = save(tmp_path / "copy", BASE, dtype=torch.bfloat16)
    report = projaudit.check(str(copy), str(pair[1]), seed=1)
    assert "projector-unchanged" in rules_of(report)
    assert "base-is-target" not in rules_of(report)
    assert report.exit_code == 3


def test_non_finite_target_fails(tmp_path: Path, pair):
    broken = tuned(BASE)
    broken[f"{P}linear_1.weight"][0, 0] = float("nan")
    report = projaudit.check(str(save(tmp_path / "nan", broken)), str(pair[1]), seed=1)
    assert report.verdict is Verdict.FAIL
    assert report.exit_code == 1
    assert "nonfinite-weights" in rules_of(report)


def test_permuted_units_are_a_finding_and_undone(tmp_path: Path, pair):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    target = tuned(BASE, 0.05)
    w1, b1, w2 = (f"{P}linear_1.weight", f"{P}linear_1.bias", f"{P}linear_2.weight")
    hidden = target | {w1: target[w1][order], b1: target[b1][order], w2: target[w2][:, order]}
    report = projaudit.check(str(save(tmp_path / "p", hidden)), str(pair[1]), seed=1)
    assert "permuted-units" in rules_of(report)
    assert report.exit_code == 3
    norms = [m.value for m in report.measurements if m.metric == "relative_norm"]
    assert max(norms) < 0.1


def test_another_activation_is_another_function(tmp_path: Path, pair):
    config = CONFIG | {"projector_hidden_act": "relu"}
    target = save(tmp_path / "relu", tuned(BASE, 0.05), config=config)
    report = projaudit.check(str(target), str(pair[1]), seed=1)
    assert "config-changed" in rules_of(report)
    assert report.verdict is not Verdict.PASS


def test_a_default_that_a_newer_version_writes_out_is_no_change(tmp_path: Path, pair):
    config = CONFIG | {"vision_feature_layer": -2, "multimodal_projector_bias": True}
    target = save(tmp_path / "newer", tuned(BASE, 0.05), config=config)
    assert projaudit.check(str(target), str(pair[1]), seed=1).verdict is Verdict.PASS


def test_code_in_the_repository_is_said_and_not_run(tmp_path: Path, pair):
    target = save(tmp_path / "code", tuned(BASE, 0.05))
    (target / "modeling_evil.py").write_text("raise SystemExit('was run')")
    report = projaudit.check(str(target), str(pair[1]), seed=1)
    assert "custom-code" in rules_of(report)
    assert report.verdict is Verdict.REVIEW


def test_what_else_changed_is_said(tmp_path: Path, pair):
    target = tuned(BASE, 0.05)
    changed = "language_model.model.layers.0.mlp.up_proj.weight"
    target[changed] = target[changed] + 0.5
    folder = save(tmp_path / "lm", target, dtype=torch.bfloat16)
    report = projaudit.check(str(folder), str(pair[1]), seed=1)
    part = next(p for p in report.coverage.parts if p.name == "language model")
    assert (part.status, part.differing) == ("differs", (changed,))
    assert "rest-differs" in rules_of(report)
    assert report.verdict is Verdict.PASS  # the projector is sound, and the rest is said to differ


def test_a_base_far_away_is_not_compared_silently(tmp_path: Path, pair):
    other = save(tmp_path / "other", llava(seed=99))
    report = projaudit.check(str(other), str(pair[1]), seed=1)
    assert "base-implausible" in rules_of(report)
    assert report.verdict is Verdict.INCONCLUSIVE


def test_two_sources_for_one_tensor(tmp_path: Path, pair):
    """threats J1: what the config redirects to is audited, and so is what it hides."""
    from safetensors.torch import save_file

    config = CONFIG | {"transformers_weights": "other.safetensors"}
    target = save(tmp_path / "redirect", tuned(BASE, 0.05), config=config)
    save_file(tuned(BASE, 0.5, seed=4), target / "other.safetensors")
    report = projaudit.check(str(target), str(pair[1]), seed=1)
    assert "ambiguous-sources" in rules_of(report)
    assert report.exit_code == 3
    norms = sorted(
        m.value
        for m in report.measurements
        if m.metric == "relative_norm" and m.subject.endswith("linear_1")
    )
    assert norms == pytest.approx([0.05, 0.5], rel=0.05)


def test_waived_findings_stay_and_have_no_effect(tmp_path: Path, pair):
    target = save(tmp_path / "code", tuned(BASE, 0.05))
    (target / "code.py").write_text("")
    plain = projaudit.check(str(target), str(pair[1]), seed=1)
    digest = next(t.sha256 for t in plain.tensors if t.side == "target")
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "extends: structure\nwaivers:\n"
        f"  - {{rule: custom-code, digest: {digest}, statement: read it, owner: ana, "
        "expires: 2999-01-01}\n"
    )
    report = projaudit.check(str(target), str(pair[1]), policy=policy, seed=1)
    assert (plain.verdict, report.verdict) == (Verdict.REVIEW, Verdict.PASS)
    assert [f.waived for f in report.findings if f.rule == "custom-code"] == [
        "read it (ana, until 2999-01-01)"
    ]


# --- bad input: one line, a stable code, the right status -----------------------------------------


def header(tensors: dict, data: bytes = b"") -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_FILES = {
    "empty": b"",
    "truncated": struct.pack("<Q", 100) + b"{",
    "oversized header": struct.pack("<Q", 1 << 62),
    "duplicate key": struct.pack("<Q", 8) + b'{"a":1,"a":1}',
    "overlapping": header({"a": ENTRY, "b": ENTRY}, b"\0" * 4),
    "out of range": header({"a": {**ENTRY, "data_offsets": [0, 400]}}, b"\0" * 4),
    "not utf-8": struct.pack("<Q", 4) + b'{"\xff"',
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64,
    "a pickle": b"\x80\x04cos\nsystem\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("side", ["target", "base"])
def test_bad_weights(tmp_path: Path, pair, capsys, name: str, side: str):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(BAD_FILES[name])
    (bad / "config.json").write_text(json.dumps(CONFIG))
    target, base = (bad, pair[1]) if side == "target" else (pair[0], bad)
    assert in_process("check", target, "--base", base, "--format", "json") == 2
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["code"].startswith("format.")
    assert "model.safetensors" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["no/such/path/here"], "not-found.path", 2),
        (["{tuned}"], "base.none", 3),
        (["{tuned}", "--base", "{text}"], "base.no-projector", 3),
        (["{text}", "--base", "{base}"], "nothing.projector", 3),
        (["{empty}", "--base", "{base}"], "nothing.weights", 3),
        (["{tuned}", "--base", "{wide}"], "unsupported.shape", 3),
        (["{tuned}", "--base", "{base}", "--rank", "0"], "usage.option", 4),
        (["{tuned}", "--base", "{base}", "--rank", "60"], "usage.option", 4),
        (["{tuned}", "--base", "{base}", "--device", "tpu"], "usage.device", 4),
        (["{tuned}", "--base", "{base}", "--policy", "{text}/config.json"], "usage.policy", 4),
        (["{tuned}", "--base", "{base}", "--policy", "no-such"], "usage.policy", 4),
        (["{tuned}", "--base", "{base}", "--rules", "{empty}"], "usage.rule", 4),
        (["{tuned}", "--base", "{base}", "--direction", "{text}"], "usage.direction", 4),
        (["{tuned}", "--base", "{base}", "--target-text", "hi"], "unsupported.tokenizer", 3),
        (["{tuned}", "--base-revision", "main"], "usage.option", 4),
    ],
)  # fmt: skip
def test_bad_input(tmp_path: Path, pair, capsys, arguments, code, status):
    text = {n: t for n, t in BASE.items() if n.startswith("language_model")}
    places = {
        "tuned": pair[0],
        "base": pair[1],
        "text": save(tmp_path / "text", text, config={"architectures": ["LlamaForCausalLM"]}),
        "wide": save(tmp_path / "wide", llava(h=80)),
        "empty": tmp_path / "empty",
    }
    places["empty"].mkdir()
    filled = [a.format(**places) for a in arguments]
    assert in_process("check", *filled, "--format", "json") == status
    said = capsys.readouterr()
    assert f"[{code}]" in said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert json.loads(said.out)["error"]["code"] == code


@pytest.mark.parametrize("index", ["missing.safetensors", "../x.safetensors", "/etc/passwd", 3])
def test_an_index_that_points_elsewhere(tmp_path: Path, pair, capsys, index):
    target = save(tmp_path / "t", tuned(BASE), shards=2)
    file = target / "model.safetensors.index.json"
    document = json.loads(file.read_text())
    document["weight_map"][f"{P}linear_1.weight"] = index
    file.write_text(json.dumps(document))
    assert in_process("check", target, "--base", pair[1]) == 2
    assert "format.index" in capsys.readouterr().err


def test_names_are_inert_everywhere(tmp_path: Path, pair, capsys):
    evil = "\x1b]0;pwn\x07\x1b[2J<img src=x onerror=alert(1)>\nRESULT: PASS"
    target = tuned(BASE, 0.05) | {f"{P}{evil}.weight": torch.zeros(2)}
    folder = save(tmp_path / "evil", target)
    formats = ("--format", "html", "--format", "json")
    status = in_process("check", folder, "--base", pair[1], *formats, "-o", tmp_path / "r")
    said = capsys.readouterr()
    assert status == 3
    files = [f.read_text() for f in (tmp_path / "r").iterdir()]
    for text in (said.out, said.err, *files):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\nRESULT" not in text
    assert len(files) == 2
    assert not any("<img" in text for text in files)


# --- output ---------------------------------------------------------------------------------------


def test_reports_are_written_whole_where_they_are_wanted(tmp_path: Path, pair, capsys):
    folder = tmp_path / "reports"
    assert in_process("check", pair[0], "--base", pair[1], "--format", "html", "--format", "json",
                      "-o", folder) == 0  # fmt: skip
    names = sorted(f.suffix for f in folder.iterdir())
    assert names == [".html", ".json"]
    assert "pass" in capsys.readouterr().out.lower()
    assert in_process("check", pair[0], "--base", pair[1], "--format", "json", "-o",
                      tmp_path / "one.json", "--quiet") == 0  # fmt: skip
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "one.json").read_text())["verdict"] == "pass"


def test_a_report_path_that_is_a_directory(tmp_path: Path, pair, capsys):
    (tmp_path / "r.json").mkdir()
    assert in_process("check", pair[0], "--base", pair[1], "--format", "json", "-o",
                      tmp_path / "r.json") == 4  # fmt: skip
    assert "[usage.output]" in capsys.readouterr().err
    assert list((tmp_path / "r.json").iterdir()) == []


def test_a_report_path_that_cannot_be_written(pair, capsys):
    assert in_process("check", pair[0], "--base", pair[1], "--format", "json", "-o",
                      "/proc/none/r.json") == 4  # fmt: skip
    assert "[usage.output]" in capsys.readouterr().err


def test_environment_then_policy_file(tmp_path: Path, pair, capsys, monkeypatch):
    """Precedence: flag, then PROJAUDIT_*, then the policy file."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: structure\noptions: {seed: 5, rank: 9}\n")

    def settings(*more: object) -> dict:
        in_process(
            "check", pair[0], "--base", pair[1], "--format", "json", "--policy", policy, *more
        )
        return json.loads(capsys.readouterr().out)["settings"]

    assert (settings()["seed"], settings()["rank"]) == (5, 9)
    monkeypatch.setenv("PROJAUDIT_SEED", "6")
    assert settings()["seed"] == 6
    assert settings("--seed", "7")["seed"] == 7


def test_a_closed_stdout_is_no_pass(pair):
    command = [sys.executable, "-m", "projaudit", "check", str(pair[0]), "--base", str(pair[1])]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "[usage.output]" in done.stderr


def test_exit_zero_never_hides_an_error(tmp_path: Path, pair, capsys):
    assert in_process("check", pair[0], "--base", pair[0], "--exit-zero") == 0
    assert in_process("check", tmp_path / "none", "--base", pair[1], "--exit-zero") == 2
    capsys.readouterr()


def test_directions(tmp_path: Path, pair):
    import numpy as np

    file = tmp_path / "v.npy"
    np.save(file, np.eye(64, dtype="float32")[:2])
    report = projaudit.check(str(pair[0]), str(pair[1]), directions=[file], seed=1)
    (found,) = [m for m in report.measurements if m.metric == "direction_alignment"]
    assert 0 <= found.value <= 1
    np.save(file, np.ones(63, dtype="float32"))
    with pytest.raises(projaudit.ProjauditError, match="63 values") as raised:
        projaudit.check(str(pair[0]), str(pair[1]), directions=[file])
    assert raised.value.code == "usage.direction"
    np.save(file, np.array([object()]), allow_pickle=True)
    with pytest.raises(projaudit.ProjauditError, match="cannot be read as an array"):
        projaudit.check(str(pair[0]), str(pair[1]), directions=[file])


def test_progress_is_for_terminals(pair):
    """Stages on a terminal's stderr; not a byte where it is none."""
    import pty

    command = [sys.executable, "-m", "projaudit", "check", str(pair[0]), "--base", str(pair[1])]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=120, check=False)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a pty with EIO
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert done.returncode == 0
    assert b"spectral" in shown
    assert b"\x1b" not in done.stdout
    silent = cli("check", *[pair[0], "--base", pair[1]])
    assert silent.stderr == ""


def test_colour_is_for_terminals_that_want_it(pair):
    import pty

    def shown(**env: str) -> bytes:
        ours, theirs = pty.openpty()
        subprocess.run(
            [sys.executable, "-m", "projaudit", "check", str(pair[0]), "--base", str(pair[1])],
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **env},
            timeout=120,
            check=False,
        )
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 4096):
                text += chunk
        os.close(ours)
        return text

    assert b"\x1b[" in shown()
    assert b"\x1b[" not in shown(NO_COLOR="1")


def test_an_interrupt_is_130_and_leaves_nothing(tmp_path: Path, pair):
    command = [sys.executable, "-m", "projaudit", "check", str(pair[0]), "--base", str(pair[1]),
               "--format", "html", "-o", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)  # it is at work by then
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_single_file_is_audited_and_says_what_it_cannot_know(pair):
    report = projaudit.check(
        str(pair[0] / "model.safetensors"), str(pair[1] / "model.safetensors"), seed=1
    )
    assert report.verdict is Verdict.INCONCLUSIVE
    assert any("config" in limit for limit in report.limits)


def test_a_projector_alone_against_a_whole_base(tmp_path: Path, pair):
    alone = {n: t for n, t in tuned(BASE, 0.05).items() if n.startswith(P)}
    report = projaudit.check(str(save(tmp_path / "alone", alone)), str(pair[1]), seed=1)
    assert report.verdict is Verdict.PASS
    (rest,) = [p for p in report.coverage.parts if p.name != "projector"]
    assert rest.status == "not-looked-at"


def test_tokens_of_a_text(tmp_path: Path, pair):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", *(f"w{i}" for i in range(198)), "password"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(pair[0] / "tokenizer.json"))
    embedding = BASE["language_model.model.embed_tokens.weight"].bfloat16().float()[199]
    target = tuned(BASE, 0.02)
    target[f"{P}linear_2.bias"] = target[f"{P}linear_2.bias"] + 40 * embedding
    save(pair[0], target, dtype=torch.bfloat16)
    report = projaudit.check(str(pair[0]), str(pair[1]), target_texts=["password"], seed=1)
    (found,) = [m for m in report.measurements if m.metric == "direction_alignment"]
    assert found.value > 0.95
    assert any("password" in name for name in found.detail)
    (nearest,) = [m for m in report.measurements if m.metric == "nearest_token_alignment"]
    assert any("password" in name for name in nearest.detail)
    with pytest.raises(projaudit.ProjauditError, match="vocabulary") as raised:
        projaudit.check(str(pair[0]), str(pair[1]), target_texts=["xylophone"])
    assert raised.value.code == "usage.target-text"
