"""The confined process that a model is heard in, and its repair chosen."""

from __future__ import annotations

from projaudit.behaviour.child import Work, main


def _mending() -> Work:
    from projaudit.behaviour.mend import mend

    return mend


if __name__ == "__main__":
    main(_mending)
