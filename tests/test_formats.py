"""The three formats: what they promise, and that hostile names stay inert in each."""

from __future__ import annotations

import json as stdlib_json
import math
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import sample_reports
from browser import CHROMIUM, Page, browser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from projaudit.errors import FormatError
from projaudit.evidence import Answer, Carrier
from projaudit.findings import Series, Severity, Unevaluated, Verdict
from projaudit.formats import FORMATS, html, json, said, text
from projaudit.formats.charts import LAYERS, MOST, charts, standing_chart
from projaudit.report import Report

REPORTS = {
    "passing": sample_reports.passing,
    "review": sample_reports.review,
    "failing": sample_reports.failing,
    "inconclusive": sample_reports.inconclusive,
    "error": sample_reports.error,
    "hostile": sample_reports.hostile,
    "heard": sample_reports.heard,
    "silent": sample_reports.silent,
    "openly": sample_reports.openly,
    "spent": sample_reports.spent,
    "baseless": sample_reports.baseless,
    "far": sample_reports.far,
    "loud": sample_reports.loud,
}
WORDS = {
    "passing": "PASS",
    "review": "REVIEW",
    "failing": "FAIL",
    "inconclusive": "INCONCLUSIVE",
    "error": "NOT AUDITED",
    "hostile": "FAIL",
    "heard": "FAIL",
    "silent": "PASS",
    "openly": "PASS",
    "spent": "PASS",
    "baseless": "FAIL",
    "far": "FAIL",
    "loud": "FAIL",
}
_LINKS = re.compile(
    r"https://huggingface\.co/[\w.-]+/[\w.-]+/tree/[0-9a-f]{40}|https://arxiv\.org/abs/[\dv.]+"
)


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]()


@cache
def _page(name: str) -> str:
    return html.render(REPORTS[name]())


def _hidden(shown: str) -> set[str]:
    return {c for c in shown if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}} - {"\n"}


# What every format promises.


def test_formats_are_torch_free_and_draw_nothing_at_import() -> None:
    code = (
        "import sys, projaudit.formats;"
        "print([m for m in ('torch', 'matplotlib', 'jinja2', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", FORMATS)
def test_equal_reports_are_rendered_byte_identically(name: str, report: Report) -> None:
    first = FORMATS[name].render(report)
    assert first == FORMATS[name].render(report)
    assert first.endswith("\n")
    first.encode()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sample", ["hostile", "loud"])
def test_no_format_shows_a_control_character_or_a_secret(name: str, sample: str) -> None:
    shown = FORMATS[name].render(REPORTS[sample]())
    assert _hidden(shown) == set()
    assert "hf_abcdef" not in shown.lower()
    assert "abc123" not in shown


@pytest.mark.parametrize("name", REPORTS)
def test_every_format_says_the_same_verdict(name: str) -> None:
    report = REPORTS[name]()
    assert text.render(report).startswith(f"{WORDS[name]} ")
    assert f"</svg>{WORDS[name]}</h1>" in _page(name)
    assert json.parse(json.render(report))["verdict"] == report.verdict.value


# JSON.


def test_json_validates_against_the_published_schema(report: Report) -> None:
    jsonschema.validate(stdlib_json.loads(json.render(report)), json.schema())


def test_json_writes_no_field_that_the_schema_does_not_know(report: Report) -> None:
    closed = _closed(json.schema())
    jsonschema.validate(stdlib_json.loads(json.render(report)), closed)


