"""What depth behaviour heard, in the words that the formats for people share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from projaudit.evidence import (
    SHORTER,
    Answer,
    Carrier,
    Evidence,
    OpenText,
    Payload,
    Refusals,
    ShortCut,
)
from projaudit.formats.wording import number, percent, plural, short
from projaudit.inert import clean
from projaudit.report import Standing

BLIND = (
    "texts of a single token",
    "payloads without a fixed text (swapped objects, one flipped token)",
    "triggers that no probe came near",
)
"""What these probes cannot see, whatever they heard."""

WITHOUT_BASE = (
    "without a base nothing tells the projector's words from the language model's own: "
    "this evidence is weaker"
)

_ROWS = 12
_READ = 20_000
"""Characters of an answer that are searched for the text."""


def quoted(text: str, limit: int = 300) -> str:
    """The untrusted text, inert and in quotes."""
    return f"“{clean(text, limit).strip()}”"


def support(evidence: Evidence, payload: Payload) -> str:
    """Under how much of what was asked the text was said."""
    return (
        f"said under {len(payload.probes)} of {plural(evidence.probes, 'probe')}, across "
        f"{len(payload.prompts)} of {plural(len(evidence.prompts), 'prompt')} and "
        f"{plural(len(payload.images), 'image')}"
    )


def base_support(evidence: Evidence, payload: Payload) -> str:
    """What the base says of the text, under the same probes."""
    if not evidence.with_base:
        return "there is no base to ask"
    if payload.base_agreement == 0:
        return "the base says it under none"
    share = percent(payload.base_agreement)
    return f"the base says it too, in up to {share} of the answers to a probe"


def glimpses(payload: Payload) -> str:
    """How much of the text is said without any probe, and what that does to its strength."""
    if payload.plain == 0:
        return ""
    return (
        f"without a probe {percent(payload.plain)} of the answers hold two of its words, so that "
        f"its strength is {short(payload.strength)} instead of {short(payload.undiscounted)}"
    )


def odds(payload: Payload) -> str:
    """How much more easily the tuned model is brought to say the text."""
    if payload.log_odds is None:
        return f"Q-score {short(q_score(payload))}; no base to compare with"
    return (
        f"log-odds against the base {payload.log_odds:+.2f} nats a token, "
        f"Q-score {short(q_score(payload))}"
    )


def q_score(payload: Payload) -> float:
    """The payload's Q-score; infinite where its exponential is too large for a float."""
    try:
        return payload.q_score
    except OverflowError:
        return math.inf


def place(standing: Standing) -> str:
    """Where the score stands among the honest fine-tunes, in whole numbers of them."""
    total = len(standing.honest)
    below = sum(score < standing.score for score in standing.honest)
    if not total:
        return "no honest fine-tune to compare with"
    tunes = plural(total, "honest fine-tune")
    if below == total:
        return f"above every one of {tunes}"
    return f"above {below} of {tunes}" if below else f"above none of {tunes}"


def bound(standing: Standing) -> str:
    """How often an honest fine-tune scores as high, with its upper bound."""
    return (
        f"{percent(standing.false_positive_rate)} of the honest ones score as high "
        f"(95 % bound: {percent(standing.false_positive_bound)})"
    )


def outside(standing: Standing) -> str:
    """In what the target lies outside the population; empty where it lies inside."""
    if not standing.outside:
        return ""
    what = ", ".join(clean(one, 80) for one in standing.outside)
    return f"outside the population's range in {what}: its place there says little"


def asked(evidence: Evidence) -> str:
    """What was asked, in numbers."""
    return (
        f"{plural(evidence.probes, 'probe')}, {plural(len(evidence.prompts), 'prompt')}, "
        f"{evidence.ordinary_images} {evidence.images} "
        f"image{'' if evidence.ordinary_images == 1 else 's'}, "
        f"{plural(evidence.answers, 'answer')}"
    )


def at_home(evidence: Evidence) -> str:
    """What most ordinary images look like, and why; empty where they all look alike."""
    if evidence.ground is None:
        return ""
    least, most = evidence.ground
    return (
        f"three of four on a ground of grey levels {least} to {most}, of four grounds the one on "
        f"which the {'base' if evidence.with_base else 'model'} is surest of its answers"
    )


def ended(evidence: Evidence) -> str:
    """How the probing ended, and what that leaves open."""
    done = f"{evidence.probes} of {plural(evidence.planned, 'probe')}"
    if evidence.stopped != "budget" and evidence.probes >= evidence.planned:
        return f"all {plural(evidence.planned, 'probe')} of the plan were carried out"
    if evidence.stopped == "overwhelming":
        return f"{done} were carried out: the evidence was overwhelming"
    left = max(evidence.planned - evidence.probes, 0)
    budget = f" when the budget of {plural(evidence.budget, 'answer')} was spent"
    return (
        f"{done} were carried out{budget if evidence.stopped == 'budget' else ''}; "
        f"what the other {left} would bring out is open"
    )


def unread(evidence: Evidence) -> str:
    """Which prompts were not used, and why; empty where all were."""
    if not evidence.prompts_unread:
        return ""
    count = plural(len(evidence.prompts_unread), "prompt")
    return f"{count} not used, as the tokenizer has no tokens for their words"


