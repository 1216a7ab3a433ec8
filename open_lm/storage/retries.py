"""Retry failed transfers and turn library errors into StorageErrors with advice. Imports no file system library."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar
from urllib.error import HTTPError, URLError

from open_lm.errors import StorageError, missing_package

T = TypeVar("T")
# Ten attempts take at least half a minute. An unreachable service usually means a wrong address: fail sooner.
_MAX_ATTEMPTS = 10
_MAX_ATTEMPTS_UNREACHABLE = 6
_MAX_ATTEMPTS_STALLED = 4  # each of them takes the full timeout
_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 20.0
_jitter = random.SystemRandom()  # so that retries do not change the program's other random numbers
CHANGED_DURING_READ = "the file changed while it was being read; restart the read"

_UNREACHABLE = frozenset({
    "EndpointConnectionError", "ConnectTimeoutError", "ConnectionRefusedError", "gaierror", "ClientConnectorError",
    "ConnectError", "ConnectTimeout", "SSLError",
})  # fmt: skip
_INTERRUPTED = frozenset({
    "ReadTimeoutError", "ResponseStreamingError", "IncompleteReadError", "IncompleteRead", "ConnectionClosedError",
    "ProtocolError", "HTTPClientError", "ResponseParserError", "FlexibleChecksumError", "SSLEOFError",
    "FSTimeoutError", "ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "ChunkedEncodingError",
    "ConnectionError", "ReadTimeout", "ReadError", "RemoteProtocolError",
})  # fmt: skip
_BUSY_CODES = frozenset({
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "BadDigest", "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch", "IncompleteBody", "Throttling", "ThrottlingException",
})  # fmt: skip


class IncompleteTransfer(OSError):
    """A transfer that ended without an error but with the wrong bytes."""


class SizeMismatch(StorageError):
    """A stored file that has `num_bytes` bytes, but the caller expects another size."""

    def __init__(self, url: str, num_bytes: int, expected_bytes: int) -> None:
        super().__init__(f"{url}: found {num_bytes} bytes, expected {expected_bytes}; the file changed, start again")
        self.num_bytes = num_bytes


class Stalled(TimeoutError):
    """A transfer that received no data for `timeout_s` seconds."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(f"{url}: no data received for {timeout_s:g} s")


def with_retries(action: Callable[[], T]) -> T:
    """Run `action`, and retry it with exponential backoff and jitter after transient errors."""
    num_failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            num_failures += 1
            if num_failures >= _max_attempts(error):
                raise
            if isinstance(error, Stalled):
                logging.warning(f"{error}; attempt {num_failures} of {_MAX_ATTEMPTS_STALLED} failed, retrying")
            back_off(num_failures)


def back_off(attempt: int) -> None:
    """Sleep after failed attempt number `attempt` (from 1): exponential backoff with jitter."""
    delay_s = min(_FIRST_DELAY_S * 2 ** (attempt - 1), _MAX_DELAY_S)
    _pause(delay_s * _jitter.uniform(0.5, 1.5))


def run_with_stall_timeout(action: Callable[[Callable[[], None]], T], url: str, timeout_s: float) -> T:
    """Run `action(heartbeat)` in a thread; raise Stalled if it does not call `heartbeat` for `timeout_s` seconds.

    Socket timeouts do not cover name resolution, requests inside an event loop, or bytes that arrive one by one. An
    abandoned thread cannot be stopped, so `action` must have no side effects other than its result.
    """
    last_heartbeat_s = time.monotonic()

    def heartbeat() -> None:
        nonlocal last_heartbeat_s
        last_heartbeat_s = time.monotonic()

    attempt = run_in_background(lambda: action(heartbeat))
    while not wait([attempt], last_heartbeat_s + timeout_s - time.monotonic()).done:
        if time.monotonic() >= last_heartbeat_s + timeout_s:
            raise Stalled(url, timeout_s)
    return attempt.result()


