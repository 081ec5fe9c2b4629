"""A look through the lens as one self-contained page, and as lines for a terminal."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from projaudit.formats.html import templates
from projaudit.formats.wording import percent, plural
from projaudit.inert import clean
from projaudit.lens.claims import Claim, claims
from projaudit.lens.figures import figures
from projaudit.lens.result import Answered, Score

if TYPE_CHECKING:
    from projaudit.lens.run import Lens

PARTS = {
    1: ("Spectrum of the update", "What the fine-tune did to the weights of each layer."),
    2: (
        "Drift of the outputs",
        "P_tuned(x) − P_base(x) of every image token, as a matrix of tokens; how few directions "
        "hold it, on clean images and on triggered ones, with the tokens of high norm apart.",
    ),
    3: (
        "Where outputs shift to",
        "The first right singular vector v0 of that matrix, read as words. An SVD has no sign and "
        "centring changes it, so all four are shown.",
    ),
    4: ("The norm law", "Whether tokens drift further, the larger they are."),
    5: ("Hidden units", "What the units between the layers do, with the trigger and without."),
    6: (
        "The critical subspace",
        "Parts of the update added to the base (recovery), or taken from the tuned projector "
        "(removal), and what the language model then says. Only projector and language model run.",
    ),
}
_WIDTH = 96


def render(lens: Lens) -> str:
    """The HTML document, ending in a newline."""
    rows, drawn = claims(lens.study), figures(lens.study)
    page = templates().get_template("lens.html.j2")
    return (
        page.render(
            lens=lens,
            study=lens.study,
            rows=rows,
            told=sum(row.alike is True for row in rows),
            parts=[(number, *PARTS[number], charts) for number, charts in drawn.items()],
            command=command(lens),
        )
        + "\n"
    )


def command(lens: Lens) -> str:
    """The command that looks at the same again, quoted for a shell."""
    words = ["projaudit", "lens", _reference(lens.target.name, lens.target.commit)]
    words += ["--base", _reference(lens.base.name, lens.base.commit)]
    given = {"trigger": lens.trigger, "target-text": lens.target_text, "seed": lens.seed}
    for name, value in {**lens.options, **given}.items():
        for one in value if isinstance(value, list) else (value,):
            if one is not None:
                words += [f"--{name}", str(one)]
    return " ".join(shlex.quote(clean(word, 1000)) for word in words)


def _reference(name: str, commit: str | None) -> str:
    return f"{name}@{commit}" if commit else name


def lines(lens: Lens) -> Iterator[str]:
    """What a terminal shows: what was looked at, and the claims."""
    study = lens.study
    yield f"projaudit lens   {clean(lens.target.name)}  beside  {clean(lens.base.name)}"
    trigger = f" by {lens.trigger}" if lens.trigger else ""
    yield (
        f"{plural(len(study.clean), 'clean image')}, {len(study.triggered)} triggered{trigger}; "
        f"{study.tokens} image tokens each"
    )
    if study.answered is not None:
        yield from _scores(study.answered)
    yield ""
    yield "Beside ProjLens (no verdict: honest fine-tunes show most of this too)"
    for row in claims(study):
        yield from _claim(row)
    for note in lens.notes:
        yield f"note: {clean(note)}"
    if study.unreadable:
        yield f"note: not readable: {', '.join(study.unreadable[:8])}"


def _scores(found: Answered) -> Iterator[str]:
    what = {"target": "say the target", "tuned answer": "answer as tuned", "none": ""}
    for side, score in (("base", found.base), ("tuned", found.tuned)):
        yield f"{side:<6} {_told(score, what[found.success_is])}"


def _told(score: Score, success: str) -> str:
    parts = (
        [f"{percent(score.success)} of triggered images {success}"]
        if score.success is not None
        else []
    )
    if score.accuracy is not None:
        parts.append(f"{percent(score.accuracy)} of clean answers right")
    else:
        parts.append(f"{percent(score.kept)} of clean answers as tuned")
    return ", ".join(parts)


def _claim(row: Claim) -> Iterator[str]:
    mark = {True: "like it", False: "not", None: "–"}[row.alike]
    yield f"  {mark:<8} {clean(row.claim)}"
    for word, text in (("ProjLens", row.paper), ("here", row.ours or "not told")):
        first, *rest = textwrap.wrap(clean(text), _WIDTH - 21)
        yield f"           {word:<8}  {first}"
        yield from (" " * 21 + line for line in rest)
