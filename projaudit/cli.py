"""The command line: the only place that prints, exits, or chooses a path to write."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from projaudit import __version__
from projaudit.errors import LimitError, ProjauditError, UsageError
from projaudit.inert import clean

if TYPE_CHECKING:
    from projaudit.report import Report

_INTERNAL = 70
_INTERRUPTED = 130
_FORMATS = ("text", "json", "html")


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
        status = _complain(str(error), error.code, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        status = 0
    except click.UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        status = _complain(error.format_message() + hint, "usage.option", 4)
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = _complain("interrupted", "interrupted", _INTERRUPTED)
    except MemoryError:
        limit = LimitError("there is not enough memory for this audit", "memory")
        status = _complain(str(limit), limit.code, limit.exit_code)
    except OSError as error:
        if error.filename is None and error.errno in (errno.EBADF, errno.EPIPE, errno.ENOSPC):
            status = _complain("standard output cannot be written", "usage.output", 4)
        elif error.filename is not None and error.strerror:
            status = _complain(f"{clean(error.filename, 80)}: {error.strerror}", "usage.path", 4)
        else:
            status = _bug(error)
    except Exception as error:
        status = _bug(error)
    _silence(sys.stdout)
    sys.exit(status)


def _complain(message: str, code: str, status: int) -> int:
    """One line on stderr: what is wrong and its stable code."""
    try:
        click.echo(f"projaudit: {clean(message, 600)} [{code}]", err=True)
    except OSError:
        _silence(sys.stderr)
    return status


def _bug(error: BaseException) -> int:
    if os.environ.get("PROJAUDIT_DEBUG"):
        raise error
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _complain(
        f"this is a bug of projaudit ({what}); PROJAUDIT_DEBUG=1 shows where", "internal", _INTERNAL
    )


def _silence(stream: Any) -> None:
    """Keeps the interpreter from complaining about a closed stream as it exits."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1 if stream is sys.stdout else 2)


def _print(text: str, **style: Any) -> None:
    """Text to standard output; a closed one is an error, since a report would go unread."""
    if sys.stdout is None:
        raise UsageError("standard output is closed", "output")
    click.echo(text, **style)


class _Line(click.types.StringParamType):
    """A text; in the environment, several stand on lines of their own."""

    envvar_list_splitter = "\n"


