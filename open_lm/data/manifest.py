"""Manifests of shards, and shard patterns. Import these names from `shard_format`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import braceexpand
import orjson

from open_lm import storage
from open_lm.data.block_sums import BlockSums
from open_lm.errors import DataError, join_problems
from open_lm.system.names import escape, exists, glob_paths, is_glob, literal_prefix, split_joined, unescape

MANIFEST_NAME, DATASET_NAME, REJECTS_NAME = "manifest.jsonl", "dataset.json", "rejects.jsonl"
TEXT_PREFIX = "text:"  # of the address of a shard that is made from raw text, see text_folder
_COUNT_KEYS = ("num_sequences", "num_chunks")
_DECOMPRESS = {  # commands that print a compressed tar, by its suffix
    **{".tar.gz": "gunzip -c", ".tgz": "gunzip -c", ".tar.zst": "zstd -dc"},
    **{".tar.xz": "xz -dc", ".tar.bz2": "bunzip2 -c"},
}
_MAX_LISTED = 20


@dataclass(frozen=True)
class ManifestEntry:
    """One shard: the stem of its file, its number of sequences, and the other fields of its line (sha256, …)."""

    shard: str
    num_sequences: int
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int | None:
        """Size of the shard's file, None if its line has none."""
        value = self.extra.get("num_bytes")
        return value if isinstance(value, int) else None

    @property
    def sha256(self) -> str:
        """The sha256 (hex) of the shard's file, "" if its line has none."""
        value = self.extra.get("sha256")
        return value.lower() if isinstance(value, str) else ""

    @property
    def block_sums(self) -> BlockSums | None:
        """The checksums of the shard's blocks, None if its line has none or they do not fit the shard."""
        return BlockSums.from_json(self.extra, self.num_sequences, self.num_bytes)


def shard_stem(url: str) -> str:
    """Return the name of a shard in manifests: its file name without `.tar`."""
    return url.rstrip("/").rpartition("/")[2].removesuffix(".tar")


def read_manifest(url: str) -> list[ManifestEntry]:
    """Read the entries of a manifest in order; a DataError lists all bad lines together."""
    entries: list[ManifestEntry] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    # Invalid UTF-8 is an error of its line.
    lines = storage.split_lines(storage.read_bytes(url).decode("utf-8", "surrogateescape"))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _parse_line(line)
        except ValueError as error:
            problems.append(f"{url} line {number}: {error}")
            continue
        if entry.shard in seen:
            problems.append(f"{url} line {number}: shard {entry.shard!r} is already in line {seen[entry.shard]}")
        seen[entry.shard] = number
        entries.append(entry)
    if not entries and not problems:
        problems.append(f"{url}: is empty; create it with python -m open_lm.utils.make_wds_manifest --data-dir FOLDER")
    if problems:
        raise DataError(join_limited(problems, "The manifest cannot be used"))
    return entries


def join_limited(problems: list[str], heading: str) -> str:
    """Join problems below a heading; list the first 20 and the number of the others."""
    hidden = len(problems) - _MAX_LISTED
    return join_problems(problems[:_MAX_LISTED] + ([f"and {hidden} more"] if hidden > 0 else []), heading)


def _parse_line(line: str) -> ManifestEntry:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    shard = record.pop("shard", None)
    if not isinstance(shard, str) or not shard:
        raise ValueError(f'"shard" must be a file name without .tar, found {shard!r}')
    count = next((record.pop(key) for key in _COUNT_KEYS if key in record), None)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f'"num_sequences" of shard {shard!r} must be a count, found {count!r}')
    return ManifestEntry(unescape(shard).removesuffix(".tar"), count, record)


def write_manifest(path: str | os.PathLike[str], entries: Sequence[ManifestEntry]) -> None:
    """Write all entries in order, atomically; `path` is local or remote."""
    with storage.atomic_write(os.fspath(path), "wb") as file:
        for entry in entries:
            record = {"shard": escape(entry.shard), "num_sequences": entry.num_sequences, **entry.extra}
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def shard_folder(url: str) -> str:
    """Return the folder of a shard; of one that is made from raw text, that of its index."""
    url = url.removeprefix(TEXT_PREFIX)
    return url.rpartition("/")[0] or ("/" if url.startswith("/") else ".")


