"""Where reports go: paths by format, files written whole or not at all, what is printed."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from projaudit.cli.terminal import emit, in_color
from projaudit.errors import UsageError
from projaudit.inert import clean

if TYPE_CHECKING:
    from projaudit.report import Report


def paths_for(output: str | None, formats: Sequence[str], target: str) -> dict[str, Path | None]:
    """Format -> file to write, None for standard output; refuses what cannot be written.

    A path with a suffix is one file, whose suffix is its format; any other is a folder.
    """
    from projaudit.formats import FORMATS

    formats = list(dict.fromkeys(formats))
    if output is None:
        if len(formats) > 1:
            raise UsageError("several formats need a folder to go to", "output", field="-o")
        return dict.fromkeys(formats or ["text"])

    def wrong(message: str) -> UsageError:
        return UsageError(message, "output", file=clean(output) or None, field="-o")

    path, by_suffix = Path(output), {known.suffix: name for name, known in FORMATS.items()}
    chosen: dict[str, Path | None]
    if not output:
        raise wrong("is empty")
    known_suffix = path.suffix in by_suffix
    if path.suffix and not output.endswith(os.sep) and (known_suffix or not path.is_dir()):
        if path.is_dir():
            raise wrong("is a directory")
        if not known_suffix:
            raise wrong(f"ends in none of {', '.join(by_suffix)}; end a folder's name with a /")
        name = by_suffix[path.suffix]
        if formats not in ([], [name]):
            raise wrong(f"is a file for {name}, not for {', '.join(formats)}")
        chosen = {name: path}
    else:
        from projaudit.refs import public

        stem = re.sub(r"[^A-Za-z0-9._-]+", "--", public(target).removeprefix("hf://")).strip("-.")
        stem = stem[-100:] or "report"
        files = [name for name in formats if name != "text"] or ["text"]
        chosen = {name: path / f"{stem}{FORMATS[name].suffix}" for name in files}
    for file in chosen.values():
        check_writable(file, wrong)
    return {**dict.fromkeys(["text"]), **chosen}


def check_writable(file: Path | None, wrong: Callable[[str], UsageError]) -> None:
    """Tries the nearest folder that exists, before an audit is run for nothing."""
    assert file is not None
    try:
        if file.is_dir():
            raise wrong("is a directory")
        folder = next(parent for parent in file.absolute().parents if parent.exists())
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".projaudit-"):
            pass
    except OSError as error:
        raise wrong(f"cannot be written: {error.strerror}") from None


def write(file: Path, content: str | bytes) -> None:
    """Writes a report whole or not at all; text as UTF-8."""
    draft = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        mask = os.umask(0)
        os.umask(mask)
        with tempfile.NamedTemporaryFile(
            dir=file.parent, prefix=".projaudit-", delete=False
        ) as draft:
            draft.write(content.encode() if isinstance(content, str) else content)
        Path(draft.name).chmod(0o666 & ~mask)
        Path(draft.name).replace(file)
        draft = None
    except OSError as error:
        raise UsageError(
            f"cannot be written: {error.strerror}", "output", file=clean(file)
        ) from None
    finally:
        if draft is not None:
            Path(draft.name).unlink(missing_ok=True)


def deliver(report: Report, paths: dict[str, Path | None], *, quiet: bool) -> None:
    """Writes the files, then prints what has no file; `quiet` leaves out the text."""
    from projaudit.formats import FORMATS, text

    written = {name: file for name, file in paths.items() if file is not None}
    for name, file in written.items():
        write(file, FORMATS[name].render(report))
    for name in paths.keys() - written.keys():
        if name != "text":
            emit(FORMATS[name].render(report), nl=False)
        elif not quiet:
            emit(text.render(report, color=in_color()), nl=False, color=in_color())
    if not quiet:
        for name, file in written.items():
            emit(f"{name:<9} {clean(file)}")
