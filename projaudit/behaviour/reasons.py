"""Why a model could not be run: no error of the audit, but a requirement that was not met."""

from __future__ import annotations

from projaudit.inert import clean


class CouldNotProbe(Exception):
    """The behaviour of a model was not measured; the verdict can say no more than that."""

    def __init__(self, reason: str) -> None:
        self.reason = clean(reason)
        """One inert line, which reads after "not measured: "."""
        super().__init__(self.reason)
