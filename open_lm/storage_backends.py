"""What `open_lm.storage` stands on: the file systems themselves.

Only this module knows boto3 and fsspec; nothing but `open_lm.storage` calls it.
"""

from __future__ import annotations

import contextlib
import glob as local_glob
import io
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from open_lm.errors import StorageError
from open_lm.storage_errors import IncompleteTransfer, explained, status_code, with_retries

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
TEMP_MARK = ".open-lm-part-"
_READ_BLOCK_BYTES = 8 << 20
_PART_BYTES = 32 << 20
# Before a scheme: reach it through fsspec, also where this module knows another way (s3).
FSSPEC_PREFIX = "fsspec+"
# fsspec file systems without folders, on which a new object replaces the old one in a single act.
_OBJECT_STORES = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf"})


@dataclass(frozen=True)
class FileInfo:
    """One file: its address, size in bytes, time of last change (seconds since the epoch) and the store's tag.

    The tag changes with the content. An unknown size is -1, an unknown time 0.0, an unknown tag empty.
    """

    url: str
    size: int
    mtime_s: float
    etag: str = ""


class _Backend(Protocol):
    def open(self, url: str) -> IO[bytes]: ...
    def info(self, url: str) -> FileInfo | None: ...
    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]: ...
    def glob(self, pattern: str) -> Iterator[FileInfo]: ...
    def get(self, url: str, local_path: str) -> None: ...
    def put(self, local_path: str, url: str) -> None: ...
    def remove(self, url: str) -> None: ...


def local_path(url: str | os.PathLike[str]) -> str:
    """The file-system path of a local address, without `file://`."""
    text = os.fspath(url)
    return text[len("file://") :] if text.lower().startswith("file://") else text


def is_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def is_temporary(name: str | os.PathLike[str]) -> bool:
    """Whether a file is one of `atomic_write`'s or `download`'s that is not complete yet (or was left by a crash)."""
    return TEMP_MARK in os.path.basename(os.fspath(name))


def temporary_name(target: str, tag: str) -> str:
    """The name of an incomplete or passing file beside `target`, which `is_temporary` knows."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}{TEMP_MARK}{tag}")


# ---------------------------------------------------------------------------------------------- file systems
def find_backend(url: str) -> _Backend:
    match = SCHEME.match(url)
    scheme = match.group(1).lower() if match else "file"
    if scheme == "file":
        return _LocalBackend()
    return _S3Backend() if scheme in ("s3", "s3a") else _FsspecBackend(scheme)


class _LocalBackend:
    def open(self, url: str) -> IO[bytes]:
        return open(local_path(url), "rb")

    def info(self, url: str) -> FileInfo | None:
        path = local_path(url)
        if not os.path.isfile(path):
            return None
        status = os.stat(path)
        return FileInfo(path, status.st_size, status.st_mtime)

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        pattern = Path(local_path(url)).rglob("*") if recursive else Path(local_path(url)).glob("*")
        for path in pattern:
            with contextlib.suppress(FileNotFoundError):  # removed while we look
                found = self.info(str(path))
                if found is not None and not is_temporary(path):
                    yield found

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        for path in local_glob.iglob(local_path(pattern), recursive=True):
            with contextlib.suppress(FileNotFoundError):  # removed while we look
                found = self.info(path)
                if found is not None:
                    yield found

    def get(self, url: str, local_path_: str) -> None:
        shutil.copyfile(local_path(url), local_path_)

    def put(self, local_path_: str, url: str) -> None:
        shutil.copyfile(local_path_, local_path(url))

    def remove(self, url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(local_path(url))


class _S3Backend:
    """S3 through boto3, which (unlike an event loop) survives the forks of data workers."""

    def open(self, url: str) -> IO[bytes]:
        found = self.info(url)
        if found is None:
            raise FileNotFoundError(url)
        return io.BufferedReader(_S3Reader(url, found.size), buffer_size=_READ_BLOCK_BYTES)

    def info(self, url: str) -> FileInfo | None:
        bucket, key = _split_s3(url)
        try:
            head = _s3_client().head_object(Bucket=bucket, Key=key)
        except Exception as error:
            if status_code(error) == 404:
                return None
            raise
        return FileInfo(url, head["ContentLength"], head["LastModified"].timestamp(), _etag(head))

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        bucket, key = _split_s3(url, allow_bucket=True)
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        yield from self._list(bucket, prefix, "" if recursive else "/")

    def _list(self, bucket: str, prefix: str, delimiter: str = "") -> Iterator[FileInfo]:
        pages = _s3_client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # the empty markers some tools write for folders
                    url, changed = f"s3://{bucket}/{item['Key']}", item["LastModified"].timestamp()
                    yield FileInfo(url, item["Size"], changed, _etag(item))

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        bucket, key = _split_s3(pattern)
        wanted = _glob_regex(f"s3://{bucket}/{key}")
        prefix = re.split(r"[*?\[]", key, maxsplit=1)[0]
        return (item for item in self._list(bucket, prefix) if wanted.fullmatch(item.url))

    def get(self, url: str, local_path_: str) -> None:
        bucket, key = _split_s3(url)
        _s3_client().download_file(bucket, key, local_path_, Config=_transfer_config())

    def put(self, local_path_: str, url: str) -> None:
        from boto3.exceptions import S3UploadFailedError

        bucket, key = _split_s3(url)
        try:
            _s3_client().upload_file(local_path_, bucket, key, Config=_transfer_config())
        except S3UploadFailedError as error:
            raise error.__context__ or error from None  # the reason, which decides about another try

    def remove(self, url: str) -> None:
        bucket, key = _split_s3(url)
        _s3_client().delete_object(Bucket=bucket, Key=key)


class _S3Reader(io.RawIOBase):
    """A seekable S3 object: each read is one ranged request, retried on its own."""

    def __init__(self, url: str, size_bytes: int) -> None:
        super().__init__()
        self._url = url
        self._bucket, self._key = _split_s3(url)
        self._size = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        with explained(self._url):
            data = with_retries(partial(self._fetch, self._position, wanted))
        buffer[:wanted] = data
        self._position += wanted
        return wanted

    def _fetch(self, start: int, length: int) -> bytes:
        span = f"bytes={start}-{start + length - 1}"
        data: bytes = _s3_client().get_object(Bucket=self._bucket, Key=self._key, Range=span)["Body"].read()
        if len(data) != length:
            raise IncompleteTransfer(f"{length} bytes were asked for at {start}, {len(data)} arrived")
        return data


def _etag(entry: dict[str, Any]) -> str:
    return str(entry.get("ETag") or entry.get("etag") or "").strip('"')


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


_clients: dict[tuple[int, str | None, str | None], Any] = {}
_locks: dict[int, threading.Lock] = {}


def _s3_client() -> Any:
    """The process's own client (a forked one must not share sockets), per endpoint and key of the environment."""
    import boto3
    from botocore.config import Config

    key = (os.getpid(), os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
           os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE"))  # fmt: skip
    # A lock of this process alone: one that another thread held during a fork would stay locked in the child.
    with _locks.setdefault(os.getpid(), threading.Lock()):
        if key not in _clients:
            config = Config(connect_timeout=10, read_timeout=60, max_pool_connections=32,
                            retries={"mode": "standard", "total_max_attempts": 3})  # fmt: skip
            _clients[key] = boto3.session.Session().client("s3", config=config)
        return _clients[key]


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=2 * _PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=8)


