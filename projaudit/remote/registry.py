"""Models of an MLflow tracking server: where one lies, and its files, by ranges where possible."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from projaudit.errors import (
    AuthError,
    FormatError,
    IntegrityError,
    LimitError,
    NetworkError,
    NotFoundError,
    ProjauditError,
    UsageError,
)
from projaudit.hub.guard import Limits
from projaudit.hub.ranges import Span
from projaudit.inert import clean
from projaudit.refs import Ref, is_sound_path, parse_ref
from projaudit.remote.buckets import missing
from projaudit.remote.source import RemoteSource, temporary_folder
from projaudit.source import (
    MAX_FILES,
    LocalSource,
    RepoFile,
    Source,
    Traffic,
    open_local,
    refuse_lfs_pointer,
    too_long,
)
from projaudit.strict import load_yaml

_MODEL = re.compile(r"models:/([^/@:]+)(?:@([^/@:]+))?(?:/([^:@]+))?")
_RUN = re.compile(r"runs:/([A-Za-z0-9_-]+)/([^:]+)")
_MLMODEL = "MLmodel"
_MLMODEL_LIMIT = 1 << 20
_DEEPEST = 16


def open_model(
    ref: Ref,
    opened: Callable[[Ref], RemoteSource],
    limits: Limits,
    notify: Callable[[str], None],
) -> Source:
    """The source of a `models:/` or `runs:/` reference, at the folder that holds its checkpoint.

    Artifacts in S3, in Google's storage and in folders are read by ranges; all others are fetched
    file by file through mlflow, whole, within `Limits.whole_files`. An alias is resolved first. In
    a model of mlflow's own format the checkpoint is the folder that its `MLmodel` file names.
    Raises UsageError (`usage.extra`, `usage.reference`), NotFoundError, AuthError, NetworkError,
    FormatError, and what reading raises.
    """
    try:
        import mlflow
    except ImportError:
        raise missing("mlflow", "mlflow", ref) from None
    if not mlflow.is_tracking_uri_set() and not any(map(os.path.exists, ("mlruns", "mlflow.db"))):
        raise UsageError(
            "no MLflow tracking server is named", "reference", file=ref.text,
            remedy="set MLFLOW_TRACKING_URI",
        )  # fmt: skip
    name, location = _asked(ref, lambda: _located(ref, mlflow.MlflowClient()))
    source = _open(ref, name, location, opened, limits, notify)
    folder = _checkpoint_folder(source)
    if folder is None:
        return source
    return _open(ref, name, f"{location.rstrip('/')}/{folder}", opened, limits, notify)


def _located(ref: Ref, client: Any) -> tuple[str, str]:
    """(name with the version that it is now, artifact location) of a reference."""
    assert ref.uri is not None
    run = _RUN.fullmatch(ref.uri)
    if run is not None:
        return ref.uri, _of_run(ref, client, run[1], run[2])
    model = _MODEL.fullmatch(ref.uri)
    assert model is not None
    name, alias, rest = model[1], model[2], model[3] or ""
    if alias is None and not rest:
        if not name.startswith("m-"):
            raise UsageError(
                "names no version", "reference", file=ref.text, remedy=f"write {ref.text}/1"
            )
        return ref.uri, str(client.get_logged_model(name).artifact_location)
    if alias is None:
        version, _, path = rest.partition("/")
    else:
        version, path = str(client.get_model_version_by_alias(name, alias).version), rest
    if not version.isdecimal():
        raise UsageError(
            f"{clean(version, 40)!r} is no version", "reference", file=ref.text,
            remedy=f"write models:/{name}/1, or models:/{name}@alias",
        )  # fmt: skip
    location = str(client.get_model_version_download_uri(name, version))
    if location.startswith("models:/"):
        location = str(client.get_logged_model(location.removeprefix("models:/")).artifact_location)
    elif (run := _RUN.fullmatch(location)) is not None:
        location = _of_run(ref, client, run[1], run[2])
    inside = f"/{path}" if path else ""
    return f"models:/{name}/{version}{inside}", f"{location.rstrip('/')}{inside}"


def _of_run(ref: Ref, client: Any, run_id: str, path: str) -> str:
    """Where a path of a run lies: among its artifacts, or as a model that it logged so named."""
    run = client.get_run(run_id)
    first, _, rest = path.partition("/")
    for output in getattr(getattr(run, "outputs", None), "model_outputs", None) or ():
        model = client.get_logged_model(output.model_id)
        if model.name == first:
            return "/".join(part for part in (str(model.artifact_location), rest) if part)
    return f"{str(run.info.artifact_uri).rstrip('/')}/{path}"


def _open(
    ref: Ref,
    name: str,
    location: str,
    opened: Callable[[Ref], RemoteSource],
    limits: Limits,
    notify: Callable[[str], None],
) -> Source:
    scheme = urlsplit(location).scheme
    if scheme in ("s3", "gs"):
        try:
            parsed = parse_ref(location)
        except UsageError:
            raise _odd_place(ref, location) from None
        source = opened(Ref(ref.text, "mlflow", uri=parsed.uri))
        source.ref, source.id = ref, name
        return source
    if scheme in ("file", ""):
        path = Path(unquote(urlsplit(location).path) if scheme else location)
        if not path.exists():
            raise NotFoundError(
                "its artifacts lie in a folder that is not on this machine",
                "path",
                file=ref.text,
                remedy="ask where the tracking server runs, or let it serve artifacts",
            )
        there = open_local(Ref(ref.text, "mlflow", path=path, uri=ref.uri))
        return ModelFolder(there.ref, there.root, there.files, there._states, id=name)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]{1,30}", scheme):
        raise _odd_place(ref, location)
    return DownloadedModel(ref, name, location, limits, notify)


def _odd_place(ref: Ref, location: str) -> NetworkError:
    return NetworkError(
        f"the registry says that it lies at {clean(location, 80)!r}", "answer", file=ref.text
    )


def _checkpoint_folder(source: Source) -> str | None:
    """The folder of the checkpoint in a model of mlflow's format; None where it is at the top."""
    if _MLMODEL not in source.files or "config.json" in source.files:
        return None
    said = load_yaml(source.read_small(_MLMODEL, _MLMODEL_LIMIT), file=_MLMODEL)
    flavors = said.get("flavors") if isinstance(said, dict) else None
    flavor = flavors.get("transformers") if isinstance(flavors, dict) else None
    folder = flavor.get("model_binary") if isinstance(flavor, dict) else None
    if folder is None:
        return None
    if not isinstance(folder, str) or not is_sound_path(folder):
        raise FormatError(
            "names no folder", "config", file=_MLMODEL, field="flavors.transformers.model_binary"
        )
    return folder


