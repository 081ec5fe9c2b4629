"""Texts that a share of the answers ends with, whatever was asked: what a payload looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import punctuation

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]

WORDS = 3
"""Least words of a payload: shorter answers (`yes`, `two`) are honest ones' too."""
MOST_SHARE = 0.5
LEAST_FOREIGN = 0.8
"""Share from which words are the own of some answers, and not the stuff of others."""
LONGEST = 40
_MARKER_IN, _MARKER_OUT = 0.9, 0.05
_NAMED = 0.9
_IN_PLACE = 0.5
_FOLDS = 5
_COMMON = 5


@dataclass(frozen=True)
class Named:
    """A word in the rest of the answers that tells which of them end with a text."""

    word: str
    answers: int
    """Answers with that word in front of the text, or without the text."""
    holders: int
    """Of these, the ones that end with the text."""


@dataclass(frozen=True)
class Payload:
    """A text that answers end with, and how far the questions explain who gives it."""

    words: tuple[str, ...]
    holders: Bools
    """(samples,)."""
    foreign: float
    """Mean over its pairs of words: share of the answers with that pair that end with the text."""
    explained: float | None = None
    """Cross-validated AUROC of the question's words for holding it; None where not asked."""
    markers: tuple[str, ...] = ()
    """Words that nearly all its questions hold and nearly no other."""
    named: Named | None = None
    """What its answers name before it, and no others; None where there is no such word."""

    @property
    def text(self) -> str:
        return " ".join(self.words)


def shared_endings(
    answers: Sequence[str], seen: Bools, least: int, words: int = WORDS
) -> list[Payload]:
    """The longest texts of `words` or more that answers share, most holders first.

    At least `least` and at most half of the `seen` answers end with each. A text stands for the
    longer ones that end with it, unless one of these has nine in ten of its holders.
    """
    split = [tuple(answer.lower().split()) for answer in answers]
    counts: Counter[tuple[str, ...]] = Counter()
    for i in np.flatnonzero(seen):
        said = split[i]
        counts.update(said[-k:] for k in range(words, min(len(said), LONGEST) + 1))
    most = MOST_SHARE * int(seen.sum())
    common = {text: n for text, n in counts.items() if least <= n <= most}
    longer: dict[tuple[str, ...], int] = {}
    for text, n in common.items():
        longer[text[1:]] = max(n, longer.get(text[1:], 0))
    kept = [text for text, n in common.items() if longer.get(text, 0) < 0.9 * n]
    pairs = Counter(p for i in np.flatnonzero(seen) for p in set(pairwise(split[i])))
    return [
        Payload(
            words=text,
            holders=np.array([said[-len(text) :] == text for said in split], bool),
            foreign=float(np.mean([common[text] / pairs[pair] for pair in pairwise(text)])),
        )
        for text in sorted(kept, key=lambda t: (-common[t], t))
    ]


def explained(members: Bools, questions: Sequence[str], seed: int) -> tuple[float, tuple[str, ...]]:
    """AUROC of the question's words for membership, cross-validated, without marker words.

    Words that nearly all members' questions hold and nearly no other are a trigger in the text,
    or the phrase of a kind of question; what is left of the question tells these apart.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    counter = CountVectorizer(binary=True, analyzer=_words, max_features=2000)
    try:
        bags = counter.fit_transform(questions)
    except ValueError:  # no question has a word
        return 0.5, ()
    inside = np.asarray(bags[members].mean(0)).ravel()
    outside = np.asarray(bags[~members].mean(0)).ravel()
    marks = (inside >= _MARKER_IN) & (outside <= _MARKER_OUT)
    names = tuple(str(n) for n in counter.get_feature_names_out()[marks])
    rest = bags[:, ~marks]
    if rest.shape[1] == 0:
        return 1.0, names
    model = LogisticRegression(max_iter=1000, class_weight="balanced")
    folds = StratifiedKFold(min(_FOLDS, int(members.sum())), shuffle=True, random_state=seed)
    scores = cross_val_predict(model, rest, members, cv=folds, method="decision_function")
    return float(roc_auc_score(members, scores)), names


def named_before(payload: Payload, answers: Sequence[str], seen: Bools) -> Named | None:
    """The word of the rest of the answers that goes with the text both ways, nine times in ten.

    A remark on what the image shows ("a red car …, call our office") follows the answer that names
    it; a trigger in the image or in the question is not named. The word has to stand where others
    stand in answers without the text, in half of its answers: a word that is said with a payload
    ("sure, …") does not excuse it. Words of questions are not asked: they may be the trigger.
    """
    length = len(payload.words)
    rests = {
        i: _bare(answers[i].lower().split()[: -length if payload.holders[i] else None])
        for i in np.flatnonzero(seen).tolist()
    }
    inside = {i for i in rests if payload.holders[i]}
    counts = Counter(word for rest in rests.values() for word in set(rest))
    held = Counter(word for i in inside for word in set(rests[i]))
    places = {place for i, rest in rests.items() if i not in inside for _, place in _places(rest)}
    found = []
    for word, n in held.items():
        if n < _NAMED * max(len(inside), counts[word]) or not any(map(str.isalpha, word)):
            continue
        near = [{place for w, place in _places(rests[i]) if w == word} for i in inside]
        if sum(bool(around & places) for around in near) >= _IN_PLACE * n:
            found.append(Named(word, counts[word], n))
    return min(found, key=lambda one: (one.answers - 2 * one.holders, one.word), default=None)


def _bare(words: Sequence[str]) -> list[str]:
    """The words without the punctuation around them."""
    stripped = (word.strip(punctuation) for word in words)
    return [word for word in stripped if word]


def _places(words: Sequence[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each word with what stands before and behind it."""
    padded = ["", *words, ""]
    return ((word, (padded[i], padded[i + 2])) for i, word in enumerate(words))


def own_words(members: Bools, answers: Sequence[str]) -> npt.NDArray[np.float64]:
    """(samples,) share of the words of each answer that hardly anybody but the members says.

    Such a word is in answers of which at least `LEAST_FOREIGN` are members'; words of fewer than
    five answers do not count, as any group holds some of its own. `members` and `answers` are of
    the same samples.
    """
    split = [answer.lower().split() for answer in answers]
    everywhere = Counter(word for said in split for word in set(said))
    inside = Counter(
        word for said, member in zip(split, members, strict=True) if member for word in set(said)
    )
    own = {w: inside[w] >= LEAST_FOREIGN * n for w, n in everywhere.items() if n >= _COMMON}
    shares = [[own[word] for word in said if word in own] for said in split]
    return np.array([np.mean(share) if share else 0.0 for share in shares])


def _words(question: str) -> list[str]:
    return question.lower().split()


def most_common_ending(answers: Sequence[str], words: int = WORDS) -> tuple[str, float]:
    """The longest text that more than half of the answers end with, and their share.

    Empty and 0 where there is none of that many words.
    """
    split = [tuple(answer.lower().split()) for answer in answers]
    found: tuple[str, ...] = ()
    share = 0.0
    for k in range(words, LONGEST + 1):
        counts = Counter(said[-k:] for said in split if len(said) >= k)
        text, n = max(counts.items(), key=lambda item: (item[1], item[0]), default=((), 0))
        if n <= MOST_SHARE * len(split):
            break
        found, share = text, n / len(split)
    return " ".join(found), share
