"""What can go wrong with remote files: trying again, and saying it in words that help. Imports no file system."""

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

from open_lm.errors import StorageError

T = TypeVar("T")
# Ten tries take half a minute at least. A service that cannot be reached at all is mostly a wrong address: told sooner.
_TRIES = 10
_TRIES_UNREACHABLE = 6
_TRIES_STALLED = 4  # each of them has taken a whole timeout
_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 20.0
_jitter = random.SystemRandom()  # the program's own random numbers must not depend on the network

_UNREACHABLE = frozenset({
    "EndpointConnectionError", "ConnectTimeoutError", "ConnectionRefusedError", "gaierror", "ClientConnectorError",
    "ConnectError", "ConnectTimeout", "SSLError",
})  # fmt: skip
_BROKEN_OFF = frozenset({
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
    """A transfer ended without an error but with the wrong bytes."""


class OtherSize(StorageError):
    """A file of a store is `num_bytes` long, and not what the reader was told."""

    def __init__(self, url: str, num_bytes: int, expected_bytes: int) -> None:
        super().__init__(f"{url}: has {num_bytes} bytes, expected are {expected_bytes}; begin again")
        self.num_bytes = num_bytes


class Stalled(TimeoutError):
    """A transfer of `url` brought no byte for `timeout_s` seconds."""

    def __init__(self, url: str, timeout_s: float) -> None:
        super().__init__(f"{url}: no byte came for {timeout_s:g} s")


def with_retries(action: Callable[[], T]) -> T:
    """Run `action`, again after a growing, jittered pause when it fails in a way that may pass."""
    tries = 0
    while True:
        try:
            return action()
        except Exception as error:
            tries += 1
            if tries >= _tries_for(error):
                raise
            if isinstance(error, Stalled):
                logging.warning(f"{error}; attempt {tries} of {_TRIES_STALLED} is given up, another follows")
            back_off(tries)


def back_off(tries: int) -> None:
    """Pause after the failure of the try of this number, longer each time and never quite as long as others do."""
    delay = min(_FIRST_DELAY_S * 2 ** (tries - 1), _LONGEST_DELAY_S)
    _pause(delay * _jitter.uniform(0.5, 1.5))


def watched(action: Callable[[Callable[[], None]], T], url: str, timeout_s: float) -> T:
    """`action(alive)` in a thread of its own; Stalled where it has not called `alive` for `timeout_s` seconds.

    Timeouts of sockets see neither a name that is not resolved nor a request inside an event loop nor bytes that come
    one by one. The thread that is given up cannot be ended from outside: `action` must change nothing but its result.
    """
    last_sign_s = time.monotonic()

    def alive() -> None:
        nonlocal last_sign_s
        last_sign_s = time.monotonic()

    attempt = in_background(lambda: action(alive))
    while not wait([attempt], last_sign_s + timeout_s - time.monotonic()).done:
        if time.monotonic() >= last_sign_s + timeout_s:
            raise Stalled(url, timeout_s)
    return attempt.result()


def in_background(action: Callable[[], T]) -> Future[T]:
    """`action` in a thread of its own: a daemon, so that the end of the process need not wait for what never comes."""
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
    """Whether the same request may well succeed a moment later."""
    return _tries_for(error) > 1


def _tries_for(error: BaseException | None) -> int:
    if error is None or isinstance(error, StorageError):
        return 1
    if isinstance(error, Stalled):
        return _TRIES_STALLED
    kind = type(error).__name__
    if kind in _UNREACHABLE:
        return _TRIES_UNREACHABLE
    if isinstance(error, IncompleteTransfer | TimeoutError | ConnectionError) or kind in _BROKEN_OFF:
        return _TRIES
    if status_code(error) in (408, 429, 500, 502, 503, 504) or error_code(error) in _BUSY_CODES:
        return _TRIES
    reason = getattr(error, "reason", None)  # urllib's URLError
    # Some libraries raise Python's own errors from those that tell the cause.
    return _tries_for(reason if isinstance(reason, Exception) else error.__cause__)


_ADVICE = {
    "NoCredentialsError": "no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "the S3 credentials are incomplete; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "the AWS profile does not exist; check AWS_PROFILE",
    "NoSuchBucket": "there is no such bucket; create it or correct the name",
    "NoSuchKey": "no such file",
    "404": "no such file",
    "FileNotFoundError": "no such file",
    "AccessDenied": "access denied; the credentials lack the permission for this path",
    "401": "the server asks for credentials that are missing or wrong",
    "403": "access denied; the credentials are wrong or lack the permission for this path",
    "InvalidAccessKeyId": "the access key is not known to the store; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "PreconditionFailed": "the file was changed while it was being read; begin again",
    "412": "the file was changed while it was being read; begin again",
    "ExpiredToken": "the session token has expired; log in again",
}


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn any failure of the libraries below into a StorageError that names `url` and the way out."""
    try:
        yield
    except (StorageError, KeyboardInterrupt):
        raise
    except Stalled as error:
        raise StorageError(
            f"{error}, in none of {_TRIES_STALLED} attempts; check the network and the server"
        ) from error
    except Exception as error:
        raise StorageError(f"{url}: {_reason(error)}") from error


@contextlib.contextmanager
def full_disk_explained(url: str, folder: str) -> Iterator[None]:
    """Turn a local disk that is full into a StorageError that names the file, the folder and what is free there."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise StorageError(
            f"{url}: {error.strerror} while writing in {folder} ({free:.3f} GB free there); "
            "nothing was changed; make room or choose another folder (TMPDIR for what goes to a remote store)"
        ) from error


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    # s3fs raises Python's own errors from botocore's.
    code = error_code(error) or error_code(error.__cause__) or str(status_code(error))
    if kind in _ADVICE or code in _ADVICE:
        return _ADVICE.get(code) or _ADVICE[kind]
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "ReadTimeoutError"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return f"the S3 service at {endpoint} cannot be reached ({kind}); check the network and AWS_ENDPOINT_URL"
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        return f"the server cannot be reached ({error.reason}); check the network and the address"
    if isinstance(error, ModuleNotFoundError | ImportError):
        return f"this kind of address needs a package that is not installed ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (errno {error.errno})"
    return f"{kind}: {error}"


def error_code(error: BaseException | None) -> str:
    """S3's word for what went wrong, or an empty one."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""


def status_code(error: BaseException) -> int:
    """The HTTP status of an answer, as boto3, urllib, aiohttp and others keep it; 0 where there was none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    kept = (
        getattr(holder, name, 0) for holder, name in ((error, "status"), (error, "code"), (response, "status_code"))
    )
    return next((status for status in kept if isinstance(status, int) and status), 0)