def _option(*names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """A click option that PROJAUDIT_<NAME> sets too."""
    longest = max(names, key=len).lstrip("-").partition("/")[0]
    variable = "PROJAUDIT_" + longest.upper().replace("-", "_")
    return click.option(*names, envvar=variable, **kwargs)


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


@cli.command()
@click.argument("target")
@_option(
    "--base",
    multiple=True,
    metavar="REF",
    help="What TARGET was made from; a merge has several. Default: its claims.",
)
@_option("--revision", metavar="REV", help="Branch, tag or commit of TARGET.")
@_option("--base-revision", metavar="REV", help="Branch, tag or commit of the base.")
@_option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(_FORMATS),
    help="Report format; may be given several times.  [default: text]",
)
@_option("--output", "-o", metavar="DIR|FILE", help="Where to write reports; text still prints.")
@_option("--rules", type=click.Path(path_type=Path), metavar="DIR", help="More rules (YAML).")
@_option(
    "--policy",
    metavar="NAME|FILE",
    help="Preset or policy file.  [default: structure or default, by depth]",
)
@_option(
    "--depth",
    type=click.Choice(["auto", "weights", "behaviour"]),
    help="behaviour: run the language model behind the projector.  "
    "[default: auto, which does where nothing has to be downloaded]",
)
@_option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Depth behaviour: what to ask, one prompt a line.  [default: general questions]",
)
@_option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Depth behaviour: ordinary images of the model's domain.  [default: synthetic ones]",
)
@_option("--budget", type=int, metavar="N", help="Depth behaviour: most answers.")
@_option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Depth behaviour: population to compare with (see `calibrate`).",
)
@_option("--fail-on", type=click.Choice(["fail", "review"]), help="What exits 1.  [default: fail]")
@_option("--exit-zero", is_flag=True, help="Report only: exit 0 where the status would be 1 or 3.")
@_option(
    "--direction",
    "directions",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Target directions to compare shifts with (.npy, .safetensors).",
)
@_option(
    "--target-text",
    "target_texts",
    multiple=True,
    type=_Line(),
    metavar="TEXT",
    help="Compare shifts with the embeddings of this text's tokens.",
)
@_option("--device", metavar="auto|cpu|cuda[:n]", help="Where to compute.  [default: auto]")
@_option("--rank", type=int, metavar="K", help="Leading singular values.  [default: 32]")
@_option("--seed", type=int, metavar="N", help="Makes a run repeatable.  [default: fresh]")
@_option("--offline", is_flag=True, default=None, help="Use the caches only.")
@_option(
    "--verify",
    type=click.Choice(["range", "full"]),
    help="full: download whole files and check their sha256.  [default: range]",
)
@_option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@_option("--verbose", "-v", is_flag=True, help="Print stages with their seconds, and the bytes.")
@click.pass_context
def check(ctx: click.Context, /, target: str, **options: Any) -> None:
    """Audit the projector of TARGET: a Hub id, a Hub URL, a folder or a file.

    \b
    projaudit check org/model
    projaudit check org/model@v2 --base org/base@main --format html -o report.html
    projaudit check ./model --base ./base --fail-on review
    """
    output, quiet, verbose = (options.pop(k) for k in ("output", "quiet", "verbose"))
    formats = options.pop("formats") or _policy_formats(options["policy"])
    paths = _paths(output, formats, target)
    from projaudit.audit import check as run
    from projaudit.reporting import failed

    progress = _Progress(enabled=not quiet and sys.stderr is not None and sys.stderr.isatty())
    notify = None if quiet else progress.say
    try:
        with progress:
            report = run(target, progress=progress, notify=notify, **options)
    except ProjauditError as error:
        report = failed(target, error, options)
        _deliver(report, paths, quiet=True)
        if report.exit_code != error.exit_code:  # --exit-zero, and nothing to audit
            _complain(str(error), error.code, 0)
            ctx.exit(report.exit_code)
        raise
    _deliver(report, paths, quiet=quiet)
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
    if any(name not in _FORMATS for name in names):
        raise UsageError(
            f"is none of {', '.join(_FORMATS)}", "policy", file=clean(policy), field="format"
        )
    return names


def _paths(output: str | None, formats: Sequence[str], target: str) -> dict[str, Path | None]:
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
        from projaudit.source import public

        stem = re.sub(r"[^A-Za-z0-9._-]+", "--", public(target).removeprefix("hf://")).strip("-.")
        stem = stem[-100:] or "report"
        files = [name for name in formats if name != "text"] or ["text"]
        chosen = {name: path / f"{stem}{FORMATS[name].suffix}" for name in files}
    for file in chosen.values():
        _check_writable(file, wrong)
    return {**dict.fromkeys(["text"]), **chosen}


def _check_writable(file: Path | None, wrong: Callable[[str], UsageError]) -> None:
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


def _write(file: Path, text: str) -> None:
    """Writes a report whole or not at all."""
    draft = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        mask = os.umask(0)
        os.umask(mask)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=".projaudit-", delete=False
        ) as draft:
            draft.write(text)
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


def _deliver(report: Report, paths: dict[str, Path | None], *, quiet: bool) -> None:
    """Writes the files, then prints what has no file; `quiet` leaves out the text."""
    from projaudit.formats import FORMATS, text

    written = {name: file for name, file in paths.items() if file is not None}
    for name, file in written.items():
        _write(file, FORMATS[name].render(report))
    for name in paths.keys() - written.keys():
        if name != "text":
            _print(FORMATS[name].render(report), nl=False)
        elif not quiet:
            _print(text.render(report, color=_color()), nl=False, color=_color())
    if not quiet:
        for name, file in written.items():
            _print(f"{name:<9} {clean(file)}")


