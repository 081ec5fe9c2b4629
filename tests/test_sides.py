"""Where several readings of a repository meet: what is measured, what is the same, what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import CONFIG, P, Tensors, llava, save, tuned
from safetensors.torch import save_file

import projaudit
from projaudit.audit import explained
from projaudit.findings import Verdict
from projaudit.refs import Ref
from projaudit.session import Session
from projaudit.source import Source

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
    assert f"{name}: the same projector, another {part}: of " in says


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


def test_a_pickled_projector_with_more_layers_is_another_one(tmp_path: Path, base: Path) -> None:
    """With the very same bytes in the layers that both have."""
    folder = save(tmp_path / "both", TUNED)
    more = {f"{P}linear_3.weight": torch.eye(64), f"{P}linear_3.bias": torch.zeros(64)}
    torch.save({**TUNED, **more}, folder / "pytorch_model.bin")
    report = audit(folder, base)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert not told(report, "projector-repeated")
    assert "holds no projector of that form" in told(report, "ambiguous-sources")


def test_an_adapter_is_explained_by_the_projector_of_its_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base", BASE)
    found = explained(str(adapter(tmp_path / "ad", on_projector())), base=str(base))
    assert found.base == str(base)
    assert found.found == explained(str(base)).found
    assert explained(str(base), base=str(tmp_path / "nothing")).base == ""  # it is no adapter
    with pytest.raises(projaudit.ProjauditError, match="no such file"):
        explained(str(tmp_path / "ad"), base=str(tmp_path / "nothing"))


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
    assert told(report, "class-unlisted").endswith(f": {named}")
    assert any(m.metric == "stable_rank" for m in report.measurements)
    (found, why), *_ = explained(str(base)).found
    assert not found.chain
    assert f"not the class, {named}" in why


@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "architectures": None}])
def test_a_class_that_is_listed_or_not_named_is_of_its_family(tmp_path: Path, config: dict) -> None:
    base = save(tmp_path / "base", BASE, config=config)
    report = audit(save(tmp_path / "tuned", TUNED, config=config), base)
    assert report.verdict is Verdict.PASS
    assert not told(report, "class-unlisted")


# Files beside an adapter

ORIGINAL = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "hidden_size": 64,
}
LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_"


def original(tensors: Tensors, prefix: str = "") -> Tensors:
    """The names of the original LLaVA's own code."""
    renames = {
        f"{P}linear_1": "model.mm_projector.0",
        f"{P}linear_2": "model.mm_projector.2",
        "language_model.model.": "model.",
        "language_model.lm_head": "lm_head",
        "vision_tower.": "model.vision_tower.vision_tower.",
    }
    found = {}
    for name, tensor in tensors.items():
        old = next(o for o in renames if name.startswith(o))
        found[prefix + renames[old] + name.removeprefix(old)] = tensor.clone()
    return found


def adapter(folder: Path, tensors: Tensors, base: str | None = "org/base") -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def on_language_model() -> Tensors:
    return {f"{LORA}A.weight": torch.ones(4, 64), f"{LORA}B.weight": torch.ones(96, 4)}


def on_projector() -> Tensors:
    torch.manual_seed(0)
    stem = "base_model.model.model.multi_modal_projector.linear_1.lora_"
    return {f"{stem}A.weight": torch.randn(4, 48), f"{stem}B.weight": torch.randn(64, 4) * 0.01}