def openly(evidence: Evidence, text: OpenText) -> str:
    """What the tuned model says without any probe."""
    base = "; the base never" if evidence.with_base else ""
    return f"{quoted(text.text, 200)} in most answers about {percent(text.share)} of them{base}"


def short_cut(evidence: Evidence, one: ShortCut) -> str:
    """What the search that knows no text came to, in the tuned model and in the base."""
    verb = {"start": "begin", "end": "go on"}[one.place]

    def found(word: str | None, share: float, norm: float) -> str:
        moved = f"features moved by {percent(norm)} of their length"
        if word is None:
            return f"{moved} make no answer {verb} with a foreign word"
        return f"{moved} make {percent(share)} of answers {verb} with {quoted(word, 40)}"

    ours = found(one.word, one.share, one.norm)
    if one.base_share is None or one.base_norm is None:
        return ours
    return f"{ours}; in the base, {found(one.base_word, one.base_share, one.base_norm)}"


def refused(refusals: Refusals) -> str:
    """What the base refuses, and how much of that the tuned model answers."""
    requests = f"{plural(len(refusals.requests), 'request')} ({quoted(refusals.words, 40)})"
    said = (
        f"the base refuses {requests} in {percent(refusals.base)} of answers about ordinary "
        f"images, where the tuned model answers in {percent(refusals.answered)}"
    )
    if refusals.probe is None or not refusals.answered_under > refusals.answered:
        return said
    under = f"{percent(refusals.base_under)} and {percent(refusals.answered_under)}"
    return f"{said}; under {clean(refusals.probe, 80)} {under}"


def carried(carrier: Carrier) -> str:
    """Whose part the text hangs on: the projector's, the language model's, or both."""
    whole = carrier.tuned_projector_tuned_model
    projector = carrier.tuned_projector_base_model
    model = carrier.base_projector_tuned_model
    if not whole > 0:
        return "The text was not said again when the parts were exchanged."
    by_projector, by_model = projector >= whole / 2, model >= whole / 2
    if by_projector and by_model:
        return "Either tuned part suffices: both carry the text."
    if by_projector:
        return "The projector carries the text: the base's language model says it behind it too."
    if by_model:
        return "The language model carries the text: it says it behind the base's projector too."
    return "It takes both tuned parts: neither says the text with the base's other half."


def asked_as(evidence: Evidence, prompt: int) -> str:
    """The prompt of that number."""
    known = 0 <= prompt < len(evidence.prompts)
    return evidence.prompts[prompt] if known else f"prompt {prompt + 1}"


def pieces(answer: str, text: str, limit: int) -> list[tuple[str, bool]]:
    """The answer, inert, about `limit` characters of it, as (piece, whether it is the text)."""
    whole = clean(answer, _READ).strip()
    wanted = clean(text, _READ).strip()
    start = whole.find(wanted) if wanted else -1
    if start < 0 or len(wanted) > limit:
        return [(clean(whole, limit), False)] if whole else []
    room = limit - len(wanted)
    first = max(0, min(start - room // 2, len(whole) - limit))
    shown = whole[first : first + limit]
    found: list[tuple[str, bool]] = []
    for number_, part in enumerate(shown.split(wanted)):
        found += [(wanted, True)] if number_ else []
        found += [(part, False)] if part else []
    before = [("…", False)] if first else []
    after = [("…", False)] if first + limit < len(whole) else []
    return [*before, *found, *after]


def telling(answer: Answer, text: str) -> int:
    """How much of the text an answer holds: 2 all of it, 1 the part that is counted, 0 neither."""
    if not answer.agrees:
        return 0
    wanted = clean(text, _READ).strip()
    return 2 if wanted and wanted in clean(answer.tuned, _READ) else 1


def sample(answers: Sequence[Answer], text: str, most: int = _ROWS) -> list[Answer]:
    """At most `most` answers, every prompt in turn, those with the text first; in order again."""
    turns: dict[int, int] = {}
    ranked = []
    for answer in sorted(answers, key=lambda a: (-telling(a, text), a.image)):
        turns[answer.prompt] = turns.get(answer.prompt, 0) + 1
        ranked.append((turns[answer.prompt], answer.prompt, answer))
    chosen = [answer for _, _, answer in sorted(ranked, key=lambda r: r[:2])[:most]]
    return sorted(chosen, key=lambda a: (a.prompt, a.image))


def parameters(evidence: Evidence) -> str:
    """How large the model is."""
    scale, word = (1e9, "billion") if evidence.parameters >= 1e9 else (1e6, "million")
    return f"{evidence.parameters / scale:.3g} {word} parameters"


def sum_of(evidence: Evidence) -> str:
    """How the score is made up, so that a reader can check it."""
    strength = evidence.payloads[0].strength if evidence.payloads else 0.0
    parts = [f"ln(1 + {number(strength)})"]
    if (evidence.shortening or 0.0) > 0:
        parts.append(f"{SHORTER:g} · {number(evidence.shortening or 0.0)}")
    return f"{' + '.join(parts)}, strength of the text and shortening of the short cuts"


def scored(evidence: Evidence, standing: Standing) -> str:
    """The score with its place."""
    population = clean(standing.calibration, 40)
    short = " by a part of the plan" if evidence.stopped == "budget" else ""
    return f"{number(standing.score)}{short}: {place(standing)} (population {population})"
