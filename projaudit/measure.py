"""One projector against its base: read, paired, and asked every metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from projaudit.adapters import Applied
from projaudit.analyses import ProjectorContext, alignment, probes, run, spectral, themes
from projaudit.errors import UsageError
from projaudit.findings import Measurement, Series, Skipped
from projaudit.peft_methods import widened
from projaudit.projector import Projector, blueprint
from projaudit.recipe import Blueprint
from projaudit.report import AuditedProjector, Layer, TensorRead
from projaudit.session import Session, Settings
from projaudit.sides import Side
from projaudit.weights import Weight

if TYPE_CHECKING:
    import torch

    from projaudit.analyses.context import Direction


@dataclass
class Measured:
    """What measuring yields, over all projectors and bases."""

    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    tensors: list[TensorRead] = field(default_factory=list)
    projectors: list[AuditedProjector] = field(default_factory=list)

    def ask(self, session: Session, kind: str, subject: str, of: object) -> None:
        """Adds every metric of that kind for a subject; each theme is a stage of the session."""
        for theme in themes(kind):
            with session.stage(theme):
                measurements, skipped = run(kind, subject, of, theme)
            self.measurements += measurements
            self.skipped += skipped


def measure_projector(
    session: Session,
    device: torch.device,
    target: Side,
    base: Side,
    directions: Sequence[Direction],
    texts: Sequence[str],
    into: Measured,
) -> None:
    """Adds to `into` all that is measured on one projector, and which bytes it was measured on.

    Raises what reading and pairing raise, and UsageError (`usage.direction`, `usage.option`) where
    a direction or an explicit rank does not fit the projector.
    """
    import torch

    from projaudit.pair import pair
    from projaudit.targets import (
        check_widths,
        embedding_matrix,
        embedding_pair,
        text_directions,
    )

    settings, width = session.settings, target.projector.out_features
    check_widths(directions, width)
    _check_rank(settings, target.projector)
    number = len(into.projectors) + 1
    subject = "projector" if number == 1 else f"projector@{number}"
    with session.stage("read projector"):
        applied, theirs = target.applied(), base.load()
    ours = applied.weights
    into.tensors += _tensors_read("target", subject, target, applied)
    into.tensors += _tensors_read("base", subject, base, Applied(theirs))
    into.projectors.append(_audited(subject, target, base))
    with session.stage("pair"):
        update = pair(
            target.projector,
            base.projector,
            {name: weight.tensor for name, weight in ours.items()},
            # An adapter is not rounded to what the base is stored in: `adapters.apply`.
            {n: widened(w.tensor) if target.fit else w.tensor for n, w in theirs.items()},
            target_steps=_steps(ours, target),
            base_steps=_steps(theirs, target),
            calibrated=any(weight.calibrated for weight in (*ours.values(), *theirs.values())),
            subject=subject,
            device=device,
            rank=settings.rank,
            generator=torch.Generator().manual_seed(settings.seed + number),
            embedding_rows=lambda: embedding_pair(base.checkpoint, target.checkpoint, device),
            factors=_factors(applied, theirs, target.projector, base.projector),
        )
    del applied, ours, theirs
    for layer in update.layers:
        into.ask(session, "layer", layer.subject, layer)
        into.series += spectral.series(layer)
    for vector in update.vectors:
        into.ask(session, "vector", vector.subject, vector)
    with session.stage("read targets"):
        context = ProjectorContext(
            update=update,
            directions=(
                *directions,
                *text_directions(target.checkpoint, target.reading, texts, width),
            ),
            tokens=embedding_matrix(target.checkpoint, target.reading, width),
            blueprints=(_blueprint(target), _blueprint(base)),
        )
    into.ask(session, "projector", subject, context)
    into.series += (*probes.series(context), *alignment.series(context))


def measure_merge(session: Session, target: Side, bases: Sequence[Side], into: Measured) -> None:
    """Adds to `into` what there is to say of a projector with several bases."""
    from projaudit.analyses.merge import Parents
    from projaudit.rounding import rounding

    with session.stage("merge"):
        stored = target.load()
        matrices = [stored[layer.weight] for layer in target.projector.linears]
        parents = Parents(
            _by_role(target),
            tuple((base.name, _by_role(base)) for base in bases),
            # A vector may be zero throughout, where there is no relative size.
            max(rounding(w.tensor, w.tensor, w.step, w.step).floor for w in matrices),
        )
    number = 1 + sum(m.metric == "merge_nearest" for m in into.measurements)
    into.ask(session, "merge", "merge" if number == 1 else f"merge@{number}", parents)


def _by_role(side: Side) -> dict[str, torch.Tensor]:
    """The projector's tensors by role, fp32, matrices as (out × in)."""
    weights = side.load()
    found = {
        f"{layer.role}.weight": layer.matrix(weights[layer.weight].tensor.float())
        for layer in side.projector.linears
    }
    found |= {
        f"{layer.role}.bias": weights[layer.bias].tensor.float()
        for layer in side.projector.linears
        if layer.bias
    }
    return found | {r: weights[name].tensor.float() for r, name in side.projector.vectors.items()}


