"""`projaudit families`: which are known, and which one a target matches."""

from __future__ import annotations

import click

from projaudit.cli.terminal import emit, option
from projaudit.errors import UsageError
from projaudit.inert import clean


@click.group()
def families() -> None:
    """The projector families that are known: list them, read one, explain a match."""


@families.command("list")
def list_families() -> None:
    """Every family: name, architectures, forward path."""
    from projaudit.family import families as known

    for family in known():
        path = f"transformers' {family.recipe.name}" if family.recipe else " → ".join(family.chain)
        emit(f"{family.name:<29} {', '.join(family.architectures)}")
        emit(f"{'':<29} {path}")


@families.command("show")
@click.argument("family")
def show_family(family: str) -> None:
    """How a family's projector is named and wired, and where that was read."""
    from projaudit.family import families as known

    found = next((f for f in known() if f.name == family), None)
    if found is None:
        raise UsageError(
            f"there is no family {clean(family)!r}", "family", remedy="see `families list`"
        )
    emit(f"{found.name}: {', '.join(found.architectures)}")
    others = ", which hold other things too" if found.scattered else ""
    emit(f"  modules  {', '.join(found.modules)}{others}")
    for kind, roles in (
        ("norms", found.norms),
        ("layers", found.linears),
        ("others", found.matrices),
        ("vectors", found.vectors),
    ):
        for role, names in roles.items():
            emit(f"  {kind:<8} {role}: {', '.join(name or 'the module' for name in names)}")
    for role, layout in found.layouts.items():
        emit(f"  layout   {role}: {layout}")
    if found.optional:
        emit(f"  optional {', '.join(sorted(found.optional))}")
    if found.recipe is not None:
        emit(f"  runs     transformers' {found.recipe.name}")
        for part, taken in found.recipe.keys.items():
            emit(f"  config   {part or 'the top'}: {', '.join(taken)}")
    else:
        emit(f"  path     {' → '.join(found.chain)}")
    if "$act" in "".join(found.chain):
        keys = "".join(f", or as {key} says" for key in found.act_keys)
        emit(f"  $act     {found.act_default}{keys}")
    if found.norms:
        key = f", or as {found.eps_key} says" if found.eps_key else ""
        emit(f"  epsilon  {found.eps_default:g}{key}")
    emit(f"  source   {found.source}")


@families.command("explain")
@click.argument("target")
@option("--revision", metavar="REV", help="Branch, tag or commit.")
@option("--base", metavar="REF", help="What TARGET is an adapter of. Default: its claim.")
@option("--offline/--online", default=None, help="Only what is on this machine.")
def explain_target(
    target: str, revision: str | None, base: str | None, offline: bool | None
) -> None:
    """Where TARGET's projector was found and why, and what was nearly taken."""
    from projaudit.audit import explained

    found = explained(target, revision, base=base, offline=offline)
    if found.base:
        emit(f"an adapter of {found.base}, which has:")
    if not found.found:
        emit("no projector")
    for projector, why in found.found:
        emit(f"{projector.family}, {projector.kind}: {why}")
        runs = f"transformers' {projector.recipe.name}" if projector.recipe else "not known"
        path = " → ".join(projector.chain) or runs
        widths = f"{projector.in_features} → {projector.out_features} features"
        emit(f"  {clean(projector.prefix) or 'several modules'}, {widths}, forward path: {path}")
        for name in projector.tensors:
            emit(f"    {clean(name)}")
        for name in projector.unexpected:
            emit(f"    {clean(name)}, which the family does not know")
    if found.near:
        emit("not taken:")
    for name, why in found.near:
        emit(f"  {name} {why}")
