"""What can go wrong with remote files: trying again, and saying it in words that help. Imports no file system."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from open_lm.errors import StorageError

T = TypeVar("T")
_ATTEMPTS = 4
_FIRST_DELAY_S = 0.5


class IncompleteTransfer(OSError):
    """A transfer ended without an error but with the wrong number of bytes."""


def with_retries(action: Callable[[], T]) -> T:
    """Run `action`, again after a growing, jittered pause when it fails in a way that may pass."""
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if attempt == _ATTEMPTS - 1 or not _is_transient(error):
                raise
            _pause(_FIRST_DELAY_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (IncompleteTransfer, TimeoutError, ConnectionResetError, ConnectionAbortedError)):
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's ClientError
        return status_code(error) in (429, 500, 502, 503, 504) or response.get("Error", {}).get("Code") in (
            "SlowDown",
            "RequestTimeout",
        )
    return type(error).__name__ in {
        "ReadTimeoutError", "ResponseStreamingError", "IncompleteReadError", "IncompleteRead", "ConnectionClosedError",
        "ProtocolError", "FSTimeoutError", "ClientPayloadError", "ServerDisconnectedError", "FlexibleChecksumError",
    }  # fmt: skip


_ADVICE = {
    "NoCredentialsError": "no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "the S3 credentials are incomplete; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "the AWS profile does not exist; check AWS_PROFILE",
    "NoSuchBucket": "there is no such bucket; create it or correct the name",
    "NoSuchKey": "no such file",
    "404": "no such file",
    "AccessDenied": "access denied; the credentials lack the permission for this path",
    "403": "access denied; the credentials are wrong or lack the permission for this path",
    "InvalidAccessKeyId": "the access key is not known to the store; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; log in again",
}


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn any failure of the libraries below into a StorageError that names `url` and the way out."""
    try:
        yield
    except (StorageError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise StorageError(f"{url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    code = _error_code(error) or _error_code(error.__cause__)  # s3fs raises Python's own errors from botocore's
    if kind in _ADVICE or code in _ADVICE:
        return _ADVICE.get(code) or _ADVICE[kind]
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "ReadTimeoutError"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return f"the S3 service at {endpoint} cannot be reached ({kind}); check the network and AWS_ENDPOINT_URL"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, ModuleNotFoundError | ImportError):
        return f"this kind of address needs a package that is not installed ({error})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (errno {error.errno})"
    return f"{kind}: {error}"


def _error_code(error: BaseException | None) -> str:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""


def status_code(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(response, dict) else 0
