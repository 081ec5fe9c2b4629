"""The report as one self-contained page: no script, no request, every name inert."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from projaudit.data import data_path
from projaudit.findings import Finding, Measurement, Severity
from projaudit.formats import said, screening
from projaudit.formats.charts import charts, left_out, standing_chart
from projaudit.formats.exchanges import ANSWER, exchanges
from projaudit.formats.wording import (
    NULLS,
    OUTCOMES,
    STATUS,
    base_origin,
    meaning,
    number,
    outcome_word,
    percent,
    plural,
    signed,
    size,
    verdict_word,
    worst_first,
)
from projaudit.inert import clean
from projaudit.report import Identity, Report, RuleOutcome
from projaudit.screened import Screened

if TYPE_CHECKING:
    from jinja2 import Environment

_TEXT_LIMIT = 1000
_HUB = "https://huggingface.co"
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}(?:v\d{1,2})?)", re.ASCII)
_SAMPLES = 25
"""Samples of each fate that are shown."""
_OPTIONS = ("seed", "rank", "verify", "device", "policy", "rules", "direction", "target-text")


@dataclass(frozen=True)
class _Subject:
    """The measurements of one subject, as a table."""

    name: str
    rows: tuple[Measurement, ...]


def render(report: Report) -> str:
    """The HTML document, ending in a newline."""
    kinds = {null.kind for measurement in report.measurements for null in measurement.nulls}
    page = templates().get_template("report.html.j2")
    return (
        page.render(
            report=report,
            word=verdict_word(report),
            meaning=meaning(report),
            origin=base_origin(report.provenance) if report.provenance else "",
            charts=charts(report),
            evidence=report.behaviour,
            exchanges=exchanges(report.behaviour) if report.behaviour else [],
            standing=report.standing,
            standing_chart=standing_chart(report.standing) if report.standing else None,
            charts_left_out=left_out(report),
            looked=_looked(report),
            not_looked=_not_looked(report),
            parts=report.coverage.parts,
            shares=_shares(report),
            differences=_differences(report),
            findings=[f for f in worst_first(report.findings) if not _describes(f)],
            descriptions=[f for f in worst_first(report.findings) if _describes(f)],
            outcomes=_outcomes(report.rules),
            subjects=_subjects(report.measurements),
            null_kinds=[k for k in NULLS if k in kinds] + sorted(kinds - set(NULLS)),
            command=command(report),
            **_screening(report.screened),
        )
        + "\n"
    )


def _screening(screened: Screened | None) -> dict[str, Any]:
    """What the section of a screening is made of; only that there is none, for an audit."""
    if screened is None:
        return {"screened": None}
    tables = [
        (
            words,
            [s for s in screened.shown if s.fate == fate][:_SAMPLES],
            screened.fates.get(fate, 0),
        )
        for fate, words in screening.FATES.items()
        if fate != "keep"
    ]
    return {
        "screened": screened,
        "screening": screening,
        "fates": screening.FATES,
        "sample_tables": [table for table in tables if table[1]],
        "histograms": screening.charts(screened),
        "heat_maps": screening.pictures(screened.heat),
        "pieces": lambda sample: said.pieces(sample.answer, sample.text, ANSWER),
    }


def command(report: Report) -> str:
    """The command that audits the same bytes again with the same draws, quoted for a shell."""
    if report.screened is not None:
        return _quoted(screening.command(report))
    options = []
    if report.base is not None:
        options += ["--base", _reference(report.base)]
    if report.provenance is not None and report.provenance.verified:
        for claim in report.provenance.claims[1:]:  # a merge's other bases
            options += ["--base", claim.repo]
    for name in _OPTIONS:
        value = report.settings.get(name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and (name, one) != ("policy", "structure"):  # applied unasked
                options += [f"--{name}", str(one)]
    if report.policy.fail_on != "fail":
        options += ["--fail-on", report.policy.fail_on]
    if report.policy.exit_zero:
        options.append("--exit-zero")
    words = ["projaudit", "check", *options, "--", _reference(report.target)]
    hubs = [i.endpoint for i in (report.target, report.base) if i and i.kind == "hub"]
    elsewhere = [hub for hub in hubs if hub and hub.rstrip("/") != _HUB]
    prefix = f"HF_ENDPOINT={shlex.quote(clean(elsewhere[0]))} " if elsewhere else ""
    return prefix + _quoted(words)


def _quoted(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(clean(word, _TEXT_LIMIT)) for word in words)


def _reference(identity: Identity) -> str:
    return f"{identity.name}@{identity.commit}" if identity.commit else identity.name


def templates() -> Environment:
    """The page templates: autoescape on, and every value inert before that."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def inert(value: Any) -> Any:
        """What every `{{ }}` passes: text is cleaned, then escaped by autoescape."""
        return value if isinstance(value, Markup) else clean(value, _TEXT_LIMIT)

    environment = Environment(
        loader=FileSystemLoader(data_path("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=inert,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "excerpt": clean,
        "drawn": Markup,  # only for pictures that formats/svg.py finished
        "number": number,
        "percent": percent,
        "size": size,
        "plural": plural,
        "signed": signed,
        "hub_link": _hub_link,
        "method_word": screening.METHODS.get,
        "whole": Markup,  # only for what formats/screening.py made
        "paper_link": _paper_link,
        "sentence_case": _sentence_case,
    }
    environment.globals |= {"status_words": STATUS, "null_words": NULLS, "said": said}
    return environment


def _sentence_case(text: str) -> str:
    """The text, inert, with a capital first; inert before that, or a secret would be missed."""
    shown = clean(text, _TEXT_LIMIT)
    return shown[:1].upper() + shown[1:]


def _hub_link(identity: Identity) -> str:
    """The commit's page on the Hub; empty for every other place and for odd names."""
    official = identity.kind == "hub" and (identity.endpoint or "").rstrip("/") == _HUB
    commit = identity.commit or ""
    if not (official and _REPOSITORY.fullmatch(identity.name)):
        return ""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return ""
    return f"{_HUB}/{identity.name}/tree/{commit}"


def _paper_link(reference: str) -> str:
    """The paper's page for an arXiv reference; empty for every other text."""
    match = _ARXIV.fullmatch(reference)
    return f"https://arxiv.org/abs/{match[1]}" if match else ""


def _describes(finding: Finding) -> bool:
    return finding.severity == Severity.INFO and not finding.inconclusive and not finding.waived


def _looked(report: Report) -> list[str]:
    """What the verdict rests on."""
    told = list(screening.looked(report.screened)) if report.screened else []
    told += [
        f"Projector{projector.subject.removeprefix('projector')}: family {projector.family}, "
        f"{projector.in_features} → {projector.out_features} features, "
        f"{plural(len(projector.layers), 'linear layer')}, every weight compared with the base"
        for projector in report.projectors
    ]
    read = sum(tensor.stop - tensor.start for tensor in report.tensors)
    if report.tensors:
        told.append(f"{plural(len(report.tensors), 'tensor')} read, {size(read)} in both models")
    if report.measurements:
        told.append(f"{plural(len(report.measurements), 'measurement')} taken")
    if report.rules:
        decided = [r for r in report.rules if r.outcome in {"fired", "quiet"}]
        told.append(f"{len(decided)} of {plural(len(report.rules), 'rule')} decided")
    told += [
        f"{part.name}: {STATUS[part.status]} ({part.how})"
        for part in report.coverage.parts
        if part.status in {"equal", "sampled-equal", "differs"}
    ]
    if report.coverage.files_equal:
        told.append(f"{plural(report.coverage.files_equal, 'file')} equal to the base's")
    if report.behaviour is not None:
        told.append(f"Behaviour: {said.asked(report.behaviour)}")
    return told


def _not_looked(report: Report) -> list[str]:
    """What the verdict does not rest on."""
    told = []
    if report.error is not None:
        told.append("Everything: the audit ended before a verdict")
    evidence = report.behaviour
    if report.screened is not None:
        told += screening.not_looked(report.screened)
    elif evidence is None:
        why = f" ({report.not_probed})" if report.not_probed else ""
        told.append(f"Behaviour: the model was not run, so nothing is known of what it says{why}")
    elif evidence.probes < evidence.planned:
        told.append(f"Behaviour: {said.ended(evidence)}")
    told += [
        f"{part.name}: {plural(part.tensors, 'tensor')}, {size(part.bytes)} not compared "
        f"({part.how})"
        for part in report.coverage.parts
        if part.status == "not-looked-at"
    ]
    if report.coverage.files_unknown:
        told.append(
            f"{plural(len(report.coverage.files_unknown), 'file')} of the base's size whose "
            "digest is not known on both sides"
        )
    if report.skipped:
        told.append(f"{plural(len(report.skipped), 'metric')} skipped, with the reasons below")
    if report.unevaluated:
        told.append(f"{plural(len(report.unevaluated), 'rule')} not decided")
    return told


def _shares(report: Report) -> list[str]:
    """The width of each part in the coverage map, by bytes (by tensors where those are unknown)."""
    parts = report.coverage.parts
    weights = [part.bytes for part in parts]
    if not any(weights):
        weights = [part.tensors for part in parts]
    total = sum(weights) or 1
    return [f"{max(weight / total, 0.0):.6f}" for weight in weights]


def _differences(report: Report) -> list[tuple[str, Sequence[str]]]:
    """What differs from the base besides the projector, by kind."""
    coverage = report.coverage
    listed = (
        ("Config keys that change the projector's function", coverage.config_changes),
        ("Tensors added", coverage.tensors_added),
        ("Tensors removed", coverage.tensors_removed),
        ("Files that differ", coverage.files_differing),
        ("Files added", coverage.files_added),
        ("Files removed", coverage.files_removed),
        ("Files not told apart", coverage.files_unknown),
        *((f"Tensors that differ in {part.name}", part.differing) for part in coverage.parts),
    )
    return [(title, names) for title, names in listed if names]


def _outcomes(rules: Sequence[RuleOutcome]) -> list[tuple[str, list[RuleOutcome]]]:
    """The rules by what became of them, worst first."""
    ordered = sorted(rules, key=lambda rule: (-rule.severity, rule.rule))
    groups: Mapping[str, list[RuleOutcome]] = {word: [] for word in OUTCOMES}
    for rule in ordered:
        groups[outcome_word(rule)].append(rule)
    return [(word, group) for word, group in groups.items() if group]


def _subjects(measurements: Sequence[Measurement]) -> list[_Subject]:
    """The measurements by subject, each in the order of the audit."""
    names = sorted({m.subject for m in measurements}, key=lambda name: (name.count("/"), name))
    return [_Subject(name, tuple(m for m in measurements if m.subject == name)) for name in names]
