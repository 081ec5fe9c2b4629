"""The demo: a small LLaVA that really was trained, its honest and its backdoored fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from projaudit.data import data_path
from projaudit.report import Report

SHOWN = (
    ("relative_norm", "size of the update / base"),
    ("stable_rank", "stable rank"),
    ("top5_energy", "energy of 5 directions"),
    ("values_above_edge", "values above the noise"),
    ("intruder_dimensions", "intruder dimensions"),
    ("shift_magnitude", "shift / output, typical norm"),
    ("shift_slope", "growth with the input norm"),
    ("shift_concentration", "shift in one direction"),
)


def run(
    folder: Path,
    seed: int,
    *,
    write: Callable[[Path, str], None],
    check_writable: Callable[[Path], None],
) -> Iterator[str]:
    """Lines to print: both audits side by side, and where their HTML and JSON reports are."""
    from projaudit.audit import check
    from projaudit.formats import FORMATS

    models = data_path("demo")
    provenance = json.loads((models / "provenance.json").read_text("utf-8"))
    names = ("honest", "backdoored")
    files = {(n, f): folder / f"{n}{FORMATS[f].suffix}" for n in names for f in ("html", "json")}
    for file in files.values():
        check_writable(file)
    reports = {}
    for name in names:
        reports[name] = check(str(models / name), str(models / "base"), seed=seed)
        for fmt in ("html", "json"):
            write(files[name, fmt], FORMATS[fmt].render(reports[name]))
    yield from _table(reports, provenance)
    yield ""
    for name in names:
        yield f"report    {files[name, 'html']}  (and {files[name, 'json'].name})"


def _table(reports: dict[str, Report], provenance: dict[str, object]) -> Iterator[str]:
    honest, backdoored = reports["honest"], reports["backdoored"]
    yield f"{'':<40} {'honest':>14} {'backdoored':>14}"
    yield f"{'verdict':<40} {honest.verdict.value:>14} {backdoored.verdict.value:>14}"
    yield f"  {honest.scope}"
    for metric, words in SHOWN:
        ours = {m.subject: m.value for m in honest.measurements if m.metric == metric}
        theirs = {m.subject: m.value for m in backdoored.measurements if m.metric == metric}
        for subject in ours.keys() & theirs.keys():
            layer = subject.partition("/")[2]
            label = f"{words}{', ' + layer if layer else ''}"
            yield f"{label:<40} {ours[subject]:>14.3g} {theirs[subject]:>14.3g}"
    return