def _color() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _tell_cost(report: Report) -> None:
    for stage, seconds in report.run.stages.items():
        click.echo(f"{seconds:8.2f} s  {stage}", err=True)
    run = report.run
    click.echo(
        f"{run.requests} requests, {run.wire_bytes:,} bytes received, "
        f"{run.cache_bytes:,} from caches",
        err=True,
    )


class _Progress:
    """Stage and bytes on a terminal's stderr; silent elsewhere."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None

    def __enter__(self) -> _Progress:
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


@cli.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path))
@_option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE")
@_option("--name", metavar="ID", help="Id of the population.  [default: the file's name]")
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

    found = made({str(file): document(file) for file in reports}, name or output.stem)
    _write(output, json.dumps(to_json(found), indent=1, allow_nan=False) + "\n")
    bound = upper_bound(0, len(found.honest))
    _print(
        f"{len(found.honest)} honest models, scores {found.honest[0]:.2f} to "
        f"{found.honest[-1]:.2f}, in {clean(output)}"
    )
    _print(
        f"A score above all of them leaves up to {bound:.1%} false positives (95 % bound)"
        + ("" if bound <= MAX_BOUND else f": none can `fail` by it, which takes {MAX_BOUND:.0%}")
    )


@cli.group()
def rules() -> None:
    """The rules: list them, read one, test your own."""


@rules.command("list")
@_option("--rules", "folder", type=click.Path(path_type=Path), help="Your own rules as well.")
def list_rules(folder: Path | None) -> None:
    """One line per rule: severity, id, title."""
    for rule in sorted(_known_rules(folder), key=lambda r: (-r.severity, r.id)):
        _print(f"{rule.severity.label:<9} {rule.id:<28} {clean(rule.title)}")


@rules.command("show")
@click.argument("rule")
@_option("--rules", "folder", type=click.Path(path_type=Path), help="Your own rules as well.")
def show_rule(rule: str, folder: Path | None) -> None:
    """What a rule says, why, and what to do about it."""
    known = {r.id: r for r in _known_rules(folder)}
    if rule not in known:
        raise UsageError(f"there is no rule {clean(rule)!r}", "rule", remedy="see `rules list`")
    found = known[rule]
    import textwrap

    indent = "  "
    _print(f"{found.id}: {clean(found.title)}")
    _print(f"  severity {found.severity.label}, confidence {found.confidence.value}")
    if found.inconclusive:
        _print("  takes the ground from under a pass")
    _print(f"  when     {condition_text(found.when)}")
    for text in (found.message, found.why, found.remedy):
        _print("")
        _print(
            textwrap.fill(clean(text, 2000), 88, initial_indent=indent, subsequent_indent=indent)
        )
    if found.references:
        _print(f"\n  {', '.join(clean(r) for r in found.references)}")


@rules.command("test")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def test_rules(folder: Path | None) -> None:
    """Load rules and run their own examples; a rule that cannot fire or stay quiet is an error."""
    found = _known_rules(folder)
    examples = sum(len(rule.fires) + len(rule.passes) for rule in found)
    _print(f"{len(found)} rules, {examples} examples: all behave as written")


@rules.command("metrics")
def list_metrics() -> None:
    """The names that a rule's condition may use, with unit and formula."""
    from projaudit.analyses import METRICS

    for metric in METRICS.values():
        unit = f" [{metric.unit}]" if metric.unit else ""
        _print(f"{metric.subject:<10} {metric.name:<28} {metric.formula}{unit}")


def condition_text(condition: Any) -> str:
    """A condition on one line, as a rule's author would write it."""
    if hasattr(condition, "metric"):
        return f"{condition.metric} {condition.operator} {condition.threshold:g}"
    terms = [condition_text(term) for term in condition.terms]
    if condition.kind == "not":
        return f"not ({terms[0]})"
    return "(" + (" and " if condition.kind == "all" else " or ").join(terms) + ")"


