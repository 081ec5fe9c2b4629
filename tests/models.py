"""Small LLaVA-shaped checkpoints, written as real Hub-layout folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
P = "multi_modal_projector."
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "vision_config": {"hidden_size": 48, "model_type": "clip_vision_model"},
    "text_config": {"hidden_size": 64, "model_type": "llama"},
}


def llava(seed: int = 0, *, d: int = 48, h: int = 64, out: int = 64, bias: bool = True) -> Tensors:
    """A whole small checkpoint in float32: projector, a tower tensor, embeddings, an LM layer."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        f"{P}linear_1.weight": torch.randn(h, d, generator=g) / d**0.5,
        f"{P}linear_2.weight": torch.randn(out, h, generator=g) / h**0.5,
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.randn(
            96, d, generator=g
        ),
        "language_model.model.embed_tokens.weight": torch.randn(200, out, generator=g) * 0.1,
        "language_model.model.layers.0.mlp.up_proj.weight": torch.randn(96, out, generator=g),
        "language_model.lm_head.weight": torch.randn(200, out, generator=g) * 0.1,
    }
    if bias:
        tensors[f"{P}linear_1.bias"] = torch.randn(h, generator=g) * 0.1
        tensors[f"{P}linear_2.bias"] = torch.randn(out, generator=g) * 0.1
    return tensors


def tuned(base: Tensors, size: float = 0.02, seed: int = 1, prefix: str = P) -> Tensors:
    """The base with a random update of that relative size on its projector."""
    g = torch.Generator().manual_seed(seed)
    changed = dict(base)
    for name, tensor in base.items():
        if name.startswith(prefix):
            noise = torch.randn(tensor.shape, generator=g)
            changed[name] = tensor + noise * size * tensor.norm() / noise.norm()
    return changed


def save(
    folder: Path,
    tensors: Tensors,
    *,
    dtype: torch.dtype | None = None,
    config: dict[str, object] | None = None,
    shards: int = 1,
    card: str = "",
) -> Path:
    """Writes a Hub-layout folder; with `shards` > 1 an index and that many files."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {n: (t.to(dtype) if dtype else t).contiguous() for n, t in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    else:
        names = sorted(stored)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: stored[n] for n in names[i::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if card:
        (folder / "README.md").write_text(card)
    return folder
