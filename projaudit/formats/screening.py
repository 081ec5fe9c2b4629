"""A screening in words, in JSON, and in pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from projaudit.formats.charts import Chart
from projaudit.formats.svg import histogram, quiet_matplotlib, swatch
from projaudit.formats.wording import number, percent, plural, short
from projaudit.inert import clean
from projaudit.report import Report
from projaudit.screened import (
    Fate,
    HeatMap,
    Histogram,
    Screened,
    SharedAttention,
    SharedText,
)

FATES: Mapping[Fate, str] = {
    "drop": "to drop",
    "apart": "apart, kept",
    "keep": "to keep",
    "unread": "not looked at",
}
METHODS = {"bye": "BYE", "tcap": "TCAP", "both": "BYE, TCAP, all heads together and the answers"}
BLIND = (
    "payloads without a fixed text, or of one or two words, unless attention sets them apart",
    "sets of which more than half is poisoned",
)
"""What no screening sees."""
_DEFAULTS = {("rule", "paper"), ("positions", 16), ("batch", 8)}
_TITLES = {
    "bye-layer": "BYE: attention entropy of a layer",
    "bye-mean": "BYE: mean entropy over the bimodal layers",
    "tcap-head": "TCAP: attention of a head on the system prompt",
    "joint": "Attention of all heads together",
    "departure": "Attention before a shared text",
}
_AXES = {
    "bye-layer": "entropy over image tokens, nats",
    "bye-mean": "entropy over image tokens, nats",
    "tcap-head": "share of attention on the system prompt, scaled",
    "joint": "held-out score of the attention",
    "departure": "held-out score of the attention",
}
_READING = {
    "bye-layer": "A layer is bimodal where both normal curves lie apart, with a valley between.",
    "bye-mean": "The low mode is the poisoned one.",
    "tcap-head": "The group set apart is a minority of the mixture's components.",
    "joint": "Each score is of a discriminant that was fitted to other samples; what is apart lies "
    "behind a valley.",
    "departure": "Each score is of a discriminant that was fitted to other samples.",
}


def counts(screened: Screened) -> str:
    """How many samples there are of each fate."""
    told = [
        f"{screened.fates[fate]:,}".replace(",", " ") + f" {words}"
        for fate, words in FATES.items()
        if screened.fates.get(fate)
    ]
    return " · ".join(told)


def unread(screened: Screened) -> str:
    """Why samples were not looked at; empty where all were."""
    whys = [f"{n} {clean(s, 40)}" for s, n in screened.statuses.items() if s != "ok"]
    return ", ".join(whys)


def blind(screened: Screened) -> Iterator[str]:
    """What the screening cannot have seen, whatever it found."""
    yield from BLIND
    if screened.later_answers:
        count = plural(screened.later_answers, "sample")
        yield f"later turns: {count} have further answers, which were not looked at"


def left_out(screened: Screened) -> str:
    """Which layers have no attention to be read; empty where all have."""
    if not screened.layers_left_out:
        return ""
    every = screened.layers + screened.layers_left_out
    return (
        f"{screened.layers_left_out} of {plural(every, 'layer')} left out: no attention over the "
        "sequence"
    )


def told(text: SharedText) -> str:
    """What is known of a shared text."""
    where = "instead of the answer" if text.replaces else "behind the answer"
    words = f"in {plural(text.samples, 'answer')}, {where}, whatever was asked"
    if text.markers:
        marks = ", ".join(f"“{clean(m, 40)}”" for m in text.markers[:5])
        words += f" with {marks} in the question"
    if text.auroc is None:
        return f"{words}; the attention before it cannot be told: {clean(text.unknown, 120)}"
    known = text.confirmed or text.apart
    verb = "tells that it comes" if known else "does not tell that it comes"
    words += f"; the attention before it {verb} (AUROC {short(text.auroc)})"
    return f"{words}; {FATES['apart']}, as {named(text)}" if text.apart else words


def named(text: SharedText) -> str:
    """Which word of the answers tells whether the text follows; empty where none does."""
    if text.named is None:
        return ""
    one = text.named
    others = text.samples - one.holders
    word = clean(one.word, 40)
    return f"so end {one.holders} of {one.answers} that name “{word}”, and {others} others"


def set_apart(group: SharedAttention) -> str:
    """What is known of a group that all heads together set apart."""
    told = f"{plural(group.samples, 'sample')} lie apart (p {short(group.valley)} of one mode)"
    return f"{told}, {FATES[group.fate]}: {clean(group.says, 200)}"


def lines(screened: Screened) -> Iterator[tuple[str, str]]:
    """(head, text) for a terminal."""
    yield "dataset", f"{clean(screened.dataset, 60)} · {plural(screened.samples, 'sample')}"
    yield "method", METHODS[screened.method]
    yield "samples", counts(screened)
    if unread(screened):
        yield "", unread(screened)
    if left_out(screened):
        yield "layers", left_out(screened)
    for n, text in enumerate(screened.texts[:3]):
        yield "" if n else "text", f"“{clean(text.text, 120)}” {told(text)}"
    for n, group in enumerate(screened.groups[:3]):
        yield "" if n else "attention", set_apart(group)
    for n, why in enumerate(screened.nothing):
        yield "" if n else "nothing", clean(why, 300)
    if screened.files:
        folders = sorted({file.rpartition("/")[0] or "." for file in screened.files})
        yield "written", ", ".join(clean(folder, 60) for folder in folders)
    yield "not seen", "; ".join(blind(screened))


def document(screened: Screened) -> dict[str, Any]:
    """The JSON object; pictures and the names of files are not in it."""
    return {
        "dataset": screened.dataset,
        "method": screened.method,
        "samples": screened.samples,
        "fates": dict(screened.fates),
        "statuses": dict(screened.statuses),
        "layers": screened.layers,
        "layers_left_out": screened.layers_left_out,
        "later_answers": screened.later_answers,
        "groups": [
            {
                "samples": group.samples,
                "valley": group.valley,
                "fate": group.fate,
                "says": group.says,
            }
            for group in screened.groups
        ],
        "texts": [
            {
                "text": text.text,
                "samples": text.samples,
                "explained": text.explained,
                "markers": list(text.markers),
                "replaces": text.replaces,
                "auroc": text.auroc,
                "confirmed": text.confirmed,
                "unknown": text.unknown or None,
                "named": None
                if text.named is None
                else {
                    "word": text.named.word,
                    "answers": text.named.answers,
                    "holders": text.named.holders,
                },
                "apart": text.apart,
            }
            for text in screened.texts
        ],
        "nothing": list(screened.nothing),
        "common_text": screened.common_text or None,
        "common_share": screened.common_share,
        "shown": [
            {
                "subject": sample.subject,
                "number": sample.number,
                "id": sample.id,
                "fate": sample.fate,
                "status": sample.status,
                "detail": sample.detail,
                "bye": sample.bye,
                "tcap": sample.tcap,
                "joint": sample.joint,
                "departure": sample.departure,
                "text": sample.text or None,
                "question": sample.question,
                "answer": sample.answer,
            }
            for sample in screened.shown
        ],
        "histograms": [
            {
                "kind": one.kind,
                "subject": one.subject,
                "edges": list(one.edges),
                "kept": list(one.kept),
                "taken": list(one.taken),
                "curve": [list(point) for point in one.curve],
                "statistic": one.statistic,
            }
            for one in screened.histograms
        ],
    }


def charts(screened: Screened) -> tuple[Chart, ...]:
    """A picture of each histogram, with the same in words and numbers."""
    with quiet_matplotlib():
        return tuple(_chart(f"histogram-{n}", h) for n, h in enumerate(screened.histograms, 1))


def _chart(ident: str, one: Histogram) -> Chart:
    kept, taken = sum(one.kept), sum(one.taken)
    name = {
        "bye-layer": "BSI",
        "tcap-head": "SS",
        "joint": "p of the valley",
        "departure": "AUROC",
    }.get(one.kind)
    summary = f"{plural(taken, 'sample')} set apart, {kept} left"
    if one.statistic is not None and name:
        summary += f"; {name} {short(one.statistic)}"
    title = _TITLES[one.kind]
    bins = zip(one.edges, one.edges[1:], one.kept, one.taken, strict=False)
    rows = tuple(
        (f"{number(low)} to {number(high)}", str(left), str(apart))
        for low, high, left, apart in bins
        if left or apart
    )
    return Chart(
        ident=ident,
        kind=one.kind,
        subject=one.subject,
        title=title,
        reading=_READING[one.kind],
        summary=f"{summary}.",
        svg=histogram(ident, title, summary, one, _AXES[one.kind]),
        legend=tuple((swatch(label, bars=True), label) for label in ("left", "set apart")),
        columns=("values", "left", "set apart"),
        rows=rows,
    )


def pictures(maps: Sequence[HeatMap]) -> list[tuple[str, str, str]]:
    """(data URL, text alternative, caption) of each heat map."""
    return [
        (
            f"data:image/png;base64,{base64.b64encode(one.picture).decode()}",
            f"Attention of sample {one.number} over its image, {one.where}",
            f"sample {one.number}, {FATES[one.fate]}: {percent(one.share)} of the row's attention "
            "is on the image",
        )
        for one in maps
    ]


def looked(screened: Screened) -> Iterator[str]:
    """What the verdict rests on."""
    seen = screened.samples - screened.fates.get("unread", 0)
    every = plural(screened.samples, "sample")
    yield f"{every}, {seen} of them read, by {METHODS[screened.method]}"


def not_looked(screened: Screened) -> Iterator[str]:
    """What it does not rest on."""
    yield "The model itself: neither its projector nor what it says was audited"
    if left_out(screened):
        yield left_out(screened)
    if unread(screened):
        yield f"{plural(screened.fates.get('unread', 0), 'sample')}: {unread(screened)}"
    yield from (told[:1].upper() + told[1:] for told in blind(screened))


def command(report: Report) -> list[str]:
    """The words of the command that screens the same set again."""
    assert report.screened is not None
    options = [f"--method={report.screened.method}"]
    for name in ("rule", "seed", "positions", "batch", "limit", "adapter", "images", "policy"):
        value = report.settings.get(name)
        if value is not None and (name, value) not in _DEFAULTS:
            options += [f"--{'layer-rule' if name == 'rule' else name}", str(value)]
    if report.settings.get("published"):
        options.append("--published")
    if report.policy.fail_on != "fail":
        options += ["--fail-on", report.policy.fail_on]
    target = report.target
    model = f"{target.name}@{target.commit}" if target.commit else target.name
    return ["projaudit", "screen", *options, "--", model, report.screened.dataset]
