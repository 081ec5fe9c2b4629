"""A target against one base: which projector meets which, and the facts of the two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from projaudit.adapters import Fit
from projaudit.analyses.structure import Facts
from projaudit.checkpoint import Checkpoint
from projaudit.config_changes import adapter_config_changes, code_of
from projaudit.coverage import changed_by, compare
from projaudit.family import undeclared
from projaudit.opened import Base, Found, identity, name_of, stored_names
from projaudit.projector import Projector
from projaudit.report import Coverage
from projaudit.sides import Side


def counterpart(projector: Projector, base: Base) -> Side:
    """The base's projector of the same kind, by module path where there are several."""
    word = projector.prefix.rpartition(".")[2]
    best = max(
        base.projectors,
        key=lambda p: (
            p.kind == projector.kind,
            p.prefix.endswith(word),
            p.prefix == projector.prefix,
        ),
    )
    roles = [layer.role for layer in projector.linears]
    if sorted(roles) == sorted(layer.role for layer in best.linears):
        # Where no family says the order, a file of another format has another one.
        ordered = sorted(best.linears, key=lambda layer: roles.index(layer.role))
        best = replace(best, linears=tuple(ordered))
    return Side(base.checkpoint, base.checkpoint.readings[0], best, name_of(base.checkpoint.source))


def coverage_of(
    target: Checkpoint, base: Base, first: Found, fitted: Fit | None, *, seed: int
) -> Coverage:
    """What is known of everything but the projectors of the first reading."""
    coverage = compare(
        target,
        base.checkpoint,
        audited=stored_names(first),
        audited_base=stored_names((base.checkpoint.readings[0], base.projectors)),
        seed=seed,
    )
    return _with_adapter(coverage, target, base, fitted)


def _with_adapter(
    coverage: Coverage, target: Checkpoint, base: Base, fitted: Fit | None
) -> Coverage:
    """The coverage, with what an adapter changes outside the projector."""
    if fitted is None:
        return coverage
    coverage = changed_by(coverage, [fitted.adapter.tensors[name] for name in fitted.elsewhere])
    if target.adapter is None:
        return coverage
    says = adapter_config_changes(target.adapter, base.checkpoint)
    changes = tuple(dict.fromkeys((*coverage.config_changes, *says)))
    # What was compared is the base with a base; these files are not the adapter's.
    coverage = replace(coverage, files_equal=0, files_differing=(), files_unknown=())
    return replace(coverage, files_added=(), config_changes=changes)


def facts_of(target: Checkpoint, base: Base, coverage: Coverage, first: Found) -> Facts:
    """What the metrics of the checkpoint are asked about: two models beside their projectors."""

    def roles(of: Projector) -> dict[str, str]:
        biases = {f"{layer.role}.bias": layer.bias for layer in of.linears if layer.bias}
        unknown = {name.removeprefix(of.prefix): name for name in of.unexpected}
        return {**biases, **of.vectors, **unknown}

    added: list[str] = []
    missing: list[str] = []
    epsilons: list[str] = []
    partners = [counterpart(projector, base).projector for projector in first[1]]
    for projector, partner in zip(first[1], partners, strict=True):
        ours, theirs = roles(projector), roles(partner)
        if projector.norm_eps != partner.norm_eps:
            epsilons.append(f"epsilon of the norms: {partner.norm_eps:g} → {projector.norm_eps:g}")
        added += {*projector.unexpected, *(ours[role] for role in ours.keys() - theirs.keys())}
        missing += [theirs[role] for role in theirs.keys() - ours.keys()]
    if coverage.config_compared:  # a file alone need not be the whole model
        taken = {partner.tensors for partner in partners}
        gone = [other for other in base.projectors if other.tensors not in taken]
        missing += [name for projector in gone for name in projector.tensors]
        added += _beyond(first[1], partners, base)
        changes = (*coverage.config_changes, *dict.fromkeys(epsilons))
        coverage = replace(coverage, config_changes=changes)
    return Facts(
        target=identity(target.origin),
        base=identity(base.checkpoint.source),
        provenance=base.provenance,
        asked_base=base.asked,
        circular=base.circular,
        coverage=coverage,
        checkpoint=target,
        code=_code(target),
        classes=_classes(target, base, first),
        added=sorted(added),
        missing=sorted(missing),
    )


def _classes(target: Checkpoint, base: Base, first: Found) -> tuple[str, ...]:
    """The classes that the configs name and the families of their projectors do not list."""
    theirs = (base.checkpoint.readings[0], base.projectors)
    found = [
        undeclared(projector, checkpoint.config or {})
        for checkpoint, (reading, projectors) in ((target, first), (base.checkpoint, theirs))
        if reading.metadata is None  # else it is a GGUF file, which says itself what it is
        for projector in projectors
    ]
    return tuple(dict.fromkeys(filter(None, found)))


def _code(target: Checkpoint) -> tuple[str, ...]:
    """What remote code would run; an adapter's beside its base's."""
    if target.adapter is None:
        return code_of(target)
    own = code_of(replace(target, source=target.adapter, config=None))
    return (*code_of(target), *own)


def _beyond(
    projectors: Sequence[Projector], partners: Sequence[Projector], base: Base
) -> list[str]:
    """The tensors of projectors that the target has and the base has not, by the count of them."""
    pairs = sorted(
        zip(projectors, partners, strict=True),
        key=lambda pair: (pair[0].family == pair[1].family, pair[0].prefix == pair[1].prefix),
    )
    seen: set[tuple[str, ...]] = set()
    twice: list[Projector] = []
    for projector, partner in reversed(pairs):
        if partner.tensors in seen:
            twice.append(projector)
        seen.add(partner.tensors)
    more = max(len(projectors) - len(base.projectors), 0)
    return [name for projector in twice[len(twice) - more :] for name in projector.tensors]
