"""What someone would try so that a bad projector passes, or that the audit falls over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import CONFIG, P, Tensors, llava, save, tuned
from safetensors.torch import save_file

import projaudit
from projaudit.findings import Verdict

BASE = llava()
TUNED = tuned(BASE, 0.05)
W1, B1, W2 = f"{P}linear_1.weight", f"{P}linear_1.bias", f"{P}linear_2.weight"
NEWLINE = {"image_newline": torch.ones(64)}
PREPROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_rescale": True}


def check(tmp_path: Path, target: Tensors, base: Tensors = BASE, **kw) -> projaudit.Report:
    folders = {
        name: save(tmp_path / name, tensors, config=kw.get("config"))
        for name, tensors in (("target", target), ("base", base))
    }
    return projaudit.check(str(folders["target"]), str(folders["base"]), seed=1)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n not in names}


def with_value(name: str, value: float, dtype: torch.dtype = torch.float32) -> Tensors:
    changed = {n: t.to(dtype) for n, t in TUNED.items()}
    changed[name] = changed[name].clone()
    changed[name].view(-1)[0] = value
    return changed


DECOY = {f"module.{n}": t.clone() for n, t in TUNED.items() if n.startswith(P)}
NO_BIAS = without(BASE, B1, f"{P}linear_2.bias")

EVASIONS: dict[str, tuple[Tensors, Tensors]] = {
    "a decoy beside a projector with a layer too many": (
        without(TUNED, B1) | DECOY | {f"{P}linear_3.weight": torch.ones(64, 64)},
        BASE,
    ),
    "a base with a layer that is gone": (TUNED, BASE | {f"{P}linear_3.weight": torch.ones(64, 64)}),
    "a float64 value that float32 cannot hold": (with_value(B1, 1e300, torch.float64), BASE),
    "an update that float32 cannot hold": (with_value(W1, 3e38), with_value(W1, -3e38)),
    "a base that float32 can hardly hold": (TUNED, with_value(W1, 3e38)),
    "a bias where the base has none": (
        without(TUNED, f"{P}linear_2.bias") | {B1: torch.full((64,), 50.0)},
        NO_BIAS,
    ),
    "a newline embedding where the base has none": (
        TUNED | {"image_newline": torch.ones(64)},
        BASE,
    ),
    "a layer scaled to nothing": (TUNED | {W2: TUNED[W2] * 1e-30}, BASE),
    "a layer scaled a thousandfold": (TUNED | {W2: TUNED[W2] * 1000}, BASE),
}


@pytest.mark.parametrize("name", EVASIONS)
def test_never_a_pass(tmp_path: Path, name: str):
    report = check(tmp_path, *EVASIONS[name])
    assert report.verdict is not Verdict.PASS, report.sentence
    assert report.exit_code != 0


def test_the_control_passes(tmp_path: Path):
    assert check(tmp_path, TUNED).verdict is Verdict.PASS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [W1, B1])
def test_values_that_are_no_numbers(tmp_path: Path, name: str, value: float):
    """threats B8: in the target a finding that fails, in the base nothing to compare with."""
    report = check(tmp_path, with_value(name, value))
    assert "nonfinite-weights" in {finding.rule for finding in report.findings}
    assert report.verdict is Verdict.FAIL
    with pytest.raises(projaudit.ProjauditError) as raised:
        check(tmp_path, TUNED, with_value(name, value))
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("value", [3e38, 1e-40, -0.0])
def test_values_at_the_ends_of_float32_are_measured(tmp_path: Path, value: float):
    report = check(tmp_path, with_value(W1, value), with_value(W1, value))
    norms = [m.value for m in report.measurements if m.metric == "relative_norm"]
    assert len(norms) == 2
    assert all(norm == norm and abs(norm) < 10 for norm in norms)


@pytest.mark.parametrize("shape", [(32,), (1, 64)])
def test_a_vector_of_another_shape_is_not_dropped(tmp_path: Path, shape):
    with pytest.raises(projaudit.ProjauditError) as raised:
        check(tmp_path, TUNED | {"image_newline": torch.ones(shape)}, BASE | NEWLINE)
    assert raised.value.code == "unsupported.shape"


@pytest.mark.parametrize("act", ["mish", "no-such"])
def test_a_function_that_cannot_be_probed_does_not_pass(tmp_path: Path, act: str):
    report = check(tmp_path, TUNED, config=CONFIG | {"projector_hidden_act": act})
    assert "function-unknown" in {f.rule for f in report.findings}
    assert report.exit_code == 3


@pytest.mark.parametrize(
    "change",
    [
        {"projector_hidden_act": 5},
        {"projector_hidden_act": ["gelu"]},
        {"vision_config": "x"},
        {"architectures": 5},
        {"model_type": ["x"]},
    ],
)
def test_a_config_of_the_wrong_types(tmp_path: Path, change):
    with pytest.raises(projaudit.ProjauditError) as raised:
        check(tmp_path, TUNED, config=CONFIG | change)
    assert (raised.value.code, raised.value.exit_code) == ("format.config", 2)


def changed_files(tmp_path: Path, files: dict[str, object]) -> projaudit.Report:
    target = save(tmp_path / "target", TUNED)
    base = save(tmp_path / "base", BASE)
    (base / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    for path, content in ({"preprocessor_config.json": PREPROCESSOR} | files).items():
        if content is not None:
            (target / path).write_text(json.dumps(content))
    return projaudit.check(str(target), str(base), seed=1)


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config.json": None},
        {"preprocessor_config.json": {"image_mean": [0.5, 0.5, 0.5], "do_rescale": True}},
        {"preprocessor_config.json": PREPROCESSOR | {"image_processor_type": "Other"}},
        {"processor_config.json": {"image_processor": PREPROCESSOR | {"image_mean": [9, 9, 9]}}},
        {"config.json": CONFIG | {"vision_config": {**CONFIG["vision_config"], "patch_size": 8}}},
        {"config.json": CONFIG | {"image_token_id": 7}},
    ],
)
def test_another_preparation_of_images_is_another_function(tmp_path: Path, files):
    """threats K7, and transformers' own order of preference between the two files."""
    report = changed_files(tmp_path, files)
    assert "config-changed" in {f.rule for f in report.findings}
    assert report.verdict is Verdict.REVIEW