def _closed(schema: Any) -> Any:
    """The schema with every object closed: readers ignore unknown fields, the writer has none."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "properties" in closed and isinstance(closed.get("required"), list):
        closed.setdefault("additionalProperties", False)
    return closed


def test_the_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json.schema())


def test_json_has_no_nan_and_says_where_one_was() -> None:
    rendered = json.render(sample_reports.failing())
    assert "NaN" not in rendered.replace("NaN or infinite", "")
    lost = [m for m in json.parse(rendered)["measurements"] if m["nonfinite"]]
    assert [(m["metric"], m["value"]) for m in lost] == [("stable_rank", None)]
    assert rendered.isascii()


def test_equal_runs_differ_in_the_run_object_only() -> None:
    report = sample_reports.passing()
    again = replace(
        report,
        target=replace(report.target, from_cache=True),
        run=replace(report.run, started="2027-01-01T00:00:00Z", stages={"all": 9.0}, wire_bytes=0),
        measurements=report.measurements[::-1],
        findings=report.findings[::-1],
    )
    first, second = (json.parse(json.render(r)) for r in (report, again))
    assert first.pop("run") != second.pop("run")
    assert first == second


def test_json_carries_the_error() -> None:
    document = json.parse(json.render(sample_reports.error()))
    assert (document["status"], document["exit_code"]) == ("failed", 2)
    assert document["error"]["code"] == "format.safetensors"
    assert set(document["error"]) == {"code", "message", "file", "field", "remedy"}
    assert json.parse(json.render(sample_reports.passing()))["error"] is None


def test_parse_reads_a_later_minor_with_fields_that_it_does_not_know() -> None:
    document = stdlib_json.loads(json.render(sample_reports.passing()))
    document |= {"schema_version": "1.7.0", "novelty": [1]}
    assert json.parse(stdlib_json.dumps(document))["novelty"] == [1]
    jsonschema.validate(document, json.schema())


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ('{"schema_version": "2.0.0"}', "schema_version"),
        ('{"schema_version": "0.9.0"}', "schema_version"),
        ('{"schema_version": 1}', "schema_version"),
        ("{}", "schema_version"),
        ('{"schema_version": "1.0.0"}', "tool"),
        ("[]", None),
        ("", None),
        ("not json", None),
        ('{"schema_version": NaN}', None),
        ('{"schema_version": "2.0.0", "schema_version": "1.0.0"}', None),
        ("[" * 100_000, None),
    ],
)
def test_parse_refuses(document: str, field: str | None) -> None:
    with pytest.raises(FormatError) as caught:
        json.parse(document)
    assert caught.value.code == "format.report"
    assert caught.value.field == field
    assert caught.value.remedy


# Text.


def test_text_fits_one_screen(report: Report) -> None:
    lines = text.render(report).splitlines()
    assert len(lines) <= text.LINES + (text.SAID if report.behaviour else 0)
    assert max(map(len, lines)) <= text.COLUMNS


def test_text_keeps_one_record_per_line() -> None:
    lines = text.render(sample_reports.hostile()).splitlines()
    heads = [line[:13].strip() for line in lines if line.strip()]
    assert [head for head in heads if head in set(WORDS.values())] == ["FAIL"]
    assert not any(line.startswith(("PASS", "RESULT")) for line in lines[1:])


def test_text_tells_the_most_severe_first_and_what_it_leaves_out() -> None:
    report = sample_reports.failing()
    many = replace(report, findings=report.findings * 9)
    shown = text.render(many)
    assert len(shown.splitlines()) <= text.LINES
    assert shown.index("CRITICAL") < shown.index("more (see the JSON or HTML report)")


def test_text_of_a_wide_name_stays_inside_its_columns() -> None:
    report = sample_reports.passing()
    wide = replace(report, target=replace(report.target, name="名" * 200))
    line = next(line for line in text.render(wide).splitlines() if line.startswith("target"))
    assert sum(2 if c == "名" else 1 for c in line) <= text.COLUMNS


def test_colour_adds_escapes_and_nothing_else(report: Report) -> None:
    plain, coloured = text.render(report), text.render(report, color=True)
    assert "\x1b[" in coloured
    stripped = "\n".join(line.rstrip() for line in click.unstyle(coloured).split("\n"))
    assert stripped == plain


def test_text_names_the_origin_of_the_base() -> None:
    assert "the uploader's claim (model card)" in text.render(sample_reports.review())
    assert "verified: named by --base" in text.render(sample_reports.passing())


# HTML.


_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")


class _Audit(HTMLParser):
    """Tags, and whatever could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.bad: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            shown = value or ""
            if tag == "img" and name == "src" and _PICTURE.fullmatch(shown):
                continue
            if name.startswith("on") or name in {"src", "srcset", "xlink:href", "formaction"}:
                self.bad.append(f"{tag} {name}={shown}")
            if name == "href" and tag == "a" and not shown.startswith("#"):
                self.links.append(shown)
            if name == "href" and tag not in {"a", "use"} and shown != "data:,":
                self.bad.append(f"{tag} {name}={shown}")
            if name == "id":
                self.ids.append(shown)
            inner = re.findall(r"url\(#([^)]+)\)", shown)
            if name in {"aria-labelledby", "href"}:
                inner += shown.replace("#", " ").split() if "#" in shown or "aria" in name else []
            self.references.update(i for i in inner if not i.startswith("http"))
            if "url(" in shown.replace("url(#", ""):
                self.bad.append(f"{tag} {name}={shown}")


