"""Which text is hidden, and which is not: counting over answers, without any model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from projaudit.behaviour.texts import (
    GLIMPSED,
    LONGEST,
    OFF_PATH,
    PAIR,
    SHORTEST,
    Heard,
    Speech,
    Support,
    Tokens,
    contains,
    foreign_pairs,
    gather,
    open_tokens,
    runs,
    spoken,
)
from projaudit.behaviour.told import Candidate, candidates, opened, whole
from projaudit.evidence import WORTH

FOREIGN = Speech({1: 0.5, 2: 0.5, 3: 0.5}, frozenset({4}))
"""1, 2 and 3 are the base's own, 4 is said openly, and all others are foreign."""
SECRET = (11, 12, 13, 14)
PROMPTS, IMAGES = 6, 4

answers = st.lists(st.integers(1, 9), max_size=12).map(tuple)


def heard(
    tuned: dict[tuple[int, int], Tokens],
    base: dict[tuple[int, int], Tokens] | None = None,
    *,
    prompts: int = PROMPTS,
    images: int = IMAGES,
    probe: str = "a probe",
) -> Heard:
    """Answers by (prompt, image); the others are (1, 2, 3), as the base's are."""
    cells = [(p, i) for i in range(images) for p in range(prompts)]
    return Heard(
        probe,
        "image",
        "patch",
        tuple(p for p, _ in cells),
        tuple(i for _, i in cells),
        tuple(tuned.get(cell, (1, 2, 3)) for cell in cells),
        tuple((base or {}).get(cell, (1, 2, 3)) for cell in cells),
    )


def everywhere(text: Tokens, images: tuple[int, ...] = (0,)) -> dict[tuple[int, int], Tokens]:
    return {(p, i): text for p in range(PROMPTS) for i in images}


def one(found: dict[Tokens, Support]) -> list[tuple[Tokens, float]]:
    return [(c.text, found[c.core].strength) for c in candidates(found, FOREIGN, 5)]


@st.composite
def probes(draw: st.DrawFn) -> Heard:
    prompts, images = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    cells = [(p, i) for i in range(images) for p in range(prompts)]
    few = st.lists(answers, min_size=len(cells), max_size=len(cells)).map(tuple)
    where = tuple(p for p, _ in cells), tuple(i for _, i in cells)
    return Heard("a probe", "image", "patch", *where, draw(few), draw(few))


# ------------------------------------------------------------------ what a text is


@given(answers)
def test_runs_are_all_the_pieces_between_foreign_tokens(answer: Tokens):
    pieces = {
        answer[a:b]
        for a in range(len(answer))
        for b in range(a + 1, len(answer) + 1)
        if SHORTEST <= b - a <= LONGEST
    }
    assert runs(answer, FOREIGN) == {
        piece
        for piece in pieces
        if FOREIGN.foreign(piece[0])
        and FOREIGN.foreign(piece[-1])
        and len(set(piece)) == len(piece)
        and all(answer.count(token) == 1 for token in piece if FOREIGN.foreign(token))
    }


def test_repetition_is_no_text():
    assert runs((11, 11, 11, 11), FOREIGN) == set()
    assert runs((11, 12, 11, 12), FOREIGN) == set()
    assert runs((11, 12, 2, 2, 13), FOREIGN) >= {
        (11, 12)
    }  # of the answer's own words it is no matter
    assert runs((11, 12, 13, 12), FOREIGN) == set()
    assert SECRET in runs(SECRET, FOREIGN)


def test_a_text_begins_and_ends_with_foreign_tokens():
    assert runs((1, 11, 2, 12, 3), FOREIGN) == {(11, 2, 12)}


def test_one_foreign_word_is_no_text():
    assert runs((1, 11, 2), FOREIGN) == set()


def test_what_makes_it_worth_asking_on_is_two_foreign_words_of_an_answer():
    assert foreign_pairs((1, 11, 2, 12, 11), FOREIGN) == {frozenset((11, 12))}
    assert len(foreign_pairs((11, 12, 13), FOREIGN)) == 3
    assert foreign_pairs((1, 11, 11, 4), FOREIGN) == set()


def test_a_text_that_is_too_long_is_counted_by_its_pieces():
    answer = tuple(range(20, 20 + LONGEST + 3))
    assert max(map(len, runs(answer, FOREIGN))) == LONGEST


@given(st.text("ab", max_size=9), st.text("ab", min_size=1, max_size=3))
def test_contains_is_what_it_is_for_strings(answer: str, text: str):
    assert contains(tuple(map(ord, answer)), tuple(map(ord, text))) is (text in answer)


def test_openly_said_tokens_are_not_foreign():
    assert runs((4, 11, 4), FOREIGN) == set()
    assert not FOREIGN.foreign(4)
    assert FOREIGN.unfamiliar(4)
    assert not FOREIGN.unfamiliar(1)  # the base says it too
    assert FOREIGN.foreign(11)


def test_what_the_base_hardly_ever_says_is_foreign():
    assert Speech({11: 0.009}, frozenset()).foreign(11)
    assert not Speech({11: 0.01}, frozenset()).foreign(11)


