"""S3 through boto3, which (unlike an event loop) works in forked data workers. Every request is retried separately."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import IO, Any, TypeVar

from open_lm.errors import StorageError
from open_lm.storage.checksums import (
    CONFIG_OPTIONS,
    ChecksumsIgnored,
    check_etag,
    content_md5,
    environment_settings,
    multipart_etag,
    negotiate,
    store_key,
)
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

    def read_range(self, url: str, start: int, length: int) -> list[bytes]:
        return _fetch(FileInfo(url, -1, 0.0), start, length, self._timeout_s)

    def info(self, url: str) -> FileInfo | None:
        connection = _connect(SOCKET_TIMEOUT_FACTOR * self._timeout_s)

        def request_head() -> Any:
            return run_with_stall_timeout(
                lambda _: connection.client.head_object(**_location(url)), url, self._timeout_s
            )

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
            page = _request(_connect(), "list_objects_v2", **options)
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

        def put(plain: bool) -> None:
            connection = _connect(plain=plain)
            send = partial(_put_parts, size=size) if size > 2 * _PART_BYTES else _put_single
            expected = send(connection, path, url)
            with_retries(partial(_verify, connection, url, size, expected))

        negotiate(put)

    def remove(self, url: str) -> None:
        _request(_connect(), "delete_object", **_location(url))


# ---------------------------------------------------------------------------------------------- reading
def _fetch(file_info: FileInfo, start: int, length: int, timeout_s: float = READ_TIMEOUT_S) -> list[bytes]:
    """Return one range of a file in chunks. Raise an error if the file is not the one that `file_info` describes.

    Another size raises SizeMismatch; another ETag is the store's "precondition failed".
    """
    options = _location(file_info.url)
    if (start, length) != (0, file_info.size):
        options["Range"] = f"bytes={start}-{start + length - 1}"
    if file_info.etag:
        options["IfMatch"] = f'"{file_info.etag}"'

    def fetch(client: Any, heartbeat: Callable[[], None]) -> list[bytes]:
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

    def fetch_with_retries(plain: bool) -> list[bytes]:
        client = _connect(SOCKET_TIMEOUT_FACTOR * timeout_s, plain).client
        return with_retries(lambda: run_with_stall_timeout(partial(fetch, client), file_info.url, timeout_s))

    return negotiate(fetch_with_retries)


# ---------------------------------------------------------------------------------------------- writing
def _put_single(connection: _Connection, path: str, url: str) -> dict[str, str]:
    """Upload a file with one request, and return the fields that identify it in the store's information."""
    with open(path, "rb") as file:
        data = file.read()
    sent = _send(connection, "put_object", data, **_location(url))
    return {name: sent[name] for name in ("ChecksumCRC32",) if name in sent}


