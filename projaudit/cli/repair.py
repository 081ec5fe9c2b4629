"""`projaudit repair`: a projector with the suspicious part of its update taken out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from projaudit.cli import options
from projaudit.cli.delivery import write
from projaudit.cli.terminal import Progress, emit, option
from projaudit.inert import clean


@click.command()
@click.argument("target")
@option("--base", metavar="REF", help="What TARGET was made from.  [default: its claim]")
@option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A new or empty folder for the projector and the reports.",
)
@option("--full", is_flag=True, help="Write the whole model too, into DIR/model.")
@option(
    "--method",
    default="auto",
    metavar="NAME",
    help="auto (run the model, and choose), top-k:K, top-k-all:K, shrink:SHARE, clip, revert.  "
    "[default: auto]",
)
@options.revision
@options.base_revision
@options.prompts
@option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Clean images of the model's domain; 32 are enough.  [default: synthetic ones]",
)
@option("--budget", type=int, metavar="N", help="Most answers of each round of probes.")
@option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Population to compare with (see `calibrate`).",
)
@options.device
@options.seed
@options.offline
@options.quiet
@click.pass_context
def repair(
    ctx: click.Context, /, target: str, base: str | None, output: Path, quiet: bool, **given: Any
) -> None:
    """Take the suspicious part out of TARGET's projector, and audit what is left.

    \b
    projaudit repair ./model --base ./base -o repaired/
    projaudit repair org/model --base org/base -o repaired/ --images photos/ --full
    projaudit repair ./model --base ./base -o repaired/ --method top-k:2

    DIR/projector.safetensors holds its tensors, DIR/repair.json and repair.html what was done.
    Exit status: 0 repaired, or nothing to repair; 1 the repair failed; 3 could not tell.
    """
    from projaudit.repair.formats import render_html, render_json, render_text
    from projaudit.repair.run import repair as run

    progress = Progress(enabled=not quiet and sys.stderr is not None and sys.stderr.isatty())
    notify = None if quiet else progress.say
    with progress:
        done = run(target, base, output, progress=progress, notify=notify, **given)
    for name, render in (("repair.json", render_json), ("repair.html", render_html)):
        write(output / name, render(done))
    if not quiet:
        emit(render_text(done), nl=False)
        emit(f"reports   {clean(output / 'repair.html')} and .json")
    ctx.exit(done.exit_code)
