"""An S3 server on the loopback interface (moto's, in a thread), behind a gate that fails as it is told.

`faults` are what goes wrong with the next requests whose method and key match, in order; then all is well."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from xml.sax.saxutils import escape

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Fault = Literal["500", "slow down", "reset", "lost upload", "lost answer", "slow", "denied", "unconditional"]
# `lost upload`: acknowledged, and nothing is there; `lost answer`: it is there, and the connection ends
CODES = {"500": (500, "InternalError"), "slow down": (503, "SlowDown"), "denied": (403, "AccessDenied")}
BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}

Environ = dict[str, Any]
Start = Callable[..., Any]


@dataclass
class Bucket:
    """The server as tests see it."""

    endpoint: str = ""
    faults: list[tuple[str, str, Fault]] = field(default_factory=list)
    """Method, part of a path, and what happens to a request of both."""
    always: list[tuple[str, str, Fault]] = field(default_factory=list)
    """The same, every time."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.2
    """Seconds that `slow` takes."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for waiting, once in ((self.faults, True), (self.always, False)):
                for entry in waiting:
                    if entry[0] == method and entry[1] in path:
                        if once:
                            waiting.remove(entry)
                        return entry[2]
        return None

    def count(self, method: str, part: str) -> int:
        return sum(one == method and part in path for one, path in self.requests)

    def asked(self) -> Counter[str]:
        return Counter(method for method, _ in self.requests)


class _Gate:
    def __init__(self, application: Any, bucket: Bucket) -> None:
        self.application, self.bucket = application, bucket

    def __call__(self, environ: Environ, start: Start) -> Iterable[bytes]:
        fault = self.bucket.fault_of(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault in CODES:
            status, code = CODES[fault]
            body = f"<Error><Code>{code}</Code><Message>{escape(code)}</Message></Error>".encode()
            start(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if fault == "reset":
            environ["werkzeug.socket"].shutdown(2)
            return [b""]
        if fault == "lost upload":
            start("200 OK", [("ETag", '"0"'), ("Content-Length", "0")])
            return [b""]
        if fault == "slow":
            time.sleep(self.bucket.seconds)
        if fault == "unconditional":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        answer: Iterable[bytes] = self.application(environ, start)
        if fault == "lost answer":
            environ["werkzeug.socket"].shutdown(2)
        return answer


@contextlib.contextmanager
def connected() -> Iterator[Bucket]:
    """The server, and an environment in which s3:// means it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, serve() as bucket:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": bucket.endpoint}.items():
            patch.setenv(name, value)
        # file systems of a server before, in this process; moto's buckets are those of the process, too
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        fsspec.filesystem("s3").makedirs(BUCKET, exist_ok=True)
        yield bucket
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """The server, with one empty bucket, as long as the block runs."""
    bucket = Bucket()
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, _Gate(application, bucket), threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