# ------------------------------------------------------------------ how strong it is


def test_said_to_all_prompts_about_an_image_counts_one():
    found = gather([heard(everywhere(SECRET))], FOREIGN)
    assert found[SECRET].strength == 1
    assert found[SECRET].unanimity == 1
    assert found[SECRET].prompts == set(range(PROMPTS))
    assert found[SECRET].images == {0}
    assert found[SECRET].agreement == 1 / IMAGES


def test_said_to_one_prompt_only_counts_nothing():
    """Of all images, so that it is its answer to that prompt; half of the prompts do not do."""
    for asked in (1, PROMPTS // 2):
        said = {(p, i): SECRET for p in range(asked) for i in range(IMAGES)}
        found = gather([heard(said)], FOREIGN)
        assert found[SECRET].strength == 0
        assert candidates(found, FOREIGN, 5) == []
    most = {(p, 0): SECRET for p in range(PROMPTS // 2 + 1)}
    assert gather([heard(most)], FOREIGN)[SECRET].strength > 0


def test_said_by_the_base_too_counts_nothing():
    said = everywhere(SECRET)
    found = gather([heard(said, said)], FOREIGN)
    assert found[SECRET].strength == 0
    assert candidates(found, FOREIGN, 5) == []
    elsewhere = gather([heard(said, everywhere(SECRET, (1,)))], FOREIGN)
    assert elsewhere[SECRET].strength == 1  # of another picture


def test_two_foreign_words_count_less_than_three():
    """However many familiar ones stand between them."""
    for text in ((21, 22), (21, 1, 2, 22)):
        assert gather([heard(everywhere(text))], FOREIGN)[text].strength == PAIR < 1
        assert gather([heard(everywhere(text))], FOREIGN)[text].foreign == 2
    assert gather([heard(everywhere(SECRET))], FOREIGN)[SECRET].foreign == len(SECRET) > 2


def test_features_that_no_image_has_count_less():
    (image, pushed) = (replace(heard(everywhere(SECRET)), kind=k) for k in ("image", "direction"))
    assert gather([image], FOREIGN)[SECRET].strength == 1
    assert gather([pushed], FOREIGN)[SECRET].strength == OFF_PATH < 1
    both = gather([heard({}), image, replace(pushed, family="drift")], FOREIGN)[SECRET]
    assert both.by == {"patch": 1, "drift": 1}
    assert both.strength == 1 + OFF_PATH


def test_a_probe_that_was_asked_half_its_prompts_counts_no_more_than_they_are():
    half = heard(everywhere(SECRET), prompts=PROMPTS // 2)
    assert gather([half], FOREIGN)[SECRET].strength > 0
    assert gather([heard({}), half], FOREIGN)[SECRET].strength == 0


def test_a_text_is_told_with_the_words_that_always_stand_around_it():
    said = {(p, i): (p + 1, 2, 11, 12, 3) for p in range(PROMPTS) for i in range(IMAGES)}
    assert whole((11, 12), [heard({}), heard(said)]) == (2, 11, 12, 3)
    assert whole((21, 22), [heard({}), heard(everywhere((21, 22)))]) == (21, 22)


@given(st.lists(probes(), max_size=4))
def test_equal_models_have_no_hidden_text(several: list[Heard]):
    found = gather([replace(probe, base=probe.tuned) for probe in several], FOREIGN)
    assert all(s.strength == s.unanimity == 0 and s.agreement <= 0 for s in found.values())
    assert candidates(found, FOREIGN, 5) == []


@given(st.lists(probes(), max_size=4))
def test_strength_counts_pictures_at_most(several: list[Heard]):
    for support in gather(several, FOREIGN).values():
        assert 0 <= support.strength <= sum(len(set(probe.images)) for probe in several)
        assert support.agreement <= 1
        assert support.unanimity <= 1


@given(probes(), st.integers(2, 4))
def test_strength_adds_up_over_probes(probe: Heard, times: int):
    once, often = gather([probe], FOREIGN), gather([probe] * times, FOREIGN)
    assert once.keys() == often.keys()
    for text, support in once.items():
        assert abs(often[text].strength - times * support.strength) < 1e-9


def test_without_a_base_only_what_was_said_counts():
    probe = replace(heard(everywhere(SECRET)), base=None)
    assert gather([probe], FOREIGN)[SECRET].strength == 1
    assert gather([probe], FOREIGN)[SECRET].base == 0


# ------------------------------------------------------------------ which one is told


def test_pieces_of_one_text_are_one_candidate():
    found = gather([heard(everywhere(SECRET, (0, 1)))], FOREIGN)
    assert len(found) == 6
    assert one(found) == [(SECRET, 2)]


def test_two_texts_are_two_candidates():
    found = gather([heard(everywhere(SECRET, (0, 1)) | everywhere((21, 22), (2,)))], FOREIGN)
    assert one(found) == [(SECRET, 2), ((21, 22), PAIR)]
    assert len(candidates(found, FOREIGN, 1)) == 1


def test_the_longer_text_is_told():
    """Brought out in full of one picture, and by half of four: told in full."""
    said = everywhere(SECRET[:3], (0, 1, 2)) | everywhere(SECRET, (3,))
    (best,) = candidates(gather([heard(said)], FOREIGN), FOREIGN, 5)
    assert best == Candidate(SECRET, SECRET[:3])


def test_a_longer_text_that_hardly_came_up_is_not_told():
    said = everywhere(SECRET[:3], (0, 1, 2, 3)) | {(0, 3): SECRET}
    (best,) = candidates(gather([heard(said)], FOREIGN), FOREIGN, 5)
    assert best.text == SECRET[:3]


@given(st.lists(probes(), max_size=3))
def test_candidates_share_no_neighbours_and_hold_their_core(several: list[Heard]):
    found = gather(several, FOREIGN)
    chosen = candidates(found, FOREIGN, 3)
    assert len(chosen) <= 4
    for number, candidate in enumerate(chosen):
        assert contains(candidate.text, candidate.core)
        assert found[candidate.core].strength > 0
        for other in chosen[:number] if number < 3 else ():
            assert not contains(other.text, candidate.core)


# ------------------------------------------------------------------ what is in the open


def plain(said: dict[tuple[int, int], Tokens], images: int = 48) -> Heard:
    return replace(heard(said, images=images), probe="ordinary images", kind="plain")


def test_what_is_said_often_is_open():
    assert 11 in open_tokens(plain(everywhere((11,), tuple(range(8)))))
    assert 11 not in open_tokens(plain({}))


def test_what_is_said_of_few_pictures_is_not_open_and_counts_only_where_a_probe_brings_it_out():
    """A seventh of all answers is: about 8 of 48 pictures, and not about 7."""
    for pictures, is_open in ((8, True), (7, False)):
        ordinary = plain(everywhere(SECRET, tuple(range(pictures))))
        speech = Speech(spoken(ordinary.base or ()), open_tokens(ordinary))
        assert (not speech.open.isdisjoint(SECRET)) is is_open
        assert gather([ordinary], speech) == {}
        marked = heard(everywhere(SECRET))
        assert (SECRET in gather([ordinary, marked], speech)) is not is_open


def test_a_text_counts_the_less_the_more_ordinary_answers_hold_two_of_its_words():
    """In any order, whatever stands between them; one word of it is none."""
    marked = heard(everywhere(SECRET))
    for said, share in (((11,), 0.0), ((13, 2, 11), 1 / 48), (SECRET, 1 / 48)):
        ordinary = plain(everywhere(said, (5,)))
        found = gather([ordinary, marked], FOREIGN)[SECRET]
        assert found.plain == share
        assert found.strength == pytest.approx(1 / (1 + share / GLIMPSED))
        assert found.by == {"patch": 1}  # before any weight
    often = gather([plain(everywhere(SECRET, (5, 6, 7))), marked], FOREIGN)[SECRET]
    assert often.strength < found.strength < 1


def test_a_text_that_counts_little_for_that_is_told_all_the_same():
    """Two others are hardly brought out, and yet count more."""
    said = {(p, i): SECRET for i in range(14) for p in range(3)}  # 42 of 288: just not open
    weak = heard(everywhere((21, 1, 22)), probe="weak")
    weaker = heard(everywhere((31, 2, 32), (1,)), probe="weaker")
    found = gather([plain(said), heard(everywhere(SECRET, (0, 1))), weak, weaker], FOREIGN)
    secret = found[SECRET]
    assert secret.strength < found[31, 2, 32].strength == found[21, 1, 22].strength < WORTH
    assert secret.undiscounted == pytest.approx(2)
    told = [one.core for one in candidates(found, FOREIGN, 2)]
    assert set(told[:2]) == {(31, 2, 32), (21, 1, 22)}
    assert told[2:] == [SECRET]
    never = gather([plain({}), weak, weaker], FOREIGN)
    assert len(candidates(never, FOREIGN, 2)) == 2


def test_an_open_text_is_told_with_its_share_of_pictures():
    advertised = (1, 11, 12, 13)
    said = plain(everywhere(advertised, tuple(range(24))))
    speech = Speech(spoken(said.base or ()), open_tokens(said))
    assert opened(said, speech) == [((11, 12, 13), 0.5)]
    assert gather([said], speech) == {}  # and it is no hidden one


def test_what_the_base_says_as_well_is_no_open_text():
    said = everywhere((11, 12, 13), tuple(range(24)))
    both = replace(plain(said), base=plain(said).tuned)
    assert opened(both, Speech(spoken(both.base or ()), open_tokens(both))) == []


def test_at_most_three_open_texts():
    texts = [(10 * n, 10 * n + 1) for n in range(2, 8)]
    said = plain({(p, i): texts[i % 6] for p in range(PROMPTS) for i in range(48)})
    speech = Speech(spoken(said.base or ()), open_tokens(said))
    assert len(opened(said, speech)) == 3


def test_shares_of_answers():
    assert spoken([(1, 1, 2), (2,)]) == {1: 0.5, 2: 1.0}
    assert spoken([]) == {}