def test_the_same_preparation_is_no_change(tmp_path: Path):
    tower = CONFIG["vision_config"] | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    report = changed_files(tmp_path, {"config.json": CONFIG | {"vision_config": tower}})
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": CONFIG | {"auto_map": "x.py"}},
        {"config.json": CONFIG | {"text_config": {"hidden_size": 64, "auto_map": {"A": "m.B"}}}},
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.T", None]}}},
    ],
)
def test_code_is_seen_wherever_a_config_names_it(tmp_path: Path, files):
    assert "custom-code" in {f.rule for f in changed_files(tmp_path, files).findings}


def test_tensors_that_are_gone_are_said_to_be(tmp_path: Path):
    gone = "language_model.model.layers.0.mlp.up_proj.weight"
    report = check(tmp_path, without(TUNED, gone))
    part = next(p for p in report.coverage.parts if p.name == "language model")
    assert (part.status, part.differing) == ("differs", (gone,))
    assert "rest-differs" in {f.rule for f in report.findings}


def run(*arguments: object, **kw) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "projaudit", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        **kw,
    )


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    target, base = save(tmp_path / "t", TUNED), save(tmp_path / "b", BASE)
    return ["check", str(target), "--base", str(base)]


def test_a_standard_output_that_was_closed_from_the_start(pair):
    done = run(*pair, preexec_fn=lambda: os.close(1))
    assert done.returncode == 4
    assert "[usage.output]" in done.stderr


