"""Adapters: the update is what peft merges, by peft's own merge; what is not merged is refused."""

from __future__ import annotations

import copy
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import CONFIG, P, llava, save
from safetensors.torch import load_file, save_file
from torch import nn

import projaudit
from projaudit.adapters import apply, fit
from projaudit.checkpoint import open_checkpoint
from projaudit.errors import FormatError, LimitError, ProjauditError, UnsupportedError
from projaudit.findings import Verdict
from projaudit.linalg import spectrum, spectrum_of_product
from projaudit.locating import locate
from projaudit.peft_config import _matches, read_adapter
from projaudit.peft_methods import merged
from projaudit.refs import parse_ref
from projaudit.source import open_local
from projaudit.weights import load_tensors, load_weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of what it is asked for

LINEARS = ["linear_1", "linear_2"]
BASE = llava(0)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(48, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(64, 96, bias=False)

    def forward(self, x):
        return self.up_proj(x)


class Model(nn.Module):
    """The paths of a LLaVA of today's transformers: everything below `model.`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.multi_modal_projector = Mlp()
        self.model.language_model = nn.Module()
        self.model.language_model.layers = nn.ModuleList([nn.Module()])
        self.model.language_model.layers[0].mlp = Up()
        ours = {f"model.{n}": t for n, t in BASE.items() if n.startswith(P)}
        up = BASE["language_model.model.layers.0.mlp.up_proj.weight"]
        ours["model.language_model.layers.0.mlp.up_proj.weight"] = up
        self.load_state_dict(ours)
        self.to(dtype)

    def forward(self, x):
        return self.model.multi_modal_projector(x)


def adapter(
    folder: Path, config, size: float = 0.05, base: nn.Module | None = None, name: str = "org/base"
) -> Path:
    """What `save_pretrained` of peft writes for a model whose adapter was trained at random."""
    config.base_model_name_or_path = name
    torch.manual_seed(3)
    model = peft.get_peft_model(base or Model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.save_pretrained(str(folder))
    edit(folder, base_model_name_or_path=name)
    return folder


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace(old, new): t.clone() for k, t in tensors.items()}, file)


def by_peft(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(Model(dtype), str(folder)).merge_and_unload()
    return {n.removeprefix("model."): t.detach().clone() for n, t in model.state_dict().items()}


def fitted(folder: Path, base: dict[str, torch.Tensor] | None = None):
    """(fit, the base's projector tensors as stored) of an adapter on a saved base."""
    place = folder.parent / f"{folder.name}-base"
    if not place.exists():
        save(place, BASE if base is None else base)
    source = open_local(parse_ref(str(place)))
    reading = open_checkpoint(source).readings[0]
    projectors = locate({n: i.shape for n, i in reading.tensors.items()}, CONFIG)
    found = read_adapter(open_local(parse_ref(str(folder))))
    assert found is not None
    names = [name for p in projectors for name in p.tensors]
    stored = load_weights(source, reading, names)
    return fit(found, projectors, reading.shapes), stored


METHODS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=LINEARS),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=LINEARS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LINEARS),
    "fan-in": lambda: peft.LoraConfig(r=4, fan_in_fan_out=True, target_modules=LINEARS),
    "lora-bias": lambda: peft.LoraConfig(r=4, lora_bias=True, target_modules=LINEARS),
    "bias-only": lambda: peft.LoraConfig(r=4, bias="lora_only", target_modules=LINEARS),
    "bias-all": lambda: peft.LoraConfig(r=4, bias="all", target_modules=["linear_1"]),
    "patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=LINEARS,
        rank_pattern={"linear_1": 2, r"multi.*_2": 8}, alpha_pattern={"projector.linear_2": 3},
    ),
    "whole-paths": lambda: peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=LINEARS,
        alpha_pattern={"model.multi_modal_projector.linear_2": 3, "^linear_1": 5},
    ),
    "saved": lambda: peft.LoraConfig(
        r=4, target_modules=["up_proj"], modules_to_save=["multi_modal_projector"]
    ),
    "saved-and-lora": lambda: peft.LoraConfig(
        r=4, target_modules=["linear_2"], modules_to_save=["linear_1"]
    ),
    "parameters": lambda: peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["linear_1.weight"]
    ),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=100, lora_alpha=9, target_modules=LINEARS
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LINEARS),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=6, target_modules=LINEARS),
    "lokr-both": lambda: peft.LoKrConfig(
        r=2, alpha=6, decompose_both=True, decompose_factor=8, target_modules=LINEARS
    ),
    "ia3": lambda: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["linear_2"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {name: adapter(place / name, make()) for name, make in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_what_peft_merges(written: dict[str, Path], method: str) -> None:
    expected = by_peft(written[method])
    found, stored = fitted(written[method])
    ours = apply(found, stored).weights
    changed = 0
    for name, item in ours.items():
        assert torch.allclose(item.tensor, expected[name], atol=1e-6, rtol=1e-6), name
        changed += not torch.equal(expected[name], BASE[name])
    assert changed, "the control: peft did change something"


@pytest.mark.parametrize("method", [name for name in METHODS if "saved" not in name])
def test_merged_rounds_as_peft_does_in_bfloat16(written: dict[str, Path], method: str) -> None:
    expected = by_peft(written[method], torch.bfloat16)
    found, _ = fitted(written[method])
    infos = {info.name: info for part in found.parts for info in part.leaves.values()}
    loaded = load_tensors(found.adapter.source, infos.values())
    for part in found.parts:
        leaves = {leaf: loaded[info.name].tensor for leaf, info in part.leaves.items()}
        ours = merged(BASE[part.weight].to(torch.bfloat16), part, leaves)
        assert ours.dtype == torch.bfloat16
        same = (ours == expected[part.weight]).float().mean()
        assert same > 0.999, f"{part.weight}: {same}"
        assert torch.allclose(ours.float(), expected[part.weight].float(), rtol=2**-7, atol=1e-6)
    assert found.parts


# --- where its tensors go -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("model.multi_modal_projector", "multi_modal_projector"),  # before transformers 4.52
        ("base_model.model.", ""),
        ("lora_A.weight", "lora_A.default.weight"),
        ("multi_modal_projector.linear_1", "mm_projector.0"),  # LLaVA's own names
    ],
)
def test_every_generations_names_lead_to_the_same_tensors(
    tmp_path: Path, written: dict[str, Path], old: str, new: str
) -> None:
    folder = copied(written["lora"], tmp_path)
    rename(folder, old, new)
    found, _ = fitted(folder)
    assert sorted(part.weight for part in found.parts) == [f"{P}{n}.weight" for n in LINEARS]
    assert not found.elsewhere


