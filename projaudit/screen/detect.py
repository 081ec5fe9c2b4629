"""Which samples to drop: BYE, TCAP, or both with the answers as a witness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from projaudit.errors import UsageError
from projaudit.screen.bye import Bye, LayerRule, bye
from projaudit.screen.departure import Departure, departure
from projaudit.screen.joint import Group, joint
from projaudit.screen.payload import (
    LEAST_FOREIGN,
    MOST_SHARE,
    WORDS,
    Bools,
    Payload,
    explained,
    named_before,
    own_words,
    shared_endings,
)
from projaudit.screen.profiles import Profiles
from projaudit.screen.tcap import Options, Tcap, tcap

Method = Literal["bye", "tcap", "both"]

FIRST = 0
"""The row that both papers read: it predicts the first token of the answer."""
MOST_EXPLAINED = 0.7
"""AUROC of the question's words from which a text belongs to a kind of question."""
LEAST_DEPARTURE = 0.8
"""AUROC of the attention before a text from which the model is taken to know it will come."""
LEAST_OWN = 0.5
"""Share of own words from which the answers of a group are payloads, and not of the set's kind."""
MOST_NAMES = 2
"""Words that the answers of a group have in common where they name what its images show."""
LEAST_HOLDERS = 0.01
_MOST_TEXTS = 200


@dataclass(frozen=True)
class Judged:
    """A group that all heads set apart together, and what it is taken for."""

    group: Group
    fate: Literal["drop", "apart", "keep"]
    says: str
    payloads: Bools
    """(samples,) of the group whose own answers are mostly of words that no other says."""


@dataclass(frozen=True)
class Screening:
    """What the detectors say of every sample."""

    method: Method
    samples: int
    looked_at: Bools
    """(samples,) that have a profile."""
    bye: Bye | None
    tcap: Tcap | None
    departures: tuple[Departure, ...]
    """Texts that answers end with whatever was asked, most holders first, confirmed or not."""
    judged: tuple[Judged, ...]
    """Groups that all heads set apart together, under `both`."""
    dropped: Bools
    """(samples,)."""
    apart: Bools
    """(samples,) that under `both` BYE and TCAP, or all heads together, set apart and nothing
    explains, and those with a text that what they name explains: kept, for a reader to judge."""
    nothing: tuple[str, ...]
    """Why a method found nothing."""

    @property
    def confirmed(self) -> tuple[Departure, ...]:
        """The texts whose samples are dropped."""
        return tuple(d for d in self.departures if is_confirmed(d))


def is_confirmed(found: Departure) -> bool:
    """Whether the attention before a text tells that it will come, and nothing named calls it."""
    return departs(found) and found.payload.named is None


def departs(found: Departure) -> bool:
    """Whether the attention before a text tells that it will come."""
    return found.auroc is not None and found.auroc >= LEAST_DEPARTURE


def screen(
    profiles: Profiles,
    method: Method = "both",
    *,
    questions: Sequence[str] | None = None,
    answers: Sequence[str] | None = None,
    rule: LayerRule = "paper",
    threshold: float = 2.0,
    alpha: float = 0.01,
    options: Options | None = None,
    published: bool = False,
    words: int = WORDS,
    seed: int = 0,
) -> Screening:
    """What a method says of the samples of `profiles`.

    `questions` and `answers` are the dataset's own texts, one per profile; without the questions
    `both` cannot tell a payload from the answer of a kind of question, and drops nothing for a
    text; without the answers it takes the profiles' tokens, which may be cut. With
    `published`, BYE and TCAP are their papers' own: no valley is asked for (`alpha` 1), and a kind
    of question is removed as anything else. Raises UsageError (`usage.screen`) where numbers of
    texts and profiles differ, or `published` is asked of `both`, which is ours.
    """
    if published and method == "both":
        raise UsageError("both is no published method", "screen", field="published")
    alpha = 1.0 if published else alpha
    for name, texts in (("questions", questions), ("answers", answers)):
        if texts is not None and len(texts) != len(profiles.ids):
            told = f"{len(texts)} for {len(profiles.ids)} profiles"
            raise UsageError(told, "screen", field=name)
    looked_at = np.array([status == "ok" for status in profiles.statuses], bool)
    entropy = np.where(looked_at[:, None], profiles.entropy[:, FIRST], np.nan)
    shares = np.where(looked_at[:, None, None, None], profiles.shares[:, FIRST], np.nan)
    low = high = None
    if method in ("bye", "both"):
        low = bye(entropy, rule=rule, threshold=threshold, alpha=alpha, seed=seed)
    if method in ("tcap", "both"):
        o = options or Options()
        high = tcap(shares, options=replace(o, alpha=alpha), seed=seed)
    nobody = np.zeros(len(looked_at), bool)
    said = list(answers) if answers is not None else [" ".join(a) for a in profiles.answers]
    ran = {name: one for name, one in (("BYE", low), ("TCAP", high)) if one is not None}
    nothing: list[str] = []
    apart: dict[str, Bools] = {}
    for name, found in ran.items():
        told = found.nothing
        if not published:
            told = told or _told_by_questions(found.dropped, looked_at, questions, seed)
        if method == "both" and not told:
            told = _told_by_answers(found.dropped, looked_at, said, seed)
        if told:
            nothing.append(f"{name}: {told}")
        else:
            apart[name] = found.dropped
    set_apart = np.logical_and.reduce(list(apart.values())) if len(apart) == len(ran) else nobody
    if len(apart) < len(ran):
        nothing += [f"{name} alone sets {int(m.sum())} samples apart" for name, m in apart.items()]
    departures: tuple[Departure, ...] = ()
    judged: tuple[Judged, ...] = ()
    dropped = set_apart
    if method == "both":
        departures = _departures(profiles, looked_at, questions, said, words, seed)
        dropped = nobody.copy()
        remarks = nobody.copy()
        for text in departures:
            if is_confirmed(text):
                dropped |= text.payload.holders & looked_at
            elif departs(text):
                remarks |= text.payload.holders & looked_at
        set_apart = set_apart | remarks
        groups = joint(profiles, FIRST, looked_at, questions, alpha=alpha, seed=seed)
        judged = tuple(_judged(group, looked_at, questions, said, seed) for group in groups)
        for one in judged:
            if one.fate != "keep":
                dropped |= one.payloads & ~remarks
                set_apart = set_apart | one.group.members
        if dropped.sum() > MOST_SHARE * looked_at.sum():
            nothing.append(
                f"{int(dropped.sum())} samples have payloads in their answers, which is no "
                "minority: nothing to remove"
            )
            dropped[:] = False
    return Screening(
        method=method,
        samples=len(looked_at),
        looked_at=looked_at,
        bye=low,
        tcap=high,
        departures=departures,
        judged=judged,
        dropped=dropped,
        apart=set_apart & ~dropped,
        nothing=tuple(nothing),
    )


