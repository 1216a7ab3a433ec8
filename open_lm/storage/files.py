"""Read and write local and remote files with one set of functions.

A path is a local path, a `file://` URL, an `s3://bucket/key` URL (boto3, with `AWS_ENDPOINT_URL` and the usual
credential chain), an `https://` URL (read-only) or any other `scheme://` that fsspec can open (gs, az, hf, memory, …).
`fsspec+s3://` accesses S3 through fsspec's s3fs, for users who configured s3fs. Every function accepts all of these
and raises `StorageError`, which names the path and says what to do. Writes are atomic: a file is never visible
half-written. `open_lm.storage.backends` implements the file systems; only it and the modules it imports use boto3 or
fsspec.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import uuid
from collections.abc import Generator, Iterator
from functools import partial
from typing import IO, Any

from open_lm.errors import StorageError
from open_lm.storage.backends import FSSPEC_PREFIX, find_backend, has_backend
from open_lm.storage.paths import (
    READ_TIMEOUT_S,
    SCHEME,
    FileInfo,
    is_temporary,
    is_web,
    parse_bytes,
    split_lines,
    temporary_name,
)
from open_lm.storage.retries import (
    IncompleteTransfer,
    SizeMismatch,
    Stalled,
    back_off,
    run_in_background,
    wrap_disk_full_errors,
    wrap_errors,
)
from open_lm.system.names import ESCAPE_ERRORS, local_path

__all__ = [
    "FSSPEC_PREFIX", "READ_TIMEOUT_S", "FileInfo", "SizeMismatch", "Stalled", "atomic_write", "back_off", "copy",
    "download", "exists", "glob", "glob_infos", "has_backend", "info", "is_remote", "is_temporary", "join",
    "list_files", "list_infos", "local_path", "makedirs", "open_file", "parse_bytes", "read_bytes", "read_lines",
    "read_parts", "read_range", "read_range_chunks", "read_text", "remove", "run_in_background", "size", "split_lines",
    "sync_folder", "temporary_name", "upload", "wrap_disk_full_errors", "write_bytes", "write_text",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- addresses
def is_remote(url: str | os.PathLike[str]) -> bool:
    """Return whether `url` is outside the local file system (`file://` is local)."""
    match = SCHEME.match(os.fspath(url))
    return match is not None and match.group(1).lower() != "file"


def join(base: str | os.PathLike[str], *parts: str) -> str:
    """Join `base` and `parts` with single slashes; accepts local paths and URLs."""
    text = os.fspath(base)
    if not is_remote(text):
        return os.path.join(local_path(text), *parts)
    return "/".join([text.rstrip("/"), *(part.strip("/") for part in parts)])


# ---------------------------------------------------------------------------------------------- reading
def open_file(url: str | os.PathLike[str], mode: str = "rb") -> IO[Any]:
    """Open a file for reading: "rb" for bytes, "r" for UTF-8 text. S3 files are seekable and read in ranges.

    Text is read like `read_text` does; line ends are not changed, and only "\\n" ends a line.
    Use `atomic_write` for writing.
    """
    if mode not in ("rb", "r", "rt"):
        raise ValueError(f"open_file only reads (found mode {mode!r}); use atomic_write to write {os.fspath(url)!r}")
    text = os.fspath(url)
    with wrap_errors(text):
        raw = find_backend(text).open(text)
    return raw if mode == "rb" else io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")


def read_bytes(url: str | os.PathLike[str]) -> bytes:
    """Return the content of a file."""
    text = os.fspath(url)
    with wrap_errors(text), find_backend(text).open(text) as file:
        return file.read()


def read_range(url: str | os.PathLike[str], start: int, length: int, timeout_s: float = READ_TIMEOUT_S) -> bytes:
    """Return `length` bytes from offset `start` (on S3 with one request); raise StorageError if the file is shorter.

    A read that receives no byte for `timeout_s` seconds is logged and retried.
    """
    return b"".join(read_range_chunks(url, start, length, timeout_s))


def read_range_chunks(
    url: str | os.PathLike[str], start: int, length: int, timeout_s: float = READ_TIMEOUT_S
) -> list[bytes]:
    """Return what `read_range` does in the chunks in which it was received, without a copy."""
    text = os.fspath(url)
    with wrap_errors(text):
        chunks = find_backend(text, timeout_s).read_range(text, start, length)
    received = sum(map(len, chunks))
    if received != length:
        raise StorageError(f"{text}: truncated: expected {length} bytes at offset {start}, found {received}")
    return chunks


def read_text(url: str | os.PathLike[str]) -> str:
    """Return the content of a UTF-8 text file, without a byte order mark at its start."""
    try:
        return read_bytes(url).decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise StorageError(f"{os.fspath(url)}: expected UTF-8 text, found {found}") from error


def read_lines(url: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a UTF-8 text file without their ends; see `split_lines`."""
    return split_lines(read_text(url))