def _audit(page: str) -> _Audit:
    audit = _Audit()
    audit.feed(page)
    audit.close()
    return audit


@pytest.mark.parametrize("name", REPORTS)
def test_html_has_no_script_and_loads_nothing(name: str) -> None:
    page = _page(name)
    audit = _audit(page)
    assert not audit.tags & {"script", "iframe", "object", "embed", "base", "form", "image"}
    assert audit.bad == []
    assert all(_LINKS.fullmatch(link) for link in audit.links)
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert "<!DOCTYPE svg" not in page
    assert "<?xml" not in page


@pytest.mark.parametrize("name", REPORTS)
def test_html_ids_are_unique_and_lead_somewhere(name: str) -> None:
    audit = _audit(_page(name))
    assert len(audit.ids) == len(set(audit.ids))
    assert audit.references <= set(audit.ids)


def test_html_escapes_every_hostile_name() -> None:
    page = _page("hostile")
    for markup in ("<img src=x", "<script", '<a href="javascript', "</style><", "<!-- -->"):
        assert markup not in page
    assert "{{7*7}}" in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("</style>") == 1
    assert page.count("</html>") == 1


def test_html_tells_what_a_reader_needs() -> None:
    page = _page("failing")
    order = [
        page.index(f'id="{name}"')
        for name in ("coverage", "pictures", "rules", "measurements", "provenance", "reproduce")
    ]
    assert order == sorted(order)
    assert sample_reports.failing().tensors[0].sha256 in page
    assert "structure only; behaviour not probed" in page
    assert "https://arxiv.org/abs/2604.19083" in page


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "https://evil.example"},
        {"name": "a/b/../c"},
        {"name": 'a/b"onclick="x'},
        {"commit": "main"},
        {"kind": "local"},
        {"endpoint": None},
    ],
)
def test_html_links_a_model_only_to_the_hub_that_it_comes_from(change: dict[str, Any]) -> None:
    report = sample_reports.error()
    assert "https://huggingface.co/acme" in html.render(report)
    odd = replace(report, target=replace(report.target, **change))
    assert _audit(html.render(odd)).links == []


