"""`projaudit check` as a whole process on a LLaVA-1.5-7B-sized pair: time, memory, wire bytes.

The two checkpoints are real safetensors files of 14 GB with the tensors of LLaVA-1.5-7B, sparse
except for their projectors, so that they take 84 MB on disk.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
P = "multi_modal_projector."
HIDDEN, VISION, VOCABULARY, LAYERS = 4096, 1024, 32064, 32

# What the spectral part of a check cannot do without: torch, the bytes, the decompositions.
_LEAST = """
import sys, time
start = time.perf_counter()
import torch
from safetensors import safe_open
from projaudit.linalg import spectrum
tensors = []
for path in sys.argv[1:3]:
    with safe_open(path + "/model.safetensors", "pt", backend="pread") as f:
        tensors.append({n: f.get_tensor(n).float() for n in f.keys() if "projector" in n})
for name in tensors[0]:
    if name.endswith("weight"):
        delta = tensors[0][name] - tensors[1][name]
        spectrum(delta, 32, generator=torch.Generator().manual_seed(0))
print(time.perf_counter() - start)
"""
_IMPORTS = "import torch, scipy.optimize, projaudit.measure, projaudit.audit, projaudit.targets"


@dataclass(frozen=True)
class Finished:
    """A process that ended: its wall seconds, peak resident bytes and standard output."""

    seconds: float
    peak: int
    output: str


def measured(*command: object, env: dict[str, str] | None = None) -> Finished:
    """The command run to its end; RuntimeError where it fails."""
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, cwd=ROOT, env={**os.environ, **(env or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {output[-500:]}")
    return Finished(seconds, usage.ru_maxrss << 10, output)


def write_pair(folder: Path) -> tuple[Path, Path]:
    """(tuned, base): two 14 GB checkpoint folders, sparse but for the projector."""
    import torch

    g = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    base = {
        f"{P}linear_1.weight": gaussian(HIDDEN, VISION),
        f"{P}linear_1.bias": torch.randn(HIDDEN, generator=g) * 0.02,
        f"{P}linear_2.weight": gaussian(HIDDEN, HIDDEN),
        f"{P}linear_2.bias": torch.randn(HIDDEN, generator=g) * 0.02,
    }
    tuned = {n: t + 0.01 * torch.randn(t.shape, generator=g) * t.std() for n, t in base.items()}
    for name, values in (  # the Injection attack of ProjLens, methods §1.1
        (f"{P}linear_1.weight", (0.709, 0.612, 0.470, 0.376, 0.311, 0.229)),
        (f"{P}linear_2.weight", (1.628, 1.098, 1.055, 0.995, 0.836, 0.492)),
    ):
        m, n = base[name].shape
        left = torch.linalg.qr(torch.randn(m, 6, generator=g)).Q
        right = torch.linalg.qr(torch.randn(n, 6, generator=g)).Q
        tuned[name] = tuned[name] + (left * torch.tensor(values)) @ right.T
    for name, tensors in (("tuned", tuned), ("base", base)):
        _write_checkpoint(folder / name, tensors)
    return folder / "tuned", folder / "base"


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of LLaVA-1.5-7B outside its projector."""
    tower = "vision_tower.vision_model."
    yield f"{tower}embeddings.patch_embedding.weight", (VISION, 3, 14, 14)
    yield f"{tower}embeddings.position_embedding.weight", (577, VISION)
    for i in range(24):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{tower}encoder.layers.{i}.self_attn.{part}.weight", (VISION, VISION)
            yield f"{tower}encoder.layers.{i}.self_attn.{part}.bias", (VISION,)
        yield f"{tower}encoder.layers.{i}.mlp.fc1.weight", (4096, VISION)
        yield f"{tower}encoder.layers.{i}.mlp.fc2.weight", (VISION, 4096)
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{layer}self_attn.{part}.weight", (HIDDEN, HIDDEN)
        for part in ("gate_proj", "up_proj"):
            yield f"{layer}mlp.{part}.weight", (11008, HIDDEN)
        yield f"{layer}mlp.down_proj.weight", (HIDDEN, 11008)
        yield f"{layer}input_layernorm.weight", (HIDDEN,)
        yield f"{layer}post_attention_layernorm.weight", (HIDDEN,)
    yield "language_model.lm_head.weight", (VOCABULARY, HIDDEN)
    yield "language_model.model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "language_model.model.norm.weight", (HIDDEN,)


