"""`projaudit demo`: an honest and a backdoored fine-tune, checked."""

from __future__ import annotations

from pathlib import Path

import click

from projaudit.cli.delivery import check_writable, write
from projaudit.cli.terminal import emit, option
from projaudit.errors import UsageError
from projaudit.inert import clean


@click.command()
@option("--output", "-o", default="projaudit-demo", show_default=True, metavar="DIR")
@option("--seed", type=int, default=0, show_default=True)
def demo(output: str, seed: int) -> None:
    """Check a small trained LLaVA's honest and backdoored fine-tune, both against their base."""
    from projaudit.demo import run

    place = Path(output) / "honest.html"
    check_writable(place, lambda what: UsageError(what, "output", file=clean(output)))
    for line in run(Path(output), seed, write=write):
        emit(line)
