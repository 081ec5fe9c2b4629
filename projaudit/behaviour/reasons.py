"""Why a model could not be run: no error of the audit, but a requirement that was not met."""

from __future__ import annotations

from projaudit.inert import clean


class CouldNotProbe(Exception):
    """The behaviour of a model was not measured; the verdict can say no more than that."""

    def __init__(self, reason: str) -> None:
        self.reason = clean(reason)
        """One inert line, which reads after "not measured: "."""
        super().__init__(self.reason)


class TooLittleMemory(CouldNotProbe):
    """There is less free memory than running the model takes."""


def without_own_model(reason: str) -> str:
    """The note that the base's projector stands for the base."""
    return (
        "more than the projector differs from the base, whose own model cannot be run "
        f"({reason}): its projector was put before the target's model"
    )
