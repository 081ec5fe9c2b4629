"""What the Hub says of a repository: its commit, and the files at that commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from projaudit.errors import IntegrityError, LimitError, NetworkError, UsageError
from projaudit.hub.failures import nonsense
from projaudit.hub.guard import http, origin
from projaudit.hub.link import Link
from projaudit.inert import clean
from projaudit.refs import parse_hub_id
from projaudit.source import MAX_FILES, RepoFile

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Repo:
    """A repository at one commit, as the Hub or the caches describe it."""

    name: str
    """The id that was asked for."""
    id: str
    """The id that was answered with; another one after a rename."""
    commit: str
    files: Mapping[str, RepoFile]
    base_models: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    gated: str | bool = False
    private: bool = False
    complete: bool = True

    def about(self, path: str) -> str:
        """A file of the repository, as errors name it."""
        return clean(f"{self.name}/{path}")


def shown(name: str, revision: str | None) -> str:
    """A repository at a revision, as errors name it."""
    return name if revision is None else f"{name}@{clean(revision, 80)}"


def resolve(name: str, revision: str | None, link: Link) -> Repo:
    """The repository at the commit that the revision is now.

    Raises what `Link.exchange` does, NetworkError (`network.answer`), IntegrityError for what
    contradicts itself, and LimitError (`limit.files`).
    """
    url = f"{link.endpoint}/api/models/{name}"
    if revision is not None:
        url += f"/revision/{quote(revision, safe='')}"
    # Without cardData: one odd key in a README must not hide the rest.
    wanted = ("sha", "baseModels", "tags", "gated", "private")
    about = shown(name, revision)
    info, _ = link.json(f"{url}?{urlencode([('expand', one) for one in wanted])}", about)
    if not isinstance(info, dict) or not isinstance(info.get("id"), str):
        raise nonsense(about, "it names no repository")
    try:
        identity, _ = parse_hub_id(info["id"])
    except UsageError:
        raise nonsense(about, f"repository id {clean(info['id'], 80)!r}") from None
    commit = info.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise IntegrityError(f"the Hub says commit {clean(commit, 80)!r}", "commit", file=about)
    if revision is not None and COMMIT.fullmatch(revision) and commit != revision:
        raise IntegrityError(f"the Hub answers for commit {commit}", "commit", file=about)
    gated, tags = info.get("gated"), info.get("tags")
    return Repo(
        name,
        identity,
        commit,
        _files(identity, commit, link),
        _lineage(info.get("baseModels")),
        tuple(tag[:200] for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else (),
        gated[:20] if isinstance(gated, str) else bool(gated),
        bool(info.get("private")),
    )


def _files(name: str, commit: str, link: Link) -> dict[str, RepoFile]:
    first = f"{link.endpoint}/api/models/{name}/tree/{commit}?recursive=true&expand=false"
    files: dict[str, RepoFile] = {}
    url: str | None = first
    seen: set[str] = set()
    while url is not None:
        if url in seen:
            raise nonsense(name, "pages of the listing in a circle")
        seen.add(url)
        page, following = link.json(url, name)
        if not isinstance(page, list):
            raise nonsense(name, "no list of files")
        for entry in page:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise nonsense(name, "an entry without a path")
            if entry.get("type") == "file":
                file = _file(entry, clean(f"{name}/{entry['path']}"))
                if files.setdefault(file.path, file) is not file:
                    raise IntegrityError(
                        "listed twice", "listing", file=clean(f"{name}/{file.path}")
                    )
        if len(files) > MAX_FILES or len(seen) > MAX_FILES // 50:
            raise LimitError(f"more than {MAX_FILES} files", "files", file=name)
        url = None if following is None else _next_page(first, following, name)
    return dict(sorted(files.items()))


def _next_page(first: str, following: str, name: str) -> str:
    library = http()
    here = library.URL(first)
    try:
        target = here.join(following)
    except library.InvalidURL:
        raise nonsense(name, "a next page that is no URL") from None
    if origin(target) != origin(here):
        raise NetworkError(
            f"the listing goes on at a foreign server, {clean(target.host, 80)}",
            "answer",
            file=name,
            remedy="check HF_ENDPOINT",
        )
    return str(target)


def _file(entry: Mapping[str, Any], about: str) -> RepoFile:
    path, size, oid, lfs = (entry.get(key) for key in ("path", "size", "oid", "lfs"))
    assert isinstance(path, str)
    parts = path.split("/")
    if len(path) > 4096 or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise IntegrityError("a path that no repository can hold", "path", file=about)
    sha256 = None
    if lfs is not None:
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
        if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise IntegrityError("listed without a proper LFS object id", "etag", file=about)
        if lfs.get("size", size) != size:
            raise IntegrityError("listed with two sizes", "size", file=about)
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise IntegrityError(f"listed with size {clean(size, 40)}", "size", file=about)
    if oid is not None and (not isinstance(oid, str) or not ETAG.fullmatch(oid)):
        raise IntegrityError("listed with an improper object id", "etag", file=about)
    return RepoFile(path, size, sha256, oid)


def _lineage(value: Any) -> tuple[tuple[str, str], ...]:
    """(repository, relation) of the Hub's `baseModels`; what is not of its form is left out."""
    found: list[tuple[str, str]] = []
    for group in value if isinstance(value, list) else [value]:
        if not isinstance(group, dict) or not isinstance(group.get("models"), list):
            continue
        relation = group.get("relation")
        said = relation[:40] if isinstance(relation, str) else ""
        for model in group["models"][:32]:
            if isinstance(model, dict) and isinstance(model.get("id"), str):
                found.append((model["id"][:200], said))
    return tuple(found)