def _entries_in(folder: str) -> dict[str, ManifestEntry] | None:
    """Read entries by shard stem from a folder's manifest.jsonl or sizes.json; None if it has neither."""
    manifest = storage.join(folder, MANIFEST_NAME)
    if storage.exists(manifest):
        return {entry.shard: entry for entry in read_manifest(manifest)}
    sizes = storage.join(folder, "sizes.json")
    if not storage.exists(sizes):
        return None
    try:
        table = orjson.loads(storage.read_bytes(sizes))
        return {shard_stem(name): ManifestEntry(shard_stem(name), int(count)) for name, count in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{sizes}: expected an object {{tar name: number of sequences}} ({error})") from error


def shard_entries(urls: Sequence[str]) -> dict[str, ManifestEntry] | None:
    """Return the entry of each url, from manifest.jsonl or sizes.json in the shards' folders.

    None if a folder has neither. (`__len__` holds only the sum, which for a single shard is its size.) Urls that are
    not listed in their folder are missing from the result. Commands (`pipe:`) and addresses that only a command can
    read have no folder.
    """
    tables: dict[str, dict[str, ManifestEntry] | None] = {}
    entries: dict[str, ManifestEntry] = {}
    for url in urls:
        if url.startswith("pipe:") or not storage.has_backend(url):
            return None
        folder = shard_folder(url)
        if folder not in tables:
            tables[folder] = _entries_in(folder)
        table = tables[folder]
        if table is None:
            length = _length_file(folder) if len(urls) == 1 else None
            return None if length is None else {url: ManifestEntry(shard_stem(url), length)}
        if shard_stem(url) in table:
            entries[url] = table[shard_stem(url)]
    return entries


def shard_sizes(urls: Sequence[str]) -> dict[str, int] | None:
    """Return the number of sequences of each url, from `shard_entries`."""
    entries = shard_entries(urls)
    return None if entries is None else {url: entry.num_sequences for url, entry in entries.items()}


def total_sequences(urls: Sequence[str]) -> int | None:
    """Return the total number of sequences: from shard_sizes, or from `__len__` in the folder of the first shard."""
    sizes = shard_sizes(urls)
    if sizes is not None and len(sizes) == len(set(urls)):
        return sum(sizes[url] for url in urls)
    if not urls or urls[0].startswith("pipe:"):
        return None
    return _length_file(shard_folder(urls[0]))


def _length_file(folder: str) -> int | None:
    path = storage.join(folder, "__len__")
    if not storage.exists(path):
        return None
    text = storage.read_text(path).strip()
    if not text.isdigit():
        raise DataError(f"{path}: expected the number of sequences, found {text[:40]!r}")
    return int(text)


def expand_shards(pattern: str) -> list[str]:
    """Return the shards of a pattern, in its order.

    `::` joins patterns. Each may hold brace ranges ({00000..00009}, {a,b}) and globs (local or remote), or be a folder
    of tars. Only braces are expanded in `pipe:` commands. Leading folders, or the complete pattern, that exist locally
    under their literal name are not a pattern. A DataError lists every missing local shard and every pattern without a
    match; remote shards without a glob are not looked up here.
    """
    urls: list[str] = []
    problems: list[str] = []
    for part in split_joined(pattern):
        for url in _expand_braces(part):
            found = _expand_one(url)
            urls += found
            if not found:
                name = f"{url} (of {pattern!r})" if url != pattern else url
                problems.append(name + (_folders_note(url) or compressed_note(_files_like(url))))
    if problems:
        raise DataError(join_limited(problems, "No shard found for the pattern"))
    return urls


def _expand_braces(part: str) -> list[str]:
    prefix = literal_prefix(part)
    try:
        if prefix == part:
            return [part]
        names = [prefix + name for name in braceexpand.braceexpand(part[len(prefix) :])]
        if "{" not in prefix or any(map(_expand_one, names)):
            return names
        return list(braceexpand.braceexpand(part))
    except ValueError as error:
        raise DataError(f"shard pattern {part!r}: unbalanced braces") from error


def _expand_one(url: str) -> list[str]:
    if url.startswith("pipe:"):
        return [url]
    is_remote = storage.is_remote(url)
    if is_remote and url.endswith("/"):
        return [name for name in storage.list_files(url) if name.endswith(".tar")]
    if not is_remote and os.path.isdir(folder := storage.local_path(url)):
        paths = (os.path.join(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith("."))
        return [path for path in paths if path.endswith(".tar") and os.path.isfile(path)]
    if is_glob(url) and not (is_remote and storage.info(url)):
        return [name for name in storage.glob(url) if name.endswith(".tar")]
    return [url] if is_remote or exists(url) else []


def _folders_note(url: str) -> str:
    """Return a note for an error about a local folder without shards if there are some one or two levels below."""
    folder = storage.local_path(url)
    if storage.is_remote(url) or not os.path.isdir(folder):
        return ""
    shards = [path for levels in ("*/*.tar", "*/*/*.tar") for path in glob_paths(os.path.join(folder, levels))]
    below = list(dict.fromkeys(map(os.path.dirname, shards)))
    return f" (shards are in folders below it, such as {below[0]})" if below else ""


def _files_like(url: str) -> list[str]:
    """Return the files of any name that a pattern without shards selects, with or without more suffixes."""
    if url.endswith("/") or os.path.isdir(storage.local_path(url)):
        return storage.list_files(url)
    return storage.glob(url if url.endswith("*") else f"{url}*")


def compressed_note(files: Sequence[str]) -> str:
    """Return a note for an error about missing shards if there are compressed ones among `files`, else ""."""
    compressed = [name for name in files if name.lower().endswith(tuple(_DECOMPRESS))]
    if not compressed:
        return ""
    command = next(command for suffix, command in _DECOMPRESS.items() if compressed[0].lower().endswith(suffix))
    return (
        f": found {len(compressed)} compressed tar files, such as {compressed[0]}, but shards are .tar files that are "
        f"read at any position; decompress them first (training also reads a local file with 'pipe:{command} FILE')"
    )
