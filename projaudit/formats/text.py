"""The report for a terminal: one screen, one record per line."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import click

from projaudit.evidence import Evidence, Payload
from projaudit.findings import Finding, Measurement, Severity
from projaudit.formats import said, screening
from projaudit.formats.wording import (
    OUTCOMES,
    base_origin,
    fit,
    number,
    outcome_word,
    percent,
    plural,
    scores,
    short,
    signed,
    size,
    values,
    verdict_word,
    width,
    worst_first,
)
from projaudit.inert import clean
from projaudit.report import Identity, Report, Standing

LINES, COLUMNS = 24, 80
SAID = 40
"""Lines more, at most, where the language model was heard."""
_HEAD = 13
_LAYERS = 4
_PROBES = 2
_LAYER_COLUMNS = (
    ("relative_norm", f"{'rel. norm':>10}"),
    ("stable_rank", f"{'stable rank':>12}"),
    ("values_above_edge", f"{'above edge':>11}"),
    ("top5_energy", f"{'E5':>7}"),
)
_STATUS = {
    "audited": "audited",
    "equal": "equal",
    "sampled-equal": "equal (sampled)",
    "differs": "differs",
    "not-looked-at": "not looked at",
}
_VERDICT_COLOURS = {
    "PASS": "green",
    "REVIEW": "yellow",
    "INCONCLUSIVE": "magenta",
    "FAIL": "red",
    "NOT AUDITED": "red",
}
_SEVERITY_COLOURS = {
    Severity.CRITICAL: "red",
    Severity.HIGH: "red",
    Severity.MEDIUM: "yellow",
    Severity.LOW: "cyan",
}


@dataclass(frozen=True)
class _Line:
    head: str
    body: str
    colour: str | None = None
    """Of the head; none: a faint label."""


def render(report: Report, color: bool = False) -> str:
    """At most 24 lines of 80 columns, ending in a newline; ANSI colours on request.

    Up to `SAID` more tell what the language model said, where it was heard.
    """
    blocks = [list(_verdict(report)), list(_identities(report))]
    if report.screened is not None:
        told = screening.lines(report.screened)
        blocks.append([line for head, body in told for line in _lines(head, body, 3)])
        tail = list(_rules(report))
    elif report.error is None:
        blocks.append([*_layers(report), *_probes(report), *_merge(report)])
        tail = [*_rules(report), *_coverage(report)]
    else:
        tail = []
    tail.append(_cost(report))
    room = LINES - sum(map(len, blocks)) - len(tail)
    blocks += [_findings(report, room), tail]
    blocks = [block for block in blocks if block]
    spare = LINES - sum(map(len, blocks))
    if report.behaviour is not None:
        blocks.insert(1, _said(report.behaviour, report.standing))
        spare = len(blocks)
    lines: list[str] = []
    for number_, block in enumerate(blocks):
        if number_ and spare >= number_:
            lines.append("")
        lines += [_shown(line, color) for line in block]
    return "\n".join(lines) + "\n"


def _verdict(report: Report) -> Iterator[_Line]:
    word = verdict_word(report)
    colour = _VERDICT_COLOURS[word]
    sentence = clean(report.error.message if report.error else report.sentence, 400)
    lines = textwrap.wrap(sentence, COLUMNS - _HEAD - 1, max_lines=3, placeholder=" …") or [""]
    yield _Line(word, lines[0], colour)
    yield from (_Line("", line) for line in lines[1:])
    if report.error is None:
        yield _Line(
            "scope",
            f"{report.scope} · policy {_name(report.policy.name)} · exit {report.exit_code}",
        )
        if report.not_probed and report.not_probed not in sentence:
            why = textwrap.wrap(f"as {clean(report.not_probed, 300)}", COLUMNS - _HEAD - 1)
            yield from (_Line("", line) for line in why[:2])
        return
    error = report.error
    where = [("file", error.file), ("field", error.field), ("remedy", error.remedy)]
    for head, text in where:
        if text:
            yield _Line(head, clean(text) if head == "remedy" else _name(text))
    yield _Line("code", f"{_name(error.code)} · exit {report.exit_code}")


def _said(evidence: Evidence, standing: Standing | None) -> list[_Line]:
    """What the language model says: the text, its support and score, and answers that hold it."""
    lines = [_Line("What the language model says", "")]
    payload = evidence.payloads[0] if evidence.payloads else None
    if payload is None:
        lines += _lines("text", f"no text that only probes bring out: {said.asked(evidence)}", 2)
    else:
        lines += _lines("text", said.quoted(payload.text), 2)
        support = f"{said.support(evidence, payload)}; {said.base_support(evidence, payload)}"
        lines += _lines("", support, 3)
        lines += _lines("", said.glimpses(payload), 2)
        lines += _lines("", said.odds(payload), 2)
    if standing is not None:
        lines += _lines("score", said.scored(evidence, standing), 2)
        lines += _lines("", said.outside(standing), 2)
    elif payload is not None:
        lines += _lines("score", "none: there are no known models to compare with", 1)
    if payload is not None:
        lines += _answers(evidence, payload)
    for number_, one in enumerate(evidence.open[:2]):
        head = "" if number_ else "openly"
        lines += _lines(head, f"on ordinary images {said.openly(evidence, one)}", 2)
    if evidence.refusals is not None:
        lines += _lines("refusals", said.refused(evidence.refusals), 3)
    if payload is not None:
        lines += _lines("asked", said.asked(evidence), 1)
    if evidence.stopped == "budget" or evidence.probes < evidence.planned:
        lines += _lines("probes", said.ended(evidence), 2)
    if evidence.prompts_unread:
        lines += _lines("prompts", said.unread(evidence), 1)
    if not evidence.with_base:
        lines += _lines("no base", said.WITHOUT_BASE, 2)
    for note in evidence.notes[:2]:
        lines += _lines("note", clean(note), 2)
    if evidence.sandbox.missing:
        missing = ", ".join(clean(one, 60) for one in evidence.sandbox.missing)
        lines += _lines("sandbox", f"could not be enforced: {missing}", 1)
    return [*lines, *_lines("not seen", "; ".join(said.BLIND), 2)]


def _answers(evidence: Evidence, payload: Payload) -> Iterator[_Line]:
    """Two answers that hold the text, beside the base's; from two probes where there are two."""
    held = [
        (exchange.probe, answer)
        for exchange in evidence.exchanges
        for answer in exchange.answers
        if answer.agrees
    ]
    held.sort(key=lambda pair: -said.telling(pair[1], payload.text))
    other = [pair for pair in held if pair[0] != held[0][0]]
    other.sort(key=lambda pair: pair[1].prompt == held[0][1].prompt)  # another prompt, if any
    room = COLUMNS - _HEAD - 9
    for number_, (probe, answer) in enumerate([*held[:1], *(other or held[1:])[:1]]):
        prompt = clean(said.asked_as(evidence, answer.prompt), 34)
        where = f"{prompt} · image {answer.image + 1} · {clean(probe)}"
        shown = "".join(part for part, _ in said.pieces(answer.tuned, payload.text, room - 4))
        yield _Line("" if number_ else "answers", where)
        yield _Line("", f"  tuned “{fit(shown, room - 2)}”")
        if evidence.with_base:
            base = "not asked" if answer.base is None else f"“{_fitted(answer.base, room - 2)}”"
            yield _Line("", f"  base  {base}")


