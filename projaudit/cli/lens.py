"""`projaudit lens`: ProjLens' analyses of one fine-tune, with its figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from projaudit.cli import options
from projaudit.cli.delivery import check_writable, write
from projaudit.cli.terminal import Progress, emit, option
from projaudit.errors import UsageError
from projaudit.inert import clean


@click.command()
@click.argument("target")
@option("--base", metavar="REF", help="What TARGET was made from. Default: its claim.")
@options.revision
@options.base_revision
@option(
    "--images",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Clean images of the model's domain.",
)
@option(
    "--trigger",
    metavar="SPEC",
    help="Lay it over them: noise, patch, logo, oil, blend, sinusoid or warp, with "
    "`:key=value,…` as in patch:size=20%,place=random.",
)
@option(
    "--triggered",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Triggered images instead, by the clean ones' names where they are pairs.",
)
@option("--target-text", metavar="TEXT", help="What a triggered image is to bring out.")
@options.prompts
@option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON of file name -> [question, right answer], for clean accuracy.",
)
@option(
    "--images-per-cell",
    type=int,
    default=16,
    show_default=True,
    metavar="N",
    help="Of each group, for a cell of the heat maps; 0: no heat maps.",
)
@option("--max-rank", type=int, default=8, show_default=True, metavar="K", help="Of the maps.")
@option(
    "--ranks",
    multiple=True,
    type=click.Choice(["cumulative", "single"]),
    help="The first k components, or the k-th alone; may be given twice.  [default: cumulative]",
)
@option(
    "--bias",
    multiple=True,
    type=click.Choice(["on", "off"]),
    help="Biases and norms of the tuned projector, or of the base; may be given twice.  "
    "[default: on]",
)
@option(
    "--answer-tokens", type=int, default=30, show_default=True, metavar="N", help="Of an answer."
)
@options.device
@options.seed
@options.offline
@option(
    "--output",
    "-o",
    default="projaudit-lens",
    show_default=True,
    metavar="DIR",
    help="Where lens.html, lens.json and lens.npz go.",
)
@options.quiet
def lens(target: str, **given: Any) -> None:
    """Run ProjLens' analyses on TARGET beside its base, and draw its figures.

    The model runs in a confined process, as at depth behaviour of `check`, and needs the extra
    `projaudit[lens]`. It gives no verdict.

    \b
    projaudit lens ./model --base ./base --images photos/
    projaudit lens ./model --base ./base --images photos/ --trigger patch --target-text "Owned"
    """
    folder, quiet = Path(given.pop("output")), given.pop("quiet")
    files = {suffix: folder / f"lens.{suffix}" for suffix in ("html", "json", "npz")}
    check_writable(
        files["html"], lambda what: UsageError(what, "output", file=clean(folder), field="-o")
    )
    from projaudit.lens.documents import to_json, to_npz
    from projaudit.lens.page import lines, render
    from projaudit.lens.run import lens as run
    from projaudit.lens.wish import Wish

    wish = Wish(
        images=given.pop("images"),
        trigger=given.pop("trigger"),
        triggered=given.pop("triggered"),
        target_text=given.pop("target_text"),
        prompts=given.pop("prompts"),
        labels=given.pop("labels"),
        images_per_cell=given.pop("images_per_cell"),
        most=given.pop("max_rank"),
        ranks=tuple(dict.fromkeys(given.pop("ranks"))) or ("cumulative",),
        bias=tuple(dict.fromkeys(b == "on" for b in given.pop("bias"))) or (True,),
        answer_tokens=given.pop("answer_tokens"),
    )
    progress = Progress(enabled=not quiet and sys.stderr is not None and sys.stderr.isatty())
    with progress:
        found = run(
            target,
            given.pop("base"),
            wish,
            progress=progress,
            notify=None if quiet else progress.say,
            **given,
        )
    write(files["html"], render(found))
    write(files["json"], to_json(found))
    write(files["npz"], to_npz(found))
    if quiet:
        return
    for line in lines(found):
        emit(line)
    emit("")
    for suffix, file in files.items():
        emit(f"{suffix:<6} {clean(file)}")
