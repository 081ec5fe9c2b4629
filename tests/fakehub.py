"""A Hub on this machine for tests: its API, its file storage and a foreign server, over HTTP.

    with FakeHub(tmp_path) as hub:
        sha = hub.add("org/model", {"config.json": b"{}", "model.safetensors": path_on_disk})
        hub.faults.append(on("cdn", status=503, times=1))
        subprocess.run([..., "org/model"], env=hub.env())
        assert hub.wire("cdn") < 100_000

Three origins, because what a client may send depends on the origin: `hub` (API and `resolve`),
`cdn` (signed links to large files) and `evil` (a server that nothing should send a token to).
Only the standard library; files on disk are served from there and never loaded as a whole.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

CHUNK = 1 << 18
GARBLED = bytes(byte ^ 0x55 for byte in range(256))
DATASETS = "datasets/"
"""In front of the names of repositories that hold a dataset."""
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".parquet")

Fault = Callable[[str, str, str, Mapping[str, str]], dict[str, Any] | None]
"""`fault(origin, method, path, headers)`: what to do to this answer, or None.

Keys of the answer: `status`, `headers` (added; None removes), `body` (bytes), `ignore_range` (200
and the whole file), `truncate` (so many body bytes, with a matching Content-Length), `drop_after`
(so many body bytes, then the connection is cut), `stall_after` (so many, then silence until the
server stops), `delay` (seconds of silence before the answer), `content_range` (that header),
`garble` (same length, wrong bytes), `gzip` (the body compressed, although not asked for),
`extra` (so many bytes too many, with a matching Content-Length).
"""


@dataclass
class Logged:
    """One request as it arrived, and how many body bytes were sent for it."""

    origin: str
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    bytes: int = 0

    @property
    def auth(self) -> str | None:
        """The Authorization header."""
        return self.headers.get("authorization")

    @property
    def range(self) -> str | None:
        """The Range header."""
        return self.headers.get("range")


@dataclass(frozen=True)
class Blob:
    """One file of a commit: its content and the digests that a Hub keeps of it."""

    content: bytes | Path
    size: int
    oid: str
    """Git blob id; for an LFS file, of its pointer."""
    sha256: str | None
    """Set for LFS files only."""

    @property
    def etag(self) -> str:
        """What `resolve` says of it."""
        return self.sha256 or self.oid

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of a range, in pieces."""
        if isinstance(self.content, bytes):
            yield self.content[start:stop]
            return
        with self.content.open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(CHUNK, stop - start))
                if not piece:
                    return
                start += len(piece)
                yield piece


@dataclass
class Repo:
    """One repository: its commits, and what the API says of it."""

    name: str
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    base_models: Any = None
    tags: list[str] = field(default_factory=list)
    gated: str | bool = False
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)


def on(
    origin: str | None = None,
    *,
    method: str | None = None,
    match: str = "",
    times: int | None = None,
    skip: int = 0,
    **fault: Any,
) -> Fault:
    """A fault for the requests of an origin, a method and a regular expression on the path.

    The first `skip` of them are spared, then `times` of them (None: all) are hit.
    """
    seen = 0
    lock = threading.Lock()

    def apply(where: str, verb: str, path: str, _: Mapping[str, str]) -> dict[str, Any] | None:
        nonlocal seen
        fits = origin in (None, where) and method in (None, verb) and re.search(match, path)
        if not fits:
            return None
        with lock:
            seen += 1
            hit = seen > skip and (times is None or seen <= skip + times)
        return dict(fault) if hit else None

    return apply


