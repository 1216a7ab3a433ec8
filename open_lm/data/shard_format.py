"""Read and write token shards and their manifests.

A shard is a tar file; each member holds the seq_len + 1 ids of one sequence in one of `MEMBER_KINDS`:

    npy      a 1-D integer array, in the smallest unsigned type that holds the vocabulary (allow_pickle is never used)
    json.gz  a gzip-compressed JSON list          json  a JSON list
    txt      a Python list literal; may hold the string "<|endoftext|>" in place of the end-of-text id

The folder of the shards has a `manifest.jsonl` with one line per shard: {"shard": "<stem>", "num_sequences": n, …}.
A sequence that documents could not fill ends in `PAD_ID`: -1 in every kind. Negative ids count from the end of the
vocabulary, so that readers without support for padding still get a valid id. An npy member with pads is signed, all
others are unsigned. Unsigned ids of 32 bits may have flags (see token_flags); all bits set is padding there.

Ids are 1-D numpy arrays everywhere: int64 when decoded, any integer type when encoded.

datapreprocess imports no other module of this package, so the names it needs from other modules are exported here.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any

import numpy as np

from open_lm import storage
from open_lm.data.block_sums import BlockHasher
from open_lm.data.hashing import GOLDEN_GAMMA, splitmix64
from open_lm.data.manifest import (
    DATASET_NAME,
    MANIFEST_NAME,
    REJECTS_NAME,
    ManifestEntry,
    expand_shards,
    read_manifest,
    shard_entries,
    shard_folder,
    shard_sizes,
    shard_stem,
    total_sequences,
    write_manifest,
)
from open_lm.data.members import (
    END_OF_TEXT_STRING,
    MEMBER_KINDS,
    PAD_ID,
    decode_member,
    encode_member,
    token_dtype,
)
from open_lm.data.npy_block import Buffer, matching_names, npy_members, tar_header
from open_lm.data.token_flags import FLAGGED_DTYPE, count_tokens, flag_document
from open_lm.errors import DataError

__all__ = [
    "DATASET_NAME", "END_OF_TEXT_STRING", "FLAGGED_DTYPE", "GOLDEN_GAMMA", "KEY_DIGITS", "MANIFEST_NAME",
    "MEMBER_KINDS", "PAD_ID", "REJECTS_NAME", "ManifestEntry", "Member", "ShardInfo", "ShardWriter", "decode_member",
    "encode_member", "expand_shards", "flag_document", "index_shard", "iter_files", "member_key", "read_manifest",
    "shard_entries", "shard_folder", "shard_sizes", "shard_stem", "split_name", "splitmix64", "token_dtype",
    "total_sequences", "write_manifest",
]  # fmt: skip

_BLOCK = tarfile.BLOCKSIZE
KEY_DIGITS = 12
_BATCH_BYTES = 4 << 20  # of members built at a time, so that they stay in the CPU cache until they are written

TarInput = Buffer | IO[bytes]


# --- tar files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """The position of one sequence in a shard: data[offset : offset + size], in bytes."""

    key: str
    kind: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and kind like webdataset: at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), kind.lower()


def index_shard(source: TarInput, name: str) -> list[Member]:
    """Return all members of known kinds, in file order, from the tar headers only.

    DataError as in `iter_files`, and for a shard without a member of a known kind.
    """
    members: list[Member] = []
    other_kinds: dict[str, str] = {}  # kind -> the first member's name
    for file_name, offset, size in iter_files(source, name):
        key, kind = split_name(file_name)
        if kind in MEMBER_KINDS:
            members.append(Member(key, kind, offset, size))
        else:
            other_kinds.setdefault(kind, file_name)
    if not members:
        known = ", ".join(MEMBER_KINDS)
        raise DataError(f"{name}: no member of a known kind ({known}); {_describe_unknown(other_kinds)}")
    return members


def _describe_unknown(names: Mapping[str, str]) -> str:
    """Describe the unknown kinds of members, each with a member's name; explain a dot before a known kind."""
    if not names:
        return "it is empty"
    found = f"found {', '.join(sorted(kind or '(no suffix)' for kind in names)[:5])}"
    dotted = next((n for kind, n in names.items() if kind.endswith(tuple(f".{k}" for k in MEMBER_KINDS))), None)
    hint = f". The kind of {dotted} begins at the first dot of its name; write the shard again without dots in keys"
    return found + (hint if dotted else "")


