"""What timings are made of: runs by turns, the machine, tables and where they are written."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CALM = 0.7
"""Load average above which wall-clock times say more about the machine than about the code."""

Row = dict[str, Any]


def machine(device: torch.device) -> Row:
    """What the timings depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
    }


@dataclass(frozen=True)
class Taken:
    """What a run took. CPU seconds are of all threads; with one thread they bear a busy machine."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> tuple[Taken, Any]:
    """(seconds, result) of one run, device work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Taken(time.perf_counter() - start, time.process_time() - cpu), result


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Taken]:
    """Medians of each run, taking turns so that all see the same disturbances."""
    taken: dict[str, list[Taken]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(timed(run)[0])
    return {
        name: Taken(statistics.median(t.wall for t in all_), statistics.median(t.cpu for t in all_))
        for name, all_ in taken.items()
    }


def warn_if_busy() -> None:
    """One line where something else is running already."""
    load = os.getloadavg()[0]
    if load > CALM:
        print(f"warning: load average {load:.1f} before the start: wall-clock times mean little")


def table(rows: list[Row], columns: list[str]) -> str:
    """A Markdown table of `columns`; what a row lacks is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(c, "–")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_results(folder: Path, name: str, text: list[str], data: Row) -> None:
    """The table as Markdown, and its numbers as JSON beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(text) + "\n")
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(text))
