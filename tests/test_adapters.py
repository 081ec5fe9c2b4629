"""Adapters: the update is what peft merges, by peft's own merge; what is not merged is refused."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import projaudit
from projaudit.adapters import _matches, apply, fit, merged, read_adapter
from projaudit.checkpoint import load_tensors, open_checkpoint
from projaudit.errors import FormatError, LimitError, ProjauditError, UnsupportedError
from projaudit.findings import Verdict
from projaudit.linalg import spectrum, spectrum_of_product
from projaudit.projector import locate
from projaudit.source import open_local, parse_ref
from tests.models import CONFIG, P, llava, save

peft = pytest.importorskip("peft")

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
    stored = load_tensors(source, [reading.tensors[name] for name in names])
    return fit(found, projectors, reading.tensors), stored


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
        rank_pattern={"linear_1": 2, r".*linear_\d": 8}, alpha_pattern={"projector.linear_2": 3},
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_what_peft_merges(written: dict[str, Path], method: str) -> None:
    expected = by_peft(written[method])
    found, stored = fitted(written[method])
    ours = apply(found, stored).tensors
    changed = 0
    for name, item in ours.items():
        assert torch.allclose(item.tensor, expected[name], atol=1e-6, rtol=1e-6), name
        changed += not torch.equal(expected[name], BASE[name])
    assert changed, "the control: peft did change something"


@pytest.mark.filterwarnings("ignore")
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
