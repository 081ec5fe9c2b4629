"""Facts, no statistics: which base, which bytes, what else changed, which function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from projaudit.chain import activations, acts
from projaudit.checkpoint import Checkpoint
from projaudit.inert import clean
from projaudit.metrics import Skip, Value, measures
from projaudit.report import Coverage, Identity, Provenance

if TYPE_CHECKING:
    from projaudit.analyses.context import ProjectorContext


@dataclass(frozen=True)
class Facts:
    """What is known of target and base before any weight is measured."""

    target: Identity
    base: Identity
    provenance: Provenance
    asked_base: str
    """Repository id that was asked for as the base; differs from `base.name` after a rename."""
    circular: bool
    """The lineage comes back to where it started."""
    coverage: Coverage
    checkpoint: Checkpoint
    code: Sequence[str]
    """Files and config entries of the target that bring code."""
    added: Sequence[str]
    """Tensors in the target's projectors that the family does not know or the base lacks."""
    classes: Sequence[str]
    """Classes that target or base name and that the family of their projector does not list."""
    missing: Sequence[str]
    """Tensors of the base's projectors that the target's lack, 1-D ones included."""


@measures("checkpoint", kind="structure")
def base_verified(facts: Facts) -> Value:
    """1 where the user or the policy named the base, 0 where only the uploader claims it."""
    claims = tuple(f"{claim.source}: {claim.repo}" for claim in facts.provenance.claims)
    return Value(float(facts.provenance.verified), claims)


@measures("checkpoint", kind="structure")
def base_is_target(facts: Facts) -> float:
    """1 where base and target are the same files, or the uploader names the model itself."""
    same_name = facts.base.name.lower() == facts.target.name.lower()
    if facts.target.kind != facts.base.kind:
        return 0.0
    if facts.provenance.verified:
        return float(same_name and facts.base.commit == facts.target.commit)
    return float(same_name)


@measures("checkpoint", kind="structure")
def base_renamed(facts: Facts) -> Value:
    """1 where the server answered for another repository than the one asked for."""
    renamed = facts.base.kind == "hub" and facts.asked_base.lower() != facts.base.name.lower()
    return Value(float(renamed), (facts.asked_base, facts.base.name) if renamed else ())


@measures("checkpoint", kind="structure", unit="bases")
def base_claims(facts: Facts) -> Value:
    """Number of different answers that the uploader gives; 1 where a verified base settles it.

    A merge has several bases: a source that names all that another names, and more, is of its mind.
    """
    if facts.provenance.verified:
        return Value(1.0)
    named: dict[str, set[str]] = {}
    for claim in facts.provenance.claims:
        named.setdefault(claim.source, set()).add(claim.repo.lower())
    answers = {frozenset(repos) for repos in named.values()}
    different = [one for one in answers if not any(one < other for other in answers)]
    return Value(
        float(len(different)),
        tuple(f"{claim.source}: {claim.repo}" for claim in facts.provenance.claims),
    )


@measures("checkpoint", kind="structure")
def base_circular(facts: Facts) -> Value:
    """1 where the lineage (base of the base, …) comes back to itself."""
    return Value(float(facts.circular), facts.provenance.lineage if facts.circular else ())


@measures("checkpoint", kind="structure", unit="sources")
def ambiguous_sources(facts: Facts) -> Value:
    """Number of ways in which the repository leaves open which bytes are loaded."""
    other = ("custom-code", "equal-pickle")
    found = [a for a in facts.checkpoint.ambiguities if a.kind not in other]
    return Value(float(len(found)), tuple(a.message for a in found))


@measures("checkpoint", kind="structure", unit="files")
def repeated_projectors(facts: Facts) -> Value:
    """Number of pickled files that hold the audited projector once more, byte by byte."""
    found = [a for a in facts.checkpoint.ambiguities if a.kind == "equal-pickle"]
    return Value(float(len(found)), tuple(a.message for a in found))


@measures("checkpoint", kind="structure", unit="files")
def custom_code(facts: Facts) -> Value:
    """Number of Python files and `auto_map` entries, which run with trust_remote_code."""
    return Value(float(len(facts.code)), tuple(facts.code))


@measures("checkpoint", kind="structure", unit="keys")
def config_changes(facts: Facts) -> Value:
    """Number of config keys that change what the projector computes or is fed."""
    if not facts.coverage.config_compared:
        raise Skip("there is no config.json on both sides; name folders rather than files")
    changes = facts.coverage.config_changes
    return Value(float(len(changes)), changes)


@measures("checkpoint", kind="structure", unit="classes")
def unlisted_classes(facts: Facts) -> Value:
    """Number of classes in the configs that the family of the projector found does not list."""
    return Value(float(len(facts.classes)), tuple(clean(name, 80) for name in facts.classes))


@measures("checkpoint", kind="structure", unit="tensors")
def projector_tensors_added(facts: Facts) -> Value:
    """Number of projector tensors that the family does not know or that the base lacks."""
    return Value(float(len(facts.added)), tuple(facts.added))


@measures("checkpoint", kind="structure", unit="tensors")
def projector_tensors_removed(facts: Facts) -> Value:
    """Number of projector tensors that the base has and the target lacks."""
    return Value(float(len(facts.missing)), tuple(facts.missing))


@measures("checkpoint", kind="structure", unit="tensors")
def rest_differs(facts: Facts) -> Value:
    """Number of tensors outside the projector known to differ from the base (0: proven equal).

    Skipped where the rest was not looked at, or only in samples.
    """
    parts = [part for part in facts.coverage.parts if part.status != "audited"]
    known = [part for part in parts if part.status == "differs"]
    if not known and any(part.status in ("not-looked-at", "sampled-equal") for part in parts):
        raise Skip("the rest of the model was not compared throughout")
    count = sum(len(part.differing) or 1 for part in known)
    return Value(float(count), tuple(f"{part.name}: {part.how}" for part in known))


@measures("projector", kind="structure")
def function_known(ctx: ProjectorContext) -> float:
    """1 where target and base compute the same known chain of layers, so that it can be probed."""
    chain = ctx.update.chain
    known = acts(chain) <= activations().keys()
    return float(bool(chain) and chain == ctx.update.base_chain and known)