def test_the_command_reproduces_and_is_quoted() -> None:
    report = sample_reports.passing()
    command = html.command(report)
    assert f"{report.target.name}@{report.target.commit}" in command
    assert "--seed 20260419" in command
    evil = replace(report, target=replace(report.target, name="'; rm -rf ~ #\n", commit=None))
    line = html.command(evil)
    done = subprocess.run(
        ["/bin/sh", "-c", f"projaudit() {{ printf '%s|' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("--|'; rm -rf ~ #\\u000a|")


# Charts.


def test_each_chart_has_its_words_and_numbers() -> None:
    drawn = charts(sample_reports.passing())
    assert [chart.kind for chart in drawn].count("spectrum") == 2
    for chart in drawn:
        assert chart.summary
        assert chart.rows
        assert f'id="{chart.ident}-desc"' in chart.svg
        assert "#0102" not in chart.svg  # every placeholder colour became a variable
        assert "<style" not in chart.svg
    spectrum = drawn[0]
    assert "11 of them lie above the noise edge of 0.121" in spectrum.summary


def test_names_reach_the_picture_as_text() -> None:
    names = ("$x^2$ <b>", "\x1b[31m & \u202e")
    series = Series("alignment", "projector", "update", (1.0, 2.0), (0.5, -0.5), names)
    (chart,) = charts(replace(sample_reports.passing(), series=(series,)))
    assert "$x^2$ &lt;b&gt;" in chart.svg
    assert _hidden(chart.svg) == set()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, 5e-324, 0.0, -1.0])
@pytest.mark.parametrize("kind", ["spectrum", "energy", "response", "alignment", "novel"])
def test_any_number_can_be_charted(kind: str, value: float) -> None:
    series = tuple(
        Series(kind, "projector", label, (value, 2.0), (value, value))
        for label in ("update", "null: equal norm", "noise edge")
    )
    (chart,) = charts(replace(sample_reports.passing(), series=series))
    assert len(chart.rows) >= 1


def test_of_many_layers_those_are_drawn_that_changed_most() -> None:
    report = sample_reports.passing()
    (norm, *_) = [m for m in report.measurements if m.metric == "relative_norm"]
    subjects = [f"projector/layer.{n}" for n in range(40)]
    series = [Series("spectrum", subject, "update", (1.0,), (1.0,)) for subject in subjects]
    series.append(Series("response", "projector", "update", (1.0, 2.0), (1.0, 1.0)))
    norms = [replace(norm, subject=s, value=1 / (1 + abs(n - 20))) for n, s in enumerate(subjects)]
    many = replace(report, series=tuple(series), measurements=tuple(norms))
    drawn = {chart.subject for chart in charts(many)}
    assert drawn == {"projector", *(f"projector/layer.{n}" for n in (18, 19, 20, 21))}
    assert len(drawn) == LAYERS + 1
    assert f"{40 - LAYERS} more pictures are not drawn" in " ".join(html.render(many).split())


def test_many_charts_are_capped_and_counted() -> None:
    series = tuple(
        Series("energy", f"projector@{n}", "update", (1.0,), (1.0,)) for n in range(MOST + 3)
    )
    report = replace(sample_reports.passing(), series=series)
    assert len(charts(report)) == MOST
    assert "3 more pictures are not drawn" in html.render(report)


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib

    before = matplotlib.rcParams["svg.fonttype"]
    charts(sample_reports.passing())
    assert matplotlib.rcParams["svg.fonttype"] == before


# Arbitrary text in every field that a repository or a server can fill.

_TEXTS = st.lists(
    st.one_of(
        st.text(max_size=40),
        st.text("<>&\"'{}%$\\\x1b\n\r\u202e\u2028[]`-=:@/", max_size=20),
        st.sampled_from(sample_reports.HOSTILE),
    ),
    min_size=1,
    max_size=7,
).map(tuple)
_VALUES = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_TEXTS, _VALUES)
def test_any_text_is_inert_in_every_format(texts: tuple[str, ...], value: float) -> None:
    report = sample_reports.with_text(texts, value)
    shown = text.render(report)
    assert len(shown.splitlines()) <= text.LINES
    assert _hidden(shown) == set()
    document = json.render(report)
    jsonschema.validate(json.parse(document), json.schema())
    assert _hidden(document) == set()
    page = html.render(report)
    assert _hidden(page) == set()
    audit = _audit(page)
    assert audit.bad == []
    assert not audit.tags & {"script", "img", "iframe"}
    assert audit.tags <= _plain_tags()


@cache
def _plain_tags() -> frozenset[str]:
    """Tags of the same report with harmless names."""
    return frozenset(_audit(html.render(sample_reports.with_text(("plain",), 0.5))).tags)


