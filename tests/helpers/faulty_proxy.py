"""A small HTTP proxy on loopback that injects network and server faults into the requests that it forwards.

    with FaultyProxy(endpoint, seed=1) as proxy:
        proxy.rules.append(Rule("503", rate=0.2))                        # 20 % of all requests
        proxy.rules.append(Rule("truncate", method="GET", path=r"\\.zst", times=1))
        ...                                                              # AWS_ENDPOINT_URL=proxy.endpoint
    assert proxy.injected["503"] > 0

It does not depend on S3. It works with any client whose server address can be set, in this process or another one.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = {
    "500": "answer 500 InternalError without forwarding the request",
    "503": "answer 503 SlowDown without forwarding the request",
    "reset": "reset the connection without forwarding the request",
    "reset_after": "forward the request, then reset the connection without a response",
    "reset_body": "reset the connection in the middle of the response body",
    "truncate": "close the connection normally in the middle of the response body",
    "delay": "wait some seconds, then forward the request as usual",
    "stall": "send half of the response body, wait some seconds, then reset the connection",
}
_CODES = {"500": "InternalError", "503": "SlowDown"}
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Rule:
    """A fault for requests that match `method` and `path`, with probability `rate` and at most `times` occurrences."""

    kind: str
    rate: float = 1.0
    times: int | None = None
    skip: int = 0  # number of matching requests that pass before the first fault
    method: str = ""  # "" matches any method
    path: str = ""  # regular expression, searched for in path and query
    seconds: float = 0.1  # duration of "delay" and "stall"
    _num_seen: int = field(default=0, repr=False)
    _num_injected: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind!r}; expected one of {', '.join(KINDS)}")

    def applies(self, method: str, path: str, rng: random.Random) -> bool:
        """Return whether to inject the fault into this request, and count it."""
        if self.method not in ("", method) or not re.search(self.path, path) or self._num_injected == self.times:
            return False
        self._num_seen += 1
        if self._num_seen <= self.skip or rng.random() >= self.rate:
            return False
        self._num_injected += 1
        return True


class FaultyProxy:
    """A proxy of `upstream` at `endpoint`, with counts of injected faults by kind and of requests by method."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.rules: list[Rule] = []
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.bucket = ""  # set by the fixture: an S3 bucket for the test
        self.upstream = urlsplit(upstream)
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fault_for(self, method: str, path: str) -> Rule | None:
        """Return the first rule that applies to this request."""
        with self._lock:
            self.requests[method] += 1
            for rule in self.rules:
                if rule.applies(method, path, self._rng):
                    return rule
            return None

    def count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1

    def wait(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def stop(self) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultyProxy) -> None:
        super().__init__(address, _Handler)
        self.proxy = proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Do not print a traceback when a client closes its connection."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        proxy = self.server.proxy
        body = self._read_body()
        rule = proxy.fault_for(self.command, self.path)
        kind = rule.kind if rule else ""
        if rule and kind == "delay":
            proxy.count(kind)
            proxy.wait(rule.seconds)
        elif kind in _CODES:
            proxy.count(kind)
            self._refuse(int(kind), _CODES[kind])
            return
        elif kind == "reset":
            proxy.count(kind)
            self._reset()
            return
        status, headers, data = self._forward(body)
        if rule and kind in ("reset_after", "reset_body", "truncate", "stall"):
            # A response without a body cannot be truncated: drop it completely.
            has_body = kind != "reset_after" and self.command != "HEAD" and len(data) > 0
            proxy.count(kind)
            if has_body:
                self._send(status, headers, data, len(data) // 2)
            if kind == "stall":
                proxy.wait(rule.seconds)
            self.close_connection = True
            if kind != "truncate":
                self._reset()
            return
        self._send(status, headers, data, len(data))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_expect_100(self) -> bool:
        return True  # `_read_body` sends the 100 response

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        dropped = {*_HOP_HEADERS, "expect"}
        request_headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        if body or self.command in ("PUT", "POST"):
            request_headers["Content-Length"] = str(len(body))
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body, request_headers)
            response = connection.getresponse()
            data = response.read()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_HEADERS]
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            return response.status, [*headers, ("Content-Length", length or "0")], data

    def _send(self, status: int, headers: list[tuple[str, str]], data: bytes, sent_bytes: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:sent_bytes])
        self.wfile.flush()

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        data = b"" if self.command == "HEAD" else text.encode()
        self._send(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(data)))], data, len(data))

    def _reset(self) -> None:
        """Close the connection so that the client sees "connection reset by peer" instead of a normal end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *args: object) -> None:
        """Disable logging; tests use the counters."""
