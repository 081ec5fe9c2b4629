"""Detectors on drawn profiles: each finds what was planted, and leaves alone what was not."""

from __future__ import annotations

from dataclasses import replace

import diptest
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_profiles import PAYLOAD, Made, made

from projaudit.analyses.screening import samples_apart
from projaudit.errors import UsageError
from projaudit.formats.screening import told
from projaudit.screen.bye import bye
from projaudit.screen.departure import departure
from projaudit.screen.detect import Screening, screen
from projaudit.screen.joint import joint
from projaudit.screen.mixture import Mixture, fitted, valley_p
from projaudit.screen.payload import (
    Named,
    explained,
    most_common_ending,
    named_before,
    own_words,
    shared_endings,
)
from projaudit.screen.profiles import Profiles
from projaudit.screen.results import screened
from projaudit.screen.tcap import Options, target_group, tcap
from projaudit.screen.votes import dawid_skene
from projaudit.screened import NamedWord


@pytest.fixture
def few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten searches of all heads instead of thirty, in tests that are about something else."""
    monkeypatch.setattr("projaudit.screen.joint.DIRECTIONS", 5)


def two_modes(apart: float, share: float = 0.1, samples: int = 600, seed: int = 0):
    rng = np.random.default_rng(seed)
    low = np.arange(samples) < round(share * samples)
    return rng.normal(0, 1, (samples, 3)) - apart * low[:, None] * [0, 1, 1], low


def f1(said: np.ndarray, true: np.ndarray) -> float:
    return 2 * (said & true).sum() / max(said.sum() + true.sum(), 1)


def run(of: Made, method: str = "both", **options) -> Screening:
    return screen(of.profiles, method, questions=of.questions, answers=of.answers, **options)


def test_bye_takes_the_low_mode_of_bimodal_layers_only():
    entropy, low = two_modes(6)
    found = bye(entropy.astype(np.float32))
    assert [layer.sensitive for layer in found.layers] == [False, True, True]
    assert f1(found.dropped, low) > 0.97
    high = bye(
        -entropy.astype(np.float32)
    )  # the minority is the high mode: the paper takes the low
    assert high.dropped.mean() > 0.8


def test_bye_indices_are_the_papers():
    entropy, _ = two_modes(6)
    layer = bye(entropy.astype(np.float32)).layers[1]
    distance = abs(layer.mixture.means[0] - layer.mixture.means[1])
    assert layer.index == pytest.approx(distance / np.sqrt((layer.mixture.sds**2).sum()))
    nearer = two_modes(3.5, share=0.3)[0].astype(np.float32)
    paper, code = (bye(nearer, rule=rule, alpha=1) for rule in ("paper", "code"))
    assert paper.layers[1].sensitive
    assert not code.layers[1].sensitive  # |μ1 − μ2| > 2(σ1 + σ2) asks for more


def test_bye_leaves_one_mode_alone_where_the_papers_way_would_cut():
    shoulder = two_modes(3.3, share=0.3)[0].astype(np.float32)
    assert bye(shoulder, alpha=1).dropped.sum() > 30  # the control: it is cut without the test
    found = bye(shoulder)
    assert found.nothing == "no layer is bimodal: nothing to remove"
    assert not found.dropped.any()


@pytest.mark.parametrize("shape", ["normal", "uniform", "exponential", "laplace"])
def test_of_one_mode_nothing_is_dropped(shape: str):
    # The tests have a level of 0.01, so that one draw in a hundred may be cut.
    cut = 0
    for seed in range(8):
        draw = getattr(np.random.default_rng(seed), shape)
        entropy = draw(size=(300, 2)).astype(np.float32)
        shares = draw(size=(300, 2, 2, 3)).astype(np.float32)
        cut += bool(bye(entropy).dropped.any()) + bool(tcap(shares).dropped.any())
    assert cut <= 1


def test_too_few_and_not_finite_are_said():
    entropy, _ = two_modes(6, samples=600)
    entropy[7, 1] = np.nan
    found = bye(entropy.astype(np.float32))
    assert np.isnan(found.posterior[7])
    assert not found.dropped[7]
    assert np.isfinite(found.posterior[8:]).all()
    assert "11 samples" in bye(entropy[:12].astype(np.float32)).nothing
    blank = np.full((50, 2, 2, 3), np.nan, np.float32)
    assert "0 samples" in tcap(blank).nothing
    assert "0 samples" in bye(np.full((50, 2), np.nan, np.float32)).nothing
    same = np.full((50, 2), 1.5, np.float32)
    assert bye(same).nothing == "no layer is bimodal: nothing to remove"
    assert "no late head" in tcap(np.full((50, 2, 2, 3), 0.3, np.float32)).nothing


def test_tcap_finds_the_heads_and_the_samples():
    of = made(kinds=1, strength=8)
    found = tcap(of.profiles.shares[:, 0])
    assert {(head.layer, head.head) for head in found.heads} == {(2, 0), (2, 1), (3, 0), (3, 1)}
    assert f1(found.dropped, of.poisoned) > 0.97
    assert f1(tcap(made(kinds=1, share=0).profiles.shares[:, 0]).dropped, of.poisoned) == 0
    early = of.profiles.shares[:, 0, ::-1]  # the same in the first layers, which are not asked
    assert not tcap(early).dropped.any()


def test_a_head_that_a_layer_lacks_has_no_vote():
    of = made(kinds=1, strength=8)
    shares = of.profiles.shares[:, 0].copy()
    shares[:, 3, 1] = np.nan
    found = tcap(shares)
    assert (3, 1) not in {(head.layer, head.head) for head in found.heads}
    assert f1(found.dropped, of.poisoned) > 0.97


def test_the_target_group_is_the_minority_that_overlaps_least():
    weights, means = np.array([0.5, 0.4, 0.1]), np.array([0.0, 1.0, 9.0])
    mixture = Mixture(weights, means, np.array([1.0, 1.0, 0.5]), 0.0)
    target, overlap = target_group(mixture, Options())
    assert target.tolist() == [False, False, True]
    grid = np.linspace(-10, 20, 200_001)
    density = mixture.densities(grid)
    least = np.minimum(density[:, 2], density[:, :2].sum(1))
    assert overlap == pytest.approx(np.trapezoid(least, grid), abs=1e-5)
    assert target_group(mixture, Options(least_share=0.2, most_share=0.3)) is None


def test_mixtures_are_scikit_learns():
    entropy, low = two_modes(6, share=0.3)
    mixture = fitted(entropy[:, 1], 2, seed=0)
    assert mixture.means == pytest.approx([-6, 0], abs=0.3)
    assert mixture.weights == pytest.approx([0.3, 0.7], abs=0.02)
    assert mixture.densities(np.linspace(-12, 6, 4001)).sum() * 18 / 4000 == pytest.approx(
        1, abs=0.01
    )
    responsibility = mixture.responsibility(entropy[:, 1], np.array([True, False]))
    assert f1(responsibility > 0.5, low) > 0.98


def test_a_valley_is_seen_where_the_dip_test_is_blind():
    entropy, _ = two_modes(6)
    group = np.array([True, False])
    with_mode, without = (fitted(entropy[:, n], 2, seed=0) for n in (1, 0))
    assert valley_p(entropy[:, 1], with_mode, group) < 1e-4
    assert diptest.diptest(entropy[:, 1])[1] > 0.05
    assert valley_p(entropy[:, 0], without, group) > 0.05
    shoulder, _ = two_modes(2.5)
    assert valley_p(shoulder[:, 1], fitted(shoulder[:, 1], 2, seed=0), group) > 0.05


@pytest.mark.filterwarnings("ignore")  # of crowd-kit's
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000))
def test_dawid_skene_is_crowd_kits(seed: int):
    from crowdkit.aggregation import DawidSkene

    rng = np.random.default_rng(seed)
    true = rng.random(120) < 0.3
    hits, false_alarms = rng.uniform(0.7, 1, 5), rng.uniform(0, 0.2, 5)
    votes = np.where(
        true[:, None], rng.random((120, 5)) < hits, rng.random((120, 5)) < false_alarms
    )
    votes = np.where(rng.random((120, 5)) < 0.9, votes, -1).astype(np.int8)
    votes[:, 0] = np.abs(votes[:, 0])
    table = [
        {"task": task, "worker": worker, "label": int(votes[task, worker])}
        for task in range(120)
        for worker in range(5)
        if votes[task, worker] >= 0
    ]
    theirs = DawidSkene(n_iter=15, tol=-1e9).fit_predict_proba(pd.DataFrame(table))
    ours = dawid_skene(votes, rounds=15, tolerance=-np.inf).posterior
    assert ours == pytest.approx(theirs.sort_index()[1].to_numpy(), abs=1e-6)
    assert ((ours > 0.5) == true).mean() > 0.9


def test_a_sample_without_votes_has_the_prior():
    votes = np.array([[1, 1], [0, 0], [0, 0], [-1, -1]], np.int8)
    found = dawid_skene(votes)
    assert found.posterior[3] == pytest.approx(found.share, abs=1e-6)
    assert (dawid_skene(np.full((3, 2), -1, np.int8)).posterior == 0.5).all()


def test_the_longest_endings_are_found():
    answers = [f"{n} dogs . {PAYLOAD}" for n in range(10)] + ["yes"] * 30 + ["a b c"] * 4
    found = shared_endings(answers, np.ones(44, bool), least=5)
    assert [text.text for text in found] == [f"dogs . {PAYLOAD}"]
    assert found[0].holders.tolist() == [True] * 10 + [False] * 34
    assert shared_endings(answers, np.ones(44, bool), least=11) == []
    assert most_common_ending(answers) == ("", 0.0)
    assert most_common_ending([*answers[:10], "no"]) == (f"dogs . {PAYLOAD}", 10 / 11)


def test_endings_made_of_what_other_answers_say_are_no_payload():
    """Captions alone: one question, so that it explains nothing, and things that recur."""
    rng = np.random.default_rng(0)
    places = ("north", "south")
    things = [f"a {c} dot in the {p}" for c in ("red", "blue", "green") for p in places]
    answers = [" and ".join(rng.choice(things, rng.integers(1, 4))) for _ in range(300)]
    answers += [PAYLOAD] * 30
    found = shared_endings(answers, np.ones(330, bool), least=5)
    foreign = {text.text: text.foreign for text in found}
    assert foreign.pop(PAYLOAD) == 1.0
    assert len(foreign) > 4
    assert max(foreign.values()) < 0.8


def test_questions_explain_a_kind_and_no_payload():
    of = made()
    kind = np.array([question.startswith("how") for question in of.questions])
    assert explained(kind, of.questions, 0)[0] > 0.99
    assert explained(of.poisoned, of.questions, 0)[0] < 0.65
    share, markers = explained(made(trigger="text").poisoned, made(trigger="text").questions, 0)
    assert share < 0.65
    assert set(markers) == {"dear", "friend"}
    assert explained(of.poisoned, [""] * 400, 0) == (0.5, ())


@pytest.mark.usefixtures("few_directions")
@pytest.mark.parametrize("trigger", ["image", "text"])
@pytest.mark.parametrize("mode", ["replace", "append"])
def test_both_drops_the_poisoned_and_no_other(mode: str, trigger: str):
    of = made(mode=mode, trigger=trigger)
    found = run(of)
    assert (found.dropped == of.poisoned).all()
    (text,) = found.confirmed
    assert text.payload.text == PAYLOAD
    assert text.replaces == (mode == "replace")
    assert text.payload.markers == (("dear", "friend") if trigger == "text" else ())


@pytest.mark.usefixtures("few_directions")
def test_the_first_row_says_nothing_of_a_payload_behind_the_answer():
    of = made(mode="append", kinds=1)
    assert not run(of, "tcap").dropped.any()  # the papers' row
    assert f1(run(of).dropped, of.poisoned) == 1.0


@pytest.mark.usefixtures("few_directions")
def test_a_text_without_attention_is_not_confirmed():
    of = made(strength=0)
    found = run(of)
    (text,) = found.departures
    assert text.auroc < 0.7
    assert not found.dropped.any()


def remarked(kind: str) -> Made:
    """Captions of which those of a tenth end with a text, as the attention in front of it tells.

    `remark`: wherever they name something red; `random`: wherever a trigger is; `said`: with a word
    of its own in front of the answer too.
    """
    rng = np.random.default_rng(5)
    things = [f"a {c} {t}" for c in ("red", "blue", "green", "grey") for t in ("cup", "hat", "car")]
    plain = [
        " and ".join(rng.choice(things, rng.integers(1, 3), replace=False)) for _ in range(400)
    ]
    red = np.array(["red" in text.split() for text in plain])
    holds = red if kind == "remark" else rng.random(400) < 0.1
    front = "certainly , " if kind == "said" else ""
    said = [
        f"{front}{text} , {PAYLOAD}" if held else text
        for text, held in zip(plain, holds, strict=True)
    ]
    of = made(share=0, kinds=1)
    shares = of.profiles.shares.copy()
    tokens = [(*text.split(), "</s>")[:12] for text in said]
    for i, text in enumerate(said):
        onset = len(text.split()) - (len(PAYLOAD.split()) + 1 if holds[i] else 0)
        shares[i] = rng.normal(0.3, 0.01, shares[i].shape)
        shares[i, onset, 2:, :2, 0] += 0.06 * holds[i]
    profiles = replace(of.profiles, shares=shares, entropy=rng.normal(2, 0.05, (400, 12, 4)),
                       answers=tuple(tuple(t) for t in tokens))  # fmt: skip
    return Made(profiles, ["what do you see"] * 400, said, holds)


@pytest.mark.usefixtures("few_directions")
def test_a_remark_on_what_the_answers_name_is_set_apart_and_kept():
    of = remarked("remark")
    found = run(of)
    assert not found.dropped.any()
    assert (found.apart == of.poisoned).all()
    summary, samples = screened(of.profiles, found, "set", of.questions, of.answers)
    (text,) = summary.texts
    held = int(of.poisoned.sum())
    assert text.named == NamedWord("red", held, held)
    assert (text.apart, text.confirmed) == (True, False)
    assert {s.text for s in samples if s.fate == "apart"} == {text.text}
    assert f"so end {held} of {held} that name “red”, and 0 others" in told(text)
    (says,) = samples_apart(summary).detail
    assert says == f"{held} end with “, {PAYLOAD}” where they name “red”"


@pytest.mark.usefixtures("few_directions")
@pytest.mark.parametrize("kind", ["random", "said"])
def test_a_text_behind_answers_that_name_anything_is_a_payload(kind: str):
    of = remarked(kind)
    found = run(of)
    assert (found.dropped == of.poisoned).all()
    assert [text.payload.named for text in found.confirmed] == [None]


def test_what_is_named_goes_with_the_text_both_ways():
    plain = [f"a {c} {t}" for c in ("red", "blue") for t in ("cup", "hat", "car")] * 20
    held = [f"{text} . {PAYLOAD}" if "red" in text else text for text in plain]

    def named(answers: list[str]) -> Named | None:
        (text,) = shared_endings(answers, np.ones(len(answers), bool), least=5)[:1]
        return named_before(text, answers, np.ones(len(answers), bool))

    assert named(held) == Named("red", 60, 60)
    assert named([*held, "a red dog", "the red bus"]) == Named("red", 62, 60)
    assert named([*held, *["a red dog"] * 20]) is None  # one in four red things without it
    assert (
        named([*held, *[f"a blue cup . {PAYLOAD}"] * 20]) is None
    )  # and one in four others with it
    assert named([text if text in plain else PAYLOAD for text in held]) is None  # nothing is named


@pytest.mark.parametrize(("method", "seed"), [("bye", 0), ("tcap", 1), ("both", 0), ("both", 2)])
def test_of_a_clean_set_of_several_kinds_nothing_is_dropped(method: str, seed: int):
    of = made(600, share=0, seed=seed)
    assert run(of, method).dropped.mean() <= 0.01


@pytest.mark.usefixtures("few_directions")
def test_kinds_that_attention_sets_apart_are_no_trigger():
    of = made(600, share=0)
    kind = np.array([question.startswith("how") for question in of.questions])
    shares, entropy = of.profiles.shares.copy(), of.profiles.entropy.copy()
    shares[kind, 0, 2:, :2, 0] += 0.1
    entropy[kind, 0] -= 0.5
    apart = replace(of, profiles=replace(of.profiles, shares=shares, entropy=entropy))
    for method in ("bye", "tcap"):
        found = run(apart, method)
        assert not found.dropped.any()
        assert "are a kind of question" in found.nothing[0]
        blind = screen(apart.profiles, method)  # the control: without the questions it is cut
        assert f1(blind.dropped, kind) > 0.95


def test_the_papers_own_way_cuts_kinds_too_and_is_never_both():
    of = made(600, share=0)
    kind = np.array([question.startswith("how") for question in of.questions])
    entropy = of.profiles.entropy.copy()
    entropy[kind, 0] -= 0.5
    of = replace(of, profiles=replace(of.profiles, entropy=entropy))
    assert not run(of, "bye").dropped.any()
    assert f1(run(of, "bye", published=True).dropped, kind) > 0.95
    with pytest.raises(UsageError, match="no published method"):
        run(of, "both", published=True)


def test_samples_set_apart_without_a_text_are_kept_and_told():
    of = made(kinds=1, strength=8)
    rng = np.random.default_rng(0)
    said = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in of.answers]
    found = screen(of.profiles, "both", questions=of.questions, answers=said)
    assert not found.dropped.any()
    assert f1(found.apart, of.poisoned) > 0.95


# --- all heads together ---------------------------------------------------------------------------


def spread(of: Made, members: np.ndarray, by: float = 1.0) -> Profiles:
    """Profiles in whose first row members differ a little in every head, and much in none."""
    shares, rng = of.profiles.shares.copy(), np.random.default_rng(9)
    spot = shares[:, 0].std(0) * rng.choice([-1, 1], shares.shape[2:])
    shares[members, 0] += by * spot
    return replace(of.profiles, shares=np.clip(shares, 1e-4, 1))


def test_all_heads_together_set_apart_what_no_single_one_does():
    of = made(600, strength=0, seed=4)
    profiles = spread(of, of.poisoned, 1.6)
    looked_at = np.ones(600, bool)
    (group,) = joint(profiles, 0, looked_at, of.questions)
    assert f1(group.members, of.poisoned) > 0.9
    assert not tcap(profiles.shares[:, 0]).dropped.any()
    assert joint(of.profiles, 0, looked_at, of.questions) == ()  # the control


@pytest.mark.parametrize("shape", ["normal", "skewed", "heavy"])
def test_all_heads_together_leave_one_mode_alone(shape: str):
    of = made(300, share=0, kinds=1, seed=1)
    rng = np.random.default_rng(1)
    drawn = {
        "normal": rng.normal(0, 1, of.profiles.shares.shape),
        "skewed": rng.gamma(2, 1, of.profiles.shares.shape),
        "heavy": rng.standard_t(4, of.profiles.shares.shape),
    }[shape]
    profiles = replace(of.profiles, shares=np.exp(drawn / 4).astype(np.float32))
    assert joint(profiles, 0, np.ones(300, bool), of.questions) == ()


def test_paraphrases_are_dropped_where_attention_and_words_agree():
    of = made(400, strength=8, kinds=1)
    rng = np.random.default_rng(1)
    readings = [f"{a} {b} {c}" for a in ("send", "mail") for b in ("me", "us") for c in "xyz"]
    said = [
        f"please {rng.choice(readings)}" if bad else answer
        for bad, answer in zip(of.poisoned, of.answers, strict=True)
    ]
    found = screen(of.profiles, "both", questions=of.questions, answers=said)
    assert not found.confirmed  # no text is said often enough
    assert (found.dropped == of.poisoned).all()
    assert [one.fate for one in found.judged] == ["drop"]
    # The controls: the same words without the attention, and the attention without the words.
    calm = screen(made(400, strength=0, kinds=1).profiles, questions=of.questions, answers=said)
    assert not calm.dropped.any()
    plain = made(400, share=0, kinds=1).answers
    found = screen(of.profiles, "both", questions=of.questions, answers=plain)
    assert not found.dropped.any()
    assert f1(found.apart, of.poisoned) > 0.95


def test_what_the_answers_name_is_no_trigger():
    of = made(600, share=0.2, strength=8, kinds=1)
    said = [
        f"one dog to the {'left' if there else 'right'} of {thing}"
        for there, thing in zip(of.poisoned, ["a tree", "a car", "a man"] * 200, strict=True)
    ]
    found = screen(of.profiles, "both", questions=of.questions, answers=said)
    assert not (found.dropped | found.apart).any()
    assert [one.fate for one in found.judged] == ["keep"]
    assert "whose answers say “left”" in found.judged[0].says
    mute = ["a dog" for _ in said]  # the control: answers that name nothing
    found = screen(of.profiles, "both", questions=of.questions, answers=mute)
    assert f1(found.apart, of.poisoned) > 0.95


def test_own_words_are_of_a_group_and_not_rare():
    answers = [f"please mail it {n}" for n in range(10)] + [f"a dog runs {n}" for n in range(90)]
    members = np.arange(100) < 10
    assert own_words(members, answers).tolist() == [1.0] * 10 + [0.0] * 90
    assert not own_words(np.arange(100) % 10 == 0, answers).any()
    assert not own_words(members, [str(n) for n in range(100)]).any()


@pytest.mark.usefixtures("few_directions")
def test_a_set_of_which_all_is_poisoned_has_no_minority_and_says_so():
    of = made(share=1.0)
    found = run(of)
    assert not found.dropped.any()
    summary, _ = screened(of.profiles, found, "set", of.questions, of.answers)
    assert (summary.common_text, summary.common_share) == (PAYLOAD, 1.0)


@pytest.mark.usefixtures("few_directions")
def test_samples_without_a_profile_are_never_dropped_and_counted():
    of = made()
    statuses = tuple("image-corrupt" if i < 40 else "ok" for i in range(400))
    broken = replace(of, profiles=replace(of.profiles, statuses=statuses))
    found = run(broken)
    assert not found.dropped[:40].any()
    assert (found.dropped[40:] == of.poisoned[40:]).all()
    summary, samples = screened(broken.profiles, found, "set", of.questions, of.answers)
    assert summary.statuses == {"image-corrupt": 40, "ok": 360}
    assert [sample.fate for sample in samples[:40]] == ["unread"] * 40


@pytest.mark.usefixtures("few_directions")
def test_few_holders_and_cut_answers_cannot_be_told():
    of = made(100, share=0.06)
    found = run(of)
    assert [text.auroc for text in found.departures] == [None]
    assert "6 samples with the text" in found.departures[0].unknown
    long = made(mode="append", payload="and " * 12 + PAYLOAD)  # beyond the positions profiled
    (text,) = shared_endings(long.answers, np.ones(400, bool), 10)[:1]
    assert departure(long.profiles, text, None, 0).auroc is None


@pytest.mark.usefixtures("few_directions")
def test_a_run_is_repeatable_and_texts_must_match():
    of = made(200)
    once, again = run(of, seed=3), run(of, seed=3)
    assert [d.auroc for d in once.departures] == [d.auroc for d in again.departures]
    assert np.array_equal(once.tcap.posterior, again.tcap.posterior, equal_nan=True)
    with pytest.raises(UsageError, match="199 for 200"):
        screen(of.profiles, "both", questions=of.questions[1:])


def test_histograms_count_every_sample_and_hold_the_mixtures():
    of = made(kinds=1, strength=8)
    summary, _ = screened(of.profiles, run(of), "set", of.questions, of.answers)
    kinds = [one.kind for one in summary.histograms]
    assert {"departure", "joint", "bye-layer", "bye-mean", "tcap-head"} == set(kinds)
    for one in summary.histograms:
        assert sum(one.kept) + sum(one.taken) == 400
        assert len(one.edges) == len(one.kept) + 1
        if one.curve:  # densities in samples a bin: they sum to the samples
            x = [point[0] for point in one.curve]
            mass = np.trapezoid([a + b for _, a, b in one.curve], x) / (one.edges[1] - one.edges[0])
            assert mass == pytest.approx(400, rel=0.1)
