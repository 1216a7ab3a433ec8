"""Local and remote files behind one set of functions.

A path is a plain local path, a `file://` URL, an `s3://bucket/key` URL (boto3; `AWS_ENDPOINT_URL` and the usual
credential chain are honoured), an `https://` file (to read) or any other `scheme://` that fsspec can open (gs, az, hf,
memory, …); `fsspec+s3://` reaches S3 through fsspec's s3fs, for those who set that up in fsspec's own way. Every
function takes any of them and raises `StorageError`, which names the path and says what to do. Files appear whole or
not at all. `open_lm.storage.backends` holds the file systems; no module but it and those below knows boto3 or fsspec.
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
    local_path,
    parse_bytes,
    temporary_name,
)
from open_lm.storage.retries import (
    IncompleteTransfer,
    OtherSize,
    Stalled,
    back_off,
    explained,
    full_disk_explained,
    in_background,
)

__all__ = [
    "FSSPEC_PREFIX", "READ_TIMEOUT_S", "FileInfo", "OtherSize", "Stalled", "atomic_write", "back_off", "copy",
    "download", "exists", "full_disk_explained", "glob", "glob_infos", "has_backend", "in_background", "info",
    "is_remote", "is_temporary", "join", "list_files", "list_infos", "local_path", "makedirs", "open_file",
    "parse_bytes", "read_bytes", "read_parts", "read_range", "read_text", "remove", "size", "temporary_name", "upload",
    "write_bytes", "write_text",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- addresses
def is_remote(url: str | os.PathLike[str]) -> bool:
    """Whether `url` names something that is not on this machine's file system (`file://` is local)."""
    match = SCHEME.match(os.fspath(url))
    return match is not None and match.group(1).lower() != "file"


def join(base: str | os.PathLike[str], *parts: str) -> str:
    """`base` and `parts` with exactly one slash between them; works for local paths and URLs alike."""
    text = os.fspath(base)
    if not is_remote(text):
        return os.path.join(local_path(text), *parts)
    return "/".join([text.rstrip("/"), *(part.strip("/") for part in parts)])


# ---------------------------------------------------------------------------------------------- reading
def open_file(url: str | os.PathLike[str], mode: str = "rb") -> IO[Any]:
    """Open for reading: "rb" gives bytes, "r" UTF-8 text. Remote S3 files are seekable and read in ranges.

    Writing goes through `atomic_write`.
    """
    if mode not in ("rb", "r", "rt"):
        raise ValueError(f"open_file reads only (mode {mode!r}); use atomic_write to write {os.fspath(url)!r}")
    text = os.fspath(url)
    with explained(text):
        raw = find_backend(text).open(text)
    return raw if mode == "rb" else io.TextIOWrapper(raw, encoding="utf-8")


def read_bytes(url: str | os.PathLike[str]) -> bytes:
    """The whole file."""
    text = os.fspath(url)
    with explained(text), find_backend(text).open(text) as file:
        return file.read()


def read_range(url: str | os.PathLike[str], start: int, length: int) -> bytes:
    """`length` bytes from byte `start` on, of S3 in a single request; StorageError where the file holds fewer."""
    text = os.fspath(url)
    with explained(text):
        data = find_backend(text).read_range(text, start, length)
    if len(data) != length:
        raise StorageError(f"{text}: cut short: {length} bytes were expected at {start}, {len(data)} are there")
    return data


