"""A process of its own for what parses and runs the files of a repository, from outside."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from projaudit.behaviour.reasons import CouldNotProbe
from projaudit.errors import FormatError
from projaudit.inert import clean
from projaudit.strict import load_json

LINE_LIMIT = 64 << 20
"""Bytes of one line of the child's."""
TOTAL_LIMIT = 128 << 20
"""Bytes that the child may write in all."""

CHILD = ("-m", "projaudit.behaviour.child")
_STDERR_KEPT = 16 << 10
_OUT_OF_MEMORY = re.compile(
    rb"MemoryError|OutOfMemory|[Oo]ut of memory|[Cc]an(no|')t allocate memory|memory allocation of"
)
_SPINS = "1000"
"""Turns that a thread waits for the others before it lets go of its core. With libgomp's own, some
hundred thousand, another busy process on the cores makes an audit many times slower."""
_KEPT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_KEPT_FOR_GPU = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")

Progress = Callable[[str, int, int], None]


def run(
    request: Mapping[str, Any],
    *,
    seconds: float,
    memory: int,
    gpu: bool,
    progress: Progress | None = None,
    child: Sequence[str] = CHILD,
) -> dict[str, Any]:
    """What a child process answers to a request, both being JSON.

    The child gets an environment without tokens, folders of its own, at most `memory` bytes and
    `seconds` of wall-clock, and is gone, with all that it started, when this returns or raises.
    Raises CouldNotProbe for everything but an answer. `child` is what Python is told to run.
    """
    with tempfile.TemporaryDirectory(prefix="projaudit-", ignore_cleanup_errors=True) as private:
        told = {"request": request, "memory": memory, "gpu": gpu, "parent": os.getpid()}
        # A file, as a pipe would have to be filled while the child is listened to.
        asked = Path(private) / "request.json"
        asked.write_text(json.dumps(told, allow_nan=False))
        with asked.open("rb") as stdin:
            process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-I", "-X", "utf8", *child],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(private, gpu),
                cwd=private,
                start_new_session=True,
            )
        try:
            return _listen(process, seconds, progress or (lambda what, done, total: None))
        finally:
            # The group first: its number is not given away before its leader is waited for.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()


def _environment(private: str, gpu: bool) -> dict[str, str]:
    kept = (*_KEPT, *_KEPT_FOR_GPU) if gpu else _KEPT
    return {
        "HOME": private,
        "TMPDIR": private,
        "XDG_CACHE_HOME": private,
        "HF_HOME": private,
        "LC_ALL": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "USE_HUB_KERNELS": "0",
        "GOMP_SPINCOUNT": _SPINS,
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        **{name: os.environ[name] for name in kept if name in os.environ},
    }


def _listen(process: subprocess.Popen[bytes], seconds: float, tell: Progress) -> dict[str, Any]:
    """The child's answer; raises CouldNotProbe where it gives none."""
    assert process.stdout is not None
    assert process.stderr is not None
    said, complaints = bytearray(), bytearray()
    answer: dict[str, Any] | None = None
    for pipe, data in _output(process, seconds):
        if pipe is process.stderr:
            complaints = (complaints + data)[-_STDERR_KEPT:]
            continue
        start, unseen = 0, len(said)
        said += data
        while (end := said.find(b"\n", unseen)) >= 0:
            line, start = bytes(said[start:end]), end + 1
            unseen = start
            if answer is not None:
                raise _garbage()
            answer = _heard(line, tell)
        del said[:start]
        if len(said) > LINE_LIMIT:
            raise _garbage()
    status = process.wait()
    if status:
        raise _stopped(status, bytes(complaints))
    if answer is None or said:
        raise _garbage()
    if "refused" in answer:
        raise CouldNotProbe(answer["refused"])
    result: dict[str, Any] = answer["result"]
    return result


def _output(process: subprocess.Popen[bytes], seconds: float) -> Iterator[tuple[Any, bytes]]:
    """What the child writes, and where, until it has ended and said all."""
    deadline = time.monotonic() + seconds
    total = 0
    with selectors.DefaultSelector() as pipes:
        pipes.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        pipes.register(process.stderr, selectors.EVENT_READ)  # type: ignore[arg-type]
        ended = False
        while not ended or pipes.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise CouldNotProbe(f"the process that runs it exceeded its {seconds:g} s")
            # Not until the pipes close: what the child started may hold them open.
            ready = pipes.select(0 if ended else min(left, 0.1)) if pipes.get_map() else []
            if not ready and ended:
                return
            for key, _ in ready:
                data = os.read(key.fd, 1 << 20)
                if not data:
                    pipes.unregister(key.fileobj)
                    continue
                if key.fileobj is process.stdout:
                    total += len(data)
                    if total > TOTAL_LIMIT:
                        raise _garbage()
                yield key.fileobj, data
            if not pipes.get_map() and not ended:
                time.sleep(0.005)
            # Left a zombie: its number must stay its own until its group is killed.
            flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
            ended = ended or os.waitid(os.P_PID, process.pid, flags) is not None


def _heard(line: bytes, progress: Progress) -> dict[str, Any] | None:
    """The final answer, or None for progress, which is passed on."""
    try:
        message = load_json(line, file="answer", limit=LINE_LIMIT)
    except FormatError:
        raise _garbage() from None
    match message if isinstance(message, dict) else {}:
        case {"progress": [str(what), int(done), int(total)], **rest} if not rest:
            progress(clean(what, 80), done, total)
            return None
        case ({"result": dict()} | {"refused": str()}) as answer if len(answer) == 1:
            return answer
    raise _garbage()


def _garbage() -> CouldNotProbe:
    return CouldNotProbe("the process that runs it gave no proper answer")


def _stopped(status: int, complaints: bytes) -> CouldNotProbe:
    who = "the process that runs it"
    if _OUT_OF_MEMORY.search(complaints):
        return CouldNotProbe(f"{who} ran out of memory")
    if status < 0:
        name = next((s.name for s in signal.Signals if s == -status), "unknown")
        hint = ", as where memory runs out" if status == -signal.SIGKILL else ""
        return CouldNotProbe(f"{who} was stopped by signal {-status} ({name}{hint})")
    lines = complaints.decode("utf-8", "replace").strip().splitlines()
    last = f" ({clean(lines[-1].strip(), 100)})" if lines else ""
    return CouldNotProbe(f"{who} stopped with status {status}{last}")
