"""The confined process that the lens runs the model in."""

from __future__ import annotations

from projaudit.behaviour.child import Work, main


def _studying() -> Work:
    from projaudit.lens.study import study

    return study


if __name__ == "__main__":
    main(_studying)
