"""Where several readings of a repository meet: what is measured, what is the same, what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import CONFIG, P, Tensors, llava, save, tuned

import projaudit
from projaudit.audit import explained
from projaudit.findings import Verdict

BASE = llava(0)
TUNED = tuned(BASE, 0.05)
LANGUAGE = "language_model.model.layers.0.mlp.up_proj.weight"
TOWER = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "base", BASE)


def audit(target: Path, base: Path) -> projaudit.Report:
    return projaudit.check(str(target), str(base), seed=1, depth="weights")


def told(report: projaudit.Report, rule: str) -> str:
    return " ".join(f.message for f in report.findings if f.rule == rule)


def changed(*names: str) -> Tensors:
    return {**TUNED, **{name: TUNED[name] + 0.5 for name in names}}


# The rest of a pickle with the very same projector


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize(
    ("part", "tensor"), [("language model", LANGUAGE), ("vision tower", TOWER)]
)
def test_the_same_projector_in_another_model_is_no_pass(
    tmp_path: Path, base: Path, name: str, part: str, tensor: str
) -> None:
    folder = save(tmp_path / "both", TUNED)
    torch.save(TUNED, folder / name)
    same = audit(folder, base)
    assert same.verdict is Verdict.PASS
    assert told(same, "projector-repeated").endswith(
        f"{name} holds the same rest of the model, too"
    )
    torch.save(changed(tensor), folder / name)
    report = audit(folder, base)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert not told(report, "projector-repeated")
    says = told(report, "ambiguous-sources")
    assert f"{name}: pickled weights" in says
    assert f"the same projector, and another {part}: of " in says


def test_a_pickled_language_model_without_a_projector_is_compared_too(
    tmp_path: Path, base: Path
) -> None:
    """It stands for what a loader of all files has: this projector, before another model."""
    folder = save(tmp_path / "both", TUNED)
    torch.save({n: t for n, t in changed(LANGUAGE).items() if P not in n}, folder / "lm.bin")
    report = audit(folder, base)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "another language model" in told(report, "ambiguous-sources")


def test_a_pickled_projector_alone_has_no_rest(tmp_path: Path, base: Path) -> None:
    folder = save(tmp_path / "both", TUNED)
    torch.save({n: t for n, t in TUNED.items() if P in n}, folder / "mm_projector.bin")
    report = audit(folder, base)
    assert report.verdict is Verdict.PASS
    assert told(report, "projector-repeated").endswith("mm_projector.bin holds nothing else")


def test_a_second_name_of_the_same_bytes_is_no_difference_and_another_tensor_is(
    tmp_path: Path, base: Path
) -> None:
    """safetensors files leave tied weights out, which pickles hold twice."""
    untied = {name: tensor for name, tensor in TUNED.items() if name != HEAD}
    folder = save(tmp_path / "both", untied)
    torch.save({**untied, HEAD: untied[EMBEDDINGS]}, folder / "pytorch_model.bin")
    assert audit(folder, base).verdict is Verdict.PASS
    torch.save({**untied, HEAD: untied[EMBEDDINGS] + 1}, folder / "pytorch_model.bin")
    report = audit(folder, base)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "1 are new" in told(report, "ambiguous-sources")


def test_a_rest_that_is_not_at_hand_or_only_sampled_is_said(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "both", TUNED)
    torch.save(TUNED, folder / "pytorch_model.bin")
    monkeypatch.setattr("projaudit.coverage.FULL_COMPARE", 1000)
    monkeypatch.setattr("projaudit.coverage._WINDOW", 64)
    assert "the same rest of the model where it was sampled" in told(
        audit(folder, base), "projector-repeated"
    )
    monkeypatch.setattr("projaudit.source.LocalSource.at_hand", lambda self, path: False)
    assert "a rest of the model that was not compared" in told(
        audit(folder, base), "projector-repeated"
    )


# A class that no family lists


@pytest.mark.parametrize("named", ["TinyForCausalLM", "Qwen2VLForConditionalGeneration"])
def test_a_class_of_no_family_or_of_another_is_told_and_no_pass(tmp_path: Path, named: str) -> None:
    """Its names and shapes are LLaVA's; which activation stands between them nobody has said."""
    config = {**CONFIG, "architectures": [named]}
    base = save(tmp_path / "base", BASE, config=config)
    report = audit(save(tmp_path / "tuned", TUNED, config=config), base)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert told(report, "function-unknown")
    (projector,) = report.projectors
    assert (projector.family, projector.chain) == ("llava", ())
    assert projector.reading.endswith(f"; for {named}, a class that the family does not list")
    assert any(m.metric == "stable_rank" for m in report.measurements)
    (found, why), *_ = explained(str(base)).found
    assert not found.chain
    assert f"not the class, {named}" in why


@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "architectures": None}])
def test_a_class_that_is_listed_or_not_named_is_of_its_family(tmp_path: Path, config: dict) -> None:
    base = save(tmp_path / "base", BASE, config=config)
    report = audit(save(tmp_path / "tuned", TUNED, config=config), base)
    assert report.verdict is Verdict.PASS
    assert "a class" not in report.projectors[0].reading