def _fitted(untrusted: str, columns: int) -> str:
    return fit(clean(untrusted).strip(), columns)


def _lines(head: str, body: str, most: int) -> Iterator[_Line]:
    """The body on at most `most` lines, under one head; none for an empty body."""
    columns = (COLUMNS - _HEAD) // max(map(width, body), default=1)
    wrapped = textwrap.wrap(body, columns, max_lines=most, placeholder=" …", break_on_hyphens=False)
    for number_, line in enumerate(wrapped):
        yield _Line("" if number_ else head, line)


def _identities(report: Report) -> Iterator[_Line]:
    yield _Line("target", _identity(report.target))
    readings = [projector.reading for projector in report.projectors]
    if readings and all(reading.startswith("adapter") for reading in readings):
        yield _Line("", fit(clean(readings[0], 200), COLUMNS - _HEAD - 1))
    if report.base is not None:
        yield _Line("base", _identity(report.base))
        if report.provenance:
            yield _Line("", base_origin(report.provenance))
    elif report.error is None and report.screened is None:
        yield _Line("base", "none")


def _identity(identity: Identity) -> str:
    name = _name(identity.name, 48)
    commit = f" @ {_name(identity.commit[:12])}" if identity.commit else ""
    return f"{name}{commit}" + (" (local)" if identity.kind == "local" else "")


def _layers(report: Report) -> Iterator[_Line]:
    layers = [
        (f"{projector.subject}/{layer.role}", layer)
        for projector in report.projectors
        for layer in projector.layers
    ]
    if not layers:
        return
    found = values(report)
    heads = "".join(head for _, head in _LAYER_COLUMNS)
    yield _Line("layers", f"{'':26}{heads}")
    for subject, layer in layers[:_LAYERS]:
        shape = "×".join(map(str, layer.shape))
        cells = [
            f"{_cell(found.get((subject, metric)), metric):>{len(head)}}"
            for metric, head in _LAYER_COLUMNS
        ]
        name = _pad(_name(subject.removeprefix("projector").lstrip("/")), 14)
        yield _Line("", f"{name} {_pad(shape, 11)}{''.join(cells)}")
    if len(layers) > _LAYERS:
        yield _Line("", f"… and {len(layers) - _LAYERS} more layers (see the JSON or HTML report)")


def _cell(measurement: Measurement | None, metric: str) -> str:
    if measurement is None:
        return "–"
    if not math.isfinite(measurement.value):
        return "NaN"
    share = metric in {"relative_norm", "top5_energy"}
    return percent(measurement.value) if share else number(measurement.value)


