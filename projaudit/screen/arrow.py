"""Rows that the library `datasets` reads: folders that it saved, and datasets on a Hub."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from projaudit.errors import FormatError, UnsupportedError, UsageError
from projaudit.inert import clean

SPLIT = "train"
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Arrow:
    """A `datasets.Dataset`, whose features are not decoded: an image stays bytes and a path."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")
        self.digest = f"datasets:{dataset._fingerprint}"
        """The library's own fingerprint of the rows."""

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> object:
        return self._dataset[number].to_pylist()[0]

    def take(self, numbers: Sequence[int]) -> Any:
        """A `datasets.Dataset` of those rows, in their order."""
        return self._dataset.with_format(None).select(numbers)


def saved(path: Path, text: str) -> Arrow:
    """What `save_to_disk` wrote. Raises FormatError (`format.dataset`), UsageError, as below."""
    datasets = _library()
    try:
        with _alone(datasets, offline=True):
            found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken folder makes it raise
        raise _not_loaded(error, text) from None
    return Arrow(_one_split(found, text))


def published(repo: str, revision: str | None, *, offline: bool) -> tuple[str, Arrow, Path]:
    """Of a dataset on a Hub `org/name@commit`, the rows of its train split, and its cached files.

    Of the cache alone where `offline`: then a branch's last commit is what the cache holds. Raises
    FormatError (`format.dataset`), UnsupportedError (`unsupported.extra`), UsageError
    (`usage.dataset`) where there is no train split, and what the Hub raises.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import repo_folder_name

    from projaudit.hub import guarded_client
    from projaudit.hub.failures import not_cached, refusal

    datasets = _library()
    name = repo if revision is None else f"{repo}@{revision}"
    offline = offline or constants.is_offline_mode()
    asked, info = revision, None
    with guarded_client(), _alone(datasets, offline=offline):
        try:
            if not offline:
                info = HfApi().dataset_info(repo, revision=revision)
                asked, name = info.sha, f"{repo}@{info.sha}"
                if info.gated:
                    HfApi().auth_check(repo, repo_type="dataset")
            found = datasets.load_dataset(repo, revision=asked)
        except HfHubHTTPError as error:
            file = info is not None
            raise refusal(error.response, name, HfApi().endpoint, None, file=file) from None
        except Exception as error:  # whatever a repository or a broken line makes it raise
            if offline:
                raise not_cached(clean(name)) from None
            raise _not_loaded(error, name) from None
    dataset = _one_split(found, name)
    # Where the library cannot reach a Hub, it takes what it has, of whatever commit.
    commit = Path(dataset.cache_files[0]["filename"]).parent.name if dataset.cache_files else ""
    if asked is not None and asked != commit:
        held = f"the cache holds {commit}" if _COMMIT.fullmatch(commit) else "it is not there"
        raise not_cached(clean(name), f"`datasets` could not load this commit, and {held}")
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="dataset")
    return f"{repo}@{commit}", Arrow(dataset), folder


def _not_loaded(error: Exception, text: str) -> FormatError:
    says = f"`datasets` cannot load it: {clean(error, 200)}"
    return FormatError(says, "dataset", file=clean(text))


def _one_split(found: Any, text: str) -> Any:
    if not isinstance(found, dict):
        return found
    if SPLIT not in found and len(found) != 1:
        splits = ", ".join(clean(name, 40) for name in itertools.islice(found, 8))
        raise UsageError(f"has no split {SPLIT}, but {splits}", "dataset", file=clean(text))
    return found[SPLIT] if SPLIT in found else next(iter(found.values()))


@contextmanager
def _alone(datasets: Any, *, offline: bool) -> Iterator[None]:
    """A context in which the libraries say nothing on the terminal, and with `offline` ask nobody.

    Their switches are read once from the environment, and are global to the process.
    """
    from huggingface_hub import constants

    switches = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        for module, name in switches if offline else ():
            setattr(module, name, True)
        yield
    finally:
        logging.disable(quiet)
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            "`datasets` is not installed", "extra", remedy="pip install 'projaudit[screen]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets
