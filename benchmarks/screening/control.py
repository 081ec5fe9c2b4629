"""What the answers alone give away, without any attention: groups with words of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from projaudit.screen.detect import LEAST_HOLDERS, LEAST_OWN, MOST_EXPLAINED
from projaudit.screen.payload import MOST_SHARE, Bools, explained, own_words


def with_own_words(answers: Sequence[str], questions: Sequence[str], seed: int = 0) -> Bools:
    """(samples,) of which at least half of the answer is words that only the group says.

    From the answers with each word in turn, the group is what `own_words` says of it, until that
    changes nothing. Groups of 1 to 50 % count, unless the questions explain them.
    """
    split = [set(answer.lower().split()) for answer in answers]
    found = np.zeros(len(answers), bool)
    tried: set[bytes] = set()
    for word in sorted(set.union(*split)):
        members = np.array([word in said for said in split], bool)
        while members.tobytes() not in tried and within(members):
            tried.add(members.tobytes())
            grown = own_words(members, answers) >= LEAST_OWN
            if (grown == members).all():
                if explained(members, questions, seed)[0] < MOST_EXPLAINED:
                    found |= members
                break
            members = grown
    return found


def within(members: Bools) -> bool:
    return bool(LEAST_HOLDERS <= members.mean() <= MOST_SHARE)