def _split_s3(url: str, allow_bucket: bool = False) -> tuple[str, str]:
    bucket, _, key = url.split("://", 1)[1].partition("/")
    if not bucket or (not key and not allow_bucket):
        raise StorageError(f"{url}: expected s3://bucket/key")
    return bucket, key


class _FsspecBackend:
    """Every other scheme, through fsspec; its listings are never taken from a cache."""

    def __init__(self, scheme: str) -> None:
        import fsspec

        self._scheme = scheme.removeprefix(FSSPEC_PREFIX)
        self._prefix = scheme[: -len(self._scheme)]  # of the addresses given and returned
        self._fs = fsspec.filesystem(self._scheme, use_listings_cache=False)

    def _own(self, url: str) -> str:
        """The address as fsspec knows it."""
        return url[len(self._prefix) :]

    def _url(self, name: str) -> str:
        return self._prefix + self._fs.unstrip_protocol(name)

    def _file_info(self, entry: dict[str, Any], url: str) -> FileInfo:
        changed = entry.get("mtime") or entry.get("LastModified") or entry.get("last_modified") or entry.get("created")
        mtime = changed.timestamp() if isinstance(changed, datetime) else 0.0
        if isinstance(changed, int | float):
            mtime = float(changed)
        return FileInfo(url, -1 if entry.get("size") is None else int(entry["size"]), mtime, _etag(entry))

    def open(self, url: str) -> IO[bytes]:
        return self._fs.open(self._own(url), "rb")

    def info(self, url: str) -> FileInfo | None:
        try:
            entry = self._fs.info(self._own(url))
        except FileNotFoundError:
            return None
        return self._file_info(entry, url) if entry["type"] == "file" else None

    def walk(self, url: str, recursive: bool) -> Iterator[FileInfo]:
        self._expect_listable(url)
        try:
            found = self._fs.find(self._own(url), maxdepth=None if recursive else 1, detail=True)
        except FileNotFoundError:
            return
        for name, entry in found.items():
            if entry["type"] == "file":
                yield self._file_info(entry, self._url(name))

    def glob(self, pattern: str) -> Iterator[FileInfo]:
        self._expect_listable(pattern)
        for name, entry in self._fs.glob(self._own(pattern), detail=True).items():
            if entry["type"] == "file":
                yield self._file_info(entry, self._url(name))

    def _expect_listable(self, url: str) -> None:
        if is_web(self._own(url)):  # fsspec would guess from the links of whatever page is there
            raise StorageError(f"{url}: files on a web server cannot be listed; name each file by its whole address")

    def get(self, url: str, local_path_: str) -> None:
        self._fs.get_file(self._own(url), local_path_)

    def put(self, local_path_: str, url: str) -> None:
        target = self._own(url)
        if self._scheme in _OBJECT_STORES:
            self._fs.put_file(local_path_, target)
            return
        parent, _, name = target.rpartition("/")
        self._fs.makedirs(parent, exist_ok=True)
        temporary = f"{parent}/.{name}{TEMP_MARK}{os.getpid()}"
        self._fs.put_file(local_path_, temporary)
        self._fs.mv(temporary, target)

    def remove(self, url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._own(url))
