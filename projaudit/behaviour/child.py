"""The process that runs the model: told what to do on stdin, heard on stdout, and confined."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

from projaudit.behaviour.confinement import confine, fence
from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.inert import clean

_NO_MEMORY = "the process that runs it ran out of memory"
Work: TypeAlias = Callable[[dict[str, Any], Any], dict[str, Any]]
"""From a request, and a function to tell of progress with, to plain values."""


def main(work: Callable[[], Work]) -> None:
    """Exits after one final line: {"result": …} or {"refused": "reason"}.

    `work` is called within the fence, where it may import what it needs.
    """
    # Everything that libraries print goes to stderr, from C as well.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    told = json.load(sys.stdin)

    def tell(what: str, done: int, total: int) -> None:
        _say(out, {"progress": [what, done, total]})

    try:
        _say(out, {"result": _answer(told, work, tell)})
    except Exception as error:
        traceback.print_exc()
        _say(out, {"refused": _reason(error)})
    # Without the libraries' own endings, which can only fail.
    sys.stderr.flush()
    os._exit(0)


def _answer(told: dict[str, Any], work: Callable[[], Work], tell: Any) -> dict[str, Any]:
    fenced = fence(told["parent"], told["gpu"])
    import torch  # noqa: F401
    import transformers  # noqa: F401

    wanted = work()
    confined = confine(told["memory"], told["gpu"])
    enforced, missing = (a + b for a, b in zip(fenced, confined, strict=True))
    return {**wanted(told["request"], tell), "sandbox": {"enforced": enforced, "missing": missing}}


def _reason(error: Exception) -> str:
    if isinstance(error, CouldNotProbe):
        return error.reason
    text = str(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "allocate memory" in text  # torch's allocator and mmap, as RuntimeError
    ):
        return _NO_MEMORY
    if isinstance(error, ModuleNotFoundError) and error.name in ("transformers", "PIL"):
        return f"{error.name} is not installed"
    first = text.strip().splitlines()[:1]
    return clean(": ".join([type(error).__name__, *first]), 200)


def _say(out: BinaryIO, message: dict[str, Any]) -> None:
    # Made whole before any of it is written: what JSON cannot hold must not leave half a line.
    out.write(json.dumps(message, allow_nan=False).encode() + b"\n")
    out.flush()


def _probing() -> Work:
    from projaudit.behaviour.probe import probe

    return probe


if __name__ == "__main__":
    main(_probing)
