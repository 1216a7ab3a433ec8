"""Agree with an S3 store on how transfers are verified.

Amazon's S3 and newer stores verify uploads by the CRC-32 that the client sends. Other stores ignore these fields or
refuse the request: CompleteMultipartUpload with 400 MalformedXML (OpenStack Swift), any request with 501 NotImplemented
(older MinIO and Ceph). For those, uploads are verified by MD5, which all stores know: Content-MD5 and the ETag. What a
store accepts is found out by its first refusal and remembered by this process and the ones that it forks.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from open_lm.storage.paths import strip_etag
from open_lm.storage.retries import IncompleteTransfer, error_code, status_code

T = TypeVar("T")
# Options of a botocore Config; older versions have none of them.
CONFIG_OPTIONS = ("request_checksum_calculation", "response_checksum_validation")
_refusing_stores: set[tuple[str, str]] = set()


class ChecksumsIgnored(Exception):
    """An upload whose checksum the store did not acknowledge."""


def store_key() -> tuple[str, str]:
    """Return the endpoint and the account that the environment selects."""
    return (
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "",
        os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE") or "",
    )


def environment_settings() -> tuple[str | None, ...]:
    """Return the environment's settings of botocore's checksums; they also exist in its configuration file."""
    return tuple(os.environ.get(f"AWS_{name.upper()}") for name in CONFIG_OPTIONS)


def negotiate(action: Callable[[bool], T]) -> T:
    """Return `action(plain)`, where `plain` says to leave out checksum fields: only for a store that refuses them.

    If the store may have refused them (or ignored those of an upload: ChecksumsIgnored), repeat the action without
    them. If that succeeds, the store is remembered.
    """
    store = store_key()
    if store in _refusing_stores:
        return action(True)
    try:
        return action(False)
    except Exception as error:
        if not _is_refusal(error):
            raise
        reason = error_code(error) or error_code(error.__cause__) or str(error)
    result = action(True)
    if store not in _refusing_stores:
        _refusing_stores.add(store)
        logging.info(
            f"the S3 store at {store[0] or 'AWS'} does not support checksum fields ({reason}); from now on uploads are "
            "verified by MD5 and size (AWS_REQUEST_CHECKSUM_CALCULATION=when_required does so from the start)"
        )
    return result


def _is_refusal(error: BaseException | None) -> bool:
    """Return whether an error may be a store's answer to checksum fields; other causes then fail again."""
    if error is None or isinstance(error, ChecksumsIgnored):
        return error is not None
    is_refused = status_code(error) in (400, 411, 501) or error_code(error) == "SignatureDoesNotMatch"
    return is_refused or _is_refusal(error.__cause__)  # s3fs raises built-in exceptions from botocore's


def content_md5(data: bytes) -> str:
    """Return the value of a Content-MD5 header."""
    return b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def check_etag(response: Mapping[str, Any], data: bytes) -> None:
    """Raise IncompleteTransfer if the ETag in the response to an upload is the MD5 of other data.

    An ETag of another form, or of an encrypted object, is no MD5; then only the store has checked Content-MD5.
    """
    etag = strip_etag(response.get("ETag")).lower()
    if not re.fullmatch(r"[0-9a-f]{32}", etag) or "ServerSideEncryption" in response:
        return
    expected = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if etag != expected:
        raise IncompleteTransfer(f"checksum mismatch after upload: the store has MD5 {etag}, expected {expected}")


def multipart_etag(etags: list[str]) -> str:
    """Return the ETag of an object that consists of parts with these ETags; empty if they are no MD5s."""
    try:
        digests = b"".join(bytes.fromhex(strip_etag(etag)) for etag in etags)
    except ValueError:
        return ""
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(etags)}"
