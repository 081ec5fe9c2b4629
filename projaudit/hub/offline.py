"""What a repository was when it was last seen, for when the Hub may not be asked."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from projaudit.hub.cache import Cache
from projaudit.hub.failures import not_cached
from projaudit.hub.listing import COMMIT, SHA256, Repo, shown
from projaudit.source import RepoFile


def remember(repo: Repo, revision: str | None, endpoint: str, cache: Cache) -> None:
    """Keeps what offline mode needs and the standard cache does not hold."""
    listing = {
        "id": repo.id,
        "base_models": repo.base_models,
        "tags": repo.tags,
        "gated": repo.gated,
        "private": repo.private,
        "files": [[file.path, file.size, file.sha256, file.oid] for file in repo.files.values()],
    }
    cache.keep_record(listing, "commit", endpoint, repo.name, repo.commit)
    asked = {"commit": repo.commit, "when": time.time()}
    cache.keep_record(asked, "revision", endpoint, repo.name, revision or "main")


def recall(name: str, revision: str | None, endpoint: str, cache: Cache) -> Repo:
    """The repository as the caches know it: ours, then the standard one's snapshot.

    Raises OfflineError (`offline.not-cached`).
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    about = shown(name, revision)
    standard = repo_folder_name(repo_id=name, repo_type="model")
    folder = Path(constants.HF_HUB_CACHE) / standard
    if revision is not None and COMMIT.fullmatch(revision):
        commit = revision
    else:
        # Two caches may know the branch; the later knowledge is what a loader would use.
        known: list[tuple[float, str]] = []
        asked = cache.record("revision", endpoint, name, revision or "main") or {}
        if isinstance(asked.get("when"), int | float):
            known.append((float(asked["when"]), str(asked.get("commit"))))
        with suppress(OSError, ValueError):
            path = folder / "refs" / (revision or "main")
            known.append((path.stat().st_mtime, path.read_text().strip()))
        known = [one for one in known if COMMIT.fullmatch(one[1])]
        if not known:
            raise not_cached(about, "offline, and no cache knows which commit this is")
        commit = max(known)[1]
    held = cache.record("commit", endpoint, name, commit) or {}
    with suppress(KeyError, TypeError, ValueError):
        return Repo(
            name,
            str(held["id"]),
            commit,
            {
                str(path): RepoFile(path, int(size), sha, oid)
                for path, size, sha, oid in held["files"]
            },
            tuple((str(base), str(relation)) for base, relation in held["base_models"]),
            tuple(map(str, held["tags"])),
            held["gated"],
            bool(held["private"]),
        )
    files = _snapshot_files(folder / "snapshots" / commit)
    if not files:
        raise not_cached(about, f"offline, and commit {commit} is in no cache")
    return Repo(name, name, commit, files, complete=False)


def _snapshot_files(folder: Path) -> dict[str, RepoFile]:
    """The files of a snapshot in the standard cache, with the digests that its blob names are."""
    files: dict[str, RepoFile] = {}
    for path in sorted(folder.rglob("*")):
        try:
            size = path.stat().st_size
            blob = path.readlink().name if path.is_symlink() else ""
        except OSError:
            continue
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            sha256 = blob if SHA256.fullmatch(blob) else None
            files[name] = RepoFile(name, size, sha256, blob if COMMIT.fullmatch(blob) else None)
    return files
