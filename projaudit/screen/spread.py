"""The work shared out: in this process, in several of this machine, or by Ray Data over several."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from projaudit.errors import LimitError, ProjauditError, UnsupportedError, UsageError
from projaudit.inert import clean
from projaudit.screen.profiles import Profiles
from projaudit.screen.work import Job, Worker

RAY = "ray"
_here: dict[str, Any] = {}
"""Of a process of the pool: its job and device, then its worker."""


def spread(job: Job, starts: Sequence[int], devices: Sequence[str]) -> Generator[Profiles]:
    """The parts that start with these samples, as they come; in any order with several devices.

    Raises LimitError (`limit.worker`) where a process dies, UnsupportedError (`unsupported.extra`)
    without Ray, and what the workers raise.
    """
    if RAY in devices:
        if set(devices) != {RAY}:
            raise UsageError("ray and other devices do not go together", "device")
        yield from _by_ray(job, starts, len(devices))
    elif len(devices) == 1:
        with Worker(job, devices[0]) as worker:
            for start in starts:
                yield worker.part(start)
    else:
        yield from _by_processes(job, starts, devices)


def _by_processes(job: Job, starts: Sequence[int], devices: Sequence[str]) -> Generator[Profiles]:
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(
        len(devices), context, initializer=_begin, initargs=(job, free)
    ) as pool:
        try:
            for done in as_completed([pool.submit(_part, start) for start in starts]):
                yield done.result()
        except BrokenProcessPool:
            raise LimitError(
                "a process that profiled ended, perhaps for lack of memory", "worker"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(job: Job, free: Any) -> None:
    _here.update(job=job, device=free.get())


def _part(start: int) -> Profiles:
    if "worker" not in _here:  # opened here, where an error comes back as what it is
        _here["worker"] = Worker(_here["job"], _here["device"])
    worker: Worker = _here["worker"]
    return worker.part(start)


class _Profiler:
    """A worker as Ray Data wants it."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(job.threads)
        self._worker = Worker(job, "auto")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        parts = [self._worker.part(int(start)) for start in batch["start"]]
        return {"part": [pickle.dumps(part) for part in parts]}


def _by_ray(job: Job, starts: Sequence[int], workers: int) -> Generator[Profiles]:
    try:
        import ray
        import ray.data
    except ImportError:
        raise UnsupportedError(
            "ray is not installed", "extra", remedy="pip install 'projaudit[ray]'"
        ) from None
    import torch

    started = not ray.is_initialized()
    if started:
        # A local cluster wants a CPU beside those that the workers hold.
        cpus = None if os.environ.get("RAY_ADDRESS") else workers + 1
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, num_cpus=cpus)
        except Exception as error:  # among them one that is of no class of Ray's
            raise LimitError(f"Ray does not start: {_first_line(error)}", "worker") from None
    # Ray Data writes to the terminal as it goes.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    todo = [{"start": start} for start in starts]
    # More workers than parts would be told of.
    size = min(workers, len(todo))
    try:
        parts = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            _Profiler,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_gpus=1 if torch.cuda.is_available() else 0,
        )
        for row in parts.iter_rows():
            yield pickle.loads(row["part"])  # noqa: S301 -- of our own workers
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    finally:
        if started:
            ray.shutdown()


def _cause(error: BaseException) -> ProjauditError:
    """What a worker raised, out of what Ray has wrapped it in."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, ProjauditError):
        inner = getattr(inner, "cause", None) or inner.__cause__
    return inner or LimitError(f"a worker of Ray ended: {_first_line(error)}", "worker")


def _first_line(error: BaseException) -> str:
    return clean(str(error).strip().partition("\n")[0])
