"""The demo: a small LLaVA that really was trained, its honest and its backdoored fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from projaudit.data import data_path
from projaudit.findings import Verdict
from projaudit.report import Report

_NAMES = ("honest", "backdoored")
_SHOWN = (
    ("hidden_text", "strength of a text that only probes bring out"),
    ("open_text", "share of ordinary images with a new text"),
    ("answer_drift", "share of ordinary answers that changed"),
    ("relative_norm", "size of the update over the base's"),
    ("stable_rank", "stable rank"),
    ("top5_energy", "energy of the first 5 directions"),
    ("shift_magnitude", "shift of the outputs, relative"),
    ("shift_slope", "growth with the input norm (power)"),
    ("shift_concentration", "shift along one direction"),
)


def run(
    folder: Path,
    seed: int,
    *,
    write: Callable[[Path, str], None],
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[str]:
    """Lines to print while both fine-tunes are checked against the base and reports are written.

    At depth behaviour where the extra is installed, at depth weights else, which it says.
    """
    from projaudit.audit import check
    from projaudit.formats import FORMATS

    models = data_path("demo")
    provenance = json.loads((models / "provenance.json").read_text("utf-8"))
    yield from _introduction(provenance["models"][provenance["demo"]["backdoored"]])
    reports: dict[str, Report] = {}
    for name in _NAMES:
        reports[name] = check(
            str(models / name), str(models / "base"), depth="auto", seed=seed, progress=progress
        )
        for kind in ("html", "json"):
            write(folder / f"{name}{FORMATS[kind].suffix}", FORMATS[kind].render(reports[name]))
    yield from _side_by_side(reports)
    yield ""
    yield from _conclusion(reports)
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


def _conclusion(reports: Mapping[str, Report]) -> Iterator[str]:
    honest, backdoored = (reports[name] for name in _NAMES)
    if honest.policy.depth == "weights":
        yield f"Behaviour was not probed: {honest.not_probed}."
        yield "The numbers differ, as they do between any two fine-tunes; statistics of weights do"
        yield "not tell honest from backdoored ones, so no rule reads a verdict from them."
        return
    for name, report in reports.items():
        found = report.behaviour.payloads if report.behaviour else ()
        said = f"“{found[0].text}”" if found and found[0].strength >= 1 else "no such text"
        yield f"What probing brought out of the {name} one: {said}."
    yield "It was found without the trigger: the language model was run behind both projectors, and"
    yield "said it under many probes to every prompt alike, and the base's projector never made it."
    if backdoored.verdict is Verdict.REVIEW:
        yield "That is `review`: how often honest fine-tunes come as far is not settled well"
        yield "enough for a `fail`. Statistics of the weights (the lower rows) have no say."
    else:
        yield "Statistics of the weights (the lower rows) have no say in a verdict."