def _known_rules(folder: Path | None) -> Any:
    from projaudit.analyses import METRICS
    from projaudit.data import data_path
    from projaudit.policy import load_policy
    from projaudit.rules import load_rules

    own = load_rules(data_path("rules"), METRICS)
    if folder is None or folder.resolve() == data_path("rules").resolve():
        return own
    return load_policy("structure", METRICS, folder).rules


@cli.group()
def families() -> None:
    """The projector families that are known: list them, read one, explain a match."""


@families.command("list")
def list_families() -> None:
    """Every family: name, architectures, forward path."""
    from projaudit.projector import families as known

    paths = {family.name: " → ".join(family.chain) for family in known()}
    for family in known():
        _print(f"{family.name:<29} {', '.join(family.architectures)}")
        _print(f"{'':<29} {paths[family.name]}")


@families.command("show")
@click.argument("family")
def show_family(family: str) -> None:
    """How a family's projector is named and wired, and where that was read."""
    from projaudit.projector import families as known

    found = next((f for f in known() if f.name == family), None)
    if found is None:
        raise UsageError(
            f"there is no family {clean(family)!r}", "family", remedy="see `families list`"
        )
    _print(f"{found.name}: {', '.join(found.architectures)}")
    others = ", which hold other things too" if found.scattered else ""
    _print(f"  modules  {', '.join(found.modules)}{others}")
    for kind, roles in (
        ("norms", found.norms),
        ("layers", found.linears),
        ("others", found.matrices),
        ("vectors", found.vectors),
    ):
        for role, names in roles.items():
            _print(f"  {kind:<8} {role}: {', '.join(name or 'the module' for name in names)}")
    for role, layout in found.layouts.items():
        _print(f"  layout   {role}: {layout}")
    if found.optional:
        _print(f"  optional {', '.join(sorted(found.optional))}")
    _print(f"  path     {' → '.join(found.chain)}")
    if "$act" in "".join(found.chain):
        keys = "".join(f", or as {key} says" for key in found.act_keys)
        _print(f"  $act     {found.act_default}{keys}")
    if found.norms:
        key = f", or as {found.eps_key} says" if found.eps_key else ""
        _print(f"  epsilon  {found.eps_default:g}{key}")
    _print(f"  source   {found.source}")


@families.command("explain")
@click.argument("target")
@_option("--revision", metavar="REV", help="Branch, tag or commit.")
@_option("--offline/--online", default=None, help="Only what is on this machine.")
def explain_target(target: str, revision: str | None, offline: bool | None) -> None:
    """Where TARGET's projector was found and why, and what was nearly taken."""
    from projaudit.audit import explained

    found = explained(target, revision, offline=offline)
    if not found.found:
        _print("no projector")
    for projector, why in found.found:
        _print(f"{projector.family}, {projector.kind}: {why}")
        path = " → ".join(projector.chain) or "not known"
        widths = f"{projector.in_features} → {projector.out_features} features"
        _print(f"  {clean(projector.prefix) or 'several modules'}, {widths}, forward path: {path}")
        for name in projector.tensors:
            _print(f"    {clean(name)}")
        for name in projector.unexpected:
            _print(f"    {clean(name)}, which the family does not know")
    if found.near:
        _print("not taken:")
    for name, why in found.near:
        _print(f"  {name} {why}")


@cli.command()
@_option("--output", "-o", default="projaudit-demo", show_default=True, metavar="DIR")
@_option("--seed", type=int, default=0, show_default=True)
def demo(output: str, seed: int) -> None:
    """Check a small trained LLaVA's honest and backdoored fine-tune, both against their base."""
    from projaudit.demo import run

    place = Path(output) / "honest.html"
    _check_writable(place, lambda what: UsageError(what, "output", file=clean(output)))
    for line in run(Path(output), seed, write=_write):
        _print(line)
