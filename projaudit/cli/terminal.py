"""What every command shares with its terminal: output, complaints, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from projaudit.errors import UsageError
from projaudit.inert import clean


def option(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """A click option that PROJAUDIT_<NAME> sets too."""
    longest = max(names, key=len).lstrip("-").partition("/")[0]
    variable = "PROJAUDIT_" + longest.upper().replace("-", "_")
    return click.option(*names, envvar=variable, **kwargs)


class Lines(click.types.StringParamType):
    """A text; in the environment, several stand on lines of their own."""

    envvar_list_splitter = "\n"


def emit(text: str, **style: Any) -> None:
    """Text to standard output; a closed one is an error, since a report would go unread."""
    if sys.stdout is None:
        raise UsageError("standard output is closed", "output")
    click.echo(text, **style)


def in_color() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def complain(message: str, code: str, status: int) -> int:
    """One line on stderr: what is wrong and its stable code."""
    try:
        click.echo(f"projaudit: {clean(message, 600)} [{code}]", err=True)
    except OSError:
        silence(sys.stderr)
    return status


def silence(stream: Any) -> None:
    """Keeps the interpreter from complaining about a closed stream as it exits."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1 if stream is sys.stdout else 2)


class Progress:
    """Stage and bytes on a terminal's stderr; silent elsewhere."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._enabled:
            from tqdm import tqdm

            self._bar = tqdm(
                unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.set_description_str(clean(what, 50), refresh=False)
            self._bar.total = total or None
            self._bar.n = done
            self._bar.refresh()

    def say(self, message: str) -> None:
        """One line that a user should see while waiting."""
        if self._bar is not None:
            self._bar.clear()
        click.echo(f"projaudit: {clean(message)}", err=True)