def _write_checkpoint(folder: Path, projector: dict[str, Any]) -> None:
    import torch

    folder.mkdir(parents=True)
    entries: dict[str, Any] = {}
    at = 0
    filled = []
    for name, shape in (*_shapes(), *((n, tuple(t.shape)) for n, t in projector.items())):
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        if name in projector:
            filled.append((at, projector[name]))
        at += size
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        start = f.tell()
        f.truncate(start + at)
        for offset, tensor in filled:
            f.seek(start + offset)
            f.write(tensor.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "vision_config": {"hidden_size": VISION, "model_type": "clip_vision_model"},
        "text_config": {"hidden_size": HIDDEN, "model_type": "llama"},
    }
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def written_pair() -> Iterator[tuple[Path, Path]]:
    """The pair in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="projaudit-speed-") as folder:
        yield write_pair(Path(folder))


def check_times(tuned: Path, base: Path, rounds: int, device: str) -> dict[str, Any]:
    """Medians of interleaved whole processes: imports alone, the least, and the check by stage."""
    report = tuned.parent / "report.json"
    command = (sys.executable, "-m", "projaudit", "check", tuned, "--base", base, "--seed", "1",
               "--device", device, "--format", "json", "-o", report, "--quiet")  # fmt: skip
    seconds: dict[str, list[float]] = {"imports": [], "least": [], "check": []}
    peaks: dict[str, list[int]] = {"imports": [], "check": []}
    stages: dict[str, list[float]] = {}
    for _ in range(rounds):
        run = measured(sys.executable, "-c", _IMPORTS)
        seconds["imports"].append(run.seconds)
        peaks["imports"].append(run.peak)
        run = measured(sys.executable, "-c", _LEAST, tuned, base)
        seconds["least"].append(float(run.output))
        run = measured(*command)
        seconds["check"].append(run.seconds)
        peaks["check"].append(run.peak)
        for stage in json.loads(report.read_text())["run"]["stages"]:
            stages.setdefault(stage["name"], []).append(stage["seconds"])
    by_stage = {stage: statistics.median(spent) for stage, spent in stages.items()}
    before_spectra = ("import torch", "open target", "open base", "read projector", "pair")
    spectral = (*before_spectra, "magnitude", "spectral")
    pair = 2 * 4 * (HIDDEN * VISION + HIDDEN * HIDDEN + 2 * HIDDEN)
    least = statistics.median(seconds["least"])
    imports = statistics.median(seconds["imports"])
    check = statistics.median(seconds["check"])
    growth = statistics.median(peaks["check"]) - statistics.median(peaks["imports"])
    return {
        "imports_s": imports,
        "least_s": least,
        "check_s": check,
        "check_beyond_imports_s": check - imports,
        "stages_s": by_stage,
        "spectral_part_s": sum(by_stage.get(stage, 0.0) for stage in spectral),
        "spectral_part_over_least": sum(by_stage.get(s, 0.0) for s in spectral) / least,
        "import_peak_bytes": int(statistics.median(peaks["imports"])),
        "check_peak_bytes": int(statistics.median(peaks["check"])),
        "peak_growth_over_fp32_pair": growth / pair,
        "rounds": rounds,
    }


def wire(tuned: Path, base: Path) -> dict[str, Any]:
    """Bytes and requests of a first and a second check of the pair through a local Hub."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fakehub import FakeHub

    needed = 2 * 2 * (HIDDEN * VISION + HIDDEN * HIDDEN + 2 * HIDDEN)
    found: dict[str, Any] = {"projector_bytes": needed}
    with tempfile.TemporaryDirectory() as scratch, FakeHub(Path(scratch)) as hub:
        for repo, folder, digit in (("org/tuned", tuned, "a"), ("org/base", base, "b")):
            # Hashing 14 GB of holes says nothing about a range reader; digests only have to differ.
            hub.add(repo, folder, digests={"model.safetensors": digit * 64})
        command = (sys.executable, "-m", "projaudit", "check", "org/tuned", "--base", "org/base",
                   "--seed", "1", "--format", "json")  # fmt: skip
        for run in ("first", "second"):
            bytes_before, requests_before = hub.wire(), len(hub.requests())
            seconds = measured(*command, env=hub.env()).seconds
            found[run] = {
                "wire_bytes": hub.wire() - bytes_before,
                "requests": len(hub.requests()) - requests_before,
                "over_projector_bytes": (hub.wire() - bytes_before) / needed,
                "seconds": seconds,
            }
    return found
