"""An HTTP server for a chat model: the routes /v1/models and /v1/chat/completions of OpenAI's API, and a web page.

It serves one request at a time; others wait. Sizes, tokens and times are limited. It has no access control: a browser
page of another site cannot use it, because requests must be JSON and name this server as their host.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

from open_lm.errors import ConfigError, DataError, UserError
from open_lm.finetune.chat_session import ChatModel, Turn
from open_lm.finetune.conversations import BadConversation, Message, parse_messages
from open_lm.generate.sampling import Sampling
from open_lm.storage.strict_json import to_json

PAGE = Path(__file__).resolve().parent / "chat_page.html"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_STOPS, _MAX_MESSAGES, _MAX_CONNECTIONS = 4, 1000, 64
_SOCKET_TIMEOUT_S = 30.0  # without any data from a client, or with none accepted
_MAX_SHOWN = 60  # characters of a refused value
_MAX_DIGITS = 18  # of a Content-Length
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a request: its bytes, the new tokens, and seconds.

    A request may wait and then generate for `request_timeout_s`; its head must arrive in `head_timeout_s`.
    """

    max_request_bytes: int = 1 << 20
    max_new_tokens: int = 1024
    request_timeout_s: float = 120.0
    head_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not (self.max_request_bytes > 0 and self.max_new_tokens > 0 and 0 < self.request_timeout_s < math.inf):
            raise ConfigError("--max-request-bytes, --max-new-tokens and --request-timeout must be above 0")