def read_projector(session: Session, target: Side, into: Measured) -> None:
    """Adds to `into` the bytes of a projector that there is no base to compare with."""
    with session.stage("read projector"):
        into.tensors += _tensors_read("target", "projector", target, target.applied())


def _check_rank(settings: Settings, projector: Projector) -> None:
    side = min(min(layer.shape) for layer in projector.linears)
    if settings.rank_given and settings.rank > side:
        raise UsageError(
            f"{settings.rank} is more than the {side} singular values of the smallest layer",
            "option",
            field="--rank",
        )


def _factors(
    applied: Applied, theirs: Mapping[str, Weight], target: Projector, base: Projector
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Role -> factors of the layers to whose base the adapter adds them, by the base's digest."""
    partners = {layer.role: layer.weight for layer in base.linears}
    found = {
        layer: applied.factors[layer.weight]
        for layer in target.linears
        if layer.weight in applied.factors
        and layer.layout != "unfold"
        and layer.role in partners
        and _digests(applied.weights[layer.weight]) == _digests(theirs[partners[layer.role]])
    }
    return {
        layer.role: (right.T, left.T) if layer.layout == "transposed" else (left, right)
        for layer, (left, right) in found.items()
    }


def _blueprint(side: Side) -> Blueprint | None:
    """What transformers' module of this projector is built from; None where none is known."""
    projector, config = side.projector, side.checkpoint.config
    if projector.recipe is None or config is None:
        return None
    return blueprint(projector, config, side.reading.shapes)


def _digests(weight: Weight) -> list[str]:
    return [digest for _, digest in weight.parts]


def _steps(weights: Mapping[str, Weight], target: Side) -> dict[str, torch.Tensor]:
    """How far apart quantised values lie, by name; an adapter stands on values as they are."""
    if target.fit is not None:
        return {}
    return {name: weight.step for name, weight in weights.items() if weight.step is not None}


def _tensors_read(
    side: Literal["target", "base"], subject: str, of: Side, applied: Applied
) -> list[TensorRead]:
    roles = {
        name: f"{layer.role}.{leaf}"
        for layer in of.projector.linears
        for leaf, name in (("weight", layer.weight), ("bias", layer.bias))
        if name
    } | {name: role for role, name in of.projector.vectors.items()}
    read = [
        (name, of.source, info, digest)
        for name, weight in applied.weights.items()
        for info, digest in weight.parts
    ]
    if of.fit is not None:
        adapter = of.fit.adapter.source
        # The base's own bytes stand on its side.
        own = [] if of.checkpoint.adapter is not None else read
        read = own + [(name, adapter, s.info, s.sha256) for name, s in applied.read]
    return [
        TensorRead(
            side=side,
            projector=subject,
            role=roles[name],
            name=info.name,
            file=info.file,
            start=info.start,
            stop=info.stop,
            dtype=info.dtype,
            shape=info.shape,
            sha256=digest,
            file_sha256=source.files[info.file].sha256,
            verified=getattr(source, "verified", {}).get(info.file, "local"),
        )
        for name, source, info, digest in read
    ]


def _audited(subject: str, target: Side, base: Side) -> AuditedProjector:
    partners = {layer.role: layer.weight for layer in base.projector.linears}
    projector = target.projector
    return AuditedProjector(
        subject=subject,
        family=projector.family,
        reading=f"{target.reading.label}: {target.reading.why}",
        layers=tuple(
            Layer(layer.role, layer.weight, layer.shape, partners.get(layer.role), bool(layer.bias))
            for layer in projector.linears
        ),
        chain=projector.chain,
        module=projector.recipe.name if projector.recipe else "",
        in_features=projector.in_features,
        out_features=projector.out_features,
        base=base.name,
    )
