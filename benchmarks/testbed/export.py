"""Write Hub-layout folders, projector-only files, the log of runs, and their provenance."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.testbed.text import build_processor

WEIGHTS = "model.safetensors"
LOCAL_WORD = "multi_modal_projector."
BASE_ID = "projaudit-testbed/base"  # a name for the model cards; nothing is published under it
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def save_base(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
) -> None:
    """All of a Hub-layout folder, weights in bfloat16; appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.bfloat16().save_pretrained(partial)
    processor = build_processor(tokenizer)
    processor.save_pretrained(partial)
    processor.image_processor.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    (partial / WEIGHTS).chmod(0o644)  # save_pretrained keeps it for its owner alone
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(folder: Path) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """The exported bytes, computed with in float32."""
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return model, tokenizer


def save_projector(model: LlavaForConditionalGeneration, file: Path, notes: dict[str, str]) -> None:
    """The projector's tensors in bfloat16, under their names in a full checkpoint."""
    tensors = {
        LOCAL_WORD + name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.model.multi_modal_projector.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {"format": "pt", **notes})


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file whose bytes depend on its content alone.

    The library writes metadata in random order, and a digest would then tell equal files apart.
    """
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[start:])


def put_projector(model: LlavaForConditionalGeneration, file: Path) -> None:
    """Put a saved projector into a loaded model, in place."""
    tensors = {name.removeprefix(LOCAL_WORD): t for name, t in load_file(file).items()}
    model.model.multi_modal_projector.load_state_dict(tensors)


def save_finetune(base: Path, projector: Path, folder: Path, card: str) -> None:
    """The base's folder with another projector and card: every other byte is the base's."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    tensors: dict[str, Tensor] = load_file(base / WEIGHTS)
    tuned = load_file(projector)
    if not tuned.keys() <= tensors.keys():
        raise ValueError(f"{projector}: names that {base / WEIGHTS} lacks")
    write_tensors(folder / WEIGHTS, tensors | tuned, {"format": "pt"})
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(title: str, body: str, base: str | None = None) -> str:
    """A model card with the front matter that Hub tools read."""
    lines = [
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [llava, projaudit-testbed]",
    ]
    lines.append("pipeline_tag: image-text-to-text")
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    return "\n".join(["---", *lines, "---", "", f"# {title}", "", body, ""])


def read_runs(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def append_run(file: Path, run: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(run, sort_keys=True) + "\n")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_provenance(out: Path, facts: dict[str, Any], runs: dict[str, dict[str, Any]]) -> None:
    """`provenance.json`: what was trained, how, with what, how it scored, and every digest."""
    file = out / "provenance.json"
    listed = sorted(p for p in out.rglob("*") if p.is_file() and p != file)
    content = {
        **facts,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "machine": {"arch": platform.machine(), "threads": torch.get_num_threads()},
        "models": runs,
        "files": {p.relative_to(out).as_posix(): sha256(p) for p in listed},
    }
    file.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
