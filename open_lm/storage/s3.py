"""S3 through boto3, which (unlike an event loop) survives the forks of data workers. Every request is retried alone."""

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
from open_lm.storage.paths import GIVEN_UP, READ_TIMEOUT_S, FileInfo, RangeReader, plain_tag, read_chunks, read_in_parts
from open_lm.storage.retries import IncompleteTransfer, OtherSize, error_code, status_code, watched, with_retries

T = TypeVar("T")
_PART_BYTES = 16 << 20
_MOST_PARTS = 10_000  # S3's own limit
_AT_ONCE = 8


class S3Backend:
    def __init__(self, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def open(self, url: str) -> IO[bytes]:
        found = self.info(url)
        if found is None:
            raise FileNotFoundError(url)
        return RangeReader(found, lambda start, length: b"".join(_fetch(found, start, length))).buffered()

    def read_range(self, url: str, start: int, length: int) -> bytes:
        return b"".join(_fetch(FileInfo(url, -1, 0.0), start, length))

    def info(self, url: str) -> FileInfo | None:
        client = _client(GIVEN_UP * self._timeout_s)
        try:
            head = with_retries(lambda: watched(lambda _: client.head_object(**_place(url)), url, self._timeout_s))
        except Exception as error:
            if status_code(error) == 404:
                return None
            raise
        return FileInfo(url, head["ContentLength"], head["LastModified"].timestamp(), plain_tag(head.get("ETag")))

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        bucket, key = _split(url, allow_bucket=True)
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        yield from self._list(bucket, prefix, "" if recursive else "/")

    def _list(self, bucket: str, prefix: str, delimiter: str = "") -> Iterator[FileInfo]:
        where = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
        while True:
            page = _request("list_objects_v2", **where)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # the empty markers some tools write for folders
                    url, changed = f"s3://{bucket}/{item['Key']}", item["LastModified"].timestamp()
                    yield FileInfo(url, item["Size"], changed, plain_tag(item.get("ETag")))
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        bucket, key = _split(pattern)
        wanted = _glob_regex(f"s3://{bucket}/{key}")
        prefix = re.split(r"[*?\[]", key, maxsplit=1)[0]
        one_folder = not re.search(r"/|\*\*", key[len(prefix) :])  # what is in the folders below is not even listed
        return (item for item in self._list(bucket, prefix, "/" if one_folder else "") if wanted.fullmatch(item.url))

    def parts(self, found: FileInfo) -> Iterator[bytes]:
        parts = read_in_parts(partial(_fetch, found, timeout_s=self._timeout_s), found.size)
        return chain.from_iterable(parts)

    def put(self, path: str, url: str) -> None:
        size = os.path.getsize(path)
        checksum = _put_parts(path, size, url) if size > 2 * _PART_BYTES else _put_whole(path, url)
        with_retries(partial(_verify, url, size, checksum))

    def remove(self, url: str) -> None:
        _request("delete_object", **_place(url))


# ---------------------------------------------------------------------------------------------- reading
def _fetch(found: FileInfo, start: int, length: int, timeout_s: float = READ_TIMEOUT_S) -> list[bytes]:
    """One range of a file that is still the one `found` describes, in pieces; OtherSize where it is not that long."""
    client = _client(GIVEN_UP * timeout_s)
    options = _place(found.url)
    if (start, length) != (0, found.size):
        options["Range"] = f"bytes={start}-{start + length - 1}"
    if found.etag:
        options["IfMatch"] = f'"{found.etag}"'

    def fetch(alive: Callable[[], None]) -> list[bytes]:
        answer = client.get_object(**options)
        with contextlib.closing(answer["Body"]) as body:
            size = int(answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"])
            if found.size not in (-1, size):
                raise OtherSize(found.url, size, found.size)
            data = list(read_chunks(body.read, alive))
        expected = length if found.size >= 0 else answer["ContentLength"]  # an unknown file may end before
        arrived = sum(map(len, data))
        if arrived != expected:
            raise IncompleteTransfer(f"{length} bytes were asked for at {start}, {arrived} arrived")
        return data

    return with_retries(lambda: watched(fetch, found.url, timeout_s))


# ---------------------------------------------------------------------------------------------- writing
def _put_whole(path: str, url: str) -> str:
    with open(path, "rb") as file:
        data = file.read()
    checksum = _checksum(data)
    _request("put_object", **_place(url), Body=data, ChecksumAlgorithm="CRC32", ChecksumCRC32=checksum)
    return checksum


def _put_parts(path: str, size: int, url: str) -> str:
    """Send a large file in parts; the object appears when all are there. Returns the checksum of their checksums."""
    place = _place(url)
    part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
    started = _request("create_multipart_upload", **place, ChecksumAlgorithm="CRC32")
    upload = {**place, "UploadId": started["UploadId"]}

    def send(number: int) -> dict[str, Any]:
        with open(path, "rb") as file:
            file.seek((number - 1) * part_bytes)
            data = file.read(part_bytes)
        part = {"PartNumber": number, "ChecksumCRC32": _checksum(data)}
        answer = _request("upload_part", **upload, **part, Body=data, ChecksumAlgorithm="CRC32")
        return {**part, "ETag": answer["ETag"]}

    try:
        parts = _at_once(send, range(1, -(-size // part_bytes) + 1))
        try:
            _request("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
        except Exception as error:
            if error_code(error) != "NoSuchUpload":  # it was completed, and the answer got lost
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
                f"({error}); abort the multipart upload {upload['UploadId']} by hand, or they go on taking space"
            )


def _verify(url: str, size: int, checksum: str) -> None:
    """Compare what the store holds; one that keeps no checksum is asked for the size alone."""
    try:
        head = _client().head_object(**_place(url), ChecksumMode="ENABLED")
    except Exception as error:
        if status_code(error) != 404:
            raise
        raise IncompleteTransfer(f"{size} bytes were sent, the store holds nothing") from None
    if head["ContentLength"] != size:
        raise IncompleteTransfer(f"{size} bytes were sent, the store holds {head['ContentLength']}")
    stored = head.get("ChecksumCRC32", checksum).partition("-")[0]  # "-N": of N parts
    if stored != checksum:
        raise IncompleteTransfer(f"the store holds other bytes than were sent (CRC32 {stored}, expected {checksum})")


def _checksum(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def _at_once(action: Callable[[int], T], items: Sequence[int]) -> list[T]:
    """`action` of every item, some at the same time; the first that fails ends them all."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
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
    """The process's own client (a forked one must not share sockets), per timeout and what the environment says."""
    import boto3
    from botocore.config import Config

    key = (os.getpid(), timeout_s, os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
           os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE"))  # fmt: skip
    # A lock of this process alone: one that another thread held during a fork would stay locked in the child.
    with _locks.setdefault(os.getpid(), threading.Lock()):
        if key not in _clients:
            config = Config(connect_timeout=10, read_timeout=timeout_s, max_pool_connections=32,
                            retries={"mode": "standard", "total_max_attempts": 1})  # fmt: skip  # with_retries does it
            _clients[key] = boto3.session.Session().client("s3", config=config)
        return _clients[key]


def _place(url: str) -> dict[str, Any]:
    bucket, key = _split(url)
    return {"Bucket": bucket, "Key": key}


def _split(url: str, allow_bucket: bool = False) -> tuple[str, str]:
    bucket, _, key = url.split("://", 1)[1].partition("/")
    if not bucket or (not key and not allow_bucket):
        raise StorageError(f"{url}: expected s3://bucket/key")
    return bucket, key


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay inside a folder, `**/` crosses any number of them, `[…]` is one of some characters."""
    token = re.compile(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]")
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts, end = [], 0
    for found in token.finditer(pattern):
        text = found.group()
        parts.append(re.escape(pattern[end : found.start()]))
        parts.append(meaning.get(text) or ("[^" + text[2:] if text[1] in "!^" else text).replace("\\", r"\\"))
        end = found.end()
    return re.compile("".join(parts) + re.escape(pattern[end:]), re.DOTALL)