def iter_files(source: TarInput, name: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size in bytes of every regular file in a tar, in order.

    DataError, with the tar's `name` and the byte offset, if it is not a tar or is truncated (a tar without its
    end-of-archive mark counts as truncated).
    """
    size, read = _reader(source)
    offset, long_name = 0, ""
    while (block := read(offset, _BLOCK)) != bytes(_BLOCK):
        info = _parse_header(block, name, offset, size)
        start = offset + _BLOCK
        stride = _BLOCK + -(-info.size // _BLOCK) * _BLOCK
        offset += stride
        if start + info.size > size:
            raise DataError(
                f"{name}: cut short: the member {info.name!r} at byte {start - _BLOCK} needs {info.size} bytes, "
                f"but the file ends at byte {size}; create or copy the shard again"
            )
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            long_name = _extended_name(read(start, info.size), info.type) or long_name
            continue
        if info.isreg():
            yield long_name or info.name, start, info.size
            if isinstance(source, Buffer):
                for next_name in matching_names(source, block, offset, stride):
                    yield next_name, offset + _BLOCK, info.size
                    offset += stride
        long_name = ""


def _reader(source: TarInput) -> tuple[int, Any]:
    """Return the size of a tar and a function (offset, count) -> bytes."""
    if isinstance(source, Buffer):
        return len(source), lambda offset, count: bytes(source[offset : offset + count])
    handle = source
    size = handle.seek(0, os.SEEK_END)

    def read(offset: int, count: int) -> bytes:
        handle.seek(offset)
        return handle.read(count)

    return size, read


def _parse_header(block: bytes, name: str, offset: int, size: int) -> tarfile.TarInfo:
    if len(block) < _BLOCK:
        raise DataError(
            f"{name}: cut short: it ends at byte {size} without the end mark of a tar; create or copy the shard again"
        )
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        hint = "it is compressed; decompress it first" if block[:2] == b"\x1f\x8b" else str(error)
        raise DataError(f"{name}: no valid tar header at byte {offset} ({hint})") from error


def _extended_name(data: bytes, type_flag: bytes) -> str:
    """Return the member name from a GNU long-name block or a pax header ("<length> path=<value>\\n" records)."""
    if type_flag == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while data:
        length = data.partition(b" ")[0]
        if not length.isdigit() or int(length) <= len(length):
            return ""
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return ""


def member_key(number: int) -> str:
    """Return the key of the sequence at position `number` of the full data set, counted from 0."""
    return f"{number:0{KEY_DIGITS}d}"


@dataclass(frozen=True)
class ShardInfo:
    """A written shard: its sequences, tokens (without pads), and the size and SHA-256 of the file.

    `num_masked` of the tokens are no targets (token_flags; 0 without flags). `block_sums` are the keys of
    `BlockSums.to_json`; empty if the members differ in size or npy header.
    """

    stem: str
    num_sequences: int
    num_tokens: int
    num_bytes: int
    sha256: str
    block_sums: dict[str, Any] = field(default_factory=dict)
    num_masked: int = 0


class ShardWriter:
    """An atomic writer of one shard. The same members give the same bytes: no time, owner or host is stored.

        with ShardWriter("out/shard-0000000.tar", "npy", dtype=token_dtype(50432)) as writer:
            writer.write("000000000000", ids)
        writer.info.num_sequences

    `path` is local or remote. An exception inside the `with` leaves no file.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, *, dtype: np.dtype[Any] | None = None) -> None:
        if kind not in MEMBER_KINDS:
            raise DataError(f"unknown member kind {kind!r}; known: {', '.join(MEMBER_KINDS)}")
        self.path, self.kind, self.dtype = os.fspath(path), kind, dtype
        self._num_sequences = self._num_tokens = self._num_masked = self._num_bytes = 0
        self._hash, self._blocks = hashlib.sha256(), BlockHasher()
        self._block_sums: dict[str, Any] = {}
        self._heads: set[tuple[int, bytes]] = set()  # bytes and npy header of the members
        self._closing = storage.atomic_write(self.path, "wb")
        self._file: IO[bytes] = self._closing.__enter__()

    def write(self, key: str, ids: np.ndarray) -> None:
        """Append one sequence (T,). The key must not contain a dot, which would end it."""
        if not key or "." in key:
            raise ValueError(f"a member key must be non-empty and without a dot, got {key!r}")
        data = encode_member(ids, self.kind, self.dtype)
        self._note_head(len(data), data)
        self._put(tar_header(f"{key}.{self.kind}", len(data)) + data + bytes(-len(data) % _BLOCK))
        self._count(ids[None])

    def write_numbered(self, first: int, rows: np.ndarray) -> None:
        """Append sequences (n, T), with keys from the number `first` on (see `member_key`).

        The bytes are the same as from `write`; for unsigned npy, which holds no pads, this is faster.
        """
        if self.kind != "npy" or rows.dtype.kind != "u" or not rows.size or (self.dtype or rows.dtype) != rows.dtype:
            for number, ids in enumerate(rows, start=first):
                self.write(member_key(number), ids)
            return
        step = max(1, _BATCH_BYTES // rows[0].nbytes)
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            members = npy_members(first + start, KEY_DIGITS, batch)
            self._note_head(members.shape[1] - _BLOCK, members[0, _BLOCK : 2 * _BLOCK].tobytes())
            self._put(members.reshape(-1).data)
            self._count(batch)

    def _count(self, rows: np.ndarray) -> None:
        self._num_sequences += len(rows)
        if rows.dtype == FLAGGED_DTYPE:
            tokens, trained = count_tokens(rows)
            self._num_masked += tokens - trained
        else:
            tokens = rows.size if rows.dtype.kind == "u" else int(np.count_nonzero(rows != PAD_ID))
        self._num_tokens += tokens

    def _note_head(self, num_bytes: int, data: bytes) -> None:
        blocks = -(-num_bytes // _BLOCK)
        self._heads.add((blocks, data[: data.find(b"\n") + 1] if self.kind == "npy" else b""))

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._blocks.update(data)
        self._num_bytes += len(data)

    @property
    def info(self) -> ShardInfo:
        """The counts so far; final, with the checksum of the complete file, after the `with`."""
        stem = shard_stem(self.path)
        digest = self._hash.hexdigest()
        counts = (self._num_sequences, self._num_tokens, self._num_bytes)
        return ShardInfo(stem, *counts, digest, self._block_sums, self._num_masked)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            end = self._num_bytes + 2 * _BLOCK
            self._put(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))
            if self.kind == "npy" and len(self._heads) == 1:
                ((blocks, _),) = self._heads
                self._block_sums = self._blocks.finish((blocks + 1) * _BLOCK).to_json()
        self._closing.__exit__(kind, error, trace)