def copied(folder: Path, place: Path) -> Path:
    target = place / folder.name
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


QWEN = {
    "visual.merger.ln_q.weight": torch.ones(32),
    "visual.merger.ln_q.bias": torch.zeros(32),
    "visual.merger.mlp.0.weight": torch.randn(128, 128),
    "visual.merger.mlp.0.bias": torch.zeros(128),
    "visual.merger.mlp.2.weight": torch.randn(64, 128),
    "visual.merger.mlp.2.bias": torch.zeros(64),
    "visual.blocks.0.mlp.fc1.weight": torch.randn(64, 32),
    "model.embed_tokens.weight": torch.randn(100, 64),
    "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64),
    "lm_head.weight": torch.randn(100, 64),
}
QWEN_CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 64,
    "vision_config": {"hidden_size": 64, "embed_dim": 32},
}


def qwen_fit(tmp_path: Path, modules: dict[str, tuple[int, int]], **config: object):
    tensors = {}
    for module, (out, into) in modules.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, into)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 2)
    folder = handmade(tmp_path / "a", tensors, **config)
    source = open_local(parse_ref(str(save(tmp_path / "b", QWEN, config=QWEN_CONFIG))))
    reading = open_checkpoint(source).readings[0]
    projectors = locate({n: i.shape for n, i in reading.tensors.items()}, QWEN_CONFIG)
    found = read_adapter(open_local(parse_ref(str(folder))))
    assert found is not None
    assert projectors
    return fit(found, projectors, reading.shapes)


