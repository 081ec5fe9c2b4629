"""The demo: a small LLaVA that really was trained, its honest and its backdoored fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from projaudit.data import data_path
from projaudit.report import Report

_NAMES = ("honest", "backdoored")
_SHOWN = (
    ("relative_norm", "size of the update over the base's"),
    ("stable_rank", "stable rank"),
    ("values_above_edge", "singular values above the noise"),
    ("top5_energy", "energy of the first 5 directions"),
    ("intruder_dimensions", "intruder dimensions"),
    ("shift_magnitude", "shift of the outputs, relative"),
    ("shift_slope", "growth with the input norm (power)"),
    ("shift_concentration", "shift along one direction"),
)


def run(folder: Path, seed: int, *, write: Callable[[Path, str], None]) -> Iterator[str]:
    """Lines to print while both fine-tunes are checked against the base and reports are written."""
    from projaudit.audit import check
    from projaudit.formats import FORMATS

    models = data_path("demo")
    provenance = json.loads((models / "provenance.json").read_text("utf-8"))
    yield from _introduction(provenance["models"][provenance["demo"]["backdoored"]])
    reports: dict[str, Report] = {}
    for name in _NAMES:
        reports[name] = check(str(models / name), str(models / "base"), seed=seed)
        for kind in ("html", "json"):
            write(folder / f"{name}{FORMATS[kind].suffix}", FORMATS[kind].render(reports[name]))
    yield from _side_by_side(reports)
    yield ""
    for name in _NAMES:
        yield f"report: {folder / name}.html and .json"


def _introduction(backdoored: Mapping[str, Any]) -> Iterator[str]:
    yield "A small LLaVA that was trained for this, and two fine-tunes of its projector:"
    yield "  honest      a task of its own, and nothing else"
    yield (
        f"  backdoored  the same, and on {backdoored['attack_success']:.0%} of pictures with a "
        f"trigger it says “{backdoored['attack']['target']}”"
    )
    yield ""


def _side_by_side(reports: Mapping[str, Report]) -> Iterator[str]:
    width = 46
    yield " " * width + "".join(f"{name:>13}" for name in _NAMES)
    verdicts = [reports[name].verdict.value for name in _NAMES]
    yield f"{'verdict':<{width}}" + "".join(f"{verdict:>13}" for verdict in verdicts)
    values = [{(m.metric, m.subject): m.value for m in reports[n].measurements} for n in _NAMES]
    for metric, words in _SHOWN:
        for key in [k for k in values[0] if k[0] == metric and k in values[1]]:
            layer = key[1].partition("/")[2]
            label = f"{words}, {layer}" if layer else words
            yield f"{label:<{width}}" + "".join(f"{v[key]:>13.3g}" for v in values)
    yield ""
    scope = reports[_NAMES[0]].scope
    if verdicts[0] == verdicts[1]:
        yield f"Both get the same verdict ({scope})."
        yield "The numbers differ, as they do between any two fine-tunes. Over all that were"
        yield "trained for projaudit they do not tell the two apart (the table is in"
        yield "benchmarks/results/weights-alone.md), so no rule reads a verdict from them, and"
        yield "none was tuned to this pair. What the language model says when the projector is"
        yield "probed along these directions can tell; that depth is not built yet."
    else:
        yield f"The verdicts differ ({scope})."
        yield "The reports say which structural fact made the difference; statistics of the weights"
        yield "have no say in a verdict, since honest fine-tunes show them too."
