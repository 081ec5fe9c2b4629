"""What a score means: where it stands among fine-tunes whose history is known."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from projaudit.behaviour.prompts import kind_of
from projaudit.data import data_path
from projaudit.errors import FormatError, UsageError
from projaudit.evidence import from_plain
from projaudit.inert import clean
from projaudit.report import Standing
from projaudit.strict import load_json

FORMAT = 4
"""2 held scores without the short cut, 3 without the discount for what is said without a probe."""
SINCE = 4
"""Minor version of the reports' schema from which scores mean the same."""
LIMIT = 10 << 20
"""Bytes of a calibration file."""


@dataclass(frozen=True)
class Range:
    """Between which values a population lies."""

    least: float
    most: float


@dataclass(frozen=True)
class Calibration:
    """A population of honest fine-tunes, and of backdoored ones where there are any."""

    format: int
    id: str
    about: str
    """What the population is, in a sentence."""
    honest: tuple[float, ...]
    """Scores, ascending."""
    backdoored: tuple[float, ...]
    """Scores of working backdoors, ascending."""
    families: tuple[str, ...]
    parameters: Range
    """Values in all of the model."""
    in_features: Range
    out_features: Range
    relative_norm: Range
    """Largest ‖ΔW‖ / ‖W‖ over a projector's layers: what the recipe's strength comes to."""
    settings: Mapping[str, tuple[str, ...]]
    """What a run has to share, one of each: `images` (`synthetic`), `prompts` (`6 general`)."""


@dataclass(frozen=True)
class Shape:
    """What of a target says whether a population is of its kind."""

    family: str
    parameters: int
    in_features: int
    out_features: int
    relative_norm: float | None
    images: str
    """`synthetic` or `given`."""
    prompts: str
    """`6 general`, `4 given`."""


def stand(calibration: Calibration, source: str, value: float, shape: Shape) -> Standing:
    """Where a score stands among the population, and in what the target is of another kind."""
    honest = calibration.honest
    below = bisect_left(honest, value)
    above = len(honest) - below
    return Standing(
        score=value,
        calibration=calibration.id,
        source=source,
        honest=honest,
        backdoored=calibration.backdoored,
        percentile=100 * below / len(honest),
        false_positive_rate=above / len(honest),
        false_positive_bound=upper_bound(above, len(honest)),
        outside=_outside(calibration, shape),
    )


def upper_bound(hits: int, number: int, level: float = 0.95) -> float:
    """Upper end of the one-sided interval of Clopper and Pearson for a rate of `hits`/`number`."""
    if hits >= number:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(level, hits + 1, number - hits))


def _outside(calibration: Calibration, shape: Shape) -> tuple[str, ...]:
    found = []
    if shape.family not in calibration.families:
        found.append(f"family {clean(shape.family)}, population {', '.join(calibration.families)}")
    for name, what in (
        ("parameters", "parameters"),
        ("in_features", "features in"),
        ("out_features", "features out"),
        ("relative_norm", "relative size of the update"),
    ):
        value, span = getattr(shape, name), getattr(calibration, name)
        if value is None:
            found.append(f"{what} not known")
        elif not span.least <= value <= span.most:
            found.append(f"{what} {value:.4g}, population {span.least:.4g} to {span.most:.4g}")
    for name, known in calibration.settings.items():
        if getattr(shape, name, None) not in known:
            wanted = ", ".join(map(clean, known))
            found.append(f"{name} {getattr(shape, name, 'other')}, population {wanted}")
    return tuple(found)


def shipped() -> Calibration | None:
    """The calibration that comes with projaudit; None where there is none."""
    files = sorted((data_path("rules") / "calibration").glob("*.json"))
    return load_calibration(files[-1]) if files else None