def handmade(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps({**whole, **config}))
    return folder


def test_the_mergers_of_qwen_under_both_names_and_its_language_model(tmp_path: Path) -> None:
    modules = {
        "base_model.model.model.visual.merger.mlp.0": (128, 128),
        "base_model.model.visual.merger.mlp.2": (64, 128),
        "base_model.model.model.language_model.layers.0.self_attn.q_proj": (64, 64),
        "base_model.model.model.visual.blocks.0.mlp.fc1": (64, 32),
        "base_model.model.lm_head": (100, 64),
    }
    found = qwen_fit(tmp_path, modules)
    weights = {"visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"}
    assert {part.weight for part in found.parts} == weights
    assert len(found.elsewhere) == 6
    assert found.changes(weights)
    assert not found.changes({"lm_head.weight"})


@pytest.mark.parametrize(
    "module",
    [
        "base_model.model.model.visual.merger.mlp.7",  # in the projector, and not in this base
        "base_model.model.model.visual.merger",
        "base_model.model.somewhere.else",  # nowhere: it may be anything
    ],
)
def test_what_may_be_the_projectors_and_has_no_place_is_refused(
    tmp_path: Path, module: str
) -> None:
    with pytest.raises(UnsupportedError, match="not merged here") as caught:
        qwen_fit(tmp_path, {module: (64, 128)})
    assert caught.value.code == "unsupported.adapter"


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    names = ("base_model.model.visual.merger.mlp.2", "base_model.model.model.visual.merger.mlp.2")
    with pytest.raises(FormatError, match="one module"):
        qwen_fit(tmp_path, dict.fromkeys(names, (64, 128)))


