"""Threats J: what each consumer really loads of a hostile folder is what was audited, or is said.

Every row is a small real LLaVA that something was done to. Its consumer loads it: transformers on a
CPU, with peft where there is an adapter, or the reader that the layout was made for. The bytes that
the report names must be those that were loaded, whatever else a loader may take must be audited
beside, and a finding must say so.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ggufs import mmproj, write
from models import tuned
from repos import (
    CANONICAL,
    LINEAR_1,
    Repo,
    Tensors,
    distributed,
    index_beside_file,
    index_beside_pickle,
    index_of_pickles,
    pickle_alone,
    pickle_beside,
    projector_beside,
    redirected,
    redirected_by_attribute_map,
    redirected_by_versioned_config,
    redirected_to_index,
    redirected_to_subfolder,
    save_sharded,
    sharded_pickles,
    two_names,
    unindexed,
    variants,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import projaudit
from projaudit.findings import Verdict

ROLES = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def audit(folder: Path, base: Path) -> projaudit.Report:
    return projaudit.check(str(folder), str(base), seed=1, depth="weights")


def rules_of(report: projaudit.Report) -> set[str]:
    return {finding.rule for finding in report.findings}


def audited(report: projaudit.Report, folder: Path) -> list[dict[str, bytes]]:
    """The bytes of each audited projector by role, as they lie where the report says."""
    found: dict[str, dict[str, bytes]] = {}
    for read in report.tensors:
        if read.side == "target":
            data = (folder / read.file).read_bytes()[read.start : read.stop]
            assert hashlib.sha256(data).hexdigest() == read.sha256
            found.setdefault(read.projector, {})[read.role] = data
    return list(found.values())


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


# --- one matrix, filled with a number that tells where it was read from ---------------------------


@dataclass(frozen=True)
class Case:
    """A repository, what each reading of it gives, and what is said about it."""

    make: Callable[[Repo], Any]
    values: list[float]
    kinds: list[str] = field(default_factory=list)


CASES = {
    "J1 redirect": Case(redirected, [9.0, 1.0], ["redirect"]),
    "J1 attribute_map": Case(
        redirected_by_attribute_map, [9.0, 1.0], ["config-redirect", "redirect"]
    ),
    "J1 versioned config": Case(
        redirected_by_versioned_config, [9.0, 1.0], ["config-redirect", "redirect"]
    ),
    "J1 redirect to subfolder": Case(redirected_to_subfolder, [9.0, 1.0], ["redirect"]),
    "J1 redirect to index": Case(
        redirected_to_index,
        [2.0, 1.0, 7.0],
        ["redirect", "shadowed-tensor"],
    ),
    "J5 index beside file": Case(index_beside_file, [1.0, 2.0], ["index-beside-file"]),
    "J2 shadowed, index says first": Case(Repo.shards, [2.0, 1.0], ["shadowed-tensor"]),
    "J2 shadowed, index says last": Case(
        lambda repo: repo.shards("b.safetensors", "a.safetensors"), [1.0, 2.0], ["shadowed-tensor"]
    ),
    "J4 canonical and legacy": Case(two_names(LINEAR_1, CANONICAL), [2.0, 1.0], ["alias-names"]),
    "J4 prefix twice": Case(
        two_names(LINEAR_1, CANONICAL, f"model.{CANONICAL}"), [3.0, 2.0, 1.0], ["alias-names"]
    ),
    "J4 any character for the dot": Case(
        two_names(LINEAR_1, f"model!{CANONICAL}"), [2.0, 1.0], ["alias-names"]
    ),
    "J4 original name in an HF model": Case(
        two_names("model.mm_projector.0.weight", LINEAR_1), [2.0, 1.0], ["alias-names"]
    ),
    "J1 distributed": Case(distributed, [9.0, 1.0, 1.0], ["distributed-shards", "alias-names"]),
    "J6 pickle beside": Case(pickle_beside, [1.0, 9.0], ["pickle-beside"]),
    "J15 projector's pickle beside": Case(projector_beside, [1.0, 9.0], ["pickle-beside"]),
    "J6 pickle alone": Case(pickle_alone, [9.0]),
    "J2 sharded pickles": Case(sharded_pickles, [9.0, 1.0], ["shadowed-tensor"]),
    "J5 pickles and their index": Case(index_beside_pickle, [9.0, 2.0], ["index-beside-file"]),
    "J12 safetensors index of pickles": Case(index_of_pickles, [9.0]),
    "J8, J9 other files": Case(
        variants, [1.0, 3.0, 2.0, 4.0], ["consolidated-file", "variant-file", "unread-file"]
    ),
}


@quiet
@pytest.mark.parametrize("name", CASES)
def test_first_is_what_transformers_loads_and_all_others_are_audited(
    repo: Repo, saved_llava: Path, name: str
) -> None:
    case = CASES[name]
    case.make(repo)
    assert repo.read() == case.values
    assert repo.loaded() == case.values[0]
    assert set(repo.kinds()) == set(case.kinds)
    labels = [reading.label for reading in repo.open().readings]
    assert labels[0] == "main"
    assert len(set(labels)) == len(labels)

    report = audit(repo.folder, saved_llava)
    assert ("ambiguous-sources" in rules_of(report)) is bool(case.kinds)
    sides = audited(report, repo.folder)
    shape = repo.tensors[LINEAR_1].shape
    assert sides[0]["linear_1.weight"] == raw(torch.full(shape, case.values[0]))
    assert {side["linear_1.weight"] for side in sides} == {
        raw(torch.full(shape, value)) for value in case.values
    }
    assert report.verdict is not Verdict.PASS


# --- whole projectors, each with another update ---------------------------------------------------


def updated(repo: Repo, number: int, **renames: str) -> Tensors:
    """The model, its projector with another small update for each number and parts of its names
    renamed."""
    tensors = tuned(repo.tensors, 0.02 * number, seed=number)
    for name in [name for name in tensors if "projector" in name]:
        new = name
        for old, instead in renames.items():
            new = new.replace(old, instead)
        tensors[new] = tensors.pop(name)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def put(repo: Repo, name: str, tensors: Tensors) -> None:
    (repo.folder / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(tensors, repo.folder / name, {"format": "pt"})
    else:
        torch.save(tensors, repo.folder / name)


def of_projector(state: Mapping[str, torch.Tensor]) -> Tensors:
    """The projector of a state dict by role, whatever its layout calls it."""
    original = {"mm_projector.0": "linear_1", "mm_projector.2": "linear_2", "w_in": "linear_1",
                "w_out": "linear_2", "mm.0": "linear_1", "mm.2": "linear_2"}  # fmt: skip
    found = {}
    for name, tensor in state.items():
        for old, role in original.items():
            name = name.replace(old, role)
        if (role := ".".join(name.split(".")[-2:])) in ROLES:
            found[role] = tensor
    assert sorted(found) == sorted(ROLES)
    return found


def transformers(folder: Path, **options: Any) -> Tensors:
    from transformers import LlavaForConditionalGeneration

    return of_projector(
        LlavaForConditionalGeneration.from_pretrained(folder, **options).state_dict()
    )


def variant(folder: Path) -> Tensors:
    return transformers(folder, variant="fp16")


def subfolder(folder: Path) -> Tensors:
    return transformers(folder, subfolder="checkpoint-500")


def older_transformers(folder: Path) -> Tensors:
    """Before there was safetensors."""
    return of_projector(torch.load(folder / "pytorch_model.bin", weights_only=True))


def vllm(folder: Path) -> Tensors:
    """Every safetensors file, as `safetensors_weights_iterator` without an index: the last wins."""
    state: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return of_projector(state)


def mistral(folder: Path) -> Tensors:
    """Of vLLM with `--load-format mistral`, and mistral-inference."""
    state: Tensors = {}
    for file in sorted(folder.glob("consolidated*.safetensors")):
        state |= load_file(file)
    return of_projector(state)


def llava_builder(folder: Path) -> Tensors:
    """`load_pretrained_model` of LLaVA: mm_projector.bin over what the model has."""
    named = torch.load(folder / "mm_projector.bin", weights_only=True)
    return of_projector(load_file(folder / "model.safetensors")) | of_projector(named)


def llama_cpp(folder: Path) -> Tensors:
    import gguf

    (file,) = folder.glob("*mmproj*.gguf")
    tensors = gguf.GGUFReader(file).tensors
    return of_projector({t.name: torch.from_numpy(t.data.copy()) for t in tensors})


@dataclass(frozen=True)
class Row:
    """A repository with several projectors: who loads which."""

    make: Callable[[Repo], Any]
    first: Callable[[Path], Tensors] = transformers
    others: tuple[Callable[[Path], Tensors], ...] = ()
    """What other loaders take, which is audited too."""
    unread: tuple[Callable[[Path], Tensors], ...] = ()
    """What yet others take, which is named and not audited."""
    rule: str = "ambiguous-sources"
    says: str = ""


def mistrals_layout(repo: Repo) -> None:
    renames = {
        "linear_1": "w_in",
        "linear_2": "w_out",
        "multi_modal_projector": "vision_language_adapter",
    }
    put(repo, "consolidated.safetensors", updated(repo, 2, **renames))


def checkpoint_folder(repo: Repo) -> None:
    put(repo, "checkpoint-500/model.safetensors", updated(repo, 2))
    shutil.copy(repo.folder / "config.json", repo.folder / "checkpoint-500")


def checkpoint_of_pickles(repo: Repo) -> None:
    put(repo, "checkpoint-500/pytorch_model.bin", updated(repo, 2))
    (repo.folder / "checkpoint-500/optimizer.pt").write_bytes(b"?")
    shutil.copy(repo.folder / "config.json", repo.folder / "checkpoint-500")


def original_pickle(repo: Repo) -> None:
    full = updated(repo, 2, linear_1="0", linear_2="2", multi_modal_projector="model.mm_projector")
    put(repo, "mm_projector.bin", {n: t for n, t in full.items() if "mm_projector" in n})


def sharded(repo: Repo) -> None:
    repo.tensors = updated(repo, 1)
    save_sharded(repo)


def decoy(prefix: str, others: str) -> Callable[[Repo], None]:
    """The projector that is loaded behind one prefix, and another behind one that hides it."""

    def make(repo: Repo) -> None:
        whole = updated(repo, 2, multi_modal_projector=f"{prefix}multi_modal_projector")
        hidden = updated(repo, 1, multi_modal_projector=f"{others}multi_modal_projector")
        put(repo, "model.safetensors", hidden | whole)

    return make


ROWS = {
    "J2, J3 a shard that no index lists": Row(
        lambda repo: (
            put(repo, "model.safetensors", updated(repo, 1)),
            put(repo, "model-00002-of-00002.safetensors", updated(repo, 2)),
        ),
        others=(vllm,),
        says="model-00002-of-00002.safetensors",
    ),
    "J3 unindexed tensor": Row(unindexed, says="not in model.safetensors.index.json"),
    "J6 pickle beside": Row(
        lambda repo: put(repo, "pytorch_model.bin", updated(repo, 2)), others=(older_transformers,)
    ),
    "J8 variant": Row(
        lambda repo: put(repo, "model.fp16.safetensors", updated(repo, 2)), others=(variant,)
    ),
    "J9 consolidated": Row(mistrals_layout, others=(mistral,), says="Mistral"),
    "J9 subfolder": Row(checkpoint_folder, unread=(subfolder,), says="checkpoint-500"),
    "J9 pickle in a subfolder": Row(
        checkpoint_of_pickles, unread=(subfolder,), says="checkpoint-500"
    ),
    "J10 auto_map": Row(
        lambda repo: repo.config(auto_map={"AutoModel": "modeling_x.X"}), rule="custom-code"
    ),
    "J10 a Python file": Row(
        lambda repo: (repo.folder / "modeling_x.py").write_text("1/0"), rule="custom-code"
    ),
    "J14 projector in two shards": Row(sharded, rule=""),
    "J15 projector beside": Row(original_pickle, others=(llava_builder,), says="LLaVA's loader"),
    "J16 mmproj beside": Row(
        lambda repo: write(repo.folder / "mmproj-F32.gguf", mmproj(updated(repo, 2))),
        others=(llama_cpp,),
        says="llama.cpp",
    ),
    "J4 decoy behind a wrapper": Row(
        decoy("modelXmodel.", "module."), rule="projector-tensors-added", says="projector"
    ),
    "J4 decoy in another model": Row(
        decoy("modelXmodel.", "vlm."), rule="projector-tensors-added", says="modelXmodel"
    ),
    "J4 decoy that nothing loads": Row(
        lambda repo: put(
            repo,
            "model.safetensors",
            updated(repo, 1) | updated(repo, 2, multi_modal_projector="x.multi_modal_projector"),
        ),
        rule="projector-tensors-added",
        says="x.multi_modal_projector",
    ),
}


@quiet
@pytest.mark.parametrize("name", ROWS)
def test_what_each_consumer_loads_is_audited_or_named(
    repo: Repo, saved_llava: Path, name: str
) -> None:
    row = ROWS[name]
    put(repo, "model.safetensors", updated(repo, 1))
    row.make(repo)
    report = audit(repo.folder, saved_llava)
    sides = audited(report, repo.folder)

    def is_read(state: Tensors) -> list[bool]:
        return [all(side[role] == raw(t) for role, t in state.items()) for side in sides]

    first = is_read(row.first(repo.folder))
    assert any(first)
    if row.rule != "projector-tensors-added":  # there the one that is found first comes first
        assert first[0]
    assert all(any(is_read(load(repo.folder))) for load in row.others)
    assert not any(any(is_read(load(repo.folder))) for load in row.unread)
    messages = [finding.message for finding in report.findings if finding.rule == row.rule]
    assert bool(messages) is bool(row.rule)
    assert all(row.says in message for message in messages)
    assert (report.verdict is Verdict.PASS) is (not row.rule)


# --- configs that rewrite weights as they are loaded (J11) ----------------------------------------

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def scaled(repo: Repo, **beside: float) -> None:
    """The projector in 8-bit floats with a scale of 1/2, and other tensors of that value beside."""
    tensors = updated(repo, 20)
    for name in [name for name in tensors if name.endswith(ROLES) and name.endswith("weight")]:
        weight = tensors[name]
        tensors[name] = (weight * 2).to(torch.float8_e4m3fn)
        for leaf, value in {"weight_scale_inv": 0.5, **beside}.items():
            tensors[name.removesuffix("weight") + leaf] = torch.full((1, 1), value)
    put(repo, "model.safetensors", tensors)


def relative_norm(state: Tensors, base: Path) -> float:
    before = of_projector(load_file(base / "model.safetensors"))["linear_1.weight"]
    return float((state["linear_1.weight"].float() - before).norm() / before.norm())


def measured(report: projaudit.Report) -> float:
    (value,) = [
        m.value
        for m in report.measurements
        if (m.metric, m.subject) == ("relative_norm", "projector/linear_1")
    ]
    assert value is not None
    return value


@quiet
def test_scales_that_the_config_declares_are_loaded_as_they_are_audited(
    repo: Repo, saved_llava: Path
) -> None:
    scaled(repo)
    repo.config(quantization_config=FP8)
    report = audit(repo.folder, saved_llava)
    assert "ambiguous-sources" not in rules_of(report)
    loaded = relative_norm(transformers(repo.folder), saved_llava)
    assert measured(report) == pytest.approx(loaded, rel=1e-2)  # it dequantises to bfloat16


@quiet
@pytest.mark.parametrize("where", ["vision_config", None])
def test_scales_that_no_loader_is_told_of_are_no_pass(
    repo: Repo, saved_llava: Path, where: str | None
) -> None:
    """transformers loads the codes as they are, whatever the scales beside them make of them."""
    scaled(repo)
    if where:
        said = {"model_type": "clip_vision_model", "hidden_size": 8, "quantization_config": FP8}
        repo.config(vision_config={**repo.configured("vision_config"), **said})
        with pytest.raises(projaudit.ProjauditError, match="where no loader looks") as caught:
            audit(repo.folder, saved_llava)
        assert caught.value.code == "unsupported.quantised"
    else:
        report = audit(repo.folder, saved_llava)
        assert "ambiguous-sources" in rules_of(report)
        assert report.verdict is not Verdict.PASS
    assert relative_norm(transformers(repo.folder), saved_llava) > 0.9


@quiet
@pytest.mark.parametrize("leaf", ["scale", "qscale_weight"])
def test_a_scale_under_a_second_name_is_refused(repo: Repo, saved_llava: Path, leaf: str) -> None:
    """transformers renames these two to weight_scale_inv, and takes the first in their order."""
    scaled(repo, **{leaf: 5.0})
    repo.config(quantization_config=FP8)
    assert relative_norm(transformers(repo.folder), saved_llava) > 5
    with pytest.raises(projaudit.ProjauditError, match=leaf) as caught:
        audit(repo.folder, saved_llava)
    assert caught.value.code == "unsupported.quantised"


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}


@quiet
@pytest.mark.parametrize(
    ("method", "as_stored"),
    [
        (FP8, False),
        ({**FP8, "modules_to_not_convert": ["multi_modal_projector"]}, True),
        ({**FP8, "modules_to_not_convert": ["projector"]}, False),
        ({**COMPRESSED, "ignore": ["re:.*multi_modal_projector.*"]}, True),
        ({**COMPRESSED, "ignore": ["re:(.*)*multi_modal_projector"]}, False),
        ({**COMPRESSED, "ignore": ["lm_head"]}, False),
    ],
)
def test_full_precision_that_a_gpu_would_take_for_quantised_is_said(
    repo: Repo, saved_llava: Path, method: dict[str, Any], as_stored: bool
) -> None:
    put(repo, "model.safetensors", updated(repo, 1))
    repo.config(quantization_config=method)
    report = audit(repo.folder, saved_llava)
    assert ("ambiguous-sources" in rules_of(report)) is not as_stored
    assert (report.verdict is Verdict.PASS) is as_stored


@quiet
@pytest.mark.parametrize("skipped", [None, ["multi_modal_projector"]])
def test_what_transformers_makes_of_full_precision_where_there_is_a_gpu(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, skipped: list[str] | None
) -> None:
    """The ground of the test above: weights rounded to 8 bits, and scales of nowhere."""
    from transformers import LlavaForConditionalGeneration

    put(repo, "model.safetensors", updated(repo, 1))
    repo.config(quantization_config={**FP8, "modules_to_not_convert": skipped})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    state = LlavaForConditionalGeneration.from_pretrained(repo.folder).state_dict()
    assert (state[CANONICAL].dtype == torch.float8_e4m3fn) is (skipped is None)


# --- what no loader finds where it is looked for --------------------------------------------------


@quiet
def test_a_state_dict_one_level_down_is_not_what_transformers_loads(
    repo: Repo, saved_llava: Path
) -> None:
    """It looks for no tensors in there, and makes up every weight."""
    repo.remove("model.safetensors")
    put(repo, "pytorch_model.bin", {"state_dict": updated(repo, 1)})  # type: ignore[dict-item]
    report = audit(repo.folder, saved_llava)
    (side,) = audited(report, repo.folder)
    assert side["linear_1.weight"] != raw(transformers(repo.folder)["linear_1.weight"])
    assert "ambiguous-sources" in rules_of(report)
    assert report.verdict is not Verdict.PASS


@quiet
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_names_with_the_wrappers_of_training_are_not_what_transformers_loads(
    repo: Repo, saved_llava: Path, wrapper: str, file: str
) -> None:
    repo.remove("model.safetensors")
    put(repo, file, {f"{wrapper}{name}": t for name, t in updated(repo, 1).items()})
    report = audit(repo.folder, saved_llava)
    (side,) = audited(report, repo.folder)
    assert side["linear_1.weight"] != raw(transformers(repo.folder)["linear_1.weight"])
    assert "ambiguous-sources" in rules_of(report)
    assert report.verdict is not Verdict.PASS


@quiet
def test_an_index_that_leads_out_of_the_folder_is_followed_by_its_loader_only(
    repo: Repo, saved_llava: Path
) -> None:
    """threats J12."""
    repo.remove("model.safetensors")
    shard = {name: tensor for name, tensor in updated(repo, 1).items() if name != LINEAR_1}
    put(repo, "model-00001-of-00001.safetensors", shard)
    save_file(updated(repo, 2), repo.folder.parent / "evil.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(repo.tensors, "model-00001-of-00001.safetensors")
    repo.index({**weight_map, LINEAR_1: "../evil.safetensors"})
    evil = of_projector(updated(repo, 2))["linear_1.weight"]
    assert torch.equal(transformers(repo.folder)["linear_1.weight"], evil)
    with pytest.raises(projaudit.ProjauditError, match="outside the repository") as caught:
        audit(repo.folder, saved_llava)
    assert caught.value.code == "format.index"


@quiet
@pytest.mark.parametrize("name", ["gone.safetensors", "config.json"])
def test_an_index_of_what_is_no_weights_is_loaded_by_nobody(
    repo: Repo, saved_llava: Path, name: str
) -> None:
    """threats J12."""
    save_sharded(repo)
    repo.index({**dict.fromkeys(repo.tensors, "model-00001-of-00002.safetensors"), LINEAR_1: name})
    with pytest.raises((OSError, SafetensorError, pickle.UnpicklingError)):
        transformers(repo.folder)
    with pytest.raises(projaudit.ProjauditError) as caught:
        audit(repo.folder, saved_llava)
    assert caught.value.code == "format.index"


# --- projectors under unusual names (J13) ---------------------------------------------------------


def connector() -> torch.nn.Module:
    import transformers as hf

    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "vocab_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "patch_size": 4,
              "num_attention_heads": 2, "image_size": 16}  # fmt: skip
    config = hf.Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=2, pad_token_id=0, image_token_id=31
    )
    return hf.Idefics3ForConditionalGeneration(config)


def merger() -> torch.nn.Module:
    import transformers as hf

    text = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}  # fmt: skip
    vision = {"embed_dim": 8, "depth": 1, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2,
              "patch_size": 4, "spatial_merge_size": 2}  # fmt: skip
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text)
    return hf.Qwen2VLForConditionalGeneration(config)


@quiet
@pytest.mark.parametrize("made", [connector, merger])
def test_a_projector_by_another_name_is_the_one_that_is_loaded(
    tmp_path: Path, made: Callable[[], torch.nn.Module]
) -> None:
    torch.manual_seed(0)
    model = made()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if made.__name__ in name:
                tensor += 0.02 * torch.randn_like(tensor) * tensor.abs().mean()
    model.save_pretrained(tmp_path / "tuned")
    report = audit(tmp_path / "tuned", tmp_path / "base")
    (side,) = audited(report, tmp_path / "tuned")
    state = type(model).from_pretrained(tmp_path / "tuned").state_dict()
    loaded = {raw(tensor) for name, tensor in state.items() if made.__name__ in name}
    assert set(side.values()) == loaded
    assert report.verdict is Verdict.PASS
