"""A server on loopback with the part of the Hugging Face hub's interface that an upload uses."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """A hub that stores the files of commits in memory.

    Attributes:
        files: content of the stored files, by repository and path.
        requests: methods and paths of all requests.
        token: token that requests must have.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON of the answer to a request."""
        name = "/".join(path.split("/")[3:5])
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization')}/{content['name']}"
            self.files.setdefault(name, {})
            return 200, {"url": f"{self.endpoint}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for file in files]}  # fmt: skip
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None}
        if method == "GET" and path.startswith("/api/models/"):
            return 200, {"id": name, "sha": "0" * 40, "siblings": [], "tags": [], "private": False}
        return 404, {"error": f"unknown request {method} {path}"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                path = self.path.partition("?")[0]
                hub.requests.append(f"{self.command} {path}")
                body = self._body()
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    status, content = 401, {"error": "Invalid credentials"}
                else:
                    status, content = hub.answer(self.command, path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_POST = do_HEAD = _answer

            def log_message(self, *_: object) -> None:
                pass

        return Handler
