"""A repair as text, as JSON, and as a page: what was, what was done, and what is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from projaudit.formats import FORMATS
from projaudit.formats.charts import Chart, charts
from projaudit.formats.html import templates
from projaudit.formats.wording import number, percent, plural, values, verdict_word
from projaudit.inert import clean
from projaudit.repair.files import MODEL
from projaudit.repair.outcome import Repair
from projaudit.report import Report

SCHEMA = "1.0.0"
_ROWS = (
    ("hidden_text", "strength of a text that only probes bring out"),
    ("open_text", "share of ordinary images with a text not the base's"),
    ("answer_drift", "share of ordinary answers unlike the base's"),
    ("relative_norm", "size of the update over the base's"),
    ("stable_rank", "stable rank of the update"),
    ("shift_magnitude", "shift of the outputs, relative"),
)
_COLUMN = 14
_WIDE = 52


def render_text(done: Repair) -> str:
    """Some lines of 80 columns, ending in a newline."""
    return "\n".join(_lines(done)) + "\n"


def _lines(done: Repair) -> Iterator[str]:
    yield f"{done.outcome.upper()}: {clean(done.sentence, 600)}"
    yield ""
    yield f"target    {clean(done.before.target.name)}"
    if done.before.base is not None:
        yield f"base      {clean(done.before.base.name)}"
    if done.method is not None:
        by = "you named it" if done.method.asked else "chosen by what the model says"
        yield f"taken out {done.method.words}"
        yield f"          {done.method.name}:{done.method.amount:g}, {by}"
    yield ""
    yield f"{'':<{_WIDE}}{'before':>{_COLUMN}}" + (f"{'after':>{_COLUMN}}" if done.after else "")
    for label, cells in rows(done):
        yield f"{label:<{_WIDE}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)
    if done.mended is not None and done.mended.tried:
        yield ""
        yield "what ended the text, and the ordinary answers that stay:"
        for one in done.mended.tried:
            yield f"  {one.method + ':' + format(one.amount, 'g'):<18}{percent(one.kept):>8}"
    yield ""
    of_model = [file for file in done.written if file.path.startswith(f"{MODEL}/")]
    for file in done.written:
        if file not in of_model:
            yield f"written   {clean(file.path)}  sha256 {file.sha256[:16]}…"
    if of_model:
        yield f"          {MODEL}/, of {plural(len(of_model), 'file')}"
    if not done.written:
        yield "written   no projector"


def rows(done: Repair) -> list[tuple[str, list[str]]]:
    """Label and cells of before and after, of the verdict and of what both audits measured."""
    reports = [report for report in (done.before, done.after) if report is not None]
    found = [("verdict", [verdict_word(report).lower() for report in reports])]
    measured = [values(report) for report in reports]
    for metric, words in _ROWS:
        for key in [key for key in measured[0] if key[1] == metric]:
            layer = key[0].partition("/")[2]
            cells = [number(of[key].value) if key in of else "–" for of in measured]
            found.append((f"{words}, {layer}" if layer else words, cells))
    return found


def render_json(done: Repair) -> str:
    """A JSON document; both audits stand in it as `projaudit check` writes them."""

    def audit(report: Report | None) -> Any:
        return None if report is None else json.loads(FORMATS["json"].render(report))

    before, after = done.strengths
    content: Mapping[str, Any] = {
        "schema_version": SCHEMA,
        "outcome": done.outcome,
        "exit_code": done.exit_code,
        "sentence": clean(done.sentence, 600),
        "texts": [clean(text, 600) for text in done.texts],
        "strength": {"before": before, "after": after},
        "method": None
        if done.method is None
        else {**asdict(done.method), "removed": done.method.words},
        "chosen": None if done.mended is None else _chosen(done),
        "written": [asdict(file) for file in done.written],
        "before": audit(done.before),
        "after": audit(done.after),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _chosen(done: Repair) -> dict[str, Any]:
    assert done.mended is not None
    return {
        "texts": [clean(text, 600) for text in done.mended.texts],
        "strengths": list(done.mended.strengths),
        "tried": [asdict(one) for one in done.mended.tried],
        "answers": done.mended.answers,
        "notes": [clean(note, 600) for note in done.mended.notes],
        "sandbox": asdict(done.mended.sandbox),
    }


def render_html(done: Repair) -> str:
    """The page, ending in a newline; every name in it is inert."""
    page = templates().get_template("repair.html.j2")
    return page.render(done=done, rows=rows(done), pictures=_pictures(done)) + "\n"


def _pictures(done: Repair) -> list[tuple[Chart, Chart | None]]:
    """The spectra of the update, before and after."""
    before, after = (
        [] if report is None else [c for c in charts(report) if c.kind == "spectrum"]
        for report in (done.before, done.after)
    )
    others = {chart.subject: chart for chart in after}
    return [(chart, others.get(chart.subject)) for chart in before]
