"""The screening of a fine-tuning set as one function: profiles, detectors, rules, report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from projaudit import __version__
from projaudit.errors import NotFoundError, NothingError, UnsupportedError, UsageError
from projaudit.inert import clean
from projaudit.judge import judge
from projaudit.policy import load_policy
from projaudit.refs import Ref, parse_ref
from projaudit.report import Identity, Policy, Report, Run
from projaudit.screen.bye import LayerRule
from projaudit.screen.detect import FIRST, Method, Screening, screen
from projaudit.screen.lists import write_clean, write_lists
from projaudit.screen.model import identity
from projaudit.screen.numbers import arguments
from projaudit.screen.pictures import heat_maps
from projaudit.screen.profiles import Profiles, parts_in, read_profiles
from projaudit.screen.profiling import heat, profile
from projaudit.screen.results import layers_of, screened
from projaudit.screen.samples import Dataset, open_dataset
from projaudit.screened import HeatMap, Screened

POSITIONS = 16
"""Answer tokens that are profiled where nobody says how many."""
_PICTURES = 6
Progress = Callable[[str, int, int], None]


def screen_dataset(
    model: str,
    dataset: str,
    profiles: Path,
    *,
    method: Method = "both",
    rule: LayerRule = "paper",
    published: bool = False,
    chosen: Mapping[str, float] | None = None,
    adapter: str | None = None,
    images: str | None = None,
    positions: int | None = None,
    batch: int = 8,
    device: str = "auto",
    devices: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    offline: bool = False,
    policy: str | None = None,
    fail_on: Literal["fail", "review"] | None = None,
    lists: Path | None = None,
    clean_set: Path | None = None,
    pictures: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Which samples of `dataset` to drop, by the attention of `model`, which was tuned on it.

    Profiles are written to the folder `profiles`; one that holds all of a set's is read and the
    model is not opened: it may be gone, and if it is at hand its bytes must be those that were
    profiled. `positions` are those of such a folder where they are not named, else 16. `chosen`
    are numbers of the detectors (`projaudit.screen.numbers`). `lists` is a folder for lists of
    samples, `clean_set` an empty one for the rows to keep, `pictures` are drawn where the model
    was opened. Raises a ProjauditError with a stable `code` where there is no screening; what
    could not be told within one stands in the report.
    """
    missing = [name for name in ("sklearn", "pyarrow") if find_spec(name) is None]
    if missing:
        says = f"not installed: {', '.join(missing)}"
        raise UnsupportedError(says, "extra", remedy="pip install 'projaudit[screen]'")
    started, stages = datetime.now(UTC), dict[str, float]()
    data = open_dataset(dataset, images, offline=offline)
    with _timed(stages, "profiles"):
        found = _finished(profiles, data, limit)
        reused = found is not None
        if found is not None:
            _require_same(found, profiles, model, adapter, positions, offline=offline)
        else:
            found = profile(
                model,
                dataset,
                profiles,
                adapter=adapter,
                images=images,
                positions=POSITIONS if positions is None else positions,
                batch=batch,
                device=device,
                devices=devices,
                limit=limit,
                offline=offline,
                progress=progress,
            )
    if not any(status == "ok" for status in found.statuses):
        told = f"none of {len(found.ids)} samples could be profiled: {clean(found.details[0])}"
        lost = found.statuses[0] == "image-missing"
        remedy = "name the folder of images with --images" if lost and images is None else ""
        raise NothingError(told, "samples", file=clean(data.name), remedy=remedy)
    with _timed(stages, "detectors"):
        texts = [data.texts(int(number)) for number in found.numbers]
        questions, answers = [q for q, _ in texts], [a for _, a in texts]
        screening = screen(
            found,
            method,
            questions=questions,
            answers=answers,
            rule=rule,
            published=published,
            seed=seed,
            **arguments(chosen or {}),
        )
        summary, samples = screened(found, screening, data.name, questions, answers)
    if pictures and not reused:
        with _timed(stages, "pictures"):
            maps = _maps(
                found, screening, data, model, dataset, adapter, images, device, offline=offline
            )
            summary = replace(summary, heat=tuple(maps))
    written = []
    if lists is not None:
        written += write_lists(samples, lists)
    if clean_set is not None:
        written.append(write_clean(data, samples, clean_set))
    summary = replace(summary, files=tuple(str(file) for file in written))
    settings = {
        "method": method,
        "rule": rule,
        "published": published or None,
        **(chosen or {}),
        "seed": seed,
        "positions": int(found.about["positions"]),
        "batch": int(found.about["batch"]),
        "limit": limit,
        "adapter": adapter,
        "images": images,
        "policy": policy,
    }
    return _report(model, data, found, summary, settings, policy, fail_on, started, stages)


