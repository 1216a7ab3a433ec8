"""The manifest of a bundle: manifest.json with the size and the sha256 of every file.

A bundle holds regular files in folders only. Symbolic links, special files and names that are not UTF-8 have no place
in it, because copies of a bundle would differ from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import DataError, join_problems
from open_lm.release.layout import MANIFEST, SIGNATURE
from open_lm.storage.retries import wrap_errors
from open_lm.storage.strict_json import to_json
from open_lm.system.cpus import available_cpus
from open_lm.system.names import printable

SCHEMA = "open_lm.bundle_manifest/1"
# Added by version control and by the hub to copies of a bundle; not part of it.
IGNORED = (".git", ".gitattributes", ".cache/huggingface")
MAX_BYTES = 256 * 2**20  # of manifest.json and of the signature, about a million files
_CHUNK_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of a file."""

    num_bytes: int
    sha256: str


def write_manifest(bundle: Path) -> Path:
    """Write manifest.json atomically, for all files of a bundle but itself and the signature.

    Raises:
        DataError: the bundle has files that it must not have.
    """
    problems: list[str] = []
    records = hash_files(bundle, problems)
    if problems:
        raise DataError(join_problems(problems, f"{bundle}: cannot be released"))
    content = {
        "schema": SCHEMA,
        "num_files": len(records),
        "num_bytes": sum(record.num_bytes for record in records.values()),
        "files": [
            {"path": path, "bytes": record.num_bytes, "sha256": record.sha256} for path, record in records.items()
        ],
    }
    storage.write_text(bundle / MANIFEST, to_json(content, indent=1, ensure_ascii=False) + "\n")
    return bundle / MANIFEST


def hash_files(bundle: Path, problems: list[str]) -> dict[str, FileRecord]:
    """Return the records of all files but manifest and signature, sorted by path; append what a bundle must not have.

    Raises:
        StorageError: a file cannot be read.
    """
    paths = sorted(path for path in bundle_files(bundle, problems) if path not in (MANIFEST, SIGNATURE))
    with ThreadPoolExecutor(min(8, available_cpus())) as pool:
        return dict(zip(paths, pool.map(lambda path: _hash(bundle, path), paths), strict=True))


def bundle_files(bundle: Path, problems: list[str]) -> Iterator[str]:
    """Yield the paths of all regular files, relative to the bundle, without following links.

    Appends a problem for each symbolic link, special file, and name that is not UTF-8 or holds a control character.
    """
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(bundle / folder) as entries:
            children = sorted(entries, key=lambda entry: entry.name)
        for entry in children:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if path in IGNORED:
                continue
            if problem := _forbidden(entry):
                problems.append(f"{printable(path)!r}: {problem}")
            elif entry.is_dir(follow_symlinks=False):
                pending.append(path)
            else:
                yield path


def _forbidden(entry: os.DirEntry[str]) -> str | None:
    """Return the reason why a bundle must not have a file or folder; None if it may."""
    mode = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        return "is a symbolic link; a bundle holds regular files only, so replace it by a copy"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return "is no regular file; remove it"
    return _forbidden_name(entry.name)


def _forbidden_name(name: str) -> str | None:
    if printable(name) != name:
        return "the name is not UTF-8; rename it"
    if "\\" in name or any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "the name holds a backslash or a control character; rename it"
    return None


def _hash(bundle: Path, path: str) -> FileRecord:
    digest, num_bytes = hashlib.sha256(), 0
    with wrap_errors(str(bundle / path)), open(bundle / path, "rb", opener=open_no_link) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileRecord(num_bytes, digest.hexdigest())


def open_no_link(path: str, flags: int) -> int:
    """Open a file, but not through a symbolic link; the `opener` of open()."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


def read_manifest(bundle: Path) -> dict[str, FileRecord]:
    """Read manifest.json.

    Raises:
        DataError: it is missing, malformed, or names paths outside the bundle.
    """
    path = bundle / MANIFEST
    try:
        with open(path, "rb", opener=open_no_link) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected the manifest of a bundle") from error
    if len(raw) > MAX_BYTES:
        raise DataError(f"{path}: found more than {MAX_BYTES:,} bytes; expected the manifest of a bundle")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected the manifest of a bundle") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("files"), list):
        raise DataError(f"{path}: expected a manifest with the schema {SCHEMA!r} and a list of files")
    return _records(path, content["files"])


def _records(path: Path, files: Sequence[Any]) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    problems = []
    for number, item in enumerate(files, start=1):
        name, num_bytes, sha256 = (
            (item.get(key) for key in ("path", "bytes", "sha256")) if isinstance(item, dict) else (None,) * 3
        )
        if not isinstance(name, str) or not is_inside(name) or name in (MANIFEST, SIGNATURE):
            problems.append(f"entry {number}: {name!r} is not the path of a file inside the bundle")
        elif name in records:
            problems.append(f"entry {number}: {name!r} is listed a second time")
        elif type(num_bytes) is not int or num_bytes < 0 or not isinstance(sha256, str):
            problems.append(f"entry {number}: {name!r} has no valid size and sha256")
        elif not _SHA256.fullmatch(sha256):
            problems.append(f"entry {number}: {name!r} has the sha256 {sha256!r}, expected 64 hexadecimal digits")
        else:
            records[name] = FileRecord(num_bytes, sha256)
    if problems:
        raise DataError(f"{path}: {join_problems(problems[:20], 'not a valid manifest')}")
    return records


def is_inside(path: str) -> bool:
    """Return whether a text is a relative path with normal parts: no root, drive, "..", "." or backslash."""
    parts = path.split("/")
    is_plain = all(part not in ("", ".", "..") and _forbidden_name(part) is None for part in parts)
    return is_plain and not re.match(r"[A-Za-z]:", path)


def compare(expected: Mapping[str, FileRecord], found: Mapping[str, FileRecord]) -> list[str]:
    """Return a line for each file that is missing, was added or differs from the manifest."""
    problems = [f"{path}: missing" for path in expected if path not in found]
    problems += [f"{path}: not in {MANIFEST}" for path in found if path not in expected]
    for path, record in expected.items():
        actual = found.get(path, record)
        if actual.num_bytes != record.num_bytes:
            problems.append(f"{path}: found {actual.num_bytes:,} bytes, expected {record.num_bytes:,}")
        elif actual.sha256 != record.sha256:
            problems.append(f"{path}: found sha256 {actual.sha256[:16]}…, expected {record.sha256[:16]}…")
    return sorted(problems)
