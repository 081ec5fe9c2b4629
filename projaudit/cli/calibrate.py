"""`projaudit calibrate`: a calibration of a user's own honest models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from projaudit.cli.delivery import write
from projaudit.cli.terminal import emit, option
from projaudit.errors import ProjauditError, UsageError
from projaudit.inert import clean


@click.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE")
@option("--name", metavar="ID", help="Id of the population.  [default: the file's name]")
def calibrate(reports: tuple[Path, ...], output: Path, name: str | None) -> None:
    """Make a calibration of your own honest models from their JSON REPORTS.

    \b
    projaudit check ./ours-1 --base ./base --depth behaviour --format json -o reports/
    projaudit calibrate reports/*.json -o ours.json
    projaudit check org/model --base ./base --calibration ours.json
    """
    import json

    from projaudit.calibration import calibrate as made
    from projaudit.calibration import to_json, upper_bound
    from projaudit.formats.json import parse
    from projaudit.rules import MAX_BOUND

    def document(file: Path) -> dict[str, Any]:
        try:
            return parse(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8 text"
            raise UsageError(clean(reason), "report", file=clean(file)) from None
        except ProjauditError as error:
            raise UsageError(error.message, "report", file=clean(file)) from None

    documents = {str(file): document(file) for file in reports}
    found = made(documents, name or output.stem)
    write(output, json.dumps(to_json(found), indent=1, allow_nan=False) + "\n")
    failed = [clean(file) for file, report in documents.items() if report["verdict"] == "fail"]
    bound = upper_bound(0, len(found.honest))
    emit(
        f"{len(found.honest)} honest models, scores {found.honest[0]:.2f} to "
        f"{found.honest[-1]:.2f}, in {clean(output)}"
    )
    emit(
        f"A score above all of them leaves up to {bound:.1%} false positives (95 % bound)"
        + ("" if bound <= MAX_BOUND else f": none can `fail` by it, which takes {MAX_BOUND:.0%}")
    )
    if failed:
        emit(f"Of a verdict `fail`, and counted as honest all the same: {', '.join(failed)}")
