"""Which base: every claim of one, ranked by who makes it, and the lineage behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from projaudit.errors import BaseError, FormatError, ProjauditError
from projaudit.inert import clean
from projaudit.refs import Ref, parse_ref
from projaudit.report import Claim, Provenance
from projaudit.source import Source
from projaudit.strict import front_matter, load_json

MAX_DEPTH = 8
"""Ancestors that are followed."""
MAX_CANDIDATES = 4
"""Distinct bases that are compared; more is a claim nobody can mean."""
_README_LIMIT = 1 << 20
_CONFIG_LIMIT = 10 << 20
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}")
_GGUF_BASE = re.compile(r"general\.base_model\.[0-9]{1,3}\.repo_url")
_URL = re.compile(r"https://(?:huggingface\.co|hf\.co)/")


@dataclass(frozen=True)
class Candidate:
    """A base to compare with, and where it comes from."""

    ref: Ref
    provenance: Provenance


def candidates(
    target: Source,
    config: Mapping[str, Any] | None,
    *,
    option: Sequence[Ref],
    pins: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> tuple[Candidate, ...]:
    """The bases to compare with, best source first: `--base` > policy > adapter > card > config >
    the `metadata` of a GGUF file.

    What the user or the policy names is verified and stands alone; everything else is the
    uploader's claim, every distinct one of which is a candidate. Names in files are Hub ids and
    nothing else, never paths or URLs. Raises BaseError `base.none` where nothing names a base.
    """
    if option:
        said = tuple(Claim("--base", ref.repo or ref.text) for ref in option)
        return tuple(Candidate(ref, Provenance("--base", True, said)) for ref in option)
    for repo, base in pins.items():
        if repo.lower() in _names(target):
            claim = Claim("policy", base)
            return (Candidate(parse_ref(base), Provenance("policy", True, (claim,))),)
    claims, problems = _claims(target, config, metadata or {})
    if not claims:
        reason = f" ({'; '.join(problems)})" if problems else ""
        raise BaseError(
            f"nothing names the base of this model{reason}",
            "none",
            file=clean(target.name),
            remedy="name it with --base",
        )
    distinct: dict[str, tuple[Claim, str | None]] = {}
    for claim, revision in claims:
        distinct.setdefault(claim.repo.lower(), (claim, revision))
    if len(distinct) > MAX_CANDIDATES:
        raise BaseError(
            f"{len(distinct)} different bases are claimed",
            "many",
            file=clean(target.name),
            remedy="name the right one with --base",
        )
    all_claims = tuple(claim for claim, _ in claims)
    return tuple(
        Candidate(
            Ref(f"hf://{claim.repo}", "hub", None, claim.repo, revision),
            Provenance(claim.source, False, all_claims),
        )
        for claim, revision in distinct.values()
    )


def named_by_adapter(config: Mapping[str, Any]) -> Candidate | None:
    """The base that an adapter's config names; None where it is no Hub id, or none."""
    repo = _repo_id(config.get("base_model_name_or_path"))
    if repo is None:
        return None
    claim = Claim("adapter_config.json", repo)
    ref = Ref(f"hf://{repo}", "hub", None, repo, _revision(config.get("revision")))
    return Candidate(ref, Provenance(claim.source, False, (claim,)))


def _revision(value: object) -> str | None:
    ok = isinstance(value, str) and _REVISION.fullmatch(value) and ".." not in value
    return str(value) if ok else None


def _claims(
    target: Source, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> tuple[list[tuple[Claim, str | None]], list[str]]:
    """(claim, revision) in order of trust, and what could not be read."""
    found: list[tuple[Claim, str | None]] = []
    problems: list[str] = []

    def add(source: str, value: object, revision: object = None) -> None:
        repo = _repo_id(value)
        if repo is None:
            if isinstance(value, str) and value:
                problems.append(f"{source} names {clean(value, 80)!r}, which is no Hub id")
            return
        found.append((Claim(source, repo), _revision(revision)))

    if "adapter_config.json" in target.files:
        data = target.read_small("adapter_config.json", _CONFIG_LIMIT)
        adapter = load_json(data, file="adapter_config.json")
        named = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else 0
        if not isinstance(adapter, dict) or not isinstance(named, (str, type(None))):
            raise FormatError(
                "does not name a base as adapter configs do",
                "adapter",
                file="adapter_config.json",
                field="base_model_name_or_path",
            )
        add("adapter_config.json", named, adapter.get("revision"))
    for repo, _ in getattr(target, "base_models", ()):
        add("Hub lineage", repo)
    for tag in getattr(target, "tags", ()):
        kind, _, rest = tag.partition(":")
        if kind == "base_model":
            add("Hub lineage", rest.rpartition(":")[2])
    if "README.md" in target.files:
        try:
            card = front_matter(target.read_small("README.md", _README_LIMIT), file="README.md")
        except ProjauditError as error:
            if not isinstance(error, FormatError) and error.family != "limit":
                raise
            problems.append(str(error))
        else:
            claimed = card.get("base_model")
            for value in claimed if isinstance(claimed, list) else [claimed]:
                add("model card", value)
    if config is not None and not found:
        add("config.json", config.get("_name_or_path"))
    if not found:
        for key in sorted(filter(_GGUF_BASE.fullmatch, metadata)):
            add("GGUF header", metadata[key])
    unique = dict.fromkeys(found)
    return list(unique), problems


def _repo_id(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    repo = _URL.sub("", value.strip()).removesuffix("/")
    return repo if _REPO.fullmatch(repo) and ".." not in repo else None


def lineage(
    source: Source, open_source: Callable[[Ref], Source]
) -> tuple[tuple[Source, ...], bool]:
    """(source, its base, the base's base, … up to 8), and whether the chain turns in a circle.

    Only the Hub tells a lineage; an ancestor that cannot be opened ends the chain.
    """
    chain = [source]
    seen = _names(source)
    while len(chain) < MAX_DEPTH:
        parents = [repo for repo, _ in getattr(chain[-1], "base_models", ())]
        parent = _repo_id(parents[0]) if len(parents) == 1 else None
        if parent is None:
            break
        if parent.lower() in seen:
            return tuple(chain), True
        try:
            ancestor = open_source(Ref(f"hf://{parent}", "hub", None, parent, None))
        except ProjauditError:
            break
        if seen & _names(ancestor):
            return tuple(chain), True
        seen |= _names(ancestor)
        chain.append(ancestor)
    return tuple(chain), False


def _names(source: Source) -> set[str]:
    """What a source is called, in lower case: as asked for, and as the Hub answered."""
    return {source.name.lower(), getattr(source, "id", source.name).lower()}