def _put_parts(connection: _Connection, path: str, url: str, size: int) -> dict[str, str]:
    """Upload a large file in parts; the object appears when all parts are stored. Return what `_put_single` does."""
    location = _location(url)
    part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
    algorithm = {"ChecksumAlgorithm": "CRC32"} if connection.checksums else {}
    started = _request(connection, "create_multipart_upload", **location, **algorithm)
    upload = {**location, "UploadId": started["UploadId"]}

    def send(number: int) -> dict[str, Any]:
        with open(path, "rb") as file:
            file.seek((number - 1) * part_bytes)
            data = file.read(part_bytes)
        return {"PartNumber": number, **_send(connection, "upload_part", data, **upload, PartNumber=number)}

    try:
        if algorithm and "ChecksumAlgorithm" not in started:
            raise ChecksumsIgnored("the store ignores them")
        parts = _map_parallel(send, range(1, -(-size // part_bytes) + 1))
        return _complete(connection, upload, parts)
    except BaseException:
        _abort(connection, upload)
        raise


def _send(connection: _Connection, operation: str, data: bytes, **options: Any) -> dict[str, str]:
    """Upload data with one request, and return its ETag and, if the store knows it, its CRC-32.

    Raises:
        ChecksumsIgnored: the store did not acknowledge the CRC-32, so it has not compared it either.
    """
    if connection.checksums:
        checksum = {"ChecksumCRC32": _checksum(data)}
        response = _request(connection, operation, **options, Body=data, ChecksumAlgorithm="CRC32", **checksum)
        if "ChecksumCRC32" not in response:
            raise ChecksumsIgnored("the store ignores them")
        return {"ETag": response["ETag"], **checksum}
    md5 = content_md5(data)

    def send() -> dict[str, Any]:
        response = _request_once(connection, operation, **options, Body=data, ContentMD5=md5)
        check_etag(response, data)
        return response

    return {"ETag": with_retries(send)["ETag"]}


def _complete(connection: _Connection, upload: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, str]:
    """Join the parts to one object, and return the fields that identify it."""
    etag = {}
    try:
        _request(connection, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
    except Exception as error:
        if error_code(error) != "NoSuchUpload":
            raise
        # A retry, after the response to the completion was lost. Only the ETag shows whether the object is this one.
        etag = {"ETag": multipart_etag([part["ETag"] for part in parts])}
    if not connection.checksums:
        return etag
    return {"ChecksumCRC32": _checksum(b"".join(base64.b64decode(part["ChecksumCRC32"]) for part in parts))}


def _abort(connection: _Connection, upload: dict[str, Any]) -> None:
    try:
        _request(connection, "abort_multipart_upload", **upload)
    except Exception as error:
        if error_code(error) != "NoSuchUpload":
            logging.warning(
                f"s3://{upload['Bucket']}/{upload['Key']}: the parts of a failed upload could not be removed "
                f"({error}) and still use storage; abort the multipart upload {upload['UploadId']} by hand"
            )


def _verify(connection: _Connection, url: str, size: int, expected: Mapping[str, str]) -> None:
    """Check the size of an uploaded object, and the `expected` fields that the store reports."""
    mode = {"ChecksumMode": "ENABLED"} if connection.checksums and connection.validates else {}
    try:
        head = connection.client.head_object(**_location(url), **mode)
    except Exception as error:
        if status_code(error) != 404:
            raise
        raise IncompleteTransfer(f"sent {size} bytes, but the store has no such file after the upload") from None
    if head["ContentLength"] != size:
        raise IncompleteTransfer(f"sent {size} bytes, but the store has {head['ContentLength']} bytes after the upload")
    for field, value in expected.items():
        stored = strip_etag(head.get(field, value))
        if field == "ChecksumCRC32":
            stored = stored.partition("-")[0]  # the suffix "-N" means: of N parts
        if value and stored != value:
            name = field.removeprefix("Checksum")
            raise IncompleteTransfer(f"checksum mismatch after upload: the store has {name} {stored}, expected {value}")


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
@dataclass(frozen=True)
class _Connection:
    """A boto3 client, and whether uploads through it carry checksums and reads validate them."""

    client: Any
    checksums: bool
    validates: bool


def _request(connection: _Connection, operation: str, **options: Any) -> dict[str, Any]:
    return with_retries(partial(_request_once, connection, operation, **options))


def _request_once(connection: _Connection, operation: str, **options: Any) -> dict[str, Any]:
    response: dict[str, Any] = getattr(connection.client, operation)(**options)
    return response


_connections: dict[tuple[Any, ...], _Connection] = {}
_locks: dict[int, threading.Lock] = {}


def _connect(timeout_s: float = READ_TIMEOUT_S, plain: bool = False) -> _Connection:
    """Return this process's connection for a timeout and the current environment; `plain` is without checksum fields.

    Forked processes must not share one.
    """
    import boto3
    from botocore.config import Config

    key = (os.getpid(), timeout_s, plain, *store_key(), *environment_settings())
    # One lock per process: a lock that another thread holds during a fork stays locked in the child.
    with _locks.setdefault(os.getpid(), threading.Lock()):
        if key not in _connections:
            config = Config(connect_timeout=10, read_timeout=timeout_s, max_pool_connections=32,
                            retries={"mode": "standard", "total_max_attempts": 1},  # with_retries retries
                            **(plain_config() if plain else {}))  # fmt: skip
            client = _new_session(boto3).client("s3", config=config)
            # botocore has read these from the environment or its configuration file; older versions have neither.
            calculates, validates = (
                not plain and getattr(client.meta.config, name, None) != "when_required" for name in CONFIG_OPTIONS
            )
            _connections[key] = _Connection(client, calculates, validates)
        return _connections[key]


def service() -> tuple[str, bool]:
    """Return the URL of the configured service, and whether there are credentials. Asks at most the machine's cloud."""
    import boto3

    session = _new_session(boto3)
    return str(session.client("s3").meta.endpoint_url), session.get_credentials() is not None


_service_descriptions: list[Any] = []  # botocore's loader, whose content forked processes share


def _new_session(boto3: Any) -> Any:
    """Return a new session with the settings of the environment.

    Most of the time to create a client is spent on reading the descriptions of services, which all sessions share.
    """
    from botocore.session import get_session

    session = get_session()
    if _service_descriptions:
        session.register_component("data_loader", _service_descriptions[0])
    else:
        _service_descriptions.append(session.get_component("data_loader"))
    return boto3.session.Session(botocore_session=session)


def plain_config() -> dict[str, str]:
    """Return the options of a botocore Config that leave out checksum fields."""
    from botocore.config import Config

    return {name: "when_required" for name in CONFIG_OPTIONS if name in Config.OPTION_DEFAULTS}


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