def read_parts(file_info: FileInfo, timeout_s: float = READ_TIMEOUT_S) -> Generator[bytes, None, None]:
    """Yield the content of a file in order, in parts; several parts of a large remote file are fetched in parallel.

    `file_info` is the result of `info`. A FileInfo with only a URL and a size saves a request; SizeMismatch is raised
    if the file has another size. A read that receives no byte for `timeout_s` seconds is logged and retried.
    """
    num_bytes = 0
    with wrap_errors(file_info.url):
        for part in find_backend(file_info.url, timeout_s).parts(file_info):
            num_bytes += len(part)
            yield part
        if file_info.size not in (-1, num_bytes):
            raise IncompleteTransfer(f"the store reports {file_info.size} bytes, but {num_bytes} were received")


def info(url: str | os.PathLike[str], timeout_s: float = READ_TIMEOUT_S) -> FileInfo | None:
    """Return the size and modification time of a file, or None if it does not exist (a folder is not a file)."""
    text = os.fspath(url)
    with wrap_errors(text):
        return find_backend(text, timeout_s).info(text)


def size(url: str | os.PathLike[str]) -> int:
    """Return the size of a file in bytes; raise StorageError if it does not exist."""
    file_info = info(url)
    if file_info is None:
        raise StorageError(f"{os.fspath(url)}: no such file")
    return file_info.size


def exists(url: str | os.PathLike[str]) -> bool:
    """Return whether a file, or a folder with at least one file (locally: any folder), exists."""
    text = os.fspath(url)
    if not is_remote(text):
        return os.path.exists(local_path(text))
    if info(text) is not None:
        return True
    if is_web(text.removeprefix(FSSPEC_PREFIX)):
        return False  # a web server has no folders
    with wrap_errors(text):
        return next(find_backend(text).walk(text, True), None) is not None


def list_infos(url: str | os.PathLike[str], recursive: bool = False) -> list[FileInfo]:
    """Return the files in a folder, sorted by URL; an empty list if the folder does not exist.

    The information comes from the listing, without a request per file.
    """
    text = os.fspath(url)
    with wrap_errors(text):
        infos = list(find_backend(text).walk(text, recursive))
    return sorted(infos, key=lambda item: item.url)


def list_files(url: str | os.PathLike[str], recursive: bool = False) -> list[str]:
    """Return the URLs of the files in a folder, sorted; an empty list if the folder does not exist."""
    return [item.url for item in list_infos(url, recursive)]


def glob(pattern: str | os.PathLike[str]) -> list[str]:
    """Return the URLs of the files that match a pattern with `*`, `?`, `[…]` and `**`, sorted; possibly empty.

    Leading folders, or the complete pattern, that exist locally under their literal name are not a pattern.
    """
    return [item.url for item in glob_infos(pattern)]


def glob_infos(pattern: str | os.PathLike[str]) -> list[FileInfo]:
    """Return what `glob` returns, with each file's size, time and ETag from the store's listing."""
    text = os.fspath(pattern)
    with wrap_errors(text):
        infos = list(find_backend(text).glob(text))
    return sorted(infos, key=lambda item: item.url)


