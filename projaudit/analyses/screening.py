"""What a screening found, in numbers of samples."""

from __future__ import annotations

from projaudit.metrics import Value, measures
from projaudit.screened import Fate, Screened

_BYE, _TCAP = "arXiv 2505.16916", "arXiv 2601.21692"


@measures("dataset", kind="screening", unit="samples", reference=f"{_BYE}, {_TCAP}")
def samples_to_drop(screened: Screened) -> Value:
    """Number of samples that the method says to drop"""
    texts = [text for text in screened.texts if text.confirmed]
    names = tuple(f"{text.samples} end with “{text.text}”" for text in texts)
    groups = [group for group in screened.groups if group.fate == "drop"] if not texts else []
    names += tuple(f"{g.samples} lie apart and say what no other says" for g in groups)
    return Value(float(screened.fates.get("drop", 0)), names or _subjects(screened, "drop"))


@measures("dataset", kind="screening", unit="samples", reference=f"{_BYE}, {_TCAP}")
def samples_apart(screened: Screened) -> Value:
    """Number of samples that are set apart and kept: by their attention, where no shared text says
    why, or for a text that follows what their answers name"""
    names = tuple(
        f"{text.samples} end with “{text.text}” where they name “{text.named.word}”"
        for text in screened.texts
        if text.apart and text.named is not None
    )
    return Value(float(screened.fates.get("apart", 0)), names or _subjects(screened, "apart"))


@measures("dataset", kind="screening", unit="samples")
def samples_unread(screened: Screened) -> Value:
    """Number of samples without a profile: no image, several, corrupt, no answer, not finite, …"""
    names = tuple(f"{n} {status}" for status, n in screened.statuses.items() if status != "ok")
    return Value(float(screened.fates.get("unread", 0)), names)


@measures("dataset", kind="screening", unit="samples")
def samples_screened(screened: Screened) -> float:
    """Number of samples with a profile"""
    return float(screened.samples - screened.fates.get("unread", 0))


@measures("dataset", kind="screening")
def common_text_share(screened: Screened) -> Value:
    """Share of the answers that end with the text of three words or more that most end with, where
    that is more than half of them; else 0"""
    return Value(screened.common_share, (screened.common_text,) if screened.common_text else ())


def _subjects(screened: Screened, fate: Fate) -> tuple[str, ...]:
    return tuple(sample.subject for sample in screened.shown if sample.fate == fate)
