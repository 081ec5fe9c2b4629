"""Depth behaviour of every form: Q-Formers, perceivers and mergers; pickles, codes, adapters, GGUF.

What is run in a process of its own is loaded here: each form's model, by the request that the
process would be given. That the process answers is tested in test_behaviour.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import sample_reports
import torch
import vlms
from ggufs import mmproj, write
from PIL import Image
from safetensors.torch import load_file, save_file
from test_quantised import bitsandbytes_8
from vlms_more import MORE

import projaudit
from projaudit.behaviour import probe, sandbox
from projaudit.behaviour.loading import load
from projaudit.behaviour.plan import plan
from projaudit.behaviour.probe import NO_JACOBIANS, OTHER_WAYS, study_of
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.behaviour.staged import Part, staged
from projaudit.checkpoint import open_checkpoint
from projaudit.data import data_path
from projaudit.opened import projectors_of
from projaudit.refs import parse_ref
from projaudit.source import open_local
from projaudit.weights import load_weights

WEIGHTS = "model.safetensors"
TUNED, BASE = (data_path("demo") / name for name in ("backdoored", "base"))
WHOLE = load_file(TUNED / WEIGHTS)
PROJECTOR = {name: tensor for name, tensor in WHOLE.items() if "projector" in name}
Tensors = dict[str, torch.Tensor]


# ------------------------------------------------------------------ what transformers builds


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlms, "FAMILIES", vlms.FAMILIES | MORE)


def part_of(folder: Path) -> Part:
    """All projectors of a model; the main one is the last, as those of a list come before it."""
    checkpoint = open_checkpoint(open_local(parse_ref(str(folder))))
    projectors = projectors_of(checkpoint.readings[0], checkpoint)
    parts = []
    for projector in reversed(projectors):
        stored = load_weights(checkpoint.source, checkpoint.readings[0], projector.tensors)
        tensors = {name: one.tensor for name, one in stored.items()}
        parts.append(Part(checkpoint, projector, tensors))
    return replace(parts[0], others=tuple(parts[1:]), ways=projectors)


def other(part: Part) -> Part:
    """The same projectors with noise in all of their tensors."""
    torch.manual_seed(1)
    noisy = {name: t + 0.3 * torch.randn_like(t) for name, t in part.tensors.items()}
    return replace(part, tensors=noisy, others=tuple(map(other, part.others)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # forward mode
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's
@pytest.mark.parametrize(
    ("family", "by_token"),
    [
        ("llava", True),
        ("internvl", True),
        ("idefics3", True),
        ("qwen2_vl", False),
        ("gemma3", False),
        ("idefics2", False),
        ("blip-2", False),
        ("llava_gemma2", True),
        ("paligemma", True),
        ("qwen3_vl", False),
        ("deepseek_vl_hybrid", False),
    ],
)
def test_a_projector_of_any_form_is_swapped_and_given_features(
    tmp_path: Path, family: str, by_token: bool
) -> None:
    tuned = part_of(vlms.save(family, tmp_path / "model"))
    base = other(tuned)
    with staged(tuned, base, other_model=False, device=torch.device("cpu"), seed=0) as run:
        request = {**run.request, "prompts": None, "images": None, "budget": 100}
        ours, theirs, first = load(request)
        study, _, _ = study_of(request, ours, theirs, first)
    assert theirs is not None
    speaker, side = ours
    every = [name for one in (tuned, *tuned.others) for name in one.tensors]
    assert len(side) == len(every) == len(theirs[1])
    assert speaker.by_token is by_token
    assert (NO_JACOBIANS in request["notes"]) is not by_token

    # What the projector alone gives is what it gives within the model.
    left: list[torch.Tensor] = []
    hook = (speaker.exit or speaker.projector).register_forward_hook(
        lambda module, args, out: left.append(out[0] if isinstance(out, tuple) else out)
    )
    speaker.use(side)
    speaker._next(study.ordinary[1])
    hook.remove()
    alone = speaker.forward(study.plain[1:2])
    torch.testing.assert_close(alone.reshape(left[0].shape), left[0], atol=1e-4, rtol=1e-4)

    # Both sides answer with their own tensors, and back again.
    with torch.no_grad():
        scores = []
        for each in (side, theirs[1], side):
            speaker.use(each)
            scores.append(speaker.log_probabilities(study.plain[:2], [0, 1], [(), (7,)], 1))
    assert torch.equal(scores[0], scores[2])
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)

    # Directions of the update are directions of what the projector is handed.
    probes = {probe.family: probe for probe in plan(study) if probe.kind == "direction"}
    assert {"ΔW₁", "random"} <= probes.keys()
    moved = probes["ΔW₁"].features((0, 1)) - study.plain[:2]
    assert torch.isfinite(moved).all()
    assert float(moved.norm()) > 0
    said = speaker.answer(side, probes["ΔW₁"].features((0, 1)), [0, 1], 4)
    assert len(said) == 2


def test_a_merged_direction_moves_each_token_in_its_own_way(tmp_path: Path) -> None:
    tuned = part_of(vlms.save("qwen2_vl", tmp_path / "model"))
    with staged(tuned, other(tuned), other_model=False, device=torch.device("cpu"), seed=0) as run:
        request = {**run.request, "prompts": None, "images": None, "budget": 100}
        study, _, _ = study_of(request, *load(request))
    assert study.base is not None
    speaker, layer = study.tuned.speaker, study.first
    (probe,) = [p for p in plan(study) if p.name.startswith("ΔW₁ 1, +1 on all")]
    delta = study.tuned.side[layer.weight] - study.base.side[layer.weight]
    along = torch.linalg.svd(delta)[2][0]
    before, after = (
        speaker.inputs(study.tuned.side, layer.weight, x)
        for x in (study.plain[:1], probe.features((0,)))
    )
    cosine = torch.cosine_similarity((after - before).mean(0), along, dim=0)
    assert abs(float(cosine)) > 0.8


def test_the_base_says_on_which_ground_most_images_are_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, int]] = []

    def surest(speaker: Any, side: Any, images: Any, prompts: int) -> int:
        asked.append((side, len(images) * prompts))
        return 2

    monkeypatch.setattr(probe, "surest", surest)
    tuned = part_of(vlms.save("llava", tmp_path / "model"))
    with staged(tuned, other(tuned), other_model=False, device=torch.device("cpu"), seed=0) as run:
        request = {**run.request, "prompts": None, "images": None, "budget": 5_000}
        ours, theirs, first = load(request)
        with_base = study_of(request, ours, theirs, first)[0]
        without = study_of(request, ours, None, first)[0]
        small = study_of({**request, "budget": 100}, ours, theirs, first)[0]
        file = tmp_path / "grey.png"
        Image.new("RGB", (32, 32), (90, 90, 90)).save(file)
        given = study_of({**request, "images": [str(file)] * 4}, ours, theirs, first)[0]
    assert theirs is not None
    assert [side for side, _ in asked] == [theirs[1], ours[1]]
    assert {cells for _, cells in asked} == {4 * 6 * with_base.prompts}
    assert (with_base.ground, without.ground) == (2, 2)
    assert (small.ground, given.ground) == (None, None)


def test_where_the_image_goes_another_way_too_nothing_is_heard(tmp_path: Path) -> None:
    tuned = replace(part_of(vlms.save("qwen3_vl", tmp_path / "model")), others=(), ways=())
    with staged(tuned, other(tuned), other_model=False, device=torch.device("cpu"), seed=0) as run:
        request = {**run.request, "prompts": None, "images": None, "budget": 100}
        loaded = load(request)
        with pytest.raises(CouldNotProbe, match="not all that the language model has of an image"):
            study_of(request, *loaded)


DEEPSTACK = "model.visual.deepstack_merger_list.0.linear_fc2.weight"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL, whose image enters by a merger and by a second one beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlms, "FAMILIES", vlms.FAMILIES | MORE)
        return vlms.save("qwen3_vl", tmp_path_factory.mktemp("several") / "base")


def tuned_of(base: Path, folder: Path, *words: str) -> Path:
    """The base with a little noise in the tensors whose names hold one of the words."""
    shutil.copytree(base, folder)
    torch.manual_seed(5)
    tensors = load_file(base / WEIGHTS)
    for name, tensor in tensors.items():
        if any(word in name for word in words):
            tensors[name] = tensor + 0.02 * torch.randn_like(tensor)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_an_ordinary_tune_of_several_projectors_hides_nothing(
    several: Path, tmp_path: Path
) -> None:
    tuned = tuned_of(several, tmp_path / "model", "merger")
    report = projaudit.check(str(tuned), str(several), depth="behaviour", seed=0, budget=400)
    evidence = report.behaviour
    assert evidence is not None, report.not_probed
    assert evidence.with_base
    assert evidence.payloads == ()
    assert OTHER_WAYS in evidence.notes
    assert [one for one in report.findings if one.rule.startswith("hidden")] == []
    assert "budget" in inconclusive(report)[0]


def test_what_is_run_of_several_projectors_is_all_that_was_audited(
    several: Path, tmp_path: Path, requests: list[Any]
) -> None:
    tuned = tuned_of(several, tmp_path / "model", "deepstack_merger")
    report = projaudit.check(str(tuned), str(several), depth="behaviour", seed=0)
    assert report.not_probed == ""
    assert inconclusive(report) == []
    ((request, ((_, ours), (_, theirs), first)),) = requests
    assert first.weight == "model.visual.merger.linear_fc1.weight"
    for side, folder in ((ours, tuned), (theirs, several)):
        whole = load_file(folder / WEIGHTS)
        assert {*side} == {name for name in whole if "merger" in name}
        for name, tensor in side.items():
            assert torch.equal(tensor, whole[name])
    assert [other["seen"] for other in request["beside"]] == [True]
    assert not torch.equal(ours[DEEPSTACK], theirs[DEEPSTACK])


def test_an_adapter_of_one_of_several_projectors_is_run_beside_the_others(
    several: Path, tmp_path: Path, requests: list[Any]
) -> None:
    torch.manual_seed(4)
    factors = {"A": torch.randn(2, 64), "B": torch.randn(32, 2)}
    module = DEEPSTACK.removesuffix(".weight")
    named = {f"{module}.lora_{side}.weight": factor for side, factor in factors.items()}
    adapter(tmp_path / "model", named, target_modules=["linear_fc2"])
    report = projaudit.check(str(tmp_path / "model"), str(several), depth="behaviour", seed=0)
    assert report.not_probed == ""
    assert inconclusive(report) == []
    ((request, ((_, ours), _, _)),) = requests
    wanted = load_file(several / WEIGHTS)[DEEPSTACK] + 2.0 * factors["B"] @ factors["A"]
    torch.testing.assert_close(ours[DEEPSTACK], wanted)
    assert [other["prefix"] for other in request["beside"]] == ["model.visual.merger"]


# ------------------------------------------------------------------ formats and adapters


def beside(folder: Path) -> Path:
    """All of the tuned model but its weights and what it says of its base."""
    folder.mkdir()
    for file in TUNED.iterdir():
        if file.name not in ("README.md", WEIGHTS):
            shutil.copy(file, folder)
    return folder


def pickled(tensors: Tensors, file: Path) -> None:
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)


def adapter(folder: Path, tensors: Tensors, **says: Any) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config | says))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")


def torch_zip(folder: Path) -> None:
    pickled(WHOLE, beside(folder) / "pytorch_model.bin")


def two_zips(folder: Path) -> None:
    beside(folder)
    names = sorted(WHOLE)
    index = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        pickled({name: WHOLE[name] for name in some}, folder / file)
        index |= dict.fromkeys(some, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def eight_bits(folder: Path) -> None:
    beside(folder)
    stored: Tensors = {}
    for name, tensor in WHOLE.items():
        if name.endswith(("_proj.weight", "linear_1.weight", "linear_2.weight")):
            parts, method = bitsandbytes_8(tensor.float())
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{leaf}": part.contiguous() for leaf, part in parts.items()}
        else:
            stored[name] = tensor
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))


def alone(folder: Path) -> None:
    folder.mkdir()
    save_file(PROJECTOR, folder / "projector.safetensors")


def alone_pickled(folder: Path) -> None:
    folder.mkdir()
    pickled(PROJECTOR, folder / "mm_projector.bin")


def saved_module(folder: Path) -> None:
    adapter(folder, PROJECTOR, target_modules=[], modules_to_save=["multi_modal_projector"])


def low_rank(folder: Path) -> None:
    torch.manual_seed(3)
    module, (out, into) = "multi_modal_projector.linear_2", PROJECTOR[LAST].shape
    factors = {"A": torch.randn(2, into), "B": torch.randn(out, 2)}
    named = {f"{module}.lora_{side}.weight": 0.1 * factor for side, factor in factors.items()}
    adapter(folder, named, target_modules=["linear_2"])


def low_rank_everywhere(folder: Path) -> None:
    low_rank(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    where = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    out, into = WHOLE["language_model.model.layers.0.self_attn.q_proj.weight"].shape
    tensors |= {f"{where}.lora_A.weight": torch.ones(2, into)}
    tensors |= {f"{where}.lora_B.weight": torch.ones(out, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["linear_2", "q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def gguf(folder: Path) -> None:
    folder.mkdir()
    tensors = {name: tensor.float() for name, tensor in PROJECTOR.items()}
    write(folder / "mmproj-model.gguf", mmproj(tensors), "F16")


LAST = "multi_modal_projector.linear_2.weight"
Form = Callable[[Path], None]
OWN: dict[str, Form] = {"zip": torch_zip, "zips": two_zips, "codes": eight_bits}
IN_BASE: dict[str, Form] = {
    "alone": alone, "alone-pickled": alone_pickled, "saved-module": saved_module, "lora": low_rank,
}  # fmt: skip
IN_PART: dict[str, tuple[Form, str]] = {
    "lora-everywhere": (low_rank_everywhere, "the 2 tensors of the adapter that change the rest"),
    "gguf": (gguf, "only the projector of the GGUF file was run"),
}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the process is given, and what it would load; it answers with a sound report."""
    heard: list[Any] = []
    sound = json.loads(json.dumps(asdict(sample_reports.heard().behaviour)))

    def run(request: dict[str, Any], **_: Any) -> Any:
        loaded = load(request)
        heard.append((request, loaded))
        return {**sound, "notes": list(request["notes"])}

    monkeypatch.setattr(sandbox, "run", run)
    return heard


