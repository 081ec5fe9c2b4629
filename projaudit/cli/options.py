"""The options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

from projaudit.cli.terminal import option

FORMAT_NAMES = ("text", "json", "html")

revision = option("--revision", metavar="REV", help="Branch, tag or commit of TARGET.")
base_revision = option("--base-revision", metavar="REV", help="Branch, tag or commit of the base.")
formats = option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(FORMAT_NAMES),
    help="Report format; may be given several times.  [default: text]",
)
prompts = option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to ask, one prompt a line.  [default: general questions]",
)
device = option("--device", metavar="auto|cpu|cuda[:n]", help="Where to compute.  [default: auto]")
seed = option("--seed", type=int, metavar="N", help="Makes a run repeatable.  [default: fresh]")
offline = option("--offline", is_flag=True, default=None, help="Use the caches only.")
quiet = option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
