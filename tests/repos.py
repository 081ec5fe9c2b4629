"""Folders of a small real LLaVA, and what may be done to them so that loaders take others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from projaudit.checkpoint import Checkpoint, open_checkpoint
from projaudit.readings import parameter
from projaudit.refs import parse_ref
from projaudit.safetensors_header import TensorInfo
from projaudit.source import open_local
from projaudit.weights import load_tensors

LINEAR_1 = "multi_modal_projector.linear_1.weight"
CANONICAL = f"model.{LINEAR_1}"
Tensors = dict[str, torch.Tensor]


def save_llava(folder: Path) -> None:
    """Writes a small LLaVA as save_pretrained does."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


@dataclass
class Repo:
    """A copy of that folder; a tensor filled with one number tells where it was read from."""

    folder: Path
    tensors: Tensors

    def save(self, name: str, value: float, key: str = LINEAR_1, *, alone: bool = False) -> None:
        rest = {} if alone else {k: v.clone() for k, v in self.tensors.items()}
        filled = torch.full_like(self.tensors[LINEAR_1], value)
        (self.folder / name).parent.mkdir(exist_ok=True)
        save_file({**rest, key: filled}, self.folder / name, metadata={"format": "pt"})

    def save_names(self, values: Mapping[str, float]) -> None:
        rest = {k: v.clone() for k, v in self.tensors.items() if k != LINEAR_1}
        filled = {k: torch.full_like(self.tensors[LINEAR_1], v) for k, v in values.items()}
        save_file({**rest, **filled}, self.folder / "model.safetensors", metadata={"format": "pt"})

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def index(self, weight_map: object, name: str = "model.safetensors.index.json") -> None:
        content = {"metadata": {}, "weight_map": weight_map}
        (self.folder / name).write_text(json.dumps(content))

    def shards(self, first: str = "a.safetensors", second: str = "b.safetensors") -> None:
        """Everything in one shard, and the projector matrix in another too."""
        self.remove("model.safetensors")
        self.save(first, 1.0)
        self.save(second, 2.0, alone=True)
        self.index({**dict.fromkeys(self.tensors, first), "unused": second})

    def config(self, **keys: object) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    def configured(self, key: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / "config.json").read_text())[key]
        return found

    def open(self) -> Checkpoint:
        return open_checkpoint(open_local(parse_ref(str(self.folder))))

    def loaded(self) -> float:
        """What transformers puts into the projector's first matrix."""
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration.from_pretrained(self.folder)
        return float(model.state_dict()[CANONICAL].flatten()[0])

    def read(self) -> list[float]:
        """The same for each reading of ours, the loader's first."""
        opened = self.open()
        return [
            value(opened, {parameter(n): i for n, i in reading.tensors.items()}[LINEAR_1])
            for reading in opened.readings
        ]

    def kinds(self) -> list[str]:
        return [ambiguity.kind for ambiguity in self.open().ambiguities]


def value(opened: Checkpoint, info: TensorInfo) -> float:
    return float(load_tensors(opened.source, [info])[info.name].tensor.flatten()[0])


def redirected(repo: Repo) -> None:
    repo.save("model.safetensors", 1.0)
    repo.save("evil.safetensors", 9.0)
    repo.config(transformers_weights="evil.safetensors")


def redirected_by_attribute_map(repo: Repo) -> None:
    repo.save("model.safetensors", 1.0)
    repo.save("evil.safetensors", 9.0)
    repo.config(attribute_map={"transformers_weights": "license"}, license="evil.safetensors")


def redirected_by_versioned_config(repo: Repo) -> None:
    redirected(repo)
    shutil.move(repo.folder / "config.json", repo.folder / "config.5.0.0.json")
    shutil.copy(repo.folder / "config.5.0.0.json", repo.folder / "config.json")
    repo.config(transformers_weights=None, configuration_files=["config.5.0.0.json"])


def redirected_to_subfolder(repo: Repo) -> None:
    repo.save("model.safetensors", 1.0)
    repo.save("sub/evil.safetensors", 9.0)
    repo.config(transformers_weights="sub/evil.safetensors")