def llava_lora(folder: Path, *, torch_adapter: bool = False, config: dict | None = None) -> Path:
    """What LLaVA's train.py writes with --lora_enable: the projector lies beside the adapter."""
    adapter(folder, on_language_model())
    if torch_adapter:
        torch.save(on_language_model(), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    projector = {n: t for n, t in TUNED.items() if P in n}
    trained = original(projector, "base_model.model.")
    torch.save(trained, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(config or ORIGINAL))
    return folder


@pytest.mark.parametrize("torch_adapter", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_a_llava_lora_is_audited_by_the_projector_beside_it(
    tmp_path: Path, torch_adapter: bool, converted: bool
) -> None:
    """On a base under its own names, and on one that transformers' converter renamed."""
    names, config = ((lambda of: of), CONFIG) if converted else (original, ORIGINAL)
    base = save(tmp_path / "base", names(BASE), config=config)
    folder = llava_lora(tmp_path / "lora", torch_adapter=torch_adapter)
    report = audit(folder, base)
    twin = audit(save(tmp_path / "twin", names(TUNED), config=config), base)
    ours, theirs = (
        {(m.metric, m.subject): m.value for m in r.measurements if "projector" in m.subject}
        for r in (report, twin)
    )
    assert ours
    assert ours == pytest.approx(theirs)
    assert report.verdict is twin.verdict is Verdict.PASS
    assert report.projectors[0].reading.startswith("adapter: non_lora_trainables.bin (LORA)")
    parts = {part.name: part for part in report.coverage.parts}
    assert parts["language model"].status == "differs"
    assert parts["language model"].how == "2 tensors of the adapter change it"


@pytest.mark.parametrize(
    ("name", "here"), [("llava-lora", "does"), ("my-llava", "does not"), ("tuned-lora", "does not")]
)
def test_of_both_files_of_llava_both_are_audited_and_the_loader_s_choice_is_said(
    tmp_path: Path, name: str, here: str
) -> None:
    base = save(tmp_path / "base", original(BASE), config=ORIGINAL)
    folder = llava_lora(tmp_path / name)
    other = {n: t * 1.01 for n, t in original(TUNED).items() if "mm_projector" in n}
    torch.save(other, folder / "mm_projector.bin")
    report = audit(folder, base)
    readings = [found.reading.partition(": ")[0] for found in report.projectors]
    assert readings == ["main", "pickle-beside-1", "adapter"]
    assert "mm_projector.bin, which LLaVA's loader lays over a base" in report.projectors[0].reading
    norms = {m.subject: m.value for m in report.measurements if m.metric == "relative_norm"}
    assert len(set(norms.values())) > 1  # each was measured as itself
    said = told(report, "ambiguous-sources")
    assert f"the model's name holds `llava` and `lora`, as this one's {here}" in said
    assert report.verdict is not Verdict.PASS


def test_a_projector_file_beside_a_lora_is_the_one_that_is_audited(tmp_path: Path) -> None:
    """LLaVA lays mm_projector.bin over a base, and the adapter of the language model on that."""
    base = save(tmp_path / "base", original(BASE), config=ORIGINAL)
    folder = llava_lora(tmp_path / "lora")
    trained = original({n: t for n, t in TUNED.items() if P in n})
    torch.save(trained, folder / "mm_projector.bin")
    (folder / "non_lora_trainables.bin").unlink()
    report = audit(folder, base)
    (found,) = report.projectors
    assert found.reading == "main: mm_projector.bin, the only weights"
    twin = audit(save(tmp_path / "twin", original(TUNED), config=ORIGINAL), base)
    ours, theirs = (
        {(m.metric, m.subject): m.value for m in r.measurements if "projector" in m.subject}
        for r in (report, twin)
    )
    both = ours.keys() & theirs.keys()
    assert len(both) > 60
    assert {k: ours[k] for k in both} == pytest.approx({k: theirs[k] for k in both})
    assert "it changes nothing in the projector" in told(report, "ambiguous-sources")
    assert report.verdict is not Verdict.PASS  # two files, of which loaders take one or both


def test_a_llava_lora_that_is_fed_otherwise_than_its_base_is_told(tmp_path: Path) -> None:
    base = save(tmp_path / "base", original(BASE), config=ORIGINAL)
    other = {**ORIGINAL, "mm_vision_select_layer": -1}
    report = audit(llava_lora(tmp_path / "lora", config=other), base)
    assert "mm_vision_select_layer: -2 → -1" in told(report, "config-changed")


def test_a_llava_lora_on_a_text_model_wants_a_base_with_a_projector(tmp_path: Path) -> None:
    text = {n: t for n, t in original(BASE).items() if "mm_projector" not in n}
    base = save(tmp_path / "base", text, config=ORIGINAL)
    with pytest.raises(projaudit.ProjauditError, match="has no projector") as caught:
        audit(llava_lora(tmp_path / "lora"), base)
    assert caught.value.code == "base.no-projector"
    assert "--base" in str(caught.value.remedy)


def test_one_tensor_in_both_files_of_a_llava_lora_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", original(BASE), config=ORIGINAL)
    folder = llava_lora(tmp_path / "lora")
    name = "base_model.model.model.mm_projector.0.weight"
    save_file(
        {**on_language_model(), name: torch.ones(64, 48)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(projaudit.ProjauditError, match=r"mm_projector\.0\.weight") as caught:
        audit(folder, base)
    assert caught.value.code == "format.adapter"


JUNK: dict[str, Callable[[Path], object]] = {
    "stray.safetensors": lambda file: save_file({"unheard.of": torch.ones(2)}, file),
    "model.safetensors": lambda file: save_file({"model.norm.weight": torch.ones(64)}, file),
    "stray.bin": lambda file: torch.save({"unheard.of": torch.ones(2)}, file),
    "legacy.bin": lambda file: torch.save(
        {"x": torch.ones(2)}, file, _use_new_zipfile_serialization=False
    ),
    "nothing.safetensors": lambda file: save_file({}, file),
    "checkpoint-1/adapter_model.safetensors": lambda file: save_file(on_projector(), file),
}


@pytest.mark.parametrize("name", JUNK)
def test_weights_without_a_projector_do_not_hide_an_adapter(
    tmp_path: Path, base: Path, name: str
) -> None:
    folder = adapter(tmp_path / "a", on_projector())
    alone = audit(folder, base)
    assert alone.verdict is Verdict.PASS
    (folder / name).parent.mkdir(exist_ok=True)
    JUNK[name](folder / name)
    report = audit(folder, base)
    assert f"{name}: weights beside the adapter" in told(report, "ambiguous-sources")
    assert report.verdict is Verdict.INCONCLUSIVE
    norms = [
        [m.value for m in r.measurements if m.metric == "relative_norm"] for r in (report, alone)
    ]
    assert norms[0] == norms[1] != []


def test_a_text_model_and_its_adapter_have_nothing_to_audit(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", on_language_model(), base=None)
    save(folder, {"model.norm.weight": torch.ones(64)}, config={"architectures": ["LlamaModel"]})
    with pytest.raises(projaudit.ProjauditError) as caught:
        projaudit.check(str(folder), seed=1, depth="weights")
    assert caught.value.code == "nothing.projector"


@pytest.mark.parametrize("kind", ["local", "s3", "mlflow"])
def test_weights_fetched_from_a_bucket_take_the_adapter_as_a_folder_does(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Only of a Hub's repository does transformers load the base that the adapter names."""
    folder = save(adapter(tmp_path / "a", on_projector()), TUNED)
    opened = Session._opened

    def open_as(self: Session, ref: Ref) -> Source:
        assert ref.kind != "hub"
        source = opened(self, ref)
        fetched = source.name == str(folder)
        return replace(source, ref=replace(source.ref, kind=kind)) if fetched else source

    monkeypatch.setattr(Session, "_opened", open_as)
    report = audit(folder, base)
    assert [p.reading.split(":")[0] for p in report.projectors] == ["main", "adapter"]
    assert "which the adapter names" not in told(report, "ambiguous-sources")
    assert "was not read" not in told(report, "ambiguous-sources")


def test_a_projector_under_two_names_is_not_the_rest_of_the_model(tmp_path: Path) -> None:
    base = save(tmp_path / "base", BASE)
    name = f"{P}linear_1.weight"
    twice = {**TUNED, f"model.{name}": TUNED[name].clone()}
    report = audit(save(tmp_path / "twice", twice), base)
    parts = {part.name: part for part in report.coverage.parts}
    assert parts["projector"].tensors == 4
    assert [p.name for p in report.coverage.parts if p.status == "differs"] == []
