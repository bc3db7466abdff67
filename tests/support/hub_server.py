"""A model hub on loopback: the few endpoints that requant and huggingface_hub's client use."""

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_BLOCK_BYTES = 64 << 10


# Downloads into the cache, and those that are deleted one by one.
either_way = pytest.mark.parametrize(
    "option", [(), ("--consume-source",)], ids=["cache", "consumed"]
)


@dataclass
class Hub:
    """What it holds, and what it was asked.

    Attributes:
        repositories: Id -> relative path -> content.
        gated: Ids whose files need a token.
        log: Method, path and range of every request.
        sent: Bytes of files that went out.
        objects: LFS objects that came in, by hash.
        commits: Id -> lines of the commit that was made.
        targets: Id -> branch that the commit was made to, and whether as a pull request.
        branches: Id -> branch -> relative path -> content.
        heads: Id -> commit, where it is not the usual one.
        gates: File -> byte of it from which on it is sent, and what must be true before; a test
            that is over, or a minute, open all.
        served: Files that are sent instead of those that are listed.
        public: Ids of repositories that anybody may read; the hub says so of each.
        readonly: Nothing may be written.
        down: Every connection is closed without an answer.
        tokens: Those that are known; empty takes any.
        cut_after: Files end after so many bytes, once; 0 lets all through.
        reject_objects: How many LFS objects are taken before the rest is rejected; -1 is all.
        latency_s: How long an answer takes to begin.
    """

    repositories: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    sent: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, list[Any]] = field(default_factory=dict)
    targets: dict[str, tuple[str, bool]] = field(default_factory=dict)
    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    gates: dict[str, tuple[int, Callable[[], bool]]] = field(default_factory=dict)
    served: dict[str, dict[str, bytes]] = field(default_factory=dict)
    public: set[str] = field(default_factory=set)
    readonly: bool = False
    down: bool = False
    busy: int = 0  # the code that every question is answered with
    tokens: tuple[str, ...] = ()
    storing: threading.Lock = field(default_factory=threading.Lock)
    late: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    cut_after: int = 0
    reject_objects: int = -1
    latency_s: float = 0.0
    url: str = ""

    @staticmethod
    def commit(name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def digest(self, content: bytes) -> str:
        """The hash of a file in LFS."""
        return hashlib.sha256(content).hexdigest()

    def blob(self, content: bytes) -> str:
        """Git's id of a file."""
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that were killed."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub until the block ends."""

    class Handler(_Handler):
        state = hub

    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object, code: int = 200) -> None:
        self.answer(code, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def noted(self) -> str:
        path = unquote(urlsplit(self.path).path)
        if path != "/api/agent-harnesses":  # the client's own affair
            self.state.log.append((self.command, path, self.headers.get("Range") or ""))
        return path

    # -- out -----------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.noted()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.state.down:
            self.close_connection = True
            return
        if token and self.state.tokens and token not in self.state.tokens:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            return
        time.sleep(self.state.latency_s)
        if self.state.busy:
            self.answer(self.state.busy, X_Error_Message="Not now")
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.about(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*found.groups())
        else:
            self.answer(404)

    def about(self, name: str, revision: str | None) -> None:
        files = self.state.repositories.get(name)
        branch = self.state.branches.get(name, {}).get(revision or "")
        if files is None:
            self.answer(401, X_Error_Code="RepoNotFound")
        elif branch is not None:
            siblings = [self.listed(file, x) for file, x in branch.items()]
            sha = Hub.commit(f"{name}@{revision}")
            self.json({"id": name, "sha": sha, "siblings": siblings, "private": True})
        elif revision not in (None, "main", "v1", Hub.commit(name), self.head(name)):
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            siblings = [self.listed(file, x) for file, x in files.items()]
            sha = self.head(name) if revision in (None, "main") else Hub.commit(name)
            private = name not in self.state.public
            self.json({"id": name, "sha": sha, "siblings": siblings, "private": private})

    def head(self, name: str) -> str:
        return self.state.heads.get(name) or Hub.commit(name)

    def listed(self, file: str, content: bytes) -> dict[str, Any]:
        blob = self.state.blob(content)
        found: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": blob}
        if file.endswith((".safetensors", ".bin", ".gguf")):
            digest = self.state.digest(content)
            found["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return found

    def file(self, name: str, revision: str, file: str) -> None:
        stored = self.state.served.get(name) or self.state.repositories.get(name, {})
        for branch, files in self.state.branches.get(name, {}).items():
            if revision == Hub.commit(f"{name}@{branch}"):
                stored = files
        content = stored.get(file)
        if name in self.state.gated and not self.headers.get("Authorization"):
            self.answer(403, X_Error_Code="GatedRepo")
        elif content is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.send_file(name, file, content)

    def send_file(self, name: str, file: str, content: bytes) -> None:
        tags = {
            "ETag": f'"{self.state.digest(content)}"',
            "X_Repo_Commit": Hub.commit(name),
            "Accept_Ranges": "bytes",
        }
        if self.command == "HEAD":
            self.answer(200, Content_Length=str(len(content)), **tags)
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(part[1]) if part else 0
        stop = int(part[2]) + 1 if part and part[2] else len(content)
        body = content[start:stop]
        if part:
            tags["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        cut, self.state.cut_after = self.state.cut_after, 0
        if cut and len(body) > cut:
            self.send_response(206 if part else 200)
            for key, value in (tags | {"Content_Length": str(len(body))}).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.state.sent += cut
            self.close_connection = True
            return
        self.state.cut_after = cut
        self.send_response(206 if part else 200)
        for key, value in (tags | {"Content_Length": str(len(body))}).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        for at in range(0, len(body), _BLOCK_BYTES):
            block = body[at : at + _BLOCK_BYTES]
            if self.state.down or not self.opened(file, start + at + len(block)):
                self.close_connection = True
                return
            self.wfile.write(block)
            self.state.sent += len(block)

    def opened(self, file: str, byte: int) -> bool:
        """Wait at a gate; false where the connection is to be cut."""
        first, opens = self.state.gates.get(file, (byte, bool))
        deadline = time.monotonic() + 60
        while byte > first and not opens():
            if self.state.over.is_set() or self.state.down or self.client_is_gone():
                return False
            if time.monotonic() > deadline:
                self.state.late.append(file)
                return True
            time.sleep(0.01)
        return True

    def client_is_gone(self) -> bool:
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    # -- in ------------------------------------------------------------------------------

    def do_POST(self) -> None:
        path, body = self.noted(), self.body()
        if self.state.down:
            self.close_connection = True
            return
        if self.state.readonly:
            self.answer(403, b'{"error": "You have no right to write here."}')
            return
        if not self.headers.get("Authorization"):
            self.answer(401, b'{"error": "Invalid username or password."}')
        elif path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            self.state.repositories.setdefault(name, {})
            self.json({"url": f"{self.state.url}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self.json({"warnings": [], "errors": []})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            self.json({"files": [self.mode(file) for file in asked]})
        elif path.endswith("/info/lfs/objects/batch"):
            self.json(
                {"transfer": "basic", "objects": [*map(self.place, json.loads(body)["objects"])]}
            )
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            name, branch = found.groups()
            files = self.state.repositories[name]
            self.state.branches.setdefault(name, {})[branch] = dict(files)
            self.json({})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.commit(*found.groups(), [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404)

    def commit(self, name: str, revision: str, lines: list[Any]) -> None:
        parent = lines[0]["value"].get("parentCommit")
        branch = self.state.branches.get(name, {}).get(revision)
        if revision != "main" and branch is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        # A branch that was made a moment ago is where the main one was.
        heads = (self.head(name), Hub.commit(f"{name}@{revision}"))
        if parent is not None and parent not in heads:
            self.answer(412, X_Error_Message="A commit has happened since")
            return
        as_pr = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
        self.state.commits[name] = lines
        self.state.targets[name] = revision, as_pr
        commit = Hub.commit(name)
        url = f"{self.state.url}/{name}/commit/{commit}"
        made = {"pullRequestUrl": f"{self.state.url}/{name}/discussions/1"} if as_pr else {}
        self.json({"commitUrl": url, "commitOid": commit, "success": True} | made)

    @staticmethod
    def mode(file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
        }

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.state.objects:
            return wanted  # it is here: no action
        href = f"{self.state.url}/lfs/{wanted['oid']}"
        return wanted | {"actions": {"upload": {"href": href, "header": {}}}}

    def do_PUT(self) -> None:
        path, body = self.noted(), self.body()
        oid = path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == oid
        with self.state.storing:
            full = len(self.state.objects) == self.state.reject_objects
            if not full:
                self.state.objects[oid] = body
        self.answer(400, b"no more") if full else self.answer(200)