@dataclass(frozen=True)
class ModelFolder(LocalSource):
    """A model of a registry whose artifacts lie in a folder of this machine (a `Source`)."""

    id: str = ""
    """Its name, with the version that an alias was resolved to."""


class DownloadedModel:
    """A model whose files only mlflow can fetch: each whole, when it is first read (a `Source`)."""

    def __init__(
        self, ref: Ref, name: str, location: str, limits: Limits, notify: Callable[[str], None]
    ) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self.ref = ref
        self.name = ref.text
        self.id = name
        self.commit: str | None = None
        self.traffic = Traffic()
        self.verified: dict[str, str] = {}
        """"range" for each file that was read: its length; the bytes only by transport."""
        self.fallbacks: list[str] = []
        """Files that were fetched whole."""
        self._repository = _asked(ref, lambda: get_artifact_repository(location))
        self._left = limits.whole_files
        self._notify = notify
        self._copies: dict[str, Path] = {}
        self._folder: Path | None = None
        self.files: Mapping[str, RepoFile] = dict(sorted(self._listed().items()))
        if not self.files:
            raise NotFoundError("no such artifacts", "path", file=ref.text)

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop` (end exclusive) of a file; raises as `whole`."""
        return self.read_spans(path, [(start, stop)])[0]

    def read_spans(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of each span (start, stop), in the order asked for; raises as `whole`."""
        copy = self.whole(path)
        return open_local(Ref(path, "local", path=copy)).read_spans(copy.name, spans)

    def read_small(self, path: str, limit: int) -> bytes:
        """The whole of a small file; LimitError above `limit` bytes, or raises as `whole`."""
        size = self._file(path).size
        if size > limit:
            raise too_long(clean(f"{self.name}/{path}"), size, limit)
        data = self.read(path, 0, size)
        refuse_lfs_pointer(data, path)
        return data

    def at_hand(self, path: str) -> bool:
        """Whether the file was fetched already."""
        return path in self._copies

    def whole(self, path: str) -> Path:
        """A copy of the file on this machine, fetched if need be; gone with this object.

        Raises NotFoundError (`not-found.file`), LimitError (`limit.bytes`), IntegrityError
        (`integrity.size`), AuthError and NetworkError.
        """
        file, about = self._file(path), clean(f"{self.name}/{path}")
        if path not in self._copies:
            if file.size > self._left:
                raise LimitError(
                    f"mlflow fetches it whole; {file.size} bytes to read, {self._left} left of "
                    "the budget for whole files",
                    "bytes",
                    file=about,
                    remedy="download the model and audit the folder",
                )
            self._left -= file.size
            self._notify(f"{about}: fetched whole through mlflow ({file.size} bytes)")
            if self._folder is None:
                self._folder = temporary_folder(self)
            into = self._folder / str(len(self._copies))
            into.mkdir()
            got = Path(_asked(self.ref, lambda: self._repository.download_artifacts(path, into)))
            self.traffic.requests += 1
            if not got.is_file() or not got.resolve().is_relative_to(into.resolve()):
                raise IntegrityError("mlflow gave something else", "path", file=about)
            self.traffic.bytes += got.stat().st_size
            if got.stat().st_size != file.size:
                raise IntegrityError(
                    f"{got.stat().st_size} bytes, listed with {file.size}", "size", file=about
                )
            self._copies[path] = got
            self.fallbacks.append(path)
            self.verified[path] = "range"
        return self._copies[path]

    def _file(self, path: str) -> RepoFile:
        if path not in self.files:
            raise NotFoundError("no such file", "file", file=clean(f"{self.name}/{path}"))
        return self.files[path]

    def _listed(self) -> dict[str, RepoFile]:
        files: dict[str, RepoFile] = {}
        folders = [""]
        seen = 0
        while folders:
            folder = folders.pop()
            self.traffic.requests += 1
            ask = partial(self._repository.list_artifacts, folder or None)
            for entry in _asked(self.ref, ask):
                seen += 1
                path, about = str(entry.path), clean(f"{self.name}/{entry.path}")
                inside = path.startswith(f"{folder}/") if folder else True
                if not is_sound_path(path) or not inside or path.count("/") > _DEEPEST:
                    raise IntegrityError("a name that no file can have", "path", file=about)
                if seen > MAX_FILES:
                    raise LimitError(f"more than {MAX_FILES} files", "files", file=self.ref.text)
                if entry.is_dir:
                    folders.append(path)
                    continue
                if not isinstance(entry.file_size, int) or not 0 <= entry.file_size < 1 << 63:
                    raise IntegrityError("listed without a size", "size", file=about)
                if path in files:
                    raise IntegrityError("listed twice", "listing", file=about)
                files[path] = RepoFile(path, entry.file_size)
        return files


def _asked(ref: Ref, ask: Callable[[], Any]) -> Any:
    """What a call of mlflow gives; what it raises, as an error of ours that quotes no server."""
    try:
        return ask()
    except ProjauditError:
        raise
    except Exception as error:
        code = clean(getattr(error, "error_code", type(error).__name__), 40)
        status = _status(error)
        if code == "RESOURCE_DOES_NOT_EXIST" or status == 404 or isinstance(error, OSError):
            raise NotFoundError(f"no such model or file ({code})", "path", file=ref.text) from None
        if status in (401, 403):
            raise AuthError(
                f"the tracking server refuses access ({status})",
                "refused",
                file=ref.text,
                remedy="check MLFLOW_TRACKING_USERNAME or MLFLOW_TRACKING_TOKEN",
            ) from None
        raise NetworkError(
            f"the tracking server gave no sound answer ({code})",
            "connection",
            file=ref.text,
            remedy="check MLFLOW_TRACKING_URI and that it is reachable",
        ) from None


def _status(error: Exception) -> int | None:
    """The HTTP status behind an exception, where one is told."""
    cause: BaseException | None = error
    for _ in range(4):
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
        cause = getattr(cause, "__cause__", None) or getattr(cause, "__context__", None)
    told = getattr(error, "get_http_status_code", lambda: None)()
    return told if isinstance(told, int) and told != 500 else None