def test_a_bare_transposed_matrix_of_target_parameters(tmp_path: Path) -> None:
    class Gemma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.multi_modal_projector = nn.Module()
            matrix = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
            self.model.multi_modal_projector.mm_input_projection_weight = nn.Parameter(matrix)
            self.model.multi_modal_projector.mm_soft_emb_norm = nn.LayerNorm(48, bias=False)

    name = "multi_modal_projector.mm_input_projection_weight"
    base = {n: t.detach().clone() for n, t in Gemma().state_dict().items()}
    rest = {n: t for n, t in llava(0).items() if not n.startswith(P)}
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=[name])
    folder = adapter(tmp_path / "a", config, base=Gemma())
    config = {**CONFIG, "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    source = open_local(parse_ref(str(save(tmp_path / "b", {**base, **rest}, config=config))))
    reading = open_checkpoint(source).readings[0]
    projectors = locate({n: i.shape for n, i in reading.tensors.items()}, config)
    found = read_adapter(open_local(parse_ref(str(folder))))
    assert found is not None
    names = [n for p in projectors for n in p.tensors]
    weights = load_weights(source, reading, names)
    ours = apply(fit(found, projectors, reading.shapes), weights).weights
    model = peft.PeftModel.from_pretrained(Gemma(), str(folder)).merge_and_unload()
    expected = model.state_dict()[f"model.{name}"]
    assert torch.allclose(ours[f"model.{name}"].tensor, expected, atol=1e-6)
    assert not torch.equal(expected, base[f"model.{name}"])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"r": 0}, "format.adapter", "no positive whole number"),
        ({"r": True}, "format.adapter", "no positive whole number"),
        ({"r": 2.0}, "format.adapter", "no positive whole number"),
        ({"r": 10**9}, "limit.rank", "above"),
        ({"r": 8}, "format.adapter", "shape"),
        ({"lora_alpha": "16"}, "format.adapter", "no number"),
        ({"lora_alpha": 10**400}, "format.adapter", "401 digits"),
        ({"use_dora": True}, "format.adapter", "contradicts"),
        ({"use_dora": "yes"}, "format.adapter", "neither true nor false"),
        ({"lora_bias": True}, "format.adapter", "contradicts"),
        ({"bias": "some"}, "format.adapter", "none of none"),
        ({"rank_pattern": []}, None, ""),  # empty, whatever it is
        ({"rank_pattern": [1]}, "format.adapter", "no object"),
        ({"rank_pattern": {"linear_1": -4}}, "format.adapter", "no positive"),
        ({"rank_pattern": {"linear_1": 2}}, "format.adapter", "shape"),
        ({"alpha_pattern": {"linear_1": None}}, "format.adapter", "no number"),
        ({"rank_pattern": {"(a+)+$": 4}}, "unsupported.adapter", "expression"),
        ({"alpha_pattern": {"(a|aa)*b": 4}}, "unsupported.adapter", "expression"),
        ({"target_parameters": "x"}, "format.adapter", "no list"),
        ({"peft_type": None}, "format.adapter", "names no method"),
        ({"peft_type": ["LORA"]}, "format.adapter", "names no method"),
        ({"peft_type": "XLORA"}, "unsupported.adapter", "not merged"),
        ({"peft_type": "OFT", "r": 0}, "unsupported.adapter", "OFT"),
        ({"peft_type": "\x1b[2Jevil"}, "unsupported.adapter", "not merged"),
        ({"init_lora_weights": "pissa"}, "unsupported.adapter", "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "unsupported.adapter", "pissa"),
        ({"alora_invocation_tokens": [1]}, "unsupported.adapter", "alora"),
        ({"use_qalora": True}, "unsupported.adapter", "use_qalora"),
        ({"some_future_key": {"a": 1}, "lora_dropout": 0.1}, None, ""),
        ({"init_lora_weights": "gaussian"}, None, ""),
    ],
)
def test_configs_that_are_wrong_contradictory_or_of_other_methods(
    tmp_path: Path, written: dict[str, Path], changes: dict, code: str | None, says: str
) -> None:
    folder = copied(written["lora"], tmp_path)
    edit(folder, **changes)
    if code is None:
        assert fitted(folder)[0].parts
        return
    with pytest.raises(ProjauditError, match=says) as caught:
        fitted(folder)
    assert caught.value.code == code
    assert "\x1b" not in str(caught.value)
    assert isinstance(caught.value, (FormatError, UnsupportedError, LimitError))