class FakeHub:
    """The three servers, their repositories, their log and their faults; a context manager."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """Folder below which `env()` puts HF_HOME and XDG_CACHE_HOME."""
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.blobs: dict[str, Blob] = {}
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.tokens: set[str] = set()
        """Tokens that the Hub accepts; another one is refused with 401."""
        self.granted: set[str] = set()
        """Gated repositories whose files an accepted token may read."""
        self.page_size = 1000
        self.stopping = threading.Event()
        self._signature = secrets.token_hex(8)
        self._servers: dict[str, _Server] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> FakeHub:
        for origin in ("hub", "cdn", "evil"):
            server = _Server(self, origin)
            self._servers[origin] = server
            thread = threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers.values():
            server.shutdown()
            server.cut_connections()
            server.server_close()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------------ addresses

    def address(self, origin: str) -> str:
        """`http://host:port` of one of `hub`, `cdn`, `evil`."""
        # By another name than the hub's, since some clients compare hosts without their ports.
        host = "127.0.0.1" if origin == "hub" else "localhost"
        return f"http://{host}:{self._servers[origin].server_address[1]}"

    @property
    def url(self) -> str:
        """The endpoint: what HF_ENDPOINT is set to."""
        return self.address("hub")

    @property
    def cdn_url(self) -> str:
        """Where large files lie."""
        return self.address("cdn")

    @property
    def evil_url(self) -> str:
        """A foreign server that answers everything with an empty list."""
        return self.address("evil")

    def env(self, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """The environment of a subprocess that is to talk to this Hub, and to nothing else."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PROJAUDIT_"))
            and not name.lower().endswith("_proxy")
        }
        kept |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.root / "hf-home"),
            "XDG_CACHE_HOME": str(self.root / "xdg-cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if token is not None:
            kept["HF_TOKEN"] = token
        if offline:
            kept["HF_HUB_OFFLINE"] = "1"
        return kept

    # ------------------------------------------------------------------ contents

    def add(
        self,
        name: str,
        files: Path | Mapping[str, bytes | Path],
        *,
        revision: str = "main",
        base_models: Sequence[str] | Any = (),
        relation: str = "finetune",
        tags: Sequence[str] = (),
        gated: str | bool = False,
        private: bool = False,
        card: Mapping[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> str:
        """The sha of a new commit of a repository, which a branch now points to: creates or pushes.

        `files` is a folder or a mapping from path to content or to a file on disk; it is the whole
        tree of the commit. Files with a suffix of weights are LFS files. A dataset's name starts
        with `datasets/`. `base_models` are
        repository ids (the API's own form is accepted too). `digests` gives SHA-256 of LFS files
        that are too large to be hashed here.
        """
        repo = self.repos.setdefault(name, Repo(name))
        if isinstance(files, Path):
            paths = (path for path in sorted(files.rglob("*")) if path.is_file())
            files = {path.relative_to(files).as_posix(): path for path in paths}
        tree = {
            path: self._blob(path, content, (digests or {}).get(path))
            for path, content in files.items()
        }
        seed = "\n".join(f"{path} {blob.etag}" for path, blob in sorted(tree.items()))
        sha = hashlib.sha1(f"{name}\n{len(repo.commits)}\n{seed}".encode()).hexdigest()
        repo.commits[sha] = tree
        repo.refs[revision] = sha
        if base_models:
            ids = all(isinstance(one, str) for one in base_models)
            models = (
                [
                    {"_id": hashlib.sha1(one.encode()).hexdigest()[:24], "id": one}
                    for one in base_models
                ]
                if ids
                else []
            )
            repo.base_models = {"relation": relation, "models": models} if ids else base_models
        repo.tags = list(tags) or repo.tags
        repo.gated, repo.private = gated, private
        repo.card = dict(card or {})
        return sha

    def rename(self, old: str, new: str) -> None:
        """Moves a repository; the old name redirects, as on the Hub."""
        self.repos[new] = self.repos.pop(old)
        self.repos[new].name = new
        self.renamed[old] = new

    def expire_links(self) -> None:
        """Makes every signed link handed out so far useless."""
        self._signature = secrets.token_hex(8)

    def _blob(self, path: str, content: bytes | Path, known: str | None) -> Blob:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        raw = Blob(content, size, "", None)
        if not path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha1(b"blob %d\0" % size)
            for piece in raw.read(0, size):
                oid.update(piece)
            return Blob(content, size, oid.hexdigest(), None)
        if known is None:
            sha256 = hashlib.sha256()
            for piece in raw.read(0, size):
                sha256.update(piece)
            known = sha256.hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{known}\nsize {size}\n"
        oid = hashlib.sha1(f"blob {len(pointer)}\0{pointer}".encode())
        blob = Blob(content, size, oid.hexdigest(), known)
        self.blobs[known] = blob
        return blob

    # ------------------------------------------------------------------ what happened

    def wire(self, origin: str | None = None, match: str = "") -> int:
        """Body bytes sent by an origin (None: all) for the paths that match."""
        return sum(one.bytes for one in self.requests(origin, match))

    def requests(self, origin: str | None = None, match: str = "") -> list[Logged]:
        """The requests to an origin (None: all) whose paths match a regular expression."""
        return [
            one for one in self.log if origin in (None, one.origin) and re.search(match, one.path)
        ]

    # ------------------------------------------------------------------ what is answered

    def answer(self, origin: str, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        """The sound answer to a request, before any fault."""
        url = urlsplit(target)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = parse_qs(url.query)
        if origin == "evil":
            return Answer.json([])
        if origin == "cdn":
            return self._stored(parts, query, headers)
        auth = headers.get("authorization")
        if auth is not None and auth.removeprefix("Bearer ") not in self.tokens:
            said = "Invalid credentials in Authorization header"
            return Answer(401, {"X-Error-Message": said}, b'{"error":"Invalid credentials"}')
        if parts[:2] == ["api", "whoami-v2"]:
            return Answer.json({"name": "tester", "type": "user"})
        if parts[:1] == ["api"] and parts[1] in ("models", "datasets") and len(parts) >= 4:
            return self._api(_name(parts[1:4]), parts[4:], url, headers)
        if parts[:2] == ["api", "resolve-cache"] and len(parts) > 6:
            return self._resolve(
                _name(parts[2:5]), parts[5], "/".join(parts[6:]), url, auth, "cache"
            )
        if parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            return self._resolve(_name(parts[:3]), parts[4], "/".join(parts[5:]), url, auth)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), url, auth)
        return Answer.error(404, "", "Not found")

    def _find(self, name: str, auth: str | None) -> Repo | Answer:
        repo = self.repos.get(name)
        if repo is None or (repo.private and auth is None):
            status = 404 if auth is not None else 401
            return Answer.error(status, "RepoNotFound", "Repository not found")
        return repo

    def _api(self, name: str, rest: list[str], url: Any, headers: Mapping[str, str]) -> Answer:
        if name in self.renamed:
            moved = url.path.replace(f"/{name}", f"/{self.renamed[name]}", 1)
            return Answer(307, {"Location": f"{moved}?{url.query}"}, b"")
        repo = self._find(name, headers.get("authorization"))
        if isinstance(repo, Answer):
            return repo
        kind = rest[0] if rest else "revision"
        if kind == "auth-check":
            refused = self._gate(repo, headers.get("authorization"))
            return refused or Answer(200, {}, b"OK")
        if kind == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
                for ref, sha in repo.refs.items()
            ]
            return Answer.json({"branches": branches, "converts": [], "tags": []})
        revision = rest[1] if len(rest) > 1 else "main"
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return Answer.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree = repo.commits[sha]
        if kind == "revision":
            return Answer.json(self._info(repo, sha, tree, parse_qs(url.query)))
        if kind == "tree":
            return self._tree(tree, "/".join(rest[2:]), url)
        if kind == "paths-info":
            form = parse_qsl(headers.get("x-body", ""))
            paths = [value for key, value in form if key == "paths"]
            return Answer.json([_entry(path, tree[path]) for path in paths if path in tree])
        if kind == "xet-read-token":
            told = {"X-Xet-Cas-Url": self.evil_url, "X-Xet-Access-Token": "cas"}
            return Answer(200, {**told, "X-Xet-Token-Expiration": "4102444800"}, b"{}")
        return Answer.error(404, "", "Not found")

    def _info(
        self, repo: Repo, sha: str, tree: Mapping[str, Blob], query: Mapping[str, list[str]]
    ) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(tree)]
        if "blobs" in query:
            for entry in siblings:
                blob = tree[entry["rfilename"]]
                entry |= {"size": blob.size, "blobId": blob.oid}
                if blob.sha256:
                    entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
        everything = {
            "sha": sha,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "tags": repo.tags,
            "siblings": siblings,
            "cardData": repo.card,
            "baseModels": repo.base_models,
            "createdAt": "2026-01-02T03:04:05.000Z",
            "downloads": 0,
        }
        shown = query.get("expand") or [name for name in everything if name != "baseModels"]
        return {
            "_id": "0" * 24,
            "id": repo.name.removeprefix(DATASETS),
            **{name: everything[name] for name in shown if everything.get(name) is not None},
        }

    def _tree(self, tree: Mapping[str, Blob], under: str, url: Any) -> Answer:
        query = dict(parse_qsl(url.query))
        prefix = f"{under}/" if under else ""
        recursive = query.get("recursive", "").lower() == "true"
        entries: list[dict[str, Any]] = []
        folders: set[str] = set()
        for path, blob in sorted(tree.items()):
            if not path.startswith(prefix):
                continue
            inside = path[len(prefix) :].split("/")[:-1]
            steps = range(1, len(inside) + 1) if recursive else range(1, min(2, len(inside) + 1))
            for step in steps:
                folder = prefix + "/".join(inside[:step])
                if folder not in folders:
                    folders.add(folder)
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    entries.append({"type": "directory", "path": folder, "size": 0, "oid": oid})
            if recursive or not inside:
                entries.append(_entry(path, blob))
        at = int(query.get("cursor", "0"))
        answer = Answer.json(entries[at : at + self.page_size])
        if at + self.page_size < len(entries):
            following = urlencode({**query, "cursor": str(at + self.page_size)})
            answer.headers["Link"] = f'<{self.url}{url.path}?{following}>; rel="next"'
        return answer

    def _gate(self, repo: Repo, auth: str | None) -> Answer | None:
        """The refusal of who may not read a gated repository."""
        if not repo.gated or (auth is not None and repo.name in self.granted):
            return None
        said = f"Access to model {repo.name} is restricted."
        return Answer.error(401 if auth is None else 403, "GatedRepo", said)

    def _resolve(
        self, name: str, revision: str, path: str, url: Any, auth: str | None, kind: str = ""
    ) -> Answer:
        if name in self.renamed:
            return Answer(
                307, {"Location": f"/{self.renamed[name]}{url.path[len(name) + 1 :]}"}, b""
            )
        repo = self._find(name, auth)
        if isinstance(repo, Answer):
            return repo
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return Answer.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        told = {"X-Repo-Commit": sha}
        if refused := self._gate(repo, auth):
            refused.headers |= told
            return refused
        blob = repo.commits[sha].get(path)
        if blob is None:
            return Answer.error(404, "EntryNotFound", "Entry not found", told)
        told |= {"Accept-Ranges": "bytes"}
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        if blob.sha256:
            signed = urlencode({"Expires": "4102444800", "Signature": self._signature})
            location = f"{self.cdn_url}/{name}/{blob.sha256}?{signed}"
            return Answer(
                302, {**told, **linked, "ETag": f'"{blob.etag}"', "Location": location}, b""
            )
        if not kind:
            kind = name if name.startswith(DATASETS) else f"models/{name}"
            where = f"/api/resolve-cache/{kind}/{sha}/{quote(path)}"
            return Answer(307, {**told, **linked, "Location": where}, b"Temporary Redirect")
        return Answer(200, {**told, "ETag": f'"{blob.oid}"'}, blob)

    def _stored(
        self, parts: list[str], query: Mapping[str, list[str]], headers: Mapping[str, str]
    ) -> Answer:
        if "authorization" in headers:
            return Answer(400, {}, b"<Error>Only one auth mechanism allowed</Error>")
        if query.get("Signature") != [self._signature]:
            return Answer(403, {}, b"<Error>Request has expired</Error>")
        blob = self.blobs.get(parts[-1])
        if blob is None:
            return Answer(404, {}, b"<Error>NoSuchKey</Error>")
        etag = hashlib.md5(parts[-1].encode()).hexdigest()
        return Answer(200, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, blob)


