"""`projaudit screen`: which samples of a fine-tuning set carry a trigger."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from projaudit.cli import options
from projaudit.cli.delivery import check_writable, deliver, paths_for
from projaudit.cli.terminal import Progress, option
from projaudit.errors import ProjauditError, UsageError
from projaudit.inert import clean


@click.command()
@click.argument("model")
@click.argument("dataset")
@option(
    "--method",
    type=click.Choice(["bye", "tcap", "both"]),
    default="both",
    show_default=True,
    help="bye, tcap: of their papers. both: these, all heads together, and the answers.",
)
@option("--adapter", metavar="REF", help="LoRA adapter of peft that belongs on MODEL.")
@option("--images", metavar="DIR", help="What image paths are relative to.  [default: the file's]")
@option(
    "--positions",
    type=click.IntRange(1),
    metavar="N",
    help="Answer tokens that are profiled.  [default: 16]",
)
@option("--batch", type=click.IntRange(1), default=8, show_default=True, metavar="N")
@option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N samples.")
@option("--device", default="auto", metavar="auto|cpu|cuda[:n]", show_default=True)
@option(
    "--devices",
    metavar="LIST",
    help="Several, by commas: cuda:0,cuda:1; `ray` for each worker of a Ray cluster.",
)
@option(
    "--profiles",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where profiles are kept; a finished one is not made again, and needs no model any more.",
)
@option(
    "--layer-rule",
    type=click.Choice(["paper", "code"]),
    default="paper",
    show_default=True,
    help="BYE: which layers are bimodal, by the paper or by its released code.",
)
@option("--published", is_flag=True, help="bye, tcap: the papers' own way, which always cuts.")
@option(
    "--number",
    "chosen",
    multiple=True,
    metavar="NAME=N",
    help="Of a detector, as threshold=2.5, heads=4 or late=0.25; docs/screen.md has them all.",
)
@option("--seed", type=int, default=0, show_default=True, metavar="N")
@options.formats
@option(
    "--output",
    "-o",
    metavar="DIR|FILE",
    help="Where to write reports; into a folder also the lists keep, drop, unread.",
)
@option(
    "--write-clean",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the rows to keep there, in the dataset's own form.",
)
@option("--policy", metavar="NAME|FILE", help="Preset or policy file.  [default: structure]")
@option("--fail-on", type=click.Choice(["fail", "review"]), help="What exits 1.  [default: fail]")
@option("--offline", is_flag=True, help="Use the caches only.")
@options.quiet
@click.pass_context
def screen(ctx: click.Context, /, model: str, dataset: str, **given: Any) -> None:
    """Find the samples of DATASET that carry a trigger, with the MODEL that was tuned on it.

    DATASET is a LLaVA-style .json or .jsonl, a .parquet, a folder of `datasets` or a Hub id.
    Nothing of it is changed. Exit status: 0 nothing to drop, 1 samples to drop, 3 could not tell.

    \b
    projaudit screen ./tuned train.json --images ./images -o screening/
    projaudit screen ./tuned train.json -o screening/ --write-clean clean/
    projaudit screen org/base data.parquet --adapter ./lora --method bye
    """
    output, quiet, formats = (given.pop(k) for k in ("output", "quiet", "formats"))
    kept, clean_set = given.pop("profiles"), given.pop("write_clean")
    given["rule"] = given.pop("layer_rule")
    if given["published"] and given["method"] == "both":
        raise UsageError("needs --method bye or tcap", "option", field="--published")
    if given["devices"] is not None:
        given["devices"] = [name.strip() for name in given["devices"].split(",")]
        if "" in given["devices"]:
            raise UsageError("names a device that is empty", "device", field="--devices")
    paths = paths_for(output, formats, f"{Path(dataset).stem}-screening")
    lists = _folder(output, paths)
    if clean_set is not None:
        check_writable(clean_set / "data", lambda told: _wrong(told, clean_set))
    progress = Progress(enabled=not quiet and sys.stderr is not None and sys.stderr.isatty())
    with tempfile.TemporaryDirectory(prefix="projaudit-") as scratch, progress:
        from projaudit.screen.lists import check_empty
        from projaudit.screen.numbers import numbers
        from projaudit.screen.run import screen_dataset

        if clean_set is not None:
            check_empty(clean_set)
        given["chosen"] = numbers(given["chosen"])
        folder = kept or (lists / "profiles" if lists else Path(scratch))
        try:
            report = screen_dataset(
                model,
                dataset,
                folder,
                lists=lists,
                clean_set=clean_set,
                progress=progress,
                **given,
            )
        except ProjauditError as error:
            from projaudit.reporting import failed

            deliver(failed(model, error, given), paths, quiet=True)
            raise
    deliver(report, paths, quiet=quiet)
    ctx.exit(report.exit_code)


def _folder(output: str | None, paths: dict[str, Path | None]) -> Path | None:
    """Where the lists go: the folder that reports are written to; None for a file or none."""
    if output is None or any(file == Path(output) for file in paths.values()):
        return None
    return Path(output)


def _wrong(told: str, folder: Path) -> UsageError:
    return UsageError(told, "output", file=clean(folder), field="--write-clean")