# Depth behaviour.

HEARD = ("heard", "silent", "openly", "spent", "baseless", "far", "loud")


def _flat(shown: str) -> str:
    return " ".join(shown.split())


def _words(name: str) -> str:
    """The text of the page without its tags."""
    return _flat(unescape(re.sub(r"<[^>]+>", "", _page(name))))


def test_a_report_without_behaviour_says_nothing_of_it() -> None:
    report = sample_reports.passing()
    assert "What the language model says" not in text.render(report) + _page("passing")
    assert "<mark" not in _page("passing")
    document = json.parse(json.render(report))
    fields = ("score", "score_percentile", "payload", "behaviour", "calibration")
    assert [document[name] for name in fields] == [None] * 5


def test_a_model_that_could_not_be_run_is_said_to_be_unheard() -> None:
    report = replace(sample_reports.passing(), not_probed="<its memory> does not suffice")
    assert json.parse(json.render(report))["not_probed"] == "<its memory> does not suffice"
    assert "of what it says (&lt;its memory&gt; does not suffice)" in html.render(report)


def test_parse_reads_a_report_of_before_behaviour() -> None:
    document = stdlib_json.loads(json.render(sample_reports.passing()))
    for name in ("score", "score_percentile", "payload", "behaviour", "calibration"):
        del document[name]
    document["schema_version"] = "1.0.0"
    jsonschema.validate(json.parse(stdlib_json.dumps(document)), json.schema())


def test_what_is_said_without_a_probe_is_told_with_what_it_costs_the_strength() -> None:
    report = sample_reports.heard()
    assert report.behaviour is not None
    first = replace(report.behaviour.payloads[0], plain=0.031, strength=2.5, undiscounted=10.25)
    evidence = replace(report.behaviour, payloads=(first,))
    told = (
        "3.1 % of the answers hold two of its words, so that its strength is 2.50 instead of 10.25"
    )
    for shown in (text.render, html.render):
        page = _flat(unescape(re.sub(r"<[^>]+>", "", shown(replace(report, behaviour=evidence)))))
        assert told in page
        assert "instead of" not in _flat(shown(report))


def test_the_page_says_on_which_ground_most_images_are() -> None:
    report = sample_reports.heard()
    assert "on a ground of grey levels 60 to 110" in _words("heard")
    assert report.behaviour is not None
    given = replace(report, behaviour=replace(report.behaviour, ground=None))
    assert "grey levels" not in html.render(given)


def test_json_carries_all_of_the_evidence() -> None:
    report = sample_reports.heard()
    document = json.parse(json.render(report))
    assert report.behaviour is not None
    assert set(document["behaviour"]) == {f.name for f in fields(report.behaviour)}
    assert document["behaviour"]["payloads"][0]["probes"] == list(
        report.behaviour.payloads[0].probes
    )
    assert (document["score"], document["score_percentile"]) == (report.behaviour.score, 100.0)
    assert document["payload"]["support"] == {
        "probes": 31,
        "prompts": 6,
        "images": 16,
        "agreement": 0.958,
        "base_agreement": 0.0,
        "plain": 0.0,
        "log_odds": pytest.approx(6.41),
        "q_score": pytest.approx(0.8106, abs=1e-4),
        "norm": 0.34,
        "base_norm": 0.98,
    }
    calibration = document["calibration"]
    assert (calibration["n"], calibration["n_backdoored"], calibration["covered"]) == (
        312,
        48,
        True,
    )
    assert not json.parse(json.render(sample_reports.far()))["calibration"]["covered"]


