"""A model hub on the loopback interface: repositories of files in memory, and as much of the protocol as is needed to
create, list, upload (small files in the commit, large ones by LFS), download and delete. No xet: clients are told so.

Its state is that of the class, made new by `serve`, which the fixture `hub` of conftest and the torture call. A commit
is one request, taken whole or not at all: a client that is killed in the middle of it has changed nothing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".arrow", ".png")  # as .gitattributes of a new repository says
COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, whatever its name."""

    received: dict[str, bytes]
    objects: dict[str, bytes]
    paths: list[str]
    commits: list[list[str]]
    uploads: Counter[str]
    exists: bool
    refuses: bool
    refuse_after: int | None
    """Commits that are let through before it refuses."""
    delay: float
    """Seconds before a POST is answered."""

    @classmethod
    def reset(cls) -> None:
        """An empty hub."""
        cls.received, cls.objects, cls.paths, cls.commits, cls.uploads = {}, {}, [], [], Counter()
        cls.exists, cls.refuses, cls.refuse_after, cls.delay = False, False, None, 0.0

    # --- requests -----------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        body = self.body()
        type(self).paths.append(self.path)
        time.sleep(type(self).delay)
        if type(self).refuses:
            self.answer({"error": "You shall not pass"}, 403)
        elif self.path == "/api/repos/create":
            tree = json.loads(body)
            name = f"{tree.get('organization') or 'me'}/{tree['name']}"
            type(self).exists = True
            prefix = "datasets/" if tree.get("type") == "dataset" else ""
            self.answer({"url": f"http://{self.headers['Host']}/{prefix}{name}", "name": name})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in files]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [self.action(item) for item in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in body.splitlines()])
        elif "/paths-info/" in self.path:
            wanted = json.loads(body)["paths"]
            self.answer([entry for entry in entries() if entry["path"] in wanted])
        else:
            self.answer({"errors": [], "warnings": []})

    def do_PUT(self) -> None:
        body = self.body()
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        type(self).objects[oid] = body
        type(self).uploads[oid] += 1
        self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).paths.append(self.path)
        path = unquote(urlsplit(self.path).path)
        if not type(self).exists and "/datasets/" in path:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            below = re.sub(r".*/tree/[^/]+/?", "", path)
            recursive = "recursive=true" in self.path.lower()
            self.answer([entry for entry in entries() if is_below(entry["path"], below, recursive)])
        elif found := re.search(r"/resolve/[^/]+/(.*)", path):
            content = type(self).received.get(found[1])
            if content is None:
                self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            else:
                self.file(content)
        else:
            self.answer({"id": "me/mine", "sha": COMMIT, "siblings": [], "tags": [], "private": False})

    # --- what is done -------------------------------------------------------------------------------------------------

    def action(self, item: dict[str, object]) -> dict[str, object]:
        """Upload instructions for an object; none for one that is there."""
        if item["oid"] in type(self).objects:
            return item
        return item | {"actions": {"upload": {"href": f"http://{self.headers['Host']}/upload/{item['oid']}"}}}

    def commit(self, lines: list[dict[str, dict[str, str]]]) -> None:
        if type(self).refuse_after is not None and len(type(self).commits) >= type(self).refuse_after:
            self.answer({"error": "You shall not pass"}, 403)
            return
        changed = []
        for line in lines:
            kind, value = str(line["key"]), line["value"]
            if kind == "header":
                continue
            changed.append(value["path"])
            if kind == "file":
                type(self).received[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                type(self).received[value["path"]] = type(self).objects[value["oid"]]
            elif kind == "deletedFile":
                del type(self).received[value["path"]]
        type(self).commits.append(changed)
        self.answer({"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/{COMMIT}", "commitOid": COMMIT})

    def file(self, content: bytes) -> None:
        first, last = 0, len(content) - 1
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(ranged[1]), int(ranged[2] or last)
        part = content[first : last + 1]
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def answer(self, tree: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        """Body of the request, by its length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            size = int(self.headers.get("Content-Length") or 0)
            if len(whole := self.rfile.read(size)) < size:
                raise ConnectionError("the client is gone")
            return whole
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Run an empty hub; its address."""
    Hub.reset()
    server = _Server(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def mode(path: str) -> str:
    return "lfs" if path.endswith(LARGE) else "regular"


def entries() -> list[dict[str, object]]:
    """Files and folders, as the tree is listed."""
    found: dict[str, dict[str, object]] = {}
    for path, content in Hub.received.items():
        if "/" in path:
            folder = path.rsplit("/", 1)[0]
            found[folder] = {"type": "directory", "path": folder, "oid": "2" * 40, "size": 0}
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found[path] = {"type": "file", "path": path, "oid": blob, "size": len(content)}
        if mode(path) == "lfs":
            oid = hashlib.sha256(content).hexdigest()
            found[path]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return list(found.values())


def is_below(path: object, folder: str, recursive: bool) -> bool:
    rest = str(path).removeprefix(f"{folder}/") if folder else str(path)
    return (not folder or str(path).startswith(f"{folder}/")) and (recursive or "/" not in rest)
