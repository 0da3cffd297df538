"""A local HTTP server that speaks as much of the Hugging Face Hub's protocol as a download needs.

Files are listed with sizes and checksums, `resolve` redirects to another host as the real one does to
its storage, and that takes Range. Source of the protocol: huggingface_hub's own client.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class Sent:
    """One answer of the storage: what was asked and how many bytes went out."""

    name: str
    wanted_range: str | None
    authorization: str | None
    size: int = 0


@dataclass
class FakeHub:
    """Repositories by name, with their files; what goes wrong; what was sent."""

    url: str = ""
    storage_url: str = ""
    repositories: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)  # repository: status, X-Error-Code
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    stall_after: int | None = None
    storage_status: list[int] = field(default_factory=list)  # of the next answers
    takes_range: bool = True
    has_lfs: bool = True
    wrong_digest: bool = False
    listed_larger: int = 0
    sent: list[Sent] = field(default_factory=list)
    hub_authorizations: list[str | None] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def sibling(self, name: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(b"other" if self.wrong_digest else content).hexdigest()
        size = len(content) + self.listed_larger
        blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        listed: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob_id}
        if self.has_lfs:
            listed["lfs"] = {"size": size, "sha256": digest, "pointerSize": 134}
        return listed

    def model_info(self, repo: str) -> dict[str, Any]:
        files = self.repositories[repo]
        siblings = [self.sibling(name, content) for name, content in files.items()]
        return {"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}

    def content_at(self, storage_path: str) -> bytes:
        owner, repo, name = unquote(storage_path).removeprefix("/storage/").split("/", 2)
        return self.repositories[f"{owner}/{repo}"][name]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/storage/"):
            self.send_content(path)
            return
        self.hub.hub_authorizations.append(self.headers.get("Authorization"))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.send_info(found[1], found[2] or "main")
        elif found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            self.send_response(302)
            self.send_header("Location", f"{self.hub.storage_url}/storage/{found[1]}/{found[2]}")
            self.end_headers()
        else:
            self.send_failure(404, "EntryNotFound")

    def send_info(self, repo: str, revision: str) -> None:
        if repo in self.hub.errors:
            self.send_failure(*self.hub.errors[repo])
        elif repo not in self.hub.repositories:
            self.send_failure(401, "RepoNotFound")  # as the real one answers who is not logged in
        elif revision not in ("main", COMMIT):
            self.send_failure(404, "RevisionNotFound")
        else:
            self.send_bytes(200, json.dumps(self.hub.model_info(repo)).encode())

    def send_failure(self, status: int, code: str) -> None:
        self.send_bytes(status, b"{}", {"X-Error-Code": code})

    def send_bytes(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_content(self, path: str) -> None:
        hub, content, wanted = self.hub, self.hub.content_at(path), self.headers.get("Range")
        sent = Sent(path.rpartition("/")[2], wanted, self.headers.get("Authorization"))
        hub.sent.append(sent)
        if hub.storage_status:
            self.send_failure(hub.storage_status.pop(0), "")
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and hub.takes_range else 0
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        going = rest[: hub.cuts.pop(0)] if hub.cuts else rest[: hub.stall_after]
        self.wfile.write(going)
        sent.size = len(going)
        if len(going) < len(rest) and hub.stall_after is not None:
            hub.stopping.wait(30)

    def log_message(self, *_: object) -> None:
        return None


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub at `url` until the end of the block."""
    hub = FakeHub()
    with served("127.0.0.1", hub) as hub.url, served("127.0.0.2", hub) as hub.storage_url:
        yield hub


@contextmanager
def served(host: str, hub: FakeHub) -> Iterator[str]:
    server = ThreadingHTTPServer((host, 0), type("HubHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        hub.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