def _told_by_questions(
    members: Bools, looked_at: Bools, questions: Sequence[str] | None, seed: int
) -> str:
    """Why samples set apart are a kind of question and no trigger; empty where they may be one."""
    if questions is None or min(members.sum(), (looked_at & ~members).sum()) < 5:
        return ""
    asked = [questions[i] for i in np.flatnonzero(looked_at).tolist()]
    share, _ = explained(members[looked_at], asked, seed)
    if share < MOST_EXPLAINED:
        return ""
    return (
        f"the {int(members.sum())} samples set apart are a kind of question, "
        f"which its words tell with AUROC {share:.2f}: nothing to remove"
    )


def _told_by_answers(members: Bools, looked_at: Bools, answers: Sequence[str], seed: int) -> str:
    """What the images show of samples set apart, if their answers name it; empty where not.

    A word or two that nearly all their answers hold and nearly no other, in answers that are
    otherwise like the rest ("… in the northwest").
    """
    if min(members.sum(), (looked_at & ~members).sum()) < 5:
        return ""
    said = [answers[i] for i in np.flatnonzero(looked_at).tolist()]
    _, names = explained(members[looked_at], said, seed)
    inside = members[looked_at]
    own = float(own_words(inside, said)[inside].mean())
    if not 1 <= len(names) <= MOST_NAMES or own >= LEAST_OWN:
        return ""
    words = " and ".join(f"“{name}”" for name in names)
    return (
        f"the {int(members.sum())} samples set apart are those whose answers say {words}, "
        "and are otherwise like the rest: nothing to remove"
    )


def _judged(
    group: Group,
    looked_at: Bools,
    questions: Sequence[str] | None,
    answers: Sequence[str],
    seed: int,
) -> Judged:
    nobody = np.zeros(len(looked_at), bool)
    told = _told_by_questions(group.members, looked_at, questions, seed)
    told = told or _told_by_answers(group.members, looked_at, answers, seed)
    if told:
        return Judged(group, "keep", told, nobody)
    own = nobody.astype(float)
    seen = np.flatnonzero(looked_at)
    own[seen] = own_words(group.members[seen], [answers[i] for i in seen.tolist()])
    share = float(own[group.members].mean())
    if questions is None or share < LEAST_OWN:
        return Judged(group, "apart", "neither their questions nor their answers say why", nobody)
    says = f"{share:.0%} of the words of their answers are hardly said by others"
    return Judged(group, "drop", says, group.members & (own >= LEAST_OWN))


def _departures(
    profiles: Profiles,
    looked_at: Bools,
    questions: Sequence[str] | None,
    said: Sequence[str],
    words: int,
    seed: int,
) -> tuple[Departure, ...]:
    """The texts that come whatever was asked, each with what the attention before it tells."""
    if questions is None:
        return ()
    least = max(5, round(LEAST_HOLDERS * int(looked_at.sum())))
    found: list[Departure] = []
    texts = [t for t in shared_endings(said, looked_at, least, words) if t.foreign >= LEAST_FOREIGN]
    for payload in texts[:_MOST_TEXTS]:
        if any(departs(d) and _ends_with(payload, d.payload) for d in found):
            continue
        asked = [questions[i] for i in np.flatnonzero(looked_at).tolist()]
        share, markers = explained(payload.holders[looked_at], asked, seed)
        if share < MOST_EXPLAINED:
            named = named_before(payload, said, looked_at)
            known = replace(payload, explained=share, markers=markers, named=named)
            found.append(departure(profiles, known, questions, seed))
    return tuple(found)


def _ends_with(payload: Payload, shorter: Payload) -> bool:
    return payload.words[-len(shorter.words) :] == shorter.words
