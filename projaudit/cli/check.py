"""`projaudit check`: audit a projector against its base."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from projaudit.cli import options
from projaudit.cli.delivery import deliver, paths_for
from projaudit.cli.terminal import Lines, Progress, complain, option
from projaudit.errors import ProjauditError, UsageError
from projaudit.inert import clean

if TYPE_CHECKING:
    from projaudit.report import Report


@click.command()
@click.argument("target")
@option(
    "--base",
    multiple=True,
    metavar="REF",
    help="What TARGET was made from; a merge has several. Default: its claims.",
)
@options.revision
@options.base_revision
@options.formats
@option("--output", "-o", metavar="DIR|FILE", help="Where to write reports; text still prints.")
@option("--rules", type=click.Path(path_type=Path), metavar="DIR", help="More rules (YAML).")
@option(
    "--policy",
    metavar="NAME|FILE",
    help="Preset or policy file.  [default: structure or default, by depth]",
)
@option(
    "--depth",
    type=click.Choice(["auto", "weights", "behaviour"]),
    help="behaviour: run the language model behind the projector.  "
    "[default: auto, which does where nothing has to be downloaded]",
)
@option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Depth behaviour: what to ask, one prompt a line.  [default: general questions]",
)
@option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Depth behaviour: ordinary images of the model's domain.  [default: synthetic ones]",
)
@option(
    "--requests",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Depth behaviour: what the model should refuse, one a line.  [default: general requests]",
)
@option("--budget", type=int, metavar="N", help="Depth behaviour: most answers.")
@option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Depth behaviour: population to compare with (see `calibrate`).",
)
@option("--fail-on", type=click.Choice(["fail", "review"]), help="What exits 1.  [default: fail]")
@option("--exit-zero", is_flag=True, help="Report only: exit 0 where the status would be 1 or 3.")
@option(
    "--direction",
    "directions",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Target directions to compare shifts with (.npy, .safetensors).",
)
@option(
    "--target-text",
    "target_texts",
    multiple=True,
    type=Lines(),
    metavar="TEXT",
    help="Compare shifts with the embeddings of this text's tokens.",
)
@options.device
@option("--rank", type=int, metavar="K", help="Leading singular values.  [default: 32]")
@options.seed
@options.offline
@option(
    "--verify",
    type=click.Choice(["range", "full"]),
    help="full: download whole files and check their sha256.  [default: range]",
)
@options.quiet
@option("--verbose", "-v", is_flag=True, help="Print stages with their seconds, and the bytes.")
@click.pass_context
def check(ctx: click.Context, /, target: str, **given: Any) -> None:
    """Audit the projector of TARGET: a Hub id, a Hub URL, a folder or a file.

    \b
    projaudit check org/model
    projaudit check org/model@v2 --base org/base@main --format html -o report.html
    projaudit check ./model --base ./base --fail-on review
    """
    output, quiet, verbose = (given.pop(k) for k in ("output", "quiet", "verbose"))
    formats = given.pop("formats") or _policy_formats(given["policy"])
    paths = paths_for(output, formats, target)
    from projaudit.audit import check as run
    from projaudit.reporting import failed

    progress = Progress(enabled=not quiet and sys.stderr is not None and sys.stderr.isatty())
    notify = None if quiet else progress.say
    try:
        with progress:
            report = run(target, progress=progress, notify=notify, **given)
    except ProjauditError as error:
        report = failed(target, error, given)
        deliver(report, paths, quiet=True)
        if report.exit_code != error.exit_code:  # --exit-zero, and nothing to audit
            complain(str(error), error.code, 0)
            ctx.exit(report.exit_code)
        raise
    deliver(report, paths, quiet=quiet)
    if verbose:
        _tell_cost(report)
    ctx.exit(report.exit_code)


def _policy_formats(policy: str | None) -> tuple[str, ...]:
    """The formats that a policy file asks for, none where it does not say."""
    if policy in (None, "structure", "default"):
        return ()
    from projaudit.analyses import METRICS
    from projaudit.policy import load_policy

    wanted = load_policy(policy, METRICS).options.get("format", [])
    names = tuple(wanted) if isinstance(wanted, list) else (wanted,)
    if any(name not in options.FORMAT_NAMES for name in names):
        raise UsageError(
            f"is none of {', '.join(options.FORMAT_NAMES)}",
            "policy",
            file=clean(policy),
            field="format",
        )
    return names


def _tell_cost(report: Report) -> None:
    for stage, seconds in report.run.stages.items():
        click.echo(f"{seconds:8.2f} s  {stage}", err=True)
    run = report.run
    click.echo(
        f"{run.requests} requests, {run.wire_bytes:,} bytes received, "
        f"{run.cache_bytes:,} from caches",
        err=True,
    )
