"""S3 through boto3, which (unlike an event loop) works in forked data workers. Every request is retried separately."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import IO, Any, TypeVar

from open_lm.errors import StorageError
from open_lm.storage.paths import (
    READ_TIMEOUT_S,
    SOCKET_TIMEOUT_FACTOR,
    FileInfo,
    RangeReader,
    read_chunks,
    read_in_parts,
    strip_etag,
)
from open_lm.storage.retries import (
    IncompleteTransfer,
    SizeMismatch,
    error_code,
    run_with_stall_timeout,
    status_code,
    with_retries,
)

T = TypeVar("T")
_PART_BYTES = 16 << 20
_MAX_PARTS = 10_000  # S3's limit
_NUM_PARALLEL = 8


class S3Backend:
    """An S3-compatible object store; the endpoint and the credentials come from the environment."""

    def __init__(self, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def open(self, url: str) -> IO[bytes]:
        file_info = self.info(url)
        if file_info is None:
            raise FileNotFoundError(url)
        return RangeReader(file_info, lambda start, length: b"".join(_fetch(file_info, start, length))).buffered()

    def read_range(self, url: str, start: int, length: int) -> bytes:
        return b"".join(_fetch(FileInfo(url, -1, 0.0), start, length))

    def info(self, url: str) -> FileInfo | None:
        client = _client(SOCKET_TIMEOUT_FACTOR * self._timeout_s)

        def request_head() -> Any:
            return run_with_stall_timeout(lambda _: client.head_object(**_location(url)), url, self._timeout_s)

        try:
            head = with_retries(request_head)
        except Exception as error:
            if status_code(error) == 404:
                return None
            raise
        return FileInfo(url, head["ContentLength"], head["LastModified"].timestamp(), strip_etag(head.get("ETag")))

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        bucket, key = _split(url, allow_bucket=True)
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        yield from self._list(bucket, prefix, "" if recursive else "/")

    def _list(self, bucket: str, prefix: str, delimiter: str = "") -> Iterator[FileInfo]:
        options = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
        while True:
            page = _request("list_objects_v2", **options)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # some tools write empty objects as folder markers
                    url, mtime_s = f"s3://{bucket}/{item['Key']}", item["LastModified"].timestamp()
                    yield FileInfo(url, item["Size"], mtime_s, strip_etag(item.get("ETag")))
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        bucket, key = _split(pattern)
        regex = _glob_regex(f"s3://{bucket}/{key}")
        prefix = re.split(r"[*?\[]", key, maxsplit=1)[0]
        one_folder = not re.search(r"/|\*\*", key[len(prefix) :])  # then do not list the folders below
        return (item for item in self._list(bucket, prefix, "/" if one_folder else "") if regex.fullmatch(item.url))

    def parts(self, file_info: FileInfo) -> Iterator[bytes]:
        parts = read_in_parts(partial(_fetch, file_info, timeout_s=self._timeout_s), file_info.size)
        return chain.from_iterable(parts)

    def put(self, path: str, url: str) -> None:
        size = os.path.getsize(path)
        checksum = _put_parts(path, size, url) if size > 2 * _PART_BYTES else _put_single(path, url)
        with_retries(partial(_verify, url, size, checksum))

    def remove(self, url: str) -> None:
        _request("delete_object", **_location(url))


# ---------------------------------------------------------------------------------------------- reading
def _fetch(file_info: FileInfo, start: int, length: int, timeout_s: float = READ_TIMEOUT_S) -> list[bytes]:
    """Return one range of a file in chunks. Raise an error if the file is not the one that `file_info` describes.

    Another size raises SizeMismatch; another ETag is the store's "precondition failed".
    """
    client = _client(SOCKET_TIMEOUT_FACTOR * timeout_s)
    options = _location(file_info.url)
    if (start, length) != (0, file_info.size):
        options["Range"] = f"bytes={start}-{start + length - 1}"
    if file_info.etag:
        options["IfMatch"] = f'"{file_info.etag}"'

    def fetch(heartbeat: Callable[[], None]) -> list[bytes]:
        response = client.get_object(**options)
        with contextlib.closing(response["Body"]) as body:
            size = int(response.get("ContentRange", "").rpartition("/")[2] or response["ContentLength"])
            if file_info.size not in (-1, size):
                raise SizeMismatch(file_info.url, size, file_info.size)
            data = list(read_chunks(body.read, heartbeat))
        # A file of unknown size may end before `length` bytes.
        expected = length if file_info.size >= 0 else response["ContentLength"]
        received = sum(map(len, data))
        if received != expected:
            raise IncompleteTransfer(f"requested {length} bytes at offset {start}, received {received}")
        return data

    return with_retries(lambda: run_with_stall_timeout(fetch, file_info.url, timeout_s))


# ---------------------------------------------------------------------------------------------- writing
def _put_single(path: str, url: str) -> str:
    """Upload a file with one request, and return its checksum."""
    with open(path, "rb") as file:
        data = file.read()
    checksum = _checksum(data)
    _request("put_object", **_location(url), Body=data, ChecksumAlgorithm="CRC32", ChecksumCRC32=checksum)
    return checksum


def _put_parts(path: str, size: int, url: str) -> str:
    """Upload a large file in parts; the object appears when all parts are stored. Return their combined checksum."""
    location = _location(url)
    part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
    started = _request("create_multipart_upload", **location, ChecksumAlgorithm="CRC32")
    upload = {**location, "UploadId": started["UploadId"]}

    def send(number: int) -> dict[str, Any]:
        with open(path, "rb") as file:
            file.seek((number - 1) * part_bytes)
            data = file.read(part_bytes)
        part = {"PartNumber": number, "ChecksumCRC32": _checksum(data)}
        response = _request("upload_part", **upload, **part, Body=data, ChecksumAlgorithm="CRC32")
        return {**part, "ETag": response["ETag"]}

    try:
        parts = _map_parallel(send, range(1, -(-size // part_bytes) + 1))
        try:
            _request("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
        except Exception as error:
            if error_code(error) != "NoSuchUpload":  # a retry, after the response to the completion was lost
                raise
    except BaseException:
        _abort(upload)
        raise
    return _checksum(b"".join(base64.b64decode(part["ChecksumCRC32"]) for part in parts))


def _abort(upload: dict[str, Any]) -> None:
    try:
        _request("abort_multipart_upload", **upload)
    except Exception as error:
        if error_code(error) != "NoSuchUpload":
            logging.warning(
                f"s3://{upload['Bucket']}/{upload['Key']}: the parts of a failed upload could not be removed "
                f"({error}) and still use storage; abort the multipart upload {upload['UploadId']} by hand"
            )


def _verify(url: str, size: int, checksum: str) -> None:
    """Check the size of an uploaded object, and its checksum if the store keeps one."""
    try:
        head = _client().head_object(**_location(url), ChecksumMode="ENABLED")
    except Exception as error:
        if status_code(error) != 404:
            raise
        raise IncompleteTransfer(f"sent {size} bytes, but the store has no such file after the upload") from None
    if head["ContentLength"] != size:
        raise IncompleteTransfer(f"sent {size} bytes, but the store has {head['ContentLength']} bytes after the upload")
    stored = head.get("ChecksumCRC32", checksum).partition("-")[0]  # the suffix "-N" means: of N parts
    if stored != checksum:
        raise IncompleteTransfer(f"checksum mismatch after upload: the store has CRC32 {stored}, expected {checksum}")


def _checksum(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _map_parallel(action: Callable[[int], T], items: Sequence[int]) -> list[T]:
    """Call `action` on all items in threads and return the results; the first error cancels the rest."""
    with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------- requests
def _request(operation: str, **options: Any) -> dict[str, Any]:
    return with_retries(lambda: getattr(_client(), operation)(**options))


_clients: dict[tuple[int, float, str | None, str | None], Any] = {}
_locks: dict[int, threading.Lock] = {}


def _client(timeout_s: float = READ_TIMEOUT_S) -> Any:
    """Return this process's client for a timeout and the current environment (forked processes must not share one)."""
    import boto3
    from botocore.config import Config

    key = (os.getpid(), timeout_s, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
           os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE"))  # fmt: skip
    # One lock per process: a lock that another thread holds during a fork stays locked in the child.
    with _locks.setdefault(os.getpid(), threading.Lock()):
        if key not in _clients:
            config = Config(connect_timeout=10, read_timeout=timeout_s, max_pool_connections=32,
                            retries={"mode": "standard", "total_max_attempts": 1})  # fmt: skip  # with_retries retries
            _clients[key] = boto3.session.Session().client("s3", config=config)
        return _clients[key]


def _location(url: str) -> dict[str, Any]:
    bucket, key = _split(url)
    return {"Bucket": bucket, "Key": key}


def _split(url: str, allow_bucket: bool = False) -> tuple[str, str]:
    """Return (bucket, key) of a URL."""
    bucket, _, key = url.split("://", 1)[1].partition("/")
    if not bucket or (not key and not allow_bucket):
        raise StorageError(f"{url}: expected s3://bucket/key")
    return bucket, key


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob pattern: `*` and `?` match within a folder, `**/` any folders, `[…]` one character of a set."""
    token = re.compile(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]")
    translation = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts, end = [], 0
    for match in token.finditer(pattern):
        text = match.group()
        parts.append(re.escape(pattern[end : match.start()]))
        parts.append(translation.get(text) or ("[^" + text[2:] if text[1] in "!^" else text).replace("\\", r"\\"))
        end = match.end()
    return re.compile("".join(parts) + re.escape(pattern[end:]), re.DOTALL)