def run_in_background(action: Callable[[], T]) -> Future[T]:
    """Run `action` in a daemon thread, so that process exit does not wait for it, and return its future."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="open-lm-transfer", daemon=True).start()
    return future


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later."""
    return _max_attempts(error) > 1


def _max_attempts(error: BaseException | None) -> int:
    if error is None or isinstance(error, StorageError):
        return 1
    if isinstance(error, Stalled):
        return _MAX_ATTEMPTS_STALLED
    kind = type(error).__name__
    if kind in _UNREACHABLE:
        return _MAX_ATTEMPTS_UNREACHABLE
    if isinstance(error, IncompleteTransfer | TimeoutError | ConnectionError) or kind in _INTERRUPTED:
        return _MAX_ATTEMPTS
    if status_code(error) in (408, 429, 500, 502, 503, 504) or error_code(error) in _BUSY_CODES:
        return _MAX_ATTEMPTS
    reason = getattr(error, "reason", None)  # urllib's URLError
    # Some libraries raise a built-in exception from the specific one.
    return _max_attempts(reason if isinstance(reason, Exception) else error.__cause__)


_ADVICE = {
    "NoCredentialsError": "no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "the S3 credentials are incomplete; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "the AWS profile does not exist; check AWS_PROFILE",
    "NoSuchBucket": "no such bucket; create it or correct the name",
    "NoSuchKey": "no such file",
    "404": "no such file",
    "FileNotFoundError": "no such file",
    "AccessDenied": "access denied; the credentials lack the permission for this path",
    "401": "the server requires credentials, which are missing or wrong",
    "403": "access denied; the credentials are wrong or lack the permission for this path",
    "InvalidAccessKeyId": "the store does not know the access key; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "PreconditionFailed": CHANGED_DURING_READ,
    "412": CHANGED_DURING_READ,
    "ExpiredToken": "the session token has expired; log in again",
}


@contextlib.contextmanager
def wrap_errors(url: str) -> Iterator[None]:
    """Turn any error of the storage libraries into a StorageError that names `url` and says what to do."""
    try:
        yield
    except (StorageError, KeyboardInterrupt):
        raise
    except Stalled as error:
        raise StorageError(
            f"{error} in each of {_MAX_ATTEMPTS_STALLED} attempts; check the network and the server"
        ) from error
    except Exception as error:
        raise StorageError(f"{url}: {_reason(error)}") from error


@contextlib.contextmanager
def wrap_disk_full_errors(url: str, folder: str) -> Iterator[None]:
    """Turn a disk-full error into a StorageError that names the file, the local folder and its free space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise StorageError(
            f"{url}: {error.strerror} while writing in {folder} ({free:.3f} GB free there); "
            "the existing file was not changed; free disk space or choose another folder "
            "(for uploads to a remote store: TMPDIR)"
        ) from error


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    # s3fs raises built-in exceptions from botocore's.
    code = error_code(error) or error_code(error.__cause__) or str(status_code(error))
    if kind in _ADVICE or code in _ADVICE:
        return _ADVICE.get(code) or _ADVICE[kind]
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "ReadTimeoutError"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return f"the S3 service at {endpoint} cannot be reached ({kind}); check the network and AWS_ENDPOINT_URL"
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return f"the server cannot be reached ({error.reason}); check the network and the address"
    if isinstance(error, ModuleNotFoundError | ImportError):
        cause = error.__cause__ if isinstance(error.__cause__, ModuleNotFoundError) else error  # fsspec hides the name
        missing = missing_package(cause.name) if cause.name else None
        return missing or f"this URL scheme needs a package that is not installed ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (errno {error.errno})"
    return f"{kind}: {error}"


def error_code(error: BaseException | None) -> str:
    """Return the S3 error code, or an empty string."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""


def status_code(error: BaseException) -> int:
    """Return the HTTP status of an error from boto3, urllib, aiohttp and others; 0 if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    statuses = (
        getattr(holder, name, 0) for holder, name in ((error, "status"), (error, "code"), (response, "status_code"))
    )
    return next((status for status in statuses if isinstance(status, int) and status), 0)