def redirected_to_index(repo: Repo) -> None:
    repo.shards()
    repo.save("model.safetensors", 7.0)
    repo.config(transformers_weights="model.safetensors.index.json")


def index_beside_file(repo: Repo) -> None:
    repo.save("model.safetensors", 1.0)
    repo.save("model-00001-of-00001.safetensors", 2.0)
    repo.index(dict.fromkeys(repo.tensors, "model-00001-of-00001.safetensors"))


def unindexed(repo: Repo) -> None:
    repo.remove("model.safetensors")
    rest = {k: v for k, v in repo.tensors.items() if k != LINEAR_1}
    save_file(rest, repo.folder / "a.safetensors", metadata={"format": "pt"})
    repo.save("b.safetensors", 2.0, alone=True)
    repo.index({**dict.fromkeys(rest, "a.safetensors"), "unused": "b.safetensors"})


def two_names(*names: str) -> Callable[[Repo], None]:
    return lambda repo: repo.save_names({name: float(i) for i, name in enumerate(names, 1)})


def distributed(repo: Repo) -> None:
    from transformers import LlavaForConditionalGeneration

    state = LlavaForConditionalGeneration.from_pretrained(repo.folder).state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    state[CANONICAL].fill_(9.0)
    save_file(state, repo.folder / "shard-00001-model-00001-of-00001.safetensors")
    repo.save("model.safetensors", 1.0)


def pickle_beside(repo: Repo) -> None:
    repo.save("model.safetensors", 1.0)
    evil = {**repo.tensors, LINEAR_1: torch.full_like(repo.tensors[LINEAR_1], 9.0)}
    torch.save(evil, repo.folder / "pytorch_model.bin")


def projector_beside(repo: Repo) -> None:
    repo.save("model.safetensors", 1.0)
    named = {"model.mm_projector.0.weight": torch.full_like(repo.tensors[LINEAR_1], 9.0)}
    torch.save(named, repo.folder / "mm_projector.bin")


def pickle_alone(repo: Repo, name: str = "pytorch_model.bin") -> None:
    pickle_beside(repo)
    repo.remove("model.safetensors")
    (repo.folder / "pytorch_model.bin").rename(repo.folder / name)


def sharded_pickles(repo: Repo) -> None:
    pickle_alone(repo, "pytorch_model-00002-of-00002.bin")
    first = {LINEAR_1: torch.full_like(repo.tensors[LINEAR_1], 1.0)}
    torch.save(first, repo.folder / "pytorch_model-00001-of-00002.bin")
    weight_map = dict.fromkeys(repo.tensors, "pytorch_model-00002-of-00002.bin")
    weight_map[LINEAR_1] = "pytorch_model-00001-of-00002.bin"
    repo.index(weight_map, "pytorch_model.bin.index.json")


def index_beside_pickle(repo: Repo) -> None:
    pickle_alone(repo)
    other = {**repo.tensors, LINEAR_1: torch.full_like(repo.tensors[LINEAR_1], 2.0)}
    torch.save(other, repo.folder / "pytorch_model-00001-of-00001.bin")
    shards = dict.fromkeys(other, "pytorch_model-00001-of-00001.bin")
    repo.index(shards, "pytorch_model.bin.index.json")


def index_of_pickles(repo: Repo) -> None:
    pickle_alone(repo, "x.bin")
    repo.index(dict.fromkeys(repo.tensors, "x.bin"))


def variants(repo: Repo) -> None:
    repo.save("model.safetensors", 1.0)
    repo.save("model.fp16.safetensors", 2.0)
    repo.save("consolidated.safetensors", 3.0)
    repo.save("other.safetensors", 4.0, alone=True)


def save_sharded(repo: Repo) -> None:
    names = sorted(repo.tensors)
    repo.remove("model.safetensors")
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({n: repo.tensors[n] for n in part}, repo.folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    repo.index({**weight_map, "model.rotary_emb.inv_freq": "model-00001-of-00002.safetensors"})
