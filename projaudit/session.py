"""What one check works with: its settings, the sources it opened, and how long its stages took."""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from projaudit import __version__
from projaudit.errors import UsageError
from projaudit.inert import clean
from projaudit.refs import Ref
from projaudit.source import Source, open_local

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes so far, bytes in all); (…, 0, 0) starts a stage."""
MAX_RANK = 512


@dataclass(frozen=True)
class Settings:
    """Options with a default: what was given, else what the policy says, else the default."""

    device: str
    rank: int
    rank_given: bool
    """An explicit rank is obeyed or refused; the default bends to small layers."""
    seed: int
    verify: Literal["range", "full"]
    offline: bool


def settle(policy: Mapping[str, Any], **given: Any) -> Settings:
    """The settings from what was given (None: not) and a policy's options.

    Raises UsageError `usage.option` naming the option.
    """

    def chosen(name: str, default: Any, kind: type, allowed: Callable[[Any], bool]) -> Any:
        value = given[name] if given[name] is not None else policy.get(name, default)
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kind):
            raise UsageError(f"{clean(value)!r} is of the wrong type", "option", field=f"--{name}")
        if not allowed(value):
            raise UsageError(f"{clean(value)!r} is not allowed", "option", field=f"--{name}")
        return value

    return Settings(
        device=chosen("device", "auto", str, bool),
        rank=chosen("rank", 32, int, lambda k: 1 <= k <= MAX_RANK),
        rank_given=given["rank"] is not None or "rank" in policy,
        # A published sketch can be evaded, so the default is fresh, and recorded.
        seed=chosen("seed", secrets.randbelow(1 << 31), int, lambda s: 0 <= s < 1 << 63),
        verify=chosen("verify", "range", str, lambda v: v in ("range", "full")),
        offline=chosen("offline", False, bool, lambda _: True),
    )


@dataclass
class Session:
    """What is open while a check runs; use as a context, which closes the guarded client."""

    settings: Settings
    progress: Progress | None
    notify: Callable[[str], None] | None
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, in order."""
    sources: list[Source] = field(default_factory=list)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of its body to the stage of that name."""
        if self.progress:
            self.progress(name, 0, 0)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.stages[name] = self.stages.get(name, 0.0) + spent

    def source(self, ref: Ref) -> Source:
        """The source of a reference; the same reference is opened once."""
        for known in self.sources:
            if _same(known.ref, ref):
                return known
        self.sources.append(self._opened(ref))
        return self.sources[-1]

    def _opened(self, ref: Ref) -> Source:
        if ref.kind == "local":
            return open_local(ref)
        if ref.kind != "hub":
            from projaudit.remote import open_remote

            return open_remote(
                ref,
                offline=self.settings.offline,
                verify=self.settings.verify,
                progress=self.progress,
                notify=self.notify,
            )
        from projaudit.hub import guarded_client, open_hub

        self._open.enter_context(guarded_client())
        return open_hub(
            ref,
            offline=self.settings.offline,
            verify=self.settings.verify,
            progress=self.progress,
            notify=self.notify,
        )


def _same(one: Ref, other: Ref) -> bool:
    """Whether two references mean one place, however they were typed."""
    place, that = ((r.kind, r.path, r.repo, r.revision, r.uri) for r in (one, other))
    return place == that


def find_device(name: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda`, `cuda:n`; else UsageError `usage.device`."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in {"cpu", "cuda"} or (index and (kind == "cpu" or not index.isdecimal())):
        raise UsageError(f"{clean(name)!r} is none of auto, cpu, cuda, cuda:n", "device")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UsageError(f"there is no {name} here, of {count} CUDA devices", "device")
    return torch.device(name)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and machine, as far as they bear on the numbers."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = ("numpy", "scipy", "safetensors", "huggingface-hub")
    return {
        "projaudit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        "platform": platform.system(),
        "device": str(device),
        "device_name": name,
        "dtype": "float32",
        "threads": str(torch.get_num_threads()),
    }