def load_calibration(file: Path) -> Calibration:
    """The calibration in a file; UsageError `usage.calibration` says what is wrong with it."""

    def wrong(message: str) -> UsageError:
        return UsageError(message, "calibration", file=clean(file))

    try:
        if file.stat().st_size > LIMIT:
            raise wrong(f"is larger than {LIMIT} bytes")
        content = load_json(file.read_bytes(), file=clean(file), limit=LIMIT)
    except OSError as error:
        raise wrong(clean(error.strerror or "cannot be read")) from None
    except FormatError as error:
        raise wrong(error.message) from None
    if not isinstance(content, dict):
        raise wrong("is no JSON object")
    settings = content.get("settings")
    if not isinstance(settings, dict):
        raise wrong("has no settings, which are lists of texts")
    try:
        found = {key: from_plain(kind, content[key], key) for key, kind in _TYPES.items()}
        known = {
            name: from_plain(tuple[str, ...], values, f"settings.{name}")
            for name, values in settings.items()
        }
    except KeyError as error:
        raise wrong(f"lacks {error.args[0]}") from None
    except (ValueError, OverflowError) as error:  # an integer that no float can hold
        raise wrong(str(error)) from None
    if found["format"] != FORMAT:
        raise wrong(f"is of format {found['format']}; this projaudit reads {FORMAT}")
    if not found["honest"]:
        raise wrong("holds no honest fine-tune")
    for name in ("honest", "backdoored"):
        found[name] = tuple(sorted(found[name]))
    return Calibration(**found, settings=known)


_TYPES: Mapping[str, Any] = {
    "format": int,
    "id": str,
    "about": str,
    "honest": tuple[float, ...],
    "backdoored": tuple[float, ...],
    "families": tuple[str, ...],
    "parameters": Range,
    "in_features": Range,
    "out_features": Range,
    "relative_norm": Range,
}


def calibrate(reports: Mapping[str, Mapping[str, Any]], name: str) -> Calibration:
    """The calibration of a user's own honest models, from their JSON reports by file name.

    Every report has to hold a score, and all of them the same settings. Raises UsageError
    (`usage.report`) naming the file.
    """
    scores, shapes, settings = [], [], None
    digests: dict[tuple[str, ...], str] = {}
    for file, report in reports.items():
        value, shape, own, same = _read(file, report)
        if settings is not None and own != settings:
            told = ", ".join(f"{name} {values[0]}" for name, values in own.items())
            raise _unfit(file, f"was made with other settings than the first ({clean(told)})")
        if same in digests:
            raise _unfit(file, f"is of the same projector as {clean(digests[same])}")
        digests[same], settings = file, own
        scores.append(value)
        shapes.append(shape)
    if settings is None:
        raise UsageError("needs at least one report", "report")
    return Calibration(
        format=FORMAT,
        id=name,
        about=f"{len(scores)} honest fine-tunes of the user's own",
        honest=tuple(sorted(scores)),
        backdoored=(),
        families=tuple(sorted({shape.family for shape in shapes})),
        parameters=_span([s.parameters for s in shapes]),
        in_features=_span([s.in_features for s in shapes]),
        out_features=_span([s.out_features for s in shapes]),
        relative_norm=_span([s.relative_norm for s in shapes if s.relative_norm is not None]),
        settings=settings,
    )


def _read(
    file: str, report: Mapping[str, Any]
) -> tuple[float, Shape, dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Score, shape, settings, and the digests of the projector's tensors."""
    value, behaviour = report.get("score"), report.get("behaviour")
    minor = str(report.get("schema_version")).split(".")[1:2]
    if not minor or not minor[0].isdecimal() or int(minor[0]) < SINCE:
        raise _unfit(file, "was made by an earlier projaudit, whose scores meant something else")
    if type(value) not in (int, float) or not isinstance(behaviour, dict):
        raise _unfit(file, "holds no score: it was not made at depth behaviour with a base")
    if behaviour.get("stopped") == "budget":
        raise _unfit(file, "was stopped by its budget")
    try:
        projector = report["projectors"][0]
        norms = [
            from_plain(float, m["value"])
            for m in report["measurements"]
            if m["metric"] == "relative_norm" and m["value"] is not None
        ]
        digests = tuple(str(t["sha256"]) for t in report["tensors"] if t["side"] == "target")
        score = from_plain(float, value)
        shape = Shape(
            family=str(projector["family"]),
            parameters=int(behaviour["parameters"]),
            in_features=int(projector["in_features"]),
            out_features=int(projector["out_features"]),
            relative_norm=max(norms, default=None),
            images=str(behaviour["images"]),
            prompts=kind_of(behaviour["prompts"]),
        )
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise _unfit(file, "lacks what a calibration needs") from None
    return score, shape, {"images": (shape.images,), "prompts": (shape.prompts,)}, digests


def _unfit(file: str, message: str) -> UsageError:
    return UsageError(message, "report", file=clean(file))


def _span(values: Sequence[float]) -> Range:
    return Range(float(min(values, default=0.0)), float(max(values, default=0.0)))


def to_json(calibration: Calibration) -> dict[str, Any]:
    """The calibration as a file holds it."""
    return asdict(calibration)