def read_text(url: str | os.PathLike[str]) -> str:
    """The whole file as UTF-8 text."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise StorageError(f"{os.fspath(url)}: expected UTF-8 text, found {found}") from error


def read_parts(found: FileInfo, timeout_s: float = READ_TIMEOUT_S) -> Generator[bytes, None, None]:
    """A whole file that `info` has found, in order and in pieces; of a large remote one several are fetched at a time.

    A `found` made of an address and a size alone spares a request; OtherSize where the file has another size.
    A read that brings no byte for `timeout_s` seconds is told in a warning, given up and tried again.
    """
    done = 0
    with explained(found.url):
        for part in find_backend(found.url, timeout_s).parts(found):
            done += len(part)
            yield part
        if found.size not in (-1, done):
            raise IncompleteTransfer(f"the store says {found.size} bytes, {done} arrived")


def info(url: str | os.PathLike[str], timeout_s: float = READ_TIMEOUT_S) -> FileInfo | None:
    """Size and time of one file, or None where there is no such file (a folder is not a file)."""
    text = os.fspath(url)
    with explained(text):
        return find_backend(text, timeout_s).info(text)


def size(url: str | os.PathLike[str]) -> int:
    """Size of a file in bytes; StorageError where it does not exist."""
    found = info(url)
    if found is None:
        raise StorageError(f"{os.fspath(url)}: no such file")
    return found.size


def exists(url: str | os.PathLike[str]) -> bool:
    """Whether a file, or a folder with at least one file (locally: any folder), is there."""
    text = os.fspath(url)
    if not is_remote(text):
        return os.path.exists(local_path(text))
    if info(text) is not None:
        return True
    if is_web(text.removeprefix(FSSPEC_PREFIX)):
        return False  # a web server has no folders to look into
    with explained(text):
        return next(find_backend(text).walk(text, True), None) is not None


def list_infos(url: str | os.PathLike[str], recursive: bool = False) -> list[FileInfo]:
    """The files in a folder, sorted by address; empty where the folder does not exist.

    What is known of each file comes from the listing itself, without a request per file.
    """
    text = os.fspath(url)
    with explained(text):
        found = list(find_backend(text).walk(text, recursive))
    return sorted(found, key=lambda item: item.url)


def list_files(url: str | os.PathLike[str], recursive: bool = False) -> list[str]:
    """The addresses of the files in a folder, sorted; empty where the folder does not exist."""
    return [item.url for item in list_infos(url, recursive)]


def glob(pattern: str | os.PathLike[str]) -> list[str]:
    """Files that match a pattern with `*`, `?`, `[…]` and `**`, sorted. Nothing found is an empty list."""
    return [item.url for item in glob_infos(pattern)]


def glob_infos(pattern: str | os.PathLike[str]) -> list[FileInfo]:
    """`glob`, with each file's size, time and tag as the store's listing tells them."""
    text = os.fspath(pattern)
    with explained(text):
        found = list(find_backend(text).glob(text))
    return sorted(found, key=lambda item: item.url)


# ---------------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def atomic_write(url: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears whole at the end of the `with` block, or not at all when the block raises.

    Local: a temporary file beside the target, synced to disk and renamed. Remote: a local temporary file, uploaded and
    verified. Missing folders are made. `mode` is "wb" or "w" (UTF-8, newlines untouched).
    """
    if mode not in ("wb", "w", "wt"):
        raise ValueError(f"atomic_write takes mode 'wb' or 'w', not {mode!r}")
    target = os.fspath(url)
    folder = None if is_remote(target) else os.path.dirname(os.path.abspath(local_path(target)))
    with explained(target):
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        temporary = _temporary_file(target, folder)
    try:
        text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        enough_room = partial(full_disk_explained, target, os.path.dirname(temporary))
        with enough_room(), open(temporary, mode, **text_options) as file:  # type: ignore[call-overload]
            yield file
            with explained(target), enough_room():
                file.flush()
                os.fsync(file.fileno())
        with explained(target):
            if folder is None:
                find_backend(target).put(temporary, target)
            else:
                os.replace(temporary, local_path(target))
                _sync_folder(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_bytes(url: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file at once, atomically."""
    with atomic_write(url, "wb") as file:
        file.write(data)


def write_text(url: str | os.PathLike[str], text: str) -> None:
    """Write a whole UTF-8 text file at once, atomically."""
    write_bytes(url, text.encode("utf-8"))


def makedirs(url: str | os.PathLike[str]) -> None:
    """Make a local folder and its parents; remote stores need none."""
    if not is_remote(url):
        with explained(os.fspath(url)):
            os.makedirs(local_path(url), exist_ok=True)


def remove(url: str | os.PathLike[str]) -> None:
    """Remove one file or object, never a folder; one that is not there is no error."""
    text = os.fspath(url)
    with explained(text):
        find_backend(text).remove(text)


def download(url: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a remote (or local) file to a local path; it appears there whole and with the size the store reports."""
    source, path = os.fspath(url), local_path(target)
    folder = os.path.dirname(os.path.abspath(path))
    with explained(source):
        os.makedirs(folder, exist_ok=True)
        temporary = _temporary_file(path, folder)
        try:
            with full_disk_explained(path, folder):
                _get_verified(source, temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def upload(source: str | os.PathLike[str], url: str | os.PathLike[str]) -> None:
    """Copy a local file to a remote (or local) address, whole, and check the size the store then reports."""
    copy(local_path(source), url)


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy one file between any two addresses; the target appears whole."""
    src, dst = os.fspath(source), os.fspath(target)
    if not is_remote(src) and is_remote(dst):
        with explained(src), open(local_path(src), "rb"):
            pass  # a missing source is the source's error, not the target's
        with explained(dst):
            find_backend(dst).put(local_path(src), dst)
    elif not is_remote(dst):
        download(src, dst)
    else:
        with tempfile.TemporaryDirectory() as folder:
            download(src, os.path.join(folder, "copy"))
            copy(os.path.join(folder, "copy"), dst)


def _get_verified(url: str, path: str) -> None:
    found = find_backend(url).info(url)
    if found is None:
        raise FileNotFoundError(url)
    with open(path, "wb") as file:
        for part in read_parts(found):
            file.write(part)


def _temporary_file(target: str, folder: str | None) -> str:
    name = os.path.basename(target.rstrip("/"))
    path = temporary_name(os.path.join(folder or tempfile.gettempdir(), name), uuid.uuid4().hex[:16])
    # Opened here, and not by mkstemp, whose mode would make the finished file unreadable for colleagues; to ask for the
    # umask is to set it, for the other threads too.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder; the rename stands all the same
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