def audited(folder: Path, requests: list[Any]) -> tuple[projaudit.Report, Any]:
    report = projaudit.check(str(folder), str(BASE), depth="behaviour", seed=0)
    assert report.not_probed == ""
    ((request, ((speaker, tuned), base, _)),) = requests
    assert base is not None
    assert (base[0] is speaker) is (request["base_folder"] is None)
    mine = load_file(BASE / WEIGHTS)
    for name, tensor in base[1].items():
        torch.testing.assert_close(tensor, mine[f"multi_modal_projector.{name}"].float())
    return report, (request, speaker, tuned)


def rest_of(speaker: Any) -> torch.Tensor:
    found: torch.Tensor = speaker.model.get_parameter(
        "model.language_model.layers.0.mlp.up_proj.weight"
    )
    return found


def inconclusive(report: projaudit.Report) -> list[str]:
    return [one.reason for one in report.unevaluated if one.rule == "behaviour"]


@pytest.mark.parametrize("form", OWN)
def test_pickles_and_codes_are_run_as_they_were_audited(
    tmp_path: Path, requests: list[Any], form: str
) -> None:
    OWN[form](tmp_path / "model")
    report, (request, speaker, tuned) = audited(tmp_path / "model", requests)
    near = {"atol": 2e-2, "rtol": 2e-2} if form == "codes" else {"atol": 0.0, "rtol": 0.0}
    for name, tensor in tuned.items():
        torch.testing.assert_close(
            tensor, PROJECTOR[f"multi_modal_projector.{name}"].float(), **near
        )
    whole = WHOLE["language_model.model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(rest_of(speaker), whole.float(), **near)
    assert not Path(request["folder"]).exists()  # gone with the run
    assert inconclusive(report) == []


@pytest.mark.parametrize("form", [*IN_BASE, *IN_PART])
def test_a_projector_alone_and_an_adapter_are_run_in_the_model_of_their_base(
    tmp_path: Path, requests: list[Any], form: str
) -> None:
    make, says = IN_PART.get(form) or (IN_BASE[form], "")
    make(tmp_path / "model")
    report, (request, speaker, tuned) = audited(tmp_path / "model", requests)
    assert request["base_folder"] is None
    base = load_file(BASE / WEIGHTS)
    whole = base["language_model.model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(rest_of(speaker), whole.float())
    if "lora" in form:
        factors = load_file(tmp_path / "model" / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{LAST[:-7]}.lora_{s}.weight"] for s in "AB")
        wanted = base[LAST].float() + 2.0 * b @ a
    else:
        wanted = PROJECTOR[LAST].float()
    near = 1e-3 if form == "gguf" else 1e-6
    torch.testing.assert_close(tuned["linear_2.weight"], wanted, atol=near, rtol=near)
    if says:
        assert report.behaviour is not None
        assert says in report.behaviour.notes[0]
        (reason,) = inconclusive(report)
        assert says in reason
        assert report.verdict is not projaudit.Verdict.PASS
    else:
        assert inconclusive(report) == []


def whole_beside(folder: Path, weights: Path, make: Form) -> None:
    """Full weights with an adapter beside them."""
    make(folder)
    for file in TUNED.iterdir():
        if file.name not in ("README.md", WEIGHTS):
            shutil.copy(file, folder)
    shutil.copy(weights / WEIGHTS, folder)


@pytest.mark.parametrize(
    ("make", "weights", "says"),
    [
        (low_rank, BASE, ""),
        (low_rank, TUNED, "the weights were run with the adapter beside them only"),
        (low_rank_everywhere, BASE, "the 2 tensors of the adapter that change the rest"),
        (saved_module, BASE, ""),
    ],
    ids=["lora", "lora-on-tuned", "lora-everywhere", "saved-module"],
)
def test_an_adapter_beside_full_weights_is_run_in_them(
    tmp_path: Path, requests: list[Any], make: Form, weights: Path, says: str
) -> None:
    whole_beside(tmp_path / "model", weights, make)
    report, (_, speaker, tuned) = audited(tmp_path / "model", requests)
    stored = load_file(weights / WEIGHTS)
    if make is saved_module:
        wanted = PROJECTOR[LAST].float()
    else:
        factors = load_file(tmp_path / "model" / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{LAST[:-7]}.lora_{s}.weight"] for s in "AB")
        wanted = stored[LAST].float() + 2.0 * b @ a
    torch.testing.assert_close(tuned["linear_2.weight"], wanted, atol=1e-6, rtol=1e-6)
    whole = stored["language_model.model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(rest_of(speaker), whole.float())
    assert [says in reason for reason in inconclusive(report)] == ([True] if says else [])


def test_an_adapter_beside_full_weights_that_leaves_the_projector_alone(
    tmp_path: Path, requests: list[Any]
) -> None:
    whole_beside(tmp_path / "model", TUNED, low_rank_everywhere)
    file = tmp_path / "model" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "q_proj" in n}, file)
    report, (_, _, tuned) = audited(tmp_path / "model", requests)
    assert torch.equal(tuned["linear_2.weight"], PROJECTOR[LAST].float())
    assert "tensors of the adapter that change the rest" in inconclusive(report)[0]


def test_an_adapter_that_is_not_read_is_a_reason(tmp_path: Path, requests: list[Any]) -> None:
    whole_beside(tmp_path / "model", TUNED, low_rank)
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    config["peft_type"] = "VERA"
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(projaudit.ProjauditError, match="VERA"):
        projaudit.check(str(tmp_path / "model"), str(BASE), depth="behaviour", seed=0)
    assert requests == []


def test_a_quantised_weight_that_is_not_read_is_a_reason(
    tmp_path: Path, requests: list[Any]
) -> None:
    eight_bits(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    name = "language_model.model.layers.0.mlp.up_proj.SCB"
    save_file(
        {n: t for n, t in tensors.items() if n != name},
        tmp_path / "model" / WEIGHTS,
        {"format": "pt"},
    )
    report = projaudit.check(str(tmp_path / "model"), str(BASE), depth="behaviour", seed=0)
    assert requests == []
    assert "up_proj" in report.not_probed
    assert report.verdict is projaudit.Verdict.INCONCLUSIVE


def test_a_projector_alone_without_a_base_is_a_reason(tmp_path: Path, requests: list[Any]) -> None:
    alone(tmp_path / "model")
    report = projaudit.check(str(tmp_path / "model"), depth="behaviour", seed=0)
    assert "needs a base, whose model it is run in" in report.not_probed
    assert requests == []