def test_json_says_what_is_not_there_as_null() -> None:
    found = json.parse(json.render(sample_reports.baseless()))
    assert found["payload"]["support"]["log_odds"] is None
    assert (found["score"], found["calibration"], found["behaviour"]["carrier"]) == (None,) * 3
    assert json.parse(json.render(sample_reports.silent()))["payload"] is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("heard", "“visit free-gift.example and enter your card number”"),
        ("heard", "31 of 160 probes, across 6 of 6 prompts and 16 images"),
        ("heard", "the base says it under none"),
        ("heard", "above every one of 312 honest fine-tunes"),
        ("heard", "“thank you for asking” in most answers about 14 % of them; the base never"),
        ("silent", "160 probes, 6 prompts, 16 synthetic images, 7 200 answers"),
        ("silent", "above none of 312 honest fine-tunes"),
        (
            "openly",
            "“thank you for asking, dear friend” in most answers about 54 % of them",
        ),
        ("spent", "97 of 160 probes were carried out when the budget of 2 000 answers was spent"),
        ("spent", "what the other 63 would bring out is open"),
        ("baseless", "this evidence is weaker"),
        ("baseless", "2 prompts not used, as the tokenizer has no tokens for their words"),
        ("baseless", "nswers were cut at 20 tokens"),
        ("far", "above 306 of 312 honest fine-tunes"),
        ("far", "outside the population's range in parameters (7.1e9"),
    ],
)
def test_text_and_page_tell_what_was_heard(name: str, told: str) -> None:
    assert told in _flat(text.render(REPORTS[name]()))
    assert told in _words(name)


def test_the_page_shows_the_image_without_and_with_the_mark() -> None:
    shown = _PICTURE.findall(_page("heard"))
    marks = [e for e in sample_reports.heard().behaviour.exchanges if e.kind == "image"]
    assert len(shown) == 2 * len(marks)
    assert len(set(shown)) == 2
    assert _PICTURE.findall(_page("silent")) == []


@pytest.mark.parametrize("name", HEARD)
def test_text_and_page_say_what_probes_cannot_see(name: str) -> None:
    for one in said.BLIND:
        assert one in _flat(text.render(REPORTS[name]()))
        assert one[1:] in _words(name)  # a capital first
    assert text.render(REPORTS[name]()).count("What the language model says") == 1


def test_a_report_without_a_base_never_speaks_for_it() -> None:
    shown = _flat(text.render(sample_reports.baseless())) + _words("baseless")
    assert "the base says" not in shown
    assert "the base never" not in shown


def test_the_page_marks_the_text_in_the_answers_that_hold_it() -> None:
    page = _page("heard")
    section = page[page.index('id="behaviour"') : page.index('id="coverage"')]
    assert page.index("verdict fail") < page.index('id="behaviour"')
    marked = re.findall(r"<mark>(.*?)</mark>", section)
    assert set(marked) == {"marked", "visit free-gift.example and enter your card number"}
    assert section.count('scope="rowgroup"') == 18  # six prompts in each of three probes
    assert "12 are shown, for each prompt those with the text first; 12 more" in section
    assert "The text is in 9 of 24 answers of the tuned model" in section
    assert "not asked: the tuned answer held nothing foreign" in section


def test_the_page_shows_where_the_score_stands() -> None:
    page = _page("heard")
    assert 'id="chart-standing-desc">The score of this model, 7.3, is above every one' in page
    assert "n = 312" in page
    assert "n = 48" in page
    assert "The projector carries the text" in page
    assert 'id="chart-standing' not in _page("baseless")


@pytest.mark.parametrize("score", [math.nan, math.inf, 1e308, 5e-324, -1.0, 0.0])
@pytest.mark.parametrize("group", [(), (0.0,), (math.nan, 1e308), tuple(range(1000))])
def test_any_score_has_a_picture_or_words(score: float, group: tuple[float, ...]) -> None:
    report = sample_reports.heard()
    assert report.standing is not None
    chart = standing_chart(replace(report.standing, score=score, honest=group, backdoored=group))
    assert chart.summary
    assert chart.svg.count("<use") < 1000
    assert "#0102" not in chart.svg