def test_a_pattern_of_one_generations_paths_is_not_applied_to_anothers(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    """An adapter from before `model.` stood in front, in a model where it does."""
    folder = copied(written["lora"], tmp_path)
    rename(folder, "base_model.model.model.", "base_model.model.")
    edit(folder, alpha_pattern={"^model.*1": 4})
    with pytest.raises(UnsupportedError, match="by how it is spelled"):
        fitted(folder)
    edit(folder, alpha_pattern={"multi_modal_projector.linear_1": 4})
    assert fitted(folder)[0].parts


def test_adapters_with_names_are_said_to_lie_in_folders(tmp_path: Path) -> None:
    adapter(tmp_path / "ad" / "vision", METHODS["lora"]())
    with pytest.raises(ProjauditError, match="an adapter lies in its folder vision: name that"):
        open_checkpoint(open_local(parse_ref(str(tmp_path / "ad"))))


@pytest.mark.parametrize("text", ["[]", "{", '{"peft_type": "LORA", "lora_alpha": NaN}'])
def test_a_config_that_is_no_config(tmp_path: Path, written: dict[str, Path], text: str) -> None:
    folder = copied(written["lora"], tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError) as caught:
        fitted(folder)
    assert caught.value.code == "format.adapter"


def test_weights_beside_an_adapter_of_the_same_layer_are_refused(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    folder = copied(written["lora"], tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model." + P + "linear_1.weight": torch.ones(64, 48)},
              file)  # fmt: skip
    with pytest.raises(UnsupportedError, match="also adds to"):
        fitted(folder)


@pytest.mark.parametrize(
    ("pattern", "path", "same"),
    [
        ("linear_1", "model.multi_modal_projector.linear_1", True),
        ("inear_1", "model.multi_modal_projector.linear_1", False),
        ("multi_modal_projector.linear_1", "model.multi_modal_projectorXlinear_1", True),
        (r"multi_modal_projector\.linear_1", "model.multi_modal_projectorXlinear_1", False),
        (r"linear_\d", "a.linear_1", True),
        (r"linear_[12]", "a.linear_3", False),
        (r".*linear_(1|2)", "a.b.linear_2", True),
        (r"^a.linear_1", "a.linear_1", True),
    ],
)
def test_patterns_match_as_in_peft(pattern: str, path: str, same: bool) -> None:
    from peft.utils.other import get_pattern_key

    assert _matches(pattern, path, "rank_pattern") is same
    assert (get_pattern_key([pattern], path) == pattern) is same


def test_no_pattern_takes_long(tmp_path: Path, written: dict[str, Path]) -> None:
    folder = copied(written["lora"], tmp_path)
    patterns = {f"{'a.' * 90}{i}": 4 for i in range(19_000)}
    edit(folder, rank_pattern={**patterns, r"[a-z]*\d?[ab]?" + "x" * 100: 4})
    start = time.perf_counter()
    assert fitted(folder)[0].parts
    assert time.perf_counter() - start < 5


# --- the spectrum from its factors ----------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "r", "k"), [(64, 48, 4, 32), (48, 64, 1, 8), (600, 520, 40, 8)])
def test_a_products_spectrum_is_that_of_the_dense_matrix(m: int, n: int, r: int, k: int) -> None:
    g = torch.Generator().manual_seed(r)
    left, right = torch.randn(m, r, generator=g), torch.randn(r, n, generator=g)
    right[: r // 2] *= 10
    exact = spectrum_of_product(left, right, k, generator=g)
    dense = spectrum((left.double() @ right.double()), k, generator=g)
    top = min(r, k)
    assert torch.allclose(exact.values, dense.values, rtol=1e-6, atol=1e-5 * float(dense.values[0]))
    for name in ("frobenius", "excess_energy", "effective_rank"):
        assert getattr(exact, name) == pytest.approx(getattr(dense, name), rel=1e-4), name
    assert exact.above_edge == dense.above_edge
    assert exact.complete
    assert exact.exact
    eye = torch.eye(k)
    assert torch.allclose(exact.left.T @ exact.left, eye, atol=1e-5)
    assert torch.allclose(exact.right.T @ exact.right, eye, atol=1e-5)
    rebuilt = exact.left[:, :top] * exact.values[:top].float() @ exact.right[:, :top].T
    best = dense.left[:, :top] * dense.values[:top] @ dense.right[:, :top].T
    assert torch.allclose(rebuilt.double(), best, atol=1e-3 * float(dense.values[0]))


def test_factors_that_lose_a_rank_and_those_that_are_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 4, generator=g), torch.randn(4, 48, generator=g)
    left[:, 3] = left[:, 0]
    found = spectrum_of_product(left, right, 8, generator=g)
    assert found.above_edge == 3
    assert torch.allclose(found.left.T @ found.left, torch.eye(8), atol=1e-5)
    with pytest.raises(ValueError, match="zero"):
        spectrum_of_product(left, right * 0, 8, generator=g)
    with pytest.raises(ValueError, match="factors"):
        spectrum_of_product(left * torch.nan, right, 8, generator=g)


# --- as its user ----------------------------------------------------------------------------------


def numbers(report) -> dict[tuple[str, str], float]:
    return {(m.metric, m.subject): m.value for m in report.measurements}


@pytest.mark.parametrize("method", ["lora", "dora", "saved", "lokr"])
def test_an_adapter_measures_as_the_model_that_peft_merged_it_into(
    tmp_path: Path, written: dict[str, Path], method: str
) -> None:
    base = save(tmp_path / "base", BASE)
    changed = {n: t for n, t in by_peft(written[method]).items() if n.startswith(P)}
    whole = save(tmp_path / "whole", {**BASE, **changed})
    reports = [
        projaudit.check(str(t), str(base), seed=1, depth="weights")
        for t in (written[method], whole)
    ]
    alone, other = (numbers(report) for report in reports)
    rest = {"rest_differs"}  # which the merged model here was left without
    assert {key for key in alone if key[0] not in rest} == {
        key for key in other if key[0] not in rest
    }
    # Rounding of W + ΔW to fp32 is all that the dense update has more.
    for key, value in other.items():
        if key[0] not in rest:
            assert alone[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert reports[0].verdict is reports[1].verdict is Verdict.PASS


def test_the_report_says_which_bytes_of_which_repository(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    base = save(tmp_path / "base", BASE)
    report = projaudit.check(str(written["lora"]), str(base), seed=1, depth="weights")
    assert report.target.name == str(written["lora"])
    assert report.base is not None
    assert report.base.name == str(base)
    assert report.projectors[0].reading.startswith("adapter: adapter_model.safetensors (LORA)")
    target = [t for t in report.tensors if t.side == "target"]
    assert {t.file for t in target} == {"adapter_model.safetensors"}
    assert {t.role for t in target} == {"linear_1.weight", "linear_2.weight"}
    assert {t.file for t in report.tensors if t.side == "base"} == {"model.safetensors"}


def test_the_rest_of_the_model_is_said_to_change(tmp_path: Path, written: dict[str, Path]) -> None:
    base = save(tmp_path / "base", BASE)
    report = projaudit.check(str(written["saved"]), str(base), seed=1, depth="weights")
    parts = {part.name: part for part in report.coverage.parts}
    part = parts["language model"]
    assert (part.status, part.how) == ("differs", "2 tensors of the adapter change it")
    assert parts["vision tower"].status == "equal"
    assert all("up_proj" in name for name in part.differing)
    assert numbers(report)["rest_differs", "checkpoint"] == 2
    control = projaudit.check(str(written["lora"]), str(base), seed=1, depth="weights")
    assert {p.status for p in control.coverage.parts} == {"audited", "equal"}


def test_an_adapter_that_touches_no_projector_is_no_pass(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["up_proj"])
    folder = adapter(tmp_path / "a", config)
    base = save(tmp_path / "base", BASE)
    with pytest.raises(
        ProjauditError, match="changes nothing in the projector; its 2 tensors"
    ) as e:
        projaudit.check(str(folder), str(base), depth="weights")
    assert (e.value.code, e.value.exit_code) == ("nothing.adapter", 3)


def beside(folder: Path, base: dict, adapter_folder: Path) -> Path:
    save(folder, base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter_folder / name).read_bytes())
    return folder


def test_an_adapter_beside_full_weights_is_a_reading_of_its_own(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    base = save(tmp_path / "base", BASE)
    both = beside(tmp_path / "both", BASE, written["lora"])
    report = projaudit.check(str(both), str(base), seed=1, depth="weights")
    assert [p.reading.split(":")[0] for p in report.projectors] == ["main", "adapter"]
    assert report.verdict is not Verdict.PASS
    assert "ambiguous-sources" in {finding.rule for finding in report.findings}
    values = numbers(report)
    alone = numbers(projaudit.check(str(written["lora"]), str(base), seed=1, depth="weights"))
    for metric in ("relative_norm", "leading_singular_value", "stable_rank"):
        assert values[metric, "projector@2/linear_1"] == pytest.approx(
            alone[metric, "projector/linear_1"], rel=1e-3
        )
    assert values["relative_norm", "projector/linear_1"] == 0
    messages = [m for f in report.findings for m in (f.message,)]
    assert any("where peft is installed" in message for message in messages)


def test_transformers_applies_an_adapter_beside_full_weights(tmp_path: Path) -> None:
    """What the reading stands for: `from_pretrained` of such a folder, with peft installed."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14, "projection_dim": 16},
        text_config={"model_type": "llama", **sizes, "num_attention_heads": 2, "vocab_size": 40,
                     "num_key_value_heads": 2},
        image_token_index=39,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    base = tmp_path / "base"
    model.save_pretrained(str(base))
    folder = adapter(
        tmp_path / "a",
        peft.LoraConfig(r=2, target_modules=LINEARS),
        base=copy.deepcopy(model),
    )
    both = tmp_path / "both"
    model.save_pretrained(str(both))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (both / name).write_bytes((folder / name).read_bytes())
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(str(both))
    names = [name for name, _ in loaded.named_parameters()]
    assert any("linear_1.lora_A" in name for name in names)

    merged_model = peft.PeftModel.from_pretrained(
        transformers.LlavaForConditionalGeneration.from_pretrained(str(base)), str(folder)
    ).merge_and_unload()
    merged_model.save_pretrained(str(tmp_path / "merged"))
    expected = projaudit.check(str(tmp_path / "merged"), str(base), seed=1, depth="weights")
    report = projaudit.check(str(both), str(base), seed=1, depth="weights")
    ours, theirs = numbers(report), numbers(expected)
    for metric in ("relative_norm", "leading_singular_value", "effective_rank"):
        for role in LINEARS:
            assert ours[metric, f"projector@2/{role}"] == pytest.approx(
                theirs[metric, f"projector/{role}"], rel=1e-3
            )


def test_an_adapter_stored_in_another_way_is_a_clear_line(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    folder = copied(written["lora"], tmp_path)
    name = "adapter_model-00001-of-2.safetensors"
    (folder / "adapter_model.safetensors").rename(folder / name)
    base = save(tmp_path / "base", BASE)
    with pytest.raises(UnsupportedError) as caught:
        projaudit.check(str(folder), str(base))
    assert (caught.value.code, caught.value.exit_code) == ("unsupported.adapter", 3)
    assert name in str(caught.value)


def pickled(folder: Path, **options: object) -> Path:
    """The adapter as peft saved it before it took safetensors."""
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin", **options)
    file.unlink()
    return folder


def test_an_adapter_of_torch_save_is_what_peft_loads(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    """peft's own loader reads that folder, and what it merges is what is measured."""
    base = save(tmp_path / "base", BASE)
    folder = pickled(copied(written["lora"], tmp_path))
    report = projaudit.check(str(folder), str(base), seed=1, depth="weights")
    expected = projaudit.check(str(written["lora"]), str(base), seed=1, depth="weights")
    assert report.verdict is Verdict.PASS
    assert numbers(report) == numbers(expected)
    assert report.projectors[0].reading.startswith("adapter: adapter_model.bin (LORA)")
    assert {t.file for t in report.tensors if t.side == "target"} == {"adapter_model.bin"}
    changed = by_peft(folder)
    fit_, stored = fitted(folder)
    for name, weight in apply(fit_, stored).weights.items():
        torch.testing.assert_close(weight.tensor, changed[name])


def test_peft_takes_safetensors_before_torchs_file(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    base = save(tmp_path / "base", BASE)
    folder = copied(written["lora"], tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"?")
    report = projaudit.check(str(folder), str(base), seed=1, depth="weights")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert any("adapter_model.bin: weights beside" in f.message for f in report.findings)
    assert {t.file for t in report.tensors if t.side == "target"} == {"adapter_model.safetensors"}


def test_an_adapter_that_torch_saved_long_ago_is_refused_with_advice(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    base = save(tmp_path / "base", BASE)
    folder = pickled(copied(written["lora"], tmp_path), _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin") as caught:
        projaudit.check(str(folder), str(base), seed=1, depth="weights")
    assert "safetensors" in str(caught.value.remedy)
    save(folder, BASE)
    report = projaudit.check(str(folder), str(base), seed=1, depth="weights")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert any("not read" in f.message for f in report.findings)


def test_an_adapter_in_a_pickle_beside_weights_is_a_reading_of_its_own(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    base = save(tmp_path / "base", BASE)
    both = pickled(beside(tmp_path / "both", BASE, written["lora"]))
    report = projaudit.check(str(both), str(base), seed=1, depth="weights")
    assert report.verdict is not Verdict.PASS
    assert [p.reading.split(":")[0] for p in report.projectors] == ["main", "adapter"]


def test_a_whole_model_saved_with_its_wrappers_is_no_pass(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    """A PeftModel's own state dict as model.safetensors, without alpha anywhere."""
    base = save(tmp_path / "base", BASE)
    model = peft.PeftModel.from_pretrained(Model(), str(written["lora"]))
    whole = save(tmp_path / "whole", {n: t.detach() for n, t in model.state_dict().items()})
    with pytest.raises(UnsupportedError) as caught:
        projaudit.check(str(whole), str(base), seed=1, depth="weights")
    assert caught.value.code == "unsupported.adapter"


def test_an_adapter_of_a_base_that_cannot_speak_is_not_run(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    base = save(tmp_path / "base", BASE)
    report = projaudit.check(str(written["lora"]), str(base), seed=1, depth="behaviour")
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.not_probed == "it has no tokenizer"
    unasked = projaudit.check(str(written["lora"]), str(base), seed=1)
    assert "it is an adapter; --depth behaviour runs it" in unasked.not_probed


@given(
    st.dictionaries(
        st.sampled_from(
            ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "bias",
             "lora_bias", "init_lora_weights", "target_parameters", "peft_type", "use_qalora"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    )
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_config_is_fitted_or_refused(written: dict[str, Path], changes: dict) -> None:
    folder = written["lora"].parent / "any"
    if not folder.exists():
        folder.mkdir()
        name = "adapter_model.safetensors"
        (folder / name).write_bytes((written["lora"] / name).read_bytes())
    known = json.loads((written["lora"] / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**known, **changes}))
    with suppress(FormatError, UnsupportedError, LimitError):
        found, _ = fitted(folder)
        assert all(math.isfinite(part.scale) for part in found.parts)


def test_lora_names_in_a_base_checkpoint_are_no_adapter(tmp_path: Path) -> None:
    more = {
        "language_model.model.layers.0.mlp.up_proj.lora_A.vision.weight": torch.randn(4, 64),
        "language_model.model.layers.0.attention.wo.Plora_A.weight": torch.randn(4, 64),
    }
    base = save(tmp_path / "base", {**BASE, **more})
    assert read_adapter(open_local(parse_ref(str(base)))) is None
    report = projaudit.check(str(base), str(base), seed=1, depth="weights")
    assert [p.reading.split(":")[0] for p in report.projectors] == ["main"]


def test_an_update_that_bfloat16_would_round_away_is_measured(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", peft.LoraConfig(r=2, target_modules=LINEARS), size=1e-3)
    base = save(tmp_path / "base", BASE, dtype=torch.bfloat16)
    values = numbers(projaudit.check(str(folder), str(base), seed=1, depth="weights"))
    assert values["relative_norm", "projector/linear_1"] > 0
    assert values["values_above_edge", "projector/linear_1"] == 2


def test_a_factor_that_overflows_is_a_finding_and_no_crash(
    tmp_path: Path, written: dict[str, Path]
) -> None:
    folder = copied(written["lora"], tmp_path)
    edit(folder, lora_alpha=1e300)
    report = projaudit.check(str(folder), str(save(tmp_path / "base", BASE)), seed=1)
    assert report.verdict is Verdict.FAIL
