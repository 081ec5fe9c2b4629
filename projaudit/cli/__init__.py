"""The command line: the only place that prints, exits, or chooses a path to write."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from projaudit import __version__
from projaudit.cli.calibrate import calibrate
from projaudit.cli.check import check
from projaudit.cli.demo import demo
from projaudit.cli.families import families
from projaudit.cli.lens import lens
from projaudit.cli.repair import repair
from projaudit.cli.rules import rules
from projaudit.cli.screen import screen
from projaudit.cli.terminal import complain, silence
from projaudit.errors import LimitError, ProjauditError
from projaudit.inert import clean

_INTERNAL = 70
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with the status of design: 0 1 2 3 4, 70 a bug, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # mlflow would report its use, draw bars, and ask a dead server seven times for minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no Greek is no bug
            stream.reconfigure(errors="backslashreplace")
    try:
        # Not cli.main: it turns a closed standard output into a silent exit of its own.
        words = list(sys.argv[1:] if arguments is None else arguments)
        with cli.make_context("projaudit", words) as context:
            cli.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
        status = 0
    except ProjauditError as error:
        status = complain(str(error), error.code, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        status = 0
    except click.UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        status = complain(error.format_message() + hint, "usage.option", 4)
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = complain("interrupted", "interrupted", _INTERRUPTED)
    except MemoryError:
        limit = LimitError("there is not enough memory for this audit", "memory")
        status = complain(str(limit), limit.code, limit.exit_code)
    except OSError as error:
        if error.filename is None and error.errno in (errno.EBADF, errno.EPIPE, errno.ENOSPC):
            status = complain("standard output cannot be written", "usage.output", 4)
        elif error.filename is not None and error.strerror:
            status = complain(f"{clean(error.filename, 80)}: {error.strerror}", "usage.path", 4)
        else:
            status = _bug(error)
    except Exception as error:
        status = _bug(error)
    silence(sys.stdout)
    sys.exit(status)


def _bug(error: BaseException) -> int:
    if os.environ.get("PROJAUDIT_DEBUG"):
        raise error
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return complain(
        f"this is a bug of projaudit ({what}); PROJAUDIT_DEBUG=1 shows where", "internal", _INTERNAL
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="projaudit")
def cli() -> None:
    """Audit the projector of a multimodal model against its base.

    A projector is the small network between a vision (or audio) encoder and a language model.
    projaudit reads only its bytes, measures what a fine-tune changed, and says what that supports.

    \b
    Exit status: 0 nothing at or above --fail-on, 1 the policy says no, 2 could not audit,
    3 could not tell or nothing to audit, 4 wrong usage, 70 a bug, 130 interrupted.
    """


for command in (check, screen, lens, calibrate, repair, rules, families, demo):
    cli.add_command(command)