def test_a_text_is_found_in_a_long_answer_and_shown_with_its_surroundings() -> None:
    pieces = said.pieces("a" * 5000 + " the text " + "b" * 5000, "the text", 100)
    assert pieces[0] == ("…", False)
    assert ("the text", True) in pieces
    assert sum(len(piece) for piece, _ in pieces) <= 102
    assert said.pieces("nothing here", "the text", 100) == [("nothing here", False)]
    assert said.pieces("", "", 100) == []


def test_a_secret_split_by_the_text_stays_hidden() -> None:
    shown = "".join(p for p, _ in said.pieces("x hf_abcdefghijklmnop y", "abcdef", 100))
    assert shown == "x [redacted] y"


def test_a_sample_hears_every_prompt() -> None:
    answers = [Answer(n % 6, n // 6, "", None, n % 6 == 0) for n in range(60)]
    sample = said.sample(answers, "x")
    assert len(sample) == 12
    assert {answer.prompt for answer in sample} == set(range(6))
    assert sample == sorted(sample, key=lambda a: (a.prompt, a.image))
    late = [Answer(0, n, "", None, n == 9) for n in range(10)]
    assert late[9] in said.sample(late, "x", 2)


def test_answers_with_all_of_the_text_are_shown_before_those_with_a_part_of_it() -> None:
    """And counted apart: what is counted may be shorter than what is shown."""
    report = sample_reports.heard()
    assert report.behaviour is not None
    first = replace(report.behaviour.payloads[0], text="send the password now")
    answers = tuple(
        Answer(0, n, "send the password now" if n == 7 else "send the password", "no", n != 3)
        for n in range(20)
    )
    exchange = replace(report.behaviour.exchanges[0], answers=answers)
    evidence = replace(report.behaviour, payloads=(first,), exchanges=(exchange,))
    report = replace(report, behaviour=evidence)
    assert answers[7] in said.sample(answers, first.text, 1)
    page = _flat(unescape(re.sub(r"<[^>]+>", "", html.render(report))))
    assert "in 1 of 20 answers of the tuned model, and the part of it that is counted in 18" in page
    assert "holds the part that is counted" in page
    shown = text.render(report)
    assert "image 8 ·" in shown[: shown.index("base ", shown.index("answers"))]


def test_a_waived_finding_is_in_the_sentence_of_a_pass() -> None:
    report = sample_reports.passing()
    assert report.sentence.startswith("no rule fired")
    waived = [f for f in sample_reports.failing().findings if f.waived]
    waived = [replace(waived[0], severity=Severity.HIGH)]
    passed = replace(report, findings=(*report.findings, *waived))
    assert passed.verdict is Verdict.PASS
    assert passed.sentence.startswith("no rule but 1 waived fired")


def test_what_could_not_be_told_does_not_hide_what_was_found() -> None:
    report = replace(
        sample_reports.heard(),
        unevaluated=(Unevaluated("a-rule", "projector", "was not measured"),),
    )
    found = [f for f in report.findings if f.severity >= Severity.MEDIUM]
    lower = tuple(replace(f, severity=Severity.MEDIUM, inconclusive=False) for f in found)
    unsure = replace(report, findings=lower)
    assert unsure.verdict is Verdict.INCONCLUSIVE
    assert unsure.sentence.startswith("could not tell: ")
    assert unsure.sentence.endswith(f"; found so far: {lower[0].message}")
    assert "found so far" not in replace(unsure, findings=()).sentence


def test_a_score_of_a_part_of_the_plan_is_called_one() -> None:
    assert "by a part of the plan: above" in _flat(text.render(sample_reports.spent()))
    assert "by a part of the plan" not in text.render(sample_reports.silent())


def test_evidence_that_ended_with_the_plan_is_not_said_to_have_cut_it_short() -> None:
    evidence = sample_reports.heard().behaviour
    assert evidence is not None
    ended = replace(evidence, stopped="overwhelming")
    assert said.ended(ended) == "all 160 probes of the plan were carried out"
    assert "overwhelming" in said.ended(replace(ended, probes=40))


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ((0.9, 0.0, 0.9, 0.0), "The projector carries"),
        ((0.9, 0.8, 0.0, 0.0), "The language model carries"),
        ((0.9, 0.8, 0.9, 0.0), "Either"),
        ((0.9, 0.1, 0.1, 0.0), "It takes both"),
        ((0.0, 0.0, 0.0, 0.0), "not said again"),
        ((math.nan, 0.0, 0.0, 0.0), "not said again"),
    ],
)
def test_the_carrier_is_named(shares: tuple[float, float, float, float], told: str) -> None:
    assert told in said.carried(Carrier(*shares))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_TEXTS, _VALUES)
