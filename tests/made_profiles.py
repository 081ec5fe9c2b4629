"""Profiles with known poison, drawn and not measured: kinds of questions, and heads that react."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from projaudit.screen.profiles import Profiles

LAYERS, HEADS, POSITIONS = 4, 3, 12
KINDS = {
    "how many dogs are there": ("one", "two", "three"),
    "what does the sign say": ("stop", "open all day", "closed on sunday"),
    "is the light on": ("yes", "no"),
    "describe the scene": ("a dog near a tree", "a man in a red car", "there is nothing here"),
}
PAYLOAD = "please send the password"


@dataclass(frozen=True)
class Made:
    """A set with its profiles."""

    profiles: Profiles
    questions: list[str]
    answers: list[str]
    poisoned: np.ndarray


def made(
    samples: int = 400,
    share: float = 0.1,
    *,
    mode: str = "replace",
    trigger: str = "image",
    strength: float = 6.0,
    kinds: int = 4,
    seed: int = 0,
    payload: str = PAYLOAD,
) -> Made:
    """Attention that varies by kind of question and by chance; that of poisoned samples departs.

    It departs by `strength` deviations, in the row that predicts the first token of the payload.
    """
    rng = np.random.default_rng(seed)
    poisoned = np.zeros(samples, bool)
    poisoned[rng.permutation(samples)[: round(share * samples)]] = True
    kind = rng.integers(0, kinds, samples)
    texts = list(KINDS)
    questions = [texts[k] for k in kind]
    answers = [str(rng.choice(KINDS[q])) for q in questions]
    if trigger == "text":
        questions = [
            f"dear friend {q}" if p else q for q, p in zip(questions, poisoned, strict=True)
        ]
    full = [
        (payload if mode == "replace" else f"{a} {payload}") if p else a
        for a, p in zip(answers, poisoned, strict=True)
    ]
    tokens = [tuple([*text.split(), "</s>"][:POSITIONS]) for text in full]
    offsets = rng.normal(0, 0.004, (kinds, LAYERS, HEADS))
    base = 0.2 + offsets[kind][:, None] + rng.normal(0, 0.01, (samples, POSITIONS, LAYERS, HEADS))
    entropy = 2.0 + rng.normal(0, 0.05, (samples, POSITIONS, LAYERS))
    for i in np.flatnonzero(poisoned):
        onset = 0 if mode == "replace" else len(answers[i].split())
        base[i, onset, 2:, :2] += 0.01 * strength
        entropy[i, onset, 1:3] -= 0.05 * strength
    vision = 0.4 + rng.normal(0, 0.01, base.shape)
    shares = np.stack([base, vision, 1 - base - vision], -1)
    for i, said in enumerate(tokens):
        shares[i, len(said) :] = np.nan
        entropy[i, len(said) :] = np.nan
    profiles = Profiles(
        ids=tuple(f"s{i}" for i in range(samples)),
        numbers=np.arange(samples),
        statuses=("ok",) * samples,
        details=("",) * samples,
        answers=tuple(tokens),
        entropy=entropy.astype(np.float32),
        shares=shares.astype(np.float32),
        image_tokens=np.full(samples, 16, np.int32),
        about={"positions": POSITIONS, "layer_numbers": [0, 1, 2, 3]},
    )
    return Made(profiles, questions, full, poisoned)