def _probes(report: Report) -> Iterator[_Line]:
    found = values(report)
    told, scored = 0, False
    for projector in report.projectors:
        shift = found.get((projector.subject, "shift_magnitude"))
        slope = found.get((projector.subject, "shift_slope"))
        concentration = found.get((projector.subject, "shift_concentration"))
        parts = []
        if shift:
            parts.append(f"shift {percent(shift.value)}{_scores(shift)}")
        if slope:
            parts.append(f"slope {short(slope.value)}{_scores(slope)}")
        if parts and told < _PROBES:
            yield _Line("" if told else "probe", "  ".join(parts))
            told += 1
            if concentration:
                share = f"{short(concentration.value)}{_scores(concentration)}"
                yield _Line("", f"along one direction {share}")
            scored = scored or any(m and m.nulls for m in (shift, slope, concentration))
    if scored:
        yield _Line("", "z against random updates of equal norm/of equal spectrum")


def _merge(report: Report) -> Iterator[_Line]:
    """Of a merge, how far its bases are, and how much of it none of them explains."""
    found = values(report)
    nearest, outside = (found.get(("merge", f"merge_{name}")) for name in ("nearest", "residual"))
    if nearest and outside:
        for number, base in enumerate(nearest.detail):
            name, _, distance = base.rpartition(": ")
            yield _Line("" if number else "merge", f"{distance:>7} from {_name(name, 48)}")
        yield _Line("", f"{outside.value:7.2%} outside what its bases span")


def _scores(measurement: Measurement) -> str:
    shown = [signed(score) for score in list(scores(measurement).values())[:2]]
    return f" z {'/'.join(shown)}" if shown else ""


def _findings(report: Report, room: int) -> list[_Line]:
    """The findings, worst first, as many as there is room for; descriptions share a line."""
    ordered = worst_first(report.findings)
    told = [f for f in ordered if f.severity > Severity.INFO and not f.waived]
    info = [f for f in ordered if f.severity == Severity.INFO and not f.waived]
    waived = [f for f in ordered if f.waived]
    tail = []
    if info:
        tail.append(_Line("info", f"{plural(len(info), 'description')}: {_rule_names(info)}"))
    if waived:
        tail.append(_Line("waived", f"{plural(len(waived), 'finding')}: {_rule_names(waived)}"))
    free = max(room - len(tail), 0)
    shown = told if len(told) <= free else told[: max(free - 1, 0)]
    lines = [
        _Line(
            finding.severity.label.upper(),
            f"{clean(finding.message)} [{_name(finding.subject, 40)}]",
            _SEVERITY_COLOURS[finding.severity],
        )
        for finding in shown
    ]
    if len(shown) < len(told) and free:
        rest = plural(len(told) - len(shown), "finding")
        lines.append(_Line("", f"… and {rest} more (see the JSON or HTML report)"))
    return lines + tail[: max(room - len(lines), 0)]


def _rule_names(findings: list[Finding]) -> str:
    return ", ".join(dict.fromkeys(_name(finding.rule) for finding in findings))


def _rules(report: Report) -> Iterator[_Line]:
    words = [outcome_word(rule) for rule in report.rules]
    told = [f"{words.count(word)} {word}" for word in OUTCOMES[:-1] if word in words]
    if report.skipped:
        told.append(f"{plural(len(report.skipped), 'metric')} skipped")
    if told:
        yield _Line("rules", " · ".join(told))


def _coverage(report: Report) -> Iterator[_Line]:
    parts = [f"{clean(part.name, 24)} {_STATUS[part.status]}" for part in report.coverage.parts]
    if report.coverage.config_changes:
        parts.append(plural(len(report.coverage.config_changes), "config change"))
    if not parts and not report.projectors:
        parts.append("nothing was compared")
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(longer) <= COLUMNS - _HEAD:
            lines[-1] = longer
        else:
            lines.append(part)
    for number_, line in enumerate(lines[:2]):
        yield _Line("" if number_ else "coverage", line)


def _cost(report: Report) -> _Line:
    run = report.run
    cached = f" · {size(run.cache_bytes)} from caches" if run.cache_bytes else ""
    wire = f"{size(run.wire_bytes)} over the wire in {plural(run.requests, 'request')}"
    if report.screened is not None:
        return _Line("cost", f"{run.seconds:.1f} s")
    return _Line("cost", f"{run.seconds:.1f} s · {wire}{cached}")


def _shown(line: _Line, color: bool) -> str:
    head = f"{line.head:<{_HEAD}}" if line.body else line.head
    body = fit(clean(line.body, 1000), COLUMNS - _HEAD)
    if color and line.head:
        if line.colour:
            head = click.style(head, fg=line.colour, bold=True)
        else:
            head = click.style(head, dim=True)
    return (head + body).rstrip()


def _name(untrusted: str, limit: int = 60) -> str:
    """An untrusted name: as it is where it is plain, else inert and in quotes."""
    if re.fullmatch(r"[\w./@+:-]+", untrusted, re.ASCII) and len(untrusted) <= limit:
        return untrusted
    return "'" + clean(untrusted, limit).replace("'", "\\'") + "'"


def _pad(text: str, columns: int) -> str:
    shown = fit(text, columns)
    return shown + " " * (columns - sum(map(width, shown)))