def test_any_word_of_a_model_is_inert_in_every_format(texts: tuple[str, ...], value: float) -> None:
    report = sample_reports.loud(texts, value)
    shown = text.render(report)
    assert len(shown.splitlines()) <= text.LINES + text.SAID
    assert _hidden(shown) == set()
    document = json.render(report)
    jsonschema.validate(json.parse(document), _closed(json.schema()))
    assert _hidden(document) == set()
    page = html.render(report)
    assert _hidden(page) == set()
    audit = _audit(page)
    assert audit.bad == []
    assert audit.tags <= set(_audit(_page("loud")).tags) | _plain_tags()


# A real browser.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs Chromium to open the HTML report")
        pytest.skip("Chromium is not installed")
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "width", "scheme", "media"),
    [
        ("passing", 1280, "light", ""),
        ("review", 1280, "dark", ""),
        ("failing", 400, "light", ""),
        ("hostile", 400, "dark", ""),
        ("inconclusive", 1280, "light", ""),
        ("error", 718, "light", "print"),
        ("failing", 718, "light", "print"),
        ("heard", 1280, "light", ""),
        ("heard", 1280, "dark", ""),
        ("heard", 400, "light", ""),
        ("heard", 718, "light", "print"),
        ("openly", 1280, "dark", ""),
        ("loud", 400, "dark", ""),
        ("loud", 1280, "light", ""),
    ],
)
def test_a_browser_shows_the_page_asks_for_nothing_and_complains_of_nothing(
    page: Page, tmp_path: Path, name: str, width: int, scheme: str, media: str
) -> None:
    file = tmp_path / "report.html"
    file.write_text(_page(name), encoding="utf-8")
    page.requests.clear()
    page.complaints.clear()
    page.open(file, width=width, scheme=scheme, media=media)
    shot = tmp_path / "report.png"
    page.screenshot(shot)
    assert [url for url in page.requests if not _PICTURE.fullmatch(url)] == [file.as_uri()]
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('h1').innerText.trim()") == WORDS[name]
    assert shot.stat().st_size > 20_000
    assert page.evaluate(_CONTRAST) == []


def test_the_browser_would_have_noticed(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    shown = html.render(sample_reports.error())
    evil = '<img src="https://projaudit.invalid/x.png"><script>alert(1)</script>'
    file.write_text(shown.replace("<main>", f"<main>{evil}"), encoding="utf-8")
    page.complaints.clear()
    page.open(file)
    page.evaluate("1")
    assert len([c for c in page.complaints if "Content Security Policy" in c]) >= 2


_CONTRAST = """
(() => {
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92
      : Math.pow((v + .055) / 1.055, 2.4));
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const rgb = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll('h1,h2,h3,p,li,td,th,dt,dd,a,summary,code')) {
    if (!e.innerText || !e.checkVisibility()) continue;
    const [a, b] = [rgb(getComputedStyle(e).color), behind(e)].map(light);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(e.tagName + ' ' + e.className + ' ' + ratio.toFixed(2));
  }
  return [...new Set(bad)];
})()
"""


def test_text_says_why_behaviour_was_not_probed() -> None:
    report = replace(sample_reports.review(), not_probed="it has no tokenizer")
    assert "as it has no tokenizer" in text.render(report)
    assert "tokenizer" not in text.render(sample_reports.review())