# ---------------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def atomic_write(url: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file atomically: it appears when the `with` block ends, and not at all if the block raises.

    Local: a temporary file in the target's folder is synced to disk and renamed. Remote: a local temporary file is
    uploaded and verified. Missing folders are created. `mode` is "wb" or "w" (UTF-8, newlines unchanged,
    bytes of names that are not UTF-8 escaped).
    """
    if mode not in ("wb", "w", "wt"):
        raise ValueError(f"atomic_write: expected mode 'wb' or 'w', found {mode!r}")
    target = os.fspath(url)
    folder = None if is_remote(target) else os.path.dirname(os.path.abspath(local_path(target)))
    with wrap_errors(target):
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        temporary = _temporary_file(target, folder)
    try:
        text_options = {} if "b" in mode else {"encoding": "utf-8", "errors": ESCAPE_ERRORS, "newline": ""}
        check_disk = partial(wrap_disk_full_errors, target, os.path.dirname(temporary))
        with check_disk(), open(temporary, mode, **text_options) as file:  # type: ignore[call-overload]
            yield file
            with wrap_errors(target), check_disk():
                file.flush()
                os.fsync(file.fileno())
        with wrap_errors(target):
            if folder is None:
                find_backend(target).put(temporary, target)
            else:
                os.replace(temporary, local_path(target))
                sync_folder(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_bytes(url: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(url, "wb") as file:
        file.write(data)


def write_text(url: str | os.PathLike[str], text: str) -> None:
    r"""Write a UTF-8 text file atomically. Bytes of names that are not UTF-8 are written as `\xNN`."""
    write_bytes(url, text.encode("utf-8", ESCAPE_ERRORS))


def makedirs(url: str | os.PathLike[str]) -> None:
    """Create a local folder and its parents; do nothing for a remote URL."""
    if not is_remote(url):
        with wrap_errors(os.fspath(url)):
            os.makedirs(local_path(url), exist_ok=True)


def remove(url: str | os.PathLike[str]) -> None:
    """Remove one file or object, never a folder; a missing file is not an error."""
    text = os.fspath(url)
    with wrap_errors(text):
        find_backend(text).remove(text)


def download(url: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a remote (or local) file to a local path atomically, and check its size against the store's."""
    source, path = os.fspath(url), local_path(target)
    folder = os.path.dirname(os.path.abspath(path))
    with wrap_errors(source):
        os.makedirs(folder, exist_ok=True)
        temporary = _temporary_file(path, folder)
        try:
            with wrap_disk_full_errors(path, folder):
                _get_verified(source, temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def upload(source: str | os.PathLike[str], url: str | os.PathLike[str]) -> None:
    """Copy a local file to a remote (or local) path atomically, and check the size that the store reports."""
    copy(local_path(source), url)


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy one file atomically between any two paths or URLs."""
    src, dst = os.fspath(source), os.fspath(target)
    if not is_remote(src) and is_remote(dst):
        with wrap_errors(src), open(local_path(src), "rb"):
            pass  # so that the error for a missing source names the source, not the target
        with wrap_errors(dst):
            find_backend(dst).put(local_path(src), dst)
    elif not is_remote(dst):
        download(src, dst)
    else:
        with tempfile.TemporaryDirectory() as folder:
            download(src, os.path.join(folder, "copy"))
            copy(os.path.join(folder, "copy"), dst)


def _get_verified(url: str, path: str) -> None:
    file_info = find_backend(url).info(url)
    if file_info is None:
        raise FileNotFoundError(url)
    with open(path, "wb") as file:
        for part in read_parts(file_info):
            file.write(part)


def _temporary_file(target: str, folder: str | None) -> str:
    name = os.path.basename(target.rstrip("/"))
    path = temporary_name(os.path.join(folder or tempfile.gettempdir(), name), uuid.uuid4().hex[:16])
    # Not mkstemp: its mode makes the finished file unreadable for other users. Correcting that mode would need the
    # umask, and reading the umask sets it for all threads.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def sync_folder(folder: str) -> None:
    """Flush a local folder's entries (new and renamed files) to disk."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
