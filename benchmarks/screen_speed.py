"""What the attention pass of `projaudit screen` costs beside the papers' way: ratios of medians.

    python -m benchmarks.screen_speed                        # a small LLaVA, CPU
    python -m benchmarks.screen_speed --device cuda --size 7b

All ways read the same batches with the same weights: random ones in LLaVA-1.5's shape of input, 576
image tokens and some 60 of text. The papers' way is an eager model that returns its whole maps,
which are then summed up as ours are. Memory is that of whole processes over more and more samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.behaviour_cost import SIZES, TOKENIZER, build
from benchmarks.timing import RESULTS, interleaved, machine, table, warn_if_busy, write_results
from projaudit.screen.attention import attend, members_of, reduced, rows_at
from projaudit.screen.model import Loaded
from projaudit.screen.samples import Sample
from projaudit.screen.spans import Batch, encode

SIZES["small"] = ((256, 688, 8, 8), (64, 2, 4, 336, 14))
SAMPLES = (64, 512)
"""Of the processes whose memory is compared."""


def batch_of(loaded: Loaded, count: int, positions: int) -> Batch:
    """Samples of one image size with questions and answers of different lengths."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            number,
            str(number),
            image=Image.fromarray(rng.integers(0, 255, (336, 336, 3), np.uint8)),
            after="what color is the circle " * (1 + number % 3),
            answer="red and blue " * (4 + number % 3),
        )
        for number in range(count)
    ]
    batch, _ = encode(loaded.processor, samples, loaded.image_token, positions, loaded.longest)
    assert batch is not None
    return batch


def ways(loaded: Loaded, batch: Batch) -> dict[str, Any]:
    """The ways to run, by name; each sets the attention that it needs."""
    model = loaded.model
    inputs = {
        name: v.to(loaded.device, model.dtype if v.is_floating_point() else None)
        for name, v in batch.inputs.items()
    }
    rows, members = rows_at(batch, loaded.device), members_of(batch, loaded.device)

    @torch.inference_mode()
    def plain(attention: str) -> None:
        model.set_attn_implementation(attention)
        model(**inputs, use_cache=False, logits_to_keep=1)

    def ours(attention: str) -> None:
        model.set_attn_implementation(attention)
        attend(loaded, batch)

    @torch.inference_mode()
    def papers() -> None:
        model.set_attn_implementation("eager")
        maps = model(**inputs, use_cache=False, logits_to_keep=1, output_attentions=True).attentions
        for number, whole in enumerate(maps):
            places = rows[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
            reduced(number, whole.gather(2, places).float(), members)

    return {
        "plain eager forward": lambda: plain("eager"),
        "plain sdpa forward": lambda: plain("sdpa"),
        "attention pass, sdpa": lambda: ours("sdpa"),
        "attention pass, eager": lambda: ours("eager"),
        "papers' way": papers,
    }


def memory(folder: Path) -> list[dict[str, Any]]:
    """Peak memory of processes that profile more and more samples with the testbed's model."""
    found = []
    for count in SAMPLES:
        code = (
            "import resource, sys\n"
            "from projaudit.screen.spread import spread\n"
            "from projaudit.screen.profiles import write_part\n"
            "from projaudit.screen.work import Job\n"
            "from pathlib import Path\n"
            f"job = Job({str(TOKENIZER)!r}, {str(folder / 'data.jsonl')!r}, None, None, 16, 8,"
            f" {count}, False, 64, '')\n"
            f"out = Path({str(folder)!r}) / 'out{count}'\n"
            "out.mkdir()\n"
            f"for part in spread(job, range(0, {count}, 64), ['cpu']): write_part(out, part)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        found.append({"samples": count, "peak MiB": round(int(done.stdout) / 1024)})
    return found


def write_samples(folder: Path) -> None:
    """As many samples as the largest process reads, all of one image."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "0.png")
    row = {
        "image": "0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat color is the circle"},
            {"from": "gpt", "value": "red and blue and red and blue"},
        ],
    }
    (folder / "data.jsonl").write_text((json.dumps(row) + "\n") * max(SAMPLES))


def main(argv: list[str] | None = None) -> None:
    """Times the ways in turn, measures memory, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screen_speed")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    before = machine(device)
    warn_if_busy()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    speaker = build(args.size, device, dtype)
    loaded = Loaded(
        speaker.model, speaker.processor, device, speaker.model.config.image_token_id, 4096, {}
    )
    batch = batch_of(loaded, args.batch, args.positions)
    runs = ways(loaded, batch)
    for run in runs.values():
        run()
    taken = interleaved(runs, args.rounds)
    base = taken["plain eager forward"]
    rows = [
        {
            "way": name,
            "ms": f"{took.wall * 1e3:.0f}",
            "ratio": f"{took.wall / base.wall:.2f}",
            "CPU ms": f"{took.cpu * 1e3:.0f}",
            "CPU ratio": f"{took.cpu / base.cpu:.2f}",
        }
        for name, took in taken.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder))
        peaks = memory(Path(folder))
    shape = tuple(batch.inputs["input_ids"].shape)
    text = [
        "# The attention pass of `projaudit screen`",
        "",
        f"{before['cpu']}, {before['cores']} cores, {before['threads']} threads, "
        f"{before['device']}, torch {before['torch']}, load average "
        f"{before['load_average'][0]:.1f} before. A LLaVA of random weights, size {args.size}, "
        f"{dtype}; {shape[0]} samples of at most {shape[1]} tokens, {args.positions} positions. "
        f"Medians of {args.rounds} interleaved runs; ratio: over the plain eager forward (aim: "
        "1.3). CPU: of all threads; of one thread, it is what a busy machine leaves comparable.",
        "",
        table(rows, ["way", "ms", "ratio", "CPU ms", "CPU ratio"]),
        "",
        "Peak memory of a whole process that profiles so many samples with the testbed's model:",
        "",
        table(peaks, ["samples", "peak MiB"]),
    ]
    write_results(
        args.output, "screen-speed", text, {"machine": before, "rows": rows, "memory": peaks}
    )


if __name__ == "__main__":
    main()