def _finished(folder: Path, data: Dataset, limit: int | None) -> Profiles | None:
    """The profiles in a folder where they are those of all samples; None where some are missing.

    Raises UsageError (`usage.profiles`) where they are another dataset's.
    """
    if not folder.is_dir() or not parts_in(folder):
        return None
    found = read_profiles(folder)
    if found.about.get("dataset_digest") != data.digest:
        raise UsageError("holds profiles of another dataset", "profiles", file=clean(folder))
    wanted = len(data) if limit is None else min(limit, len(data))
    return found if len(found.ids) == wanted == found.about.get("samples") else None


def _require_same(
    found: Profiles,
    folder: Path,
    model: str,
    adapter: str | None,
    positions: int | None,
    *,
    offline: bool,
) -> None:
    """Raises UsageError (`usage.profiles`) where finished profiles are not those asked for.

    A model that is at hand as a path is compared by its bytes; one that is gone or on a Hub by
    its name, and so is its adapter.
    """
    about = found.about
    other = ""
    if positions not in (None, about["positions"]):
        other = f"{about['positions']} positions, not {positions}"
    elif _at_hand(model) and (adapter is None or _at_hand(adapter)):
        now = identity(model, adapter, offline=offline)
        if any(now.get(key) != about.get(key) for key in ("digest", "adapter_digest")):
            other = "another model, or of one that was tuned again"
    elif [about["model"], about["adapter"]] != [
        m if m is None else clean(m) for m in (model, adapter)
    ]:
        other = f"the model {clean(about['model'])}"
        other += f" with the adapter {clean(about['adapter'])}" if about["adapter"] else ""
    if other:
        raise UsageError(
            f"holds profiles of {other}",
            "profiles",
            file=clean(folder),
            remedy="choose another folder, or delete it",
        )


def _at_hand(text: str) -> bool:
    try:
        return parse_ref(text).path is not None
    except NotFoundError:
        return False


def _maps(
    found: Profiles,
    screening: Screening,
    data: Dataset,
    model: str,
    dataset: str,
    adapter: str | None,
    images: str | None,
    device: str,
    *,
    offline: bool,
) -> list[HeatMap]:
    """Attention over the image of samples to drop, most certain first, and of as many to keep."""
    layer, head = _shown_head(screening, found)
    chosen = [*np.flatnonzero(screening.dropped)[: _PICTURES // 2]]
    kept = np.flatnonzero(screening.looked_at & ~screening.dropped & ~screening.apart)
    chosen += [*kept[: _PICTURES - len(chosen)]]
    wanted = [(int(found.numbers[i]), FIRST, layer, head) for i in chosen]
    maps = heat(
        model, dataset, wanted, adapter=adapter, images=images, device=device, offline=offline
    )
    return heat_maps(data, maps, layers_of(found), set(found.numbers[screening.dropped].tolist()))


def _shown_head(screening: Screening, found: Profiles) -> tuple[int, int | None]:
    """The most sensitive head that TCAP knows, or layer that BYE does, or the last layer."""
    if screening.tcap is not None and screening.tcap.heads:
        return screening.tcap.heads[0].layer, screening.tcap.heads[0].head
    if screening.bye is not None and screening.bye.layers:
        return max(screening.bye.layers, key=lambda layer: layer.index).layer, None
    return found.entropy.shape[2] - 1, None


def _report(
    model: str,
    data: Dataset,
    found: Profiles,
    summary: Screened,
    settings: dict[str, Any],
    policy: str | None,
    fail_on: Literal["fail", "review"] | None,
    started: datetime,
    stages: Mapping[str, float],
) -> Report:
    from projaudit.analyses import METRICS, run

    rules = load_policy(policy or "structure", METRICS)
    own = tuple(rule for rule in rules.rules if rule.subject == "dataset")
    measurements, skipped = run("dataset", "dataset", summary)
    findings, unevaluated, outcomes = judge(
        replace(rules, rules=own), measurements, skipped, METRICS
    )
    try:
        ref = parse_ref(model)
    except NotFoundError:  # where finished profiles were read, it may be gone
        ref = Ref(model, "local")
    commit = found.about.get("commit")
    packages = {p: version(p) for p in ("numpy", "scipy", "scikit-learn")}
    return Report(
        target=Identity(ref.text, ref.kind, ref.repo or ref.text, ref.revision, commit),
        policy=Policy(rules.name, "behaviour", fail_on or rules.fail_on),
        environment={
            "projaudit": __version__,
            "python": platform.python_version(),
            **packages,
            "device": str(found.about["device"]),
            "dtype": str(found.about["dtype"]),
            **{f"{name} (profiles)": str(v) for name, v in found.about["versions"].items()},
        },
        settings={
            **{name: value for name, value in settings.items() if value is not None},
            "dataset": data.name,
            "dataset_digest": data.digest,
            "model_digest": str(found.about["digest"]),
        },
        run=Run(started.isoformat(timespec="seconds"), dict(stages)),
        measurements=tuple(measurements),
        skipped=tuple(skipped),
        findings=findings,
        unevaluated=unevaluated,
        rules=outcomes,
        screened=summary,
    )


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    stages[name] = time.perf_counter() - start