@dataclass
class Answer:
    """Status, headers and body; a blob as body may be asked for in ranges."""

    status: int
    headers: dict[str, str]
    body: bytes | Blob

    @staticmethod
    def json(value: Any) -> Answer:
        """An answer of 200 with JSON."""
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    @staticmethod
    def error(
        status: int, code: str, message: str, extra: Mapping[str, str] | None = None
    ) -> Answer:
        """An error as the Hub tells it."""
        headers = {"Content-Type": "application/json", "X-Error-Message": message, **(extra or {})}
        if code:
            headers["X-Error-Code"] = code
        return Answer(status, headers, json.dumps({"error": message}).encode())


def _name(parts: Sequence[str]) -> str:
    """The key of a repository that is addressed by `models|datasets`, owner and name."""
    kind, owner, name = parts
    return f"{DATASETS if kind == 'datasets' else ''}{owner}/{name}"


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, hub: FakeHub, origin: str) -> None:
        self.hub = hub
        self.origin = origin
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)

    def cut_connections(self) -> None:
        # Kept-alive connections would keep their threads, and server_close() waits for those.
        with self._lock:
            for connection in self._open:
                _cut(connection)

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up early is part of what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.opened(self.connection)

    def finish(self) -> None:
        self.server.closed(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Requests are logged in `FakeHub.log`."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, origin = self.server.hub, self.server.origin
        headers = {name.lower(): value for name, value in self.headers.items()}
        logged = Logged(origin, self.command, self.path, headers)
        hub.log.append(logged)
        body = self.rfile.read(int(headers.get("content-length", "0")))
        if body:
            headers = {**headers, "x-body": body.decode()}
        fault: dict[str, Any] = {}
        for one in list(hub.faults):
            fault |= one(origin, self.command, self.path, headers) or {}
        if "delay" in fault and hub.stopping.wait(fault["delay"]):
            return
        self._send(hub.answer(origin, self.command, self.path, headers), headers, fault, logged)

    def _send(
        self, answer: Answer, headers: Mapping[str, str], fault: dict[str, Any], logged: Logged
    ) -> None:
        answer.headers.setdefault("Content-Type", "application/octet-stream")
        if "status" in fault:
            answer = Answer(fault["status"], {}, b"")
        if "body" in fault:
            answer.body = fault["body"]
        start, stop = 0, answer.body.size if isinstance(answer.body, Blob) else len(answer.body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if (
            asked
            and answer.status == 200
            and isinstance(answer.body, Blob)
            and not fault.get("ignore_range")
        ):
            size = stop
            start, stop = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
            if start >= size:
                answer = Answer(416, {"Content-Range": f"bytes */{size}"}, b"")
                start = stop = 0
            else:
                answer.status = 206
                answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        pieces: Iterator[bytes]
        if isinstance(answer.body, Blob):
            pieces = answer.body.read(start, stop)
        else:
            pieces = iter([answer.body[start:stop]])
        length = stop - start
        if "content_range" in fault and "Content-Range" in answer.headers:
            answer.headers["Content-Range"] = fault["content_range"]
        if fault.get("gzip"):
            packed = gzip.compress(b"".join(pieces))
            pieces, length = iter([packed]), len(packed)
            answer.headers["Content-Encoding"] = "gzip"
        if "extra" in fault:
            pieces, length = _and_more(pieces, fault["extra"]), length + fault["extra"]
        if fault.get("garble"):
            pieces = (piece.translate(GARBLED) for piece in pieces)
        length = min(length, fault.get("truncate", length))
        for name, value in fault.get("headers", {}).items():
            answer.headers.pop(name, None)
            if value is not None:
                answer.headers[name] = value
        logged.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in fault.get("headers", {}):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(pieces, length, fault, logged)

    def _send_body(
        self, pieces: Iterator[bytes], length: int, fault: dict[str, Any], logged: Logged
    ) -> None:
        limit = min(length, fault.get("drop_after", length), fault.get("stall_after", length))
        for piece in pieces:
            part = piece[: limit - logged.bytes]
            logged.bytes += len(part)  # first, as a client that has it all may ask for the count
            try:
                self.wfile.write(part)
            except OSError:
                logged.bytes -= len(part)
                self.close_connection = True
                return
            if logged.bytes >= limit:
                break
        if "stall_after" in fault:
            self.server.hub.stopping.wait()
        if "drop_after" in fault or "stall_after" in fault:
            _cut(self.connection)
            self.close_connection = True


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def _and_more(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    yield from pieces
    yield b"\0" * count