def test_a_standard_error_that_was_closed_from_the_start(pair):
    done = subprocess.run(
        [sys.executable, "-m", "projaudit", *pair],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.close(2),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert b"PASS" in done.stdout


def test_a_terminal_that_knows_no_greek(pair):
    done = run(*pair, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0


def test_no_arguments_show_help():
    done = run(stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert "Usage: projaudit" in done.stdout


@pytest.mark.parametrize(
    ("output", "formats"),
    [("x.html", ["json"]), ("x.json", ["text", "json"]), ("x.xml", []), ("", ["json"])],
)
def test_a_report_file_is_what_its_name_says(pair, tmp_path: Path, output: str, formats):
    options = [word for name in formats for word in ("--format", name)]
    place = str(tmp_path / output) if output else ""
    done = run(*pair, *options, "-o", place, stdout=subprocess.PIPE)
    assert done.returncode == 4
    assert not (tmp_path / "x.html").exists()


def test_the_format_follows_from_the_file_name(pair, tmp_path: Path):
    done = run(*pair, "-o", tmp_path / "r.html", stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert (tmp_path / "r.html").read_text().startswith("<!")


def test_a_failed_audit_leaves_no_report_that_says_otherwise(pair, tmp_path: Path):
    run(*pair, "-o", tmp_path / "r.html", stdout=subprocess.PIPE)
    done = run("check", tmp_path / "none", *pair[2:], "-o", tmp_path / "r.html")
    assert done.returncode == 2
    assert "PASS" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (64,".ljust(200),
        b"\x93NUMPY\x01\x00v\x00{[]:1}".ljust(200),
        b"PK\x03\x04nothing",
        b"",
    ],
)
def test_hostile_directions(pair, tmp_path: Path, content: bytes):
    file = tmp_path / "v.npy"
    file.write_bytes(content)
    done = run(*pair, "--direction", file, stdout=subprocess.PIPE)
    assert done.returncode == 4
    assert "[usage.direction]" in done.stderr
    assert "unsafely" not in done.stderr


def test_a_direction_file_without_tensors(pair, tmp_path: Path):
    save_file({}, tmp_path / "v.safetensors")
    assert run(*pair, "--direction", tmp_path / "v.safetensors").returncode == 4


@pytest.mark.parametrize("option", ["--rules", "--direction", "-o"])
def test_names_that_no_file_system_takes(pair, option: str):
    done = run(*pair, option, "n" * 300 + ".json", stdout=subprocess.PIPE)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1


ODD_POLICIES: dict[str, Callable[[], str]] = {
    "a base of numbers": lambda: "extends: structure\noptions: {base: org/b, base_revision: 5}\n",
    "a rank in words": lambda: "extends: structure\noptions: {rank: '5'}\n",
}


@pytest.mark.parametrize("name", ODD_POLICIES)
def test_policy_options_have_types(pair, tmp_path: Path, name: str):
    file = tmp_path / "p.yaml"
    file.write_text(ODD_POLICIES[name]())
    done = run(*pair, "--policy", file, stdout=subprocess.PIPE)
    assert done.returncode == 4
    assert str(file) in done.stderr


# Where families, readings and configs meet


def test_an_epsilon_of_a_norm_that_changed_is_a_changed_config(tmp_path: Path):
    norm = {f"{P}layernorm.weight": torch.ones(48), f"{P}layernorm.bias": torch.zeros(48)}
    base = llava(h=64) | norm
    w2 = f"{P}linear_2.weight"
    base[w2] = base[w2][:, :32].clone()  # halves of linear_1 are multiplied
    config = CONFIG | {
        "architectures": ["AyaVisionForConditionalGeneration"],
        "adapter_layer_norm_eps": 1e-6,
    }
    before = str(save(tmp_path / "base", base, config=config))
    same = save(tmp_path / "same", tuned(base), config=config)
    other = save(tmp_path / "other", tuned(base), config=config | {"adapter_layer_norm_eps": 0.9})
    quiet = projaudit.check(str(same), before, seed=1, depth="weights")
    assert "config-changed" not in {finding.rule for finding in quiet.findings}
    report = projaudit.check(str(other), before, seed=1, depth="weights")
    assert "config-changed" in {finding.rule for finding in report.findings}
    assert report.verdict is not Verdict.PASS


def test_a_projector_that_only_the_base_has_is_missing(tmp_path: Path):
    second = {f"audio_tower.proj{n}.weight": torch.randn(64, 48 + 16 * (n - 1)) for n in (1, 2)}
    base = llava()
    before = str(save(tmp_path / "base", base | second))
    report = projaudit.check(
        str(save(tmp_path / "tuned", tuned(base))), before, seed=1, depth="weights"
    )
    assert "projector-tensors-removed" in {finding.rule for finding in report.findings}
    assert report.verdict is not Verdict.PASS


def test_a_base_whose_norm_is_zero_is_no_base(tmp_path: Path):
    norm = {f"{P}layer_norm.weight": torch.zeros(48), f"{P}layer_norm.bias": torch.zeros(48)}
    config = CONFIG | {"architectures": ["InternVLForConditionalGeneration"]}
    before = str(save(tmp_path / "base", llava() | norm, config=config))
    target = str(save(tmp_path / "tuned", tuned(llava() | norm), config=config))
    with pytest.raises(projaudit.ProjauditError) as caught:
        projaudit.check(target, before, seed=1, depth="weights")
    assert caught.value.code == "base.zero"


def test_a_class_whose_norm_is_not_there_is_not_taken_for_another(tmp_path: Path):
    """VipLLaVA's loader would run a norm as it is initialised; LLaVA's has none."""
    config = CONFIG | {"architectures": ["VipLlavaForConditionalGeneration"]}
    before = str(save(tmp_path / "base", llava(), config=config))
    target = str(save(tmp_path / "tuned", tuned(llava()), config=config))
    report = projaudit.check(target, before, seed=1, depth="weights")
    assert "function-unknown" in {finding.rule for finding in report.findings}
    assert report.verdict is Verdict.INCONCLUSIVE
