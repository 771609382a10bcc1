"""A web server on the loopback interface that serves a folder, counts what it is asked for, and fails as it is told."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Fault = Literal["500", "404", "cut", "corrupt", "stall", "endless", "bomb"]


FLOOD = 1 << 28  # bytes; without a bound all of them are taken


class Upstream:
    """`faults[name]` are what goes wrong with the next requests for a file of that name, in order; then all is well."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, list[Fault]] = {}
        self.go_on = threading.Event()
        self.lock = threading.Lock()
        self.url = ""
        self.flooded = 0  # bytes of floods that were sent, decoded

    def next_fault(self, name: str) -> Fault | None:
        """The fault that this request for it meets."""
        with self.lock:
            self.asked[name] += 1
            waiting = self.faults.get(name) or self.faults.get("*") or []
            return waiting.pop(0) if waiting else None


@contextmanager
def serving(root: Path) -> Iterator[Upstream]:
    """The server, as long as the block runs; `url` is where the folder is."""
    upstream = Upstream(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = upstream.root / self.path.lstrip("/")
            fault = upstream.next_fault(path.name)
            if fault in ("500", "404") or not path.is_file():
                self.send_error(500 if fault == "500" else 404)
                return
            content = path.read_bytes()
            self.send_response(200)
            if fault in ("endless", "bomb"):
                self._flood(gzipped=fault == "bomb")
                return
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = len(content) // 2
            if fault == "corrupt":
                content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
            if fault in ("cut", "stall"):
                self.wfile.write(content[:half])
                self.wfile.flush()
                if fault == "stall":
                    upstream.go_on.wait()
                self.close_connection = True
                return
            self.wfile.write(content)

        def _flood(self, gzipped: bool) -> None:
            """Send FLOOD bytes as they are, or 2 % of them that are as many when they are decoded."""
            if gzipped:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.close_connection = True
            packer = zlib.compressobj(wbits=31)
            with contextlib.suppress(ConnectionError):  # the client has had enough
                for _ in range(FLOOD >> 20):
                    piece = bytes(1 << 20)
                    self.wfile.write(packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) if gzipped else piece)
                    upstream.flooded += len(piece)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    upstream.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield upstream
    finally:
        upstream.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