class RequestError(Exception):
    """A request that is refused with an HTTP status."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class ChatServer(ThreadingHTTPServer):
    """The server of a chat model on `address`; `serve_forever` answers requests until `shutdown`.

    `sampling` has the defaults of a request's settings.
    """

    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(
        self, address: tuple[str, int], model: ChatModel, sampling: Sampling, limits: ServerLimits | None = None
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, _Handler)
        self.model, self.sampling, self.limits = model, sampling, limits or ServerLimits()
        self.started_s = int(time.time())
        self.lock = threading.Lock()  # of the model

    @property
    def url(self) -> str:
        """The address of the web page."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a new thread; close it at once if there are too many."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def is_own_host(self, host: str) -> bool:
        """Return whether a Host header names this server; another name may belong to an attacking page."""
        name = host.rpartition(":")[0].strip("[]") if host.rpartition(":")[2].isdigit() else host.strip("[]")
        return name in LOOPBACK or str(self.server_address[0]) not in LOOPBACK


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    timeout = _SOCKET_TIMEOUT_S
    server_version, sys_version = "open_lm", ""
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        """Read and answer a request; end a connection whose client sends the head of its request too slowly."""
        self._head_timer = threading.Timer(self.server.limits.head_timeout_s, self._end_connection)
        self._head_timer.daemon = True
        self._head_timer.start()
        try:
            super().handle_one_request()
        finally:
            self._head_timer.cancel()

    def _end_connection(self) -> None:
        with suppress(OSError):  # it has ended already
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/v1/models": self._models})

    def do_POST(self) -> None:
        self._answer({"/v1/chat/completions": self._complete})

    def log_message(self, form: str, *values: Any) -> None:
        """Log requests without their content."""
        _logger.debug(form, *values)

    def _answer(self, routes: Mapping[str, Any]) -> None:
        self._head_timer.cancel()
        self.close_connection = True  # so that the rest of a refused request is never read as another one
        with suppress(BrokenPipeError, ConnectionResetError, TimeoutError):  # the client has ended
            self._route(routes)

    def _route(self, routes: Mapping[str, Any]) -> None:
        try:
            if not self.server.is_own_host(self.headers.get("Host", "")):
                raise RequestError(HTTPStatus.MISDIRECTED_REQUEST, "the Host header does not name this server")
            route = routes.get(self.path.partition("?")[0])
            if route is None:
                raise RequestError(HTTPStatus.NOT_FOUND, f"found no {self.command} {self.path[:100]}")
            route()
        except RequestError as error:
            self._send_error(error)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            raise
        except Exception:
            _logger.exception("a request failed")
            self._send_error(RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the server's log"))

    def _send_error(self, error: RequestError) -> None:
        kind = "invalid_request_error" if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
        body = {"error": {"message": str(error), "type": kind, "param": error.param, "code": None}}
        self._send(to_json(body).encode(), "application/json", error.status)

    def _send(
        self,
        body: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.send_response(status)
        fields = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff"}
        for name, value in {**fields, "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    # --- routes ------------------------------------------------------------------------------------------------------
    def _page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        page = PAGE.read_text(encoding="utf-8").replace("{{ nonce }}", nonce)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        self._send(page.encode(), "text/html; charset=utf-8", headers=headers)

    def _models(self) -> None:
        server = self.server
        entry = {"id": server.model.name, "object": "model", "created": server.started_s, "owned_by": "open_lm"}
        self._send(to_json({"object": "list", "data": [entry]}).encode(), "application/json")

    def _complete(self) -> None:
        request = self._read_request()
        messages, sampling, stop = parse_request(request, self.server.sampling, self.server.limits)
        timeout_s = self.server.limits.request_timeout_s
        if not self.server.lock.acquire(timeout=timeout_s):
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, f"other requests took {timeout_s:g} s; try again later")
        try:
            deadline = time.monotonic() + timeout_s
            try:
                turn, pieces = self.server.model.reply(
                    messages, sampling, stop, is_cancelled=lambda: time.monotonic() > deadline
                )
            except (BadConversation, ConfigError, DataError) as error:
                raise RequestError(HTTPStatus.BAD_REQUEST, str(error), "messages") from error
            send = self._stream if _flag(request, "stream") else self._send_whole
            send(request, turn, pieces)
        finally:
            self.server.lock.release()

    def _read_request(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the Content-Type must be application/json")
        length, limit = self.headers.get("Content-Length", ""), self.server.limits.max_request_bytes
        if not length:
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "the Content-Length is missing")
        if not (length.isascii() and length.isdigit() and len(length) <= _MAX_DIGITS):
            message = f"found the Content-Length {length[:40]!r}, expected a number of up to {_MAX_DIGITS} digits"
            raise RequestError(HTTPStatus.BAD_REQUEST, message)
        if int(length) > limit:
            message = f"the request has {length} bytes, at most {limit} are accepted (--max-request-bytes)"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        body = self._read_body(int(length))
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"the body is not JSON ({error})") from error
        if not isinstance(request, dict):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
        return request

    def _read_body(self, length: int) -> bytes:
        deadline = time.monotonic() + _SOCKET_TIMEOUT_S
        parts: list[bytes] = []
        while length > 0 and (part := self.rfile.read1(length)):
            parts.append(part)
            length -= len(part)
            if length and time.monotonic() > deadline:
                raise RequestError(HTTPStatus.REQUEST_TIMEOUT, f"the request took over {_SOCKET_TIMEOUT_S:g} s")
        return b"".join(parts)

    def _envelope(self, kind: str) -> dict[str, Any]:
        name, created = self.server.model.name, int(time.time())
        return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": created, "model": name}

    def _send_whole(self, request: Mapping[str, Any], turn: Turn, pieces: Iterator[str]) -> None:
        text = "".join(pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": turn.finish_reason,
        }
        body = {**self._envelope("chat.completion"), "choices": [choice], "usage": _usage(turn)}
        self._send(to_json(body).encode(), "application/json")

    def _stream(self, request: Mapping[str, Any], turn: Turn, pieces: Iterator[str]) -> None:
        """Send server-sent events, one for each piece of text."""
        self.send_response(HTTPStatus.OK)
        for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.send_header("Connection", "close")  # the end of the connection ends the body
        self.end_headers()
        envelope = self._envelope("chat.completion.chunk")
        event = partial(self._event, envelope)
        try:
            event({"role": "assistant", "content": ""})
            for piece in pieces:
                event({"content": piece})
        except UserError as error:  # the status is already sent
            self._write({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            return
        event({}, turn.finish_reason)
        options = request.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            self._write({**envelope, "choices": [], "usage": _usage(turn)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, envelope: Mapping[str, Any], delta: Mapping[str, str], finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        self._write({**envelope, "choices": [choice]})

    def _write(self, value: Mapping[str, Any]) -> None:
        self.wfile.write(b"data: " + to_json(value).encode() + b"\n\n")
        self.wfile.flush()


def parse_request(
    request: Mapping[str, Any], defaults: Sampling, limits: ServerLimits
) -> tuple[list[Message], Sampling, list[str]]:
    """Return the messages, the sampling settings and the stop texts of a request. RequestError for invalid ones."""
    try:
        messages = parse_messages(request.get("messages"), "messages")
    except BadConversation as error:
        raise RequestError(HTTPStatus.BAD_REQUEST, str(error), "messages") from error
    if len(messages) > _MAX_MESSAGES:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"at most {_MAX_MESSAGES} messages are accepted", "messages")
    if request.get("n") not in (None, 1):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"found n {_shown(request['n'])}, expected 1", "n")
    tokens = request.get("max_completion_tokens")
    name = "max_tokens" if tokens is None else "max_completion_tokens"
    max_tokens = _number(request, name, defaults.max_new_tokens, 1, math.inf, whole=True)
    stop = request.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > _MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"stop must be up to {_MAX_STOPS} texts", "stop")
    sampling = replace(
        defaults,
        max_new_tokens=int(min(max_tokens, limits.max_new_tokens)),
        temperature=_number(request, "temperature", defaults.temperature, 0, 2),
        top_p=_number(request, "top_p", defaults.top_p, 1e-6, 1),
        seed=int(_number(request, "seed", secrets.randbelow(1 << 31), -(1 << 63), 1 << 63, whole=True)),
    )
    return messages, sampling, stop


def _number(
    request: Mapping[str, Any], name: str, default: float, low: float, high: float, *, whole: bool = False
) -> float:
    value = request.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is not; integers may be too large for a float
        kind = "an integer" if whole else "a number"
        bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise RequestError(HTTPStatus.BAD_REQUEST, f"found {name} {_shown(value)}, expected {kind} {bounds}", name)
    number: float = value
    return number


def _shown(value: Any) -> str:
    """Return a value of a request for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer with thousands of digits
        return "a very large integer"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _flag(request: Mapping[str, Any], name: str) -> bool:
    value = request.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"found {name} {_shown(value)}, expected true or false", name)
    return bool(value)


def _usage(turn: Turn) -> dict[str, int]:
    total = turn.prompt_tokens + turn.new_tokens
    return {"prompt_tokens": turn.prompt_tokens, "completion_tokens": turn.new_tokens, "total_tokens": total}
